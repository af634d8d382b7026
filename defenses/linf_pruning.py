"""Pruning by the l-infinity norm (Cheng et al. 2020, arXiv 2002.12162), with a trigger that was reverse-engineered.

    raised_c = mean over images of  ||relu(F_c(triggered x))||_inf - ||relu(F_c(x))||_inf

for every channel c of the last layer. The channels that the synthetic trigger raises most are switched off, a
sixty-fourth at a time; how many is chosen on a held-out part of the clean subset: the fewest at which the synthetic
trigger's success is lowest while accuracy falls by no more than ``--linf_drop`` points. The real trigger is never seen.
``--linf_norm`` l1 and l2 take the other norms for comparison. The trigger is Neural Cleanse's, of the label with the
smallest mask; it is made with the whole clean subset, the held-out part too [ours]. Nothing is trained.
"""

import torch

from config import UserError
from defenses import pruning
from defenses.finetune import TRAINING
from defenses.neural_cleanse import WORKS, Triggers, raised, reversed_before, success
from utils.channels import accuracy, last_layer, pruned_gradually, split_off, zero_channels
from utils.engine import clone

TITLE = "l-inf pruning"
USES = ("channels", "neural cleanse")
IGNORES = (*TRAINING, "nc_share", "nc_mitigation")


def smallest(triggers):
    """The ``Triggers`` of the one label whose mask is smallest, of those that work (of all if none does)."""
    norms = torch.where(triggers.success >= WORKS, triggers.norms, triggers.norms + triggers.masks[0].numel())
    k = int(norms.argmin())
    return Triggers([triggers.labels[k]], *(getattr(triggers, n)[k:k + 1] for n in ("masks", "patterns", "success")))


def sweep(model, layer, order, measure):
    """[(number of channels switched off, *measure(network))], a 64th of ``order``, int64 ``(channels,)``, at a time."""
    return [(k, *measure(pruned)) for k, pruned in pruned_gradually(model, layer, order)]


def choose(points, drop):
    """The number of channels to switch off, from ``points`` (number, accuracy, success of the synthetic trigger)."""
    allowed = [p for p in points if p[1] >= points[0][1] - drop]
    return min(allowed, key=lambda p: (p[2], p[0]))[0]


def check(model, clean_data, config):
    """Raise ``UserError`` for a layer or a clean subset that will not do."""
    pruning.check(model, clean_data, config)
    if clean_data.n_classes < 2:
        raise UserError("--defense linf_pruning: reverses a trigger from one class to another, and there is one only")


def erase(model, clean_data, config, progress=None, trigger=None):
    """A copy of ``model`` without the channels that the trigger raises most.

    ``trigger`` (``Triggers`` of one label) defaults to the smallest that Neural Cleanse finds on ``clean_data``.
    """
    clean_data = clean_data.to(next(model.parameters()).device)
    rest, held = split_off(clean_data, config.held_out, config.seed)
    trigger = trigger or smallest(reversed_before(model, clean_data, config, progress))
    if progress and trigger.success[0] < WORKS:
        progress.note("l-inf pruning: no trigger was found that works for any label; more --nc_steps may find one")
    layer = last_layer(model, rest.images, config.prune_layer)
    order = raised(model, layer, rest.images, trigger, [0])[config.linf_norm].argsort(descending=True)
    points = sweep(model, layer, order, lambda m: (accuracy(m, held), success(m, held, trigger, 0)))
    model = clone(model).eval()
    zero_channels(model, layer, order[:choose(points, config.linf_drop)])
    return model
