"""Shared helpers: small sets, and scripts run in this process or in their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run scripts in, so that nothing of the checkout is written over."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder, script, *args, **kwargs):
    """The script as a process of its own in ``folder``."""
    return subprocess.Popen([sys.executable, "-u", str(ROOT / script), *args], cwd=folder, text=True,
                            env={**os.environ, "COLUMNS": "100"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def until(process, text):
    """Read the process's output up to the first line with ``text``."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not printed; stderr: {process.stderr.read()}")
