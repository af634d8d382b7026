"""Data sets as tensors, the poisoned set (``DatasetBD``), the defender's clean subset (``DatasetCL``), and batches.

A data set is a pair of tensors, images uint8 ``(N, C, H, W)`` and labels int64 ``(N,)``, decoded once, cached beside
the data, and held on the device. Poisoning and the clean subset are index operations; augmentation works on whole
batches. Every data set is an ordinary ``torch.utils.data.Dataset`` as well.
"""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

import attacks
import shapes10
from config import UserError, data_root
from utils.engine import to_float
from utils.files import write_atomically
from utils.seeds import generator

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".tif", ".tiff", ".gif")
NO_FLIP = ("MNIST", "GTSRB")  # a mirrored digit or traffic sign is another one, or none


class TensorData(Dataset):
    """Images uint8 ``(N, C, H, W)``, labels int64 ``(N,)`` and class names.

    ``data[i]`` is ``(image, label)``: with a ``transform``, it gets the PIL image; without, the image is float32
    ``(C, H, W)`` in [0, 1].
    """

    def __init__(self, images, labels, classes, transform=None):
        assert images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(labels)
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
        return TensorData(self.images.to(device), self.labels.to(device), self.classes, self.transform)

    def take(self, indices):
        """The samples at ``indices``, int64 ``(M,)``, as a data set of their own."""
        indices = indices.to(self.images.device)
        return TensorData(self.images[indices], self.labels[indices], self.classes, self.transform)

    def stamped(self, images, indices):
        """Hook for poisoned sets: ``images`` of the samples ``indices`` with their triggers; here as they are."""
        return images


def as_tensor_data(data):
    """``TensorData`` from itself, a pair (images, labels), or any sequence of (image, label), as the demo passes it.

    An image may be a PIL image, an array (H, W) or (H, W, C) of uint8, or a float tensor (C, H, W) in [0, 1].
    """
    if isinstance(data, TensorData):
        return data
    if isinstance(data, tuple) and len(data) == 2 and torch.is_tensor(data[0]):
        images, labels = data
    else:
        images, labels = [], []
        for image, label in data:
            if torch.is_tensor(image):
                image = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
            else:
                array = np.asarray(image)
                image = torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())
            images.append(image)
            labels.append(int(label))
        images, labels = torch.stack(images), torch.tensor(labels, dtype=torch.int64)
    classes = getattr(data, "classes", None) or range(int(labels.max()) + 1)
    return TensorData(images, labels, classes)


# ------------------------------------------------------------------------------------------- the two sets of the method


def stratified(labels, counts, gen):
    """Indices that take ``counts[c]`` random samples of each class ``c``, sorted int64."""
    chosen = []
    for c, count in enumerate(counts):
        pool = (labels == c).nonzero().flatten()
        chosen.append(pool[torch.randperm(len(pool), generator=gen)[:count]])
    return torch.cat(chosen).sort().values


class DatasetCL(TensorData):
    """The defender's clean subset: a share ``opt.ratio`` of the training set, all classes alike, fixed by ``opt.seed``.

    ``indices`` are its places in ``full_dataset``. Raises ``UserError`` if a class ends up without a sample.
    """

    def __init__(self, opt, full_dataset=None, transform=None):
        if full_dataset is None:
            full_dataset = load_data(opt, train=True)
        full = as_tensor_data(full_dataset)
        labels = full.labels.cpu()
        sizes = torch.bincount(labels, minlength=full.n_classes)
        counts = [int(opt.ratio * int(n) + 0.5) for n in sizes]
        empty = [full.classes[c] for c, n in enumerate(counts) if n == 0]
        if empty:
            raise UserError(f"--ratio {opt.ratio} of {len(full)} training images leaves no sample of "
                            f"{len(empty)} of {full.n_classes} classes ({', '.join(empty[:3])}"
                            f"{', ...' if len(empty) > 3 else ''}); every class needs at least one")
        self.indices = stratified(labels, counts, generator(getattr(opt, "seed", 0), "clean subset"))
        subset = full.take(self.indices)
        super().__init__(subset.images, subset.labels, full.classes, transform)


class DatasetBD(TensorData):
    """A backdoored set, made from ``full_dataset`` by the attack in ``opt``.

    mode "train": all images, of which ``poisoned`` (indices, ``round(inject_portion * N)`` of them) carry the trigger
    and the labels of the label rule. ``images`` stays the clean array, shared with ``full_dataset``; the trigger is
    stamped when a sample or a batch is taken, so that augmentation can come first (``Batches``).

    mode "test": the images that count for the attack success rate (not of the target class; all with all2all), all
    with the trigger. ``labels`` are what the attacker wants, ``true_labels`` what the images show.

    ``opt`` needs ``trigger_type, target_type, target_label, trig_w, trig_h`` and may have ``seed``; ``distance`` and
    ``device`` are taken as in the demo.
    """

    def __init__(self, opt, full_dataset, inject_portion=None, transform=None, mode="train", device=None,
                 distance=None):
        full = as_tensor_data(full_dataset)
        if device is not None:
            full = full.to(device)
        if distance is not None:
            opt = type("Options", (), {**vars(opt), "trig_distance": distance})
        if mode not in ("train", "test"):
            raise ValueError(f"mode: train or test is allowed, got {mode!r}")
        if opt.target_label >= full.n_classes:
            raise UserError(f"--target_label {opt.target_label}: the data set has the classes 0 to "
                            f"{full.n_classes - 1}")
        self.trigger = attacks.make_trigger(opt, full.shape)
        labels = full.labels.cpu()
        if mode == "test":
            keep = attacks.scored(labels, opt).nonzero().flatten()
            part = full.take(keep)
            self.true_labels = part.labels
            super().__init__(self.trigger(part.images), attacks.poisoned_labels(part.labels, opt, full.n_classes),
                             full.classes, transform)
            self.poisoned = torch.arange(len(keep))
            self.is_poisoned = None  # the images carry their trigger already
            return
        portion = opt.inject_portion if inject_portion is None else inject_portion
        self.poisoned = attacks.choose_poisoned(labels, opt, portion, generator(getattr(opt, "seed", 0), "poison"))
        new = labels.clone()
        if opt.target_type != "cleanLabel":
            new[self.poisoned] = attacks.poisoned_labels(labels[self.poisoned], opt, full.n_classes)
        self.true_labels = full.labels
        self.is_poisoned = torch.zeros(len(full), dtype=torch.bool)
        self.is_poisoned[self.poisoned] = True
        self.is_poisoned = self.is_poisoned.to(full.images.device)
        super().__init__(full.images, new.to(full.images.device), full.classes, transform)

    def stamped(self, images, indices):
        """A copy of ``images``, uint8 ``(B, C, H, W)`` of the samples ``indices``, with the poisoned ones stamped."""
        if self.is_poisoned is None:
            return images
        rows = self.is_poisoned[indices].nonzero().flatten()
        out = images.clone()
        out[rows] = self.trigger(images[rows])
        return out

    def __getitem__(self, i):
        one = torch.tensor([i % len(self)], device=self.images.device)
        image = self.stamped(self.images[one], one)
        return TensorData(image, self.labels[one], self.classes, self.transform)[0]


# -------------------------------------------------------------------------------------------------------------- batches


class Augment:
    """Random crop (padding ``pad`` pixels of black), horizontal flip and cutout on whole batches, on the device."""

    def __init__(self, pad=4, flip=True, cutout=0):
        self.pad, self.flip, self.cutout = pad, flip, cutout

    def draw(self, n, shape, gen):
        """The random numbers for ``n`` images, drawn on the CPU so that they are the same on every device."""
        _, h, w = shape
        draw = {"dy": torch.randint(0, 2 * self.pad + 1, (n,), generator=gen),
                "dx": torch.randint(0, 2 * self.pad + 1, (n,), generator=gen),
                "flip": torch.randint(0, 2, (n,), generator=gen).bool() & self.flip,
                "cy": torch.randint(0, h, (n,), generator=gen),
                "cx": torch.randint(0, w, (n,), generator=gen)}
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
    depends on ``(seed, name, epoch)`` only, so that an epoch can be repeated or resumed at will.
    """

    def __init__(self, data, batch_size, augment=None, seed=0, name="train", stamp="after"):
        self.data, self.augment, self.seed, self.name, self.stamp = data, augment, seed, name, stamp
        self.batch_size = min(batch_size, len(data))

    def __len__(self):
        return len(self.data) // self.batch_size

    def epoch(self, epoch):
        gen = generator(self.seed, self.name, epoch)
        data, device, n = self.data, self.data.images.device, len(self.data)
        order = torch.randperm(n, generator=gen).to(device)
        draw = {}
        if self.augment:
            draw = {k: v.to(device) for k, v in self.augment.draw(n, data.shape, gen).items()}
        for k in range(len(self)):
            part = slice(k * self.batch_size, (k + 1) * self.batch_size)
            indices = order[part]
            images = data.images[indices]
            if self.stamp == "before":
                images = data.stamped(images, indices)
            if self.augment:
                images = self.augment.move(images, *(draw[name][part] for name in ("dy", "dx", "flip")))
                if self.augment.cutout:
                    images = self.augment.cut(images, draw["cy"][part], draw["cx"][part])
            if self.stamp == "after":
                images = data.stamped(images, indices)
            yield to_float(images), data.labels[indices]


def make_augment(config):
    """The ``Augment`` that ``--augment``, ``--cutout`` and the data set ask for, or None."""
    if not config.augment and not config.cutout:
        return None
    return Augment(4 if config.augment else 0, config.augment and config.dataset not in NO_FLIP, config.cutout)


# ----------------------------------------------------------------------------------------------------- reading the data


def load_data(config, train):
    """The training or test set that ``config`` (``DataConfig``) names, as ``TensorData`` on the CPU.

    Raises ``UserError`` if it is not there and cannot be had, or is not usable.
    """
    name = config.dataset
    split = "train" if train else "test"
    wanted = config.train_size if train else config.test_size
    root = data_root(config)
    if name == "shapes10":
        size = wanted or (50_000 if train else 10_000)
        images, labels = cached(root / f"cache-{split}-{size}.npz", "shapes10 version 1",
                                lambda: shapes10.generate(size, seed=0 if train else 1))
        data = tensor_data(images, labels, shapes10.CLASSES)
        return resized(data, config.image_size) if config.image_size not in (0, shapes10.SIZE) else data
    if name == "folder" or (name == "CIFAR10" and (root / "train").is_dir()):
        data = load_folder(root, split, config.image_size or 32, name)
    else:
        data = load_torchvision(name, root, train, config.image_size or (64 if name == "Imagenette" else 32))
    if wanted and wanted < len(data):
        share = wanted / len(data)
        counts = [int(share * int(n) + 0.5) for n in torch.bincount(data.labels, minlength=data.n_classes)]
        if not all(counts):
            raise UserError(f"--{split}_size {wanted} leaves a class of {data.n_classes} without an image")
        data = data.take(stratified(data.labels, counts, generator(0, "part of", split)))
    return data


def tensor_data(images, labels, classes):
    return TensorData(torch.from_numpy(images), torch.from_numpy(labels), classes)


def resized(data, size):
    """``data`` at ``size`` x ``size`` pixels (bilinear, antialiased)."""
    images = F.interpolate(data.images.float(), (size, size), mode="bilinear", antialias=True)
    return TensorData(images.round().clamp(0, 255).to(torch.uint8), data.labels, data.classes)


def cached(path, fingerprint, make):
    """``make() -> (images, labels)`` arrays, kept in the .npz file ``path``.

    A file that is cut short, damaged, or belongs to another ``fingerprint`` is made anew. If the folder cannot be
    written to, the arrays are used without a cache.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            if str(z["fingerprint"]) == fingerprint:
                return z["images"], z["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    images, labels = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda f: np.savez(f, images=images, labels=labels, fingerprint=fingerprint))
    except OSError as e:
        tqdm.write(f"note: no cache was written to {path}: {e.strerror}")
    return images, labels


def load_folder(root, split, size, dataset):
    """The images below ``root/split/<class>/``, RGB, resized to ``size`` x ``size`` where they differ."""
    both = {}
    for part in ("train", "test"):
        folder = root / part
        if not folder.is_dir():
            raise UserError(f"--data_root {root}: no folder {folder}; images go to {root}/train/<class>/* and "
                            f"{root}/test/<class>/*")
        both[part] = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    classes = both["train"]
    if not classes:
        raise UserError(f"--data_root {root}: {root / 'train'} has no class folders")
    files, labels, stamp = [], [], hashlib.sha256(f"{classes}".encode())
    for label, name in enumerate(classes):
        folder = root / split / name
        found = []
        if folder.is_dir():
            found = sorted((e for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_FILES)),
                           key=lambda e: e.name)
        if not found:
            raise UserError(f"--data_root {root}: {folder} has no images, but class {name!r} of the training set "
                            f"needs some ({', '.join(IMAGE_FILES)})")
        for e in found:
            info = e.stat()
            stamp.update(f"{name}/{e.name} {info.st_size} {info.st_mtime_ns}\n".encode())
        files += [e.path for e in found]
        labels += [label] * len(found)
    extra = sorted(set(both["test"]) - set(classes))
    if extra:
        raise UserError(f"--data_root {root}: class {extra[0]!r} is in test but not in train")

    def read(path):
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                return np.asarray(image)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as e:
            raise UserError(f"--data_root {root}: the image {path} cannot be read: {e}") from None

    def decode():
        images = np.empty((len(files), 3, size, size), np.uint8)
        with ThreadPoolExecutor() as pool:
            for i, array in enumerate(tqdm(pool.map(read, files, chunksize=64), f"{dataset} {split}: decoding",
                                           len(files), leave=False, mininterval=0.5)):
                images[i] = array.transpose(2, 0, 1)
        return images, np.array(labels, np.int64)

    images, targets = cached(root / f"cache-{split}-{size}.npz", stamp.hexdigest(), decode)
    return tensor_data(images, targets, classes)


def load_torchvision(name, root, train, size):
    """CIFAR10, CIFAR100, MNIST, GTSRB or Imagenette through torchvision, which downloads and checks the files."""
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    split = "train" if train else "test"
    sets = {
        "CIFAR10": lambda d: datasets.CIFAR10(root, train, download=d),
        "CIFAR100": lambda d: datasets.CIFAR100(root, train, download=d),
        "MNIST": lambda d: datasets.MNIST(root, train, download=d),
        "GTSRB": lambda d: datasets.GTSRB(root, split, download=d),
        "Imagenette": lambda d: datasets.Imagenette(root, "train" if train else "val", size="160px", download=d),
    }

    def make():
        try:
            data = sets[name](False)
        except (RuntimeError, FileNotFoundError):
            data = download(name, root, sets[name])
        if hasattr(data, "data"):  # the whole set as one array, (N, H, W) or (N, H, W, C)
            array = np.asarray(data.data)
            images = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
            images = torch.from_numpy(np.ascontiguousarray(images))
            labels = torch.as_tensor(data.targets)
            if images.shape[-1] != size:
                images = resized(TensorData(images, labels, ()), size).images
            return images.numpy(), labels.numpy().astype(np.int64)
        images = np.empty((len(data), 3, size, size), np.uint8)
        labels = np.empty(len(data), np.int64)
        for i in tqdm(range(len(data)), f"{name} {split}: decoding", leave=False):
            image, labels[i] = data[i]
            images[i] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
                                   ).transpose(2, 0, 1)
        return images, labels

    images, labels = cached(root / f"cache-{split}-{size}.npz", f"{name} torchvision", make)
    return tensor_data(images, labels, class_names(name, root, int(labels.max()) + 1))


def class_names(name, root, n):
    if name == "CIFAR10":
        return ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return range(n)


def download(name, root, make):
    try:
        tqdm.write(f"{name} is not in {root}: downloading")
        return make(True)
    except Exception as e:  # torchvision raises many kinds: URLError, HTTPError, RuntimeError, OSError, ...
        extra = f", or its images as {root}/train/<class>/* and {root}/test/<class>/*" if name == "CIFAR10" else ""
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"--dataset {name}: it is not in {root} and the download failed ({reason}); put the files "
                        f"that torchvision.datasets.{name} expects there by hand{extra}, or try --dataset shapes10, "
                        f"which needs no files") from None
