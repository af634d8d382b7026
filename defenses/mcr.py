"""Mode connectivity repair (MCR; Zhao et al., ICLR 2020, arXiv 2005.00060).

    w(t) = (1 - t)^2 w_0 + 2 t (1 - t) theta + t^2 w_1,   t in [0, 1]

w_0 are the weights of the network, w_1 those of its fine-tuned version (or of ``--t_model``), and theta, at first their
mean, is trained on the clean subset with a t drawn for each batch. The result is w(``--mcr_t``), whose BatchNorm
statistics are taken on the clean subset, augmented as in training [authors' code].
"""

import torch
from torch import nn
from torch.func import functional_call

from config import UserError
from defenses.finetune import clean_batches, recipe, tune
from defenses.nad import make_teacher
from utils.devices import use_bf16
from utils.engine import clone, fit, settle_batchnorm

USES = ("finetune", "teacher")


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def on_curve(w_0, theta, w_1, t):
    """The weights w(t), {name: tensor}, of three such dicts."""
    return {name: (1 - t) ** 2 * w_0[name] + 2 * t * (1 - t) * theta[name] + t**2 * w_1[name] for name in theta}


class CurveLoss:
    """``loss(model, images, labels) -> (loss, logits)`` at a random point of the curve whose bend is ``model``."""

    def __init__(self, w_0, w_1):
        self.w_0, self.w_1 = w_0, w_1

    def __call__(self, model, images, labels):
        point = on_curve(self.w_0, dict(model.named_parameters()), self.w_1, torch.rand((), device="cpu"))
        logits = functional_call(model, point, (images,))
        return nn.functional.cross_entropy(logits, labels), logits


@torch.no_grad()
def at(model, bend, end, t, batches, amp=False):
    """The network at ``t`` of the curve from ``model`` over ``bend`` to ``end``; statistics from ``batches``."""
    point = clone(model)
    for name, w in on_curve(weights(model), weights(bend), weights(end), t).items():
        point.get_parameter(name).copy_(w)
    return settle_batchnorm(point, batches, amp=amp)


def check(model, clean_data, config):
    """Raise ``UserError`` for an other end of the curve that has other weights, and for frozen statistics."""
    if config.freeze_bn:
        raise UserError("--freeze_bn: does not go with --defense mcr: a network between two others needs statistics of "
                        "its own")
    if config.t_model:
        other = make_teacher(model, clean_data, config)
        own, others = ({name: p.shape for name, p in m.named_parameters()} for m in (model, other))
        if own != others:
            name = next(n for n in {**own, **others} if own.get(n) != others.get(n))
            raise UserError(f"--t_model {config.t_model}: no curve leads from --s_model to a network of another shape "
                            f"({name}); the same architecture and width is needed")


def curve(model, clean_data, config, progress=None):
    """(bend, other end) of the curve that starts in ``model``, both networks."""
    clean_data = clean_data.to(next(model.parameters()).device)
    check(model, clean_data, config)
    end = make_teacher(model, clean_data, config) if config.t_model else tune(
        model, clean_data, config, config.epochs, config.ft_lr, config.lr_schedule, "mcr end", progress)
    bend = clone(model)
    with torch.no_grad():
        for name, p in bend.named_parameters():
            p.copy_((p + end.get_parameter(name)) / 2)
    bend = fit(bend, CurveLoss(weights(model), weights(end)), clean_batches(clean_data, config, "mcr"),
               epochs=config.mcr_epochs, lr=config.ft_lr, flag="ft_lr", lr_schedule=config.lr_schedule, stage="mcr",
               progress=progress, **recipe(model, config))
    return bend, end


def erase(model, clean_data, config, progress=None):
    """The network at ``config.mcr_t`` of the curve between ``model`` and its fine-tuned version."""
    clean_data = clean_data.to(next(model.parameters()).device)
    bend, end = curve(model, clean_data, config, progress)
    return at(model, bend, end, config.mcr_t, clean_batches(clean_data, config, "mcr statistics"),
              use_bf16(config.amp, clean_data.images.device))
