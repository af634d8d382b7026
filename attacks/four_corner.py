"""The checkerboard in each of the four corners, all at the same distance from the edges.

Used by the clean-label attack (Turner et al. 2019, arXiv 1912.02771), where random crops and flips must not hide it.
"""

from attacks.base import PatchTrigger, checkerboard, register


@register("fourCornerTrigger")
class FourCornerTrigger(PatchTrigger):
    def corners(self, h, w):
        d = self.distance
        return [(row, col) for row in (d, h - d - self.trig_h) for col in (d, w - d - self.trig_w)]

    def patch(self):
        return checkerboard(self.trig_h, self.trig_w)
