"""The house rules: imports go one way, importing does nothing, no dead setting, a true README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

import config
from tests.conftest import REPO, run
from utils import constant_comments, constants

# A file imports only from those before it: the rooms of the house, from the ground up.
ORDER = """
    utils tokenizer metrics encoder decoder distributed features dataset captions_file download
    shards model attention
    generation self_critical corpus checkpoint hub tracking run report sidecar
    prepare_dataset train evaluate inference
    tools.app tools.export tools.benchmark tools.check_data
""".split()
SCRIPTS = set(ORDER[ORDER.index("prepare_dataset") :])
MODULES = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts)
    for path in [*REPO.glob("*.py"), *REPO.glob("tools/[!_]*.py")]
    if path.stem != "config"
)


def source(module: str) -> str:
    return (REPO / module.replace(".", "/")).with_suffix(".py").read_text()


def imports(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & {*ORDER}
            names |= inside or {node.module}
    return {name if name in ORDER else name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    assert module in ORDER, f"{module} has no place in the order: is it worth a file?"
    ours = imports(module) & {*ORDER, "config", "demo", "tests"}
    if module not in SCRIPTS:
        assert "config" not in ours and "demo" not in ours
    assert "tests" not in ours
    right = [name for name in ours & set(ORDER) if ORDER.index(name) >= ORDER.index(module)]
    assert not right, f"{module} imports {right}, which stand on its right"


@pytest.mark.parametrize("module", ["utils", "tokenizer", "metrics"])
def test_light_modules_stay_light(module):
    heavy = {"utils": {"transformers"}, "tokenizer": set(), "metrics": {"torch", "utils"}}
    assert not imports(module) & heavy[module]


def test_importing_does_nothing():
    names = sorted({*MODULES, "config"} - {"tools.app", "tools.export"})
    code = (
        "import random, torch, os, sys, logging\n"
        "torch.manual_seed(1); random.seed(1)\n"
        "before = torch.get_rng_state(), random.getstate(), dict(os.environ), len(os.listdir())\n"
        f"for name in {names!r}: __import__(name)\n"
        "after = torch.get_rng_state(), random.getstate(), dict(os.environ), len(os.listdir())\n"
        "assert torch.equal(before[0], after[0]) and before[1] == after[1]\n"
        "assert not logging.getLogger().handlers\n"
        "new = {k for k in after[2] if after[2][k] != before[2].get(k)}\n"
        "assert not new, new\n"
    )
    result = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=REPO, text=True, capture_output=True
    )
    assert result.returncode == 0 and result.stdout == "", result.stdout + result.stderr


def test_every_constant_is_plain_and_explained():
    for name, value in constants(config).items():
        assert value is None or isinstance(value, (bool, int, float, str)), name
        assert constant_comments(config)[name], f"{name} has no comment"


def test_every_constant_has_a_reader():
    code = "\n".join(map(source, MODULES))
    for name in constants(config):
        assert re.search(rf"settings\.{name}\b|\"{name}\"", code), f"nothing reads {name}"


def test_help_lists_every_constant():
    result = run("train.py", "--help")
    assert result.returncode == 0
    for name in constants(config):
        assert f"--{name.lower()} " in result.stdout


def test_the_readme_names_what_exists():
    text = (REPO / "README.md").read_text()
    for path in set(re.findall(r"`((?:demo|tests|[\w.]+)(?:/[\w.]+)*\.(?:py|sh|txt|toml))`", text)):
        assert (REPO / path).exists(), path
    for script in set(re.findall(r"python3? (\w+(?:/\w+)*\.py)", text)):
        assert (REPO / script).exists(), script
    for module in MODULES:
        assert f"`{module.replace('.', '/')}.py`" in text, f"{module}.py has no line in the README"
    blocks = "\n".join(re.findall(r"```.*?```", text, re.S))
    blocks = re.sub(r"\btorchrun .*?(?=\w+\.py)", "", blocks, flags=re.S)  # its own flags
    blocks = re.sub(r"^img2dataset (?:.*\\\n)*.*$", "", blocks, flags=re.M)  # another program
    flags = set(re.findall(r"(?<=\s)--([a-z_]+)", blocks))
    known = {name.lower() for name in constants(config)}
    code = "\n".join(
        path.read_text()
        for path in [
            *REPO.glob("*.py"),
            *REPO.glob("*.sh"),
            *REPO.glob("demo/*.py"),
            *REPO.glob("tools/*.py"),
        ]
    )
    for flag in flags - known:
        assert f'"--{flag}"' in code or f"--{flag})" in code, f"--{flag} is in the README only"
    for link in re.findall(r"\]\(#([\w-]+)\)", text):
        headings = [
            re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
            for h in re.findall(r"^#+ (.+)$", text, re.M)
        ]
        assert link in headings, f"#{link}"


def test_the_first_two_commands_are_the_set_up():
    block = re.search(r"```\w*\n(.*?)```", (REPO / "README.md").read_text(), re.S).group(1)
    lines = [line.split("#")[0].strip() for line in block.strip().splitlines()]
    assert lines == [
        "bash 01_setup.sh && .venv/bin/python train.py --demo",
        "bash 01_setup.sh --dev && .venv/bin/python -m pytest",
    ]
