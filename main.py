"""Erase the backdoor of a trained network with a small clean subset: Neural Attention Distillation by default.

    python main.py --dataset shapes10               # shipped network, generated data
    python main.py                                  # CIFAR-10
    python main.py --s_model FILE --trigger_type none --dataset folder --data_root DIR

Measures the network before, fine-tuned, and erased; writes the teacher (weight/t_net), the erased network
(weight/erasing_net/<s_name>.tar) and one line of results/main.jsonl. A killed run goes on with --resume.
"""

import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

import attacks
import defenses
from config import AttackConfig, EraseConfig, UserError, convert, file_name, student_file, weight_root
from data_loader import DatasetCL, backdoor_tests, load_data
from models import select_model
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint, versions
from utils.devices import choose_device, use_bf16
from utils.engine import evaluate
from utils.run import Journal, check_writable, finished, identity, run_script, say, table
from utils.seeds import derive

OF_THE_ATTACK = [f.name for f in fields(AttackConfig)]
NOT_COMPARED = ("inject_portion", "cover_portion", "clean_model")  # of no consequence for what is measured
FILES = ("blend_image", "reflection_root", "clean_model")  # paths are never taken from a checkpoint


def student_path(config):
    """The checkpoint to erase: ``--s_model`` or the default one. Raises ``UserError`` if there is none."""
    if config.s_model:
        return Path(config.s_model)
    path = student_file(config)
    if not path.exists():
        raise UserError(f"no backdoored network at {path}: train it with train_badnet.py --dataset {config.dataset} "
                        f"--s_name {config.s_name}, or name another with --s_model")
    return path


def stored_options(content):
    """What an untrusted checkpoint says about its data and attack: {option: value}, plain values only."""
    stored = {}
    for part in ("config", "attack"):  # what an erased network was measured with is under "attack"
        stored.update(content[part] if isinstance(content.get(part), dict) else {})
    if stored.get("trigger_type") == "auto":
        del stored["trigger_type"]
    return {k: v for k, v in stored.items() if isinstance(v, (str, int, float))}


def with_attack(config, stored):
    """``config`` with the attack that the checkpoint's options ``stored`` name, if ``--trigger_type`` is auto.

    Options that the user gave stay. Raises ``UserError``.
    """
    if config.trigger_type != "auto":
        return config
    changed = {f.name for f in fields(AttackConfig) if getattr(config, f.name) != f.default}
    keep = getattr(config, "said", changed) - {"trigger_type"} | set(FILES)
    values = {"trigger_type": "gridTrigger"}
    for f in fields(AttackConfig):
        if f.name in stored and f.name not in keep:
            values[f.name] = convert(f, stored[f.name], "the checkpoint's ")
    return replace(config, **values)


def warn_about(stored, config, path):
    """Say so if the network was trained for another attack or data set than the one that is measured."""
    names = ["dataset", "image_size", "normalize", "train_size"]
    if config.trigger_type != "none":
        names += [n for n in OF_THE_ATTACK if n not in (*NOT_COMPARED, *FILES)]
    for name in names:
        own = getattr(config, name)
        if name in stored and stored[name] != own:
            say(f"note: {path} was trained with --{name} {stored[name]}, this run measures with {own}")


def load_trigger(config, content, stored, images):
    """The trigger to measure with; what was learned for it comes from the checkpoint ``content``. None without one."""
    if config.trigger_type == "none":
        return None
    same = all(stored.get(name) == getattr(config, name) for name in ("trigger_type", "trigger_seed"))
    state = content.get("trigger") if same and not config.blend_image else None
    if stored.get("reflection_root") and not config.reflection_root and config.trigger_type == "refoolTrigger":
        raise UserError("--reflection_root: the network was trained with reflections from a folder; name it")
    trigger = attacks.make_trigger(config, images.shape[1:], state if isinstance(state, dict) else None)
    if not trigger.trained:
        raise UserError(f"--trigger_type {config.trigger_type}: the checkpoint holds no generator for it; only "
                        f"networks that train_badnet.py trained with it can be measured")
    trigger.see(images)
    return trigger


def main(config):
    """Erase the network that ``config`` (``EraseConfig``) names."""
    device = choose_device(config.device)
    amp = use_bf16(config.amp, device)
    defense = defenses.get(config.defense)
    name = file_name(config.s_name)
    target = weight_root(config, config.checkpoint_root, "erasing_net") / f"{name}.tar"
    teacher_file = weight_root(config, config.teacher_root, "t_net") / f"{name}-T-model_best.pth.tar"
    path = student_path(config)
    content = load_checkpoint(path)
    if config.t_model:
        load_checkpoint(config.t_model)
    stored = stored_options(content)
    attack = with_attack(config, stored)
    config = replace(config, s_model=str(path))
    if finished(config, target):
        say(f"already finished: {target}")
        return
    if config.save:
        check_writable(target.parent, "checkpoint_root")
        check_writable(teacher_file.parent, "teacher_root")
        check_writable(Path(config.log_root), "log_root")

    train, test = load_data(config, True), load_data(config, False).to(device)
    clean = DatasetCL(config, train).to(device)
    trigger = load_trigger(attack, content, stored, train.images)
    poisoned_test, aim, parts = None, None, {}
    if trigger:
        poisoned_test, parts = backdoor_tests(attack, test, trigger)
        aim = None if attack.target_type in ("all2all", "multiLabel") else attack.target_label
    torch.manual_seed(derive(config.seed, "weights"))
    model = select_model(config.dataset, config.s_name, n_classes=train.n_classes, in_channels=train.shape[0],
                         image_size=train.shape[1], normalize=config.normalize)
    load_weights(model, content, path, config.s_name)
    warn_about(stored, attack, path)
    model = model.to(device).eval()
    if hasattr(defense, "check"):
        defense.check(model, clean, config)
    say(f"{path}: {config.s_name} on {config.dataset}, {len(clean)} clean images, {len(test)} test images, "
        f"{attack.trigger_type}, {device}{', bf16' if amp else ''}, seed {config.seed}")

    about = {"attack": {name: getattr(attack, name) for name in OF_THE_ATTACK},
             "trigger": trigger.state() if trigger else {}}

    def measure(model):
        return evaluate(model, test, poisoned_test, aim, parts=parts)

    def report(stage, model, record):
        text = f"{stage:<9} epoch {record['epoch']:2d}/{record['epochs']}  loss {record['loss']:.4f}"
        if config.eval_every and record["epoch"] % config.eval_every == 0:
            record.update(evaluate(model, test, poisoned_test, aim, amp))
            text += f"  ACC {record['clean_acc']:5.2f}"
            text += "" if record["asr"] is None else f"  ASR {record['asr']:6.2f}"
        say(f"{text}  {record['seconds']:.1f} s")

    class EraseJournal(Journal):
        def stage_done(self, stage, model):
            if stage == "teacher":
                rows["teacher"] = measure(model)
                if config.save:
                    save_checkpoint(teacher_file, {"state_dict": model.state_dict(), "epoch": config.teacher_epochs,
                                                   "optimizer": {}, **rows["teacher"], **about,
                                                   "config": identity(config), "versions": versions()})
                    say(f"saved: {teacher_file}")

    rows = {"backdoored" if poisoned_test else "before": measure(model)}
    journal = EraseJournal(config, target, report)
    seconds = {}
    for kind in dict.fromkeys(["finetune", config.defense]):
        start = time.perf_counter()
        erased = defenses.get(kind).erase(model, clean, config, journal)
        seconds[defenses.title(kind)] = round(time.perf_counter() - start, 2)  # of this process, if it was resumed
        rows[defenses.title(kind)] = metrics = measure(erased)
    say("\n" + table(rows) + "\n")
    journal.finish({"state_dict": erased.state_dict(), "epoch": config.epochs, "optimizer": {}, **metrics,
                    **about}, rows, "main.jsonl", train.source, attack=about["attack"], defense_seconds=seconds)


if __name__ == "__main__":
    sys.exit(run_script(main, EraseConfig))
