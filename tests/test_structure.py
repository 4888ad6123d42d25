"""The house rules: imports go one way, importing does nothing, no dead setting, a true README."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

import config
from settings import constant_comments, constants
from tests.conftest import REPO, run

# A file imports only from those before it: the rooms of the house, from the ground up.
ORDER = """
    utils settings options device tokenizer metrics pictures encoder decoder distributed features
    photo_names tables dataset texts captions_file captions_search questions_file download tars
    shards model rerank modeling_captioner attention generation self_critical checkpoint corpus
    standalone hub tracking run report sidecar check_data archive parquet commands prepare_dataset
    train evaluate inference tools.app tools.onnx_graph tools.export tools.benchmark
""".split()
SCRIPTS = set(ORDER[ORDER.index("commands") :])
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


QUICK = ("config", "utils", "settings", "options", "commands", "tokenizer")


@pytest.mark.parametrize("module", [*QUICK, "metrics"])
def test_light_modules_stay_light(module):
    heavy = {"torch", "transformers", "numpy"} if module in QUICK else {"torch", "utils"}
    assert not imports(module) & heavy


def test_importing_does_nothing():
    names = sorted({*MODULES, "config"} - {"tools.app", "tools.onnx_graph", "modeling_captioner"})
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
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}  # as new
    result = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=REPO, env=env, text=True, capture_output=True
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


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in REPO.glob("docs/*.md"))]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_the_readme_has_a_line_for_each_file():
    text = (REPO / "README.md").read_text()
    for module in MODULES:
        assert f"`{module.replace('.', '/')}.py`" in text, f"{module} has no line in the README"


def test_the_readme_is_read_to_the_end():
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 250 and len(text.split()) <= 2500


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_exists(page):
    text = (REPO / page).read_text()
    folders = r"(?:demo|tests|docs|tools|[\w.]+)"
    for path in set(re.findall(rf"`({folders}(?:/[\w.]+)*\.(?:py|sh|txt|toml))`", text)):
        known = path.startswith("photo.") or path.startswith(("captions.", "Flickr8k."))
        assert known or (REPO / path).exists(), path
    for script in set(re.findall(r"python3? (\w+(?:/\w+)*\.py)", text)):
        assert (REPO / script).exists(), script
    for module in set(re.findall(r"python3? -m (tools\.\w+)", text)):
        assert (REPO / module.replace(".", "/")).with_suffix(".py").exists(), module
    blocks = "\n".join(re.findall(r"```.*?```", text, re.S))
    # Other programs have flags of their own.
    blocks = re.sub(r"\btorchrun .*?(?=\w+\.py)", "", blocks, flags=re.S)
    blocks = re.sub(r"^(?:img2dataset|curl|conda|pip|hf) (?:.*\\\n)*.*$", "", blocks, flags=re.M)
    flags = set(re.findall(r"(?<=\s)--([a-z_-]+)", blocks))
    known = {name.lower() for name in constants(config)}
    files = [
        path for kind in ("*.py", "*.sh", "demo/*.py", "tools/*.py") for path in REPO.glob(kind)
    ]
    code = "\n".join(path.read_text() for path in files)
    for flag in flags - known:
        defined = f'"--{flag}"' in code or f"--{flag})" in code or f'"{flag}":' in code
        assert defined, f"--{flag} is in {page} only"
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (REPO / page).parent / file if file else REPO / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


def test_the_first_two_commands_are_the_set_up():
    block = re.search(r"```\w*\n(.*?)```", (REPO / "README.md").read_text(), re.S).group(1)
    lines = [line.split("#")[0].strip() for line in block.strip().splitlines()]
    assert lines == [
        "bash 01_setup.sh && .venv/bin/python train.py --demo",
        "bash 01_setup.sh --dev && .venv/bin/python -m pytest",
    ]
