"""One training loop and one evaluation for every script and every defense.

A loss is a function ``loss(model, images, labels) -> (loss, logits)``: cross-entropy, NAD and their like all fit, with
one forward pass of the trained network a step (two would update its BatchNorm statistics twice).
"""

import contextlib
import copy
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import UserError
from utils.data import to_float
from utils.optim import make_optimizer, rate
from utils.seeds import derive


def cross_entropy(model, images, labels):
    """Mean cross-entropy of a batch: images ``(B, C, H, W)`` in [0, 1], labels int64 ``(B,)`` -> (loss, logits)."""
    logits = model(images)
    return F.cross_entropy(logits, labels), logits


def autocast(device, enabled):
    """bf16 mixed precision on ``device`` if ``enabled``, else float32."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def has_tiny_maps(model, images):
    """Whether a convolution larger than 1 x 1 in ``model`` gets a feature map of one pixel from ``images``.

    ``images``: float32 ``(B, C, H, W)``. In bf16 the weight gradient of such a convolution is not determined on the CPU
    with torch 2.15 if its stride is 2: runs differ, in some it is not finite.
    """
    found, probe = [], clone(model).eval()
    for module in probe.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].shape[2:].numel() == 1))
    with torch.no_grad():
        probe(images)
    return any(found)


def train_one_epoch(model, loss, batches, epoch, optimizer, rate_at, amp=False, bar=None, team=None):
    """Train ``model``, in the mode it is in, on ``batches.epoch(epoch)``.

    ``rate_at(t)`` is the factor of the learning rate at epoch ``t``, a fraction. Returns (mean loss, accuracy in
    percent on the augmented batches). The sums stay on the device until the end of the
    epoch, so that no step waits for it.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    seen = 0
    base = [group["lr"] for group in optimizer.param_groups]
    for k, (images, labels) in enumerate(batches.epoch(epoch)):
        factor = rate_at(epoch + (k + 0.5) / len(batches))
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        with autocast(device, amp):
            value, logits = loss(model, images, labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        total[0] += value.detach() * len(labels)
        total[1] += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
        if bar is not None:
            bar.update()
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    total /= seen
    mean_loss, right = (team.mean(total) if team else total).tolist()
    return mean_loss, 100 * right


@torch.inference_mode()
def predict(model, images, amp=False, sound=False):
    """Predicted classes, int64 ``(N,)``, of uint8 ``images`` (N, C, H, W), with ``model`` in eval mode.

    Raises ``UserError`` for answers that are not finite, if ``sound``.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    at_32 = 250 if device.type == "cpu" else 2500  # images at 32 x 32; the fastest of 100 to 1000 on the CPU
    batch_size = max(1, at_32 * 32 * 32 // (images.shape[2] * images.shape[3]))
    predicted, finite = [], []
    for part in images.split(batch_size):
        with autocast(device, amp):
            logits = model(to_float(part.to(device)))
        predicted.append(logits.argmax(1))
        finite += [logits.isfinite().all()] if sound else []
    model.train(was_training)
    if sound and not torch.stack(finite).all():
        raise UserError("the network's answers are not finite numbers: there is nothing to measure")
    return torch.cat(predicted)


def evaluate(model, clean_test, backdoor_test=None, target=None, amp=False, parts=None):
    """The evaluation protocol, in percent.

    clean_acc: accuracy on the whole ``clean_test`` (``TensorData``); clean_acc_non_target: without class ``target``
    (None if there is none); asr: share of ``backdoor_test`` (``DatasetBD`` in mode test) that is classified as the
    attacker wants; ra: share of it that is classified as its true class. The last two are None without a trigger.
    parts: the success rate on each of ``parts``, {name: ``DatasetBD``}, if there are any.
    """
    device = next(model.parameters()).device
    labels = clean_test.labels.to(device)
    right = predict(model, clean_test.images, amp, sound=True) == labels
    result = {"clean_acc": percent(right), "clean_acc_non_target": None, "asr": None, "ra": None}
    if target is not None:
        result["clean_acc_non_target"] = percent(right[labels != target])
    if backdoor_test is not None:
        predicted = predict(model, backdoor_test.images, amp)
        result["asr"] = percent(predicted == backdoor_test.labels.to(device))
        result["ra"] = percent(predicted == backdoor_test.true_labels.to(device))
    if parts:
        result["parts"] = {name: percent(predict(model, part.images, amp) == part.labels.to(device))
                           for name, part in parts.items()}
    return result


def percent(hits):
    """Share of true values in the bool tensor ``hits``, in percent, to two decimals."""
    return round(100 * hits.sum().item() / len(hits), 2)


def batchnorms(model):
    """The BatchNorm layers of ``model``, a list."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def settle_batchnorm(model, batches, epoch=0, amp=False):
    """Replace BatchNorm's statistics in ``model`` by their mean over ``batches.epoch(epoch)``. Returns ``model``.

    Training leaves an average of the last ten batches or so, taken while the weights moved; with few images that is
    noisy enough to cost accuracy [Wu and Johnson 2021, arXiv 2105.07576: "precise BatchNorm"]. ``batches`` should be
    augmented as in training: the black of crops and holes is in the statistics that the weights were trained with.
    """
    norms = batchnorms(model)
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches, which are of the same size
        m.train()
    for images, _ in batches.epoch(epoch):
        with autocast(images.device, amp):
            model(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


class Progress:
    """What ``fit`` tells its caller: where a stage stands, and when an epoch or a stage is done. This one is silent."""

    def load(self, stage):
        """The saved state of ``stage``, a dict from ``save``, or None to start it."""
        return None

    def save(self, stage, state):
        """``state`` (weights, optimiser, epochs done, history) is what ``load`` must give back to go on from here."""

    def epoch_done(self, stage, model, record):
        """``record``: epoch (from 1), epochs, loss, train_acc, seconds; may be extended."""

    def stage_done(self, stage, model):
        """``model`` is what the stage made."""

    def note(self, text):
        """Something that the user of a defense should know, one line."""

    def saved_time(self, seconds):
        """A result was taken from a cache; making it took ``seconds``."""

    def bar(self, stage, epoch, epochs, steps):
        """A progress bar with ``update()`` for the ``steps`` of an epoch, as a context manager giving it or None."""
        return contextlib.nullcontext()


class TerminalProgress(Progress):
    """Progress on the terminal: a bar for each epoch on stderr if it is a terminal."""

    def bar(self, stage, epoch, epochs, steps):
        return tqdm(total=steps, desc=f"{stage} {epoch + 1}/{epochs}", leave=False, disable=None, unit="step",
                    mininterval=0.2)

    def note(self, text):
        tqdm.write(text, file=sys.stdout)


def fit(model, loss, batches, *, epochs, lr, lr_schedule, momentum, weight_decay, seed, stage, amp=False,
        compiled=False, turn=0.0, nesterov=True, freeze_bn=False, precise_bn=False, progress=None, team=None,
        flag="lr"):
    """Train ``model`` in place with ``loss`` for ``epochs``; the last epoch is the result. Returns ``model``.

    The optimiser is SGD, or Muon if ``turn`` is not 0 (``utils/optim.py``). ``lr_schedule`` is a name that ``rate``
    knows, or a function of the losses of the epochs so far, a list, that gives the factor of the learning rate in the
    next; ``flag`` is the option that ``lr`` came from. ``freeze_bn`` keeps the statistics of BatchNorm as they are,
    ``precise_bn`` takes them anew at the end, over one more epoch of ``batches``.
    ``team`` (``utils.parallel.Team``): the processes that train together. An interrupted stage goes on from
    ``progress.load(stage)``; everything random depends on ``seed``, the batches and the epoch, so that it ends with the
    same weights. Raises ``UserError`` if the loss stops being finite; what ``progress`` saved last is from before that.
    """
    progress = progress or Progress()
    device = next(model.parameters()).device
    if device.type != "mps":
        model.to(memory_format=torch.channels_last)
    optim = make_optimizer(model, lr, momentum, weight_decay, turn, nesterov)
    first, history = 0, []
    state = progress.load(stage)
    if team:
        state = team.from_first(state)
    if state:
        model.load_state_dict(state["state_dict"])
        optim.load_state_dict(state["optimizer"])
        first, history = state["epoch"], state["history"]
    runner = team.spread(model) if team else model
    if compiled:
        runner = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)
    if amp and device.type == "cpu" and has_tiny_maps(model, to_float(batches.data.images[:2])):
        progress.note(f"note: {stage}: trained in float32, since the network shrinks these images to one pixel, where "
                      f"gradients in bf16 are not reliable")
        amp = False
    for epoch in range(first, epochs):
        shared = [team.rank] if team and team.rank else []
        torch.manual_seed(derive(seed, batches.name, "layers", epoch, *shared))  # dropout and the like
        start = time.perf_counter()
        model.train()
        if freeze_bn:
            for module in batchnorms(model):
                module.eval()
        rate_at = schedule(lr_schedule, epochs, [r["loss"] for r in history])
        with progress.bar(stage, epoch, epochs, len(batches)) as bar:
            mean_loss, acc = train_one_epoch(runner, loss, batches, epoch, optim, rate_at, amp, bar, team)
        if not math.isfinite(mean_loss) or not all(torch.isfinite(p).all() for p in model.parameters()):
            kept = "the last good checkpoint is kept. " if epoch else ""
            advice = f"Try a smaller --{flag} than {lr:g}" if lr else "Are the weights and the images all right?"
            raise UserError(f"{stage}: the loss is not finite in epoch {epoch + 1}; {kept}{advice}")
        record = {"stage": stage, "epoch": epoch + 1, "epochs": epochs, "loss": round(mean_loss, 4),
                  "train_acc": round(acc, 2), "seconds": round(time.perf_counter() - start, 2)}
        history.append(record)
        progress.epoch_done(stage, model, record)
        progress.save(stage, {"state_dict": model.state_dict(), "optimizer": optim.state_dict(), "epoch": epoch + 1,
                              "history": history})
    if precise_bn:
        settle_batchnorm(model, batches, epochs, amp)
    model.eval()
    progress.stage_done(stage, model)
    return model


def schedule(lr_schedule, epochs, losses):
    """The factor of the learning rate as a function of the time, in epochs, after epochs with ``losses``."""
    if callable(lr_schedule):
        factor = lr_schedule(losses)
        return lambda t: factor
    return lambda t: rate(lr_schedule, t, epochs)


def clone(model):
    """A copy of ``model`` that shares nothing with it, all its parameters trainable."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.requires_grad_(True)
    return copied
