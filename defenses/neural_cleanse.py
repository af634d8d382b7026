"""Neural Cleanse (Wang et al., IEEE S&P 2019): reverse-engineer a trigger for every label; a small one betrays itself.

    min over mask m, pattern d of  CE(f((1 - m) x + m d), t) + lambda_t ||m||_1      for every label t

m (H, W) and d (C, H, W) run through tanh into [0, 1]. All labels are optimised at once, as a batch dimension of their
own. lambda_t starts at ``--nc_lambda`` and is multiplied by 1.5 when the success rate was at least 99% in 5 checks in a
row, divided by 1.5^1.5 when it was below in 5; the smallest mask of a check that reached 99% counts. A label whose
mask's l1 norm is an outlier on the small side (anomaly index above 2) is taken for a backdoor's target.

Shorter than the paper's code [ours]: ``--nc_steps`` are steps of Adam, 1,000 in all and not about 31,000, and a check
sees the images of 10 of them (320 by default, not 1,000).

As mitigation (``--nc_mitigation``): "unlearn" fine-tunes with the reversed triggers on a fifth of the clean subset
under true labels, for ``--epochs`` [paper: one]; "prune" switches off, in the last layer, the channels that they raise
most, until the reversed trigger fails on held-out images (which it was made with, too). Where no label stands out, the
network stays as it is.
"""

import itertools
import time

import torch
import torch.nn.functional as F

from config import UserError
from defenses import pruning
from defenses.finetune import clean_batches, recipe
from utils.channels import accuracy, channel_norms, last_layer, pruned_gradually, split_off, zero_channels
from utils.checkpoint import cached, tensor_hash
from utils.data import TensorData, masked, to_float
from utils.devices import use_bf16
from utils.engine import Progress, autocast, clone, cross_entropy, fit, percent, predict
from utils.seeds import generator

TITLE = "Neural Cleanse"
USES = ("pruning", "channels", "finetune")

SUCCESS, PATIENCE = 0.99, 5  # [paper's code]
RAISE = 1.5  # [ours; paper's code: 2]
CHECK_EVERY = 10  # steps over which a success rate is taken [ours]
WORKS = 0.5  # share of clean images that a trigger must send to its label to count [ours]
# Share of the median mask below which detect.py calls an outlier a backdoor. Measured first: 0.11 for the target of
# BadNets; 0.77 for the smallest mask of a clean network, whose index is above 2 only since the others are much alike.
# ``erase`` unlearns the triggers of these too: an erased false alarm costs less than a backdoor that stays.
SMALL = 0.5
AT_ONCE = 10  # labels in one batched optimisation
VERSION = 1  # of the search: results of another one are not taken from the cache


class Triggers:
    """Reversed triggers of ``labels``: ``masks`` (L, 1, H, W) and ``patterns`` (L, C, H, W), float32 in [0, 1].

    ``norms`` (L,): the l1 norms of the masks, in pixels; ``success`` (L,): shares of clean images that each sends to
    its label; ``seconds``: what the search took, where it was measured.
    """

    def __init__(self, labels, masks, patterns, success):
        self.labels, self.masks, self.patterns, self.success = labels, masks, patterns, success
        self.norms, self.seconds = masks.sum((1, 2, 3)), None

    def stamp(self, images, k):
        """uint8 ``images`` (N, C, H, W) with the triggers number ``k``, an int or int64 ``(N,)``."""
        size = 1000  # at once, for the memory
        which = k.split(size) if torch.is_tensor(k) else itertools.repeat(k)
        return torch.cat([self.stamp_some(part, k) for part, k in zip(images.split(size), which, strict=False)])

    def stamp_some(self, images, k):
        return masked(images, self.masks[k].to(images.device), self.patterns[k].to(images.device))


def anomaly_indices(norms):
    """``|n - median| / (1.4826 MAD)`` of each of ``norms`` (L,); those above the median get a negative sign.

    1.4826 makes MAD, the median absolute deviation, a standard deviation if the norms were normal. The median of an
    even number is the mean of the middle two.
    """
    norms = norms.cpu().double()
    off = norms - norms.quantile(0.5)
    mad = 1.4826 * off.abs().quantile(0.5)
    return -off / mad.clamp(min=1e-12)


def reverse(model, data, config, labels=None, progress=None):
    """The smallest triggers that send the images of ``data`` (``TensorData``) to each of ``labels`` (default: all)."""
    device = next(model.parameters()).device
    labels = list(range(data.n_classes)) if labels is None else list(labels)
    parts = [reverse_some(model, data.to(device), config, labels[k:k + AT_ONCE], progress)
             for k in range(0, len(labels), AT_ONCE)]
    found = [torch.cat([getattr(part, name) for part in parts]) for name in ("masks", "patterns", "success")]
    return Triggers(labels, *found)


def reversed_before(model, data, config, progress=None):
    """``reverse`` for all labels; what was found is kept in data/triggers, unless ``config.save`` is off."""
    fresh = []

    def search():
        start = time.perf_counter()
        found = reverse(model, data, config, progress=progress)
        fresh.append(found)
        return {**{name: getattr(found, name) for name in ("labels", "masks", "patterns", "success")},
                "seconds": time.perf_counter() - start}

    if getattr(config, "save", True):
        digest = tensor_hash(*model.state_dict().values(), data.images)
        device = next(model.parameters()).device
        key = (VERSION, digest, probe(model, data.images), data.n_classes, config.s_name, config.normalize, str(device),
               use_bf16(config.amp, device), config.seed, config.nc_steps, config.nc_batch_size, config.nc_lr,
               config.nc_lambda)
        made = cached("reversed", key, search)
    else:
        made = search()
    if progress and not fresh:
        progress.saved_time(made["seconds"])
    there = data.images.device
    found = Triggers(made["labels"], *(made[name].to(there) for name in ("masks", "patterns", "success")))
    found.seconds = made["seconds"]
    return found


@torch.no_grad()
def probe(model, images):
    """The logits of ``model`` for some of ``images``, in hundredths: its weights do not tell of hooks."""
    some = to_float(images[:8]).to(next(model.parameters()))
    return (100 * clone(model).eval()(some).float()).round().tolist()


def judged(hits, sizes, best_norm):
    """(which labels' masks succeeded, which of these are the smallest so far), bool ``(L,)``: ``hits`` are the shares
    of hits, summed over the steps since the last check, ``sizes`` the masks' l1 norms, ``best_norm`` the smallest."""
    good = hits / CHECK_EVERY >= SUCCESS
    return good, good & (sizes < best_norm)


def adapted(weight, above, below, good):
    """(lambda_t of each label, float32 (L,), checks in a row that reached 99%, those that did not, int64 (L,)) after a
    check that reached it where ``good``, bool (L,)."""
    above, below = torch.where(good, above + 1, 0), torch.where(good, 0, below + 1)
    weight = torch.where(above >= PATIENCE, weight * RAISE, weight)
    weight = torch.where(below >= PATIENCE, weight / RAISE**1.5, weight)
    return weight, above % PATIENCE, below % PATIENCE


def reverse_some(model, data, config, labels, progress):
    model = clone(model).eval().requires_grad_(False)
    device, (c, h, w), n, b = data.images.device, data.shape, len(labels), min(config.nc_batch_size, len(data))
    gen = generator(config.seed, "neural cleanse", *map(str, labels))
    raw_mask = (torch.rand(n, 1, h, w, generator=gen).to(device) * 2 - 1).requires_grad_()
    raw_pattern = (torch.rand(n, c, h, w, generator=gen).to(device) * 2 - 1).requires_grad_()
    adam = torch.optim.Adam([raw_mask, raw_pattern], lr=config.nc_lr, betas=(0.5, 0.9))
    weight = torch.full((n,), config.nc_lambda, device=device)
    wanted = torch.tensor(labels, device=device)
    above, below = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
    best_norm, hits = torch.full((n,), float("inf"), device=device), torch.zeros(n, device=device)
    best_mask, best_pattern = torch.ones(n, 1, h, w, device=device), torch.zeros(n, c, h, w, device=device)
    chosen = torch.randint(0, len(data), (config.nc_steps, b), generator=gen).to(device)
    amp = use_bf16(config.amp, device)
    with (progress or Progress()).bar(f"labels {labels[0]}-{labels[-1]}", 0, 1, config.nc_steps) as bar:
        for step in range(config.nc_steps):
            x = to_float(data.images[chosen[step]])
            m, d = (torch.tanh(raw) / 2 + 0.5 for raw in (raw_mask, raw_pattern))
            triggered = ((1 - m[:, None]) * x + (m * d)[:, None]).flatten(0, 1)  # (n b, C, H, W)
            with autocast(device, amp):
                logits = model(triggered.contiguous(memory_format=torch.channels_last))
            targets = wanted.repeat_interleave(b)
            ce = F.cross_entropy(logits.float(), targets, reduction="none").view(n, b).mean(1)
            sizes = m.sum((1, 2, 3))
            adam.zero_grad()
            (ce + weight * sizes).sum().backward()
            with torch.no_grad():
                hits += (logits.argmax(1) == targets).view(n, b).float().mean(1)
                if step % CHECK_EVERY == CHECK_EVERY - 1:
                    good, better = judged(hits, sizes, best_norm)
                    best_norm = torch.where(better, sizes, best_norm)
                    best_mask = torch.where(better[:, None, None, None], m, best_mask)
                    best_pattern = torch.where(better[:, None, None, None], d, best_pattern)
                    weight, above, below = adapted(weight, above, below, good)
                    hits.zero_()
            adam.step()
            if bar is not None:
                bar.update()
    never = ~torch.isfinite(best_norm)[:, None, None, None]  # no check reached 99%: the last one is what there is
    with torch.no_grad():
        best_mask, best_pattern = torch.where(never, m, best_mask), torch.where(never, d, best_pattern)
    found = Triggers(labels, best_mask.detach(), best_pattern.detach(), None)
    found.success = torch.stack([(predict(model, found.stamp(data.images, k)) == t).float().mean()
                                 for k, t in enumerate(labels)])
    return found


def outliers(triggers, limit=2.0):
    """The positions in ``triggers.labels`` of the labels whose masks are small outliers and work, smallest first."""
    index = anomaly_indices(triggers.norms)
    order = triggers.norms.argsort()
    return [k for k in order.tolist() if index[k] > limit and triggers.success[k] >= WORKS]


class Restamped(TensorData):
    """``data`` of which a share, drawn once, carries one of the ``triggers`` number ``which`` under its true label."""

    def __init__(self, data, triggers, which, share, seed):
        super().__init__(data.images, data.labels, data.classes)
        gen = generator(seed, "unlearn")
        self.triggers = triggers
        self.kind = torch.full((len(data),), -1)
        chosen = torch.randperm(len(data), generator=gen)[:round(share * len(data))]
        self.kind[chosen] = torch.tensor(which)[torch.randint(0, len(which), (len(chosen),), generator=gen)]

    def stamped(self, images, indices, epoch=0):
        rows = (self.kind[indices] >= 0).nonzero().flatten()
        there, out = rows.to(images.device, non_blocking=True), images.clone()
        which = self.kind[indices[rows]].to(self.triggers.masks.device, non_blocking=True)
        out[there] = self.triggers.stamp(images[there], which)
        return out


def success(model, data, triggers, k):
    """Percent of the images of ``data`` that the trigger number ``k`` sends to its label, others than its own."""
    there = data.labels != triggers.labels[k]
    return percent(predict(model, triggers.stamp(data.images[there], k)) == triggers.labels[k])


def raised(model, layer, images, triggers, which):
    """How much the triggers number ``which`` raise the norms of each channel of ``layer`` at most: a dict as
    ``channel_norms`` gives it, float32 ``(channels,)`` each."""
    clean = channel_norms(model, layer, images)
    stamped = [channel_norms(model, layer, triggers.stamp(images, k)) for k in which]
    return {norm: torch.stack([s[norm] - before for s in stamped]).amax(0) for norm, before in clean.items()}


def prune(model, clean_data, config, triggers, which):
    """Switch off the channels that the triggers raise most, until they fail (success < 5%) or accuracy drops."""
    rest, held = split_off(clean_data, config.held_out, config.seed)
    layer = last_layer(model, rest.images, config.prune_layer)
    order = raised(model, layer, rest.images, triggers, which)["l1"].argsort(descending=True)
    floor = accuracy(model, held) - config.prune_drop
    for k, pruned in pruned_gradually(model, layer, order):
        if k and accuracy(pruned, held) < floor:
            break
        count = k
        if max(success(pruned, held, triggers, j) for j in which) < 5:
            break
    model = clone(model).eval()
    zero_channels(model, layer, order[:count])
    return model


def enough_labels(data):
    """Raise ``UserError`` if there is nothing to be an outlier of."""
    if data.n_classes < 3:
        raise UserError(f"Neural Cleanse compares the labels with each other; {data.n_classes} are too few for that")


def check(model, clean_data, config):
    """Raise ``UserError`` for a clean subset or layer that will not do."""
    enough_labels(clean_data)
    if config.nc_mitigation == "prune":
        pruning.check(model, clean_data, config)


def erase(model, clean_data, config, progress=None):
    """A copy of ``model`` in which the triggers that were found on ``clean_data`` are unlearned or pruned."""
    clean_data = clean_data.to(next(model.parameters()).device)
    triggers = reversed_before(model, clean_data, config, progress)
    which = outliers(triggers)
    if progress:
        names = ", ".join(str(triggers.labels[k]) for k in which)
        progress.note(f"Neural Cleanse suspects label {names}" if which else
                      "Neural Cleanse suspects no label: the network stays as it is")
    if not which:
        return clone(model).eval()
    if config.nc_mitigation == "prune":
        return prune(model, clean_data, config, triggers, which)
    data = Restamped(clean_data, triggers, which, config.nc_share, config.seed)
    return fit(clone(model), cross_entropy, clean_batches(data, config, "finetune"), epochs=config.epochs,
               lr=config.ft_lr, flag="ft_lr", lr_schedule=config.lr_schedule, stage="neural_cleanse", progress=progress,
               **recipe(model, config))
