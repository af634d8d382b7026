"""Triggers and label rules. Every module of this folder is imported, so that a new trigger is one new file."""

import importlib
import pkgutil
import sys
from dataclasses import fields

from attacks.base import (
    TRIGGERS,
    choose_cover,
    choose_poisoned,
    complete,
    make_trigger,
    must_be_clean,
    parts,
    poisoned_labels,
    scored,
)
from config import AttackConfig, unused
from utils.files import OWN_CODE

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"attacks.{_module.name}")

OURS = ("blend", "clean_label", "four_corner", "grid", "input_aware", "multi", "random_pixel", "refool",
        "reversed", "shape", "signal", "square", "trojan", "wanet")
OWN_CODE.update((("trigger_type", name), sys.modules[cls.__module__].__file__) for name, cls in TRIGGERS.items()
                if cls.__module__.rpartition(".")[2] not in OURS)
SHAPES = ("triangle", "square", "hexagon", "circle", "parallelogram", "quadrant", "semicircle")
PRESETS = {  # the attacks of the papers by name: the options that differ from the defaults of AttackConfig
    "BadNets": {},
    "BadNets, square": {"trigger_type": "squareTrigger"},
    "BadNets, four corners": {"trigger_type": "fourCornerTrigger"},
    "BadNets, random pixels": {"trigger_type": "randomPixelTrigger"},
    "BadNets, all2all": {"target_type": "all2all"},
    "Blend, all2all": {"trigger_type": "blendTrigger", "target_type": "all2all"},
    "Trojan": {"trigger_type": "trojanTrigger", "trig_w": 8, "trig_h": 8},
    "Blend": {"trigger_type": "blendTrigger"},
    "CL": {"trigger_type": "clTrigger", "target_type": "cleanLabel", "target_label": 0, "inject_portion": 0.08},
    "SIG": {"trigger_type": "signalTrigger", "target_type": "cleanLabel", "target_label": 0, "inject_portion": 0.08,
            "sig_delta": 40.0},
    "SIG, amplitude 20": {"trigger_type": "signalTrigger", "target_type": "cleanLabel", "target_label": 0,
                          "inject_portion": 0.08},
    "Refool": {"trigger_type": "refoolTrigger", "target_type": "cleanLabel", "target_label": 0,
               "inject_portion": 0.04},
    "WaNet": {"trigger_type": "wanetTrigger"},
    "Input-aware": {"trigger_type": "inputAwareTrigger"},
    **{f"{n} triggers, same label": {"trigger_type": "multiTrigger", "n_triggers": n, "target_label": 3}
       for n in (1, 3, 5)},
    **{f"{n} triggers, {n} labels": {"trigger_type": "multiTrigger", "n_triggers": n, "target_label": 3,
                                     "target_type": "multiLabel"} for n in (3, 5)},
    "Class-specific": {"target_type": "classSpecific", "inject_portion": 0.05},
    **{f"Large, {n} x {n}": {"trigger_type": "squareTrigger", "trig_w": n, "trig_h": n, "transparency": 0.5}
       for n in (10, 20)},
    **{f"Transparency {t}": {"trigger_type": "squareTrigger", "trig_w": 8, "trig_h": 8, "transparency": t}
       for t in (0.3, 0.6, 0.9)},
    **{f"Shape, {name}": {"trigger_type": "shapeTrigger", "trig_w": 8, "trig_h": 8, "trig_shape": name}
       for name in SHAPES},
}
EVERY = ("trigger_type", "target_type", "target_label", "inject_portion", "cover_portion", "trigger_seed")
OWN_CHOICE = ("trigger_seed", "clean_model")  # do not make another attack


def without_unused(options):
    """All of ``AttackConfig`` as a dict, from the dict ``options``; what is missing or not used has its default."""
    given = {f.name: options.get(f.name, f.default) for f in fields(AttackConfig)}
    used = {*EVERY, *getattr(TRIGGERS.get(given["trigger_type"]), "uses", ())}
    used |= {"source_label"} if given["target_type"] == "classSpecific" else set()
    return {f.name: given[f.name] if f.name in used else f.default for f in fields(AttackConfig)}


def advice(config, given):
    """What to say of the options named in ``given`` that the attack of ``config`` does not use: lines of text."""
    return [f"--{name} is not used by --trigger_type {config.trigger_type} --target_type {config.target_type}"
            for name in unused(config, without_unused) if name in given]


def preset_name(options):
    """The name in ``PRESETS`` of the attack with ``options`` (a dict; what is missing has its default), or ''."""
    def what_counts(given):
        return {name: value for name, value in without_unused(given).items() if name not in OWN_CHOICE}

    wanted = what_counts(options)
    return next((name for name, given in PRESETS.items() if what_counts(given) == wanted), "")


__all__ = ["EVERY", "PRESETS", "TRIGGERS", "advice", "choose_cover", "choose_poisoned", "complete", "make_trigger",
           "must_be_clean", "parts", "poisoned_labels", "preset_name", "scored", "without_unused"]
