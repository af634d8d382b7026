"""Trojan (TrojanNN; Liu et al., NDSS 2018): a patch that excites chosen neurons of a clean network.

The pixels of a ``trig_w`` x ``trig_h`` square are optimised by gradient ascent so that a few neurons of the penultimate
layer of ``--clean_model`` fire as strongly as possible: those with the largest summed absolute weight to the layer
before [paper]. The patch is then written into the image like any other. Two neurons, 300 steps of Adam on plain
backgrounds [ours]; made once and cached by network, size, place and ``--trigger_seed``.
"""

import torch
from torch import nn

from attacks.base import PatchTrigger, checked, clean_network, draw, register
from utils.checkpoint import cached

NEURONS, STEPS, RATE, BACKGROUNDS = 2, 300, 0.05, 16


def strongest_neurons(model, count):
    """(the classifier's last linear layer, indices of the ``count`` of its inputs with the largest incoming weights).

    The layer before is the last convolution with as many outputs; without one, the linear layer's own weights count.
    """
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    before = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == head.in_features]
    before = [m for m in before if max(m.kernel_size) > 1] or before  # a 1 x 1 may be a shortcut
    strength = before[-1].weight.abs().sum((1, 2, 3)) if before else head.weight.abs().sum(0)
    return head, strength.topk(min(count, len(strength))).indices


def optimise(model, mask, shape, gen):
    """The patch, uint8 ``shape`` (C, H, W), zero outside ``mask`` (H, W), and the neurons' mean before and after it."""
    head, neurons = strongest_neurons(model, NEURONS)
    seen = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for p in model.parameters():
        p.requires_grad_(False)
    grey = torch.rand(BACKGROUNDS, 1, 1, 1, generator=gen).expand(-1, *shape)
    pattern = torch.rand(shape, generator=gen).requires_grad_(True)
    adam = torch.optim.Adam([pattern], lr=RATE)
    means = []
    for _ in range(STEPS):
        seen.clear()
        model(torch.where(mask, pattern, grey))
        excitation = seen[0][:, neurons].mean()
        means.append(excitation.item())
        adam.zero_grad()
        (-excitation).backward()
        adam.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    hook.remove()
    patch = (pattern.detach() * 255).round().to(torch.uint8)
    return {"pattern": torch.where(mask, patch, torch.zeros_like(patch)), "excitation": torch.tensor(means)[[0, -1]]}


@register("trojanTrigger")
class TrojanTrigger(PatchTrigger):
    uses = (*PatchTrigger.uses, "clean_model")
    clean_network = True

    def draw(self, h, w):
        (row, col), = self.corners(h, w)
        self.fits(row, col, h, w)
        there = (slice(None), slice(row, row + self.trig_h), slice(col, col + self.trig_w))
        self.mask[there[1:]] = True
        if self.given:
            patch = checked(self.given, "patch", (self.shape[0], self.trig_h, self.trig_w))
        else:
            model, network = clean_network(self.opt, self.shape)
            key = (network, self.shape, self.trig_w, self.trig_h, self.distance, self.opt.trigger_seed, NEURONS, STEPS,
                   RATE, BACKGROUNDS)
            made = cached("trojan", key, lambda: optimise(model, self.mask, self.shape, draw(self.opt, self.name)))
            patch = made["pattern"][there]
        self.patch = patch
        self.pattern = torch.zeros(self.shape, dtype=torch.uint8)
        self.pattern[there] = patch

    def state(self):
        return {"patch": self.patch.cpu()}
