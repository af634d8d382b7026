"""The scripts as a user runs them, on small pieces of shapes10: what they print, write, survive and refuse."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, start, until
from PIL import Image

import defenses
import detect
import main
import strip
import train_badnet
import visualize
from cam import grad_cam
from config import DetectConfig, EraseConfig, TrainConfig, parse
from defenses import neural_cleanse
from models import Features, build
from utils.channels import channel_norms
from utils.checkpoint import save_checkpoint
from utils.data import TensorData, to_float
from utils.engine import clone, evaluate
from utils.run import Journal, finished, run_script, start_of

SMALL = ["--dataset", "shapes10", "--train_size", "600", "--test_size", "200", "--s_name", "WRN-10-1", "--device",
         "cpu", "--threads", "1"]
TRAIN = [*SMALL, "--epochs", "3", "--batch_size", "50"]
ERASE = [*SMALL, "--epochs", "2", "--teacher_epochs", "1", "--ratio", "0.2", "--batch_size", "40"]
STUDENT = Path("weight/s_net/shapes10/WRN-10-1-S-model_best.pth.tar")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(*args):
    return run_script(train_badnet.main, TrainConfig, [*TRAIN, *args])


def erase(*args):
    return run_script(main.main, EraseConfig, [*ERASE, *args])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a small network was trained."""
    folder = tmp_path_factory.mktemp("trained")
    result = subprocess.run([sys.executable, ROOT / "train_badnet.py", *TRAIN], cwd=folder, capture_output=True,
                            text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_train_badnet_prints_and_writes(trained):
    folder, out = trained
    assert "600 training images, 60 poisoned (gridTrigger, all2one), 200 test images, cpu" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert all(word in out for word in ("ACC", "ACC (non-target)", "ASR", "RA"))
    (record,) = lines(folder / "results/train_badnet.jsonl")
    assert set(record["metrics"]) == {"clean_acc", "clean_acc_non_target", "asr", "ra"}
    assert [h["epoch"] for h in record["history"]] == [1, 2, 3]
    assert all("asr" in h and "clean_acc" in h for h in record["history"])
    content = torch.load(folder / STUDENT, weights_only=True)
    assert content["epoch"] == 3
    assert content["config"]["dataset"] == "shapes10"
    assert content["clean_acc"] == record["metrics"]["clean_acc"]
    assert [p.name for p in (folder / STUDENT).parent.iterdir()] == [STUDENT.name]  # the state to resume is gone


def test_main_prints_a_table_and_writes_teacher_student_and_result(copied, capsys):
    assert erase() == 0
    out = capsys.readouterr().out
    (record,) = lines("results/main.jsonl")
    assert list(record["metrics"]) == ["backdoored", "fine-tuning", "teacher", "NAD"]
    for name, metrics in record["metrics"].items():
        row = next(line for line in out.splitlines() if line.startswith(f"{name}  ") and "epoch" not in line)
        assert f"{metrics['clean_acc']:.2f}" in row
        assert f"{metrics['asr']:.2f}" in row
    stored = lines("results/train_badnet.jsonl")[0]["metrics"]
    assert record["metrics"]["backdoored"] == stored
    erased = torch.load("weight/erasing_net/shapes10/WRN-10-1.tar", weights_only=True)
    assert erased["clean_acc"] == record["metrics"]["NAD"]["clean_acc"]
    assert Path("weight/t_net/shapes10/WRN-10-1-T-model_best.pth.tar").exists()
    # what was erased is an ordinary checkpoint, and the stored configuration gives the same run
    assert run_script(main.main, EraseConfig, ["--config", "results/main.jsonl"]) == 0
    again = lines("results/main.jsonl")
    assert len(again) == 2
    assert again[0]["metrics"] == again[1]["metrics"]
    after = torch.load("weight/erasing_net/shapes10/WRN-10-1.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(v, after[k]) for k, v in erased["state_dict"].items())


def test_main_takes_a_teacher_and_other_defenses(copied, capsys):
    assert erase("--t_model", str(STUDENT), "--save", "0") == 0
    out = capsys.readouterr().out
    assert not any(line.startswith("teacher") for line in out.splitlines())
    assert "note: --teacher_epochs does nothing with --t_model" in out
    assert not Path("weight/t_net").exists()
    assert not Path("results/main.jsonl").exists()
    assert erase("--defense", "finetune") == 0
    assert list(lines("results/main.jsonl")[0]["metrics"]) == ["backdoored", "fine-tuning"]


def test_a_network_without_a_backdoor_is_measured_with_the_same_trigger(copied, capsys):
    torch.manual_seed(0)
    content = torch.load(STUDENT, weights_only=True)
    other = build("WRN-10-1", 10)
    save_checkpoint(Path("other.tar"), {"state_dict": other.state_dict(), "epoch": 1, "optimizer": {}})
    args = ["--defense", "clp", "--beside", "0", "--checkpoint_root", "out"]
    assert erase(*args, "--reference", "other.tar") == 0
    assert "clean network" in capsys.readouterr().out
    assert erase(*args, "--s_model", "other.tar", "--trigger_type", content["config"]["trigger_type"]) == 0
    first, second = (r["metrics"] for r in lines("results/main.jsonl"))
    assert list(first) == ["backdoored", "clean network", "CLP"]
    assert first["clean network"] == second["backdoored"] != first["backdoored"]


def test_a_checkpoint_holds_the_state_of_its_optimiser(copied):
    def state(path):
        return torch.load(path, weights_only=True)["optimizer"].get("state")

    assert erase("--rounds", "2", "--checkpoint_root", "one") == 0
    assert erase("--defense", "clp", "--checkpoint_root", "two") == 0
    assert all(map(state, (STUDENT, "weight/t_net/shapes10/WRN-10-1-T-model_best.pth.tar", "one/WRN-10-1.tar")))
    assert state("two/WRN-10-1.tar") is None, "nothing was trained, but for fine-tuning beside"


def test_a_defense_that_returns_no_network_or_one_that_answers_nothing(copied, capsys, monkeypatch):
    module = defenses.get("clp")
    quick = ["--defense", "clp", "--beside", "0"]

    def broken(model, *_):
        model = clone(model)
        model.fc.bias.data[0] = float("nan")
        return model

    monkeypatch.setattr(module, "erase", broken)
    assert erase(*quick) == 2
    assert "answers are not finite" in capsys.readouterr().err
    monkeypatch.setattr(module, "erase", lambda *_: None)
    assert erase(*quick) == 2
    assert "erase must return the new network, it returned None" in capsys.readouterr().err
    assert not Path("results/main.jsonl").exists()


def test_a_network_that_lost_its_accuracy_is_no_success(copied, capsys, monkeypatch):
    for acc, said in ((41.0, False), (39.0, True)):
        answers = iter([80.0, acc])
        monkeypatch.setattr(main, "BEFORE", {})
        monkeypatch.setattr(main, "evaluate", lambda *_, answers=answers, **__: {
            "clean_acc": next(answers), "clean_acc_non_target": None, "asr": 0.0, "ra": 0.0})
        assert erase("--defense", "clp", "--beside", "0", "--save", "0") == 0
        assert ("note: CLP: more than half of the accuracy is gone" in capsys.readouterr().out) == said


def test_what_a_run_replaces_is_said(copied, capsys):
    quick = ["--defense", "clp", "--beside", "0"]
    for argv, text in (([], ""), ([], ""), (["--seed", "5"], "will be replaced; it is of --s_model weight"),
                       (["--defense", "finetune", "--epochs", "1"], "--defense clp, --seed 5")):
        assert erase(*quick, *argv) == 0
        out = capsys.readouterr().out
        assert text in out and bool(text) == ("will be replaced" in out)


def test_rates_for_small_batches_and_betas_for_small_maps(copied, capsys):
    quick = ["--epochs", "1", "--teacher_epochs", "1", "--save", "0"]
    assert erase(*quick, "--batch_size", "32") == 0
    out = capsys.readouterr().out
    assert "in proportion they are --ft_lr 0.01 --lr 0.01 --teacher_lr 0.015" in out
    assert "the default betas" not in out
    assert erase(*quick, "--batch_size", "32", "--lr", "0.01", "--layers", "block2", "block3") == 0
    out = capsys.readouterr().out
    assert "in proportion" not in out
    assert "here they have 16 x 16, 8 x 8: the same weight is --beta1 125 --beta2 250" in out
    assert erase(*quick, "--layers", "block2", "block3", "--beta2", "3") == 0
    out = capsys.readouterr().out
    assert "the default betas" not in out
    assert "in proportion" not in out, "batches of 40"


def test_first_another_defense(copied, capsys):
    """--first clp gives what erasing the network that --defense clp saved gives."""
    assert erase("--defense", "clp", "--clp_u", "1", "--beside", "0", "--checkpoint_root", "pruned") == 0
    assert erase("--s_model", "pruned/WRN-10-1.tar", "--checkpoint_root", "two", "--teacher_root", "two") == 0
    assert erase("--first", "clp", "--clp_u", "1", "--checkpoint_root", "one", "--teacher_root", "one") == 0
    assert "CLP first" in capsys.readouterr().out
    pruned, two, one = (r["metrics"] for r in lines("results/main.jsonl"))
    assert pruned["CLP"] != pruned["backdoored"]
    assert list(one) == ["backdoored", "CLP first", "fine-tuning", "teacher", "NAD"]
    assert one["CLP first"] == pruned["CLP"]
    assert all(one[row] == two[row] for row in ("fine-tuning", "teacher", "NAD"))


SHORT = ["--nc_steps", "20", "--nc_batch_size", "2", "--anp_steps", "12", "--anp_batch_size", "40", "--ibau_rounds",
         "2", "--ibau_batch_size", "40", "--ibau_iterations", "2", "--mcr_epochs", "2"]


@pytest.mark.parametrize("name", defenses.NAMES)
def test_each_defense_goes_on_after_an_interruption(copied, monkeypatch, capsys, name):
    args = ["--defense", name, "--beside", "0", "--eval_every", "1", *SHORT]
    assert erase(*args, "--checkpoint_root", "whole", "--teacher_root", "whole") == 0
    assert defenses.title(name) in capsys.readouterr().out
    save, count = Journal.save, []

    def save_once(self, *state):
        save(self, *state)
        count.append(state[0])
        if len(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "save", save_once)
    assert erase(*args) == (130 if name not in ("clp", "pruning", "linf_pruning", "neural_cleanse") else 0)
    if count:
        assert erase(*args, "--resume") == 0
        assert f"{count[0]}: going on after epoch 1" in capsys.readouterr().out
    whole, resumed = lines("results/main.jsonl")
    assert list(whole["metrics"])[-1] == defenses.title(name)
    assert resumed["metrics"] == whole["metrics"]
    assert [(h["stage"], h["epoch"], h["loss"]) for h in resumed["history"]] == \
        [(h["stage"], h["epoch"], h["loss"]) for h in whole["history"]]


def test_without_a_trigger_there_is_accuracy_only(copied, capsys):
    assert erase("--trigger_type", "none") == 0
    out = capsys.readouterr().out
    assert "ASR" not in out
    assert list(lines("results/main.jsonl")[0]["metrics"]) == ["before", "fine-tuning", "teacher", "NAD"]


def test_another_attack_than_the_network_was_trained_for_is_pointed_out(copied, capsys):
    assert erase("--target_label", "3", "--defense", "finetune", "--save", "0") == 0
    assert "was trained with --target_label 5, this run measures with 3" in capsys.readouterr().out


@pytest.mark.parametrize("attack", [
    ["--trigger_type", "wanetTrigger", "--trigger_seed", "4"],
    ["--trigger_type", "refoolTrigger", "--target_type", "cleanLabel", "--inject_portion", "0.04"],
    ["--trigger_type", "inputAwareTrigger"],
    ["--trigger_type", "multiTrigger", "--target_type", "multiLabel", "--target_label", "3"],
    ["--target_type", "classSpecific", "--inject_portion", "0.05", "--transparency", "0.5"],
    ["--target_type", "all2all", "--trigger_type", "blendTrigger"],
], ids=lambda a: a[1])
def test_main_measures_with_the_attack_of_the_checkpoint(workplace, capsys, monkeypatch, attack):
    monkeypatch.setattr("attacks.input_aware.MASK_STEPS", 5)
    assert train(*attack, "--epochs", "1") == 0
    assert erase("--s_model", str(STUDENT), "--defense", "finetune", "--epochs", "1", "--seed", "2") == 0
    assert not [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ") and "not used by" not in x]
    (trained,), (erased,) = lines("results/train_badnet.jsonl"), lines("results/main.jsonl")
    assert erased["metrics"]["backdoored"] == trained["metrics"]
    assert {f"--{name}": str(erased["attack"][name]) for name in (w[2:] for w in attack[::2])} == \
        dict(zip(attack[::2], attack[1::2], strict=True))
    # and so is what was erased
    assert erase("--s_model", "weight/erasing_net/shapes10/WRN-10-1.tar", "--defense", "finetune", "--epochs", "1",
                 "--save", "0") == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("backdoored "))
    assert f"{erased['metrics']['fine-tuning']['asr']:.2f}" in row.split()
    if "inputAwareTrigger" in attack:
        content = torch.load(STUDENT, weights_only=True)
        torch.save({**content, "trigger": {}}, STUDENT)
        assert erase("--s_model", str(STUDENT)) == 2
        assert "holds no generator" in capsys.readouterr().err


def test_a_joint_attack_resumes_with_its_generators(workplace, monkeypatch, capsys):
    monkeypatch.setattr("attacks.input_aware.MASK_STEPS", 5)
    attack = ["--trigger_type", "inputAwareTrigger", "--epochs", "2"]
    assert train(*attack) == 0
    whole = torch.load(STUDENT, weights_only=True)
    STUDENT.unlink()
    evaluate, calls = train_badnet.evaluate, []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_badnet, "evaluate", interrupt)
        assert train(*attack) == 130
    assert train(*attack, "--resume") == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    resumed = torch.load(STUDENT, weights_only=True)
    for part in ("state_dict", "trigger"):
        assert all(torch.equal(v, resumed[part][k]) for k, v in whole[part].items())


def test_pictures_of_the_triggers(workplace, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    small = ["triggers", "--dataset", "shapes10", "--train_size", "100", "--test_size", "20"]
    assert visualize.main(small) == 0
    out = capsys.readouterr().out
    assert "note: Trojan is left out: --clean_model" in out
    with Image.open("pictures/triggers.png") as image:
        assert image.width > 1000
    assert visualize.main([*small, "--image", "20"]) == 2
    assert visualize.main(["trigger"]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert visualize.main(small) == 2
    error = capsys.readouterr().err.splitlines()
    assert [e.partition("error: ")[2][:24] for e in error] == ["--image 20: the test set", "what to draw comes first",
                                                               "pictures need matplotlib"]


def test_own_images_and_a_torchvision_model(workplace, capsys):
    from test_data import write_folder

    write_folder(workplace / "mine", ("a", "b", "c"), n=8, size=40)
    own = ["--dataset", "folder", "--data_root", "mine", "--image_size", "64", "--s_name", "torchvision:resnet18",
           "--target_label", "1", "--epochs", "1", "--batch_size", "8", "--device", "cpu"]
    assert run_script(train_badnet.main, TrainConfig, own) == 0
    assert run_script(main.main, EraseConfig, [*own, "--ratio", "0.5", "--teacher_epochs", "1", "--layers", "layer2",
                                               "layer3"]) == 0
    assert "NAD" in capsys.readouterr().out
    assert Path("weight/erasing_net/folder/torchvision-resnet18.tar").exists()


def same_weights(one, two):
    a, b = (torch.load(p, weights_only=True)["state_dict"] for p in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_train_badnet_killed_and_resumed_is_bit_identical(trained, tmp_path):
    process = start(tmp_path, "train_badnet.py", *TRAIN)
    until(process, "epoch   2/3")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / STUDENT).exists()
    process = start(tmp_path, "train_badnet.py", *TRAIN, "--resume")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "going on after epoch" in out
    assert same_weights(tmp_path / STUDENT, trained[0] / STUDENT)
    (record,), (whole,) = (lines(f / "results/train_badnet.jsonl") for f in (tmp_path, trained[0]))
    assert record["metrics"] == whole["metrics"]
    assert [h["epoch"] for h in record["history"]] == [1, 2, 3]


def test_the_state_of_an_interrupted_run_is_kept_if_the_flag_was_forgotten(workplace, monkeypatch, capsys):
    def interrupted(self, stage, model, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "epoch_done", interrupted)
        for _ in range(2):
            assert train() == 130
    folder, = STUDENT.parent.glob("*-resume-*")
    before, = STUDENT.parent.glob("*-interrupted-*")
    assert f"rename {before} to {folder.name}, and --resume" in capsys.readouterr().out
    assert (before / "run.tar").exists()
    assert train() == 0
    assert [path.name for path in STUDENT.parent.iterdir()] == [STUDENT.name]


def test_main_interrupted_and_resumed_is_bit_identical(copied):
    process = start(copied, "main.py", *ERASE)
    until(process, "nad       epoch  1/2")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].startswith("main.py: interrupted; to go on: python ")
    assert error.strip().endswith("--resume")
    assert "Traceback" not in error
    assert erase("--resume") == 0
    resumed = Path("weight/erasing_net/shapes10/WRN-10-1.tar").rename("resumed.tar")
    assert erase() == 0
    assert same_weights(resumed, "weight/erasing_net/shapes10/WRN-10-1.tar")
    assert erase("--resume") == 0  # finished already: nothing is run or written again
    assert len(lines("results/main.jsonl")) == 2


def test_a_checkpoint_with_an_odd_configuration_is_not_the_run_that_resumes(tmp_path):
    save_checkpoint(tmp_path / "a.tar", {"state_dict": {}, "config": "by hand", "inputs": {}})
    assert not finished(EraseConfig(resume=True), tmp_path / "a.tar")


def test_another_reference_is_another_run(tmp_path):
    inputs = []
    for content in (b"one", b"two"):
        (tmp_path / "clean.tar").write_bytes(content)
        inputs.append(start_of(EraseConfig(reference=str(tmp_path / "clean.tar"))))
    assert inputs[0] != inputs[1]
    assert "reference" not in start_of(EraseConfig())


def test_training_gets_the_augmentation_and_the_place_of_the_stamp(tmp_path, monkeypatch, capsys):
    class Seen(Exception):
        pass

    def fit(_model, _loss, batches, **_):
        raise Seen(batches)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_badnet, "fit", fit)
    for portion, full in ((0.1, True), (0.05, False)):
        config = TrainConfig(dataset="shapes10", train_size=200, test_size=100, s_name="WRN-10-1", stamp="before",
                             cutout=5, save=False, target_type="cleanLabel", inject_portion=portion)
        with pytest.raises(Seen) as seen:
            train_badnet.main(config)
        batches = seen.value.args[0]
        assert (batches.stamp, batches.augment.cutout) == ("before", 5)
        assert ("no image of class 5 is left" in capsys.readouterr().out) is full


@pytest.mark.parametrize(("argv", "message"), [
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--trigger_type", "grid"], "--trigger_type: one of blendTrigger, clTrigger"),
    (["--trigger_type", "auto"], "--trigger_type auto: is for main.py"),
    (["--layers", "block1"], "--layers: is for erasing"),
    (["--target_label", "10"], "--target_label 10: the data set has the classes 0 to 9"),
    (["--trig_w", "33"], "does not fit into an image 32 wide"),
    (["--device", "cuda:99"], "--device cuda:99: not on this machine"),
    (["--s_name", "WRN-11-1"], "depth is 6 n"),
    (["--target_type", "cleanLabel", "--inject_portion", "0.5"], "class 5 has only 60"),
    (["--target_type", "classSpecific", "--source_label", "12"], "--source_label 12: the data set has the classes"),
    (["--trigger_type", "trojanTrigger"], "needs a clean network of the data at hand"),
    (["--trigger_type", "blendTrigger", "--blend_image", "none.png"], "--blend_image none.png: cannot be read"),
    (["--trigger_type", "inputAwareTrigger", "--target_type", "cleanLabel"], "all2one or all2all is allowed"),
    (["--lr", "1e30"], "the loss is not finite in epoch 1"),
    (["--checkpoint_root", "/proc/nowhere"], "--checkpoint_root /proc/nowhere: cannot be written to"),
    (["--log_root", "/dev/null"], "--log_root /dev/null: is a file, a folder is needed"),
])
def test_train_badnet_refuses_in_one_line(workplace, capsys, argv, message):
    assert train(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(workplace.rglob("*model_best.pth.tar"))
    assert not list(workplace.rglob("*.jsonl"))


def test_options_of_another_trigger_are_not_passed_over_in_silence(workplace, capsys):
    assert train("--blend_alpha", "0.5", "--trig_w", "4", "--source_label", "3", "--save", "0", "--resume",
                 "--optimizer", "sgd", "--turn", "0.1") == 0
    out = capsys.readouterr().out
    assert "note: --turn is not used by --optimizer sgd" in out
    assert "note: --resume: with --save 0 no state is kept" in out
    assert "note: --blend_alpha is not used by --trigger_type gridTrigger --target_type all2one" in out
    assert "note: --source_label is not used" in out
    assert out.count("is not used") == 3


def test_main_says_which_options_of_an_attack_its_trigger_does_not_use(copied, capsys):
    assert erase("--defense", "clp", "--beside", "0", "--save", "0", "--reversed_file", "triggers.pt", "--trig_w", "4",
                 "--n_triggers", "2") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "is not used by --trigger_type" in line]
    assert [line.split()[1] for line in notes] == ["--n_triggers", "--reversed_file"]
    assert notes[0].endswith("--trigger_type gridTrigger --target_type all2one")


@pytest.mark.parametrize(("argv", "message"), [
    (["--s_model", "none.tar"], "no such checkpoint: none.tar"),
    (["--s_name", "WRN-16-1", "--s_model", str(STUDENT)], "it fits --s_name WRN-10-1 with 10 classes"),
    (["--s_name", "WRN-16-1"], "no backdoored network at weight/s_net/shapes10/WRN-16-1"),
    (["--s_name", "resnet18"], "--s_name resnet18: WRN-10-1, "),
    (["--ratio", "0.001"], "--ratio 0.001 of 600 training images leaves no sample"),
    (["--defense", "prayer"], "sage is allowed, got 'prayer'"),
    (["--layers", "block9"], "--layers block9: WideResNet has no such layer"),
    (["--t_model", str(STUDENT), "--t_name", "WRN-16-1"], "it fits --t_name WRN-10-1"),
    (["--t_model", "none.tar"], "no such checkpoint: none.tar"),
    (["--reference", "none.tar"], "no such checkpoint: none.tar"),
    (["--reference", str(STUDENT)], "was trained with --trigger_type gridTrigger: it is not clean"),
    (["--t_name", "WRN-16-1"], "--t_name WRN-16-1: names the architecture of --t_model, which is not given"),
    (["--reference", "wide.tar"], "wide.tar does not fit WRN-10-1"),
    (["--s_model", "cut.tar"], "cut.tar"),
])
def test_main_refuses_in_one_line_and_writes_nothing(copied, capsys, argv, message):
    Path("cut.tar").write_bytes(STUDENT.read_bytes()[:5000])
    save_checkpoint(Path("wide.tar"), {"state_dict": build("WRN-10-2", 10).state_dict(), "epoch": 1, "optimizer": {}})
    assert erase(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(Path("weight/erasing_net").rglob("*.tar"))
    assert not list(Path("weight/t_net").rglob("*.tar"))
    assert not Path("results/main.jsonl").exists()


def test_main_never_writes_over_the_network_that_it_reads(copied, capsys):
    mine = Path("mine/WRN-10-1.tar")
    save_checkpoint(mine, torch.load(STUDENT, weights_only=True))
    before = mine.read_bytes()
    assert erase("--s_model", str(mine), "--checkpoint_root", "mine", "--defense", "clp", "--beside", "0") == 2
    assert "--s_model mine/WRN-10-1.tar: this run would write its own network there; --checkpoint_root DIR keeps both" \
        in capsys.readouterr().err
    assert mine.read_bytes() == before
    assert erase("--checkpoint_root", "mine", "--defense", "clp", "--beside", "0", "--layers", "block1") == 0
    out = capsys.readouterr().out
    assert "note: mine/WRN-10-1.tar will be replaced; it is of no run of this script" in out
    assert "note: --layers is not used by --defense clp" in out


def test_a_stage_whose_state_is_damaged_starts_anew(copied, monkeypatch, capsys):
    def interrupted(self, stage, model, record):
        if stage == "nad":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "epoch_done", interrupted)
        assert erase() == 130
    teacher, = Path("weight/erasing_net/shapes10").glob("*-resume-*/teacher.tar")
    teacher.write_bytes(teacher.read_bytes()[:1000])
    assert erase("--resume") == 0
    assert f"{teacher}; teacher starts anew" in capsys.readouterr().out
    note = teacher.with_name("run.tar")
    save_checkpoint(note, {"run_id": "1", "config": {}})
    note.write_bytes(note.read_bytes()[:100])
    Path("weight/erasing_net/shapes10/WRN-10-1.tar").unlink()
    assert erase("--resume") == 2
    assert "run.tar; without --resume the run starts over" in capsys.readouterr().err


def test_main_killed_in_any_stage_goes_on_and_another_network_is_another_run(copied, capsys):
    for stage in ("finetune  epoch  2/2", "teacher   epoch  1/1"):
        process = start(copied, "main.py", *ERASE, "--resume")
        until(process, stage)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert erase("--resume") == 0
    assert "finetune: going on after epoch" in capsys.readouterr().out
    resumed = Path("weight/erasing_net/shapes10/WRN-10-1.tar").rename("resumed.tar")
    assert erase() == 0
    assert same_weights(resumed, "weight/erasing_net/shapes10/WRN-10-1.tar")
    assert len(lines("results/main.jsonl")) == 2
    content = torch.load(STUDENT, weights_only=True)
    content["state_dict"]["fc.bias"] += 1
    torch.save(content, STUDENT)
    assert erase("--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_a_kill_between_result_line_and_checkpoint_loses_and_doubles_nothing(workplace, monkeypatch):
    real = train_badnet.Journal.finish

    def killed(self, *args, **more):
        monkeypatch.setattr("utils.run.save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        real(self, *args, **more)

    monkeypatch.setattr(train_badnet.Journal, "finish", killed)
    assert train() == 130
    assert not STUDENT.exists()
    assert len(lines("results/train_badnet.jsonl")) == 1
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert train("--resume") == 0
    assert STUDENT.exists()
    assert len(lines("results/train_badnet.jsonl")) == 1


def test_teacher_student_and_fine_tuning_see_the_same_images(copied, monkeypatch):
    import defenses.finetune

    seen = {}
    real = defenses.finetune.Batches

    def spy(data, *args):
        seen.setdefault(args[-1], []).append(data.images.clone())
        return real(data, *args)

    monkeypatch.setattr(defenses.finetune, "Batches", spy)
    assert erase("--save", "0") == 0
    assert set(seen) == {"finetune", "teacher"}
    tuned, student = seen["finetune"]
    (teacher,) = seen["teacher"]
    assert torch.equal(tuned, teacher)
    assert torch.equal(tuned, student)


def test_a_full_disk_in_the_middle_keeps_what_is_there(copied, capsys, monkeypatch):
    before = STUDENT.read_bytes()
    real, count = torch.save, []

    def full(content, file, **kwargs):
        count.append(1)
        if len(count) == 3:  # the state after the second epoch
            raise OSError(28, "No space left on device")
        real(content, file, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert train("--seed", "2") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert STUDENT.read_bytes() == before
    assert train("--seed", "2", "--resume") == 0
    assert "going on after epoch 1" in capsys.readouterr().out


def test_flags_win_over_the_checkpoint_also_where_they_say_the_default(copied, capsys):
    content = torch.load(STUDENT, weights_only=True)
    content["config"].update(target_label=0, trig_w=4, blend_image="/dev/zero")
    torch.save(content, STUDENT)
    assert erase("--defense", "finetune", "--target_label", "5", "--epochs", "1") == 0
    (record,) = lines("results/main.jsonl")
    assert record["attack"]["target_label"] == 5, "given"
    assert record["attack"]["trig_w"] == 4, "from the checkpoint"
    assert record["attack"]["blend_image"] == "", "a path is never taken from a checkpoint"
    assert "was trained with --target_label 0, this run measures with 5" in capsys.readouterr().out
    content["config"]["trig_w"] = "wide"
    torch.save(content, STUDENT)
    assert erase() == 2
    assert "the checkpoint's trig_w: a whole number is needed" in capsys.readouterr().err


def test_the_teacher_is_measured_with_the_same_attack(workplace, capsys):
    assert train("--trigger_type", "squareTrigger", "--target_label", "2", "--epochs", "1") == 0
    assert erase("--epochs", "1") == 0
    (record,) = lines("results/main.jsonl")
    capsys.readouterr()
    assert erase("--s_model", "weight/t_net/shapes10/WRN-10-1-T-model_best.pth.tar", "--save", "0", "--defense",
                 "finetune", "--epochs", "1") == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("backdoored "))
    assert f"{record['metrics']['teacher']['asr']:.2f}" in row.split()


def test_a_part_without_images_is_left_out(workplace):
    from test_data import write_folder

    write_folder(workplace / "mine", ("a", "b"), n=8, size=32)
    assert run_script(train_badnet.main, TrainConfig, [
        "--dataset", "folder", "--data_root", "mine", "--target_type", "classSpecific", "--target_label", "0",
        "--source_label", "1", "--s_name", "WRN-10-1", "--epochs", "1", "--batch_size", "8", "--device", "cpu"]) == 0
    (record,) = lines("results/train_badnet.jsonl")
    assert "parts" not in record["metrics"]


def picture(*args):
    return visualize.main([args[0], *SMALL, "--ratio", "0.2", *args[1:]])


def test_pictures_of_a_network_and_its_erased_version(copied, capsys):
    pytest.importorskip("matplotlib")
    assert erase("--eval_every", "1", "--defense", "sage", "--checkpoint_root", "sage") == 0
    quick = ["--nc_steps", "10", "--nc_batch_size", "2"]
    for name, more in (("attention", ["--images", "2", "--networks", "sage/WRN-10-1.tar"]),
                       ("gradcam", ["--images", "12", "--networks", "sage/WRN-10-1.tar"]),
                       ("channels", []), ("threshold", quick), ("curves", [])):
        assert picture(name, *more) == 0, capsys.readouterr().err
        with Image.open(f"pictures/{name}.png") as image:
            assert min(image.size) > 300
            assert len(set(image.convert("L").tobytes())) > 50, "it is not blank"
    capsys.readouterr()
    for argv, message in ((["attention", "--trigger_type", "none"], "show what a trigger does"),
                          (["attention", "--layers", "block9"], "--layers block9: WideResNet has no such layer"),
                          (["channels", "--prune_layer", "fc"], "--prune_layer fc: no convolution"),
                          (["attention", "--networks", "none.tar"], "no such checkpoint: none.tar"),
                          (["curves", "--results", "results/train_badnet.jsonl.none"], "holds no run of main.py")):
        assert picture(*argv) == 2
        assert message in capsys.readouterr().err


def test_each_network_of_a_picture_has_its_own_weights_and_title(copied):
    assert erase("--epochs", "1") == 0
    files = ["weight/t_net/shapes10/WRN-10-1-T-model_best.pth.tar", "weight/erasing_net/shapes10/WRN-10-1.tar"]
    config = parse(visualize.StudyConfig, [*SMALL, "--ratio", "0.2", "--networks", *files])
    shown = visualize.shown_networks(visualize.known_trigger(config), config)
    assert [title for title, _ in shown] == ["backdoored", "teacher", "NAD"]
    for (_, model), path in zip(shown, [STUDENT, *files], strict=True):
        stored = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
    assert len({model.fc.weight.sum().item() for _, model in shown}) == 3


@pytest.fixture
def drawn(monkeypatch):
    """The figures that visualize.py would have saved."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(visualize, "save", lambda figure, config, name: figures.append(figure))
    return figures


def test_the_title_of_a_picture_of_one_network_is_not_cut_off(copied, drawn):
    assert picture("gradcam", "--images", "1") == 0
    (figure,) = drawn
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width


def test_attention_and_gradcam_show_each_network_on_clean_and_triggered_images(copied, drawn):
    assert erase("--epochs", "1", "--defense", "finetune") == 0
    args = ["--images", "2", "--networks", "weight/erasing_net/shapes10/WRN-10-1.tar"]
    assert picture("attention", *args) == picture("gradcam", *args) == 0
    config = parse(visualize.StudyConfig, [*SMALL, "--ratio", "0.2", *args])
    subject = visualize.known_trigger(config)
    models = [model for _, model in visualize.shown_networks(subject, config)]
    clean, stamped = subject.examples(2)
    assert not torch.equal(clean, stamped)
    images = [image for pair in zip(clean, stamped, strict=True) for image in pair]
    layers = ("block1", "block2", "block3")

    def maps(image):
        found = []
        for model in models:
            with torch.no_grad(), Features(model, layers) as taken:
                model(to_float(image[None]))
                found += [f.square().sum(1)[0] for f in taken.outputs()]
        return found

    for figure, heats, titles in ((drawn[0], maps, [f"{name}\n{layer}" for name in ("backdoored", "fine-tuning")
                                                    for layer in layers]),
                                  (drawn[1], lambda image: [grad_cam(m, to_float(image[None]), "block3")[0][0]
                                                            for m in models], ["backdoored", "fine-tuning"])):
        rows = np.array(figure.axes).reshape(4, -1)
        assert [axis.get_title() for axis in rows[0]] == ["image", *titles]
        for k, (row, image) in enumerate(zip(rows, images, strict=True)):
            assert row[0].get_ylabel() == ("clean", "triggered")[k % 2]
            assert np.array_equal(row[0].images[0].get_array(), image.permute(1, 2, 0).numpy())
            for axis, value in zip(row[1:], heats(image), strict=True):
                value = torch.nn.functional.interpolate(value[None, None], (32, 32), mode="bilinear")[0, 0]
                expected = (value / value.max().clamp(min=1e-12)).numpy()
                assert np.allclose(axis.images[1].get_array(), expected, atol=1e-5)
        assert not np.allclose(rows[0][1].images[1].get_array(), rows[0][len(rows[0]) // 2 + 1].images[1].get_array())


def test_curves_are_those_of_the_last_run(copied, drawn):
    for defense in ("sage", "finetune"):
        assert erase("--eval_every", "1", "--defense", defense, "--checkpoint_root", defense, "--beside", "0") == 0
    assert picture("curves") == 0
    record = lines("results/main.jsonl")[-1]
    for axis, key in zip(drawn[0].axes, ("clean_acc", "asr"), strict=True):
        (line,) = axis.get_lines()
        assert line.get_label() == "finetune"
        values = [record["metrics"]["backdoored"][key], *(e[key] for e in record["history"])]
        assert line.get_xydata().tolist() == [[k, value] for k, value in enumerate(values)]
    assert drawn[0].get_suptitle() == "gridTrigger, WRN-10-1, finetune"


def test_the_picture_of_channels_shows_clean_and_triggered_norms(copied, drawn, capsys):
    assert picture("channels") == 0
    lines_of = {line.get_label(): torch.tensor(line.get_ydata()) for axis in drawn[0].axes for line in axis.get_lines()}
    subject = visualize.known_trigger(parse(visualize.StudyConfig, [*SMALL, "--ratio", "0.2"]))
    images = {"clean": subject.test.images[subject.poisoned_test.poisoned], "triggered": subject.poisoned_test.images}
    every = {name: channel_norms(subject.model, "bn1", part) for name, part in images.items()}
    norms = {name: found["linf"] for name, found in every.items()}
    order = norms["clean"].argsort(descending=True)
    assert all(torch.allclose(lines_of[name], norms[name][order], atol=1e-6) for name in images)
    assert not torch.equal(lines_of["clean"], lines_of["triggered"])
    histograms = [axis for axis in drawn[0].axes if axis.patches]
    said = capsys.readouterr().out.splitlines()
    for k, (norm, title) in enumerate((("linf", "l-inf"), ("l2", "l2"), ("l1", "l1"))):
        both, difference = histograms[k], histograms[k + 3]
        assert both.get_xlabel() == f"mean {title} norm"
        values = [every[name][norm].numpy() for name in ("clean", "triggered")]
        edges = np.histogram_bin_edges(np.concatenate(values), 20)
        for bars, value in zip(both.containers, values, strict=True):
            assert [bar.get_height() for bar in bars] == np.histogram(value, edges)[0].tolist()
        added = values[1] - values[0]
        heights, edges = np.histogram(added / added.std(ddof=1), 30)
        assert [bar.get_height() for bar in difference.patches] == heights.tolist()
        assert f"added to the {title} norm" in difference.get_xlabel()
        (line,) = [s for s in said if s.split()[0] == title]
        assert f"channel {added.argmax()} of bn1" in line
        assert f"{(added.max() - added.mean()) / added.std(ddof=1):.1f} standard deviations" in line


def test_the_picture_of_the_threshold_starts_at_the_whole_networks_acc_and_asr(copied, drawn, capsys):
    assert picture("threshold", "--nc_steps", "10") == 0
    subject = visualize.known_trigger(parse(visualize.StudyConfig, [*SMALL, "--ratio", "0.2"]))
    whole = evaluate(subject.model, subject.test, subject.poisoned_test, subject.aim)
    assert whole["clean_acc"] != whole["asr"]
    said = [line for line in capsys.readouterr().out.splitlines() if "channels of" in line]
    for axis, norm in zip(drawn[0].axes, ("l-inf", "l2", "l1"), strict=True):
        acc, asr = (line.get_ydata() for line in axis.get_lines())
        assert (acc[0], asr[0]) == (whole["clean_acc"], whole["asr"])
        for limit in (50, 10):
            at = next((i for i, rate in enumerate(asr) if rate < limit), -1)
            text = f"ASR {asr[at]:5.2f} with {axis.get_lines()[0].get_xdata()[at]} channels of"
            line = said.pop(0)
            assert line.startswith(norm) and text in line and f"{acc[0] - acc[at]:.2f} points" in line
            assert ("never below" in line) == (asr[at] >= limit)


def test_main_measures_with_a_trigger_that_detect_found(copied, monkeypatch, capsys):
    monkeypatch.setattr(neural_cleanse, "outliers", lambda triggers: [4])
    quick = [*SMALL, "--ratio", "0.2", "--nc_steps", "10", "--nc_batch_size", "2", "--detector", "neural_cleanse"]
    assert run_script(detect.main, DetectConfig, quick) == 0
    flags = capsys.readouterr().out.partition("trigger working: ")[2].split("\n")[0].split()
    assert flags[-2:] == ["--target_label", "4"]
    clp = [*ERASE, "--defense", "clp", "--beside", "0"]
    file = Path(flags[flags.index("--reversed_file") + 1])
    assert file.parent.name == "detect-shapes10-WRN-10-1-S-model_best"
    file.with_name("mask-9.png").write_text("of a run before")
    assert run_script(detect.main, DetectConfig, quick) == 0
    assert [p.name for p in file.parent.glob("mask-*.png")] == ["mask-4.png"]
    found = torch.load(file, weights_only=True)
    assert run_script(main.main, EraseConfig, [*clp, *flags]) == 0
    shutil.rmtree("pictures")
    erased = Path("weight/erasing_net/shapes10/WRN-10-1.tar")
    again = [*clp, "--s_model", str(erased), "--checkpoint_root", "again"]
    assert run_script(main.main, EraseConfig, again) == 0, "the trigger is kept beside the erased network"
    for path in (erased, Path("again/WRN-10-1.tar")):
        content = torch.load(path, weights_only=True)
        assert (content["attack"]["trigger_type"], content["attack"]["target_label"]) == ("reversedTrigger", 4)
        assert torch.equal(content["trigger"]["mask"], found["masks"][4])
        assert torch.equal(content["trigger"]["pattern"], found["patterns"][4])


def test_detect_doubts_an_outlier_whose_mask_is_not_small():
    assert detect.verdict([], []) == "no label stands out"
    assert detect.verdict([5, 1], [0.11, 0.7]) == "backdoored, target label 5"
    assert detect.verdict([5, 1, 2], [0.11, 0.12, 0.7]) == "backdoored, target labels 5, 1"
    assert "label 9 stands out" in detect.verdict([9], [0.77])
    assert "doubtful" in detect.verdict([9], [0.77])


def test_strip_sets_its_threshold_on_the_clean_subset_and_counts_both_errors(monkeypatch, capsys):
    answers = iter(map(torch.tensor, ([0.0, 2.0], [0.5, 2.0, 3.0, 4.0], [0.0, 0.5, 0.75, 1.0, 2.5])))
    monkeypatch.setattr(strip, "entropies", lambda *_: next(answers))
    data = TensorData(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "a")
    subject = SimpleNamespace(clean=data, test=data, poisoned_test=data, model=None)
    found = detect.look_at_inputs(subject, DetectConfig(save=False, strip_frr=0.5), None)
    assert found["threshold"] == 1.0
    assert found["frr"] == 25, "of clean test images: 0.5"
    assert found["far"] == 40, "of triggered ones: 1 and 2.5"
    assert found["auroc"] == (1.5 + 4 + 5 + 5) / 20
    assert found["far_at_frr"] == 0, "half of 0.5, 2, 3, 4 lies below 3"
    assert "40.00% of triggered ones accepted (0.00% at just 50.0% of clean ones" in capsys.readouterr().out


def test_the_histogram_of_strip(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(detect, "save_figure", lambda figure, path: drawn.append((figure, path)))
    clean, triggered = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.1, 0.1])
    detect.save_histogram(clean, triggered, 0.5, tmp_path / "strip.png")
    ((figure, path),) = drawn
    (axis,) = figure.axes
    assert path == tmp_path / "strip.png"
    assert axis.get_lines()[0].get_xdata() == [0.5, 0.5]
    for bars, name, values in zip(axis.containers, ("clean (3)", "triggered (2)"), (clean, triggered), strict=True):
        assert bars[0].get_label() == name
        heights = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in bars}
        found = [x for x, height in heights.items() for _ in range(round(height))]
        assert np.allclose(found, values, atol=0.03)


def test_fewer_clean_images_than_a_batch_are_said(copied, capsys):
    assert run_script(main.main, EraseConfig, [*ERASE, "--defense", "clp", "--beside", "0", "--save", "0"]) == 0
    assert "fewer than" not in capsys.readouterr().out
    many = [*ERASE, "--defense", "finetune", "--epochs", "1", "--save", "0", "--batch_size", "1000"]
    assert run_script(main.main, EraseConfig, many) == 0
    assert "clean images are fewer than --batch_size 1000: an epoch of training is one step" in capsys.readouterr().out


def test_detect_prints_a_verdict_and_writes_the_triggers(copied, capsys):
    quick = [*SMALL, "--ratio", "0.2", "--nc_steps", "20", "--nc_batch_size", "2", "--strip_inputs", "8",
             "--strip_overlays", "5"]
    assert run_script(detect.main, DetectConfig, quick) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("anomaly index", "Neural Cleanse: ", "STRIP: threshold", "AUROC"))
    (record,) = lines("results/detect.jsonl")
    assert len(record["neural_cleanse"]["norms"]) == 10
    failed = sum(share < 50 for share in record["neural_cleanse"]["success"])
    assert failed, "after 20 steps"
    assert f"no working trigger was found for {failed} of 10 labels" in out
    assert 0 <= record["strip"]["auroc"] <= 1
    (folder,) = Path("pictures").iterdir()
    stored = torch.load(folder / "triggers.pt", weights_only=True)
    assert stored["masks"].shape == (10, 1, 32, 32)
    def pixels(path):
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB")).transpose(2, 0, 1))

    rows = [row[:, detect.CAPTION:][:, ::8, ::8] for row in pixels(folder / "images.png").chunk(3, 1)]
    assert all(len(row[:, :detect.CAPTION].unique()) > 2 for row in pixels(folder / "images.png").chunk(3, 1)), "text"
    clean, real, reverse = (torch.stack(row.split(32, 2)) for row in rows)
    changed = (real != clean).any(1)
    assert changed[:, 29:, 29:].flatten(1).any(1).all() and not changed[:, :29].any(), "gridTrigger"
    shown = min(range(10), key=lambda k: stored["norms"][k])
    found = neural_cleanse.Triggers([0], stored["masks"][[shown]], stored["patterns"][[shown]], None)
    assert torch.equal(reverse, found.stamp(clean, 0))
    mask, pattern = found.masks[0].expand(3, 32, 32), found.patterns[0]
    for name, values in (("mask", mask), ("pattern", pattern), ("trigger", mask * pattern)):
        assert torch.equal(pixels(folder / f"{name}-{shown}.png")[:, ::8, ::8], (255 * values).round().byte())
    assert not list(folder.glob(f"mask-{(shown + 1) % 10}.png"))
    shutil.rmtree("pictures")
    assert run_script(detect.main, DetectConfig, [*quick, "--layers", "block1"]) == 2
    assert "--layers: is for erasing and pictures" in capsys.readouterr().err
    assert run_script(detect.main, DetectConfig, [*quick, "--trigger_type", "none", "--save", "0"]) == 0
    assert "AUROC" not in capsys.readouterr().out
    assert not Path("pictures").exists()
    for name, word, other in (("strip", "STRIP: threshold", "Neural Cleanse: "),
                              ("neural_cleanse", "Neural Cleanse: ", "STRIP: threshold")):
        assert run_script(detect.main, DetectConfig, [*quick, "--detector", name]) == 0
        out = capsys.readouterr().out
        assert word in out and other not in out
        assert {"neural_cleanse", "strip"}.intersection(lines("results/detect.jsonl")[-1]) == {name}
