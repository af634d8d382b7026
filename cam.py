"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391): where in the image a class is seen.

    CAM = relu( sum_c a_c F_c ),   a_c = mean over H and W of  d y_k / d F_c
"""

import torch
import torch.nn.functional as F

from models import Features


def grad_cam(model, images, layer, classes=None):
    """(maps float32 ``(N, H, W)``, classes int64 ``(N,)``) of ``images`` float32 (N, C, H', W') at ``layer`` (H, W).

    ``classes`` k default to the predicted ones. Raises ``UserError`` for a layer that ``model`` lacks.
    """
    model.eval()
    with torch.enable_grad(), Features(model, [layer]) as taken:
        logits = model(images.requires_grad_() if not images.requires_grad else images)
        features, raw = taken.outputs()[0], taken.taken[layer][0]  # (N, C, H, W), and what the logits come from
        classes = logits.argmax(1) if classes is None else classes
        grads = taken.as_nchw(torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), raw)[0])
    return F.relu((grads.mean((2, 3), keepdim=True) * features).sum(1)).detach(), classes


def deepest(model, images, layers):
    """The last of ``layers`` whose Grad-CAM is not 0 on all ``images`` (N, C, H, W), as that of a transformer's last
    block is, of whose tokens only the class token is read; the last one if there is none."""
    return next((name for name in reversed(layers) if grad_cam(model, images, name)[0].any()), layers[-1])
