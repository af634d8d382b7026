"""Checkpoints: ``.tar`` files in the demo's layout, written whole, and always read as untrusted.

A checkpoint is a dict with ``state_dict``, ``epoch``, ``optimizer`` and metrics; ours add ``config`` and ``versions``,
but no random states: what a run draws depends on its seed, the stage and the epoch alone.
Reading never runs code from the file (``weights_only=True``); the few numpy scalar types that the demo's files hold
beside tensors are allowed.
"""

import errno
import hashlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from config import UserError
from utils.files import write_atomically

NUMPY_SCALARS = [np.dtype, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
                 (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
                 np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]


def save_checkpoint(path, content):
    """Write ``content`` (a dict) to ``path``, atomically. Raises ``UserError`` if the place cannot be written to."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # written from memory, a full disk is reported as such and not as torch's inner fault
        torch.save(content, buffer)
        write_atomically(path, lambda f: f.write(buffer.getbuffer()))
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def load_checkpoint(path):
    """The dict in the checkpoint ``path``, on the CPU. Raises ``UserError`` if it cannot be read or is refused."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such checkpoint: {path}")
    if path.is_dir():
        raise UserError(f"not a checkpoint but a folder: {path}")
    if path.stat().st_size == 0:
        raise UserError(f"the checkpoint is empty: {path}")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would speak of pickle protocols before the error does
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL ([\w.]+)", str(e))
        if found:
            raise UserError(f"refused: {path} wants to run code on loading ({found[1]}); only tensors and plain "
                            f"values are read, such as model.state_dict()") from None
        raise UserError(f"not a checkpoint, or a damaged one: {path}") from None
    except OSError as e:
        if e.errno == errno.EINVAL:  # torch seeks to where a file that was cut short has nothing
            raise UserError(f"not a checkpoint, or cut short: {path}") from None
        raise UserError(f"cannot read {path}: {e.strerror or 'damaged'}") from None
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError, AssertionError,
            zipfile.BadZipFile, UnicodeDecodeError, MemoryError, OverflowError, struct.error):
        raise UserError(f"not a checkpoint, or cut short: {path}") from None
    if not isinstance(content, dict):
        raise UserError(f"not a checkpoint: {path} holds a {type(content).__name__}, not a dict")
    return content


def cached(kind, key, make):
    """``make()``, a dict of tensors, kept in data/triggers/<kind>-<hash of key>.pt and read from there next time."""
    path = Path("data") / "triggers" / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
    if path.exists():
        try:
            return load_checkpoint(path)
        except UserError:
            pass  # cut short or damaged: made anew
    made = make()
    try:
        save_checkpoint(path, made)
    except UserError as e:
        print(f"note: not cached: {e}")
    return made


def file_hash(path):
    """The SHA-256 of the file ``path`` in hexadecimal, '' for no path."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def tensor_hash(*tensors):
    """The SHA-256 of the bytes of ``tensors``, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_of(content, path):
    """The state dict in ``content``: its ``state_dict``, or ``content`` itself, or the only one under another name; a
    ``module.`` prefix is taken off."""
    def usable(state):
        return isinstance(state, dict) and bool(state) and all(
            isinstance(k, str) and torch.is_tensor(v) and v.layout == torch.strided and v.device.type == "cpu"
            for k, v in state.items())

    state = content.get("state_dict", content)
    others = [value for value in content.values() if usable(value)]
    if not usable(state) and "state_dict" not in content and len(others) == 1:
        state = others[0]
    if not usable(state):
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"not a checkpoint of a network: {path} has no state_dict of tensors; it holds "
                        f"{keys or 'nothing'}")
    return {k.removeprefix("module."): v for k, v in state.items()}


def unwrapped(model, state):
    """``state``; or, if that makes it fit ``model``, without the name that all its keys begin with, such as
    ``_orig_mod.`` of a compiled network."""
    stem = next(iter(state)).partition(".")[0] + "."
    bare = {k.removeprefix(stem): v for k, v in state.items()}
    fits = all(k.startswith(stem) for k in state) and not differences(model, bare)
    return bare if fits else state


def differences(model, state):
    """What keeps ``state`` from fitting ``model``: a list of texts, missing and superfluous keys and other shapes."""
    own = model.state_dict()
    found = [f"{k} is missing" for k in own if k not in state and not k.endswith("num_batches_tracked")]
    found += [f"{k} is not in the model" for k in state if k not in own]
    found += [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    return found


def stored_config(content):
    """The configuration in the checkpoint ``content``, a dict; empty if it has none."""
    return content["config"] if isinstance(content.get("config"), dict) else {}


def load_weights(model, content, path, model_name=""):
    """Load the weights in ``content`` (from ``load_checkpoint(path)``) into ``model``.

    Raises ``UserError`` that names the first differences and the architecture that would fit, if one does; also if a
    weight is not finite.
    """
    state = unwrapped(model, weights_of(content, path))
    found = differences(model, state)
    if found:
        fits = "; it fits --s_name {} with {} classes and {} channels".format(*a) if (a := architecture(state)) else ""
        fits += "; --grey 1 reads image files so" if a and a[2] == 1 else ""
        raise UserError(f"{path} does not fit {model_name or type(model).__name__}: {'; '.join(found[:3])}"
                        f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}{fits}")
    if not all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point()):
        raise UserError(f"{path} holds weights that are not finite")
    for key, value in model.state_dict().items():
        state.setdefault(key, value)
    model.load_state_dict(state)


def architecture(state):
    """(the name of the architecture whose weights ``state`` are, its classes, its channels), or None."""
    from models import NAMES, build

    names = list(NAMES)
    blocks = [int(m[1]) for k in state if (m := re.match(r"block1\.layer\.(\d+)\.", k))]
    width = state.get("block1.layer.0.conv1.weight")
    if blocks and max(blocks) < len(state) and width is not None and width.ndim == 4 and width.shape[0] % 16 == 0:
        names.append(f"WRN-{6 * (max(blocks) + 1) + 4}-{width.shape[0] // 16}")
    last = state.get("fc.weight")
    first = state.get("conv1.weight")
    if last is None or first is None or last.ndim != 2 or first.ndim != 4:
        return None
    names += [f"torchvision:{n}" for n in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")]
    for name in dict.fromkeys(names):
        try:
            with torch.device("meta"):
                model = build(name, last.shape[0], first.shape[1], 64)
        except (UserError, RuntimeError):
            continue
        if not differences(model, state):
            return name, last.shape[0], first.shape[1]
    return None


def versions():
    """The versions of what made a result: a dict of texts."""
    import platform

    import torchvision

    found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
             "numpy": np.__version__}
    return {name: str(version) for name, version in found.items()}  # torch's is a class that weights_only refuses
