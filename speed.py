"""How fast it is, against the usual way and the machine's limits, in one run: medians of interleaved rounds.

    python speed.py                                 # CIFAR-10, WRN-16-1
    python speed.py --dataset shapes10 --rounds 3
    python speed.py --profile                       # the operations that take the most time in a training step

The usual way, written plainly below: PIL images through torchvision transforms, a DataLoader with two workers, float32
in NCHW memory. This project's way: uint8 tensors on the device, augmentation on whole batches, channels-last memory,
bf16 where the hardware computes it; then compiled (with CUDA graphs on a GPU), and several networks at once, stacked by
``torch.func.vmap``, which share one launch of each kernel. All train the same network on the same poisoned images with
SGD; the erasing step has the NAD loss.

The limit is what one network could reach if nothing counted but arithmetic, or memory for layers that run one by one:
FLOPs by the formulas of ``torch.utils.flop_counter``; bytes as three times (forward, and two products backward) what a
network that learns reads and writes in its layers in one forward pass, once for a teacher; ceilings are a large matrix
product and a copy through main memory, measured here. Caches and fused layers can go beyond the second. The last block
is an evaluation and a step of each defense that trains something, beside the arithmetic alone. Writes no results.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry

import attacks
from config import EraseConfig, TrainConfig, UserError
from data_loader import DatasetBD, DatasetCL, load_data
from defenses import anp, ftsam, ibau, neural_cleanse, sage
from defenses.nad import NADLoss
from models import select_model
from utils.checkpoint import versions
from utils.data import Batches, make_augment
from utils.devices import choose_device, use_bf16
from utils.engine import autocast, cross_entropy, predict
from utils.optim import make_optimizer

IMAGE = (3, 32, 32)
NC_STEPS = 10  # of Neural Cleanse, in one call
PREFETCHED = 4  # batches of the usual way's DataLoader: two for each of two workers


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


def network(device, channels_last, seed=0):
    """A new WRN-16-1 in training mode."""
    torch.manual_seed(seed)
    model = select_model("CIFAR10", "WRN-16-1").to(device).train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


class Runner:
    """A network that trains on ``stream`` with ``loss``; ``seconds(n)`` times ``n`` steps."""

    networks = 1

    def __init__(self, stream, loss, amp, channels_last, device, compiled=False):
        self.model = network(device, channels_last)
        self.optimizer = make_optimizer(self.model, 0.05, 0.9, 5e-4)
        if compiled:
            self.model = torch.compile(self.model, mode="reduce-overhead" if device.type == "cuda" else None)
        self.stream, self.loss, self.amp, self.device = stream, loss, amp, device

    def step(self):
        images, labels = next(self.stream)
        with autocast(self.device, self.amp):
            value, _ = self.loss(self.model, images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()

    def seconds(self, steps):
        for _ in range(PREFETCHED):  # so that nobody lives on what its workers put by while others were timed
            self.step()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return time.perf_counter() - start


class WideBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that computes in float32 also under vmap, which does not do that by itself."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


class Together(Runner):
    """``networks`` networks, stacked, that train with cross-entropy in the same kernels, each on batches of its own."""

    def __init__(self, stream, amp, device, networks):
        models = [network(device, False, seed) for seed in range(networks)]
        self.weights, self.buffers = stack_module_state(models)
        self.optimizer = torch.optim.SGD(self.weights.values(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
        self.skeleton, self.networks = models[0], networks
        for module in self.skeleton.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = WideBatchNorm2d
        self.stream, self.amp, self.device = stream, amp, device

    def step(self):
        def loss(weights, buffers, images, labels):
            with autocast(self.device, self.amp):
                return F.cross_entropy(functional_call(self.skeleton, (weights, buffers), (images,)), labels)

        images, labels = map(torch.stack, zip(*(next(self.stream) for _ in range(self.networks)), strict=True))
        grads = vmap(grad(loss), randomness="different")(self.weights, self.buffers, images, labels)
        for name, weight in self.weights.items():
            weight.grad = grads[name]
        self.optimizer.step()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def teacher_loss(device, channels_last):
    torch.manual_seed(1)
    teacher = select_model("CIFAR10", "WRN-16-1").to(device)
    if channels_last:
        teacher.to(memory_format=torch.channels_last)
    return NADLoss(teacher, teacher.feature_layers, [500.0, 1000.0, 1000.0])


def traffic(model, images):
    """Bytes that the layers of ``model`` read and write in a forward pass of ``images``, their weights included."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        tensors = [*inputs, output, *module.parameters()]
        total += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return total


def best_time(function, device, times=5):
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


class Flops(TorchDispatchMode):
    """While it is open, ``total`` counts FLOPs. torch's FlopCounterMode cannot be used around ``autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, count = kwargs or {}, flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                out = func.decompose(*args, **kwargs)  # of a composite operation, as inference mode leaves it
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.total += count(*args, **kwargs, out_val=out)
        return out


def cost(model, loss, images, labels, amp):
    """(FLOPs, bytes) of a training step of ``model`` with ``loss``, which may have a teacher, an image."""
    with Flops() as counter, autocast(images.device, amp):
        loss(model, images, labels)[0].backward()
    with autocast(images.device, amp):
        data = 3 * traffic(model, images) + (traffic(loss.teacher, images) if hasattr(loss, "teacher") else 0)
    return counter.total / len(images), data / len(images)


def ceilings(amp, device):
    """(FLOPs, bytes) a second that ``device`` reaches: in a large matrix product, in a copy."""
    n = 8192 if device.type == "cuda" else 2048
    square = torch.rand(n, n, device=device, dtype=torch.bfloat16 if amp else torch.float32)
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    copied = torch.zeros_like(source)
    return (2 * n**3 / best_time(lambda: square @ square, device),
            2 * len(source) / best_time(lambda: copied.copy_(source), device))


def limit(name, loss, amp, device, batch_size, most):
    """Images a second that a training step with ``loss`` could reach with the ceilings ``most``; prints how."""
    images = torch.rand(batch_size, *IMAGE, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    flops, data = cost(network(device, True), loss, images, labels, amp)
    rates = most[0] / flops, most[1] / data
    print(f"\n{name}: {flops / 1e6:.0f} MFLOP and {data / 1e6:.1f} MB an image, so {rates[0]:,.0f} images a second "
          f"by arithmetic, {rates[1]:,.0f} by memory")
    return min(rates)


def compare(runners, batch_size, steps, rounds, most):
    """Time ``runners``, {name: Runner}, in turns, ``rounds`` times after one to warm up, and print medians; the first
    is what the others are compared with, ``most`` the limit. One that fails in its first round is left out."""
    rates = {which: [] for which in runners}
    for which, runner in runners.items():
        try:
            runner.seconds(steps)
        except Exception as e:  # no compiler, say
            print(f"{which}: not available: {(str(e).strip().splitlines() or [type(e).__name__])[-1]}")
            del rates[which]
    for _ in range(rounds):
        for which, found in rates.items():
            found.append(batch_size * steps * runners[which].networks / runners[which].seconds(steps))
    first = next(iter(rates.values()))
    print(f"{'images per second':<24}{'':>12}{'ratio':>9}{'of limit':>10}")
    for which, found in rates.items():
        rate = statistics.median(found)
        ratio = statistics.median(b / a for a, b in zip(first, found, strict=True))
        print(f"{which:<24}{rate:12,.0f}{ratio:8.2f}x{rate / most:10.0%}", flush=True)


def defense_steps(config, clean, device, amp):
    """{name: (function, images it takes)}: one evaluation of ``clean`` (``DatasetCL``), and one step of each defense
    that trains something, without its optimiser's, on batches of ``clean``."""
    model = network(device, True)

    def step_of(loss, size, trained=model):
        size = min(size, len(clean))
        stream = own_batches(clean, size, config)

        def step():
            images, labels = next(stream)
            with autocast(device, amp):
                value, _ = loss(trained, images, labels)
            value.backward()
        return step, size

    size = min(config.ibau_batch_size, len(clean))
    stream = own_batches(clean, size, config)

    def ibau_step():
        ibau.hypergradient(model.eval(), *next(stream), torch.zeros(1, *clean.shape, device=device), config)

    few = clean.take(torch.arange(min(50, len(clean))))
    steps = replace(config, nc_steps=NC_STEPS)
    searched = NC_STEPS * clean.n_classes * min(config.nc_batch_size, len(few)) + clean.n_classes * len(few)
    return {"evaluation": (lambda: predict(model, clean.images), len(clean)),
            "fine-tuning": step_of(cross_entropy, config.batch_size),
            "NAD": step_of(teacher_loss(device, True), config.batch_size),
            "SAGE": step_of(sage.make_loss(model, config), config.batch_size),
            "FT-SAM": step_of(ftsam.SAMLoss(config.ftsam_rho), config.batch_size),
            "ANP": step_of(anp.MaskLoss(config.anp_alpha, config.anp_eps), config.anp_batch_size,
                           anp.Masks(network(device, True))),
            "I-BAU, hypergradient": (ibau_step, size),
            "Neural Cleanse": (lambda: neural_cleanse.reverse(model, few, steps), searched)}


def time_defenses(steps, device, most):
    """Print of each of ``steps``, from ``defense_steps``, images a second and the share of ``most`` FLOPs a second."""
    print(f"\n{'of the defenses, images per second':<36}{'arithmetic':>12}")
    for name, (step, images) in steps.items():
        step()  # warm
        with Flops() as counter:
            step()
        seconds = best_time(step, device, 3)
        share = counter.total / seconds / most
        print(f"{name:<24}{images / seconds:12,.0f}{share:12.0%}", flush=True)


def profile(runner, steps):
    """Print the operations on which ``steps`` steps of ``runner`` spend their time."""
    runner.seconds(2)
    cuda = runner.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as found:
        runner.seconds(steps)
    print(found.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=15,
                                     max_name_column_width=50))


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
            continue  # no clean network for these images, or no reversed trigger
        trigger.see(train.images)
        seconds = best_time(partial(trigger, part), part.device)
        rates.append(f"{name.removesuffix('Trigger')} {len(part) / seconds / 1e6:.3g}")
    return ", ".join(rates)


def poisoning_times(config, train):
    """Text with the seconds of poisoning, from nothing to stamped images, for triggers that optimise nothing."""
    times = []
    for name in sorted(set(attacks.TRIGGERS) - {"trojanTrigger", "clTrigger", "inputAwareTrigger", "reversedTrigger"}):
        def poison(name=name):
            poisoned = DatasetBD(replace(config, trigger_type=name), train)
            poisoned.take(torch.cat([poisoned.poisoned, poisoned.cover]))

        times.append(f"{name.removesuffix('Trigger')} {best_time(poison, train.images.device):.2g}")
    return ", ".join(times)


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
    parser.add_argument("--networks", type=int, default=4, help="networks that are trained at once, in one version")
    parser.add_argument("--profile", action="store_true", help="print where the time of a training step goes, only")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "networks"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: at least 1 is needed, got {getattr(args, name)}")
    config = TrainConfig(dataset=args.dataset)
    erase = EraseConfig(dataset=args.dataset)
    device = choose_device(args.device)
    amp = use_bf16("auto", device)
    print(f"{device}, {torch.get_num_threads()} threads, {'bf16' if amp else 'float32'}, torch {versions()['torch']}")
    b = config.batch_size
    train = load_data(config, True).to(device)

    def own(**more):
        return Runner(own_batches(DatasetBD(config, train), b, config), cross_entropy, amp, True, device, **more)

    if args.profile:
        return profile(own(), args.steps)
    start = time.perf_counter()
    train = load_data(config, True).to(device)
    print(f"training set from the cache: {time.perf_counter() - start:.2f} s")
    print(f"poisoning {len(train)} images, seconds: {poisoning_times(config, train)}")
    print(f"stamping, million images a second: {stamping_rates(config, train)}")
    names = {"dataset": args.dataset, "device": str(device)}
    print(f"train_badnet.py, start to first step: {own_process(FIRST_STEP.format(**names))[0]:.1f} s")
    print(f"main.py, peak memory: {own_process(TWO_EPOCHS.format(**names))[1]:.2f} GiB\n")

    found = ceilings(amp, device)
    print(f"ceilings: {found[0] / 1e12:.2f} TFLOP/s in a matrix product, {found[1] / 1e9:.0f} GB/s in a copy")
    most = limit("training step", cross_entropy, amp, device, b, found)
    poisoned = DatasetBD(config, train)
    compare({"usual": Runner(usual_batches(poisoned, b, device), cross_entropy, False, False, device),
             "own": own(), "own, compiled": own(compiled=True),
             f"own, {args.networks} at once": Together(own_batches(poisoned, b, config), amp, device, args.networks)},
            b, args.steps, args.rounds, most)
    clean, b = DatasetCL(erase, train), erase.batch_size
    most = limit("erasing step (NAD)", teacher_loss(device, True), amp, device, b, found)
    compare({"usual": Runner(usual_batches(clean, b, device), teacher_loss(device, False), False, False, device),
             "own": Runner(own_batches(clean, b, erase), teacher_loss(device, True), amp, True, device)},
            b, args.steps, args.rounds, most)
    return time_defenses(defense_steps(erase, clean, device, amp), device, found[0])


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"speed.py: error: {e}", file=sys.stderr)
        sys.exit(2)
