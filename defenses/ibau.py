"""I-BAU, implicit backdoor adversarial unlearning (Zeng et al., ICLR 2022, arXiv 2110.03735).

    min over w of  max over ||d|| of  H(d, w) = mean of CE(f_w(x + d), y)        one d for all images

In each round d is found by gradient ascent on the clean subset; then w takes Adam steps along the hypergradient, which
follows how d itself would answer a change of w:

    dH/dw + (dd/dw)^T dH/dd,     (dd/dw)^T v  by fixed-point iterations on  Phi(d, w) = d - eta dG/dd

G = -H + ``--ibau_penalty`` ||d||_2^2 is what the inner problem minimises. As in the authors' code, d lies on a share of
each batch only in the outer loss (``--ibau_share``): with d on all images the network forgets the clean ones. Ours: the
sum is clipped to [0, 1], BatchNorm's statistics stay as they are, and d is held down by the penalty alone, without a
projection. ``--ibau_iterations`` K gives v + v J + ... + v J^K; the authors' code, which starts at 0, one term less.
"""

import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel  # the only kernel that can be differentiated twice

from config import UserError
from utils.data import Batches, make_augment, to_float
from utils.engine import Progress, clone
from utils.seeds import generator

TITLE = "I-BAU"
IGNORES = ("epochs", "batch_size", "lr_schedule", "freeze_bn", "precise_bn", "momentum", "weight_decay")


def inner(model, images, labels, d, penalty):
    """G of a batch, a scalar."""
    return penalty * d.square().sum() - F.cross_entropy(model((images + d).clamp(0, 1)), labels)


def find_perturbation(model, data, config, gen):
    """d, float32 ``(1, C, H, W)``: one pass of SGD over ``data`` from 0, minimising G."""
    d = torch.zeros(1, *data.shape, device=data.images.device, requires_grad=True)
    order = torch.randperm(len(data), generator=gen).to(data.images.device)
    with torch.no_grad():
        guessed = torch.cat([model(to_float(part)).argmax(1) for part in data.images.split(250)])
    for part in order.split(config.ibau_batch_size):
        loss = inner(model, to_float(data.images[part]), guessed[part], d, config.ibau_penalty)
        grad, = torch.autograd.grad(loss, d)
        with torch.no_grad():
            d -= config.ibau_inner_lr * grad
    return d.detach()


def hypergradient(model, images, labels, d, config):
    """(H, its gradient by each parameter of ``model``, a list of tensors; None where one is not used) of a batch at the
    perturbation ``d``."""
    weights = list(model.parameters())
    d = d.clone().requires_grad_()
    count = max(1, round(config.ibau_share * len(images))) if config.ibau_share else 0
    there = torch.arange(len(images), device=images.device) < count
    outer = F.cross_entropy(model((images + d * there[:, None, None, None]).clamp(0, 1)), labels)
    *direct, v = torch.autograd.grad(outer, [*weights, d], allow_unused=True)
    slope, = torch.autograd.grad(inner(model, images, labels, d, config.ibau_penalty), d, create_graph=True)
    phi = d - config.ibau_eta * slope
    total = v
    for _ in range(config.ibau_iterations):  # total = v + v J + v J^2 + ..., J the Jacobian of Phi by d
        total = v + torch.autograd.grad(phi, d, total, retain_graph=True)[0]
    indirect = torch.autograd.grad(phi, weights, total, allow_unused=True)
    return outer.detach(), [a if b is None else a + b for a, b in zip(direct, indirect, strict=True)]


def erase(model, clean_data, config, progress=None):
    """A copy of ``model`` after ``config.ibau_rounds`` rounds of unlearning on ``clean_data``."""
    clean_data = clean_data.to(next(model.parameters()).device)
    model = clone(model).eval()
    adam = torch.optim.Adam(model.parameters(), lr=config.ibau_lr)
    batches = Batches(clean_data, config.ibau_batch_size, make_augment(config), config.seed, "ibau")
    progress, first, history = progress or Progress(), 0, []
    state = progress.load("ibau")
    if state:
        model.load_state_dict(state["state_dict"])
        adam.load_state_dict(state["optimizer"])
        first, history = state["epoch"], state["history"]
    for epoch in range(first, config.ibau_rounds):
        start, losses = time.perf_counter(), []
        d = find_perturbation(model, clean_data, config, generator(config.seed, "ibau", epoch))
        with progress.bar("ibau", epoch, config.ibau_rounds, len(batches)) as bar, sdpa_kernel(SDPBackend.MATH):
            for images, labels in batches.epoch(epoch):
                loss, grads = hypergradient(model, images, labels, d, config)
                for p, g in zip(model.parameters(), grads, strict=True):
                    p.grad = g
                losses.append(loss)
                adam.step()
                if bar is not None:
                    bar.update()
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise UserError(f"ibau: the weights are not finite in round {epoch + 1}. Try a smaller --ibau_lr than "
                            f"{config.ibau_lr}")
        history.append({"stage": "ibau", "epoch": epoch + 1, "epochs": config.ibau_rounds,
                        "loss": round(torch.stack(losses).mean().item(), 4),
                        "seconds": round(time.perf_counter() - start, 2)})
        progress.epoch_done("ibau", model, history[-1])
        progress.save("ibau", {"state_dict": model.state_dict(), "optimizer": adam.state_dict(), "epoch": epoch + 1,
                               "history": history})
    return model
