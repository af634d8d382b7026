"""The grid attack x defense x seed; every cell is a run of train_badnet.py or main.py.

    python benchmark.py --preset smoke              # generated data, two minutes on two cores
    python benchmark.py --preset defenses           # eight attacks, all defenses, three seeds, the shipped networks
    python benchmark.py --attacks BadNets 'Blend:blend_alpha=0.1' --defenses finetune 'nad:beta1=0,beta2=0' --seeds 1 2
    python benchmark.py --table                     # the leaderboard, printed and put into README.md

An attack is a name of attacks.PRESETS, a defense the name of its file; either may be followed by a colon and options
of its script. Results go to <out>/benchmark.jsonl, one line a cell. Cells that are there with the same configuration
and the same network are not run again; a killed one goes on where it was. A cell that fails is recorded in
<out>/errors.jsonl, and the others go on.
"""

import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import attacks
import defenses
import leaderboard
import main as erasing
import train_badnet as training
from config import BenchmarkConfig, EraseConfig, TrainConfig, UserError, as_dict, convert, file_name, student_file
from utils.checkpoint import file_hash
from utils.files import append_line, read_lines, write_atomically
from utils.run import check_writable, run_script, say

ROOT = Path(__file__).resolve().parent
SIX = ["BadNets", "Trojan", "Blend", "CL", "SIG", "Refool"]
SHIPPED = {"BadNets": "", **{name: name.lower().replace("-", "_") for name in [*SIX[1:], "WaNet", "Input-aware"]}}
SEEDS = ["1", "2", "3"]
PRESETS = {  # each a list of grids: the fields of BenchmarkConfig that differ
    "smoke": [{"attacks": ["BadNets", "Blend"], "defenses": ["finetune", "nad", "pruning"], "seeds": ["1"],
               "options": ["dataset=shapes10", "train_size=15000", "test_size=2000", "s_name=WRN-10-1"],
               "train_options": ["epochs=5"]}],
    "six": [{"attacks": SIX, "defenses": ["finetune", "nad"], "seeds": SEEDS}],
    "nad-table1": [{"attacks": SIX, "defenses": ["finetune", "fine_pruning", "mcr", "nad"], "seeds": SEEDS}],
    "defenses": [{"attacks": [*SHIPPED], "defenses": [*defenses.NAMES], "seeds": SEEDS}],
    "sage": [{"attacks": ["BadNets", "Trojan", "WaNet"], "defenses": ["finetune", "nad", "sage"], "seeds": SEEDS},
             {"attacks": [name for name in attacks.PRESETS
                          if name.startswith(("1 ", "3 ", "5 ", "Large", "Transparency", "Shape", "Class"))],
              "defenses": ["finetune", "nad", "sage"], "seeds": SEEDS, "train_options": ["epochs=10"]}],
    "linf": [{"attacks": attack, "defenses": ["linf_pruning", "linf_pruning:linf_norm=l1", "linf_pruning:linf_norm=l2"],
              "seeds": SEEDS, **more}
             for attack, more in (([*SHIPPED], {}), (["BadNets"], {"options": ["s_name=AlexNet"]}))],
    "ablations": [{"attacks": ["BadNets", "Blend", "SIG"], "seeds": SEEDS, "defenses": [
        "nad", *(f"{d}:ratio={r}" for d in ("finetune", "nad") for r in (0.01, 0.1, 0.2)),
        *(f"nad:beta1={500 * s:g},beta2={1000 * s:g},beta3={1000 * s:g}" for s in (0.03, 0.1, 1.0, 3.0)),
        "nad:beta1=0,beta2=0", "nad:beta1=0,beta3=0", "nad:beta2=0,beta3=0",
        "nad:p=1", "nad:p=4", "nad:attention=mean", "nad:attention=max",
        "nad:teacher_epochs=1", "nad:teacher_epochs=5", "nad:teacher_epochs=20", "nad:at_loss=paper"]}],
}


@dataclass
class Cell:
    """One run: ``config`` (a ``TrainConfig`` or an ``EraseConfig``), and the cell that trains its network, if any."""

    attack: str
    defense: str  # '' for one that trains a network
    config: object

    def source(self):
        """The hash of the network that is erased; the file's name if it is not there yet; '' if one is trained."""
        path = Path(self.config.s_model) if self.defense else None
        return "" if path is None else file_hash(path) if path.exists() else str(path)

    def key(self):
        """What decides the result of the cell, as text."""
        return what_counts(as_dict(self.config), self.source())

    def settle(self, out):
        """Give the cell its folder, for its log, its state and its result until that is in the results."""
        folder = out / "cells" / hashlib.sha256(self.key().encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        self.config.log_root, self.config.resume = str(folder), True
        if self.defense:
            self.config.checkpoint_root = self.config.teacher_root = str(folder)

    def __str__(self):
        return f"{self.attack} / {self.defense or 'training'} / seed {self.config.seed}"


def what_counts(stored, source):
    """The options of a run's configuration ``stored``, a dict, that decide its result, and its network, as text.

    Options that are newer than ``stored`` have their default there.
    """
    cls = TrainConfig if stored["script"] == "TrainConfig" else EraseConfig
    options = {**as_dict(cls()), **stored}
    options = {**options, **attacks.without_unused(options)} if cls is TrainConfig else defenses.without_unused(options)
    counted = {k: v for k, v in options.items() if k not in (*leaderboard.NOT_IN_KEY, "s_model", "resume")}
    return json.dumps([counted, options["seed"], source], sort_keys=True)


def settings(cls, items, flag):
    """{option: value} of ``cls`` from texts such as "lr=0.02"; a list's members are joined by +. ``UserError``."""
    known, values = {f.name: f for f in fields(cls)}, {}
    for item in items:
        name, equals, value = item.partition("=")
        if name not in known or not equals:
            raise UserError(f"--{flag} {item}: an option of {cls.__name__} and its value are needed, such as "
                            f"{'epochs=10' if 'epochs' in known else 'seed=1'}")
        values[name] = convert(known[name], value.split("+") if known[name].type is list else value, f"--{flag} ")
    return values


def spec(text, names, cls, flag):
    """(name, options) of "name:option=value,option=value". Raises ``UserError``."""
    name, _, rest = text.partition(":")
    if name not in names:
        raise UserError(f"--{flag} {name}: one of {'; '.join(names)} is allowed")
    return name, settings(cls, [item for item in rest.split(",") if item], flag)


def cells_of(grid):
    """The cells of one grid, a dict of fields of ``BenchmarkConfig``: those that train, then those that erase."""
    for name in ("attacks", "defenses", "seeds"):
        if not grid.get(name):
            raise UserError(f"--{name}: at least one is needed (or a --preset)")
    shared_train = settings(TrainConfig, grid.get("options", []), "options")
    shared_erase = settings(EraseConfig, grid.get("options", []), "options")
    own_train = settings(TrainConfig, grid.get("train_options", []), "train_options")
    own_erase = settings(EraseConfig, grid.get("erase_options", []), "erase_options")
    seeds = [settings(EraseConfig, [f"seed={s}"], "seeds")["seed"] for s in grid["seeds"]]
    trained, erased = [], []
    for attack in grid["attacks"]:
        name, changes = spec(attack, attacks.PRESETS, TrainConfig, "attacks")
        config = TrainConfig(**{**attacks.PRESETS[name], **shared_train, **own_train, **changes})
        path = student_file(config, f"weight/s_net/{SHIPPED.get(name, '')}".rstrip("/"))
        if own_train or changes or shared_train or name not in SHIPPED:
            changed = sorted((k, v) for k, v in as_dict(config).items() if v != as_dict(TrainConfig())[k])
            slug = "".join(c if c.isalnum() else "_" for c in attack.lower())
            digest = hashlib.sha256(repr(changed).encode()).hexdigest()[:8]
            config.checkpoint_root = str(Path("weight") / "benchmark" / f"{file_name(config.dataset)}-{slug}-{digest}")
            path = student_file(config, config.checkpoint_root)
            trained.append(Cell(attack, "", config))
        elif not path.exists():
            raise UserError(f"--attacks {attack}: {path} is missing; --train_options epochs=30 trains a network of "
                            f"its own")
        for defense, seed in itertools.product(grid["defenses"], seeds):
            chosen, options = spec(defense, defenses.NAMES, EraseConfig, "defenses")
            erased.append(Cell(attack, defense, EraseConfig(**{
                **shared_erase, **own_erase, **options, "defense": chosen, "seed": seed, "s_model": str(path),
                "beside": False})))
    return trained + erased


def run_here(cell, _opt):
    """Run the cell in this process, its output to log.txt in its folder."""
    folder = Path(cell.config.log_root)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        (erasing if cell.defense else training).main(cell.config)


def run_apart(cell, opt):
    """Run the cell in a process of its own; one that is killed is started again, and goes on. Raises ``UserError``."""
    folder = Path(cell.config.log_root)
    threads = cell.config.threads or max(1, torch.get_num_threads() // opt.jobs)
    write_atomically(folder / "config.json", lambda f: f.write(json.dumps(as_dict(cell.config)).encode()))
    command = [sys.executable, str(ROOT / ("main.py" if cell.defense else "train_badnet.py")), "--config",
               str(folder / "config.json"), "--threads", str(threads)]
    for _ in range(opt.retries + 1):
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code >= 0:
            break
    if code:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(lines[-1] if lines and code > 0 else f"its process was killed by signal {-code}")


def collect(cell):
    """The result line of the cell, from what its script left in the cell's folder; None if it is not finished."""
    key, source = cell.key(), cell.source()
    for r in read_lines(Path(cell.config.log_root) / ("main.jsonl" if cell.defense else "train_badnet.jsonl")):
        if what_counts(r["config"], source) == key:
            kept = {k: v for k, v in r.items() if k not in ("history", "inputs")}
            return {**kept, "cell": {"attack": cell.attack, "defense": cell.defense, "network": source}}
    return None


def finish(cell, opt, out):
    """Write the cell's result line and clean up its folder."""
    record = collect(cell)
    assert record, f"{cell} left no result in {cell.config.log_root}"
    append_line(out / "benchmark.jsonl", record)
    folder = Path(cell.config.log_root)
    for path in folder.glob("*"):
        if path.is_file() and not (opt.keep and path.suffix == ".tar"):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def failed(cell, error, out):
    """Record what went wrong in the cell."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    append_line(out / "errors.jsonl", {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "cell": str(cell), "error": text,
        "config": as_dict(cell.config), "log": str(Path(cell.config.log_root) / "log.txt")})
    say(f"failed: {cell}: {text}")


def run_all(cells, opt, out, bar):
    """Run ``cells``, in ``opt.jobs`` processes. Returns those that failed."""
    wrong = []

    def done(cell, error):
        if error is None:
            finish(cell, opt, out)
        else:
            failed(cell, error, out)
            wrong.append(cell)
        bar.update()

    def attempt(run, cell):
        try:
            cell.settle(out)
            if collect(cell) is None:
                run(cell, opt)
        except Exception as e:  # whatever it is, the other cells go on
            return e
        return None

    if opt.jobs == 1:
        for cell in cells:
            bar.set_postfix_str(str(cell))
            done(cell, attempt(run_here, cell))
        return wrong
    with ThreadPoolExecutor(opt.jobs) as pool:
        waiting = {pool.submit(attempt, run_apart, cell): cell for cell in cells}
        try:
            for future in as_completed(waiting):
                done(waiting[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return wrong


def finished_keys(out):
    """The keys of the cells that are in the results."""
    return {what_counts(r["config"], r["cell"]["network"]) for r in read_lines(out / "benchmark.jsonl") if "cell" in r}


def main(opt):
    """Run the grid that ``opt`` (``BenchmarkConfig``) names, or print its table."""
    out = Path(opt.out)
    if opt.table:
        text = leaderboard.render(read_lines(out / "benchmark.jsonl"))
        say(text)
        if Path("README.md").exists():
            leaderboard.write_into(Path("README.md"), {"benchmark": text})
        return
    given = {"attacks": opt.attacks, "defenses": opt.defenses, "seeds": opt.seeds, "options": opt.options,
             "train_options": opt.train_options, "erase_options": opt.erase_options}
    given = {name: value for name, value in given.items() if value}
    cells = {False: [], True: []}  # those that train, and those that erase
    for grid in PRESETS.get(opt.preset, [{}]):
        for cell in cells_of({**grid, **given}):
            cells[bool(cell.defense)].append(cell)
    check_writable(out, "out")
    wrong, total = [], 0
    with tqdm(total=len(unfinished(cells[False], out)) + len(unfinished(cells[True], out)), unit="cell", disable=None,
              smoothing=0.1) as bar:
        for erases in (False, True):
            missing = unfinished(cells[erases], out)
            total += len({cell.key() for cell in cells[erases]})
            say(f"{'erasing' if erases else 'training'}: {len(missing)} cells to run")
            try:
                wrong += run_all(missing, opt, out, bar)
            except KeyboardInterrupt:
                say("finished cells are kept; the same command goes on")
                raise
    wanted = {cell.key() for cell in cells[True]}
    say("\n" + leaderboard.render([r for r in read_lines(out / "benchmark.jsonl") if key_of(r) in wanted]))
    say(f"\n{total - len(wrong)} of {total} cells are in {out / 'benchmark.jsonl'}")
    if wrong:
        raise UserError(f"{len(wrong)} cells failed, see {out / 'errors.jsonl'}; the same command tries them again")


def key_of(record):
    """The key of the cell that left the result line ``record``."""
    return what_counts(record["config"], record["cell"]["network"])


def unfinished(cells, out):
    """Those of ``cells`` that are not in the results, equal ones once; a network that was deleted is made again."""
    done = {key_of(r) for r in read_lines(out / "benchmark.jsonl")}
    missing = {}
    for cell in cells:
        gone = not cell.defense and not student_file(cell.config, cell.config.checkpoint_root).exists()
        if gone or cell.key() not in done:
            missing.setdefault(cell.key(), cell)
    return list(missing.values())


if __name__ == "__main__":
    sys.exit(run_script(main, BenchmarkConfig))
