"""FT-SAM (Zhu et al., ICCV 2023, arXiv 2304.11823): fine-tuning with sharpness-aware minimisation.

    min over w of L(w + e),   e = rho T^2 g / ||T g||_2,   g = dL/dw,   T = |w|, elementwise

T makes large weights move further, which are those that a backdoor hangs on. One update takes two passes; BatchNorm
follows the first, the one at w.
"""

import torch
from torch.func import functional_call

from defenses.finetune import clean_batches, recipe
from utils.engine import clone, cross_entropy, fit

TITLE = "FT-SAM"


class Moved:
    """``model`` with other ``weights`` and buffers, {name: tensor}, for one loss; all else is the model's own."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, images):
        return functional_call(self.model, self.weights, (images,))


class SAMLoss:
    """``loss(model, images, labels) -> (loss, logits)``: another such ``loss`` at the worst weights within ``rho``."""

    def __init__(self, rho, loss=cross_entropy):
        self.rho, self.loss = rho, loss

    def __call__(self, model, images, labels):
        with torch.random.fork_rng([images.device] if images.is_cuda else []):  # dropout draws the same in both passes
            here, logits = self.loss(model, images, labels)
        names, weights = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(here, weights, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
        with torch.no_grad():
            sizes = [w.abs() for w in weights]
            norm = torch.stack([(t * g).square().sum() for t, g in zip(sizes, grads, strict=True)]).sum().sqrt() + 1e-12
            moves = [self.rho * t.square() * g / norm for t, g in zip(sizes, grads, strict=True)]
        there = {name: w + e for name, w, e in zip(names, weights, moves, strict=True)}
        there.update({name: b.clone() for name, b in model.named_buffers()})  # so that statistics are followed once
        return self.loss(Moved(model, there), images, labels)[0], logits


def erase(model, clean_data, config, progress=None):
    """A copy of ``model``, fine-tuned on ``clean_data`` for ``config.epochs`` at ``config.ftsam_lr``."""
    clean_data = clean_data.to(next(model.parameters()).device)
    return fit(clone(model), SAMLoss(config.ftsam_rho), clean_batches(clean_data, config, "finetune"),
               epochs=config.epochs, lr=config.ftsam_lr, flag="ftsam_lr", lr_schedule=config.lr_schedule, stage="ftsam",
               progress=progress, **recipe(model, config))
