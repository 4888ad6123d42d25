"""Run programs in processes of their own, without importing torch anew in each.

A process that has imported the libraries, and done nothing else, is forked for each program: real
processes, with their own limits, signals and exit codes, that start in a moment.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import huggingface_hub.constants

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ALSO = ("HF_", "WANDB_", "HOME", "NETRC")  # what a fork may find otherwise in its environment


def can_fork(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether it is a program that no library would have read another environment for.

    A program is a script of this project, `-m` and a module, or `-c` and code.
    """
    script = command[0].endswith(".py") and (REPO / command[0]).resolve().is_relative_to(REPO)
    return (script or command[0] in ("-c", "-m")) and all(
        ENVIRONMENT.get(name) == value or name.startswith(ALSO) for name, value in env.items()
    )


class Forked:
    """A running program, as `subprocess.Popen` gives it: stdout is a pipe, stderr is kept.

    Leaving its context kills it, if it still runs.
    """

    def __init__(
        self,
        *command: object,
        cwd: Path = REPO,
        limits: Mapping[int, int] | None = None,
        pictures: bool = False,
        stdin: Connection | None = None,
        **env: str,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.warm"])
        with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": str(REPO)}):
            multiprocessing.forkserver.ensure_running()
        self.args = [*map(str, command)]
        self._errors = tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace")
        mine, its = context.Pipe(duplex=False)
        environment = dict(os.environ | ENVIRONMENT | env)
        start = self.args, str(cwd), environment, dict(limits or {}), pictures, stdin
        self._process = context.Process(target=_program, args=(its, self._errors.name, *start))
        self._process.start()
        its.close()
        self.pid = self._process.pid
        self.stdout = open(os.dup(mine.fileno()), encoding="utf-8", errors="replace")
        mine.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        """Its exit code; what takes longer is killed: `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it says that was not read yet, when it has ended."""
        late = threading.Timer(timeout, self.kill)  # which ends the reading
        late.start()
        said = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return said, self._errors.read()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()
        self.stdout.close()
        self._errors.close()


def _program(
    out: Connection,
    err: str,
    command: list[str],
    cwd: str,
    environment: dict[str, str],
    limits: dict[int, int],
    pictures: bool,
    stdin: Connection | None,
) -> None:
    if stdin:
        os.dup2(stdin.fileno(), 0)
        sys.stdin = open(0, closefd=False)
    os.dup2(out.fileno(), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_APPEND), 2)
    out.close()
    sys.stdout, sys.stderr = (
        open(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2)
    )
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)  # which reads it once
    os.chdir(cwd)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup, if around the tests, ignores
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    if not pictures:
        _leave_out_pictures()
    try:
        _run(*command)
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


def _leave_out_pictures() -> None:
    """Leave empty files instead: drawing is two thirds of a training of seconds."""
    import report

    report.draw_curves = lambda history, path: path.touch()
    report.draw_samples = lambda history, photos, path, humans: path.touch()


def _run(what: str, *arguments: str) -> None:
    """Run a script, `-m` and a module, or `-c` and code, as Python does."""
    if what.endswith(".py"):
        script = os.path.join(REPO, what)
        sys.argv = [what, *arguments]
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
        return
    sys.path.insert(0, "")
    if what == "-m":
        sys.argv = [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = ["-c", *arguments[1:]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
