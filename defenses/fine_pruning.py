"""Fine-pruning (Liu et al., RAID 2018, arXiv 1805.12185): pruning of dormant channels, then fine-tuning.

Fine-tuning is the one that is measured beside (``defenses/finetune.py``), same rate, epochs and batches; the pruned
channels stay at zero.
"""

from defenses.finetune import clean_batches, recipe
from defenses.pruning import check, dormant
from utils.channels import KeptAtZero, zero_channels
from utils.engine import clone, cross_entropy, fit

TITLE = "fine-pruning"
USES = ("pruning", "channels", "finetune")


def erase(model, clean_data, config, progress=None):
    """A copy of ``model``, pruned and fine-tuned on ``clean_data`` for ``config.epochs`` at ``config.ft_lr``."""
    clean_data = clean_data.to(next(model.parameters()).device)
    model = clone(model).eval()
    layer, channels = dormant(model, clean_data, config)
    zero_channels(model, layer, channels)
    with KeptAtZero(model, layer, channels):
        return fit(model, cross_entropy, clean_batches(clean_data, config, "finetune"), epochs=config.epochs,
                   lr=config.ft_lr, flag="ft_lr", lr_schedule=config.lr_schedule, stage="fine_pruning",
                   progress=progress, **recipe(model, config))


__all__ = ["check", "erase"]
