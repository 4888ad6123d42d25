"""Run scripts in processes of their own, without importing torch anew in each.

A process that has imported the libraries, and done nothing else, is forked for each script: real
processes, with their own limits, signals and exit codes, that start in a moment.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
MODULES = [
    "train",
    "evaluate",
    "inference",
    "matplotlib.figure",
    "torch._dynamo",  # which the first optimizer loads
    "transformers.models.vit.modeling_vit",
    "transformers.models.vit.image_processing_pil_vit",
]


def can_fork(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether it is a script of this project, and wants no other environment than `ENVIRONMENT`."""
    ours = command[0].endswith(".py") and (REPO / command[0]).resolve().is_relative_to(REPO)
    return ours and all(ENVIRONMENT.get(name) == value for name, value in env.items())


def run_forked(
    command: Sequence[str], cwd: Path, limits: Mapping[int, int], timeout: float
) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives for a script of this project and its flags."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": str(REPO)}):
        multiprocessing.forkserver.ensure_running()
    environment = os.environ | ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, name) for name in ("out", "err"))
        arguments = (list(command), str(cwd), dict(environment), dict(limits), out, err)
        process = context.Process(target=_script, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [Path(path).read_text(errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess([sys.executable, *command], process.exitcode, *texts)


def _script(
    command: list[str],
    cwd: str,
    environment: dict[str, str],
    limits: dict[int, int],
    out: str,
    err: str,
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    script = os.path.join(REPO, command[0])
    sys.argv = [command[0], *command[1:]]
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out
