"""Fine-tuning on the clean subset with cross-entropy: NAD with beta = 0, the baseline of everything else."""

from utils.data import Batches, make_augment
from utils.devices import use_bf16
from utils.engine import clone, cross_entropy, fit

TITLE = "fine-tuning"
TRAINING = ("epochs", "batch_size", "lr_schedule", "freeze_bn", "precise_bn", "momentum", "weight_decay", "augment",
            "cutout", "pairing")  # the options that it reads of those that defenses share


def recipe(model, config):
    """The arguments of ``utils.engine.fit`` that every stage shares."""
    device = next(model.parameters()).device
    return {"momentum": config.momentum, "weight_decay": config.weight_decay,
            "seed": config.seed, "amp": use_bf16(config.amp, device), "freeze_bn": config.freeze_bn,
            "precise_bn": config.precise_bn}


def clean_batches(clean_data, config, stage):
    """The clean subset's batches for ``stage``, augmented as ``config`` says."""
    return Batches(clean_data, config.batch_size, make_augment(config), config.seed, stage)


def tune(model, clean_data, config, epochs, lr, lr_schedule, stage, progress=None, loss=cross_entropy,
         flag="ft_lr"):
    """A copy of ``model`` fine-tuned with ``loss`` for ``epochs`` at ``lr``, which came from the option ``flag``."""
    return fit(clone(model), loss, clean_batches(clean_data, config, stage), epochs=epochs, lr=lr,
               lr_schedule=lr_schedule, stage=stage, progress=progress, flag=flag, **recipe(model, config))


def erase(model, clean_data, config, progress=None):
    """Fine-tune a copy of ``model`` on ``clean_data`` for ``config.epochs`` at ``config.ft_lr``."""
    clean_data = clean_data.to(next(model.parameters()).device)
    return tune(model, clean_data, config, config.epochs, config.ft_lr, config.lr_schedule, "finetune", progress)
