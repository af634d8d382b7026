"""Is this network backdoored, with which label and which trigger? Are these inputs triggered?

    python detect.py --dataset shapes10             # shipped network, generated data
    python detect.py --s_model FILE --trigger_type none --dataset folder --data_root DIR

Neural Cleanse (defenses/neural_cleanse.py) searches the smallest trigger of every label on the clean subset; STRIP
(strip.py) looks at inputs, clean ones and, if a trigger is known, triggered ones. Writes the reversed triggers (.pt,
and .png of each suspected label, or of the smallest mask, beside the real trigger where it is known) and STRIP's
histogram to a folder in --out, and one line of results/detect.jsonl.
"""

import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import strip
from config import DetectConfig, UserError
from defenses import neural_cleanse
from subject import opened, study
from utils.checkpoint import file_hash, save_checkpoint, stored_config, versions
from utils.devices import choose_device, hardware
from utils.engine import TerminalProgress
from utils.files import append_line, write_atomically
from utils.plot import pyplot, save_figure
from utils.run import check_writable, identity, run_script, say
from utils.seeds import generator

CAPTION = 16  # pixels of a line of text above a row of images


def enlarged(array):
    """uint8 ``(H, W)`` or ``(C, H, W)`` as a picture eight times as large."""
    array = array.permute(1, 2, 0) if array.ndim == 3 and len(array) == 3 else array.reshape(array.shape[-2:])
    picture = Image.fromarray(array.cpu().numpy())
    return picture.resize((picture.width * 8, picture.height * 8), Image.Resampling.NEAREST)


def save_picture(picture, path):
    write_atomically(path, lambda f: picture.save(f, "PNG"))


def save_histogram(clean, triggered, limit, path):
    """Entropies of clean and triggered inputs as a PNG. Without matplotlib it says what to install."""
    try:
        plt = pyplot()
    except UserError as e:
        say(f"note: {path} was not drawn: {e}")
        return
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    edges = np.linspace(0, max(clean.max(), triggered.max() if triggered is not None else 0).item() + 1e-6, 41)
    axes.hist(clean.numpy(), edges, alpha=0.6, label=f"clean ({len(clean)})")
    if triggered is not None:
        axes.hist(triggered.numpy(), edges, alpha=0.6, label=f"triggered ({len(triggered)})")
    axes.axvline(limit, color="black", linestyle="--", label="threshold")
    axes.set(xlabel="mean entropy under superposition, bits", ylabel="inputs", title="STRIP")
    axes.legend()
    save_figure(figure, path)


def verdict(labels, sizes):
    """In words: what the outlying ``labels``, smallest mask first, say with masks of ``sizes`` times the median's."""
    if not labels:
        return "no label stands out"
    small = [str(label) for label, size in zip(labels, sizes, strict=True) if size < neural_cleanse.SMALL]
    if small:
        return f"backdoored, target label{'s' * (len(small) > 1)} {', '.join(small)}"
    return (f"label {labels[0]} stands out, but its mask has {sizes[0]:.0%} of the median's size; clean networks too "
            f"have such labels: doubtful")


def cleanse(subject, config, folder):
    """Neural Cleanse over all labels: prints a line each and the verdict, writes the triggers. Returns the results, or
    None for too few labels."""
    try:
        neural_cleanse.enough_labels(subject.clean)
    except UserError as e:
        say(f"note: {e}: STRIP alone is run")
        return None
    triggers = neural_cleanse.reversed_before(subject.model, subject.clean, config, TerminalProgress())
    seconds = round(triggers.seconds, 1)
    index, suspects = neural_cleanse.anomaly_indices(triggers.norms), neural_cleanse.outliers(triggers)
    sizes = triggers.norms / triggers.norms.quantile(0.5)
    say(f"\n{'label':<16}{'mask, pixels':>14}{'of the median':>15}{'anomaly index':>15}{'success, %':>12}")
    for k, label in enumerate(triggers.labels):
        mark = "  <- backdoor?" if k in suspects else ""
        say(f"{label:>3} {subject.clean.classes[label][:12]:<12}{triggers.norms[k]:>14.2f}{sizes[k]:>15.0%}"
            f"{index[k]:>15.2f}{100 * triggers.success[k]:>12.2f}{mark}")
    labels = [triggers.labels[k] for k in suspects]
    failed = int((triggers.success < neural_cleanse.WORKS).sum())
    if failed:
        say(f"note: no working trigger was found for {failed} of {len(triggers.labels)} labels, so that the index says "
            f"little; try more --nc_steps")
    say(f"\nNeural Cleanse: {verdict(labels, sizes[suspects].tolist())} "
        f"({seconds:.0f} s; an anomaly index above 2 on the side of small masks counts)")
    shown = suspects or [int(triggers.norms.argmin())]
    if config.save:
        save_triggers(triggers, index, shown, folder)
        save_examples(subject, triggers, shown, folder / "images.png")
        if labels:
            say(f"how often main.py leaves such a trigger working: --trigger_type reversedTrigger --reversed_file "
                f"{shlex.quote(str(folder / 'triggers.pt'))} --target_label {labels[0]}")
    return {"suspects": labels, "norms": [round(v, 3) for v in triggers.norms.tolist()],
            "of_the_median": [round(v, 3) for v in sizes.tolist()],
            "anomaly_indices": [round(v, 3) for v in index.tolist()],
            "success": [round(100 * v, 2) for v in triggers.success.tolist()], "seconds": seconds}


def save_triggers(triggers, index, shown, folder):
    """All reversed triggers in a .pt file, those numbered ``shown`` as pictures, in the place of older ones."""
    for kind in ("mask", "pattern", "trigger"):
        for old in folder.glob(f"{kind}-*.png"):
            old.unlink()
    save_checkpoint(folder / "triggers.pt", {"labels": triggers.labels, "masks": triggers.masks.cpu(),
                                             "patterns": triggers.patterns.cpu(), "norms": triggers.norms.cpu(),
                                             "anomaly_indices": index.cpu(), "success": triggers.success.cpu()})
    for k in shown:
        mask, pattern = triggers.masks[k], triggers.patterns[k]
        for name, values in (("mask", mask), ("pattern", pattern), ("trigger", mask * pattern)):
            save_picture(enlarged((255 * values).round().byte()), folder / f"{name}-{triggers.labels[k]}.png")


def save_examples(subject, triggers, shown, path, count=6):
    """Test images in rows: clean, with the real trigger (if it is known), with each reversed one in ``shown``."""
    clean, real = subject.examples(count)
    rows = [("clean", clean), *([] if real is None else [(f"{subject.attack.trigger_type}, the real one", real)]),
            *((f"reversed for label {triggers.labels[k]}", triggers.stamp(clean, k)) for k in shown)]
    rows = [(text, enlarged(torch.cat(list(row), 2))) for text, row in rows]
    width, height = rows[0][1].size
    sheet = Image.new("RGB", (width, len(rows) * (CAPTION + height)), "white")
    for k, (text, row) in enumerate(rows):
        ImageDraw.Draw(sheet).text((4, k * (CAPTION + height) + 2), text, fill="black")
        sheet.paste(row, (0, k * (CAPTION + height) + CAPTION))
    save_picture(sheet, path)


def look_at_inputs(subject, config, folder):
    """STRIP on clean and triggered test images: prints what it tells apart and draws it. Returns the results."""
    start, clean = time.perf_counter(), subject.clean
    gen = generator(config.seed, "strip")

    def some(data, n):
        return data.images[torch.randperm(len(data), generator=gen)[:n].to(data.images.device)]

    overlays = some(clean, config.strip_overlays)
    def entropies(name, images):
        with TerminalProgress().bar(f"STRIP, {name}", 0, 1, len(images)) as bar:
            return strip.entropies(subject.model, images, overlays, bar)

    own = entropies("clean subset", some(clean, config.strip_inputs))
    limit = strip.threshold(own, config.strip_frr)
    honest = entropies("clean", some(subject.test, config.strip_inputs))
    found = {"threshold": round(limit, 4), "frr": round(100 * (honest < limit).double().mean().item(), 2)}
    triggered = None
    if subject.poisoned_test is not None:
        triggered = entropies("triggered", some(subject.poisoned_test, config.strip_inputs))
        found["far"] = round(100 * (triggered >= limit).double().mean().item(), 2)
        exact = honest.sort().values[int(config.strip_frr * len(honest))]  # rejects just that share of these
        found["far_at_frr"] = round(100 * (triggered >= exact).double().mean().item(), 2)
        found["auroc"] = round(strip.auroc(honest, triggered), 4)
    found["seconds"] = round(time.perf_counter() - start, 1)
    say(f"STRIP: threshold {limit:.3f} bits, set on {len(own)} clean images for {config.strip_frr:.1%} false "
        f"rejections; {found['frr']:.2f}% of clean test images are rejected"
        + (f", {found['far']:.2f}% of triggered ones accepted ({found['far_at_frr']:.2f}% at just "
           f"{config.strip_frr:.1%} of clean ones rejected), AUROC {found['auroc']:.3f}" if "far" in found else "")
        + f" ({found['seconds']:.0f} s)")
    if config.save:
        save_histogram(honest, triggered, limit, folder / "strip.png")
    return found


def main(config):
    """Look at the network that ``config`` (``DetectConfig``) names."""
    if config.layers:
        raise UserError("--layers: is for erasing and pictures; nothing is read between the layers here")
    device = choose_device(config.device)
    config, content, attack = opened(config)
    path = Path(config.s_model)
    name = re.sub(r"(\.(tar|pth|pt))+$", "", path.name)
    folder = Path(config.out) / f"detect-{path.resolve().parent.name}-{name}"
    if config.save:
        check_writable(folder, "out")
        check_writable(Path(config.log_root), "log_root")
    subject = study(config, content, attack, device)
    if len(subject.clean) < 2 and config.detector != "neural_cleanse":
        raise UserError("the clean subset is one image; STRIP's threshold needs at least two")
    say(f"{path}: {config.s_name} on {config.dataset}, {len(subject.clean)} clean images, {device}")
    detectors = {"neural_cleanse": cleanse, "strip": look_at_inputs}
    result = {name: look(subject, config, folder) for name, look in detectors.items()
              if config.detector in ("both", name)}
    if config.save:
        append_line(Path(config.log_root) / "detect.jsonl", {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "config": identity(config),
            "inputs": {"s_model": file_hash(path)}, "data": subject.source,
            "attack": subject.about()["attack"], "erased": stored_config(content).get("defense", ""), **result,
            "machine": hardware(device, config.amp),
            "versions": versions()})
        say(f"saved: {folder}, and a line in {Path(config.log_root) / 'detect.jsonl'}")


if __name__ == "__main__":
    sys.exit(run_script(main, DetectConfig))
