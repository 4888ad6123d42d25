"""Settings with command-line overrides, seeds, devices, progress, whole-or-absent file writes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import importlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

OTHER_FLAGS = {"--epochs": "NUM_EPOCHS"}  # second names, as settings are called elsewhere
PATH_SUFFIXES = ("_DIR", "_FILE", "_PATH", "_SHARDS")


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong and what to do."""


# --- Settings -------------------------------------------------------------------------------


def constants(config: ModuleType) -> dict[str, Any]:
    """The UPPER_CASE values of a configuration module, in the order in which they stand."""
    return {name: value for name, value in vars(config).items() if name.isupper()}


def constant_comments(config: ModuleType) -> dict[str, str]:
    """The comment at the end of each constant's line: it is the flag's help text."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Z\d_]+) = .*?  # (.+)$", source, re.M))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes", "on")


def _flag_type(default: object) -> Callable[[str], Any]:
    if default is None:
        return lambda text: None if text.lower() in ("", "none") else text
    return _boolean if isinstance(default, bool) else type(default)


def script_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for a script's own flags; its `__doc__` begins and ends what `--help` says."""
    if epilog is None:
        description, _, epilog = description.partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def load_settings(
    config: ModuleType,
    argv: Sequence[str] | None,
    description: str,
    *,
    only: Sequence[str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    preset: Callable[[argparse.Namespace], dict[str, Any]] | None = None,
    epilog: str | None = None,
) -> SimpleNamespace:
    """Read the settings of one run: `config`, then a preset, then command-line flags.

    `only` names the constants that are flags of this script (all by default). `add_arguments`
    adds the script's own flags, which arrive in lower case (`settings.demo`). `preset` maps the
    parsed flags to values that replace the configuration's, but not the flags given.

    The module is never changed. An unknown or ill-typed flag ends the program with code 2.
    """
    defaults = constants(config)
    comments = constant_comments(config)
    parser = script_parser(description, epilog)
    if add_arguments:
        add_arguments(parser)
    group = parser.add_argument_group("settings (defaults stand in config.py)")
    for name in only if only is not None else defaults:
        default = defaults[name]
        group.add_argument(
            f"--{name.lower()}",
            *(flag for flag, meant in OTHER_FLAGS.items() if meant == name),
            dest=name,
            type=_flag_type(default),
            default=argparse.SUPPRESS,
            metavar="TEXT" if default is None else type(default).__name__.upper(),
            help=f"{comments[name]} [{default}]".replace("%", "%%"),
        )
    flags = parser.parse_args(argv)
    root = Path(config.__file__).resolve().parent
    values = {name: _anchor(root, name, value) for name, value in defaults.items()}
    if preset:
        values |= preset(flags)
    return SimpleNamespace(**values | vars(flags))


def _anchor(root: Path, name: str, value: object) -> object:
    """A path in the configuration is meant from the configuration's folder; an address is none."""
    if isinstance(value, str) and value and name.endswith(PATH_SUFFIXES) and ":" not in value:
        return os.path.normpath(root / Path(value).expanduser())
    return value


def check_ranges(settings: SimpleNamespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse settings outside their range, both ends of which are allowed."""
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if not (math.isfinite(value) and least <= value <= most):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UserError(f"{name} is {value}: it must be {bound}")


def require_extra(module: str, requirements: str) -> ModuleType:
    """Import what only some of the project's uses need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {error.name}: run pip install -r {requirements}") from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line and without secrets, for a message of ours."""
    return redact((str(error).strip() or repr(error)).splitlines()[0])


def redact(text: str) -> str:
    """Hide keys that the environment holds, and what a request was authorised with.

    Servers quote what they were sent, and libraries pass it on in their errors.
    """
    for name, value in os.environ.items():
        if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"\b(Basic|Bearer) [\w+/=.~-]{8,}", r"\1 ***", text)
    signed = r"(?i)([?&][\w-]*(?:signature|sig|token|credential|key)[\w-]*=)[^&\s]+"
    text = re.sub(signed, r"\1***", text)
    text = re.sub(r"\bhf_(?:oauth_)?[A-Za-z0-9]{16,}", "hf_***", text)
    return re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text)


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main`, turning a user's mistake into one message and exit code 1."""
    try:
        sys.exit(main())
    except UserError as error:
        message = redact(str(error))
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError that only its text tells from others.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        message = (
            f"out of memory ({first_line(error)}): halve --batch_size and double "
            "--gradient_accumulation_steps, or take a smaller decoder; checkpoints are as before"
        )
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nothing can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    sys.stdout.flush()
    sys.exit(f"error: {message}")


# --- Seeds, devices, precision --------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device(name: str = "auto") -> torch.device:
    """The device named, or the best one here: CUDA, else MPS, else the CPU."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here["cpu"] = True
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    kind = name.split(":")[0]
    if kind not in here:
        raise UserError(f"DEVICE is {name!r}: use auto, cuda, mps or cpu")
    if not here[kind]:
        raise UserError(f"DEVICE is {name!r}, but torch sees no such device: use --device auto")
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bf16 where the hardware multiplies it fast, else fp32."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"PRECISION is {precision!r}: use auto, bf16 or fp32")
    fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = precision == "bf16" or (precision == "auto" and fast)
    return torch.bfloat16 if chosen else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which matrix products are done in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# --- Progress -------------------------------------------------------------------------------


class Bar:
    """A progress bar on a terminal; elsewhere a plain line now and then."""

    PAUSE = 30.0  # seconds between two lines

    def __init__(self, total: int, label: str, unit: str, done: int = 0, quiet: bool = False):
        """Begin with `done` of `total` units behind; `quiet` shows nothing."""
        self.total, self.label, self.done, self.before = total, label, done, done
        self.quiet = quiet
        self.started = self.spoken = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=quiet or None)

    def step(self, count: int, text: str = "") -> None:
        """Go on by `count` units; `text` is shown beside."""
        now = time.monotonic()
        self.done += count
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(count)
        if self.bar.disable and not self.quiet and now - self.spoken > self.PAUSE:
            self.spoken = now
            said = f"  {self.label} {self.done / self.total:4.0%}  {text + ', ' if text else ''}"
            print(f"{said}{self.minutes_left:.1f} min left", flush=True)

    @property
    def minutes_left(self) -> float:
        """How long the rest takes at the speed so far, of which there must be some."""
        taken = time.monotonic() - self.started
        return taken / (self.done - self.before) * (self.total - self.done) / 60

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resident_kilobytes() -> int | None:
    """The RAM this process holds now, in units of 1,024 bytes; None where it isn't Linux."""
    status = Path("/proc/self/status")  # `getrusage` tells of the peak, and of the parent's too
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) if status.exists() else None


# --- Files ----------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; once the block has ended well, it becomes `path`.

    A reader sees the old file or the whole new one, never a part, even if the machine stops, the
    disk is full, or the folder can't be written.
    """
    path = Path(path)
    temporary = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with contextlib.suppress(OSError):  # some network disks know no locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed: a sign that the writer lives
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextlib.contextmanager
def sole_user(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep a folder for this process; the lock goes with the process, however it ends.

    Another process that uses it is an error, or waited for. Files of `atomic_write` that a killed
    process has left half-written there are removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - closed below, with the lock
    except OSError as error:
        raise write_error(error, folder) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(
                    f"another run is writing to {folder}: wait for it to end, or choose another "
                    "folder with --output_dir"
                ) from None
            print(f"waiting for another process to leave {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError), open(leftover, "rb") as left:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer may be at work
                leftover.unlink()
        yield


def write_error(error: OSError, path: Path) -> Exception:
    """Say in a user's words that `path` can't be written; other errors come back as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"no room left to write {path}: free some space there and run again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{path} can't be written ({error.strerror}): choose another folder")
    return error


def read_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark, in which no key stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path}: the key {key!r} stands twice: merge the two entries")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run python prepare_dataset.py") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise UserError(f"{path} is not valid JSON: {error}") from None


def size_text(size: int) -> str:
    """A number of bytes for people: `4.4 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def require_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Check that the disk of each folder, which need not exist yet, has room for so many bytes."""
    places, needed = {}, Counter()
    for folder, size in needs:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed[there.stat().st_dev] += size
        places.setdefault(there.stat().st_dev, there)
    for disk, place in places.items():
        free = shutil.disk_usage(place).free
        if free < needed[disk]:
            raise UserError(
                f"the disk of {place} has {size_text(free)} free, but "
                f"{size_text(needed[disk])} are needed: free some space, or choose another place "
                "with --data_dir"
            )
