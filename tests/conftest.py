"""Shared helpers: small sets, and scripts run in this process or in their own."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run scripts in, so that nothing of the checkout is written over."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder, script, *args, **kwargs):
    """The script as a process of its own in ``folder``, which heeds SIGINT also where pytest runs in the background."""
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler) if os.name == "posix" else None
    return subprocess.Popen([sys.executable, "-u", str(ROOT / script), *args], cwd=folder, text=True,
                            env={**os.environ, "COLUMNS": "100"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed, **kwargs)


def until(process, text):
    """Read the process's output up to the first line with ``text``."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not printed; stderr: {process.stderr.read()}")
