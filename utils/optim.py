"""Optimiser and learning-rate schedules."""

import math

import torch


def make_optimizer(model, lr, momentum, weight_decay):
    """SGD with Nesterov momentum on the trainable parameters of ``model``."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)


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
