"""Blend (Chen et al. 2017, arXiv 1712.05526): ``(1 - alpha) x + alpha r`` with one fixed image r for the whole run.

r is uniform noise from ``--trigger_seed``, or any image file of the right size (``--blend_image``). alpha 0.2 [paper];
``--blend_test_alpha`` is the weight on test images. The published demo drew r anew for every image.
"""

import numpy as np
import torch
from PIL import Image

from attacks.base import Trigger, checked, draw, in_pieces, register, to_uint8
from config import UserError
from utils.data import eight_bits


def read_image(path, shape):
    """The image file ``path`` as uint8 ``shape`` (C, H, W), C 1 or 3. Raises ``UserError``."""
    channels, h, w = shape
    try:
        with Image.open(path) as image:
            size = image.size
            array = np.array(eight_bits(image, channels == 1))
    except Exception as e:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"--blend_image {path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if size != (w, h):
        raise UserError(f"--blend_image {path}: is {size[0]} wide and {size[1]} high, the images are {w} wide and "
                        f"{h} high")
    return torch.from_numpy(array.reshape(h, w, channels).transpose(2, 0, 1).copy())


@register("blendTrigger")
class BlendTrigger(Trigger):
    uses = ("blend_alpha", "blend_test_alpha", "blend_image")

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        self.from_file = bool(state or opt.blend_image)
        if state:
            self.pattern = checked(state, "pattern", self.shape)
        elif opt.blend_image:
            self.pattern = read_image(opt.blend_image, self.shape)
        else:
            self.pattern = torch.randint(0, 256, self.shape, generator=draw(opt, self.name)).to(torch.uint8)

    def blend(self, images, alpha):
        self.ready(images)
        return in_pieces(lambda x: to_uint8(x.float().mul_(1 - alpha).add_(self.pattern, alpha=alpha)), images)

    def __call__(self, images, indices=None, part=None):
        return self.blend(images, self.opt.blend_alpha if self.opt.blend_test_alpha < 0 else self.opt.blend_test_alpha)

    def poison(self, images, indices):
        return self.blend(images, self.opt.blend_alpha)

    def state(self):
        return {"pattern": self.pattern.cpu()} if self.from_file else {}
