"""BadNets' white square near the bottom right corner (Gu et al. 2017, arXiv 1708.06733)."""

import torch

from attacks.base import PatchTrigger, register


@register("squareTrigger")
class SquareTrigger(PatchTrigger):
    def patch(self):
        return torch.full((self.trig_h, self.trig_w), 255, dtype=torch.uint8)
