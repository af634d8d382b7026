"""Attention maps and the attention-transfer loss of Neural Attention Distillation.

Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021
(arXiv 2101.05930); the maps are those of Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928).

    A(F) = sum_c |F_c|^p                      (N, C, H, W) -> (N, 1, H, W)
    a    = A / (||A||_2 + 1e-6)               norm over H and W, one per image
    demo:  mean over N, H, W of (a_s - a_t)^2
    paper: mean over N of ||a_s - a_t||_2

Both vanish for equal maps. For one image with d = ||a_s - a_t||_2 on H x W pixels the demo form is d^2 / (H W), the
paper form d, so that ``beta_paper = beta_demo * d / (H W)`` weighs the same: at 32 x 32, 16 x 16 and 8 x 8 the demo's
betas 500, 1000, 1000 are about 0.5 d, 4 d and 16 d in the paper form.
"""

import torch
import torch.nn.functional as F


def attention_map(features, p=2.0, reduce="sum"):
    """``(N, C, H, W) -> (N, 1, H, W)``: sum, mean or max over the channels of ``|features|^p``."""
    powers = features.abs() if p == 1 else features.square() if p == 2 else features.abs().pow(p)
    if reduce == "max":
        return powers.amax(1, keepdim=True)
    return powers.mean(1, keepdim=True) if reduce == "mean" else powers.sum(1, keepdim=True)


def normalized(attention):
    """Each map of ``(N, 1, H, W)`` over its l2 norm + 1e-6."""
    return attention / (torch.linalg.vector_norm(attention, dim=(2, 3), keepdim=True) + 1e-6)


def at_loss(features_s, features_t, p=2.0, attention="sum", form="demo"):
    """Distance of the attention maps of a student's and a teacher's layer, a scalar.

    ``features_s`` (N, C, H, W) and ``features_t`` (N, C', H', W') may differ in width and resolution; the smaller map
    is resized bilinearly to the larger. ``form`` is "demo" or "paper", see above.
    """
    a_s = attention_map(features_s.float(), p, attention)  # (N, 1, H, W)
    a_t = attention_map(features_t.float(), p, attention)
    if a_s.shape != a_t.shape:
        size = (max(a_s.shape[2], a_t.shape[2]), max(a_s.shape[3], a_t.shape[3]))
        a_s, a_t = (F.interpolate(a, size, mode="bilinear", align_corners=False) for a in (a_s, a_t))
    difference = normalized(a_s) - normalized(a_t)
    if form == "demo":
        return difference.square().mean()
    # the small number keeps the gradient finite where the maps agree
    return (difference.square().sum((1, 2, 3)) + 1e-12).sqrt().mean()
