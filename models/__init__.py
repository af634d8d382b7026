"""Architectures by name. Models take images in [0, 1] and return logits, nothing else."""

import contextlib
import re

import torch

from config import UserError
from models.alexnet import AlexNet
from models.features import Features, check_order, find_stages, needs_pixels
from models.resnet import ResNet
from models.wrn import WideResNet

NAMES = ("WRN-10-1", "WRN-10-2", "WRN-16-1", "WRN-16-2", "WRN-40-1", "WRN-40-2", "ResNet34", "ResNet18",
         "AlexNet")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name, n_classes, in_channels=3, image_size=32):
    """A new model by name, randomly initialised. Raises ``UserError`` for a name that is none."""
    wrn = re.fullmatch(r"WRN-(\d+)-(\d+)", name)
    if wrn:
        try:
            return WideResNet(int(wrn[1]), int(wrn[2]), n_classes, in_channels)
        except ValueError as e:
            raise UserError(f"--s_name {name}: {e}") from None
    if name == "ResNet34":
        return ResNet((5, 5, 5), (16, 32, 64), n_classes, in_channels)
    if name == "ResNet18":
        return ResNet((2, 2, 2, 2), (64, 128, 256, 512), n_classes, in_channels)
    if name == "AlexNet":
        if image_size < 7:
            raise UserError(f"--s_name AlexNet: needs images of at least 7 x 7 pixels, these have {image_size}")
        return AlexNet(n_classes, in_channels)
    if name.startswith("torchvision:"):
        return build_torchvision(name.partition(":")[2], n_classes, in_channels, image_size)
    raise UserError(f"--s_name {name}: {', '.join(NAMES)}, WRN-<depth>-<width> or torchvision:<name> is allowed")


def check_name(name):
    """Raise ``UserError`` if there is no architecture ``name``."""
    with torch.device("meta"), contextlib.suppress(RuntimeError):
        build(name, 2, image_size=64)


def build_torchvision(name, n_classes, in_channels, image_size):
    """A torchvision classifier; its stages are found by a forward pass on an image of ``image_size``."""
    from torchvision import models as zoo

    names = zoo.list_models(module=zoo)
    if name not in names:
        raise UserError(f"--s_name torchvision:{name}: torchvision has {', '.join(names)}")
    if in_channels != 3:
        raise UserError(f"--s_name torchvision:{name}: takes images of 3 channels, these have {in_channels}")
    extra = {"image_size": image_size} if name.startswith("vit_") else {}
    if name.startswith("maxvit"):
        extra = {"input_size": (image_size, image_size)}
    if name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}
    try:
        model = zoo.get_model(name, weights=None, num_classes=n_classes, **extra)
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # so that a hooked output stays what it was
        model.features_nhwc = name.startswith("swin")
        model.feature_layers = find_stages(model, torch.zeros(2, 3, image_size, image_size))
        if name.startswith("swin"):
            model.feature_layers = ("features.3", "features.5", "features.7")  # what follows is normalised or permuted
        if name.startswith("vit_"):
            n = len(model.encoder.layers)
            model.feature_layers = tuple(f"encoder.layers.encoder_layer_{n * k // 3 - 1}" for k in (1, 2, 3))
    except (RuntimeError, ValueError, AssertionError) as e:
        raise UserError(f"--s_name torchvision:{name}: does not work at --image_size {image_size}: "
                        f"{str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
    if not model.feature_layers:
        raise UserError(f"--s_name torchvision:{name}: every feature map has one pixel at --image_size {image_size}; "
                        f"larger images are needed")
    return model


class Normalize:
    """Forward pre-hook: images in [0, 1] minus a mean, over a standard deviation, per channel."""

    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, _module, inputs):
        x = inputs[0]
        if self.mean.device != x.device:  # copied once: on a GPU that would wait
            with torch.inference_mode(False):  # for later calls with a gradient
                self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        return ((x - self.mean.to(x.dtype)) / self.std.to(x.dtype), *inputs[1:])


def select_model(dataset, model_name, pretrained=False, pretrained_models_path=None, n_classes=10, *, in_channels=None,
                 image_size=32, normalize="none"):
    """The model ``model_name`` for ``dataset``, with the weights of a checkpoint if ``pretrained``. As in the demo.

    ``in_channels`` defaults to 1 for MNIST and 3 otherwise. Raises ``UserError`` if there is no such model, or the
    checkpoint is missing, damaged, hostile or of another architecture.
    """
    channels = in_channels or (1 if dataset == "MNIST" else 3)
    model = build(model_name, n_classes, channels, image_size)
    if normalize == "imagenet":
        if channels != 3:
            raise UserError(f"--normalize imagenet: is for images of 3 channels, these have {channels}")
        model.register_forward_pre_hook(Normalize(IMAGENET_MEAN, IMAGENET_STD))
    if pretrained:
        from utils.checkpoint import load_checkpoint, load_weights  # they look for an architecture that fits

        load_weights(model, load_checkpoint(pretrained_models_path), pretrained_models_path, model_name)
    return model


def feature_layers(model, layers=()):
    """The layers whose attention counts: ``layers`` if any are given, else the model's own stages. ``UserError``."""
    if len(set(layers)) < len(layers):
        raise UserError(f"--layers {' '.join(layers)}: each layer once")
    if layers:
        return tuple(layers)
    own = tuple(getattr(model, "feature_layers", ()))
    if not own:
        raise UserError(f"--layers: {type(model).__name__} names no feature_layers; say which to use")
    return own


__all__ = ["NAMES", "Features", "build", "check_order", "feature_layers", "find_stages", "needs_pixels", "select_model"]
