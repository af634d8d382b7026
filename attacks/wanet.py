"""WaNet (Nguyen and Tran 2021, arXiv 2102.10369): a smooth warp that the eye does not see.

A random k x k field, divided by the mean of its absolute value, is upsampled bicubically, scaled by s over the image
size and added to the identity grid, which is clamped to [-1, 1] and sampled bilinearly; k 4, s 0.5 [paper]. Cover
samples, twice as many as poisoned ones, get the warp plus uniform noise of one pixel's size, and keep their label
(the paper's noise mode), so that not just any warp fires.
"""

import torch
import torch.nn.functional as F

from attacks.base import Trigger, draw, in_pieces, register, to_uint8


def identity_grid(h, w):
    """The sampling grid that changes nothing, float32 ``(H, W, 2)``, x before y, corners at -1 and 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([x, y], -1)


def warp_grid(h, w, k, s, gen):
    """The warped sampling grid, float32 ``(H, W, 2)``, in [-1, 1]."""
    field = torch.rand(1, 2, k, k, generator=gen) * 2 - 1
    field = F.interpolate(field / field.abs().mean(), size=(h, w), mode="bicubic", align_corners=True)[0]
    return (identity_grid(h, w) + s * field.permute(1, 2, 0) / torch.tensor([w, h])).clamp(-1, 1)


@register("wanetTrigger")
class WaNetTrigger(Trigger):
    uses = ("warp_k", "warp_s")
    cover_share = 2.0

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        _, h, w = self.shape
        self.grid = warp_grid(h, w, opt.warp_k, opt.warp_s, draw(opt, self.name))

    def warp(self, images, grid):
        """``images`` sampled at ``grid``, (H, W, 2) or (N, H, W, 2)."""
        self.ready(images)
        grid = grid.to(images.device).expand(len(images), -1, -1, -1)
        return in_pieces(lambda x, grid: to_uint8(F.grid_sample(x.float(), grid, mode="bilinear", align_corners=True)),
                         images, grid)

    def __call__(self, images, indices=None, part=None):
        return self.warp(images, self.grid)

    def cover(self, images, indices, gen):
        _, h, w = self.shape
        noise = (torch.rand(len(images), h, w, 2, generator=gen) * 2 - 1) / torch.tensor([w, h])
        noise = noise.to(images.device, non_blocking=True)
        return self.warp(images, (self.grid.to(images.device) + noise).clamp(-1, 1))
