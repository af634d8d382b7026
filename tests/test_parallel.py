"""torchrun with two processes on the CPU: the losses and weights of one process with whole batches."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from config import TrainConfig, UserError
from utils.data import Augment, Batches, TensorData
from utils.parallel import Team

ARGS = ["--dataset", "shapes10", "--train_size", "50", "--test_size", "100", "--s_name", "WRN-10-1", "--device", "cpu",
        "--threads", "1", "--epochs", "3", "--batch_size", "50", "--amp", "off", "--optimizer", "sgd"]


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def run(folder, *args, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([sys.executable, *(launch if processes > 1 else []), str(ROOT / "train_badnet.py"), *ARGS,
                           *args], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_batch_is_shared_without_loss():
    data = TensorData(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20), range(20))
    whole = list(Batches(data, 10, Augment(pad=2, cutout=3), 1).epoch(4))
    parts = [list(Batches(data, 10, Augment(pad=2, cutout=3), 1, share=(r, 2)).epoch(4)) for r in range(2)]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        for rank, (some, own) in enumerate(shares):
            assert torch.equal(own, labels[rank::2])
            assert torch.equal(some, images[rank::2])


def test_two_processes_compute_what_one_does(tmp_path):
    histories, states = [], []
    for k in (1, 2):
        folder = tmp_path / str(k)
        folder.mkdir()
        done = run(folder, processes=k)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch   3/3") == 1, "one of them reports"
        (record,) = [json.loads(line) for line in (folder / "results/train_badnet.jsonl").read_text().splitlines()]
        histories.append(record["history"])
        assert record["processes"] == k
        path = Path("weight/s_net/shapes10/WRN-10-1-S-model_best.pth.tar")
        states.append(torch.load(folder / path, weights_only=True)["state_dict"])
    for k, (one, two) in enumerate(zip(*histories, strict=True)):  # a step an epoch; rounding grows from step to step
        assert two["loss"] == pytest.approx(one["loss"], abs=3e-3 if k else 1.1e-4)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if value.is_floating_point():
            assert torch.allclose(value, states[1][name], atol=5e-3), name
    assert "2 processes" in done.stdout


def test_a_killed_process_ends_the_run_which_goes_on_with_the_same_weights(tmp_path):
    states = []
    for killed in (False, True):
        folder = tmp_path / str(killed)
        folder.mkdir()
        if killed:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            process = subprocess.Popen([*launch, str(ROOT / "train_badnet.py"), *ARGS, "--epochs", "20"], cwd=folder,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert any("epoch   2/20" in line for line in process.stdout)
            parts = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat")
                     if p.read_text().rpartition(")")[2].split()[1] == str(process.pid)]
            assert len(parts) == 2
            os.kill(max(parts), signal.SIGKILL)
            rest = process.communicate(timeout=120)[0]
            assert process.returncode != 0
            assert "epoch  20/20" not in rest
        done = run(folder, "--epochs", "20", *["--resume"] * killed, processes=2)
        assert done.returncode == 0, done.stderr
        assert ("going on after epoch" in done.stdout) == killed
        assert len((folder / "results/train_badnet.jsonl").read_text().splitlines()) == 1
        path = folder / "weight/s_net/shapes10/WRN-10-1-S-model_best.pth.tar"
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_trained(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda"):
        Team(TrainConfig(device="cuda"))


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = run(tmp_path, "--batch_size", "25", processes=2)
    assert done.returncode != 0
    assert "--batch_size 25: 2 processes share a batch" in done.stderr


def test_the_first_process_prepares_while_the_others_wait(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from config import TrainConfig
from utils.parallel import Team
team, made = Team(TrainConfig(device="cpu")), pathlib.Path("made")
with team.in_turn():
    found = made.exists()
    time.sleep(0 if found else 1)
    made.touch()
pathlib.Path(str(team.rank)).write_text(str(found))
team.close()
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(script)], cwd=tmp_path, check=True, timeout=120, capture_output=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False", "True"]


def test_an_error_ends_all_processes_with_its_line(tmp_path):
    done = run(tmp_path, "--dataset", "folder", "--data_root", "nowhere", processes=2)
    assert done.returncode != 0
    assert "train_badnet.py: error: " in done.stderr
    assert "nowhere" in done.stderr
