"""Trojan (TrojanNN; Liu et al., NDSS 2018): a patch that excites chosen neurons of a clean network.

The pixels of a ``trig_w`` x ``trig_h`` square are optimised by gradient ascent so that a few neurons of the penultimate
layer of ``--clean_model`` fire as strongly as possible on training images: those with the largest summed absolute
weight to the layer before [paper]. The patch is then written into the image like any other. Two neurons, 300 steps of
Adam on 32 of 1,000 images [ours]; made once and cached by network, images, size, place and ``--trigger_seed``.

The paper's patches cover 4 to 10% of the image. Below 2%, 4 x 4 of 32 x 32 pixels, a patch hardly reaches the neurons
behind the global pooling: see README.md here.
"""

import torch
from torch import nn

from attacks.base import PatchTrigger, checked, clean_network, draw, register
from config import UserError
from utils.checkpoint import cached, tensor_hash
from utils.data import to_float

NEURONS, STEPS, RATE, IMAGES, BATCH = 2, 300, 0.05, 1000, 32


def strongest_neurons(model, count):
    """(the classifier's last linear layer, indices of the ``count`` of its inputs with the largest incoming weights).

    The layer before is the last other linear layer with as many outputs, else the last such convolution; without one
    (densenet121 joins several), the linear layer's own weights count.
    Raises ``UserError`` for a model without a linear layer.
    """
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not heads:
        raise UserError(f"--trigger_type trojanTrigger: {type(model).__name__} has no linear layer, whose inputs are "
                        f"the neurons to excite: take another --clean_model")
    size = heads[-1].in_features
    linear = [m for m in heads[:-1] if m.out_features == size]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == size]
    before = linear or [m for m in convs if max(m.kernel_size) > 1] or convs  # a 1 x 1 may be a shortcut
    strength = before[-1].weight.abs().flatten(1).sum(1) if before else heads[-1].weight.abs().sum(0)
    return heads[-1], strength.topk(min(count, len(strength))).indices


def optimise(model, mask, images, gen):
    """The patch for ``images``, uint8 ``(N, C, H, W)``: {"pattern": uint8 (C, H, W), zero outside ``mask`` (H, W);
    "excitation": the neurons' mean over the images without and with it, float32 (2,)}."""
    head, neurons = strongest_neurons(model, NEURONS)
    model, mask = model.to(images.device).requires_grad_(False), mask.to(images.device)
    seen = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))

    def excitation(x):
        seen.clear()
        model(x)
        return seen[0][:, neurons].mean()

    pattern = torch.rand(images.shape[1:], generator=gen).to(images.device).requires_grad_(True)
    adam = torch.optim.Adam([pattern], lr=RATE)
    for _ in range(STEPS):
        some = torch.randint(len(images), (BATCH,), generator=gen).to(images.device)
        adam.zero_grad()
        (-excitation(torch.where(mask, pattern, to_float(images[some])))).backward()
        adam.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    patch = torch.where(mask, (pattern.detach() * 255).round().to(torch.uint8), 0)
    with torch.no_grad():
        before, after = (excitation(to_float(x)) for x in (images, torch.where(mask, patch, images)))
    hook.remove()
    return {"pattern": patch.cpu(), "excitation": torch.stack([before, after]).cpu()}


@register("trojanTrigger")
class TrojanTrigger(PatchTrigger):
    uses = (*PatchTrigger.uses, "clean_model")
    clean_network = True

    def draw(self, h, w):
        (row, col), = self.corners(h, w)
        self.fits(row, col, h, w)
        self.there = (slice(None), slice(row, row + self.trig_h), slice(col, col + self.trig_w))
        self.mask[self.there[1:]] = True
        self.pattern = None
        if self.given:
            self.pattern = torch.zeros(self.shape, dtype=torch.uint8)
            self.pattern[self.there] = checked(self.given, "patch", (self.shape[0], self.trig_h, self.trig_w))
        else:
            self.model, self.network_file = clean_network(self.opt, self.shape)

    def see(self, images):
        if self.pattern is None:
            gen = draw(self.opt, self.name)
            chosen = torch.randperm(len(images), generator=gen)[:IMAGES]
            images = images[chosen.to(images.device)]
            key = (self.network_file, tensor_hash(images), self.shape, self.trig_w, self.trig_h, self.distance,
                   self.opt.trigger_seed, NEURONS, STEPS, RATE, BATCH)
            made = cached("trojan", key, lambda: optimise(self.model, self.mask, images, gen))
            self.pattern, self.model = made["pattern"].to(self.device), None

    def __call__(self, images, indices=None, part=None):
        if self.pattern is None:
            raise UserError("--trigger_type trojanTrigger: needs images to optimise the patch on: trigger.see(training "
                            "images)")
        return super().__call__(images, indices, part)

    def state(self):
        return {"patch": self.pattern[self.there].cpu()}
