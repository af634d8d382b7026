"""How fast it is, against the usual way, in one run: medians of interleaved rounds on this machine.

    python speed.py                                 # CIFAR-10, WRN-16-1
    python speed.py --dataset shapes10 --rounds 3

The usual way, written plainly below: PIL images through torchvision transforms, a DataLoader with two workers, float32
in NCHW memory. This project's way: uint8 tensors on the device, augmentation on whole batches, channels-last memory,
bf16 where the hardware computes it. Both train the same network on the same poisoned images with SGD; the erasing step
has the NAD loss. Prints images per second and their ratio, and where the memory and the first seconds go; writes
nothing.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import attacks
from config import EraseConfig, TrainConfig, UserError
from data_loader import DatasetBD, DatasetCL, load_data
from defenses.nad import NADLoss
from models import select_model
from utils.checkpoint import versions
from utils.data import Batches, make_augment
from utils.devices import choose_device, use_bf16
from utils.engine import autocast, cross_entropy
from utils.optim import make_optimizer


class PlainImages(Dataset):
    """PIL images, poisoned beforehand, through torchvision transforms one by one."""

    def __init__(self, data):
        from torchvision import transforms

        images = data.stamped(data.images, torch.arange(len(data))).cpu().permute(0, 2, 3, 1).numpy()
        self.images = [Image.fromarray(image) for image in images]
        self.labels = data.labels.tolist()
        self.transform = transforms.Compose([transforms.RandomCrop(data.shape[1], padding=4),
                                             transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def usual_batches(data, batch_size, device):
    """Endless batches the usual way."""
    loader = DataLoader(PlainImages(data), batch_size, shuffle=True, num_workers=2, drop_last=True,
                        pin_memory=device.type == "cuda", persistent_workers=True)
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def own_batches(data, batch_size, config):
    """Endless batches of this project."""
    batches, epoch = Batches(data, batch_size, make_augment(config), seed=0), 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


class Runner:
    """A network that trains on ``stream`` with ``loss``; ``seconds(n)`` times ``n`` steps."""

    def __init__(self, stream, loss, amp, channels_last, device):
        torch.manual_seed(0)
        self.model = select_model("CIFAR10", "WRN-16-1").to(device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.train()
        self.stream, self.loss, self.amp, self.device = stream, loss, amp, device
        self.optimizer = make_optimizer(self.model, 0.05, 0.9, 5e-4)

    def seconds(self, steps):
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            images, labels = next(self.stream)
            with autocast(self.device, self.amp):
                value, _ = self.loss(self.model, images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def teacher_loss(device, channels_last):
    torch.manual_seed(1)
    teacher = select_model("CIFAR10", "WRN-16-1").to(device)
    if channels_last:
        teacher.to(memory_format=torch.channels_last)
    return NADLoss(teacher, teacher.feature_layers, [500.0, 1000.0, 1000.0])


def compare(name, usual, own, batch_size, steps, rounds):
    """Time both in turns, ``rounds`` times after one to warm up, and print medians."""
    times = {"usual": [], "own": []}
    for k in range(rounds + 1):
        for which, runner in (("usual", usual), ("own", own)):
            seconds = runner.seconds(steps)
            if k:
                times[which].append(batch_size * steps / seconds)
    usual_rate, own_rate = (statistics.median(times[w]) for w in ("usual", "own"))
    ratio = statistics.median(b / a for a, b in zip(times["usual"], times["own"], strict=True))
    print(f"{name:<24}{usual_rate:12,.0f}{own_rate:12,.0f}{ratio:9.2f}x", flush=True)


def own_process(code):
    """Seconds that ``code`` takes in a Python process of its own, and that process's peak memory in GiB."""
    code += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, cwd=Path(__file__).parent)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024**2


def stamping_rates(config, train):
    """Text with the rate of every trigger but the generator's, stamping a quarter of the set at once."""
    part = train.images[:len(train) // 4]
    rates = []
    for name in sorted(set(attacks.TRIGGERS) - {"inputAwareTrigger"}):
        try:
            trigger = attacks.make_trigger(replace(config, trigger_type=name, target_type="cleanLabel" if
                                                   attacks.TRIGGERS[name].clean_label_only else "all2one"), train.shape)
        except UserError:
            continue  # no clean network for these images
        trigger.see(train.images)
        times = []
        for _ in range(4):
            synchronize(part.device)
            start = time.perf_counter()
            trigger(part)
            synchronize(part.device)
            times.append(time.perf_counter() - start)
        rates.append(f"{name.removesuffix('Trigger')} {len(part) / min(times) / 1e6:.3g}")
    return ", ".join(rates)


FIRST_STEP = """
import train_badnet
from config import TrainConfig
from utils.optim import Muon
class Done(Exception): pass
def stop(*_args): raise Done
Muon.step = stop
try: train_badnet.main(TrainConfig(dataset={dataset!r}, device={device!r}, save=False))
except Done: pass
"""
TWO_EPOCHS = """
import main
from config import EraseConfig
main.main(EraseConfig(dataset={dataset!r}, device={device!r}, save=False, epochs=1, teacher_epochs=1))
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="CIFAR10", choices=("CIFAR10", "shapes10"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="steps a round")
    args = parser.parse_args(argv)
    config = TrainConfig(dataset=args.dataset)
    erase = EraseConfig(dataset=args.dataset)
    device = choose_device(args.device)
    amp = use_bf16("auto", device)
    print(f"{device}, {torch.get_num_threads()} threads, {'bf16' if amp else 'float32'}, torch {versions()['torch']}")
    load_data(config, True)
    start = time.perf_counter()
    train = load_data(config, True).to(device)
    print(f"training set from the cache: {time.perf_counter() - start:.2f} s")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        poisoned = DatasetBD(config, train)
        poisoned.trigger(train.images[poisoned.poisoned.to(device)])
        synchronize(device)
        times.append(time.perf_counter() - start)
    print(f"poisoning {len(train)} images: {statistics.median(times):.3f} s")
    print(f"stamping, million images a second: {stamping_rates(config, train)}")
    names = {"dataset": args.dataset, "device": str(device)}
    print(f"train_badnet.py, start to first step: {own_process(FIRST_STEP.format(**names))[0]:.1f} s")
    print(f"main.py, peak memory: {own_process(TWO_EPOCHS.format(**names))[1]:.2f} GiB\n")

    print(f"{'images per second':<24}{'usual':>12}{'own':>12}{'ratio':>10}")
    b = config.batch_size
    compare("training step", Runner(usual_batches(poisoned, b, device), cross_entropy, False, False, device),
            Runner(own_batches(poisoned, b, config), cross_entropy, amp, True, device), b, args.steps, args.rounds)
    clean, b = DatasetCL(erase, train), erase.batch_size
    compare("erasing step (NAD)", Runner(usual_batches(clean, b, device), teacher_loss(device, False), False, False,
                                         device),
            Runner(own_batches(clean, b, erase), teacher_loss(device, True), amp, True, device), b, args.steps,
            args.rounds)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"speed.py: error: {e}", file=sys.stderr)
        sys.exit(2)
