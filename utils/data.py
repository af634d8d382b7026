"""Data sets as tensors, and shuffled, augmented batches of them, on the device."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from config import UserError
from utils.seeds import generator

NO_FLIP = ("MNIST", "GTSRB")  # a mirrored digit or traffic sign is another one, or none


def eight_bits(image, grey):
    """The PIL ``image`` in RGB, or in one channel; of 16 bits, which ``convert`` would cut off at 255, the upper 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range")
    return image.convert("L" if grey else "RGB")


class TensorData(Dataset):
    """Images uint8 ``(N, C, H, W)``, labels int64 ``(N,)`` and class names.

    ``data[i]`` is ``(image, label)``: with a ``transform``, it gets the PIL image; without, the image is float32
    ``(C, H, W)`` in [0, 1].
    """

    source = ""  # what the images were read from, for result lines

    def __init__(self, images, labels, classes, transform=None):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(f"uint8 images (N, C, H, W) and N labels are needed, got {images.dtype} "
                             f"{tuple(images.shape)} and {len(labels)} labels")
        self.images, self.labels, self.transform = images, labels, transform
        self.classes = [str(c) for c in classes]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image, label = self.images[i], int(self.labels[i])
        if self.transform is None:
            return image.float() / 255, label
        array = image.cpu().numpy()
        return self.transform(Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))), label

    @property
    def n_classes(self):
        return len(self.classes)

    @property
    def shape(self):
        """(C, H, W)"""
        return tuple(self.images.shape[1:])

    def to(self, device):
        """The same set with its tensors on ``device``."""
        other = copy.copy(self)
        other.images, other.labels = self.images.to(device), self.labels.to(device)
        return other

    def take(self, indices):
        """The samples at ``indices``, int64 ``(M,)``, as a data set of their own."""
        there = indices.to(self.images.device)
        part = TensorData(self.images[there], self.labels[there], self.classes, self.transform)
        part.source = self.source
        return part

    def parted(self, indices):
        """(the other samples in their order, those at ``indices``, int64 ``(M,)``), two data sets."""
        rest = torch.ones(len(self), dtype=torch.bool)
        rest[indices] = False
        return self.take(rest.nonzero().flatten()), self.take(indices)

    def stamped(self, images, indices, epoch=0):
        """Hook for poisoned sets: ``images`` of the samples ``indices`` (on the CPU) stamped; here as they are."""
        return images


def as_tensor_data(data, n_classes=None):
    """``TensorData`` from itself, a pair (images, labels), or any sequence of (image, label), as the demo passes it.

    An image may be a PIL image, an array (H, W) or (H, W, C) of uint8, or a tensor (C, H, W), uint8 or float in [0, 1];
    a pair holds such tensors as one (N, C, H, W). The class names are those of ``data`` or of what it is a subset of,
    else the numbers below ``n_classes`` (default: the highest label + 1). Raises ``UserError`` for data without images,
    with images of different sizes, or with other numbers.
    """
    def to_bytes(image):
        if image.dtype == torch.uint8:
            return image
        if not image.is_floating_point():
            raise UserError(f"the images are {image.dtype}: uint8 is needed, or float in [0, 1]")
        low, high = (float(v) for v in image.aminmax()) if image.numel() else (0.0, 0.0)
        if not -1e-3 <= low <= high <= 1 + 1e-3:
            raise UserError(f"float images must lie in [0, 1], these go from {low:.3g} to {high:.3g}: leave out "
                            f"Normalize, divide by 255")
        return (image * 255).round().clamp(0, 255).to(torch.uint8)

    if isinstance(data, TensorData):
        return data
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "ndim"):
        if not torch.is_tensor(data[0]) or data[0].ndim != 4 or len(data[0]) != len(data[1]):
            raise UserError(f"a pair (images, labels): a tensor (N, C, H, W) and N labels are needed, got "
                            f"{type(data[0]).__name__} {tuple(data[0].shape)} and {len(data[1])} labels")
        images, labels = to_bytes(data[0]), torch.as_tensor(data[1]).long()
    else:
        images, labels = [], []
        indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")  # iterating ends at an IndexError only
        for image, label in (data[i] for i in range(len(data))) if indexed else data:
            if torch.is_tensor(image):
                image = to_bytes(image)
            else:
                array = np.asarray(image)
                image = torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())
            images.append(image)
            labels.append(int(label))
        sizes = sorted({" x ".join(map(str, image.shape)) for image in images})
        if len(sizes) > 1:
            raise UserError(f"the images have different sizes, such as {sizes[0]} and {sizes[1]} (channels x height x "
                            f"width): resize them first")
        images = torch.stack(images) if images else torch.empty(0)
        labels = torch.tensor(labels, dtype=torch.int64)
    whole = data
    while not hasattr(whole, "classes") and hasattr(whole, "dataset"):  # a torch.utils.data.Subset
        whole = whole.dataset
    if not len(labels):
        raise UserError("the data set has no images")
    if labels.min() < 0:
        raise UserError(f"labels: classes are counted from 0, one is {labels.min()}")
    least = int(labels.max()) + 1
    if n_classes is not None and n_classes < least:
        raise UserError(f"n_classes {n_classes}: the data has labels up to {least - 1}")
    return TensorData(images, labels, getattr(whole, "classes", None) or range(n_classes or least))


class Augment:
    """Random crop (padding ``pad`` pixels of black), flip, pairing and cutout on whole batches, on the device."""

    def __init__(self, pad=4, flip=True, cutout=0, pairing=0.0):
        self.pad, self.flip, self.cutout, self.pairing = pad, flip, cutout, pairing

    def draw(self, n, shape, gen):
        """The random numbers for ``n`` images, drawn on the CPU so that they are the same on every device."""
        _, h, w = shape
        draw = {"dy": torch.randint(0, 2 * self.pad + 1, (n,), generator=gen),
                "dx": torch.randint(0, 2 * self.pad + 1, (n,), generator=gen),
                "flip": torch.randint(0, 2, (n,), generator=gen).bool() & self.flip,
                "cy": torch.randint(0, h, (n,), generator=gen),
                "cx": torch.randint(0, w, (n,), generator=gen),
                "weight": self.pairing * torch.rand(n, generator=gen)}
        return draw

    def move(self, images, dy, dx, flip):
        """Crop and flip, uint8 ``(B, C, H, W)`` to the same shape in channels-last memory."""
        b, _, h, w = images.shape
        if self.pad:
            images = F.pad(images, (self.pad,) * 4)
        rows = dy[:, None] + torch.arange(h, device=images.device)  # (B, H)
        cols = torch.arange(w, device=images.device).expand(b, w)
        cols = dx[:, None] + torch.where(flip[:, None], w - 1 - cols, cols)  # (B, W)
        first = torch.arange(b, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[first, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

    def pair(self, images, weight):
        """Each image with ``weight`` (B,) parts of the one before it in the batch; its label stays its own.

        SamplePairing (Inoue 2018, arXiv 1801.02929) has one weight, 0.5; here it is drawn, up to ``pairing``.
        """
        return torch.lerp(images.float(), images.roll(1, 0).float(), weight[:, None, None, None]).round_().byte()

    def cut(self, images, cy, cx):
        """Cutout (DeVries and Taylor 2017): a black square of side ``cutout`` around (cy, cx), clipped at the edge."""
        _, _, h, w = images.shape
        before = self.cutout // 2
        y = torch.arange(h, device=images.device) - cy[:, None] + before  # (B, H)
        x = torch.arange(w, device=images.device) - cx[:, None] + before
        hole = ((y >= 0) & (y < self.cutout))[:, :, None] & ((x >= 0) & (x < self.cutout))[:, None, :]
        return images.masked_fill(hole[:, None], 0)


class Batches:
    """Shuffled training batches of a ``TensorData``: ``for images, labels in batches.epoch(3)``.

    images float32 ``(B, C, H, W)`` in [0, 1], channels last; labels int64 ``(B,)``. Batches are all of the same size:
    the remainder (another one each epoch) is left out; a set smaller than a batch is one batch. Everything drawn
    depends on ``(seed, name, epoch)`` only, so that an epoch can be repeated or resumed at will. ``share`` (rank,
    world): every batch is cut among ``world`` processes, and this one gets its part.
    """

    def __init__(self, data, batch_size, augment=None, seed=0, name="train", stamp="after", share=(0, 1)):
        self.data, self.augment, self.seed, self.name, self.stamp = data, augment, seed, name, stamp
        self.share = share
        self.batch_size = min(batch_size, len(data))

    def __len__(self):
        return len(self.data) // self.batch_size

    def epoch(self, epoch):
        gen = generator(self.seed, self.name, epoch)
        data, device, n = self.data, self.data.images.device, len(self.data)
        order = torch.randperm(n, generator=gen)
        order_there = order.to(device)
        draw = {}
        if self.augment:
            draw = {k: v.to(device) for k, v in self.augment.draw(n, data.shape, gen).items()}
        for k in range(len(self)):
            part = slice(k * self.batch_size + self.share[0], (k + 1) * self.batch_size, self.share[1])
            indices, indices_there = order[part], order_there[part]
            images = data.images[indices_there]
            if self.stamp == "before":
                images = data.stamped(images, indices, epoch)
            if self.augment:
                images = self.augment.move(images, *(draw[name][part] for name in ("dy", "dx", "flip")))
                if self.augment.pairing:
                    images = self.augment.pair(images, draw["weight"][part])
                if self.augment.cutout:
                    images = self.augment.cut(images, draw["cy"][part], draw["cx"][part])
            if self.stamp == "after":
                images = data.stamped(images, indices, epoch)
            yield to_float(images), data.labels[indices_there]


def make_augment(config):
    """The ``Augment`` that ``--augment``, ``--cutout``, ``--pairing`` and the data set ask for, or None."""
    if not config.augment and not config.cutout and not config.pairing:
        return None
    return Augment(4 if config.augment else 0, config.augment and config.dataset not in NO_FLIP, config.cutout,
                   config.pairing)


def masked(images, mask, pattern):
    """uint8 ``images`` (N, C, H, W) as ``(1 - mask) x + mask pattern``, both float32 in [0, 1] that broadcast."""
    return (images.float() * (1 - mask) + 255 * mask * pattern).round_().clamp_(0, 255).to(torch.uint8)


def to_float(images):
    """uint8 ``(B, C, H, W)`` as float32 in [0, 1], channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(1 / 255)
