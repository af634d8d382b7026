"""Adversarial neuron pruning (ANP; Wu and Wang, NeurIPS 2021, arXiv 2110.14430).

    min over m in [0, 1]^n of  alpha L(m w, b) + (1 - alpha) max over |d|, |xi| <= eps of L((m + d) w, (1 + xi) b)

w and b are the scales and shifts of BatchNorm, n their channels: a channel that small disturbances turn into a backdoor
gets a small m. The inner maximum is one step of the gradient's sign from a random start [authors]. Channels with
m < ``--anp_threshold`` lose their scale; the threshold is fixed beforehand, never chosen by the trigger's success.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from config import UserError
from utils.data import Batches, make_augment
from utils.devices import use_bf16
from utils.engine import clone, fit

IGNORES = ("epochs", "batch_size", "lr_schedule", "precise_bn", "momentum", "weight_decay")


def norms(model):
    """The names of the BatchNorm layers of ``model`` with scale and shift. Raises ``UserError`` if there are none."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    if not found:
        raise UserError(f"ANP masks the channels of BatchNorm, and {type(model).__name__} has no BatchNorm")
    return found


class Masks(nn.Module):
    """What is trained: one mask a BatchNorm layer, ``(channels,)``, all 1 at first. Calling it runs the network."""

    def __init__(self, model, freeze_bn=False):
        super().__init__()
        self.names, self.freeze_bn = norms(model), freeze_bn
        self.network = [model.train().requires_grad_(False)]  # in a list: its weights are not this module's
        modules = dict(model.named_modules())
        self.masks = nn.ParameterList([torch.ones_like(modules[name].weight) for name in self.names])

    def train(self, mode=True):
        """Batch statistics in training (unless they are frozen), the network's own in evaluation."""
        self.network[0].train(mode and not self.freeze_bn)
        return super().train(mode)

    def forward(self, images, on_scale=None, on_shift=None):
        """Logits with ``on_scale`` added to the masks and ``on_shift`` to the factors of the shifts."""
        model, changed = self.network[0], {}
        for k, name in enumerate(self.names):
            module = model.get_submodule(name)
            mask = self.masks[k] if on_scale is None else self.masks[k] + on_scale[k]
            changed[f"{name}.weight"] = mask * module.weight
            if on_shift is not None:
                changed[f"{name}.bias"] = (1 + on_shift[k]) * module.bias
        changed.update({name: b.clone() for name, b in model.named_buffers()})  # its statistics stay
        return functional_call(model, changed, (images,))


class MaskLoss:
    """``loss(masks, images, labels) -> (loss, logits)``, the objective above."""

    def __init__(self, alpha, eps):
        self.alpha, self.eps = alpha, eps

    def worst(self, masks, images, labels):
        """(d, xi), each a list of ``(channels,)``, one for each BatchNorm layer."""
        start = [(torch.rand_like(m) * 2 - 1) * self.eps for _ in range(2) for m in masks.masks]
        for s in start:
            s.requires_grad_(True)
        n = len(masks.masks)
        grads = torch.autograd.grad(F.cross_entropy(masks(images, start[:n], start[n:]), labels), start)
        end = [(s + self.eps * g.sign()).clamp(-self.eps, self.eps).detach() for s, g in zip(start, grads, strict=True)]
        return end[:n], end[n:]

    def __call__(self, masks, images, labels):
        with torch.no_grad():
            for m in masks.masks:
                m.clamp_(0, 1)
        logits = masks(images)
        disturbed = masks(images, *self.worst(masks, images, labels)) if self.eps else logits
        loss = self.alpha * F.cross_entropy(logits, labels) + (1 - self.alpha) * F.cross_entropy(disturbed, labels)
        return loss, logits


def learn_masks(model, clean_data, config, progress=None):
    """{name of a BatchNorm layer: its mask, float32 ``(channels,)`` in [0, 1]}."""
    clean_data = clean_data.to(next(model.parameters()).device)
    batches = Batches(clean_data, config.anp_batch_size, make_augment(config), config.seed, "anp")
    masks = fit(Masks(clone(model), config.freeze_bn), MaskLoss(config.anp_alpha, config.anp_eps), batches,
                epochs=math.ceil(config.anp_steps / len(batches)), lr=config.anp_lr, flag="anp_lr",
                lr_schedule="constant", momentum=0.9, nesterov=False, weight_decay=0.0, seed=config.seed, stage="anp",
                progress=progress, amp=use_bf16(config.amp, clean_data.images.device))
    return {name: m.detach().clamp(0, 1) for name, m in zip(masks.names, masks.masks, strict=True)}


def check(model, clean_data, config):
    """Raise ``UserError`` for a network without BatchNorm."""
    norms(model)


def erase(model, clean_data, config, progress=None):
    """A copy of ``model`` without the channels whose mask falls below ``config.anp_threshold``."""
    masks = learn_masks(model, clean_data, config, progress)
    model = clone(model).eval()
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight[mask < config.anp_threshold] = 0
    return model
