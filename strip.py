"""STRIP (Gao et al., ACSAC 2019, arXiv 1902.06531): a triggered input's prediction survives what is laid over it.

Each input is superimposed with clean images, x + o clipped [authors' code], and the mean entropy of the predictions
tells: a trigger keeps the prediction at the attacker's label, so that the entropy stays low.

    H(x) = mean over o of  -sum_y p_y log2 p_y,   p = softmax(f(clip(x + o)))

The entropies of clean inputs are taken for normally distributed; what lies below that distribution's percentile of the
allowed false rejections is rejected [paper].
"""

import math
from statistics import NormalDist

import torch

from utils.data import to_float


@torch.inference_mode()
def entropies(model, images, overlays, bar=None):
    """H in bits, float32 ``(N,)``, of uint8 ``images`` (N, C, H, W) under uint8 ``overlays`` (K, C, H, W).

    ``bar.update()`` is called for each image.
    """
    device = next(model.parameters()).device
    model.eval()
    overlays, found = overlays.to(device).short(), []
    for image in images.to(device).short():
        mixed = (image + overlays).clamp_(0, 255).to(torch.uint8)
        log_p = model(to_float(mixed)).float().log_softmax(1)
        found.append(-(log_p.exp() * log_p).sum(1).mean())
        if bar is not None:
            bar.update()
    return torch.stack(found).cpu() / math.log(2)


def threshold(clean, frr):
    """The entropy in bits below which an input is rejected: the percentile ``frr``, a share, of the normal distribution
    with the mean and standard deviation of the ``clean`` entropies (N,), N > 1."""
    clean = clean.double()
    return clean.mean().item() + clean.std().item() * NormalDist().inv_cdf(frr)


def ranks(values):
    """How many of ``values`` (N,) lie below each of them, (N,); those equal to it, itself too, count half."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts / 2)[place]


def auroc(clean, triggered):
    """The chance that a triggered input has a lower entropy than a clean one, ties counting half."""
    below = ranks(torch.cat([triggered, clean]))[len(triggered):].double().sum() - len(clean) ** 2 / 2
    return (below / (len(clean) * len(triggered))).item()
