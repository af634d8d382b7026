"""SIG (Barni et al. 2019, arXiv 1902.11237): ``x + delta sin(2 pi j f / m)``, j the column, m the width, 0..255 scale.

delta 20, f 6 [paper]; clipped, so that no pixel wraps around (the published demo kept the sinusoid in uint8, where its
negative half became 237 to 255). Meant for ``--target_type cleanLabel --inject_portion 0.08``: 80% of the target class.
"""

import math

import torch

from attacks.base import Trigger, in_pieces, register, to_uint8


def signal(width, delta, freq):
    """The sinusoid, float32 ``(width,)``, on the scale 0..255."""
    return delta * torch.sin(2 * math.pi * freq * torch.arange(width, dtype=torch.float64) / width).float()


@register("signalTrigger")
class SignalTrigger(Trigger):
    uses = ("sig_delta", "sig_freq")

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        self.signal = signal(self.shape[2], opt.sig_delta, opt.sig_freq)

    def __call__(self, images, indices=None, part=None):
        self.ready(images)
        return in_pieces(lambda x: to_uint8(x.float().add_(self.signal)), images)  # (W,) over (N, C, H, W)
