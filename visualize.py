"""Pictures, as PNG files.

    python visualize.py triggers                    # every attack: clean image, triggered image, their difference x 5

Needs matplotlib (pip install matplotlib), which nothing else here does.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

import attacks
from config import AttackConfig, PictureConfig, UserError
from data_loader import load_data
from utils.checkpoint import load_checkpoint
from utils.files import write_atomically
from utils.run import run_script, say

LEARNED = {"inputAwareTrigger": "input_aware"}  # their networks' folders below --weights
ROWS_A_COLUMN = 10


def plotting():
    """matplotlib without a screen. Raises ``UserError`` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("visualize.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


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
    pyplot = plotting()
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
    figure, axes = pyplot.subplots(min(len(rows), ROWS_A_COLUMN), 3 * columns, squeeze=False,
                                   figsize=(4.6 * columns, 1.42 * min(len(rows), ROWS_A_COLUMN) + 0.4))
    for axis in axes.flat:
        axis.axis("off")
    for k, (name, stamped) in enumerate(rows):
        row, column = k % ROWS_A_COLUMN, 3 * (k // ROWS_A_COLUMN)
        difference = 127.5 + 5 * (stamped.float() - image.float())
        cells = (image, stamped, difference.clamp(0, 255).to(torch.uint8))
        for j, (title, cell) in enumerate(zip(("clean", "triggered", "difference x 5"), cells, strict=True)):
            axis = axes[row, column + j]
            axis.imshow(cell[0].permute(1, 2, 0).numpy().squeeze(), cmap="gray", vmin=0, vmax=255,
                        interpolation="nearest")
            axis.set_title(name if j == 1 else title if row == 0 else "", fontsize=8,
                           fontweight="bold" if j == 1 else "normal", pad=3)
    figure.tight_layout(pad=0.4)
    path = Path(config.out) / "triggers.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: figure.savefig(f, dpi=130, format="png"))
    say(f"saved: {path}")


PICTURES = {"triggers": triggers}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in PICTURES:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__.strip())
            return 0
        print(f"visualize.py: error: what to draw comes first, one of {', '.join(PICTURES)}, got "
              f"{argv[0] if argv else 'nothing'!r}", file=sys.stderr)
        return 2
    return run_script(PICTURES[argv[0]], PictureConfig, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
