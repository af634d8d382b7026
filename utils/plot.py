"""matplotlib, an extra: without a screen, and its files written whole."""

from config import UserError
from utils.files import write_atomically


def pyplot():
    """``matplotlib.pyplot``. Raises ``UserError`` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path):
    """``figure`` as a PNG at ``path``."""
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=150))
    pyplot().close(figure)
