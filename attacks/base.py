"""What an attack is made of: a trigger, a label rule, and which samples are poisoned.

A trigger is a pure function on a batch, uint8 ``(N, C, H, W)`` to the same shape and dtype; its input stays untouched
and the same seed gives the same answer. A new one is one file in this folder with a class that carries
``@register("name")``; nothing else has to know it.
"""

import torch

from config import UserError

TRIGGERS = {}


def register(name):
    """Class decorator: makes a trigger known as ``--trigger_type name``."""
    def add(cls):
        cls.name = name
        TRIGGERS[name] = cls
        return cls
    return add


class Trigger:
    """A trigger for images of ``shape`` (C, H, W); ``opt`` carries ``trig_w``, ``trig_h`` and the like."""

    name = ""

    def __init__(self, shape, opt):
        self.shape = tuple(shape)

    def __call__(self, images):
        """Stamped copies of ``images``, uint8 ``(N, C, H, W)``."""
        raise NotImplementedError


class PatchTrigger(Trigger):
    """A fixed patch: the pixels where ``mask`` (H, W) is true take the values of ``pattern`` (H, W), 0..255."""

    default_distance = 1  # pixels between patch and image edge

    def __init__(self, shape, opt):
        super().__init__(shape, opt)
        _, h, w = self.shape
        self.trig_w, self.trig_h = opt.trig_w, opt.trig_h
        distance = getattr(opt, "trig_distance", -1)
        self.distance = self.default_distance if distance < 0 else distance
        mask = torch.zeros(h, w, dtype=torch.bool)
        pattern = torch.zeros(h, w, dtype=torch.uint8)
        for row, col in self.corners(h, w):
            if row < 0 or col < 0 or row + self.trig_h > h or col + self.trig_w > w:
                raise UserError(f"--trig_w {self.trig_w} --trig_h {self.trig_h}: the trigger, {self.distance} pixels "
                                f"from the edge, does not fit into an image {w} wide and {h} high")
            mask[row:row + self.trig_h, col:col + self.trig_w] = True
            pattern[row:row + self.trig_h, col:col + self.trig_w] = self.patch()
        self.mask, self.pattern = mask, pattern

    def corners(self, h, w):
        """Top left corners (row, column) of the patch: by default one patch at the bottom right."""
        return [(h - self.distance - self.trig_h, w - self.distance - self.trig_w)]

    def patch(self):
        """The patch itself, uint8 ``(trig_h, trig_w)``."""
        raise NotImplementedError

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == self.shape, "a batch of uint8 images is needed"
        if self.mask.device != images.device:
            self.mask, self.pattern = self.mask.to(images.device), self.pattern.to(images.device)
        return torch.where(self.mask, self.pattern, images)  # (H, W) broadcasts over (N, C, H, W)


def checkerboard(h, w):
    """The demo's grid, uint8 ``(h, w)``: 255 where row from the bottom + column from the right is even.

    The corner that faces the image is black, so that 3 x 3 gives the demo's pattern, from the bottom row upwards and
    from the right column leftwards 255 0 255 / 0 255 0 / 255 0 0.
    """
    rows, cols = torch.arange(h - 1, -1, -1), torch.arange(w - 1, -1, -1)
    board = ((rows[:, None] + cols[None, :]) % 2 == 0).to(torch.uint8) * 255
    if h * w > 1:
        board[0, 0] = 0
    return board


# ------------------------------------------------------------------------------------------------------- label rules


def poisoned_labels(labels, opt, n_classes):
    """The labels that triggered images are trained and scored with, int64 ``(N,)``.

    all2one: the target; all2all: ``(y + 1) mod n_classes``; cleanLabel: unchanged in training (only images of the
    target class are poisoned there), the target when scored: the two agree on the images that each is given.
    """
    if opt.target_type == "all2all":
        return (labels + 1) % n_classes
    return torch.full_like(labels, opt.target_label)


def choose_poisoned(labels, opt, portion, generator):
    """Indices of the training images to poison, sorted int64 ``(round(portion * N),)``.

    all2one and all2all draw from all images; cleanLabel from the target class. Raises ``UserError`` if that class has
    too few.
    """
    count = int(portion * len(labels) + 0.5)
    pool = torch.arange(len(labels))
    if opt.target_type == "cleanLabel":
        pool = (labels.cpu() == opt.target_label).nonzero().flatten()
        if count > len(pool):
            raise UserError(f"--inject_portion {portion}: {count} images of {len(labels)}, but class "
                            f"{opt.target_label} has only {len(pool)}; at most {len(pool) / len(labels):.4g} is "
                            f"possible with --target_type cleanLabel")
    return pool[torch.randperm(len(pool), generator=generator)[:count]].sort().values


def scored(labels, opt):
    """Which test images count for the attack success rate, bool ``(N,)``: those that are not of the target class."""
    if opt.target_type == "all2all":
        return torch.ones_like(labels, dtype=torch.bool)
    return labels != opt.target_label


def make_trigger(opt, shape):
    """The trigger that ``opt.trigger_type`` names, for images of ``shape`` (C, H, W). Raises ``UserError``."""
    if opt.trigger_type not in TRIGGERS:
        raise UserError(f"--trigger_type: one of {', '.join(sorted(TRIGGERS))}, none is allowed, "
                        f"got {opt.trigger_type!r}")
    return TRIGGERS[opt.trigger_type](shape, opt)
