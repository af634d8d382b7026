"""Pictures, as PNG files.

    python visualize.py triggers                    # every attack: clean image, triggered image, their difference x 5
    python visualize.py attention --networks FILE   # attention maps of the stages, backdoored and erased networks
    python visualize.py gradcam --networks FILE     # Grad-CAM of clean and triggered images
    python visualize.py channels                    # what each channel of the last layer answers to the trigger
    python visualize.py threshold                   # ACC and ASR against the number of pruned channels
    python visualize.py curves                      # ACC and ASR per epoch of the last run with --eval_every

Needs matplotlib (pip install matplotlib); elsewhere only detect.py's and benchmark.py's figures do.
"""

import sys
import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

import attacks
import defenses
from at import attention_map
from cam import deepest, grad_cam
from config import AttackConfig, PictureConfig, StudyConfig, UserError
from data_loader import load_data
from defenses import linf_pruning, neural_cleanse
from models import Features, feature_layers
from subject import opened, study
from utils.channels import channel_norms, counts, last_layer
from utils.checkpoint import load_checkpoint, stored_config
from utils.data import to_float
from utils.devices import choose_device
from utils.engine import TerminalProgress, evaluate
from utils.files import read_lines
from utils.plot import pyplot, save_figure
from utils.run import check_writable, run_script, say

LEARNED = {"inputAwareTrigger": "input_aware"}  # their networks' folders below --weights
ROWS_A_COLUMN = 10
NORMS = {"linf": "l-inf", "l2": "l2", "l1": "l1"}


def triggered(options, config, train, image):
    """``image``, uint8 (1, C, H, W), as the attack with ``options`` changes it. Raises ``UserError``."""
    own = AttackConfig(**options, trigger_seed=config.trigger_seed, clean_model=config.clean_model)
    own.dataset = config.dataset
    state = None
    if own.trigger_type in LEARNED:
        path = Path(config.weights) / LEARNED[own.trigger_type] / "WRN-16-1-S-model_best.pth.tar"
        state = load_checkpoint(path).get("trigger")
        if not state:
            raise UserError(f"{path} holds no trigger")
    trigger = attacks.make_trigger(own, train.shape, state)
    trigger.see(train.images)
    start = image
    if trigger.clean_label_only:
        start = trigger.prepare(image, own.target_label)
    part = "all triggers" if own.trigger_type == "multiTrigger" else None
    return trigger(start, torch.tensor([config.image]), part)


def triggers(config):
    """One row an attack: clean, triggered, difference x 5 (grey is no difference)."""
    plt = pyplot()
    train, test = load_data(config, True), load_data(config, False)
    if config.image >= len(test):
        raise UserError(f"--image {config.image}: the test set has the images 0 to {len(test) - 1}")
    image = test.images[config.image:config.image + 1]
    rows = []
    for name, options in tqdm(attacks.PRESETS.items(), "triggers", leave=False, disable=None):
        try:
            title = f"{name} (training image)" if "clTrigger" in options.values() else name
            rows.append((title, triggered(options, config, train, image)))
        except UserError as e:
            say(f"note: {name} is left out: {e}")
    columns = -(-len(rows) // ROWS_A_COLUMN)
    figure, axes = plt.subplots(min(len(rows), ROWS_A_COLUMN), 3 * columns, squeeze=False,
                                figsize=(4.6 * columns, 1.42 * min(len(rows), ROWS_A_COLUMN) + 0.4))
    for axis in axes.flat:
        axis.axis("off")
    for k, (name, stamped) in enumerate(rows):
        row, column = k % ROWS_A_COLUMN, 3 * (k // ROWS_A_COLUMN)
        difference = 127.5 + 5 * (stamped.float() - image.float())
        cells = (image, stamped, difference.clamp(0, 255).to(torch.uint8))
        for j, (title, cell) in enumerate(zip(("clean", "triggered", "difference x 5"), cells, strict=True)):
            axis = axes[row, column + j]
            show(axis, cell[0])
            axis.set_title(name if j == 1 else title if row == 0 else "", fontsize=8,
                           fontweight="bold" if j == 1 else "normal", pad=3)
    figure.tight_layout(pad=0.4)
    save(figure, config, "triggers")


def save(figure, config, name):
    path = Path(config.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    say(f"saved: {path}")


def known_trigger(config):
    """The ``Subject`` of ``config``, which must have a trigger. Raises ``UserError``."""
    config, content, attack = opened(config)
    check_writable(Path(config.out), "out")
    subject = study(config, content, attack, choose_device(config.device))
    if subject.trigger is None:
        raise UserError("--trigger_type none: these pictures show what a trigger does; name it")
    return subject


def shown_networks(subject, config):
    """[(title, network)]: the one under study, and those in ``--networks``."""
    found = [("backdoored", subject.model)]
    for file in config.networks:
        content = load_checkpoint(file)
        stored = stored_config(content)
        name = stored.get("defense")
        title = defenses.title(name) if name in defenses.NAMES else Path(file).stem
        title = "teacher" if content.get("stage") == "teacher" else title
        found.append((title, subject.another(content, Path(file), config.s_name)))
    return found


def show(axis, image):
    axis.imshow(image.permute(1, 2, 0).cpu().numpy().squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def heat(axis, image, value):
    """``value`` (H, W), any scale, as colours over the uint8 ``image`` (C, H', W')."""
    value = torch.nn.functional.interpolate(value[None, None].float(), image.shape[1:], mode="bilinear")[0, 0]
    grey = image.float().mean(0).cpu().numpy()
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.imshow((value / value.max().clamp(min=1e-12)).cpu().numpy(), cmap="jet", vmin=0, vmax=1, alpha=0.5)


def grid(config, subject, titles, draw, name, title):
    """A figure with two rows an example, clean and triggered; ``draw(axes, image)`` fills a row but for its first."""
    plt = pyplot()
    clean, stamped = subject.examples(config.images)
    figure, axes = plt.subplots(2 * len(clean), 1 + len(titles), squeeze=False, layout="constrained",
                                figsize=(1.35 * (1 + len(titles)), 1.4 * 2 * len(clean) + 0.5))
    for k, row in enumerate(axes):
        image = (clean, stamped)[k % 2][k // 2]
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        show(row[0], image)
        row[0].set_ylabel(("clean", "triggered")[k % 2], fontsize=8)
        draw(row[1:], image)
    for axis, text in zip(axes[0], ["image", *titles], strict=True):
        axis.set_title(text, fontsize=8)
    figure.suptitle(textwrap.fill(title, 16 * (1 + len(titles))), fontsize=9)  # narrow with one network
    save(figure, config, name)


def attention(config):
    """The attention maps sum |F|^2 of each stage of each network, on clean and triggered images."""
    subject = known_trigger(config)
    networks = shown_networks(subject, config)
    layers = feature_layers(subject.model, config.layers)

    def draw(axes, image):
        maps = []
        for _, model in networks:
            with torch.no_grad(), Features(model, layers) as taken:
                model(to_float(image[None]))
                maps += [attention_map(f.float())[0, 0] for f in taken.outputs()]
        for axis, value in zip(axes, maps, strict=True):
            heat(axis, image, value)

    grid(config, subject, [f"{title}\n{layer}" for title, _ in networks for layer in layers], draw, "attention",
         f"Attention maps, {subject.attack.trigger_type}")


def gradcam(config):
    """Grad-CAM of the predicted class at the last stage of each network, on clean and triggered images."""
    subject = known_trigger(config)
    networks, names = shown_networks(subject, config), subject.clean.classes
    layer = deepest(subject.model, to_float(subject.test.images[:8]), feature_layers(subject.model, config.layers))

    def draw(axes, image):
        for axis, (_, model) in zip(axes, networks, strict=True):
            value, k = grad_cam(model, to_float(image[None]), layer)
            heat(axis, image, value[0])
            axis.set_xlabel(names[int(k)], fontsize=7, labelpad=1)

    grid(config, subject, [title for title, _ in networks], draw, "gradcam",
         f"Grad-CAM of the predicted class at {layer}, {subject.attack.trigger_type}")


def channels(config):
    """Per channel: l-inf norm on clean and triggered test images; histograms of each norm on both, and of what the
    trigger adds to it. Prints how far the channel that is raised most stands out of all."""
    plt = pyplot()
    subject = known_trigger(config)
    layer = last_layer(subject.model, subject.clean.images, config.prune_layer)
    clean = channel_norms(subject.model, layer, subject.test.images[subject.poisoned_test.poisoned])
    stamped = channel_norms(subject.model, layer, subject.poisoned_test.images)
    figure, axes = plt.subplots(3, 3, figsize=(11, 9), layout="constrained")
    order = clean["linf"].argsort(descending=True).cpu()
    for axis in axes[0, 1:]:
        axis.remove()
    wide = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    axes[0, 0].remove()
    wide.plot(clean["linf"].cpu()[order], drawstyle="steps-mid", label="clean")
    wide.plot(stamped["linf"].cpu()[order], drawstyle="steps-mid", label="triggered")
    wide.set(xlabel=f"channel of {layer}, by its norm on clean images", ylabel="mean l-inf norm")
    wide.legend()
    for (both, difference), (name, title) in zip(axes[1:].T, NORMS.items(), strict=True):
        added = (stamped[name] - clean[name]).cpu()
        both.hist([clean[name].cpu().numpy(), stamped[name].cpu().numpy()], 20, label=["clean", "triggered"])
        both.set(xlabel=f"mean {title} norm", ylabel="channels")
        both.legend()
        difference.hist((added / added.std().clamp(min=1e-12)).numpy(), 30)
        difference.set(xlabel=f"added to the {title} norm / standard deviation", ylabel="channels")
        apart = (added.max() - added.mean()) / added.std().clamp(min=1e-12)
        say(f"{title:<5}  channel {int(added.argmax())} of {layer} is raised most, {apart:.1f} standard deviations "
            f"above the mean of all")
    figure.suptitle(f"{subject.attack.trigger_type}, {config.s_name}", fontsize=10)
    save(figure, config, "channels")


def threshold(config):
    """ACC and ASR on the test set against the number of channels pruned in the order of each norm; prints where the ASR
    first falls below 50 and 10%.

    The order comes from the trigger that Neural Cleanse finds, as in ``defenses/linf_pruning.py``.
    """
    plt = pyplot()
    subject = known_trigger(config)
    model = subject.model
    layer = last_layer(model, subject.clean.images, config.prune_layer)
    found = linf_pruning.smallest(neural_cleanse.reversed_before(model, subject.clean, config, TerminalProgress()))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)

    def measure(pruned):
        result = evaluate(pruned, subject.test, subject.poisoned_test, subject.aim)
        bar.update()
        return result["clean_acc"], result["asr"]

    raised = neural_cleanse.raised(model, layer, subject.clean.images, found, [0])
    for axis, (norm, title) in zip(axes, NORMS.items(), strict=True):
        with tqdm(total=len(counts(len(raised[norm]))), desc=title, leave=False, disable=None) as bar:
            points = linf_pruning.sweep(model, layer, raised[norm].argsort(descending=True), measure)
        for limit in (50, 10):
            k, acc, asr = next((p for p in points if p[2] < limit), points[-1])
            say(f"{title:<5}  ASR {asr:5.2f} with {k} channels of {layer} pruned, {points[0][1] - acc:.2f} points of "
                f"ACC lost{'' if asr < limit else f': never below {limit}'}")
        axis.plot([p[0] for p in points], [p[1] for p in points], label="ACC")
        axis.plot([p[0] for p in points], [p[2] for p in points], label="ASR")
        axis.set(xlabel=f"channels of {layer} pruned, {title} norm", ylim=(0, 101))
    axes[0].set_ylabel("percent of the test set")
    axes[0].legend()
    figure.suptitle(f"{subject.attack.trigger_type}, trigger reversed for label {found.labels[0]}", fontsize=10)
    save(figure, config, "threshold")


def curves(config):
    """ACC and ASR per epoch of the last run in ``--results`` that measured them."""
    plt = pyplot()
    runs = [r for r in read_lines(Path(config.results)) if any("asr" in e for e in r.get("history", []))]
    if not runs:
        raise UserError(f"--results {config.results}: holds no run of main.py with --eval_every 1")
    stages = {}
    for e in runs[-1]["history"]:
        if "clean_acc" in e:
            stages.setdefault(e["stage"], []).append(e)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    start = runs[-1]["metrics"].get("backdoored", {})  # before erasing; a run of train_badnet.py has none
    for axis, key, title in zip(axes, ("clean_acc", "asr"), ("ACC", "ASR"), strict=True):
        for stage, epochs in stages.items():
            points = [(e["epoch"], e[key]) for e in [{"epoch": 0, key: start.get(key)}, *epochs] if e[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=stage)
        axis.set(xlabel="epoch", ylabel=f"{title}, percent", ylim=(None, 101))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    about = {**runs[-1]["config"], **runs[-1].get("attack", {})}
    figure.suptitle(", ".join(about[name] for name in ("trigger_type", "s_name", "defense") if about.get(name)),
                    fontsize=10)
    save(figure, config, "curves")


PICTURES = {"triggers": (triggers, PictureConfig), "attention": (attention, StudyConfig),
            "gradcam": (gradcam, StudyConfig), "channels": (channels, StudyConfig),
            "threshold": (threshold, StudyConfig), "curves": (curves, StudyConfig)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in PICTURES:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__.strip())
            return 0
        print(f"visualize.py: error: what to draw comes first, one of {', '.join(PICTURES)}, got "
              f"{argv[0] if argv else 'nothing'!r}", file=sys.stderr)
        return 2
    return run_script(*PICTURES[argv[0]], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
