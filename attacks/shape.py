"""White shapes in a box of ``trig_w`` x ``trig_h`` at the bottom right (SAGE, section V-D): ``--trig_shape``.

Triangle, square, hexagon, circle, parallelogram, quadrant (quarter disc), semicircle, each as large as the box allows.
Boxes of 8 x 8 and more show them; in 3 x 3 pixels several of them coincide.
"""

import torch

from attacks.base import PatchTrigger, register


def shape_mask(name, h, w):
    """Bool ``(h, w)``: the pixels whose centres lie within the shape that fills the box."""
    v = ((torch.arange(h) + 0.5) / h)[:, None]  # 0 at the top, 1 at the bottom
    u = ((torch.arange(w) + 0.5) / w)[None, :]  # 0 at the left, 1 at the right
    x, y = 2 * u - 1, 2 * v - 1
    return {
        "triangle": x.abs() <= v,
        "square": torch.ones(h, w, dtype=torch.bool),
        "hexagon": x.abs() <= 1 - y.abs() / 2,
        "circle": x**2 + y**2 <= 1,
        "parallelogram": (u >= 0.3 * (1 - v)) & (u <= 1 - 0.3 * v),
        "quadrant": (1 - u) ** 2 + (1 - v) ** 2 <= 1,
        "semicircle": x**2 + (1 - v) ** 2 <= 1,
    }[name]


@register("shapeTrigger")
class ShapeTrigger(PatchTrigger):
    uses = (*PatchTrigger.uses, "trig_shape")

    def draw(self, h, w):
        (row, col), = self.corners(h, w)
        self.fits(row, col, h, w)
        self.mask[row:row + self.trig_h, col:col + self.trig_w] = shape_mask(self.opt.trig_shape, self.trig_h,
                                                                            self.trig_w)
        self.pattern[self.mask] = 255
