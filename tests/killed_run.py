"""Run train.py in this process until a point where it kills itself with SIGKILL, really.

    python tests/killed_run.py WHERE COUNT flags of train.py ...

WHERE: "features" (after so many packs of one batch each), "shards" (before the table of the
so-manieth shard, whose features are written), "update" (after so many),
"validation" (at the start of so many), "save" (in the middle of writing the so-manieth .pt) or
"rename" (whole, but not yet under its name). Under torchrun only the process of rank 1 does so, and
only where the job was not started again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import features  # noqa: E402
import shards  # noqa: E402
import train  # noqa: E402
from utils import run_script  # noqa: E402


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def counted(original: Callable, count: int, last: Callable[..., Any]) -> Callable:
    """`original` until its call number `count`, which is `last` and then death."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < count:
            return original(*args, **options)
        last(*args, **options)
        die()

    return call


def half_saved(save: Callable) -> Callable[..., None]:
    def save_half(content: Any, file: IO[bytes]) -> None:
        save(content, file)
        file.truncate(file.tell() // 2)

    return save_half


def main() -> int:
    where, count, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    place = os.environ.get("RANK", "1"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if place != ("1", "0"):
        return train.main(flags)
    if where == "features":
        features.PACK_BYTES = 1
        features.add_pack = counted(features.add_pack, count, features.add_pack)
    elif where == "shards":
        write_pack = shards.write_pack

        def without_table(*arguments: Any) -> None:
            features.write_table = lambda *_: None
            write_pack(*arguments)

        shards.write_pack = counted(write_pack, count, without_table)
    elif where == "update":
        train.update = counted(train.update, count, train.update)
    elif where == "validation":
        train.validation_loss = counted(train.validation_loss, count, lambda run, data: None)
    elif where == "save":
        torch.save = counted(torch.save, count, half_saved(torch.save))
    elif where == "rename":
        replace = os.replace
        of_checkpoints = counted(replace, count, lambda *paths: None)

        def renamed(source: Path, target: Path) -> None:
            known = str(target).endswith((".pt", ".safetensors"))
            (of_checkpoints if known else replace)(source, target)

        os.replace = renamed
    else:
        raise SystemExit(f"no such place: {where}")
    return train.main(flags)


if __name__ == "__main__":
    run_script(main)
