"""The command line: defaults < --config < flags, and one clear line for what is wrong."""

import json
from dataclasses import fields

import pytest
import torch

from config import EraseConfig, TrainConfig, UserError, as_dict, command, parse
from subject import opened, with_attack
from utils.run import identity


def test_defaults_then_file_then_flags(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"lr": 0.05, "epochs": 7}))
    config = parse(TrainConfig, ["--config", str(file), "--epochs", "9", "--layers", "block1", "block2", "--resume"])
    assert (config.lr, config.epochs, config.batch_size) == (0.05, 9, TrainConfig().batch_size)
    assert config.layers == ["block1", "block2"]
    assert config.resume
    assert parse(TrainConfig, ["--save", "0"]).save is False


def test_result_lines_and_checkpoints_give_their_configuration_back(tmp_path):
    one, two = EraseConfig(seed=3, layers=["block3"]), EraseConfig(seed=4)
    lines = tmp_path / "main.jsonl"
    lines.write_text("".join(json.dumps({"config": as_dict(c), "metrics": {}}) + "\n" for c in (one, two)))
    assert parse(EraseConfig, ["--config", str(lines)]) == two
    assert parse(EraseConfig, ["--config", f"{lines}:1"]) == one
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"")
    assert parse(EraseConfig, ["--config", str(tar)], lambda _: {"config": as_dict(one)}) == one
    with pytest.raises(UserError, match="holds a EraseConfig"):
        parse(TrainConfig, ["--config", str(lines)])
    with pytest.raises(UserError, match="has 2 lines, line 3"):
        parse(EraseConfig, ["--config", f"{lines}:3"])


@pytest.mark.parametrize(("argv", "message"), [
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--epochs", "three"], "--epochs: a whole number is needed, got 'three'"),
    (["--epochs", 400 * "9"], "--epochs: a whole number is needed"),
    (["--epochs", "0"], "--epochs: a whole number of at least 1 is allowed, got 0"),
    (["--ratio", "1.5"], "--ratio: a number from 0.0 to 1.0 is allowed, got 1.5"),
    (["--lr", "nan"], "--lr: a number of at least 0.0 is allowed, got nan"),
    (["--dataset", "cifar"], "--dataset: one of CIFAR10, .* is allowed, got 'cifar'"),
    (["--save", "perhaps"], "--save: true or false"),
    (["--config", "nowhere.json"], "no such file: nowhere.json"),
])
def test_what_is_wrong_is_named(argv, message):
    with pytest.raises(UserError, match=message):
        parse(EraseConfig, argv)


def test_bad_files(tmp_path):
    file = tmp_path / "c.json"
    for text, message in (("{", "is not JSON"), ('{"lrr": 1}', "sets 'lrr'"), ("[1]", "no configuration"),
                          ('{"lr": "high"}', "lr: a number is needed")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            parse(EraseConfig, ["--config", str(file)])
    file = tmp_path / "c.jsonl"
    file.write_text("")
    with pytest.raises(UserError, match="c.jsonl is empty"):
        parse(EraseConfig, ["--config", str(file)])
    file.write_text('{"lr": 0.5}\n{"lr": 0.7}\n\n \n')
    assert parse(EraseConfig, ["--config", str(file)]).lr == 0.7, "the last line that is one"


def test_flags_of_the_demo_are_there():
    names = {f.name for f in fields(TrainConfig)} | {f.name for f in fields(EraseConfig)}
    wanted = """s_model t_model s_name t_name dataset ratio beta1 beta2 beta3 p epochs batch_size lr momentum
                weight_decay inject_portion target_label trigger_type target_type trig_w trig_h checkpoint_root log_root
                seed device save"""
    assert set(wanted.split()) <= names


@pytest.mark.parametrize("cls", [TrainConfig, EraseConfig])
def test_help_has_every_flag_with_its_default(cls, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for f in fields(cls):
        assert f"--{f.name} " in text
        assert f.metadata["help"]
    assert f"[{cls().epochs} epochs]" in text


def test_a_flag_at_its_default_stays_against_the_checkpoint(tmp_path):
    """Of the attack only, which else is the checkpoint's, and in all that repeats the run."""
    config = parse(EraseConfig, ["--sig_delta", "20", "--blend_alpha", "0.5", "--epochs", "10"])
    assert config.keep == ["sig_delta"]
    assert parse(EraseConfig, command(config).split()[2:]) == config
    path = tmp_path / "run.json"
    path.write_text(json.dumps(as_dict(config)))
    again = parse(EraseConfig, ["--config", str(path)])
    assert again == config
    measured = with_attack(again, {"trigger_type": "signalTrigger", "sig_delta": 40.0, "sig_freq": 3.0})
    assert (measured.sig_delta, measured.sig_freq, measured.trigger_type) == (20.0, 3.0, "signalTrigger")
    assert identity(config) != identity(parse(EraseConfig, ["--blend_alpha", "0.5"]))
    assert parse(EraseConfig, ["--trigger_type", "signalTrigger", "--sig_delta", "20"]).keep == []
    with pytest.raises(UserError, match="--keep lr: names of options of the attack"):
        with_attack(EraseConfig(keep=["lr"]), {})


def test_a_checkpoint_that_names_no_attack_is_measured_with_the_grid_trigger_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "plain.tar"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    assert opened(EraseConfig(s_model=str(path)))[2].trigger_type == "gridTrigger"
    assert "plain.tar does not say which attack it was trained with: gridTrigger is measured" in capsys.readouterr().out
    for options in ({"trigger_type": "none"}, {"trigger_type": "blendTrigger"}):
        opened(EraseConfig(s_model=str(path), **options))
    assert not capsys.readouterr().out


def test_the_command_repeats_the_run():
    config = parse(EraseConfig, ["--seed", "3", "--layers", "a", "b", "--resume"])
    assert command(config).split()[2:] == ["--seed", "3", "--layers", "a", "b"]
