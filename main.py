"""Erase the backdoor of a trained network with a small clean subset: Neural Attention Distillation by default.

    python main.py --dataset shapes10               # shipped network, generated data
    python main.py                                  # CIFAR-10
    python main.py --s_model FILE --trigger_type none --dataset folder --data_root DIR

Measures the network before, fine-tuned, and erased; writes the teacher (weight/t_net), the erased network
(weight/erasing_net/<s_name>.tar) and one line of results/main.jsonl. A killed run goes on with --resume.
"""

import copy
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

import defenses
from attacks import must_be_clean
from config import DataConfig, EraseConfig, UserError, file_name, not_default, unused, weight_root
from defenses.finetune import TRAINING
from leaderboard import REFERENCE
from subject import opened, study
from utils.checkpoint import load_checkpoint, save_checkpoint, stored_config, versions
from utils.devices import choose_device, use_bf16
from utils.engine import evaluate
from utils.run import Journal, check_writable, finished, identity, run_script, say, table

BEFORE = {}  # {what decides them: metrics of the network to erase}, so that a benchmark measures it once a process


def measured_once(config, inputs, attack, device, measure):
    """``measure()`` of the network of ``config`` under the options ``attack`` on ``device``, or what it gave before;
    ``inputs``: the hashes of the run's files, of ``start_of``."""
    files = {name: value for name, value in inputs.items() if name not in ("t_model", "reference")}
    data = {f.name: getattr(config, f.name) for f in fields(DataConfig)}
    key = repr([sorted(files.items()), sorted(data.items()), sorted(attack.items()), config.s_name, device])
    if key not in BEFORE:
        BEFORE[key] = measure()
    return copy.deepcopy(BEFORE[key])


def idle(config):
    """{option that the defense reads: why it does nothing here}."""
    teacher = ("teacher_epochs", "teacher_lr", "teacher_lr_schedule", "teacher_rho")
    cases = [(config.t_model, teacher, "with --t_model"),
             (config.sage_betas, ("sage_beta",), "beside --sage_betas"),
             (config.sage_rate != "dynamic", ("sage_interval", "sage_rho"), f"with --sage_rate {config.sage_rate}"),
             (config.nc_mitigation == "unlearn" and config.defense == "neural_cleanse",
              ("held_out", "prune_layer", "prune_drop"), "with --nc_mitigation unlearn")]
    read = defenses.reads(config.defense)
    return {name: why for holds, names, why in cases if holds for name in names if name in read}


def notes(config, n, side):
    """What the user of ``config`` with ``n`` clean images, ``side`` pixels high or wide, should know before anything is
    trained: lines of text."""
    given = set(not_default(config))
    unread = unused(config, defenses.without_unused)
    found = [f"--{name} is not used by --defense {config.defense}" for name in unread]
    found += [f"--{name} is for the fine-tuning beside, --defense {config.defense} does not use it"
              for name in sorted(given.intersection(TRAINING).difference(unread) - defenses.reads(config.defense))]
    found += [f"--{name} does nothing {why}" for name, why in idle(config).items() if name in given]
    if config.layers and "attention" not in defenses.reads(config.defense):
        found.append(f"--layers is not used by --defense {config.defense}")
    if config.defense == "nad" and config.at_loss == "paper" and not given & {"beta1", "beta2", "beta3"}:
        found.append("--at_loss paper: the betas are meant for the other form; 0.5, 4 and 16 weigh about the same")
    if config.cutout > side / 2 and "cutout" in defenses.reads(config.defense):
        found.append(f"--cutout {config.cutout}: hides a large part of images of {side} pixels; 0 turns it off")
    if config.defense == "nad" and config.beside and config.lr != config.ft_lr:
        found.append(f"the fine-tuning beside it has another learning rate, --ft_lr {config.ft_lr:g}")
    own = f"{config.defense}_batch_size"
    name = own if hasattr(config, own) else "batch_size"
    size = getattr(config, name)
    read, usual = defenses.reads(config.defense), EraseConfig.batch_size
    read |= defenses.reads("finetune") if config.beside else set()
    rates = sorted(option for option in read if option.endswith("lr") and option != "nc_lr")
    if config.batch_size <= usual / 2 and "batch_size" in read and given.isdisjoint(rates):
        scaled = " ".join(f"--{rate} {getattr(config, rate) * config.batch_size / usual:.3g}" for rate in rates)
        found.append(f"--batch_size {config.batch_size}: the learning rates are meant for {usual} and may destroy the "
                     f"network; in proportion they are {scaled}")
    if n < size and (config.beside or name in defenses.reads(config.defense)):
        found.append(f"{n} clean images are fewer than --{name} {size}: an epoch of training is one step on all of "
                     f"them")
    return found


def replaces(target, config):
    """Say whose network at ``target`` the run with ``config`` will replace, if it is not one of the same run."""
    if not target.exists():
        return
    try:
        before = stored_config(load_checkpoint(target))
    except UserError:
        before = {}
    names = ("s_model", "defense", "seed")
    if any(before.get(name) != getattr(config, name) for name in names):
        of = ", ".join(f"--{name} {before[name]}" for name in names if name in before)
        say(f"note: {target} will be replaced; it is of {of if 's_model' in before else 'no run of this script'}; "
            f"--checkpoint_root DIR keeps both")


def must_differ(config, **targets):
    """Raise ``UserError`` if a file that the run will write, by the option for its folder, is one that it reads."""
    for option in ("s_model", "t_model", "reference"):
        file = getattr(config, option)
        for flag, target in targets.items():
            if file and Path(file).resolve() == target.resolve():
                raise UserError(f"--{option} {file}: this run would write its own network there; --{flag} DIR keeps "
                                f"both")


def main(config):
    """Erase the network that ``config`` (``EraseConfig``) names."""
    device = choose_device(config.device)
    amp = use_bf16(config.amp, device)
    defenses.get(config.defense)  # an unknown name is said before anything is read
    name = file_name(config.s_name)
    target = weight_root(config, config.checkpoint_root, "erasing_net") / f"{name}.tar"
    teacher_file = weight_root(config, config.teacher_root, "t_net") / f"{name}-T-model_best.pth.tar"
    config, content, attack = opened(config)
    if config.t_model:
        load_checkpoint(config.t_model)
    clean_content = load_checkpoint(config.reference) if config.reference else None
    if clean_content:
        must_be_clean(clean_content, f"--reference {config.reference}")
    if finished(config, target):
        say(f"already finished: {target}")
        return
    if config.save:
        must_differ(config, checkpoint_root=target, teacher_root=teacher_file)
        replaces(target, config)
        check_writable(target.parent, "checkpoint_root")
        check_writable(teacher_file.parent, "teacher_root")
        check_writable(Path(config.log_root), "log_root")

    subject = study(config, content, attack, device)
    model, clean, test = subject.model, subject.clean, subject.test
    reference = subject.another(clean_content, config.reference, config.s_name) if clean_content else None
    defenses.check(model, clean, config)
    for text in [*notes(config, len(clean), min(clean.shape[1:])), *defenses.advice(model, clean, config)]:
        say(f"note: {text}")
    say(f"{config.s_model}: {config.s_name} on {config.dataset}, {len(clean)} clean images, {len(test)} test images, "
        f"{subject.attack.trigger_type}, {device}{', bf16' if amp else ''}, seed {config.seed}")

    about = subject.about()

    def measure(model, parts=subject.parts):
        with journal.aside():
            return evaluate(model, test, subject.poisoned_test, subject.aim, parts=parts)

    def report(stage, model, record):
        text = f"{stage:<9} epoch {record['epoch']:2d}/{record['epochs']}  loss {record['loss']:.4f}"
        if config.eval_every and record["epoch"] % config.eval_every == 0:
            record.update(measure(model, parts=None))
            text += f"  ACC {record['clean_acc']:5.2f}"
            text += "" if record["asr"] is None else f"  ASR {record['asr']:6.2f}"
        say(f"{text}  {record['seconds']:.1f} s")

    class EraseJournal(Journal):
        def stage_done(self, stage, model):
            if stage == "teacher":
                rows["teacher"] = measure(model)
                if config.save:
                    save_checkpoint(teacher_file, {"state_dict": model.state_dict(), "stage": "teacher",
                                                   "epoch": config.teacher_epochs,
                                                   "optimizer": self.optimizer(stage), **rows["teacher"],
                                                   **about, "config": identity(config),
                                                   "versions": versions()})
                    say(f"saved: {teacher_file}")

    journal = EraseJournal(config, target, report)
    rows = {"backdoored" if subject.poisoned_test else "before":
            measured_once(config, journal.inputs, about["attack"], device, lambda: measure(model))}
    if reference is not None:
        rows[REFERENCE] = measure(reference)

    def timed(erase, model):
        start, other = time.perf_counter(), journal.other
        erased = erase(model, clean, config, journal)
        if not isinstance(erased, torch.nn.Module):
            raise UserError(f"{erase.__module__}: erase must return the new network, it returned {erased!r}")
        return erased, time.perf_counter() - start + journal.other - other  # of this process, if it was resumed

    seconds = {}
    model, before = timed(defenses.begin, model)
    if config.first:
        rows[f"{defenses.title(config.first)} first"] = measure(model)
    for kind in dict.fromkeys([*(["finetune"] if config.beside else []), config.defense]):
        erased, spent = timed(defenses.get(kind).erase, model)
        seconds[defenses.title(kind)] = round(before + spent, 2)
        rows[defenses.title(kind)] = metrics = measure(erased)
    say("\n" + table(rows) + "\n")
    whole = next(iter(rows.values()))["clean_acc"]
    for name, metrics_of in rows.items():
        if metrics_of["clean_acc"] < whole / 2:
            say(f"note: {name}: more than half of the accuracy is gone; a low ASR says nothing then")
    content = {"state_dict": erased.state_dict(), "epoch": config.epochs,
               "optimizer": journal.optimizer(config.defense), **metrics, **about}
    journal.finish(content, rows, "main.jsonl", subject.source, attack=about["attack"], defense_seconds=seconds)


if __name__ == "__main__":
    sys.exit(run_script(main, EraseConfig))
