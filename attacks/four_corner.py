"""The checkerboard in each of the four corners, all at the same distance from the edges.

Used by the clean-label attack (Turner et al. 2019, arXiv 1912.02771), so that a crop or a flip leaves most of it in
place. All four patches are the grid as it is: the demo and Turner et al. mirror them, so that a flip changes nothing at
all, where here two pixels of each patch differ. With ``--stamp after``, the default, no flip follows the trigger.
"""

from attacks.base import PatchTrigger, checkerboard, register


@register("fourCornerTrigger")
class FourCornerTrigger(PatchTrigger):
    def corners(self, h, w):
        d = self.distance
        return [(row, col) for row in (d, h - d - self.trig_h) for col in (d, w - d - self.trig_w)]

    def patch(self):
        return checkerboard(self.trig_h, self.trig_w)
