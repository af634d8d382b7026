"""Intermediate features of any ``nn.Module``, taken by forward hooks on named layers."""

import torch

from config import UserError


class Features:
    """Context manager: while it is open, each forward pass of ``model`` leaves the outputs of ``layers`` in it.

        with Features(student, ("block1", "block2")) as taken:
            logits = student(images)
            for f in taken.outputs(): ...            # (N, C, H, W), in the order of ``layers``

    Raises ``UserError`` for a name that the model lacks. Token layouts of transformers, (N, H, W, C) and (N, L, C)
    with or without a class token, come out as (N, C, H, W).
    """

    def __init__(self, model, layers):
        modules = dict(model.named_modules())
        for name in layers:
            if name not in modules or not name:
                some = [n for n in modules if n and n.count(".") < 2]
                raise UserError(f"--layers {name}: {type(model).__name__} has no such layer; it has "
                                f"{', '.join(some[:40])}{', ...' if len(some) > 40 else ''}")
        self.layers, self.modules = tuple(layers), [modules[name] for name in layers]
        self.channels_last = getattr(model, "features_nhwc", False)
        self.taken, self.runs = {}, {}

    def __enter__(self):
        self.handles = [m.register_forward_hook(self.hook(n)) for n, m in zip(self.layers, self.modules, strict=True)]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self.taken.clear()

    def hook(self, name):
        def keep(_module, _inputs, output):
            self.taken[name] = (output, output._version if torch.is_tensor(output) else None)
            self.runs[name] = self.runs.get(name, 0) + 1
        return keep

    def outputs(self):
        """The features of the last forward pass, one ``(N, C, H, W)`` a layer."""
        features = []
        for name in self.layers:
            if name not in self.taken:
                raise UserError(f"--layers {name}: the model's forward pass does not use this layer")
            f, version = self.taken[name]
            if not torch.is_tensor(f) or f.ndim not in (3, 4):
                raise UserError(f"--layers {name}: its output is no feature map (N, C, H, W)")
            if f._version != version:
                raise UserError(f"--layers {name}: its output is overwritten by the layer after it; name that one")
            features.append(self.as_nchw(f))
        return features

    def as_nchw(self, f):
        if f.ndim == 3:  # (N, L, C), a class token first if L is no square
            side = int(f.shape[1] ** 0.5)
            f = f[:, f.shape[1] - side * side:]
            return f.transpose(1, 2).reshape(f.shape[0], f.shape[2], side, side)
        return f.permute(0, 3, 1, 2) if self.channels_last else f


def check_order(model, layers, images):
    """Raise ``UserError`` unless ``images`` (N, C, H, W) in [0, 1] run through ``layers`` of ``model`` in their order:
    betas and paths count them from the shallow end."""
    with torch.no_grad(), Features(model, layers) as taken:
        model(images)
        ran, often = list(taken.taken), [name for name, runs in taken.runs.items() if runs > 1]
    if often:
        raise UserError(f"--layers {often[0]}: it runs several times in a forward pass; name a layer that runs once")
    if ran != list(layers):
        raise UserError(f"--layers {' '.join(layers)}: shallow to deep is needed: {' '.join(ran)}")


def needs_pixels(layer, f):
    """Raise ``UserError`` if the feature map ``f`` (N, C, H, W) of ``layer`` has one pixel."""
    if f.shape[2] * f.shape[3] == 1:
        raise UserError(f"--layers {layer}: its feature map has one pixel, so that its attention is the same for every "
                        f"network and its loss 0; name an earlier layer")


def find_stages(model, images, most=3):
    """Names of the last ``most`` stages of ``model``: the last layer at each resolution, shallow to deep.

    Looks at modules up to two levels deep, the classifying head left out, in the order in which ``images`` (N, C, H, W)
    run through them. Maps of a single pixel do not count, since their normalised attention is the same for every
    network, nor do outputs that a later layer overwrites. Returns a tuple.
    """
    seen, handles = [], []
    nhwc = getattr(model, "features_nhwc", False)

    def hook(name):
        def note(_module, _inputs, output):
            if torch.is_tensor(output) and output.ndim == 4:
                h, w = output.shape[1:3] if nhwc else output.shape[2:]
                if h * w > 1:
                    seen.append(((h, w), name, output, output._version))
        return note

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            continue  # it evens out the sum of squares over the channels: the same map for every network
        if name and name.count(".") < 2 and name.split(".")[0] not in ("fc", "classifier", "head", "heads"):
            handles.append(module.register_forward_hook(hook(name)))
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    last = {}
    for size, name, output, version in seen:
        if output._version == version:
            last.pop(size, None)  # so that the order is that of the last layers
            last[size] = name
    return tuple(list(last.values())[-most:])
