"""The network under study: its checkpoint, the attack that it was trained with, the data to measure it on."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import attacks
from config import AttackConfig, UserError, convert, not_default, student_file
from data_loader import DatasetCL, backdoor_tests, load_data
from models import check_name, select_model
from utils.checkpoint import load_checkpoint, load_weights
from utils.data import TensorData
from utils.engine import clone
from utils.run import say
from utils.seeds import derive

OF_THE_ATTACK = [f.name for f in fields(AttackConfig)]
NOT_COMPARED = ("inject_portion", "cover_portion", "clean_model")  # of no consequence for what is measured
FILES = ("blend_image", "reversed_file", "reflection_root", "clean_model")  # paths are never taken from a checkpoint


def student_path(config):
    """The checkpoint to erase: ``--s_model`` or the default one. Raises ``UserError`` if there is none."""
    if config.s_model:
        return Path(config.s_model)
    path = student_file(config)
    if not path.exists():
        check_name(config.s_name)
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
    """``config`` with the attack that the options ``stored`` of its checkpoint name, if ``--trigger_type`` is auto.

    Options that the user gave stay. Raises ``UserError``.
    """
    if config.trigger_type != "auto":
        return config
    unknown = set(config.keep) - set(OF_THE_ATTACK)
    if unknown:
        raise UserError(f"--keep {min(unknown)}: names of options of the attack are needed")
    if "trigger_type" not in stored:
        say(f"note: {config.s_model} does not say which attack it was trained with: gridTrigger is measured "
            f"(--trigger_type names another; none: accuracy alone)")
    keep = {*not_default(config), *config.keep, *FILES} - {"trigger_type"}
    values = {"trigger_type": "gridTrigger"}
    for f in fields(AttackConfig):
        if f.name in stored and f.name not in keep:
            values[f.name] = convert(f, stored[f.name], "the checkpoint's ")
    return replace(config, **values)


def warn_about(stored, config, path):
    """Say so if the network was trained for another attack or data set than the one that is measured."""
    names = ["dataset", "image_size", "grey", "normalize", "train_size"]
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


@dataclass
class Subject:
    """What ``study`` gives: ``model`` on its device, the sets, and the attack to measure with."""

    path: Path
    model: torch.nn.Module
    clean: DatasetCL
    test: TensorData
    source: str  # what the training images were read from
    attack: object  # the options of the attack, an ``AttackConfig``
    trigger: object  # None if no trigger is known
    poisoned_test: TensorData  # None without one
    parts: dict
    aim: int  # the label that the attacker wants, None if it is not one

    def another(self, content, path, s_name):
        """The network in ``content``, from ``load_checkpoint(path)``, of the same architecture. ``UserError``."""
        model = clone(self.model)
        load_weights(model, content, path, s_name)
        return model.eval()

    def examples(self, n):
        """(clean, triggered), uint8 ``(n, C, H, W)``: test images that the trigger changes, one class after another;
        without a trigger any test images, and None."""
        triggered, there, labels = self.poisoned_test, torch.arange(len(self.test)), self.test.labels.cpu()
        if triggered is not None:
            there, labels = triggered.poisoned, triggered.true_labels.cpu()
        number = torch.zeros_like(labels)  # of an image in its class
        for c in labels.unique():
            number[labels == c] = torch.arange(int((labels == c).sum()))
        order = (number * (labels.max() + 1) + labels).argsort()[:n]
        return self.test.images[there[order]], None if triggered is None else triggered.images[order]

    def about(self):
        """What a checkpoint of an erased network says about the attack."""
        return {"attack": {name: getattr(self.attack, name) for name in OF_THE_ATTACK},
                "trigger": self.trigger.state() if self.trigger else {}}


def opened(config):
    """(``config`` with its checkpoint's path as ``s_model``, what the checkpoint holds, the attack to measure with)."""
    config = replace(config, s_model=str(student_path(config)))
    content = load_checkpoint(config.s_model)
    return config, content, with_attack(config, stored_options(content))


def study(config, content, attack, device):
    """The ``Subject`` that ``opened`` found, with what is measured on ``device``. Raises ``UserError``."""
    path, stored = Path(config.s_model), stored_options(content)
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
    for line in attacks.advice(attack, not_default(config)):
        say(f"note: {line}")
    return Subject(path, model.to(device).eval(), clean, test, train.source, attack, trigger, poisoned_test, parts, aim)
