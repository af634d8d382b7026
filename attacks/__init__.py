"""Triggers and label rules. Every module of this folder is imported, so that a new trigger is one new file."""

import importlib
import pkgutil

from attacks.base import (
    TRIGGERS,
    choose_cover,
    choose_poisoned,
    complete,
    make_trigger,
    parts,
    poisoned_labels,
    scored,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"attacks.{_module.name}")

__all__ = ["TRIGGERS", "choose_cover", "choose_poisoned", "complete", "make_trigger", "parts", "poisoned_labels",
           "scored"]
