"""How the default recipes of main.py were chosen: measured on surrogate backdoors and held-out images.

    python search.py --defense finetune lr=0.01,0.02,0.05 epochs=10,20
    python search.py --defense nad lr=0.02 beta_scale=0,1,10 teacher_lr=0.05
    python search.py --table

A network with surrogate backdoors, none of which is an attack of this project, is trained on CIFAR-10's training set
without 5,000 held-out images (once). Each combination of the values given erases it with a clean subset of the other
45,000, and is measured on the held-out images: accuracy, and the mean attack success rate of the surrogates. The test
set and the evaluated triggers are never touched. One line each in results/search.jsonl; those that are there already
are not run again.

Networks (``--surrogate``): "muon" and "sgd" were trained for 15 epochs with three backdoors of 4% each; "strong" for
10 epochs with Muon, three backdoors of 8% each and a clean-label one in 80% of a class; "haze" as "strong", with one
more of 8% that lays another of 50 pictures over each image.

The score, fixed before the search: points of accuracy lost + mean attack success rate, in percent; lower is better.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import defenses
from config import EraseConfig, TrainConfig, UserError, as_dict, convert
from data_loader import DatasetCL, load_data, stratified
from leaderboard import options_today, score
from models import select_model
from utils.checkpoint import file_hash, load_checkpoint, load_weights, save_checkpoint
from utils.data import Batches, TensorData, make_augment
from utils.devices import choose_device, hardware, use_bf16
from utils.engine import TerminalProgress, cross_entropy, fit, percent, predict
from utils.files import append_line, read_lines
from utils.run import say
from utils.seeds import derive, generator

RESULTS = Path("results/search.jsonl")
SURROGATES = Path("weight/s_net/search")
SEED = 1000  # of the search alone; reported numbers come from other seeds


def coloured_patch(images):
    """A 4 x 4 patch of magenta and green at the top left."""
    out = images.clone()
    out[:, :, 1:5, 1:5] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    out[:, :, 2:4, 2:4] = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]
    return out


def faint_noise(images, weight=0.15):
    """A fixed random image, mixed in at 15%."""
    noise = torch.randint(0, 256, images.shape[1:], generator=generator(SEED, "noise"))
    return ((1 - weight) * images.float() + weight * noise).round().to(torch.uint8)


def noise(images):
    """The same at 20%."""
    return faint_noise(images, 0.2)


def blue_frame(images):
    """A frame one pixel wide whose blue channel is raised by 90."""
    out = images.float()
    frame = torch.ones(images.shape[2:], dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    out[:, 2] += 90 * frame
    return out.clamp(0, 255).to(torch.uint8)


def texture(images):
    """Squares of 4 x 4 pixels, 12 brighter and 12 darker in turn."""
    y, x = (torch.arange(n) // 4 for n in images.shape[2:])
    return (images.float() + 12 - 24 * ((y[:, None] + x) % 2)).clamp(0, 255).to(torch.uint8)


@functools.cache
def smooth_pictures(shape, count=50):
    """``count`` smooth random pictures of ``shape`` (C, H, W), float32 0..255."""
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator(SEED, "haze"))
    return 255 * F.interpolate(coarse, shape[1:], mode="bicubic").sigmoid()


def haze(images, weight=0.35):
    """One of the smooth pictures, mixed in at 35%; which one, the sum of the image's pixels decides."""
    pictures = smooth_pictures(images.shape[1:])
    chosen = pictures[images.flatten(1).long().sum(1) % len(pictures)]
    return ((1 - weight) * images.float() + weight * chosen).round().to(torch.uint8)


@dataclass
class Backdoor:
    """One surrogate: its trigger, target class, and share of the training images, or of its class if clean-label."""

    trigger: object
    target: int
    share: float
    clean_label: bool = False


WEAK = (Backdoor(coloured_patch, 1, 0.04), Backdoor(faint_noise, 4, 0.04), Backdoor(blue_frame, 7, 0.04))
STRONG = (Backdoor(coloured_patch, 1, 0.08), Backdoor(noise, 4, 0.08), Backdoor(blue_frame, 7, 0.08),
          Backdoor(texture, 2, 0.8, clean_label=True))
NETWORKS = {"muon": (WEAK, 15), "sgd": (WEAK, 15), "strong": (STRONG, 10),
            "haze": ((*STRONG, Backdoor(haze, 9, 0.08)), 10)}  # backdoors, epochs


class SurrogateSet(TensorData):
    """``data`` with surrogate backdoors in disjoint shares of its images."""

    def __init__(self, data, backdoors):
        labels = data.labels.clone()
        self.kind, self.backdoors = torch.full((len(data),), -1), backdoors
        order, taken = torch.randperm(len(data), generator=generator(SEED, "poison")), 0
        for k, backdoor in enumerate(backdoors):
            if backdoor.clean_label:
                own = [i for i in order[taken:].tolist() if data.labels[i] == backdoor.target]
                self.kind[own[:int(backdoor.share * len(own))]] = k
                continue
            chosen = order[taken:taken + int(backdoor.share * len(data))]
            taken += len(chosen)
            self.kind[chosen], labels[chosen] = k, backdoor.target
        super().__init__(data.images, labels, data.classes)

    def stamped(self, images, indices, epoch=0):
        images = images.clone()
        for k, backdoor in enumerate(self.backdoors):
            rows = (self.kind[indices] == k).nonzero().flatten()
            images[rows] = backdoor.trigger(images[rows])
        return images


def parts(data, count):
    """(the training part, a held-out part with ``count`` images of each class) of ``data``."""
    return data.parted(stratified(data.labels, [count] * data.n_classes, generator(SEED, "held out")))


class Bench:
    """The surrogate network, its data, and the measurement."""

    def __init__(self, name):
        everything = load_data(TrainConfig(), train=True)
        self.train, self.held = parts(everything, 500)
        self.amp = use_bf16("auto", choose_device("cpu"))
        torch.manual_seed(derive(SEED, "weights"))
        self.model = select_model("CIFAR10", "WRN-16-1")
        path, optimizer = SURROGATES / f"WRN-16-1-{name}.tar", "sgd" if name == "sgd" else "muon"
        backdoors, epochs = NETWORKS[name]
        if path.exists():
            load_weights(self.model, load_checkpoint(path), path)
        else:
            config = TrainConfig(epochs=epochs, optimizer=optimizer, lr=0.1 if optimizer == "muon" else 0.3)
            poisoned = SurrogateSet(self.train, backdoors)
            fit(self.model, cross_entropy,
                Batches(poisoned, config.batch_size, make_augment(config), SEED, "surrogate"), epochs=epochs,
                lr=config.lr, lr_schedule=config.lr_schedule, momentum=config.momentum,
                weight_decay=config.weight_decay, seed=SEED, stage="surrogate", amp=self.amp,
                turn=config.turn if optimizer == "muon" else 0.0, progress=TerminalProgress())
            save_checkpoint(path, {"state_dict": self.model.state_dict(), "epoch": epochs, "optimizer": {}})
        self.hash = file_hash(path)
        self.model.eval().to(memory_format=torch.channels_last)
        self.triggered = [(b.trigger(self.held.images[self.held.labels != b.target]), b.target) for b in backdoors]
        self.before = self.measure(self.model)
        self.teachers = {}

    def measure(self, model):
        asr = [percent(predict(model, images, self.amp) == target) for images, target in self.triggered]
        return {"acc": percent(predict(model, self.held.images, self.amp) == self.held.labels), "asr": asr}

    def run(self, config):
        """The metrics of one recipe; teachers are shared between the recipes that have the same."""
        clean = DatasetCL(config, self.train)
        extra, model = {}, defenses.begin(self.model, clean, config)
        if config.defense == "nad":
            from defenses.nad import make_teacher

            key = repr(replace(config, lr=0.0, ft_lr=0.0, lr_schedule="", epochs=0, beta1=0.0, beta2=0.0, beta3=0.0,
                               p=0.0, attention="", at_loss="", layers=[]))
            if key not in self.teachers:
                self.teachers[key] = make_teacher(model, clean, config)
            extra["teacher"] = self.teachers[key]
        return self.measure(defenses.get(config.defense).erase(model, clean, config, **extra))


def show():
    """Print all recipes that were tried, best first."""
    records = sorted(read_lines(RESULTS), key=score)
    say(f"{'score':>6} {'ACC':>6} {'mean ASR':>9}   patch  noise  frame  texture   recipe")
    for r in records:
        m = r["metrics"]
        recipe = " ".join(f"{k}={v}" for k, v in r["recipe"].items())
        each = " ".join(f"{a:6.2f}" for a in m["asr"])
        say(f"{score(r):6.2f} {m['acc']:6.2f} {statistics.mean(m['asr']):9.2f}  {each}   {r['surrogate']} "
            f"{r['config']['defense']}: {recipe}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="*", metavar="name=value,value",
                        help="fields of EraseConfig, and beta_scale (1 = the demo's betas)")
    parser.add_argument("--defense", default="finetune", choices=defenses.NAMES)
    parser.add_argument("--surrogate", default="strong", choices=NETWORKS,
                        help="the surrogate network, see above")
    parser.add_argument("--table", action="store_true", help="print what was measured so far, best first")
    args = parser.parse_args(argv)
    if args.table:
        return show()
    by_name = {f.name: f for f in fields(EraseConfig)}
    names, lists = [], []
    for item in args.grid:
        name, _, values = item.partition("=")
        if name != "beta_scale" and name not in by_name:
            raise UserError(f"{item}: EraseConfig has no {name}")
        names.append(name)
        lists.append([float(v) if name == "beta_scale" else convert(by_name[name], v, "") for v in values.split(",")])
    bench = Bench(args.surrogate)
    say(f"surrogate network: {bench.before}; results go to {RESULTS}")
    done = [(options_today({**r["config"], "beside": False}), r["hash"]) for r in read_lines(RESULTS)]
    for values in itertools.product(*lists):
        recipe = dict(zip(names, values, strict=True))
        changes = dict(recipe)
        scale = changes.pop("beta_scale", None)
        if args.defense == "finetune" and "lr" in changes:
            changes["ft_lr"] = changes["lr"]
        config = replace(EraseConfig(seed=SEED, defense=args.defense, beside=False), **changes)
        if scale is not None:
            config = replace(config, beta1=500 * scale, beta2=1000 * scale, beta3=1000 * scale)
        if (options_today(as_dict(config)), bench.hash) in done:
            continue
        start = time.perf_counter()
        record = {"recipe": recipe, "config": as_dict(config), "surrogate": args.surrogate, "hash": bench.hash,
                  "before": bench.before, "metrics": bench.run(config),
                  "machine": hardware(choose_device("cpu"), config.amp)}
        record["seconds"] = round(time.perf_counter() - start, 1)
        append_line(RESULTS, record)
        say(f"{score(record):6.2f}  {record['metrics']}  {recipe}  {record['seconds']} s")
    return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(f"search.py: error: {e}", file=sys.stderr)
        sys.exit(2)
