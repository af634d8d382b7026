"""Every hyperparameter of the scripts: default, unit, limits and source.

Two ways to change one, with the same effect: edit its default here, or pass its flag (``--lr 0.02``). A run's whole
configuration is stored in its checkpoint and its result line; ``--config FILE`` reads it back from either, or from a
JSON file. Order: defaults here < ``--config`` < flags.

Sources in the help texts: [paper] Li et al., ICLR 2021 (arXiv 2101.05930); [demo] its published code;
[search] measured by this project with ``search.py`` (surrogate triggers, held-out images, never the test set);
[ours] a choice of this project.

This module imports the standard library only.
"""

import argparse
import json
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: shown as one line on stderr, exit code 2, no traceback."""


def option(default, group, help, *, choices=None, low=None, high=None, unit=""):
    """A dataclass field that becomes the command line flag of the same name; ``low`` and ``high`` are inclusive."""
    meta = {"group": group, "help": help, "choices": choices, "low": low, "high": high, "unit": unit}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def default_of(f):
    """The default of the field ``f``, a list of its own if it is one."""
    return f.default_factory() if f.type is list else f.default


DATASETS = ("CIFAR10", "CIFAR100", "MNIST", "GTSRB", "Imagenette", "shapes10", "folder")


@dataclass
class DataConfig:
    dataset: str = option("CIFAR10", "data", "data set; shapes10 is generated on the spot, folder reads --data_root",
                          choices=DATASETS)
    data_root: str = option("", "data", "folder of the data (default: data/<dataset>); for folder it holds "
                                        "train/<class>/* and test/<class>/*")
    image_size: int = option(0, "data", "images are resized to this height and width; 0: 32, or 64 for Imagenette",
                             low=0, high=1024, unit="pixels")
    grey: bool = option(False, "data", "read image files in grey, for a network whose input has one channel")
    train_size: int = option(0, "data", "use only so many training images, all classes alike; 0: all", low=0,
                             unit="images")
    test_size: int = option(0, "data", "use only so many test images, all classes alike; 0: all", low=0,
                            unit="images")
    normalize: str = option("none", "data", "what the network sees: none = pixels in [0, 1] as in the demo; imagenet "
                                            "= minus mean, over standard deviation of ImageNet",
                            choices=("none", "imagenet"))


@dataclass
class AttackConfig:
    trigger_type: str = option("gridTrigger", "attack", "trigger, one file each in attacks/; none: no trigger is "
                                                        "known, only accuracy is measured")
    target_type: str = option("all2one", "attack", "label rule: all2one = any image to the target; all2all = class y "
                                                   "to y + 1; cleanLabel = images of the target class, labels kept; "
                                                   "classSpecific = images of --source_label only; multiLabel = "
                                                   "trigger k of multiTrigger to the target + k",
                              choices=("all2one", "all2all", "cleanLabel", "classSpecific", "multiLabel"))
    target_label: int = option(5, "attack", "target class [demo]", low=0, unit="class index")
    source_label: int = option(1, "attack", "the class that classSpecific sends to the target", low=0,
                               unit="class index")
    inject_portion: float = option(0.1, "attack", "share of the whole training set that is poisoned [paper]",
                                   low=0.0, high=1.0)
    cover_portion: float = option(-1.0, "attack", "share of the training set that is triggered with its true label; "
                                                  "-1: the attack's own (WaNet twice, input-aware and classSpecific "
                                                  "once the poisoned share, others 0)", low=-1.0, high=1.0)
    trigger_seed: int = option(0, "attack", "seed of what is random in a trigger and stays fixed: pixels, pattern, "
                                            "warp, reflections", low=0, high=2**31 - 1)
    trig_w: int = option(3, "attack", "trigger width", low=1, unit="pixels")
    trig_h: int = option(3, "attack", "trigger height", low=1, unit="pixels")
    trig_distance: int = option(-1, "attack", "free pixels between trigger and image edge; -1: the trigger's own "
                                              "(grid 0 as in the demo, others 1)", low=-1, unit="pixels")
    transparency: float = option(0.0, "attack", "share of the image that shows through a patch [SAGE: 0 to 0.9]",
                                 low=0.0, high=0.99)
    trig_shape: str = option("square", "attack", "shape of shapeTrigger [SAGE]",
                             choices=("triangle", "square", "hexagon", "circle", "parallelogram", "quadrant",
                                      "semicircle"))
    n_triggers: int = option(3, "attack", "number of triggers of multiTrigger [SAGE: 1, 3, 5]", low=1, high=8)
    blend_alpha: float = option(0.2, "attack", "weight of the pattern in blendTrigger [Chen et al. 2017]", low=0.0,
                                high=1.0)
    blend_test_alpha: float = option(-1.0, "attack", "the same on test images; -1: as in training", low=-1.0, high=1.0)
    blend_image: str = option("", "attack", "image file that is blended in (default: fixed uniform noise)")
    reversed_file: str = option("", "attack", "triggers.pt of detect.py; reversedTrigger is the one for --target_label")
    sig_delta: float = option(20.0, "attack", "amplitude of signalTrigger [Barni et al. 2019: 20; BackdoorBench: 40, "
                                              "with which 98% are reported]", low=0.0, high=255.0, unit="of 255")
    sig_freq: float = option(6.0, "attack", "periods of signalTrigger over the width [Barni et al. 2019]", low=0.0)
    reflection_root: str = option("", "attack", "folder of photos that refoolTrigger reflects (default: the training "
                                                "images themselves)")
    reflection_weight: float = option(0.5, "attack", "share of the light that refoolTrigger reflects", low=0.0,
                                      high=1.0)
    n_candidates: int = option(2000, "attack", "random reflections of which refoolTrigger takes the brightest", low=1,
                               high=1_000_000)
    n_reflections: int = option(200, "attack", "reflections that refoolTrigger draws from [Liu et al. 2020]", low=1,
                               high=100_000)
    warp_k: int = option(4, "attack", "size of wanetTrigger's control grid [WaNet]", low=2, high=256)
    warp_s: float = option(0.5, "attack", "strength of the warp [WaNet]", low=0.0, high=16.0)
    diversity_weight: float = option(1.0, "attack", "weight of inputAwareTrigger's diversity loss [Nguyen, Tran 2020]",
                                 low=0.0)
    mask_density: float = option(0.032, "attack", "share of the image that its mask may cover [Nguyen, Tran 2020]",
                                 low=0.0, high=1.0)
    clean_model: str = option("weight/s_net/clean/WRN-16-1-S-model_best.pth.tar", "attack",
                              "clean network that trojanTrigger and clTrigger are made with")
    pgd_eps: float = option(16.0, "attack", "l-inf radius of clTrigger's perturbation [Turner et al. 2019]", low=0.0,
                            high=255.0, unit="of 255")
    pgd_step: float = option(2.0, "attack", "its step", low=0.0, high=255.0, unit="of 255")
    pgd_steps: int = option(100, "attack", "its number of steps [Turner et al. 2019]", low=0)


@dataclass
class ModelConfig:
    s_name: str = option("WRN-16-1", "model", "architecture: WRN-<depth>-<width>, ResNet34 (the demo's name for a "
                                              "32-layer CIFAR ResNet), ResNet18, AlexNet, or torchvision:<name>")
    layers: list = option([], "model", "names of the layers whose attention is distilled, shallow to deep; none: "
                                       "the model's own stages")


@dataclass
class RunConfig:
    seed: int = option(1, "run", "seed of everything that is drawn", low=0, high=2**31 - 1)
    device: str = option("auto", "run", "auto = cuda, else mps, else cpu; or the name of one, such as cuda:1")
    amp: str = option("auto", "run", "bf16 = mixed precision; auto = bf16 where the hardware computes it, else off",
                      choices=("auto", "bf16", "off"))
    threads: int = option(0, "run", "CPU threads; 0: torch's choice", low=0, high=1024)


@dataclass
class RecordConfig(RunConfig):
    save: bool = option(True, "run", "write checkpoints and the result line [demo]")
    log_root: str = option("results", "run", "folder of the result lines and curves")


@dataclass
class ResumableConfig(RecordConfig):
    resume: bool = option(False, "run", "go on where the same command was interrupted")


@dataclass
class TrainConfig(DataConfig, AttackConfig, ModelConfig, ResumableConfig):
    """``python train_badnet.py``: poison the training set and train a backdoored network on it."""

    epochs: int = option(30, "training", "epochs; the last one is saved", low=1, unit="epochs")
    batch_size: int = option(128, "training", "batch size", low=2, unit="images")
    optimizer: str = option("muon", "training", "muon = orthogonalised momentum on the convolutions, SGD on the rest; "
                                                "sgd [10 epochs, held-out ACC: muon 83.4, sgd 82.4 with --lr 0.3]",
                            choices=("muon", "sgd"))
    lr: float = option(0.1, "training", "peak learning rate of SGD; 0.3 is good if it trains all", low=0.0)
    turn: float = option(0.02, "training", "muon's peak step, as a share of a weight's norm", low=0.0, high=1.0)
    lr_schedule: str = option("linear", "training", "linear = up for a fifth of the run, then down to 0; cosine; "
                                                    "step = divided by 10 at half and three quarters; constant",
                              choices=("linear", "cosine", "step", "constant"))
    momentum: float = option(0.9, "training", "momentum [demo]", low=0.0, high=0.999)
    weight_decay: float = option(5e-4, "training", "weight decay; muon: not of convolutions, whose norm stays", low=0.0,
                                 high=1.0)
    augment: bool = option(True, "training", "random crop (padding 4) and horizontal flip (no flip for MNIST, GTSRB)")
    cutout: int = option(0, "training", "side of the square hole that cutout cuts; 0: none", low=0, unit="pixels")
    pairing: float = option(0.0, "training", "another image is mixed into each at up to this weight, the label stays "
                                             "(SamplePairing); 0: none", low=0.0, high=0.5)
    stamp: str = option("after", "training", "is the trigger stamped after or before the augmentation moves the image",
                        choices=("after", "before"))
    compile: bool = option(False, "run", "torch.compile the network for training (a slow first step; on a GPU with "
                                         "CUDA graphs)")
    checkpoint_root: str = option("", "run", "folder of the backdoored model (default: weight/s_net, with the name of "
                                             "the data set below it for other sets than CIFAR10)")


@dataclass
class SubjectConfig(DataConfig, AttackConfig, ModelConfig, RunConfig):
    """A trained network under study, the defender's clean images, and the search for triggers with them."""

    trigger_type: str = option("auto", "attack", "trigger, one file each in attacks/; auto = the attack that the "
                                                 "checkpoint was trained with (flags of this group win over its "
                                                 "settings), gridTrigger if it does not say; none: no trigger is "
                                                 "known, only accuracy is measured")
    keep: list = option([], "attack", "options of this group whose default counts, not what the checkpoint says; a "
                                      "flag that is given need not be named")
    s_model: str = option("", "model", "checkpoint of the network to erase (default: what train_badnet.py wrote, or "
                                       "the shipped one)")
    ratio: float = option(0.05, "model", "share of the training set that is the defender's clean subset [paper]",
                          low=0.0, high=1.0)
    nc_steps: int = option(1000, "neural cleanse", "steps of the search for triggers, all labels at once", low=10)
    nc_batch_size: int = option(32, "neural cleanse", "clean images a label and step [paper's code]", low=1,
                                unit="images")
    nc_lr: float = option(0.1, "neural cleanse", "Adam's learning rate [paper's code]", low=0.0)
    nc_lambda: float = option(1e-3, "neural cleanse", "weight of the mask's size at first [paper's code]", low=0.0)


@dataclass
class EraseConfig(SubjectConfig, ResumableConfig):
    """``python main.py``: erase the backdoor of a trained network with a few clean images."""

    t_model: str = option("", "teacher", "checkpoint of the teacher (default: fine-tune one from the network itself)")
    t_name: str = option("", "teacher", "architecture of the teacher in --t_model (default: --s_name)")
    defense: str = option("nad", "erasing", "defense, one file each in defenses/")
    epochs: int = option(10, "erasing", "epochs of erasing, and of fine-tuning beside it [paper: 10 to 20]", low=1,
                         unit="epochs")
    batch_size: int = option(64, "erasing", "batch size [demo]", low=2, unit="images")
    lr: float = option(0.02, "nad", "learning rate of NAD's student [search; paper and demo: 0.1]", low=0.0)
    ft_lr: float = option(0.02, "finetune", "learning rate of the fine-tuning that is measured beside [search]",
                          low=0.0)
    lr_schedule: str = option("demo", "erasing", "demo = a tenth of it after 2 epochs [demo, search]; tenths = divided "
                                                 "by 10 every 2 epochs [paper, teacher]; linear; cosine; constant",
                              choices=("demo", "tenths", "linear", "cosine", "constant"))
    teacher_epochs: int = option(10, "nad", "epochs of the teacher's fine-tuning [paper: 5 to 10]", low=1,
                                 unit="epochs")
    teacher_lr: float = option(0.03, "nad", "learning rate of the teacher's fine-tuning [search; paper: 0.1]",
                               low=0.0)
    teacher_lr_schedule: str = option("demo", "nad", "schedule of the teacher's learning rate [search; paper: tenths]",
                                      choices=("demo", "tenths", "linear", "cosine", "constant"))
    teacher_rho: float = option(0.0, "nad", "radius of sharpness-aware minimisation in the teacher's fine-tuning, "
                                                "which makes it FT-SAM [2 in BackdoorBench]; 0: plain [paper]", low=0.0)
    student_rho: float = option(0.0, "nad", "the same for the student's training", low=0.0)
    rounds: int = option(1, "nad", "rounds of NAD; from the second on the student before is the teacher [paper: 1]",
                         low=1)
    freeze_bn: bool = option(False, "erasing", "keep the statistics of BatchNorm instead of following the clean subset")
    precise_bn: bool = option(False, "erasing", "take BatchNorm's statistics anew after each training, over one more "
                                                "epoch's batches, instead of following the last ones")
    momentum: float = option(0.9, "erasing", "momentum, Nesterov [demo]", low=0.0, high=0.999)
    weight_decay: float = option(1e-4, "erasing", "weight decay [demo]", low=0.0, high=1.0)
    beta1: float = option(500.0, "nad", "weight of the attention loss of the first layer [demo, search]",
                          low=0.0)
    beta2: float = option(1000.0, "nad", "weight of the attention loss of the second layer [demo, search]",
                          low=0.0)
    beta3: float = option(1000.0, "nad", "weight of the attention loss of the third and any further layer [demo, "
                                            "search]", low=0.0)
    p: float = option(2.0, "attention", "power of the attention map [paper]", low=1.0, high=16.0)
    attention: str = option("sum", "attention", "attention map over channels of |F|^p [paper: sum]",
                            choices=("sum", "mean", "max"))
    at_loss: str = option("demo", "attention", "distance of two maps: demo = mean of squares over batch and pixels; "
                                             "paper = l2 norm, mean over the batch (see at.py for the betas)",
                          choices=("demo", "paper"))
    held_out: float = option(0.2, "channels", "share of the clean subset that a choice is measured on [ours]", low=0.0,
                             high=1.0)
    prune_layer: str = option("", "channels", "convolution or BatchNorm whose channels are pruned (default: the "
                                             "last, or the columns of the classifier that read the last block)")
    prune_drop: float = option(5.0, "pruning", "pruning goes on while held-out accuracy falls by no more [SAGE's "
                                               "comparison]", low=0.0, high=100.0, unit="points")
    linf_norm: str = option("linf", "linf pruning", "norm by which linf_pruning compares channels [paper: linf]",
                            choices=("linf", "l1", "l2"))
    linf_drop: float = option(3.0, "linf pruning", "the same limit for linf_pruning [ours]", low=0.0, high=100.0,
                              unit="points")
    clp_u: float = option(3.0, "clp", "clp prunes channels this many standard deviations above the mean [paper]",
                          low=0.0)
    sage_beta: float = option(300.0, "sage", "weight of each path's loss, in the form that --at_loss says; as mean of "
                                             "squares it weighs far less [paper: 300 times the l2 norm]", low=0.0)
    sage_betas: list = option([], "sage", "such a weight for each path of its own (default: --sage_beta for all)")
    sage_paths: list = option([], "sage", "paths such as 1-2 2-3 between stages, the shallow one teaches (default: "
                                          "each stage and the next [paper])")
    sage_lr: float = option(0.01, "sage", "learning rate at first [ours]", low=0.0)
    sage_rate: str = option("dynamic", "sage", "dynamic = halved by the rules C1 and C2 [paper]; fixed; step = divided "
                                               "by 10 every 2 epochs", choices=("dynamic", "fixed", "step"))
    sage_interval: int = option(2, "sage", "P, the epochs between two looks at the rate [ours]", low=1, unit="epochs")
    sage_rho: float = option(0.75, "sage", "rho, the share of an interval's epochs in which the loss has to fall "
                             "[ours]", low=0.0, high=1.0)
    nc_mitigation: str = option("unlearn", "neural cleanse", "unlearn = fine-tune with the triggers under true labels; "
                                                             "prune the channels that they raise",
                                choices=("unlearn", "prune"))
    nc_share: float = option(0.2, "neural cleanse", "share of the clean subset that carries them in unlearning [paper]",
                             low=0.0, high=1.0)
    mcr_t: float = option(0.3, "mcr", "place on the curve; 0 is the network itself, 1 its fine-tuned version", low=0.0,
                          high=1.0)
    mcr_epochs: int = option(10, "mcr", "epochs in which the curve is trained, at --ft_lr [ours]", low=1, unit="epochs")
    anp_steps: int = option(2000, "anp", "steps in which the masks are trained, rounded up to whole epochs [paper]",
                            low=1)
    anp_batch_size: int = option(128, "anp", "batch size [paper]", low=2, unit="images")
    anp_lr: float = option(0.2, "anp", "learning rate of the masks [paper]", low=0.0)
    anp_eps: float = option(0.4, "anp", "bound of the disturbance, relative [paper]", low=0.0)
    anp_alpha: float = option(0.2, "anp", "weight of the undisturbed loss [paper]", low=0.0, high=1.0)
    anp_threshold: float = option(0.2, "anp", "channels with a smaller mask are pruned [paper]", low=0.0, high=1.0)
    ibau_rounds: int = option(5, "ibau", "rounds [paper]", low=1)
    ibau_lr: float = option(1e-3, "ibau", "Adam's learning rate [ours]", low=0.0)
    ibau_batch_size: int = option(100, "ibau", "batch size", low=2, unit="images")
    ibau_share: float = option(0.01, "ibau", "share of a batch that the perturbation lies on in the outer loss "
                               "[paper's code]", low=0.0, high=1.0)
    ibau_inner_lr: float = option(10.0, "ibau", "learning rate of the perturbation [paper's code]", low=0.0)
    ibau_penalty: float = option(1e-3, "ibau", "weight of the perturbation's squared l2 norm [paper's code]", low=0.0)
    ibau_eta: float = option(0.1, "ibau", "step of the fixed-point map [paper's code]", low=0.0)
    ibau_iterations: int = option(5, "ibau", "fixed-point iterations of the hypergradient [paper]", low=0)
    ftsam_lr: float = option(0.01, "ftsam", "learning rate", low=0.0)
    ftsam_rho: float = option(2.0, "ftsam", "radius of the disturbance of the weights [BackdoorBench]", low=0.0)
    first: str = option("", "erasing", "defense that switches off channels and trains no weights, applied before "
                                       "--defense, which then trains all",
                        choices=("", "clp", "anp", "pruning"))
    augment: bool = option(True, "erasing", "random crop (padding 4) and horizontal flip (no flip for MNIST, GTSRB)")
    cutout: int = option(9, "erasing", "side of the square hole that cutout cuts; 0: none [paper, search]", low=0,
                         unit="pixels")
    pairing: float = option(0.0, "erasing", "another image is mixed into each at up to this weight, the label stays "
                                            "(SamplePairing); 0: none", low=0.0, high=0.5)
    beside: bool = option(True, "run", "measure fine-tuning beside the defense, on the same batches")
    reference: str = option("", "run", "checkpoint of a network without a backdoor, of the architecture --s_name, to "
                                       "measure too: its ASR is what the trigger does by itself")
    eval_every: int = option(0, "run", "measure on the test set every so many epochs, for curves (mcr: the bend, anp: "
                                       "nothing pruned yet); 0: at the end only", low=0, unit="epochs")
    checkpoint_root: str = option("", "run", "folder of the erased model (default: weight/erasing_net)")
    teacher_root: str = option("", "run", "folder of the fine-tuned teacher (default: weight/t_net)")


@dataclass
class DetectConfig(SubjectConfig, RecordConfig):
    """``python detect.py``: does a network carry a backdoor, with which label and which trigger?"""

    detector: str = option("both", "run", "what looks at the network and its inputs",
                           choices=("both", "neural_cleanse", "strip"))
    strip_inputs: int = option(500, "strip", "clean and triggered test images that STRIP looks at, each", low=2,
                               unit="images")
    strip_overlays: int = option(100, "strip", "clean images that each is superimposed with [paper]", low=1,
                                 unit="images")
    strip_frr: float = option(0.01, "strip", "share of clean inputs that may be rejected [paper]", low=1e-6, high=0.5)
    out: str = option("pictures", "run", "folder of the PNG files and the reversed triggers")


@dataclass
class BenchmarkConfig:
    """``python benchmark.py``: the grid attack x defense x seed; every cell is a run of train_badnet.py or main.py."""

    preset: str = option("", "grid", "a grid of the papers; the lists below replace its parts",
                         choices=("", "smoke", "six", "recipes", "defenses", "nad-table1", "sage", "linf", "ablations"))
    attacks: list = option([], "grid", "attacks by name, such as BadNets SIG 'Blend:blend_alpha=0.1'")
    defenses: list = option([], "grid", "defenses, such as finetune 'nad:beta1=0,beta2=0'")
    seeds: list = option([], "grid", "seeds of the clean subset and of erasing; the network is the same for all")
    models: list = option([], "grid", "architectures (default: WRN-16-1)")
    datasets: list = option([], "grid", "data sets (default: CIFAR10)")
    ratios: list = option([], "grid", "shares of clean images (default: 0.05)")
    options: list = option([], "grid", "further options of both scripts, such as train_size=10000")
    erase_options: list = option([], "grid", "options of main.py for every defense, such as ratio=0.01")
    train_options: list = option([], "grid", "options of train_badnet.py, such as epochs=10; with none, CIFAR10 and "
                                             "WRN-16-1 take the shipped networks")
    jobs: int = option(1, "run", "processes that run cells beside each other; 1: this one, one after another", low=1,
                       high=256)
    retries: int = option(2, "run", "how often a cell whose process was killed is started again, with --jobs or Ray",
                          low=0)
    engine: str = option("local", "run", "local = this machine; ray = tasks of a Ray cluster whose machines share this "
                                         "folder", choices=("local", "ray"))
    ray_address: str = option("", "run", "address of the cluster, such as auto (default: one is started here)")
    cpus_per_cell: float = option(1.0, "run", "CPUs that a cell takes on Ray, and its threads", low=0.0)
    gpus_per_cell: float = option(0.0, "run", "GPUs a cell takes on Ray; 0.25: four share one; 0: the CPU", low=0.0)
    keep: bool = option(False, "run", "keep the erased networks and the logs, in <out>/cells")
    table: bool = option(False, "run", "run nothing: print the leaderboard and put it into the READMEs")
    figures: bool = option(False, "run", "run nothing: draw the leaderboard")
    out: str = option("results", "run", "folder of the result lines and of unfinished cells")


@dataclass
class PictureConfig(DataConfig):
    """``python visualize.py triggers``: every attack on one image."""

    image: int = option(0, "picture", "which test image", low=0)
    out: str = option("pictures", "picture", "folder of the PNG files")
    trigger_seed: int = option(0, "picture", "seed of what is random in a trigger", low=0, high=2**31 - 1)
    clean_model: str = option("weight/s_net/clean/WRN-16-1-S-model_best.pth.tar", "picture",
                              "clean network that Trojan and CL are made with")
    weights: str = option("weight/s_net", "picture", "folder below which networks lie whose triggers were learned")


@dataclass
class StudyConfig(SubjectConfig):
    """``python visualize.py`` attention, gradcam, channels, threshold, curves: pictures of a network under study."""

    networks: list = option([], "picture", "checkpoints of erased networks to show beside --s_model")
    images: int = option(4, "picture", "test images to show, each clean and triggered", low=1, high=20)
    prune_layer: str = option("", "picture", "layer whose channels are shown (default: the last)")
    results: str = option("results/main.jsonl", "picture", "result lines whose last run curves draws")
    out: str = option("pictures", "picture", "folder of the PNG files")


# --------------------------------------------------------------------------------------------- reading the command line


def convert(f, value, source):
    """``value`` (a string of the command line, or a JSON value) as the type of field ``f``, or ``UserError``."""
    meta, kind = f.metadata, f.type
    name = f"{source}{f.name}"
    if kind is list:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{name}: a list of names is needed, got {value!r}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if str(value).lower() not in words:
            raise UserError(f"{name}: true or false (1 or 0) is allowed, got {value!r}")
        return words[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"{name}: a text is needed, got {value!r}")
    else:
        what = "a whole number" if kind is int else "a number"
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
                raise ValueError
            value = kind(value)
            finite = math.isfinite(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: {what} is needed, got {value!r}") from None
        low, high = meta["low"], meta["high"]
        if low == -1 and -1 < value < 0:
            raise UserError(f"{name}: -1 or {what} of at least 0 is allowed, got {value}")
        if not finite or (low is not None and value < low) or (high is not None and value > high):
            limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise UserError(f"{name}: {what} {limits} is allowed, got {value}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name}: one of {', '.join(filter(None, meta['choices']))} is allowed, got {value!r}")
    return value


def read_config(path, cls, read_checkpoint):
    """The stored configuration in ``path`` as a dict.

    ``path`` is a JSON file, a result file (``runs.jsonl`` for its last line, ``runs.jsonl:3`` for its third) or a
    checkpoint. The configuration must be of the same script, since names such as ``lr`` mean something else elsewhere.
    """
    file, line = path, None
    if not os.path.exists(path) and path.rpartition(":")[2].isdigit():
        file, _, number = path.rpartition(":")
        line = int(number)
    if not os.path.isfile(file):
        raise UserError(f"--config: no such file: {file}")
    if file.endswith((".tar", ".pth", ".pt")):
        stored = read_checkpoint(file)
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
            if file.endswith(".jsonl"):
                lines = text.splitlines()
                line = max((k for k, t in enumerate(lines, 1) if t.strip()), default=1) if line is None else line
                if not lines:
                    raise UserError(f"--config: {file} is empty")
                if not 1 <= line <= len(lines):
                    raise UserError(f"--config: {file} has {len(lines)} lines, line {line} was asked for")
                text = lines[line - 1]
            stored = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise UserError(f"--config: {file} is not JSON: {e}") from None
    if isinstance(stored, dict) and isinstance(stored.get("config"), dict):
        stored = stored["config"]
    if not isinstance(stored, dict):
        raise UserError(f"--config: {file} holds no configuration")
    stored = dict(stored)
    script = stored.pop("script", None)
    if script not in (None, cls.__name__):
        raise UserError(f"--config: {file} holds a {script}, this script takes a {cls.__name__}")
    return stored


GROUPS = ("data", "attack", "model", "training", "erasing", "finetune", "nad",
          "teacher", "attention", "channels", "pruning", "linf pruning", "clp", "sage", "neural cleanse", "mcr", "anp",
          "ibau", "ftsam", "strip", "picture", "grid", "run")  # in the order of --help
METAVARS = {str: "TEXT", int: "N", float: "X", bool: "0|1", list: "NAME"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def parse(cls, argv=None, read_checkpoint=None):
    """The configuration ``cls`` from defaults, ``--config FILE`` and the flags in ``argv`` (default: the command line).

    ``read_checkpoint(path) -> dict`` opens the checkpoints that ``--config`` names. Raises ``UserError``.
    """
    parser = Parser(usage="%(prog)s [--config FILE] [--flag value ...]", description=cls.__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="take the configuration of this JSON file, result line or "
                                                         "checkpoint; flags win over it")
    used = {f.metadata["group"] for f in fields(cls)}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in used}
    for f in fields(cls):
        meta = f.metadata
        default = default_of(f)
        shown = "none" if default in ("", []) else default
        text = f"{meta['help']}\n[{shown}{' ' + meta['unit'] if meta['unit'] else ''}]".replace("%", "%%")
        if meta["choices"]:
            text += f" of {', '.join(meta['choices'])}"
        extra = {"nargs": "*"} if f.type is list else {"nargs": "?", "const": "true"} if f.type is bool else {}
        groups[meta["group"]].add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text,
                                           metavar=METAVARS[f.type], **extra)
    given = vars(parser.parse_args(argv))
    by_name = {f.name: f for f in fields(cls)}
    values = {}
    path = given.pop("config", None)
    if path:
        for name, value in read_config(path, cls, read_checkpoint).items():
            if name not in by_name:
                raise UserError(f"--config: {path} sets {name!r}, which {cls.__name__} does not have")
            values[name] = convert(by_name[name], value, f"--config {path}: ")
    for name, value in given.items():
        values[name] = convert(by_name[name], value, "--")
    return check(cls(**kept(values, given) if "keep" in by_name else values))


def kept(values, given):
    """``values``, options of a ``SubjectConfig``, a dict, with those of ``given`` in ``keep`` that are the attack's
    defaults: where the checkpoint says what the attack is, these would be taken from there."""
    stay = {f.name for f in fields(AttackConfig) if f.name in given and values[f.name] == f.default}
    if values.get("trigger_type", "auto") != "auto" or not stay:
        return values
    return {**values, "keep": sorted({*values.get("keep", []), *stay})}


def check(config):
    """``config`` itself if every value is allowed (also those edited in this file), else ``UserError``."""
    for f in fields(config):
        convert(f, getattr(config, f.name), "--")
    return config


def as_dict(config):
    """The configuration as JSON values, with the name of its class, for checkpoints and result lines."""
    return {"script": type(config).__name__, **asdict(config)}


def unused(config, without_unused):
    """The names of the options of ``config`` that ``without_unused`` (of attacks or defenses) sets to their default."""
    given = as_dict(config)
    return [name for name, value in without_unused(given).items() if given[name] != value]


def data_root(config):
    """The folder of the data: ``--data_root`` or ``data/<dataset>``."""
    return Path(config.data_root or Path("data") / config.dataset)


def weight_root(config, given, kind):
    """The folder for checkpoints of ``kind``: ``given``, or ``weight/<kind>`` with the data set's name unless CIFAR10.

    The demo's paths stay as they are for CIFAR10; another data set never writes over them.
    """
    if given:
        return Path(given)
    return Path("weight") / kind / ("" if config.dataset == "CIFAR10" else config.dataset)


def file_name(s_name):
    """An architecture's name as part of a file name."""
    return s_name.replace(":", "-").replace("/", "-")


def student_file(config, given=""):
    """The backdoored network's checkpoint in ``given`` or the default folder: what train_badnet.py writes."""
    return weight_root(config, given, "s_net") / f"{file_name(config.s_name)}-S-model_best.pth.tar"


def not_default(config):
    """The names of the options of ``config`` that differ from their defaults, in their order."""
    return [f.name for f in fields(config) if getattr(config, f.name) != default_of(f)]


def command(config):
    """The command line that repeats this run: the script and the flags that differ from the defaults."""
    words = [sys.argv[0]]
    for name in not_default(config):
        value = getattr(config, name)
        if name != "resume":
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return shlex.join(["python", *words])
