"""SAGE, self-attention distillation (Gong et al., IEEE S&P 2023): shallow layers of a network teach its deep ones.

    loss = CE + sum over the paths (i, j) of beta || psi(F_i) - psi(F_j) ||_2,   psi = N(U(A(F)))

A is the attention map over the channels (``--attention``, ``--p``: sum |F|, sum |F|^p, max |F|^p, mean |F|^p), U the
bilinear up-sampling to the larger of the two maps, N the division by the l2 norm; all of it is ``at.at_loss``, in
either form (``--at_loss``; what a beta weighs in each is said there). The shallow map is the target and carries no
gradient [ours]; with one, both maps would simply move towards each other. Paths join neighbouring stages [paper].

The learning rate is halved at the end of an interval of P epochs if, with the training losses of its epochs,

    (C1) the loss fell in fewer than rho P of them, or
    (C2) the rate was not changed after the interval before, and the maximum loss has not fallen since  [paper, eq. 6]

Ours, since the paper leaves it open: the loss is the training loss of an epoch, augmented and with the self-attention
terms; the maximum is that within an interval; P, rho and the first rate.
"""

import itertools

import torch.nn.functional as F

from at import at_loss
from config import UserError
from defenses.finetune import clean_batches, recipe
from models import Features, check_order, feature_layers, needs_pixels
from utils.data import to_float
from utils.engine import clone, fit

USES = ("attention",)
IGNORES = ("lr_schedule",)  # its own is --sage_rate


def rate_factor(losses, interval, rho):
    """The factor of the learning rate after epochs with ``losses``: 1, halved by C1 or C2 after each ``interval``."""
    factor, kept, worst = 1.0, False, None
    for end in range(interval, len(losses) + 1, interval):
        block = losses[end - interval:end]
        before = losses[max(0, end - interval - 1):end - 1]
        fell = sum(b < a for a, b in zip(before, block[len(block) - len(before):], strict=True)) + (end == interval)
        few = fell < rho * interval  # the very first epoch has none before it and counts as one that fell
        stuck = kept and max(block) >= worst
        kept, worst = not (few or stuck), max(block)
        factor *= 1.0 if kept else 0.5
    return factor


def stages(model, config):
    """The names of the layers that paths count from 1. Raises ``UserError`` if there are fewer than two."""
    layers = Features(model, feature_layers(model, config.layers)).layers  # refuses unknown names
    if len(layers) < 2:
        raise UserError(f"--defense sage: needs at least two stages to distil between, {type(model).__name__} has "
                        f"{len(layers)}; name more with --layers")
    return layers


def paths(model, config):
    """[(shallow layer, deep layer)], by name: ``--sage_paths``, or each stage and the next. Raises ``UserError``."""
    layers, found = stages(model, config), []
    if not config.sage_paths:
        return list(itertools.pairwise(layers))
    for text in config.sage_paths:
        i, dash, j = text.partition("-")
        if not (dash and i.isdigit() and j.isdigit() and 1 <= int(i) < int(j) <= len(layers)):
            raise UserError(f"--sage_paths {text}: two stages such as 1-2 are needed, the shallow one first; the "
                            f"stages are 1 to {len(layers)} ({', '.join(layers)})")
        found.append((layers[int(i) - 1], layers[int(j) - 1]))
    return found


class SADLoss:
    """``loss(model, images, labels) -> (loss, logits)``: cross-entropy and the self-attention terms of ``pairs``, each
    with its own of the ``betas``."""

    def __init__(self, pairs, betas, p=2.0, attention="sum", form="demo"):
        self.pairs, self.betas, self.p, self.attention, self.form = pairs, betas, p, attention, form
        self.layers = sorted({name for pair in pairs for name in pair})

    def __call__(self, model, images, labels):
        with Features(model, self.layers) as taken:
            logits = model(images)
            features = dict(zip(self.layers, taken.outputs(), strict=True))
        for name, f in features.items():
            needs_pixels(name, f)
        loss = F.cross_entropy(logits, labels)
        for (shallow, deep), beta in zip(self.pairs, self.betas, strict=True):
            target = features[shallow].detach()
            loss = loss + beta * at_loss(features[deep], target, self.p, self.attention, self.form)
        return loss, logits


def make_loss(model, config):
    pairs = paths(model, config)
    return SADLoss(pairs, weights(pairs, config), config.p, config.attention, config.at_loss)


def weights(pairs, config):
    """The beta of each of ``pairs``: ``--sage_betas``, or ``--sage_beta`` for all. Raises ``UserError``."""
    try:
        betas = [float(text) for text in config.sage_betas] or [config.sage_beta] * len(pairs)
    except ValueError:
        betas = []
    if len(betas) != len(pairs) or not all(0 <= beta < float("inf") for beta in betas):
        raise UserError(f"--sage_betas {' '.join(config.sage_betas)}: a number of at least 0 for each path is needed; "
                        f"the paths are {', '.join('-'.join(pair) for pair in pairs)}")
    return betas


def check(model, clean_data, config):
    """Raise ``UserError`` for layers or paths that will not do, before anything is trained."""
    model, images = clone(model).eval(), to_float(clean_data.images[:2])
    make_loss(model, config)(model, images, clean_data.labels[:2])
    check_order(model, stages(model, config), images)


def erase(model, clean_data, config, progress=None):
    """Erase the backdoor of ``model`` by self-attention distillation on ``clean_data``. Returns a new model."""
    clean_data = clean_data.to(next(model.parameters()).device)
    schedule = {"dynamic": lambda losses: rate_factor(losses, config.sage_interval, config.sage_rho),
                "fixed": "constant", "step": "tenths"}[config.sage_rate]
    return fit(clone(model), make_loss(model, config), clean_batches(clean_data, config, "finetune"),
               epochs=config.epochs, lr=config.sage_lr, flag="sage_lr", lr_schedule=schedule, stage="sage",
               progress=progress, **recipe(model, config))
