"""The device, its precision, and the number of threads."""

import contextlib
import platform
from pathlib import Path

import torch

from config import UserError


def choose_device(name="auto"):
    """"auto": CUDA, then MPS, then the CPU; else the device of that name. Raises ``UserError`` if it is not there.

    On CUDA float32 is from then on float32 also in convolutions, where torch would take the shorter TF32.
    """
    torch.backends.cudnn.allow_tf32 = False
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: auto, cpu, cuda, cuda:<number> or mps is allowed") from None
    if device.type == "cpu":
        return torch.device("cpu")
    there = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0, "mps": int(mps)}
    if device.type not in there or (device.index or 0) >= there[device.type]:
        raise UserError(f"--device {name}: not on this machine, which has {machine()}; auto takes what is there")
    return device


def hardware(device, amp):
    """The name of what ``device`` computes on and the numbers that training with ``--amp`` uses, for result lines."""
    numbers = "bf16" if use_bf16(amp, device) else "float32"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {numbers}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return f"{device.type}, {name}, {torch.get_num_threads()} threads, {numbers}"


def machine():
    """What can be computed on here, in a few words."""
    words = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())] \
        if torch.cuda.is_available() else []
    words += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join([*words, f"cpu ({torch.get_num_threads()} threads)"])


def use_bf16(amp, device):
    """Whether ``--amp`` means bf16 on ``device``: "bf16", or "auto" where the hardware computes in bf16."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return has_bf16_instructions() and torch.backends.mkldnn.is_available()
    return False


def has_bf16_instructions():
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16, AMX, or Arm's BF16); elsewhere it is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(word in flags for word in ("avx512_bf16", "amx_bf16", " bf16"))
