"""Reading the data sets, the poisoned set (``DatasetBD``) and the defender's clean subset (``DatasetCL``).

A data set is a pair of tensors, images uint8 ``(N, C, H, W)`` and labels int64 ``(N,)``, decoded once, cached beside
the data, and held on the device. Poisoning and the clean subset are index operations; augmentation works on whole
batches (``utils/data.py``). Every data set is an ordinary ``torch.utils.data.Dataset`` as well.
"""

import contextlib
import copy
import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import attacks
import shapes10
from config import UserError, data_root
from utils.data import TensorData, as_tensor_data, eight_bits
from utils.files import IMAGE_ENDINGS, images_below, write_atomically
from utils.seeds import generator

IMAGES = {"CIFAR10": (50_000, 10_000), "CIFAR100": (50_000, 10_000), "MNIST": (60_000, 10_000),
          "GTSRB": (26_640, 12_630), "Imagenette": (9_469, 3_925)}  # training and test images of each set
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# ------------------------------------------------------------------------------------------- the two sets of the method


def stratified(labels, counts, gen):
    """Indices that take ``counts[c]`` random samples of each class ``c``, sorted int64."""
    chosen = []
    for c, count in enumerate(counts):
        pool = (labels == c).nonzero().flatten()
        chosen.append(pool[torch.randperm(len(pool), generator=gen)[:count]])
    return torch.cat(chosen).sort().values


def apportioned(sizes, total):
    """``total`` in shares like ``sizes``, int64 ``(n,)``: rounded down, the rest to the largest remainders."""
    exact = sizes.double() * total / sizes.sum()
    counts = exact.long()
    counts[(counts - exact).argsort(stable=True)[:total - counts.sum()]] += 1
    return counts


class DatasetCL(TensorData):
    """The defender's clean subset: a share ``opt.ratio`` of the training set, all classes alike, fixed by ``opt.seed``.

    ``indices`` are its places in ``full_dataset``. Raises ``UserError`` if a class ends up without a sample.
    """

    def __init__(self, opt, full_dataset=None, transform=None):
        if full_dataset is None:
            full_dataset = load_data(opt, train=True)
        full = as_tensor_data(full_dataset)
        if not 0 < opt.ratio <= 1:
            raise UserError(f"--ratio: a share above 0 and up to 1 is needed, got {opt.ratio}")
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
    and the labels of the label rule, and ``cover`` (indices) the trigger, or a disturbed one, and their own label.
    ``images`` stays the clean array, shared with ``full_dataset`` (unless the attack perturbs images before); the
    trigger is stamped when a sample or a batch is taken, so that augmentation can come first (``Batches``).

    mode "test": the images that count for the attack success rate (whose label the attacker changes), all with the
    trigger. ``labels`` are what the attacker wants, ``true_labels`` what the images show. ``part`` is one of
    ``attacks.parts(trigger)``: one trigger of several, or the classes that should not react. With ``inject_portion=0``
    all images as they are, which is how the demo makes its clean test set.

    ``opt`` needs ``trigger_type, target_type, target_label, trig_w, trig_h`` and may have ``seed`` and any other
    option of ``AttackConfig``; ``distance`` is ``trig_distance``, ``device`` where the images go. Give the ``trigger``
    of the training set to the test set: some are learned or choose among the training images. ``n_classes``: for data
    that does not say it by ``classes`` (default: the highest label + 1). Raises ``UserError`` for options that do not
    go together, or not with the data.
    """

    def __init__(self, opt, full_dataset, inject_portion=None, transform=None, mode="train", device=None,
                 distance=None, trigger=None, part=None, n_classes=None):
        full = as_tensor_data(full_dataset, n_classes)
        if device is not None:
            full = full.to(device)
        self.seed = getattr(opt, "seed", 0)
        opt = attacks.complete(opt, trig_distance=distance, inject_portion=inject_portion)
        for name in ("trigger_type", "target_type", "target_label", "source_label",
                     *["trig_distance"] * (distance is not None)):
            if trigger is not None and getattr(opt, name) != getattr(trigger.opt, name):
                raise UserError(f"--{name} {getattr(opt, name)}: the trigger that is given was made for "
                                f"{getattr(trigger.opt, name)}")
        if mode not in ("train", "test"):
            raise ValueError(f"mode: train or test is allowed, got {mode!r}")
        if mode == "test" and inject_portion not in (None, 0, 1):
            raise UserError(f"inject_portion {inject_portion}: of a test set all images carry the trigger (1), or none "
                            f"does (0)")
        for name, rules in (("target_label", ("all2one", "cleanLabel", "classSpecific", "multiLabel")),
                            ("source_label", ("classSpecific",))):
            if getattr(opt, name) >= full.n_classes and opt.target_type in rules:
                raise UserError(f"--{name} {getattr(opt, name)}: the data set has the classes 0 to "
                                f"{full.n_classes - 1}")
        if opt.target_type == "multiLabel" and opt.n_triggers > full.n_classes:
            raise UserError(f"--n_triggers {opt.n_triggers}: each of them leads to a class of its own, but the data "
                            f"set has {full.n_classes}")
        self.trigger = trigger or attacks.make_trigger(opt, full.shape)
        if part is not None and part not in attacks.parts(self.trigger):
            raise ValueError(f"part: {', '.join(attacks.parts(self.trigger)) or 'none'} is allowed, got {part!r}")
        if not self.trigger.trained and (mode == "train" or trigger is None):
            raise UserError(f"--trigger_type {opt.trigger_type}: its generator is trained together with the network "
                            f"(train_badnet.py); to poison with a trained one, give make_trigger its state")
        labels, everything = full.labels.cpu(), torch.arange(len(full))
        wanted = self.trigger.labels(labels, everything, full.n_classes, part)
        if mode == "test" and inject_portion == 0:
            super().__init__(full.images, full.labels, full.classes, transform)
            self.true_labels, self.kind = full.labels, None
            self.poisoned = self.cover = everything[:0]
            return
        if mode == "test":
            self.poisoned = attacks.scored(labels, wanted, opt, part).nonzero().flatten()
            if not len(self.poisoned):
                raise UserError(f"--target_label {opt.target_label}, --target_type {opt.target_type}: the test set has "
                                f"no image that counts for the attack success rate")
            there = self.poisoned.to(full.images.device)
            self.true_labels = full.labels[there]
            super().__init__(self.trigger(full.images[there], self.poisoned, part),
                             wanted[self.poisoned].to(there.device), full.classes, transform)
            self.cover, self.kind = self.poisoned[:0], None  # the images carry their trigger already
            return
        self.trigger.see(full.images)
        self.poisoned = attacks.choose_poisoned(labels, opt, opt.inject_portion, generator(self.seed, "poison"))
        self.cover = attacks.choose_cover(labels, opt, self.trigger, self.poisoned, generator(self.seed, "cover"))
        new = labels.clone()
        if opt.target_type != "cleanLabel":
            new[self.poisoned] = wanted[self.poisoned]
        self.true_labels = full.labels
        self.kind = torch.zeros(len(full), dtype=torch.uint8)  # 1 poisoned, 2 cover
        self.kind[self.poisoned], self.kind[self.cover] = 1, 2
        images = full.images
        if self.trigger.clean_label_only and len(self.poisoned):
            pool = (labels == opt.target_label).nonzero().flatten()
            prepared = self.trigger.prepare(images[pool.to(images.device)], opt.target_label)
            chosen = self.kind[pool] == 1
            images = images.clone()
            images[pool[chosen].to(images.device)] = prepared[chosen.to(images.device)]
        super().__init__(images, new.to(images.device), full.classes, transform)

    def stamped(self, images, indices, epoch=0):
        """A copy of ``images``, uint8 ``(B, C, H, W)`` of the samples ``indices``, with the poisoned ones stamped.

        ``indices``, int64 ``(B,)``, are on the CPU, so that finding the poisoned ones does not wait for the device.
        What is random in cover samples depends on the seed, the ``epoch`` and the batch's first sample; single samples
        (``data[i]``) are those of epoch 0.
        """
        if self.kind is None:
            return images
        if not len(indices):
            return images
        out, kind = images.clone(), self.kind[indices]
        rows = (kind == 1).nonzero().flatten()
        there = rows.to(images.device, non_blocking=True)
        out[there] = self.trigger.poison(images[there], indices[rows])
        if len(self.cover):
            rows = (kind == 2).nonzero().flatten()
            there = rows.to(images.device, non_blocking=True)
            gen = generator(self.seed, "cover", epoch, int(indices[0]))
            plain = self.trigger.opt.target_type == "classSpecific"  # the very trigger, on classes that must not react
            out[there] = self.trigger.poison(images[there], indices[rows]) if plain else \
                self.trigger.cover(images[there], indices[rows], gen)
        return out

    def take(self, indices):
        """The samples at ``indices``, int64 ``(M,)`` on the CPU, stamped for good."""
        there = indices.to(self.images.device)
        return TensorData(self.stamped(self.images[there], indices), self.labels[there], self.classes, self.transform)

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self.take(torch.tensor([i % len(self)]))[0]


def backdoor_tests(opt, test, trigger):
    """What the success rate is measured on: (the ``DatasetBD`` of all that counts, {name of a part: ``DatasetBD``}).

    Raises ``UserError`` if nothing counts; a part without images is left out.
    """
    parts = {}
    for name in attacks.parts(trigger):
        with contextlib.suppress(UserError):
            parts[name] = DatasetBD(opt, test, mode="test", trigger=trigger, part=name)
    return DatasetBD(opt, test, mode="test", trigger=trigger), parts


# ----------------------------------------------------------------------------------------------------- reading the data


def load_data(config, train):
    """The training or test set that ``config`` (``DataConfig``) names, as ``TensorData`` on the CPU.

    Raises ``UserError`` if it is not there and cannot be had, or is not usable.
    """
    name = config.dataset
    split = "train" if train else "test"
    wanted = config.train_size if train else config.test_size
    root, source = data_root(config), source_of(config)
    if config.grey and source != "image files":
        raise UserError(f"--grey: is for folders of image files, not for {name}")
    if source == "generated":
        size = wanted or (50_000 if train else 10_000)
        images, labels = cached(root / f"cache-{split}-{size}.npz", "shapes10 version 4",
                                lambda: shapes10.generate(size, seed=0 if train else 1))
        data = tensor_data(images, labels, shapes10.CLASSES)
        data.source = "generated"
        data = resized(data, config.image_size) if config.image_size not in (0, shapes10.SIZE) else data
    elif source == "image files":
        data = load_folder(root, split, config.image_size or 32, name, config.grey)
    else:
        data = load_torchvision(name, root, train, config.image_size or (64 if name == "Imagenette" else 32))
    if wanted > len(data):
        tqdm.write(f"note: --{split}_size {wanted}: {name} has {len(data)} such images, all are used")
    if wanted and wanted < len(data):
        counts = apportioned(torch.bincount(data.labels, minlength=data.n_classes), wanted)
        data = data.take(stratified(data.labels, counts, generator(0, "part of", split)))
    if wanted and not torch.bincount(data.labels, minlength=data.n_classes).all():
        raise UserError(f"--{split}_size {wanted} leaves a class of {data.n_classes} without an image")
    return data


def source_of(config):
    """What the data set of ``config`` is read from, the word that ``TensorData.source`` begins with."""
    if config.dataset == "shapes10":
        return "generated"
    files = config.dataset == "folder" or (config.dataset == "CIFAR10" and (data_root(config) / "train").is_dir())
    return "image files" if files else "torchvision"


def tensor_data(images, labels, classes):
    return TensorData(torch.from_numpy(images), torch.from_numpy(labels), classes)


def resized(data, size):
    """``data`` at ``size`` x ``size`` pixels (bilinear, antialiased)."""
    other = copy.copy(data)
    other.images = torch.empty(*data.images.shape[:2], size, size, dtype=torch.uint8)
    for part, out in zip(data.images.split(1000), other.images.split(1000), strict=True):  # for the memory
        part = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        out.copy_(part.round_().clamp_(0, 255))
    return other


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


def load_folder(root, split, size, dataset, grey):
    """The images anywhere below ``root/split/<class>/``, RGB or ``grey``, resized to ``size`` x ``size`` where they
    differ."""
    channels, kind = (1, "-grey") if grey else (3, "")
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
        found = images_below(folder)
        if not found:
            raise UserError(f"--data_root {root}: {folder} has no images, but class {name!r} of the training set "
                            f"needs some ({', '.join(IMAGE_ENDINGS)})")
        for path in found:
            try:
                info = os.stat(folder / path)
            except OSError as e:
                raise UserError(f"--data_root {root}: the image {folder / path} cannot be read: {e.strerror}") from None
            stamp.update(f"{name}/{path} {info.st_size} {info.st_mtime_ns}\n".encode())
        files += [str(folder / path) for path in found]
        labels += [label] * len(found)
    extra = sorted(set(both["test"]) - set(classes))
    if extra:
        raise UserError(f"--data_root {root}: class {extra[0]!r} is in test but not in train")

    def read(path):
        try:
            with Image.open(path) as image:
                image = eight_bits(image, grey)
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                return np.asarray(image)
        except Exception as e:  # Pillow's decoders raise many kinds on damaged files
            raise UserError(f"--data_root {root}: the image {path} cannot be read: {e}") from None

    def decode():
        images = np.empty((len(files), channels, size, size), np.uint8)
        with ThreadPoolExecutor() as pool:
            for i, array in enumerate(tqdm(pool.map(read, files, chunksize=64), f"{dataset} {split}: decoding",
                                           len(files), leave=False, mininterval=0.5)):
                images[i] = array.reshape(size, size, -1).transpose(2, 0, 1)
        return images, np.array(labels, np.int64)

    images, targets = cached(root / f"cache-{split}-{size}{kind}.npz", stamp.hexdigest(), decode)
    data = tensor_data(images, targets, classes)
    kinds = sorted({path.rpartition(".")[2].lower() for path in files})
    data.source = f"image files ({', '.join(kinds)})"
    return data


def load_torchvision(name, root, train, size):
    """CIFAR10, CIFAR100, MNIST, GTSRB or Imagenette through torchvision, which downloads and checks the files."""
    from torchvision import datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--data_root {root}: cannot be made: {e.strerror}") from None
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
        except Exception:  # missing or damaged, in the words of the data set at hand
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

    cache = root / f"cache-{split}-{size}.npz"
    images, labels = cached(cache, f"{name} torchvision", make)
    if len(labels) != IMAGES[name][0 if train else 1]:
        cache.unlink(missing_ok=True)
        raise UserError(f"--dataset {name}: {root} holds {len(labels)} of {IMAGES[name][0 if train else 1]} {split} "
                        f"images; delete the unfinished download there and start again")
    data = tensor_data(images, labels, CIFAR10_CLASSES if name == "CIFAR10" else range(int(labels.max()) + 1))
    data.source = "torchvision"
    return data


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
