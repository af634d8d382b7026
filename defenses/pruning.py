"""Pruning of dormant channels: the first half of fine-pruning (Liu et al., RAID 2018, arXiv 1805.12185).

    rank the channels of the last layer by their mean activation on clean images
    switch off the lowest, a sixty-fourth at a time, while clean accuracy falls by no more than --prune_drop points

The accuracy is that of a held-out part of the clean subset (``--held_out``). Channels that a trigger uses and clean
images do not are the first to go; where both use the same ones, this cannot work.
"""

from defenses.finetune import TRAINING
from utils.channels import accuracy, channel_norms, last_layer, pruned_gradually, split_off, zero_channels
from utils.engine import clone

TITLE = "pruning"
USES = ("channels",)
IGNORES = TRAINING


def dormant(model, clean_data, config):
    """(name of the layer, the channels to switch off, int64 ``(k,)``)."""
    rest, held = split_off(clean_data, config.held_out, config.seed)
    layer = last_layer(model, rest.images, config.prune_layer)
    order = channel_norms(model, layer, rest.images)["l1"].argsort()
    floor = accuracy(model, held) - config.prune_drop
    for k, pruned in pruned_gradually(model, layer, order):
        if k and accuracy(pruned, held) < floor:
            break
        count = k
    return layer, order[:count]


def check(model, clean_data, config):
    """Raise ``UserError`` for a layer or a clean subset that will not do."""
    last_layer(model, clean_data.images, config.prune_layer)
    split_off(clean_data, config.held_out, config.seed)


def erase(model, clean_data, config, progress=None):
    """A copy of ``model`` without the channels that are dormant on ``clean_data``."""
    clean_data = clean_data.to(next(model.parameters()).device)
    model = clone(model).eval()
    zero_channels(model, *dormant(model, clean_data, config))
    return model
