"""Random pixels: ``trig_w * trig_h`` places anywhere in the image with random values, one draw for every image.

A BadNets variant (Gu et al. 2017, arXiv 1708.06733). The published demo drew its places anew at each call.
"""

import torch

from attacks.base import PatchTrigger, draw, register
from config import UserError


@register("randomPixelTrigger")
class RandomPixelTrigger(PatchTrigger):
    uses = ("trig_w", "trig_h", "transparency")

    def draw(self, h, w):
        n = self.trig_w * self.trig_h
        if n > h * w:
            raise UserError(f"--trig_w {self.trig_w} --trig_h {self.trig_h}: {n} pixels do not fit into an image "
                            f"{w} wide and {h} high")
        gen = draw(self.opt, self.name)
        self.mask.view(-1)[torch.randperm(h * w, generator=gen)[:n]] = True
        self.pattern = torch.randint(0, 256, self.shape, generator=gen).to(torch.uint8)
