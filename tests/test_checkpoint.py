"""Checkpoints: the demo's layout, hostile and damaged files, mismatches, atomic writing."""

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT

from config import UserError
from models import build, select_model
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.files import append_line, read_lines, write_atomically


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize(("name", "prefix"), [("model", ""), ("net", "module."), ("weights", "_orig_mod."),
                                              ("state_dict", "model.")])
def test_layouts_of_others(name, prefix):
    model, other = build("WRN-10-1", 10), build("WRN-10-1", 10)
    state = {prefix + k: v for k, v in model.state_dict().items()}
    load_weights(other, {name: state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, "m.pth")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="m.pth has no state_dict of tensors; it holds net, ema"):
        load_weights(other, {"net": state, "ema": state}, "m.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("plain", [True, False])
def test_layouts(tmp_path, prefix, plain):
    model = build("WRN-10-1", 10)
    state = {prefix + k: v for k, v in model.state_dict().items()}
    content = state if plain else {"epoch": 3, "state_dict": state, "best_clean_acc": np.float64(80.1),
                                   "best_bad_acc": torch.tensor(99.0), "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, tmp_path / "m.tar")
    loaded = select_model("CIFAR10", "WRN-10-1", True, tmp_path / "m.tar")
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_does_not_run(workplace, zipped):
    torch.save({"state_dict": Hostile()}, "bad.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused.*posix.system"):
        load_checkpoint("bad.tar")
    (workplace / "worse.tar").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError):
        load_checkpoint("worse.tar")
    assert not (workplace / "hostile-was-here").exists()


def test_files_that_are_none(tmp_path):
    whole = tmp_path / "whole.tar"
    save_checkpoint(whole, {"state_dict": build("WRN-10-1", 10).state_dict()})
    content = whole.read_bytes()
    for size in (1, 100, *range(10_000, len(content), 10_000), len(content) - 30):
        (tmp_path / "part.tar").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"not a checkpoint, or .*part\.tar"):
            load_checkpoint(tmp_path / "part.tar")
    torch.save({"state_dict": {"a": torch.ones(3)}}, whole, _use_new_zipfile_serialization=False)  # as old torch did
    content = whole.read_bytes()
    for size in range(1, len(content)):
        (tmp_path / "part.tar").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"part\.tar"):
            load_checkpoint(tmp_path / "part.tar")
    for name, content, message in (("empty.tar", b"", "empty"), ("text.tar", b"hello there", "not a checkpoint"),
                                   ("picture.tar", b"\x89PNG\r\n" + bytes(500), "not a checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.tar")
    with pytest.raises(UserError, match="folder"):
        load_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.tar")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tmp_path / "list.tar")
    torch.save({"epoch": 3}, tmp_path / "none.tar")
    with pytest.raises(UserError, match="no state_dict"):
        load_weights(build("WRN-10-1", 10), load_checkpoint(tmp_path / "none.tar"), "none.tar")


@pytest.mark.parametrize(("made", "wanted", "fits"), [
    (("WRN-16-2", 10, 3), ("WRN-16-1", 10, 3), "--s_name WRN-16-2 with 10 classes"),
    (("WRN-28-4", 10, 3), ("WRN-16-1", 10, 3), "--s_name WRN-28-4 with 10 classes"),
    (("WRN-10-1", 43, 3), ("WRN-10-1", 10, 3), "--s_name WRN-10-1 with 43 classes"),
    (("ResNet34", 10, 1), ("WRN-10-1", 10, 3), "--s_name ResNet34 with 10 classes and 1 channels; --grey 1 reads"),
    (("torchvision:resnet18", 7, 3), ("ResNet34", 10, 3), "--s_name torchvision:resnet18 with 7"),
])
def test_a_mismatch_names_what_differs_and_what_fits(made, wanted, fits):
    state = build(made[0], made[1], made[2], 64).state_dict()
    with pytest.raises(UserError, match=f"does not fit {wanted[0]}: .*; it fits {fits}"):
        load_weights(build(*wanted), {"state_dict": state}, "x.tar", wanted[0])


@pytest.mark.parametrize("state", [{0: torch.zeros(1)}, {"a": torch.zeros(1, device="meta")},
                                   {"a": torch.zeros(2, 2).to_sparse()}, {"a": 1}, {}])
def test_states_that_are_none(state):
    with pytest.raises(UserError, match="no state_dict of tensors"):
        load_weights(build("WRN-10-1", 10), {"state_dict": state}, "x.tar")


def test_a_name_that_asks_for_a_huge_network_is_not_followed():
    state = build("WRN-10-1", 10).state_dict()
    state["block1.layer.99999999.x"] = torch.zeros(1)
    with pytest.raises(UserError, match="does not fit"):
        load_weights(build("WRN-10-1", 10), {"state_dict": state}, "x.tar")


def test_weights_that_are_not_finite():
    state = build("WRN-10-1", 10).state_dict()
    state["fc.bias"][3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        load_weights(build("WRN-10-1", 10), {"state_dict": state}, "x.tar")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.tar"
    target.write_bytes(b"old")

    def fill(f):
        f.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(target, fill)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    write_atomically(target, lambda f: f.write(b"new"))
    assert target.read_bytes() == b"new"
    with pytest.raises(UserError, match=r"cannot write .*a\.tar"):
        save_checkpoint(target / "b.tar", {})


def test_two_processes_append_one_after_the_other(tmp_path):
    file = tmp_path / "r.jsonl"
    script = "import sys; from utils.files import append_line\n" \
             "for k in range(200): append_line(sys.argv[1], {'who': sys.argv[2], 'k': k, 'text': 'x' * 9000})"
    both = [subprocess.Popen([sys.executable, "-c", script, str(file), who], cwd=ROOT) for who in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    found = read_lines(file)
    assert [r["k"] for r in found if r["who"] == "a"] == [r["k"] for r in found if r["who"] == "b"] == list(range(200))
    fcntl = pytest.importorskip("fcntl", reason="this system has no flock")
    with open(file, "rb") as other, ThreadPoolExecutor() as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = pool.submit(append_line, file, {"k": 200})
        time.sleep(0.3)
        assert not waiting.done()
        fcntl.flock(other, fcntl.LOCK_UN)
        waiting.result(timeout=60)
    assert len(read_lines(file)) == 401


def test_lines_are_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "r.jsonl"
    append_line(file, {"a": 1})
    with open(file, "ab") as f:
        f.write(b'{"torn": ')  # somebody else's crash
    append_line(file, {"a": 2})
    assert read_lines(file) == [{"a": 1}, {"a": 2}]
    before = file.read_bytes()
    monkeypatch.setattr("utils.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        append_line(file, {"a": 3})
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="JSON"):
        append_line(file, {"a": float("nan")})
    assert file.read_bytes() == before
