"""Reads back what Weights & Biases wrote while offline: a log of records in LevelDB's format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768


def records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file, each in one or more chunks that never cross a block."""
    content, place, whole = path.read_bytes(), HEADER, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # no room for a chunk's header
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:  # the file's padding
            break
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last
            yield Record.FromString(whole)
            whole = b""


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, an entry a step."""
    rows = [record.history for record in records(path) if record.HasField("history")]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def run_of(path: Path) -> tuple[str, dict[str, Any]]:
    """The run's id and its configuration."""
    run = next(record.run for record in records(path) if record.HasField("run"))
    config = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for item in run.config.update
    }
    return run.run_id, config
