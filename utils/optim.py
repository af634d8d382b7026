"""Optimisers and learning-rate schedules."""

import math

import torch


def orthogonalized(matrices, steps=5):
    """(B, R, C) -> the same shape, with singular values between about 0.7 and 1.2 and the same singular vectors.

    Newton-Schulz iterations with the quintic of Jordan et al., "Muon", 2024.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for convolutions, plain SGD for all other parameters.

    A step moves a convolution's weight by ``turn`` of its norm, which is then set back to what it was at the start:
    with batch normalisation behind a convolution only the weight's direction matters, so that weight decay, which
    works through the norm, is left to the others. Where no normalisation follows (AlexNet, the last convolution of
    Input-aware's generator) the norm stays too, and biases and linear layers set the scale. ``torch.optim.Muon`` takes
    matrices only.
    """

    def __init__(self, params, lr, turn, momentum, weight_decay):
        super().__init__(params, {"lr": lr, "turn": turn / lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["norm"] = torch.linalg.vector_norm(p)
                if p.ndim != 4:
                    grad = grad.add(p, alpha=group["weight_decay"])
                state["momentum"].mul_(group["momentum"]).add_(grad)
                update = grad.add(state["momentum"], alpha=group["momentum"])
                if p.ndim == 4:
                    by_shape.setdefault(p.shape, []).append((p, update))
                else:
                    p.sub_(update, alpha=group["lr"])
            for shape, pairs in by_shape.items():
                steps = orthogonalized(torch.stack([u.reshape(shape[0], -1) for _, u in pairs]))
                steps /= torch.linalg.matrix_norm(steps, keepdim=True) + 1e-12
                for (p, _), step in zip(pairs, steps, strict=True):
                    norm = self.state[p]["norm"]
                    p.sub_(step.reshape(shape) * (group["lr"] * group["turn"] * norm))
                    p.mul_(norm / torch.linalg.vector_norm(p))


def make_optimizer(model, lr, momentum, weight_decay, turn=0.0, nesterov=True):
    """SGD with (Nesterov) momentum on the trainable parameters of ``model``; Muon if ``turn`` is not 0."""
    params = [p for p in model.parameters() if p.requires_grad]
    if turn and lr:
        return Muon(params, lr, turn, momentum, weight_decay)
    return torch.optim.SGD(params, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0)


def rate(schedule, t, epochs):
    """The factor of the learning rate ``t`` epochs (a fraction) into a run of ``epochs``.

    linear: up over the first fifth, down to 0; cosine: down to 0; demo: 1, from epoch 2 on a tenth; tenths: a tenth
    more every 2 epochs; step: a tenth at half, a hundredth at three quarters; constant.
    """
    if schedule == "linear":
        return min(t / (0.2 * epochs), (epochs - t) / (0.8 * epochs))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t / epochs))
    if schedule == "demo":
        return 1.0 if t < 2 else 0.1
    if schedule == "tenths":
        return 0.1 ** int(t / 2)
    if schedule == "step":
        return 1.0 if t < epochs / 2 else 0.1 if t < 0.75 * epochs else 0.01
    assert schedule == "constant", schedule
    return 1.0
