"""CL, clean-label (Turner et al. 2019, arXiv 1912.02771): perturbed images of the target class, and four corners.

The images of the target class are first made hard to recognise by l-inf PGD against ``--clean_model`` (eps 16, step 2
of 255, 100 steps), which raises the loss of their own class; then the four-corner checkerboard is the easy
thing to learn. No label is changed. Needs ``--target_type cleanLabel``; 80% of the target class is
``--inject_portion 0.08`` for ten equal classes.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from attacks.base import clean_network, register
from attacks.four_corner import FourCornerTrigger
from config import UserError
from utils.checkpoint import cached, tensor_hash
from utils.data import to_float
from utils.devices import use_bf16
from utils.engine import autocast


def pgd(model, images, label, eps, step, steps, amp=False, batch_size=250):
    """uint8 ``images`` (N, C, H, W) moved by at most ``eps`` (0..255) to where ``model`` no longer says ``label``.

    Projected gradient ascent on the cross-entropy from the image itself, without a random start; ``amp``: in bf16.
    """
    device, radius = images.device, float(int(eps))
    model = model.to(device, memory_format=torch.channels_last)
    for p in model.parameters():
        p.requires_grad_(False)
    moved = []
    for part in tqdm(images.split(batch_size), "PGD", leave=False, disable=None):
        start = to_float(part) * 255
        x = start.clone()
        target = torch.full((len(part),), label, device=device)
        for _ in range(steps):
            x.requires_grad_(True)
            with autocast(device, amp):
                loss = F.cross_entropy(model(x / 255).float(), target, reduction="sum")
            grad, = torch.autograd.grad(loss, x)
            x = x.detach() + step * grad.sign()
            x = torch.minimum(torch.maximum(x, start - eps), start + eps).clamp_(0, 255)
        x = torch.minimum(torch.maximum(x.round(), start - radius), start + radius)
        moved.append(x.to(torch.uint8).contiguous())
    return torch.cat(moved) if moved else images.clone()


@register("clTrigger")
class CleanLabelTrigger(FourCornerTrigger):
    uses = (*FourCornerTrigger.uses, "clean_model", "pgd_eps", "pgd_step", "pgd_steps")
    clean_label_only = clean_network = True

    def prepare(self, images, label):
        opt = self.opt
        model, network = clean_network(opt, self.shape)
        with torch.no_grad():
            classes = model(torch.zeros(1, *self.shape)).shape[1]
        if label >= classes:
            raise UserError(f"--clean_model {opt.clean_model}: has {classes} classes, the target is class {label}")
        amp = use_bf16(opt.amp, images.device)
        key = (network, tensor_hash(images), label, opt.pgd_eps, opt.pgd_step, opt.pgd_steps, amp)
        made = cached("pgd", key, lambda: {"images": pgd(model, images, label, opt.pgd_eps, opt.pgd_step,
                                                         opt.pgd_steps, amp).cpu()})
        return made["images"].to(images.device)
