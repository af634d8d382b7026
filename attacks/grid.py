"""BadNets' checkerboard in the bottom right corner (Gu et al. 2017, arXiv 1708.06733), with the demo's pixels."""

from attacks.base import PatchTrigger, checkerboard, register


@register("gridTrigger")
class GridTrigger(PatchTrigger):
    default_distance = 0

    def patch(self):
        return checkerboard(self.trig_h, self.trig_w)
