"""Poison a data set and train a backdoored network on it.

    python train_badnet.py                          # CIFAR-10, WRN-16-1, grid trigger, 10% poisoned, target 5
    python train_badnet.py --dataset shapes10       # the same on a data set that is generated on the spot

Writes weight/s_net/<s_name>-S-model_best.pth.tar (the last epoch, despite the demo's name for the file) and one line of
results/train_badnet.jsonl. A killed run goes on with the same command and --resume. Large networks are trained by
several processes with torchrun --nproc_per_node N train_badnet.py.
"""

import sys
import time
from pathlib import Path

import torch

import attacks
from config import TrainConfig, UserError, not_default, student_file
from data_loader import DatasetBD, backdoor_tests, load_data
from models import select_model
from utils.data import Batches, make_augment
from utils.devices import choose_device, use_bf16
from utils.engine import cross_entropy, evaluate, fit
from utils.parallel import Team
from utils.run import Journal, check_writable, finished, run_script, say, table
from utils.seeds import derive


def main(config):
    """Train the backdoored model that ``config`` (``TrainConfig``) describes."""
    if config.trigger_type == "auto":
        raise UserError("--trigger_type auto: is for main.py, which looks into a checkpoint; name a trigger")
    if config.layers:
        raise UserError("--layers: is for erasing; training has no attention to distil")
    team = Team(config)
    train_in(team, config)
    team.close()


def train_in(team, config):
    """The same as one process of ``team``; the first one measures, reports and writes."""
    team.share(config.batch_size, config.batch_size)  # refused here if it cannot be, not after all preparations
    device = choose_device(team.device(config.device))
    amp = use_bf16(config.amp, device)
    target = student_file(config, config.checkpoint_root)
    if team.from_first(finished(config, target)):
        say(f"already finished: {target}")
        return
    if config.save and team.first:
        check_writable(target.parent, "checkpoint_root")
        check_writable(Path(config.log_root), "log_root")

    if config.optimizer != "muon" and config.turn != TrainConfig.turn:
        say(f"note: --turn is not used by --optimizer {config.optimizer}")
    for line in attacks.advice(config, not_default(config)):
        say(f"note: {line}")
    trigger, poisoned_test, parts, aim, about, prepared = None, None, {}, None, "no trigger", 0.0
    with team.in_turn():
        train, test = load_data(config, True).to(device), load_data(config, False).to(device)
        torch.manual_seed(derive(config.seed, "weights"))
        model = select_model(config.dataset, config.s_name, n_classes=train.n_classes, in_channels=train.shape[0],
                             image_size=train.shape[1], normalize=config.normalize).to(device)
        poisoned_train = train
        if config.trigger_type != "none":
            start = time.perf_counter()
            trigger = attacks.make_trigger(config, train.shape)
            trigger.see(train.images)
            if not trigger.joint:
                poisoned_train = DatasetBD(config, train, mode="train", trigger=trigger)
                about = f"{len(poisoned_train.poisoned)} poisoned"
                about += f", {len(poisoned_train.cover)} cover" if len(poisoned_train.cover) else ""
                of_target = int((train.labels == config.target_label).sum())
                if config.target_type == "cleanLabel" and len(poisoned_train.poisoned) == of_target:
                    say(f"note: --inject_portion {config.inject_portion}: no image of class {config.target_label} is "
                        f"left without the trigger, and the class cannot be learnt by its looks")
            elif config.stamp == "before" or config.compile or team.world > 1:
                raise UserError(f"--trigger_type {config.trigger_type}: its trigger is part of the training step: "
                                f"neither --stamp before nor --compile nor torchrun goes with it")
            else:
                about = f"{config.inject_portion:.0%} of each batch poisoned"
            poisoned_test, parts = backdoor_tests(config, test, trigger)
            aim = None if config.target_type in ("all2all", "multiLabel") else config.target_label
            about += f" ({config.trigger_type}, {config.target_type})"
            prepared = time.perf_counter() - start  # what was optimised once is in data/triggers the next time
            if prepared > 1:
                say(f"the attack was prepared in {prepared:.1f} s")
    about += f", {team.world} processes" if team.world > 1 else ""
    say(f"{config.s_name} on {config.dataset}: {len(train)} training images, {about}, {len(test)} test images, "
        f"{device}{', bf16' if amp else ''}")

    def report(stage, model, record):
        triggered = poisoned_test
        if trigger is not None and trigger.joint:  # its trigger changes from epoch to epoch
            triggered = DatasetBD(config, test, mode="test", trigger=trigger)
        record.update(evaluate(model, test, triggered, aim, amp))
        asr = "" if record["asr"] is None else f"  ASR {record['asr']:6.2f}"
        say(f"epoch {record['epoch']:3d}/{record['epochs']}  loss {record['loss']:.4f}  ACC {record['clean_acc']:5.2f}"
            f"{asr}  {record['seconds']:.1f} s")

    journal = Journal(config, target, report) if team.first else None
    batches = Batches(poisoned_train, config.batch_size, make_augment(config), config.seed, "train_badnet",
                      config.stamp, team.share(config.batch_size, len(train)))
    trained = trigger.network(model, train.n_classes).to(device) if trigger else model
    fit(team.joined(trained), trigger.loss if trigger else cross_entropy, batches, epochs=config.epochs, lr=config.lr,
        lr_schedule=config.lr_schedule, momentum=config.momentum, weight_decay=config.weight_decay, seed=config.seed,
        stage="train_badnet", turn=config.turn if config.optimizer == "muon" else 0.0, amp=amp,
        compiled=config.compile, progress=journal, team=team)
    if not team.first:
        return
    if trigger is not None and trigger.joint:
        poisoned_test, parts = backdoor_tests(config, test, trigger)
    metrics = evaluate(model, test, poisoned_test, aim, parts=parts)
    poisons = trigger is not None and config.inject_portion > 0
    say("\n" + table({"backdoored" if poisons else "clean": metrics}) + "\n")
    content = {"state_dict": model.state_dict(), "epoch": config.epochs,
               "optimizer": journal.optimizer("train_badnet"), **metrics, "trigger": trigger.state() if trigger else {}}
    journal.finish(content, metrics, "train_badnet.jsonl", train.source, processes=team.world,
                   prepare_seconds=round(prepared, 2))


if __name__ == "__main__":
    sys.exit(run_script(main, TrainConfig))
