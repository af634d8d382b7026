"""Channel Lipschitzness pruning (CLP; Zheng et al., ECCV 2022, arXiv 2208.03111). Needs no data at all.

    bound of channel c   = spectral norm of its kernel (c_in, kh kw) times |gamma_c| / sqrt(running variance_c + eps)
    switched off         : bound > mean + u std over the layer's channels, u = 3 [paper]

A convolution whose output a BatchNorm takes counts with that BatchNorm's scale, and the BatchNorm's channel is
switched off; which one takes it is seen by running an image through the network. Others, and those before a BatchNorm
without scale or statistics, count alone.
"""

import torch
from torch import nn

from defenses.finetune import TRAINING
from utils.channels import zero_channels
from utils.data import to_float
from utils.engine import clone

IGNORES = TRAINING


def pairs(model, images):
    """[(name of a convolution, name of the BatchNorm that takes its output, or None)], in the order in which they run.

    Told by the identity of the tensor that goes from one to the other; ``images`` uint8 ``(N, C, H, W)``.
    """
    made, found, handles = {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            def note(_module, _inputs, output, name=name):
                made[id(output)] = (name, output)  # kept, so that no other tensor gets the same identity
                found[name] = None
            handles.append(module.register_forward_hook(note))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            def follow(_module, inputs, name=name):
                if id(inputs[0]) in made:
                    found[made[id(inputs[0])][0]] = name
            handles.append(module.register_forward_pre_hook(follow))
    try:
        with torch.no_grad():
            model.eval()(to_float(images[:1]))
    finally:
        for handle in handles:
            handle.remove()
    return list(found.items())


@torch.no_grad()
def bounds(conv, norm=None):
    """The Lipschitz bound of each output channel of ``conv``, float32 ``(c_out,)``."""
    bound = torch.linalg.matrix_norm(conv.weight.flatten(2), ord=2)  # of (c_out, c_in, kh kw)
    return bound if norm is None else bound * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()


def erase(model, clean_data, config, progress=None):
    """A copy of ``model`` without the channels whose bound stands out."""
    clean_data = clean_data.to(next(model.parameters()).device)
    model = clone(model).eval()
    modules, count = dict(model.named_modules()), 0
    for conv, norm in pairs(model, clean_data.images):
        bound = bounds(modules[conv], modules[norm] if norm else None)
        if len(bound) > 1:
            out = (bound > bound.mean() + config.clp_u * bound.std()).nonzero().flatten()
            zero_channels(model, norm or conv, out)
            count += len(out)
    if progress and not count:
        progress.note("CLP: no channel stands out, the network stays as it is")
    return model
