"""Channels of a layer: which layer a defense prunes, what its channels answer to, and how they are switched off.

A channel is pruned by setting its weights (and bias) to zero, so that a pruned network is an ordinary checkpoint of its
architecture. The layer is by default the last convolution or BatchNorm that runs: in a network with BatchNorm behind
its convolutions, the last convolution's BatchNorm; in a pre-activation network (WRN) the BatchNorm before the pooling.
Where its output is not what the classifier pools, because something is added to it (ResNet), the "layer" is the block
that ends in the sum, and a channel is switched off where it is read, in its column of the linear layer behind.
"""

import torch
import torch.nn.functional as F
from torch import nn

from config import UserError
from utils.data import to_float
from utils.engine import clone, percent, predict
from utils.seeds import generator

PRUNABLE = (nn.Conv2d, nn.BatchNorm2d)
POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d, nn.Dropout)


def last_layer(model, images, name=""):
    """The name of the layer to prune: ``name``, or the last that uint8 ``images`` (N, C, H, W) run through, see above.

    Raises ``UserError`` if there is none, or ``name`` is no convolution or BatchNorm.
    """
    what = type(model).__name__
    prunable = {n: m for n, m in model.named_modules() if isinstance(m, PRUNABLE)}
    if name:
        if name not in prunable:
            raise UserError(f"--prune_layer {name}: no convolution or BatchNorm of {what}; it has "
                            f"{', '.join(prunable)}")
        return name
    last, end, handles = [], [], []

    def hook(n):
        def note(_module, _inputs, output):
            if torch.is_tensor(output) and output.ndim == 4:
                end[:] = n, output.clone()
                last[:] = end if n in prunable else last
        return note

    for n, module in model.named_modules():
        if n and not isinstance(module, POOLS):
            handles.append(module.register_forward_hook(hook(n)))
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(to_float(images[:2]).to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not last:
        raise UserError(f"{what} has no convolution or BatchNorm, whose channels could be pruned")
    makes_logits = last[1].shape[1] == logits.shape[1] and head(model, last[0]) is None
    attends = any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    if attends or getattr(model, "features_nhwc", False) or makes_logits:
        raise UserError(f"--prune_layer: which channels of {what} the classifier reads is not known; name a layer: "
                        f"{', '.join(prunable)}")
    direct = any(torch.equal(end[1], f) for f in (last[1], last[1].relu()))
    return last[0] if direct or head(model, end[0], end[1].shape[1]) is None else end[0]


def head(model, layer, channels=None):
    """The linear layer that takes the pooled ``channels`` of the block ``layer``, or None."""
    names = [n for n, _ in model.named_modules()]
    after = max(i for i, n in enumerate(names) if n == layer or n.startswith(f"{layer}."))
    linear = next((m for m in map(model.get_submodule, names[after + 1:]) if isinstance(m, nn.Linear)), None)
    return linear if linear is None or channels in (None, linear.in_features) else None


def of_channels(model, layer):
    """[(parameter, dimension)] that hold the channels of ``layer``: its own, or the columns of the head behind it."""
    module = model.get_submodule(layer)
    if isinstance(module, PRUNABLE):
        return [(p, 0) for p in (module.weight, module.bias) if p is not None]
    return [(head(model, layer).weight, 1)]


@torch.no_grad()
def channel_norms(model, layer, images, batch_size=250):
    """What each channel of ``layer`` answers to uint8 ``images`` (N, C, H, W), as means over the images.

    Of a convolution or BatchNorm what is left after a ReLU counts, of a block absolute values. A dict of float32
    ``(channels,)``: "l1" and "l2" norms of the channel's map and "linf", its maximum.
    """
    was_training = model.training
    model.eval()
    device, total, maps = next(model.parameters()).device, {}, []
    rectify = F.relu if isinstance(model.get_submodule(layer), PRUNABLE) else torch.abs
    # not by ``Features``: what follows may add to the output in place, after this hook has copied it
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: maps.append(rectify(output.float()).flatten(2)))
    try:
        for part in images.split(batch_size):
            model(to_float(part.to(device)))
            m = maps.pop()  # (B, channels, H W)
            for name, norms in (("l1", m.sum(2)), ("l2", m.square().sum(2).sqrt()), ("linf", m.amax(2))):
                total[name] = total.get(name, 0) + norms.sum(0)
    finally:
        handle.remove()
        model.train(was_training)
    return {name: norms / len(images) for name, norms in total.items()}


@torch.no_grad()
def zero_channels(model, layer, channels):
    """Switch off ``channels``, int64 ``(k,)``, of ``layer`` in place: its output there is zero, or no longer read."""
    for p, dim in of_channels(model, layer):
        p.index_fill_(dim, channels.to(p.device), 0)


def counts(n):
    """The numbers of channels, of ``n``, at which ``pruned_gradually`` stops."""
    return range(0, n, max(1, n // 64))


def pruned_gradually(model, layer, order):
    """Yield (number k, network whose first k channels of ``order``, int64 ``(channels,)``, are off), a 64th at a time.

    It starts at k = 0 and leaves one channel at least; it is the same network, a copy of ``model``, that goes on.
    """
    pruned = clone(model).eval()
    for k in counts(len(order)):
        zero_channels(pruned, layer, order[:k])
        yield k, pruned


class KeptAtZero:
    """Context manager: while it is open, training leaves the ``channels`` of ``layer`` that are zero at zero."""

    def __init__(self, model, layer, channels):
        self.params, self.channels = of_channels(model, layer), channels

    def __enter__(self):
        def without(dim):
            return lambda grad: grad.index_fill(dim, self.channels.to(grad.device), 0)
        self.handles = [p.register_hook(without(dim)) for p, dim in self.params]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def split_off(data, share, seed):
    """(the rest, a held-out part): ``share`` of each class of ``data``, at least one sample, drawn by ``seed``.

    Raises ``UserError`` if a class has fewer than two samples.
    """
    if not 0 < share < 1:
        raise UserError(f"--held_out {share}: more than 0 and less than 1 is needed")
    labels, held = data.labels.cpu(), []
    gen = generator(seed, "held out")
    for c in labels.unique().tolist():
        own = (labels == c).nonzero().flatten()
        if len(own) < 2:
            raise UserError(f"the clean subset has {len(own)} image of class {data.classes[c]}: at least two of each "
                            f"class are needed, one of them to measure on (--ratio)")
        held.append(own[torch.randperm(len(own), generator=gen)[:min(len(own) - 1, max(1, round(share * len(own))))]])
    return data.parted(torch.cat(held))


def accuracy(model, data):
    """Accuracy in percent of ``model`` on ``data`` (``TensorData``)."""
    return percent(predict(model, data.images) == data.labels.to(next(model.parameters()).device))
