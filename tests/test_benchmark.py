"""The benchmark on tiny networks: cells once each, also after a kill, a failure, a corrupt line; the leaderboard."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, start
from PIL import Image

import attacks
import benchmark
import defenses
import leaderboard
import report
from config import BenchmarkConfig, EraseConfig, TrainConfig, UserError, as_dict
from utils import processes
from utils.checkpoint import save_checkpoint
from utils.files import OWN_CODE, append_line, locked, read_lines
from utils.plot import pyplot
from utils.run import run_script

TINY = ["--attacks", "BadNets", "--datasets", "shapes10", "--models", "WRN-10-1", "--options", "train_size=300",
        "test_size=100", "device=cpu", "threads=1", "--train_options", "epochs=1", "batch_size=50", "--erase_options",
        "ratio=0.3", "epochs=2", "teacher_epochs=1", "batch_size=30"]


def bench(*args):
    return run_script(benchmark.main, BenchmarkConfig, [*TINY, *args])


def cells():
    return [(r["cell"]["defense"], r["config"]["seed"]) for r in read_lines("results/benchmark.jsonl")]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which a small grid was run, one of its cells a failure."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("bench")
        patch.chdir(folder)
        assert bench("--defenses", "finetune", "sage:sage_paths=8-9", "clp", "finetune", "--seeds", "1", "2") == 2
    return folder


def test_every_cell_once_and_the_failed_ones_recorded(done, monkeypatch, capsys):
    monkeypatch.chdir(done)
    assert sorted(cells()) == [("", 1), ("clp", 1), ("clp", 2), ("finetune", 1), ("finetune", 2)]
    errors = read_lines("results/errors.jsonl")
    assert [e["cell"] for e in errors[:2]] == [f"BadNets / sage:sage_paths=8-9 / seed {s}" for s in (1, 2)]
    assert "the stages are 1 to 3" in errors[0]["error"]
    by_hand = next(r for r in read_lines("results/benchmark.jsonl") if r["cell"]["defense"] == "clp")
    assert set(by_hand["metrics"]) == {"backdoored", "CLP"}
    assert "history" not in by_hand
    left = [p.name for p in Path("results/cells").glob("*/*") if p.name not in ("lock", "finish")]
    assert sorted(set(left)) == ["log.txt"], "of the failed cells; erased networks are kept on demand only"
    before = Path("results/benchmark.jsonl").read_text()
    assert bench("--defenses", "clp", "finetune", "--seeds", "1", "2") == 0
    out = capsys.readouterr().out
    assert "training: 0 cells to run" in out
    assert "erasing: 0 cells to run" in out
    assert "5 of 5 cells are in" in out
    assert Path("results/benchmark.jsonl").read_text() == before
    # a corrupt line is named and left out; the cell that it was is run again
    lines = before.splitlines()
    Path("results/benchmark.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:-40]]))
    assert bench("--defenses", "clp", "finetune", "--seeds", "1", "2") == 0
    seen = capsys.readouterr()
    assert f"results/benchmark.jsonl:{len(lines)} is no result line" in seen.err
    assert "erasing: 1 cells to run" in seen.out
    again, first = read_lines("results/benchmark.jsonl")[-1], json.loads(lines[-1])
    assert again["metrics"] == first["metrics"]
    assert again["config"] == first["config"]


def test_a_killed_benchmark_goes_on_in_the_middle_of_a_cell(workplace):
    args = [*TINY, "--defenses", "finetune:epochs=15", "--seeds", "3"]
    process = start(workplace, "benchmark.py", *args)

    def seen():
        text = ""
        for path in workplace.glob("results/cells/*/log.txt"):
            with contextlib.suppress(FileNotFoundError):  # the training cell was just finished
                text += path.read_text()
        return text

    while "finetune  epoch  2/15" not in seen():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert cells() == [("", 1)]
    assert bench(*args[len(TINY):], "--keep") == 0
    assert "finetune: going on after epoch" in seen()
    assert cells() == [("", 1), ("finetune:epochs=15", 3)]
    (record,) = [r for r in read_lines("results/benchmark.jsonl") if r["cell"]["defense"]]
    with pytest.MonkeyPatch.context() as patch:
        (workplace / "other").mkdir()
        patch.chdir(workplace / "other")
        assert bench(*args[len(TINY):]) == 0
        assert read_lines("results/benchmark.jsonl")[-1]["metrics"] == record["metrics"]


def test_processes_beside_each_other_and_one_that_is_killed(workplace, monkeypatch):
    popen, killed = processes.subprocess.Popen, []

    def popen_and_kill(command, **kwargs):
        process = popen(command, **kwargs)
        if "main.py" in command[1] and not killed:  # the first erasing cell loses its process in the middle
            killed.append(command)
            folder = Path(command[command.index("--config") + 1]).parent
            while "epoch  1/2" not in (folder / "log.txt").read_text():
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        return process

    monkeypatch.setattr(processes.subprocess, "Popen", popen_and_kill)
    assert bench("--defenses", "finetune", "clp", "--seeds", "1", "2", "--jobs", "2") == 0
    assert killed
    assert sorted(cells()) == [("", 1), ("clp", 1), ("clp", 2), ("finetune", 1), ("finetune", 2)]
    assert not Path("results/errors.jsonl").exists()


def scripts_in(folder, name):
    """The processes that run the script ``name`` in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text().split("\0")
            if str(folder) in " ".join(words) and any(w.endswith(name) for w in words):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("victim", ["script", "worker"])
def test_on_ray_with_a_process_that_is_killed(done, workplace, victim):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    shutil.copytree(done / "results" / "networks", workplace / "results" / "networks")
    trained = next(r for r in read_lines(done / "results/benchmark.jsonl") if not r["cell"]["defense"])
    append_line("results/benchmark.jsonl", trained)
    process = start(workplace, "benchmark.py", *TINY, "--defenses", "finetune:epochs=12", "clp", "--seeds", "1", "2",
                    "--engine", "ray", "--cpus_per_cell", "0.5", "--keep")
    killed = False
    while process.poll() is None and not killed:
        time.sleep(0.02)
        half = [p.parent for p in workplace.glob("results/cells/*/log.txt") if "epoch  2/12" in p.read_text()]
        for pid in half and scripts_in(half[0], "/main.py")[:1]:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if victim == "worker":
                    pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                    assert "ray" in Path(f"/proc/{pid}/cmdline").read_text()
                os.kill(pid, signal.SIGKILL)
                killed = True
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert killed
    assert "finetune: going on after epoch" in (half[0] / "log.txt").read_text()
    long = "finetune:epochs=12"
    assert sorted(cells()) == [("", 1), ("clp", 1), ("clp", 2), (long, 1), (long, 2)]
    assert not Path("results/errors.jsonl").exists()
    (there,) = {r["config"]["seed"] for r in read_lines("results/benchmark.jsonl") if r.get("resumed")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        assert bench("--defenses", long, "--seeds", str(there), "--out", "again") == 0
    undisturbed = read_lines("again/benchmark.jsonl")[-1]
    assert undisturbed["metrics"] in [r["metrics"] for r in read_lines("results/benchmark.jsonl")
                                      if r["cell"]["defense"] == long and r["config"]["seed"] == there]


def test_ctrl_c_ends_what_runs_on_ray(workplace):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    process = start(workplace, "benchmark.py", *TINY, "--train_options", "epochs=10000", "--defenses", "clp", "--seeds",
                    "1", "--engine", "ray")
    while not (running := scripts_in(workplace, "/train_badnet.py")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    end = time.time() + 30
    while set(running) & set(scripts_in(workplace, "/train_badnet.py")):
        assert time.time() < end, "a run is left behind"
        time.sleep(0.1)


def test_a_cell_is_the_same_whatever_the_options_of_other_defenses_are():
    def key(stored, network):
        return benchmark.what_counts(stored, {"s_model": network})

    own = as_dict(EraseConfig(defense="finetune"))
    assert key({**own, "sage_beta": 1.0, "threads": 7, "s_model": "x"}, "a") == key(own, "a")
    assert key(own, "a") != key(own, "b")
    assert key({**own, "ft_lr": 1.0}, "a") != key(own, "a")
    older = {k: v for k, v in own.items() if k != "ft_lr"}
    assert key(older, "a") == key(own, "a"), "an option that is newer than the line has its default"
    assert key({**own, "defense": "sage", "sage_beta": 1.0}, "a") != key({**own, "defense": "sage"}, "a")
    assert key({**own, "first": "clp", "clp_u": 1.0}, "a") != key({**own, "first": "clp"}, "a")
    assert key({**own, "clp_u": 1.0}, "a") == key(own, "a")
    trained = as_dict(TrainConfig())
    assert key({**trained, "sig_delta": 3.0}, "") == key(trained, "")


def test_a_changed_defense_or_trigger_of_ones_own_is_another_cell(workplace, monkeypatch):
    def key(**options):
        return benchmark.Cell("BadNets", "clp", EraseConfig(defense="clp", **options)).key()

    for what, options in ((("defense", "clp"), {}), (("trigger_type", "gridTrigger"), {"trigger_type": "gridTrigger"}),
                          (("defense", "pruning"), {"first": "pruning"})):
        assert OWN_CODE == {}
        plain = key(**options)
        monkeypatch.setitem(OWN_CODE, what, "mine.py")
        Path("mine.py").write_text("1")
        first = key(**options)
        Path("mine.py").write_text("2")
        assert len({plain, first, key(**options)}) == 3
        monkeypatch.delitem(OWN_CODE, what)


def test_a_defense_and_a_trigger_of_ones_own_are_found(tmp_path):
    for name in ("attacks", "defenses", "utils", "models", "config.py", "at.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "defenses" / "clp.py", tmp_path / "defenses" / "mine.py")
    text = (ROOT / "attacks" / "square.py").read_text().replace("squareTrigger", "myTrigger")
    (tmp_path / "attacks" / "own.py").write_text(text)
    code = "import attacks, defenses, utils.files as f; print(*f.OWN_CODE, *f.OWN_CODE.values(), sep=chr(10))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True).stdout
    assert sorted(found.splitlines()) == sorted(["('defense', 'mine')", "('trigger_type', 'myTrigger')",
                                                 f"{tmp_path}/defenses/mine.py", f"{tmp_path}/attacks/own.py"])


def test_the_defenses_and_triggers_of_this_project_are_known():
    assert set(defenses.OURS) == set(defenses.NAMES)
    assert {cls.__module__.rpartition(".")[2] for cls in attacks.TRIGGERS.values()} == set(attacks.OURS)


def test_data_of_another_kind_make_another_cell(workplace):
    """CIFAR-10's lossless files, put where its JPEG copy was, have the same options."""
    def network():
        grid = {"attacks": ["BadNets"], "defenses": ["nad"], "seeds": ["1"], "train_options": ["epochs=1"]}
        return Path(benchmark.cells_of(grid, Path("out"))[-1].config.s_model).parent

    cell = benchmark.Cell("BadNets", "nad", EraseConfig(seed=1, s_model="m"))
    files, lossless = line(1, 2.0, network="m"), {**line(1, 2.0, network="m"), "data": "torchvision"}
    place = network()
    assert benchmark.key_of(lossless) == cell.key() != benchmark.key_of(files)
    Path("data/CIFAR10/train").mkdir(parents=True)
    assert benchmark.key_of(files) == cell.key() != benchmark.key_of(lossless)
    assert network() != place
    assert benchmark.source_of(EraseConfig(dataset="folder", data_root="x")) == "image files"
    assert benchmark.source_of(EraseConfig(dataset="shapes10")) == "generated"


def test_the_folder_of_a_network_depends_on_what_makes_it():
    def folder(**options):
        return Path(benchmark.network_of("Blend", {"epochs": 3, **options}, Path("out")).config.checkpoint_root).name

    plain = folder()
    assert plain.startswith("cifar10_blend-")
    assert plain == folder(device="cpu", threads=3) == folder(sig_delta=7.0)
    assert len({plain, folder(epochs=4), folder(blend_alpha=0.3), folder(train_size=100), folder(amp="off")}) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "as_dict", lambda config: {**as_dict(config), "newer": 0})
        assert folder() == plain, "an option that comes later changes no name"


@pytest.mark.parametrize(("preset", "count"), [("six", 36), ("nad-table1", 72), ("defenses", 288), ("sage", 243),
                                               ("recipes", 216), ("linf", 81), ("ablations", 207), ("smoke", 6)])
def test_presets_have_their_cells(preset, count, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = [c for grid in benchmark.PRESETS[preset] for c in benchmark.cells_of(grid, Path("out"))]
    assert len({c.key() for c in cells}) == len(cells)
    assert sum(1 for c in cells if c.defense) == count


def test_every_preset_can_be_chosen():
    choices = {f.name: f.metadata["choices"] for f in fields(BenchmarkConfig)}["preset"]
    assert set(choices) == {"", *benchmark.PRESETS}


def test_axes_of_a_grid():
    grid = {"attacks": ["BadNets"], "defenses": ["nad", "clp"], "seeds": ["1", "2"], "train_options": ["epochs=1"],
            "ratios": ["0.01", "0.1"], "models": ["WRN-10-1", "WRN-16-2"]}
    cells = benchmark.cells_of(grid, Path("out"))
    configs = [c.config for c in cells if c.defense]
    grid["defenses"], grid["attacks"] = ["nad:target_label=5,lr=0.02"], ["SIG"]
    assert {tuple(c.config.keep) for c in benchmark.cells_of(grid, Path("out")) if c.defense} == {("target_label",)}
    assert sorted((c.s_name, c.ratio, c.defense, c.seed) for c in configs) == sorted(
        itertools.product(("WRN-10-1", "WRN-16-2"), (0.01, 0.1), ("clp", "nad"), (1, 2)))
    assert {c.config.s_name for c in cells if not c.defense} == {"WRN-10-1", "WRN-16-2"}


def test_a_run_goes_on_where_its_state_is(tmp_path):
    """Whoever left it: this process's first try, or one that died before."""
    states = tmp_path / "states"
    states.mkdir()
    script = (f"import os, pathlib, sys; print(sys.argv[1:], flush=True); "
              f"p = pathlib.Path({str(states)!r}, 'x-resume-1'); p.exists() or (p.mkdir(), os.kill(os.getpid(), 9))")
    (tmp_path / "config.json").write_text("{}")
    for expected in ("[]\n['--resume']\n", "['--resume']\n"):
        (tmp_path / "log.txt").write_text("")
        assert processes.run_script_apart([sys.executable, "-c", script], tmp_path, tmp_path, states, 1)[0] == 0
        assert (tmp_path / "log.txt").read_text() == expected


@pytest.mark.parametrize(("args", "text"), [
    (["--defenses", "clp", "--seeds", "1", "--erase_options", "trigger_type=none"], "leaves no ASR"),
    (["--defenses", "clp", "--seeds", "1", "--attacks", "Nothing"], "--attacks Nothing: one of BadNets; "),
    (["--defenses", "x", "--seeds", "1"], "--defenses x: one of anp; clp"),
    (["--defenses", "nad:beta9=1", "--seeds", "1"], "--defenses beta9=1: an option of EraseConfig"),
    (["--defenses", "nad:p=wrong", "--seeds", "1"], "--defenses p: a number is needed"),
    (["--defenses", "nad", "--seeds", "one"], "--seeds: seed: a whole number"),
    (["--defenses", "nad", "--seeds", "1", "--ratios", "2", "--erase_options", "epochs=1"],
     "--ratios: ratio: a number from 0.0 to 1.0 is allowed"),
    (["--defenses", "nad"], "--seeds: at least one is needed"),
    (["--preset", "all"], "--preset: one of "),
    (["--defenses", "nad:trigger_type=none", "--seeds", "1"], "leaves no ASR"),
    (["--defenses", "nad:seed=1", "--seeds", "1"], "--defenses seed=1: an option of EraseConfig"),
    (["--defenses", "nad", "--seeds", "1", "--ratios", "0.1"],
     "--ratios and --erase_options ratio=0.3: only one of them can give ratio"),
    (["--defenses", "nad:ratio=0.2", "--seeds", "1", "--ratios", "0.1", "--erase_options", "epochs=1"],
     "--ratios and --defenses nad:ratio=0.2: only one of them can give ratio"),
    (["--defenses", "nad", "--seeds", "1", "--models", "WRN-99"], "WRN-99"),
    (["--defenses", "nad", "--seeds", "1", "--gpus_per_cell", "0.5"], "--gpus_per_cell: of --engine ray only"),
    (["--defenses", "nad", "--seeds", "1", "--engine", "ray", "--jobs", "2"], "--jobs does not go with --engine ray"),
    (["--table"], "--table runs nothing and shows all results: not with --attacks, "),
])
def test_mistakes_get_one_line(workplace, capsys, args, text):
    assert bench(*args) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def line(seed, asr, defense="nad", attack="BadNets", acc=80.0, network="", **changes):
    config = as_dict(EraseConfig(seed=seed, defense=defense, s_model="m", beside=False, **changes))
    inputs = {"s_model": network or attack, "t_model": ""}
    metrics = {"clean_acc": acc, "clean_acc_non_target": acc, "asr": asr, "ra": 100 - asr}
    title = {"nad": "NAD", "clp": "CLP", "sage": "SAGE", "anp": "ANP"}[defense]
    return {"config": config, "data": "image files (jpg)",
            "cell": {"attack": attack, "defense": defense}, "inputs": inputs, "version": benchmark.VERSION,
            "metrics": {"backdoored": {**metrics, "clean_acc": 82.0, "asr": 99.9, "ra": 0.1}, title: metrics},
            "defense_seconds": {title: 30.4}, "machine": "cpu", "versions": {"torch": "2"}}


SECTION = "a\n<!-- benchmark -->\n{}\n<!-- end of benchmark -->\nb\n"


def readmes(monkeypatch):
    """READMEs in this folder instead of the project's, and an empty folder of published lines."""
    Path("published").mkdir()
    files = {Path("README.md"): leaderboard.render_short, Path("published/README.md"): leaderboard.render}
    files[Path("published/more.md")] = lambda records: f"{len(records)} lines"
    for file in files:
        file.write_text(SECTION.format("old"))
    monkeypatch.setattr(benchmark, "PUBLISHED", Path("published/benchmark.jsonl"))
    monkeypatch.setattr(report, "FILES", {
        file: {"benchmark": (render, "benchmark.jsonl")} for file, render in files.items()})


def test_leaderboard_by_hand(workplace, monkeypatch):
    runs = [line(1, 2.0, ratio=0.1), line(2, 3.0, ratio=0.1), line(2, 4.0, ratio=0.1), line(1, 9.0, ratio=0.1, p=4.0),
            line(1, 5.0, "clp", "Blend", 81.0, ratio=0.1), line(1, 6.0, attack="Blend", ratio=0.1),
            line(2, 7.0, attack="Blend", acc=79.0, ratio=0.1), line(1, 3.0, ratio=0.1, p=4.0, lr=0.3, beta1=0.0)]
    text = leaderboard.render(runs)
    assert text == (
        "**WRN-16-1, CIFAR-10 (image files (jpg)), `ratio 0.1`; seeds in a cell: 1 to 2.**\n\n"
        "| | ACC lost, 2 attacks | ASR, 2 attacks | seeds | seconds |\n|---|---|---|---|---|\n"
        "| CLP |  |  | 1 | 30 |\n| NAD | 2.25 ± 0.35 | 4.75 ± 1.06 | 2 | 30 |\n"
        "| NAD, `p 4.0` |  |  | 1 | 30 |\n| NAD [a] |  |  | 1 | 30 |\n\n"
        "| ACC | BadNets | Blend |\n|---|---|---|\n| backdoored | 82.0 | 82.0 |\n| CLP |  | 81.0 |\n"
        "| NAD | 80.0 | 79.5 ± 0.7 |\n| NAD, `p 4.0` | 80.0 |  |\n| NAD [a] | 80.0 |  |\n\n"
        "| ASR | BadNets | Blend |\n|---|---|---|\n| backdoored | 99.9 | 99.9 |\n| CLP |  | 5.0 |\n"
        "| NAD | 3.0 ± 1.4 | 6.5 ± 0.7 |\n| NAD, `p 4.0` | 9.0 |  |\n| NAD [a] | 3.0 |  |\n\n"
        "| RA | BadNets | Blend |\n|---|---|---|\n| backdoored | 0.1 | 0.1 |\n| CLP |  | 95.0 |\n"
        "| NAD | 97.0 ± 1.4 | 93.5 ± 0.7 |\n| NAD, `p 4.0` | 91.0 |  |\n| NAD [a] | 97.0 |  |\n\n"
        "NAD [a]: `--lr 0.3 --beta1 0.0 --p 4.0`\n\nMeasured on: cpu, torch 2.")
    for r in [*runs, {"no": "cell"}, {**line(1, 1.0), "version": 0}]:
        append_line("results/benchmark.jsonl", r)
    readmes(monkeypatch)
    for _ in range(2):
        assert run_script(benchmark.main, BenchmarkConfig, ["--table"]) == 0
        assert Path("published/README.md").read_text() == SECTION.format(text)
        assert Path("README.md").read_text() == SECTION.format("nothing was measured on all six attacks yet")
        assert Path("published/more.md").read_text() == SECTION.format(f"{len(runs) - 1} lines")
        assert len(read_lines(benchmark.PUBLISHED)) == len(runs) - 1, "of two with the same seed the newest"
    with pytest.raises(UserError, match="no <!-- x --> markers"):
        leaderboard.rewritten("", {"x": ""})


def test_short_leaderboard_by_hand():
    def runs(asr, seeds, *attacks, **more):
        return [line(s, asr + s, attack=attack, **more) for attack in attacks or leaderboard.SIX for s in seeds]

    records = [*runs(2.0, (1,)), *runs(9.0, (1, 2, 3), defense="clp"), *runs(4.0, (1, 2, 3), p=4.0, first="clp"),
               *runs(1.0, (1, 2), p=3.0), *runs(1.0, (1, 2, 3), "BadNets", lr=0.3), *runs(5.0, (1,), "WaNet"),
               *runs(6.0, (1, 2, 3), p=4.0, lr=0.3, beta1=0.0), *runs(0.0, (1,), "Blend", dataset="shapes10")]
    head = " | ".join(leaderboard.SIX) + " | WaNet |\n|---|---|---|---|---|---|---|---|\n"
    assert leaderboard.render_short(records) == (
        "**WRN-16-1, CIFAR-10 (image files (jpg)); seeds in a cell: 1 to 3.**\n\n"
        "NAD [a]: `--lr 0.3 --beta1 0.0 --p 4.0`\n\n"
        "| | ACC lost, the paper's six | ASR, the paper's six | seeds | seconds |\n|---|---|---|---|---|\n"
        "| CLP, then NAD, `p 4.0` | 2.00 | 6.00 ± 1.00 | 3 | 30 |\n| NAD [a] | 2.00 | 8.00 ± 1.00 | 3 | 30 |\n"
        "| CLP | 2.00 | 11.00 ± 1.00 | 3 | 30 |\n| NAD | 2.00 (2.6) | 3.00 (7.2) | 1 | 30 |\n\n| ASR | " + head
        + "| backdoored | 99.9 (95.03) | 99.9 (100) | 99.9 (99.92) | 99.9 (99.92) | 99.9 (98.27) | 99.9 "
        "| 99.9 (89.73) |\n| CLP, then NAD, `p 4.0` |" + 6 * " 6.0 ± 1.0 |" + "  |"
        "\n| NAD [a] |" + 6 * " 8.0 ± 1.0 |" + "  |\n| CLP |" + 6 * " 11.0 ± 1.0 |" + "  |"
        "\n| NAD | 3.0 (2.14) | 3.0 (3.73) | 3.0 (97.69) | 3.0 (10.5) | 3.0 (10.66) | 3.0 | 6.0 (22.98) |\n\n"
        + leaderboard.BRACKETS + "\n\nMeasured on: cpu, torch 2.")
    extra = [*records, *runs(15.0, (4,), defense="clp"),  # CLP by all its seeds, but its place by those of ANP
             *runs(20.0, (1, 2, 3), defense="anp")]
    text = leaderboard.render_short([*extra, *runs(9.2, (1, 2, 3), p=16.0)])
    assert ("| CLP | 2.00 | 13.00 ± 4.08 | 4 | 30 |\n| NAD, `p 16.0` | 2.00 | 11.20 ± 1.00 | 3 | 30 |" in text)
    order = "\n\nRows are in the order of the mean ASR over the six with the seeds "
    assert order + "1, 2, 3. With these, rows of more seeds have: CLP 11.00.\n\n| ASR |" in text
    text = leaderboard.render_short([*extra, *runs(1.0, (7, 8, 9), p=16.0)])
    assert order + "1, 2, 3. With these, rows of more seeds have: CLP 11.00." in text, "recipes have no say in them"
    assert text.index("| NAD [a] | 2.00 | 8.00") < text.index("| NAD, `p 16.0` | 2.00 | 9.00")
    five = runs(2.0, (1, 2, 3), *leaderboard.SIX[1:])
    assert leaderboard.render_short(five) == "nothing was measured on all six attacks yet"


def test_a_network_without_a_backdoor_comes_first():
    def with_reference(r, asr):
        metrics = {"clean_acc": 82.5, "clean_acc_non_target": 82.5, "asr": asr, "ra": 70.0}
        return {**r, "metrics": {**r["metrics"], "clean network": metrics}}

    records = [line(s, 2.0, attack=a) for s in (1, 2, 3) for a in leaderboard.SIX]
    assert "clean network" not in leaderboard.render_short(records)
    records = [with_reference(r, 6.0) if r["config"]["seed"] == 2 else r for r in records]
    text = leaderboard.render(records)
    assert ("|---|---|---|---|---|\n| clean network | -0.50 | 6.00 | 1 |  |\n| NAD | 2.00 (2.6) | 2.00 (7.2) | 3 | 30 |"
            in text)
    assert "| backdoored | 99.9 (95.03)" in text
    assert "\n| clean network |" + 6 * " 6.0 |" + "\n| NAD | 2.0 (2.14) |" in text, "nobody reported it"
    assert "|\n| clean network | -0.50 | 6.00 | 1 |  |\n| NAD" in leaderboard.render_short(records)
    with_row = next(r for r in records if "clean network" in r["metrics"])
    changed = {**with_row, "config": {**with_row["config"], "reference": "x.tar"}}
    assert benchmark.key_of(changed) == benchmark.key_of(with_row), "it does not decide what the defense does"


def test_recipes_on_fewer_attacks_have_a_table_of_their_own():
    def runs(asr, seeds, attacks, **more):
        return [line(s, asr + s, attack=attack, **more) for attack in attacks for s in seeds]

    text = leaderboard.render([
        *runs(2.0, (1, 2), leaderboard.SIX), *runs(5.0, (1,), leaderboard.SIX, defense="clp"),
        *runs(6.0, (1,), ("BadNets",), defense="anp"), *runs(3.0, (1,), ("BadNets", "Blend"), p=4.0),
        *runs(7.0, (1,), ("Blend",), p=16.0), *runs(8.0, (1,), ("Blend",), first="clp", lr=0.5),
        *runs(3.0, (1,), ("BadNets",), lr=0.3, p=4.0, beta1=0.0),
        *runs(1.0, (1, 2), ("SIG",), attention="max")])
    main, first, second, _ = text.split("| ACC lost / ASR, seed")[0], *text.split("\n\n")[-3:]
    assert first == ("| ACC lost / ASR, seed 1 | BadNets | Blend |\n|---|---|---|\n| NAD | 2.0 / 3.0 | 2.0 / 3.0 |\n"
                     "| NAD, `--lr 0.3 --beta1 0.0 --p 4.0` | 2.0 / 4.0 |  |\n"
                     "| NAD, `p 4.0` | 2.0 / 4.0 | 2.0 / 4.0 |\n| NAD, `p 16.0` |  | 2.0 / 8.0 |\n"
                     "| CLP, then NAD, `lr 0.5` |  | 2.0 / 9.0 |")
    assert second == ("| ACC lost / ASR, seeds 1, 2 | SIG |\n|---|---|\n| NAD | 2.0 / 3.5 ± 0.7 |\n"
                      "| NAD, `attention max` | 2.0 / 2.5 ± 0.7 |")
    assert "| ANP |" in main and "| CLP |" in main and "p 4.0" not in main and "attention max" not in main


def test_means_need_the_same_seeds_for_each_attack():
    text = leaderboard.render([line(1, 2.0), line(2, 4.0), line(1, 6.0, attack="Blend")])
    assert "| NAD |  |  | 1 to 2 | 30 |" in text
    assert "| NAD | 2.00 | 2.00 | 2 | 30 |" in leaderboard.render([line(s, 2.0, attack=a) for s in (1, 2)
                                                          for a in ("BadNets", "Blend")])


def test_seconds_are_those_of_one_machine():
    gpu = {**line(3, 2.0), "machine": "cuda", "defense_seconds": {"NAD": 2.0}}
    text = leaderboard.render([*({**line(s, 2.0), "machine": "cpu, 1 threads, bf16"} for s in (1, 2)), gpu])
    assert "| NAD | 2.00 | 2.00 | 3 | 30 |" in text
    assert text.endswith("Measured on: cpu, 1 thread, bf16, torch 2; cuda, torch 2. "
                         "Seconds: on cpu, 1 thread, bf16 only.")
    assert benchmark.key_of(line(1, 2.0, device="cuda")) == benchmark.key_of(line(1, 2.0)), "device auto is either"


def test_lines_of_a_shipped_network_that_was_replaced_are_not_shown(workplace, monkeypatch, capsys):
    readmes(monkeypatch)
    files = [workplace / "weight" / "s.tar", workplace / "results" / "s.tar"]  # the second one was made elsewhere too
    for k, file in enumerate(files):
        network = line(1, 2.0, network=f"{k}" * 64)
        network["config"]["s_model"] = str(file.relative_to(workplace))
        append_line(benchmark.PUBLISHED, network)
    assert run_script(benchmark.main, BenchmarkConfig, ["--table"]) == 0
    assert len(read_lines(benchmark.PUBLISHED)) == 2
    assert "published lines go" not in capsys.readouterr().out
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("another network")
    assert run_script(benchmark.main, BenchmarkConfig, ["--table"]) == 0
    assert "note: 1 published lines go" in capsys.readouterr().out
    assert [r["inputs"]["s_model"][0] for r in read_lines(benchmark.PUBLISHED)] == ["1"]


def test_of_lines_with_one_key_the_newest_is_published(workplace, monkeypatch):
    readmes(monkeypatch)
    for asr, time_, file in ((7.0, "2026-02", benchmark.PUBLISHED), (8.0, "2026-01", "results/benchmark.jsonl")):
        append_line(file, {**line(1, asr), "time": time_})
    assert run_script(benchmark.main, BenchmarkConfig, ["--table"]) == 0
    assert [leaderboard.outcome(r)["asr"] for r in read_lines(benchmark.PUBLISHED)] == [7.0]
    append_line("results/benchmark.jsonl", {**line(1, 9.0), "time": "2026-03"})
    assert run_script(benchmark.main, BenchmarkConfig, ["--table"]) == 0
    assert [leaderboard.outcome(r)["asr"] for r in read_lines(benchmark.PUBLISHED)] == [9.0]
    assert "| NAD | 9.0 (2.14) |" in Path("published/README.md").read_text()


def test_a_network_that_was_deleted_is_trained_again(done, monkeypatch, tmp_path):
    shutil.copytree(done, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    (cell,) = [c for c in benchmark.cells_of({
        "attacks": ["BadNets"], "defenses": ["clp"], "seeds": ["1"], "datasets": ["shapes10"], "models": ["WRN-10-1"],
        "options": TINY[7:11], "train_options": TINY[12:14]}, Path("results")) if not c.defense]
    assert benchmark.unfinished([cell], Path("results")) == []
    benchmark.student_file(cell.config, cell.config.checkpoint_root).unlink()
    assert benchmark.unfinished([cell], Path("results")) == [cell]


def test_lines_without_a_configuration_are_skipped(workplace):
    for config in (None, {}, 5, [1]):
        append_line("results/benchmark.jsonl", {**line(1, 2.0), "config": config})
    append_line("results/benchmark.jsonl", line(1, 2.0))
    assert len(benchmark.results("results/benchmark.jsonl")) == len(report.usable(Path("results/benchmark.jsonl"))) == 1


def test_reported_numbers_stand_in_brackets():
    text = leaderboard.render([line(1, 2.0), line(1, 9.0, p=4.0)])
    assert "| backdoored | 99.9 (95.03) |" in text
    assert "| NAD | 80.0 (89.87) |" in text
    assert "| NAD | 2.0 (2.14) |" in text
    assert "| NAD, `p 4.0` | 9.0 |" in text
    assert "In brackets: BackdoorBench" in text
    assert "| SAGE | 2.0 |" in leaderboard.render([line(1, 2.0, "sage")]), "with 5% clean images nobody does"
    six = [line(1, 2.0, attack=a) for a in leaderboard.SIX]
    text = leaderboard.render([*six, line(1, 3.0, "sage", ratio=0.01), line(1, 4.0, ratio=0.01)])
    assert "| SAGE, `ratio 0.01` | 2.0 / 3.0 (10.11) |" in text
    assert "| NAD, `ratio 0.01` | 2.0 / 4.0 |" in text
    assert "| NAD | 2.0 / 2.0 |" in text
    assert "(" not in leaderboard.render([line(1, 2.0, dataset="shapes10")]).replace("(image files (jpg))", "")


def test_two_networks_of_one_attack_are_two_columns():
    text = leaderboard.render([line(1, 2.0, network="a"), line(1, 4.0, network="b"), line(2, 6.0, network="b")])
    assert "| ASR | BadNets | BadNets (2) |" in text
    assert "| NAD | 5.0 ± 1.4 (2.14) | 2.0 |" in text, "the one with most lines keeps the name"
    assert leaderboard.render([line(1, 2.0), line(1, 4.0, test_size=9)]).count("| ASR | BadNets |") == 2


def test_attacks_without_a_shipped_network_have_tables_of_their_own_with_a_line_for_each_if_they_are_many():
    names = ["5 triggers, same label", "Class-specific", *(f"Shape, {k}" for k in range(leaderboard.WIDE - 1))]
    records = [line(1, 2.0), *(line(1, 3.0, attack=name) for name in reversed(names)),
               line(1, 4.0, "clp", names[-1]), line(2, 5.0, "clp", names[-1]),
               line(1, 9.0, "clp", names[0], network="b")]
    main, others = leaderboard.render(records).split("\n\n**")
    assert "| ASR | BadNets |" in main
    assert "other attacks; seeds" in others
    table = others.split("\n\n")[2].splitlines()
    assert table[0] == "| ACC / ASR / RA | backdoored | CLP | NAD |"
    assert [row.split(" | ")[0][2:] for row in table[2:]] == [names[0], f"{names[0]} (2)", *names[1:2],
                                                              *reversed(names[2:])]
    assert table[2:5] == ["| 5 triggers, same label | 82.0 / 99.9 / 0.1 |  | 80.0 / 3.0 / 97.0 |",
                          "| 5 triggers, same label (2) | 82.0 / 99.9 / 0.1 | 80.0 / 9.0 / 91.0 |  |",
                          "| Class-specific | 82.0 / 99.9 / 0.1 |  | 80.0 / 3.0 / 97.0 |"]
    assert f"| {names[-1]} | 82.0 / 99.9 / 0.1 | 80.0 / 4.5 ± 0.7 / 95.5 ± 0.7 | 80.0 / 3.0 / 97.0 |" in table
    assert ("| | ACC lost, 1 attack | ASR, 1 attack | seeds | seconds |\n|---|---|---|---|---|\n"
            "| CLP | 2.00 | 4.50 ± 0.71 | 2 | 30 |\n| NAD | 2.00 | 3.00 | 1 | 30 |\n" in others)
    others = leaderboard.render([r for r in records if r["cell"]["defense"] == "nad"]).split("\n\n**")[1]
    reference = {**records[2], "metrics": {**records[2]["metrics"], "clean network": leaderboard.outcome(records[2])}}
    recipe = line(1, 9.0, "clp", names[0], p=4.0, first="anp")
    text = leaderboard.render([*records, reference, recipe]).split("\n\n**")[1]
    assert "| CLP | 2.00 | 4.50 ± 0.71 | 2 | 30 |" in text, "of the clean network and of recipes no attacks are needed"
    assert "| clean network |  |  | 1 |  |" in text
    assert f"ACC lost, {len(names)} attacks |" in others, "a second network of one does not count in the means"
    assert "| NAD | 2.00 | 3.00 | 1 | 30 |" in others


def test_without_a_terminal_each_cell_leaves_a_line_with_the_time_left(monkeypatch, capsys):
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(now))
    progress = benchmark.CellProgress(5)
    for seed in (1, 2):
        progress.step(benchmark.Cell("BadNets", "clp", EraseConfig(seed=seed)))
    assert capsys.readouterr().out == ("1 of 5 cells, 00:40 left: BadNets / clp / seed 1\n"
                                       "2 of 5 cells, 00:45 left: BadNets / clp / seed 2\n")


def test_what_the_user_gives_wins_over_a_preset(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, "cells_of", lambda grid, out: seen.append(grid) or [])
    args = ["--preset", "smoke", "--models", "WRN-16-1", "--options", "epochs=2", "--erase_options", "lr=1"]
    assert run_script(benchmark.main, BenchmarkConfig, args) == 0
    preset = benchmark.PRESETS["smoke"][0]
    assert seen == [{**preset, "models": ["WRN-16-1"], "options": [*preset["options"], "epochs=2"],
                     "train_options": ["epochs=5", "epochs=2"], "erase_options": ["epochs=2", "lr=1"]}]


def test_a_network_is_measured_once_a_process(workplace, monkeypatch):
    measured = []
    evaluate = benchmark.erasing.evaluate
    monkeypatch.setattr(benchmark.erasing, "evaluate", lambda *args, **more: measured.append(args) or evaluate(
        *args, **more))
    monkeypatch.setattr(benchmark.erasing, "BEFORE", {})
    more = ["--attacks", "BadNets", "3 triggers, 3 labels", "--defenses", "clp", "--erase_options", "ratio=0.3"]
    assert bench(*more, "--seeds", "1", "2", "3") == 0
    assert len(measured) == 2 * (1 + 3)
    before = [r["metrics"]["backdoored"] for r in read_lines("results/benchmark.jsonl") if r["cell"]["defense"]]
    assert [before.count(metrics) for metrics in before] == [3] * 6
    assert "parts" in before[-1]
    assert bench(*more, "--seeds", "1", "--options", "test_size=50", "train_size=300", "device=cpu", "threads=1") == 0
    assert len(measured) == 2 * (1 + 3) + 2 * (1 + 1), "on other data it is measured again"


def test_a_script_that_ends_its_process_has_failed(monkeypatch, tmp_path):
    network = tmp_path / "s.tar"
    network.touch()
    cell = benchmark.Cell("BadNets", "clp", EraseConfig(defense="clp", s_model=str(network)))
    monkeypatch.setattr(benchmark.erasing, "main", lambda config: sys.exit(3))
    error = benchmark.attempt(cell, benchmark.run_here, BenchmarkConfig(), tmp_path)
    assert isinstance(error, SystemExit)
    benchmark.failed(cell, error, tmp_path)
    assert read_lines(tmp_path / "errors.jsonl")[0]["error"] == "SystemExit: 3"
    for code, text in ((3, "ended with exit code 3"), (2, "main.py: error: x"), (-9, "killed by signal 9")):
        error = benchmark.run_apart(cell, 1, 0, lambda *_, code=code: (code, "main.py: error: x"))
        assert text in str(error)


def test_a_lost_line_is_made_again(done, monkeypatch, tmp_path):
    shutil.copytree(done, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    before = read_lines("results/benchmark.jsonl")
    Path("results/benchmark.jsonl").unlink()
    assert bench("--defenses", "clp", "--seeds", "1") == 0
    assert sorted(cells()) == [("", 1), ("clp", 1)]
    first = next(r for r in before if r["cell"]["defense"] == "")
    assert next(r for r in read_lines("results/benchmark.jsonl"))["metrics"] == first["metrics"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_two_benchmarks_beside_each_other_count_no_cell_twice(workplace, jobs):
    grid = ["--defenses", "finetune", "clp", "--seeds", "1", "2", "--jobs", jobs]
    both = [start(workplace, "benchmark.py", *TINY, *grid)
            for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    assert sorted(cells()) == [("", 1), ("clp", 1), ("clp", 2), ("finetune", 1), ("finetune", 2)]
    assert not Path("results/errors.jsonl").exists()


def test_a_cell_that_another_process_finished_meanwhile_has_not_failed(monkeypatch, tmp_path):
    """Whatever became of the attempt, from whose feet the other one took the files."""
    network = tmp_path / "s.tar"
    network.touch()
    cell = benchmark.Cell("BadNets", "clp", EraseConfig(defense="clp", s_model=str(network)))

    def run(error):
        def run(cell):
            monkeypatch.setattr(benchmark, "unfinished", lambda cells, out: [])
            if isinstance(error, Exception):
                raise error
            return error
        return run

    for error in (None, UserError("none"), FileNotFoundError("log.txt")):
        monkeypatch.undo()
        assert benchmark.attempt(cell, run(error), BenchmarkConfig(), tmp_path) is None
    monkeypatch.undo()
    assert benchmark.attempt(cell, lambda cell: UserError("none"), BenchmarkConfig(), tmp_path).args == ("none",)


def test_a_run_that_outlives_its_benchmark_is_not_repeated(workplace):
    """It goes on when the benchmark is killed; the next one waits for its result."""
    args = ["benchmark.py", *TINY, "--defenses", "finetune:epochs=30", "--seeds", "1", "--jobs", "2", "--keep"]
    process = start(workplace, *args)
    while not (running := scripts_in(workplace, "/main.py")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert running == scripts_in(workplace, "/main.py")
    out, err = start(workplace, *args).communicate(timeout=300)
    assert "2 of 2 cells are in" in out, err
    logs = [path.read_text() for path in Path("results/cells").glob("*/log.txt")]
    assert "".join(logs).count("finetune  epoch  1/30") == 1


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_benchmark_alone_ends_its_runs(workplace, way):
    process = start(workplace, "benchmark.py", *TINY, "--defenses", "finetune:epochs=10000", "--seeds", "1", "2", "3",
                    "--jobs", "2")
    while len(scripts_in(workplace, "/main.py")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(way)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not scripts_in(workplace, "/main.py")


def test_without_gpus_a_cell_on_ray_takes_the_cpu(tmp_path):
    commands = []
    for device in ("auto", "cuda"):
        cell = benchmark.Cell("BadNets", "clp", EraseConfig(defense="clp", device=device, log_root=str(tmp_path)))
        benchmark.run_apart(cell, 1, 0, lambda command, *_: commands.append(command) or (0, ""), "cpu")
    assert [command[-2:] == ["--device", "cpu"] for command in commands] == [True, False]


def test_a_cell_that_another_process_runs_comes_last(monkeypatch, tmp_path):
    network = tmp_path / "s.tar"
    network.touch()
    made = [benchmark.Cell("BadNets", "clp", EraseConfig(seed=s, defense="clp", s_model=str(network))) for s in (1, 2)]
    made[0].settle(tmp_path)
    order, other = [], contextlib.ExitStack()
    other.enter_context(locked(made[0].folder() / "lock"))
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    assert processes.run_script_apart(command, made[0].folder(), tmp_path, tmp_path, 0) == (None, "")

    def run_here(cell):
        order.append(cell.config.seed)
        other.close()  # the other one is done as soon as the second cell runs

    monkeypatch.setattr(benchmark, "run_here", run_here)
    assert len(benchmark.run_all(made, BenchmarkConfig(), tmp_path, benchmark.CellProgress(2))) == 2, "without results"
    assert order == [2, 1]


@pytest.mark.parametrize(("options", "text"), [
    ({}, ""),
    ({"trigger_type": "blendTrigger"}, "trained with another attack (Blend)"),
])
def test_a_shipped_network_is_taken_if_it_is_what_it_should_be(workplace, options, text):
    place = workplace / "weight/s_net/WRN-16-1-S-model_best.pth.tar"
    with pytest.raises(UserError, match="is missing"):
        benchmark.network_of("BadNets", {}, Path("results"))
    save_checkpoint(place, {"state_dict": {}, "config": as_dict(TrainConfig(**options))})
    if options:
        with pytest.raises(UserError, match=re.escape(text)):
            benchmark.network_of("BadNets", {}, Path("results"))
    else:
        for given in ({}, {"device": "cpu"}, {"dataset": "CIFAR10"}, {"epochs": 30}):
            assert benchmark.network_of("BadNets", given, Path("results")).config.checkpoint_root == "weight/s_net"
        trained = [benchmark.network_of(attack, given, Path("results")).config.checkpoint_root for attack, given in (
            ("BadNets", {"epochs": 3}), ("BadNets:epochs=3", {}), ("BadNets:epochs=3", {"threads": 7}))]
        assert trained[0].startswith("results/networks/cifar10_badnets-")
        assert len(set(trained)) == 1, "one network for equal options, whatever the machine"


@pytest.mark.parametrize(("given", "shipped"), [({"sig_delta": 20.0}, False), ({"target_label": 5}, False),
                                                ({"sig_delta": 40.0}, True), ({"epochs": 10}, True),
                                                ({"epochs": 30}, False)])
def test_options_are_compared_with_what_the_shipped_network_was_trained_with(monkeypatch, given, shipped):
    monkeypatch.chdir(ROOT)
    assert benchmark.network_of("SIG", given, Path("results")).shipped == shipped


def test_the_leaderboard_as_a_picture(workplace, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert run_script(benchmark.main, BenchmarkConfig, ["--figures"]) == 2
    assert "holds no results" in capsys.readouterr().err
    for r in [line(s, 2.0 + s, d, attack=a) for s in (1, 2) for d in ("nad", "clp") for a in ("BadNets", "Blend")]:
        append_line("results/benchmark.jsonl", r)
    assert run_script(benchmark.main, BenchmarkConfig, ["--figures"]) == 0
    (path,) = Path("results/figures").glob("*.png")
    with Image.open(path) as image:
        assert image.width > 600
        assert len(set(image.convert("L").tobytes())) > 50, "it is not blank"
    ((name, records),) = leaderboard.by_setting(read_lines("results/benchmark.jsonl")).items()
    figure = leaderboard.draw(pyplot(), name, [*records, line(1, 50.0, "sage", "Blend", 70.0)])
    pyplot().close(figure)
    for axis in figure.axes:
        points = {bars.get_label(): bars[0].get_xydata()[0].tolist() for bars in axis.containers}
        assert points.pop("CLP") == points.pop("NAD") == [3.5, 2.0], "ASR, and points lost"
        assert points == ({"SAGE": [50.0, 12.0]} if axis.get_title() == "Blend" else {})


def test_a_picture_of_many_rows_shows_those_of_the_short_leaderboard():
    pytest.importorskip("matplotlib")

    def shown(recipes, runs):
        figure = leaderboard.draw(pyplot(), "x", runs + [line(1, 3.0, attack=a, p=1.0 + k) for a in leaderboard.SIX
                                                         for k in range(recipes) if k != 1])
        pyplot().close(figure)
        return [text.get_text() for text in figure.legends[0].get_texts()]

    six = [line(s, 2.0, attack=a) for s in (1, 2, 3) for a in leaderboard.SIX]
    assert len(shown(12, six)) == 12, "a mark each"
    assert shown(13, six) == ["NAD"], "the others have one seed"
    assert len(shown(13, six[:2])) == 13, "none has three seeds"
