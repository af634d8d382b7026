"""The architecture: who may import whom, that every option is read, that the README's commands are real."""

import ast
import re
import shlex
from dataclasses import fields

import pytest
from conftest import ROOT

from config import BenchmarkConfig, DetectConfig, EraseConfig, PictureConfig, StudyConfig, TrainConfig, parse

SCRIPTS = {"train_badnet", "main", "search", "speed", "report", "visualize", "detect", "benchmark"}
HOLDERS = {"config", "opt"}  # what a configuration is called
OWN = SCRIPTS | {"config", "data_loader", "at", "attacks", "defenses", "models", "utils", "shapes10", "subject",
                 "strip", "cam", "leaderboard"}
SOURCES = [p for p in sorted(ROOT.rglob("*.py")) if not {"tests", "data", ".venv"} & set(p.relative_to(ROOT).parts)]
MAY_IMPORT = {
    "config": set(),
    "shapes10": set(),
    "at": set(),
    "models": {"config", "models", "utils"},
    "utils": {"config", "utils", "models"},
    "attacks": {"config", "attacks", "models", "utils"},
    "strip": {"utils"},
    "leaderboard": {"config", "attacks", "defenses", "utils"},
    "cam": {"models"},
    "subject": {"config", "attacks", "data_loader", "models", "utils"},
    "data_loader": {"config", "attacks", "utils", "shapes10"},
    "defenses": {"config", "at", "models", "utils", "defenses"},
}


def imported(path):
    """The project's own modules and packages, and others, that ``path`` imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_may_import_whom(path):
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    own = imported(path) & OWN
    scripts = {"train_badnet", "main", "report"} if top == "benchmark" else set()  # runs, and writes its tables
    assert own & SCRIPTS <= scripts, "nothing else imports a script"
    if top in MAY_IMPORT:
        assert own <= MAY_IMPORT[top]


def test_config_imports_the_standard_library_only():
    import sys

    assert imported(ROOT / "config.py") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("cls", [TrainConfig, EraseConfig, DetectConfig, PictureConfig, StudyConfig,
                                 BenchmarkConfig])
def test_every_option_is_read_somewhere(cls):
    read = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                holder = getattr(node.value, "id", getattr(node.value, "attr", ""))  # opt.x or self.opt.x
                if holder in HOLDERS:
                    read.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" \
                    and isinstance(node.args[1], ast.Constant):
                read.add(node.args[1].value)
    assert {f.name for f in fields(cls)} <= read


def readme_commands():
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("*/README.md")])
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("#")[0].split("&&") if part.strip())


def test_the_commands_of_the_readme_parse():
    scripts = {"train_badnet.py": TrainConfig, "main.py": EraseConfig, "detect.py": DetectConfig,
               "benchmark.py": BenchmarkConfig}
    seen = set()
    for command in readme_commands():
        words = shlex.split(command)
        if words[0] != "python" or words[1] == "-m":
            continue
        assert (ROOT / words[1]).exists(), command
        if words[1] in scripts and "--config" not in words:
            parse(scripts[words[1]], words[2:])
        seen.add(words[1])
    assert set(scripts) <= seen


def test_the_test_command_of_the_readme_is_the_one_of_ci():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [c for c in readme_commands() if c.startswith("python -m pytest")]
    assert commands
    assert all(c in script for c in commands)
