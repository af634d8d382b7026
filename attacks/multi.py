"""Several triggers in one network (SAGE, sections VI-A and VI-B): ``--n_triggers`` patches, each at a place of its own.

Each poisoned training image carries one of them, by its place in the set modulo their number, which supposes that the
labels do not go round and round. With all2one every trigger leads to the same target, with
``--target_type multiLabel`` trigger k leads to target + k (SAGE: targets 3; 3, 4, 5; 3 to 7). At test each trigger is
measured apart and, where they share a target, all of them together.
"""

import torch

from attacks.base import PatchTrigger, draw, paste, poisoned_labels, positions, register
from config import UserError


@register("multiTrigger")
class MultiTrigger(PatchTrigger):
    """Patches of random black and white pixels per channel: corners, centre, then the middles of the edges."""

    uses = (*PatchTrigger.uses, "n_triggers")

    def draw(self, h, w):
        n, d, th, tw = self.opt.n_triggers, self.distance, self.trig_h, self.trig_w
        top, middle, bottom = d, (h - th) // 2, h - d - th
        left, centre, right = d, (w - tw) // 2, w - d - tw
        self.places = [(bottom, right), (bottom, left), (top, right), (top, left), (middle, centre), (middle, right),
                       (middle, left), (top, centre)][:n]
        gen = draw(self.opt, self.name)
        self.masks = torch.zeros(n, 1, h, w, dtype=torch.bool)
        self.patterns = torch.zeros(n, *self.shape, dtype=torch.uint8)
        for k, (row, col) in enumerate(self.places):
            self.fits(row, col, h, w)
            self.masks[k, :, row:row + th, col:col + tw] = True
            patch = torch.randint(0, 2, (self.shape[0], th, tw), generator=gen) * 255
            self.patterns[k, :, row:row + th, col:col + tw] = patch.to(torch.uint8)
        if self.masks.sum(0).max() > 1:
            raise UserError(f"--trig_w {tw} --trig_h {th}: the {n} triggers overlap in an image {w} wide and {h} high")
        self.parts = tuple(f"trigger {k + 1}" for k in range(n))
        if n > 1 and self.opt.target_type != "multiLabel":
            self.parts += ("all triggers",)

    def which(self, indices, part=None):
        """The trigger, int64 from 0, that each sample carries: its place in the set modulo n, or that of ``part``."""
        if part in self.parts:
            return torch.full_like(indices, self.parts.index(part))
        return indices % self.opt.n_triggers

    def __call__(self, images, indices=None, part=None):
        self.ready(images)
        if part == "all triggers":
            return paste(images, self.masks.any(0), self.patterns.amax(0), self.opt.transparency)
        k = self.which(positions(images, indices), part)
        return paste(images, self.masks[k], self.patterns[k], self.opt.transparency)

    def labels(self, labels, indices, n_classes, part=None):
        if self.opt.target_type == "multiLabel":
            return (self.opt.target_label + self.which(indices, part)) % n_classes
        return poisoned_labels(labels, self.opt, n_classes)
