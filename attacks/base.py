"""What an attack is made of: a trigger, a label rule, and which samples are poisoned.

A trigger is a pure function on a batch, uint8 ``(N, C, H, W)`` to the same shape and dtype; its input stays untouched
and the same seed gives the same answer. A new one is one file in this folder with a class that carries
``@register("name")``; nothing else has to know it.
"""

from dataclasses import fields
from pathlib import Path

import torch

from config import AttackConfig, UserError, convert
from models import select_model
from utils.checkpoint import architecture, file_hash, load_checkpoint, load_weights, stored_config, weights_of
from utils.engine import cross_entropy
from utils.seeds import generator

TRIGGERS = {}
OTHERS = "other classes"
MIX = 2654435761  # Knuth's multiplicative hash: neighbours in a set are sent to unrelated places


def register(name):
    """Class decorator: makes a trigger known as ``--trigger_type name``."""
    def add(cls):
        cls.name = name
        TRIGGERS[name] = cls
        return cls
    return add


class Trigger:
    """A trigger for images of ``shape`` (C, H, W); ``opt`` is a complete ``AttackConfig``.

    ``state`` is what ``state()`` of an earlier instance returned, such as a patch that was optimised.
    """

    name = ""
    uses = ()  # the options of ``AttackConfig`` that this trigger reads, beside those that every attack has
    cover_share = 0.0  # cover samples, triggered with their true label, as a multiple of the poisoned ones
    parts = ()  # names of variants that are measured apart
    clean_label_only = False
    clean_network = False  # made with --clean_model
    joint = False  # trained together with the network: DatasetBD cannot poison a training set with it
    trained = True

    def __init__(self, shape, opt, state=None):
        self.shape, self.opt, self.device = tuple(shape), opt, torch.device("cpu")

    def __call__(self, images, indices=None, part=None):
        """Stamped copies of ``images``, uint8 ``(N, C, H, W)``, as at test time.

        ``indices``, int64 ``(N,)`` on the CPU, are the places of the images in their set (default: 0 to N - 1), for
        triggers that differ from sample to sample; ``part`` is one of ``parts``.
        """
        raise NotImplementedError

    def poison(self, images, indices):
        """What training images of the poisoned samples look like: by default as at test time."""
        return self(images, indices)

    def cover(self, images, indices, gen):
        """What cover samples look like; what is random in it is drawn from ``gen``, a CPU generator."""
        return self(images, indices)

    def see(self, images):
        """Called once with the training images, uint8 ``(N, C, H, W)``, before anything is stamped."""

    def prepare(self, images, label):
        """The images of class ``label`` from which the poisoned ones come, changed once before the training."""
        return images

    def labels(self, labels, indices, n_classes, part=None):
        """The labels that triggered images are trained and scored with, int64 ``(N,)``."""
        return poisoned_labels(labels, self.opt, n_classes)

    def network(self, model, n_classes):
        """The module that is trained: ``model``, or one with it as ``classifier`` and parts of the attack beside it."""
        return model

    def loss(self, model, images, labels):
        """The training loss of that module; of a ``joint`` attack it is also what triggers the images."""
        return cross_entropy(model, images, labels)

    def state(self):
        """What cannot be made again from ``opt``: a dict of tensors, kept in the checkpoint beside the weights."""
        return {}

    def to(self, device):
        """Move the tensors of the trigger to ``device``, for good."""
        if device != self.device:
            self.device = device
            for name, value in vars(self).items():
                if torch.is_tensor(value) or isinstance(value, torch.nn.Module):
                    setattr(self, name, value.to(device))
        return self

    def ready(self, images):
        """Check the batch and see that the trigger's tensors are where it is. Raises ``ValueError``."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            raise ValueError(f"{self.name}: a batch of uint8 images of {' x '.join(map(str, self.shape))} (channels x "
                             f"height x width) is needed, got {images.dtype} {tuple(images.shape)}")
        return self.to(images.device)


def checked(state, name, shape, dtype=torch.uint8):
    """The tensor ``name`` of a trigger's ``state``, which came from an untrusted file; floats are in [0, 1]. Raises
    ``UserError``."""
    tensor = state.get(name)
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu" \
            or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) \
            or (tensor.is_floating_point() and not ((tensor >= 0) & (tensor <= 1)).all()):
        raise UserError(f"the {name} in the file is not what this attack needs, {' x '.join(map(str, shape))} "
                        f"(channels x height x width) of {dtype}" + (f", but {' x '.join(map(str, tensor.shape))} of "
                        f"{tensor.dtype}" if torch.is_tensor(tensor) else ""))
    return tensor


def positions(images, indices):
    """``indices``, or 0 to N - 1, on the device of ``images``."""
    if indices is None:
        return torch.arange(len(images), device=images.device)
    return indices.to(images.device, non_blocking=True)


def to_uint8(x):
    """Float images on the scale 0..255 rounded and clipped: nothing wraps around."""
    return x.round().clamp_(0, 255).to(torch.uint8)


def in_pieces(stamp, images, *more):
    """``stamp(images, *more)``, on a CPU in pieces that stay in its cache (four times as fast); all (N, ...)."""
    size = max(1, 1_500_000 // images[:1].numel()) if images.device.type == "cpu" and len(images) else len(images)
    if len(images) <= size:
        return stamp(images, *more)
    return torch.cat([stamp(*piece) for piece in zip(*(x.split(size) for x in (images, *more)), strict=True)])


class PatchTrigger(Trigger):
    """Fixed pixels: where ``mask`` (H, W) is true, ``pattern`` (H, W) or (C, H, W), 0..255, takes the image's place.

    With ``--transparency t`` the pixels become ``(1 - t) pattern + t image``.
    """

    uses = ("trig_w", "trig_h", "trig_distance", "transparency")
    default_distance = 1  # pixels between patch and image edge

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        self.given = state
        _, h, w = self.shape
        self.trig_w, self.trig_h = opt.trig_w, opt.trig_h
        self.mask = torch.zeros(h, w, dtype=torch.bool)
        self.pattern = torch.zeros(h, w, dtype=torch.uint8)
        self.draw(h, w)

    @property
    def distance(self):
        return self.default_distance if self.opt.trig_distance < 0 else self.opt.trig_distance

    def draw(self, h, w):
        """Fill ``mask`` and ``pattern``: by default ``patch()`` at each of ``corners()``."""
        for row, col in self.corners(h, w):
            self.fits(row, col, h, w)
            self.mask[row:row + self.trig_h, col:col + self.trig_w] = True
            self.pattern[row:row + self.trig_h, col:col + self.trig_w] = self.patch()

    def fits(self, row, col, h, w):
        """Raise ``UserError`` unless a patch at (row, col) lies within the image."""
        if row < 0 or col < 0 or row + self.trig_h > h or col + self.trig_w > w:
            raise UserError(f"--trig_w {self.trig_w} --trig_h {self.trig_h}: the trigger, {self.distance} pixels "
                            f"from the edge, does not fit into an image {w} wide and {h} high")

    def corners(self, h, w):
        """Top left corners (row, column) of the patch: by default one patch at the bottom right."""
        return [(h - self.distance - self.trig_h, w - self.distance - self.trig_w)]

    def patch(self):
        """The patch itself, uint8 ``(trig_h, trig_w)``."""
        raise NotImplementedError

    def __call__(self, images, indices=None, part=None):
        self.ready(images)
        return paste(images, self.mask, self.pattern, self.opt.transparency)


def paste(images, mask, pattern, transparency=0.0):
    """``images`` with ``(1 - transparency) pattern + transparency image`` where ``mask``; all broadcast, all uint8."""
    if transparency == 0:
        return torch.where(mask, pattern, images)
    mixed = to_uint8((1 - transparency) * pattern.float() + transparency * images.float())
    return torch.where(mask, mixed, images)


def checkerboard(h, w):
    """The demo's grid, uint8 ``(h, w)``: 255 where row from the bottom + column from the right is even.

    The top left pixel, which in the bottom right corner faces the image, is black, so that 3 x 3 gives the demo's
    pattern, from the bottom row upwards and from the right column leftwards 255 0 255 / 0 255 0 / 255 0 0.
    """
    rows, cols = torch.arange(h - 1, -1, -1), torch.arange(w - 1, -1, -1)
    board = ((rows[:, None] + cols[None, :]) % 2 == 0).to(torch.uint8) * 255
    if h * w > 1:
        board[0, 0] = 0
    return board


# ------------------------------------------------------------------------------------------------------- clean network


def must_be_clean(content, where):
    """Raise ``UserError``, beginning with ``where``, if the checkpoint ``content`` says that it is of a backdoored
    network."""
    found = stored_config(content).get("trigger_type", "none")
    if found != "none":
        raise UserError(f"{where}: was trained with --trigger_type {found}: it is not clean")


def clean_network(opt, shape):
    """The clean network whose weaknesses an attack uses, from ``--clean_model``: (model in eval mode, its file's hash).

    Raises ``UserError`` if it is not there or is for other images.
    """
    path = Path(opt.clean_model)
    if not path.exists():
        raise UserError(f"--clean_model {path}: no such file; --trigger_type {opt.trigger_type} needs a clean network "
                        f"of the data at hand, from train_badnet.py --trigger_type none --checkpoint_root DIR")
    content = load_checkpoint(path)
    stored = {k: v for k, v in stored_config(content).items() if isinstance(v, str)}
    must_be_clean(content, f"--clean_model {path}")
    if opt.data and stored.get("dataset", opt.data) != opt.data:
        raise UserError(f"--clean_model {path}: was trained on {stored['dataset']}, the data here is {opt.data}: train "
                        f"one with train_badnet.py --trigger_type none --dataset {opt.data} --checkpoint_root DIR")
    state = weights_of(content, path)
    name = stored.get("s_name") or (architecture(state) or [opt.s_name])[0]
    last = [v for v in state.values() if v.ndim == 2]
    model = select_model("", name, n_classes=len(last[-1]) if last else 10, in_channels=shape[0], image_size=shape[1],
                         normalize=stored.get("normalize", "none"))
    load_weights(model, content, path, name)
    return model.eval(), file_hash(path)


# ------------------------------------------------------------------------------------------------------- label rules


def poisoned_labels(labels, opt, n_classes):
    """The labels that triggered images are trained and scored with, int64 ``(N,)``.

    all2one, classSpecific: the target; all2all: ``(y + 1) mod n_classes``; cleanLabel: unchanged in training (only
    images of the target class are poisoned there), the target when scored: the two agree on the images that each is
    given. multiLabel is the rule of ``multiTrigger``, which overrides ``Trigger.labels``.
    """
    if opt.target_type == "all2all":
        return (labels + 1) % n_classes
    return torch.full_like(labels, opt.target_label)


def choose_poisoned(labels, opt, portion, gen):
    """Indices of the training images to poison, sorted int64 ``(round(portion * N),)``.

    all2one, multiLabel and all2all draw from all images; cleanLabel from the target class, classSpecific from the
    source class. Raises ``UserError`` if that class has too few.
    """
    count = int(portion * len(labels) + 0.5)
    pool = torch.arange(len(labels))
    if opt.target_type in ("cleanLabel", "classSpecific"):
        which = opt.target_label if opt.target_type == "cleanLabel" else opt.source_label
        pool = (labels.cpu() == which).nonzero().flatten()
        if count > len(pool):
            raise UserError(f"--inject_portion {portion}: {count} images of {len(labels)}, but class "
                            f"{which} has only {len(pool)}; at most {len(pool) / len(labels):.4g} is "
                            f"possible with --target_type {opt.target_type}")
    return pool[torch.randperm(len(pool), generator=gen)[:count]].sort().values


def choose_cover(labels, opt, trigger, poisoned, gen):
    """Indices of the cover samples (triggered, true label), sorted int64: none of them is poisoned.

    ``--cover_portion`` of the set, or the attack's own multiple of the poisoned; with classSpecific they are of other
    classes than the source. Raises ``UserError`` if there are too few images.
    """
    count = len(poisoned) if opt.target_type == "classSpecific" else round(trigger.cover_share * len(poisoned))
    if opt.cover_portion >= 0:
        count = int(opt.cover_portion * len(labels) + 0.5)
    free = torch.ones(len(labels), dtype=torch.bool)
    free[poisoned] = False
    if opt.target_type == "classSpecific":
        free &= labels.cpu() != opt.source_label
    pool = free.nonzero().flatten()
    if count > len(pool):
        raise UserError(f"--cover_portion: {count} cover samples are asked for, only {len(pool)} images are left "
                        f"beside the {len(poisoned)} poisoned ones; set it, or lower --inject_portion")
    return pool[torch.randperm(len(pool), generator=gen)[:count]].sort().values


def scored(labels, wanted, opt, part=None):
    """Which test images count for the attack success rate, bool ``(N,)``: those whose label the attacker changes.

    With classSpecific those of the source class only, or for the part "other classes" those of neither class.
    """
    counts = labels != wanted
    if opt.target_type == "classSpecific":
        counts &= (labels != opt.source_label) if part == OTHERS else (labels == opt.source_label)
    return counts


def parts(trigger):
    """Names of the variants of the trigger, or of the test images, whose success rate is measured apart."""
    return (*trigger.parts, OTHERS) if trigger.opt.target_type == "classSpecific" else trigger.parts


# ------------------------------------------------------------------------------------------------------------- making


def complete(opt, **changes):
    """``opt``, any object with some of the options of ``AttackConfig``, as an ``AttackConfig`` with all of them.

    ``changes`` that are not None win. Raises ``UserError`` for a value that the command line would refuse.
    """
    given = {f.name: getattr(opt, f.name) for f in fields(AttackConfig) if hasattr(opt, f.name)}
    given.update((name, value) for name, value in changes.items() if value is not None)
    given = {f.name: convert(f, given[f.name], "--") for f in fields(AttackConfig) if f.name in given}
    if given.get("trigger_type") == "auto":
        del given["trigger_type"]
    complete = AttackConfig(**given)
    complete.data = getattr(opt, "dataset", getattr(opt, "data", ""))  # to see if a clean network was trained on it
    complete.s_name = getattr(opt, "s_name", "WRN-16-1")  # what a clean network is, if its checkpoint does not tell
    complete.amp = getattr(opt, "amp", "auto")
    return complete


def make_trigger(opt, shape, state=None):
    """The trigger that ``opt.trigger_type`` names, for images of ``shape`` (C, H, W). Raises ``UserError``.

    ``state`` is the trigger's own part of a checkpoint, where it has one.
    """
    opt = complete(opt)
    if opt.trigger_type == "none":
        raise UserError("--trigger_type none: there is no trigger to make")
    if opt.trigger_type not in TRIGGERS:
        raise UserError(f"--trigger_type: one of {', '.join(sorted(TRIGGERS))}, none is allowed, "
                        f"got {opt.trigger_type!r}")
    cls = TRIGGERS[opt.trigger_type]
    if cls.clean_label_only and opt.target_type != "cleanLabel":
        raise UserError(f"--trigger_type {opt.trigger_type}: is made for --target_type cleanLabel, "
                        f"got {opt.target_type!r}")
    if opt.target_type == "multiLabel" and opt.trigger_type != "multiTrigger":
        raise UserError(f"--target_type multiLabel: is made for --trigger_type multiTrigger, got {opt.trigger_type!r}")
    if opt.target_type == "classSpecific" and opt.source_label == opt.target_label:
        raise UserError(f"--source_label {opt.source_label}: must differ from --target_label")
    return cls(shape, opt, state or None)


def draw(opt, *names):
    """The random stream of a trigger's fixed draw, for the use that ``names`` describe."""
    return generator(opt.trigger_seed, "trigger", *names)
