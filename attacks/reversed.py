"""A trigger that detect.py reverse-engineered: ``(1 - m) x + m d`` with its mask m and pattern d, both in [0, 1].

It is what a defender can measure who knows no trigger: how often does it still reach its label after erasing? The
attacker's own may be another one, and may work where this one has stopped.
"""

import torch

from attacks.base import Trigger, checked, in_pieces, register
from config import UserError
from utils.checkpoint import load_checkpoint
from utils.data import masked


def read_trigger(path, label):
    """{"mask", "pattern"} of the trigger for ``label`` in ``path``, which detect.py wrote. Raises ``UserError``."""
    found = load_checkpoint(path)
    labels, masks, patterns = (found.get(name) for name in ("labels", "masks", "patterns"))
    if not isinstance(labels, list) or not all(torch.is_tensor(t) and t.ndim == 4 and len(t) == len(labels)
                                               for t in (masks, patterns)):
        raise UserError(f"--reversed_file {path}: is not a triggers.pt that detect.py wrote")
    if label not in labels:
        raise UserError(f"--target_label {label}: {path} holds triggers for {', '.join(map(str, labels))}")
    k = labels.index(label)
    return {"mask": masks[k], "pattern": patterns[k]}


@register("reversedTrigger")
class ReversedTrigger(Trigger):
    uses = ("reversed_file",)

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        if opt.target_type == "all2all":
            raise UserError("--trigger_type reversedTrigger: is of one label; --target_type all2all has many")
        if opt.reversed_file:
            state = read_trigger(opt.reversed_file, opt.target_label)
        elif not state:
            raise UserError("--trigger_type reversedTrigger: --reversed_file is needed, a triggers.pt of detect.py")
        self.mask = checked(state, "mask", (1, *self.shape[1:]), torch.float32)
        self.pattern = checked(state, "pattern", self.shape, torch.float32)

    def __call__(self, images, indices=None, part=None):
        self.ready(images)
        return in_pieces(lambda x: masked(x, self.mask, self.pattern), images)

    def state(self):
        return {"mask": self.mask.cpu(), "pattern": self.pattern.cpu()}
