"""Defenses, one file each, known to ``main.py --defense`` by their file's name.

``erase(model, clean_data, config)`` runs the defense ``config.defense``, after ``config.first`` if that is set.

A defense is a module with ``erase(model, clean_data, config, progress=None) -> model``: a new model; the one given
stays bit-identical. It sees the clean subset only, never the trigger and never the test set. ``check(model, clean_data,
config)``, if it has one, raises ``UserError`` for what will not do before anything is trained; ``advice(model,
clean_data, config)`` gives lines that the user should read before; ``TITLE`` is its name in tables; ``USES`` are groups
of options that it reads beside "erasing" and the one that carries its name, ``IGNORES`` options of these that it does
not read.
"""

import functools
import importlib
import pkgutil
from dataclasses import fields

import torch

import config as configuration
from config import EraseConfig, UserError, default_of
from utils.data import TensorData, to_float
from utils.engine import clone
from utils.files import OWN_CODE

OURS = ("anp", "clp", "fine_pruning", "finetune", "ftsam", "ibau", "linf_pruning", "mcr", "nad", "neural_cleanse",
        "pruning", "sage")
NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__))
OWN_CODE.update((("defense", name), f"{__path__[0]}/{name}.py") for name in NAMES if name not in OURS)


def get(name):
    """The module of the defense ``name``. Raises ``UserError`` if there is none."""
    if name not in NAMES:
        raise UserError(f"--defense: one of {', '.join(NAMES)} is allowed, got {name!r}")
    return importlib.import_module(f"defenses.{name}")


def check(model, clean_data, config):
    """Raise ``UserError`` if ``config.first`` or ``config.defense`` cannot erase ``model`` with ``clean_data``."""
    configuration.check(config)
    if config.freeze_bn and config.precise_bn:
        raise UserError("--precise_bn: takes anew what --freeze_bn keeps; one of them has to go")
    if config.t_name and not config.t_model:
        raise UserError(f"--t_name {config.t_name}: names the architecture of --t_model, which is not given")
    if config.first == config.defense:
        raise UserError(f"--first {config.first}: is the defense itself; name another --defense to follow it")
    clean_data = checked(model, clean_data)
    for name in filter(None, (config.first, config.defense)):
        if hasattr(get(name), "check"):
            get(name).check(model, clean_data, config)


def checked(model, clean_data):
    """``clean_data`` on the device of ``model``, after two of its images went through. Raises ``UserError``."""
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"the model is a {type(model).__name__}, a network (torch.nn.Module) is needed")
    if not isinstance(clean_data, TensorData):
        raise UserError(f"the clean data are a {type(clean_data).__name__}, TensorData is needed: "
                        f"utils.data.as_tensor_data makes it of images with labels")
    labels = clean_data.labels
    if not len(labels):
        raise UserError("there are no clean images")
    if labels.dtype != torch.int64 or not 0 <= labels.min() <= labels.max() < clean_data.n_classes:
        raise UserError(f"labels are int64, 0 to {clean_data.n_classes - 1} for as many class names; got "
                        f"{labels.dtype}, {labels.min()} to {labels.max()}")
    if len(labels) < clean_data.n_classes:
        raise UserError(f"{len(labels)} clean images are fewer than the {clean_data.n_classes} classes")
    device = next(model.parameters()).device
    clean_data = clean_data.to(device)
    with torch.no_grad():
        try:
            logits = clone(model).eval()(to_float(clean_data.images[:2]))
        except RuntimeError as e:
            raise UserError(f"the network does not take images {' x '.join(map(str, clean_data.shape))} (channels x "
                            f"height x width): {str(e).partition(chr(10))[0]}") from None
    if not torch.is_tensor(logits) or logits.ndim != 2 or logits.shape[1] < clean_data.n_classes:
        found = f"of shape {tuple(logits.shape)}" if torch.is_tensor(logits) else f"a {type(logits).__name__}"
        raise UserError(f"the network must return a logit for each of {clean_data.n_classes} classes, its output is "
                        f"{found}")
    return clean_data


def advice(model, clean_data, config):
    """What the user of ``config`` should know about ``model`` before it is erased: lines of text."""
    module = get(config.defense)
    return module.advice(model, clean_data, config) if hasattr(module, "advice") else []


def begin(model, clean_data, config, progress=None):
    """What the defense starts from: ``model``, or what the defense ``config.first`` makes of it.

    The defense trains all weights: a channel that was switched off with its BatchNorm, scale and shift, stays off, for
    a ReLU has no slope at 0; one that has none behind it, such as a residual block's last convolution in a WRN, or one
    whose shift stays (ANP), may come back.
    """
    return get(config.first).erase(model, clean_data, config, progress) if config.first else model


def erase(model, clean_data, config, progress=None):
    """The network that ``config.first``, if set, and then ``config.defense`` make of ``model``, which stays as it is.

    ``clean_data``: ``TensorData`` or ``DatasetCL``; ``config``: ``EraseConfig``; ``progress`` hears of each epoch and
    keeps the state of an unfinished run (``utils.run.Journal``). Raises ``UserError`` for what will not do, before
    anything is trained.
    """
    check(model, clean_data, config)
    return get(config.defense).erase(begin(model, clean_data, config, progress), clean_data, config, progress)


def title(name):
    """What the defense ``name`` is called in tables."""
    return getattr(get(name), "TITLE", name.upper())


@functools.cache
def reads(name):
    """The names of the options of ``EraseConfig`` that the defense ``name`` reads, of those that are for defenses."""
    module = get(name)
    groups = {"erasing", name.replace("_", " "), *getattr(module, "USES", ())}
    names = {f.name for f in fields(EraseConfig) if f.metadata["group"] in groups}
    return frozenset(names.difference(getattr(module, "IGNORES", ())))


def without_unused(options):
    """The options of ``EraseConfig``, a dict, with those of defenses at their defaults that do not run: other ones than
    ``options["defense"]``, ``options["first"]`` and, if that is measured beside, fine-tuning."""
    running = filter(None, (options["defense"], options["first"], options["beside"] and "finetune"))
    others = set().union(*map(reads, NAMES)).difference(*map(reads, running))
    return {**options, **{f.name: default_of(f) for f in fields(EraseConfig) if f.name in others}}
