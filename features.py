"""The feature cache: every photo passes the encoder once, and training reads the result.

The cache is a folder of shards. A shard is two files: the features of some photos in half
precision, one after the other, and a JSON list saying which photos, with each one's size, time
and hash, and a checksum of its features. Shards are only ever added, each whole or absent, so a
build that was interrupted goes on where it stopped, and a photo that changed is encoded again
into a new shard, whose entry then counts. Several processes build it together, a share each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distributed import ALONE, Team
from encoder import FrozenEncoder, ImageError
from utils import (
    Bar,
    UserError,
    atomic_write,
    autocast,
    require_room,
    size_text,
    sole_user,
)

FORMAT = 1
SHARD_BYTES = 64 * 2**20
OPEN_FILES = 256  # shards open at a time; systems allow a process about 1,000 files

In, Out = TypeVar("In"), TypeVar("Out")
Item = tuple[str, int]  # a photo's name, and which view of it


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an item's features stand, and of which file they were made."""

    shard: Path
    row: int
    size: int
    mtime: int
    digest: str
    checksum: int


class FeatureCache:
    """Read access to features by photo and view. Use `build_features` to get one."""

    def __init__(self, folder: Path, shape: tuple[int, int], entries: dict[Item, Entry]):
        """Args: `shape`, (patches, width) of each photo's features."""
        self.folder = folder
        self.shape = shape
        self.entries = entries
        self._files: dict[Path, int] = {}

    def __contains__(self, item: Item) -> bool:
        return item in self.entries

    def read(self, items: Sequence[Item]) -> Tensor:
        """Features (items, patches, width) in half precision, checked against their checksums.

        Plain reads instead of a memory map: mapped pages count as this process's memory, which
        then seems to grow with the data set.

        Raises:
            UserError: a shard is damaged; the message says which one to delete.
        """
        features = np.empty((len(items), *self.shape), dtype=np.float16)
        for row, item in zip(features, items, strict=True):
            entry = self.entries[item]
            if entry.shard not in self._files:
                if len(self._files) == OPEN_FILES:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[entry.shard] = os.open(entry.shard, os.O_RDONLY)
            file = self._files[entry.shard]
            read_row(file, entry.row, row, entry.checksum, entry.shard, item[0])
        return torch.from_numpy(features)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def read_row(file: int, row: int, into: np.ndarray, checksum: int, shard: Path, photo: str) -> None:
    """Read one photo's features from a shard that is open as `file`, and check them.

    Raises:
        UserError: they are damaged; the message says which shard to delete.
    """
    buffer = memoryview(into).cast("B")
    got = os.preadv(file, [buffer], row * into.nbytes)
    if got != into.nbytes or zlib.crc32(buffer) != checksum:
        raise UserError(
            f"the feature shard {shard} is damaged (at {photo}): delete it and run the same "
            "command again, which makes what it held anew"
        )


class ResidentFeatures:
    """All of a cache's features in the memory of a device, in half precision."""

    LOAD = 256

    def __init__(self, cache: FeatureCache, device: torch.device):
        """Read the whole cache, `LOAD` photos at a time."""
        items = list(cache.entries)
        self.rows = {item: row for row, item in enumerate(items)}
        self.features = torch.empty(len(items), *cache.shape, dtype=torch.float16, device=device)
        parts = [items[i : i + self.LOAD] for i in range(0, len(items), self.LOAD)]
        done = 0
        for part in prefetch(cache.read, parts):
            self.features[done : done + len(part)] = part.to(device)
            done += len(part)

    def read(self, items: Sequence[Item]) -> Tensor:
        """Features (items, patches, width) in half precision, on the device."""
        index = torch.tensor([self.rows[item] for item in items], dtype=torch.long)
        if self.features.is_cuda:
            index = index.pin_memory()
        return self.features[index.to(self.features.device, non_blocking=True)]


def resident_or_cached(
    cache: FeatureCache, device: torch.device
) -> FeatureCache | ResidentFeatures:
    """The features in a GPU's memory if they take at most half of what is free, else on disk."""
    if device.type != "cuda":
        return cache
    free, _ = torch.cuda.mem_get_info(device)
    patches, width = cache.shape
    small = len(cache.entries) * patches * width * 2 <= free / 2
    return ResidentFeatures(cache, device) if small else cache


def prefetch(
    load: Callable[[In], Out], items: Iterable[In], threads: int = 1, ahead: int = 3
) -> Iterator[Out]:
    """`map(load, items)` on threads, at most `ahead` items ahead of the reader."""
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def view_of(image: Image.Image, name: str, view: int) -> Image.Image:
    """A view of a photo: 0 is the photo, 1 its mirror image, the others random crops.

    A crop keeps 60 to 100 % of each side, every second one is mirrored, and it is the same
    each time for the same photo and view.
    """
    if view == 0:
        return image
    if view > 1:
        dice = random.Random(f"{name}/{view}")
        width, height = (max(1, round(side * dice.uniform(0.6, 1.0))) for side in image.size)
        left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if view % 2 else image


def build_features(
    encoder: FrozenEncoder,
    image_dir: Path,
    items: Sequence[Item],
    root: Path,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    max_bad: int = 0,
    say: Callable[[str], None] = print,
    team: Team = ALONE,
) -> tuple[FeatureCache, list[str]]:
    """Encode what the cache under `root` lacks, and open it.

    Args:
        encoder: on the device where it shall run.
        items: the photos and views wanted, names relative to `image_dir`.
        dtype: the precision of the encoder's matrix products.
        max_bad: how many photos may be unreadable.
        team: the processes that call this together, each of which encodes a share.

    Returns:
        The cache, and the names of the photos that can't be read and so aren't in it.

    Raises:
        UserError: more than `max_bad` photos can't be read (the message names some), or the
            disk is full; what is built stays and is used next time.
    """
    # The leader looks for all: on a network's disk another machine sees a new file late.
    folder = team.on_rank0(lambda: open_folder(root, encoder, dtype, say))
    entries, missing = team.on_rank0(lambda: _take_stock(items, folder, image_dir, say))
    bad: dict[str, str] = {}
    if missing:
        with contextlib.ExitStack() as lock:
            # What another process made while this one waited is not made again.
            entries, missing = team.on_rank0(
                lambda: _claim(lock, encoder, items, folder, image_dir, say)
            )
            made, failed = _build(
                encoder,
                image_dir,
                team.share(missing),
                folder,
                dtype,
                batch_size,
                max_bad,
                say,
                team,
            )
            for their_entries, their_failed in team.all_gather((made, failed)):
                entries |= their_entries
                bad |= their_failed
            _check_bad(bad, max_bad)
    if bad:
        listing = "\n  ".join(bad.values())
        say(f"skipped {len(bad)} photos that can't be read:\n  {listing}")
    if not entries:
        raise UserError(f"none of the {len(items)} photos in {image_dir} could be encoded")
    some = next(iter(entries.values())).shard.with_suffix(".json")
    shape = team.on_rank0(lambda: json.loads(some.read_text())["shape"])
    return FeatureCache(folder, tuple(shape), entries), sorted(bad)


def _take_stock(
    items: Sequence[Item], folder: Path, image_dir: Path, say: Callable[[str], None]
) -> tuple[dict[Item, Entry], list[Item]]:
    """What the cache holds, and which items it lacks."""
    entries = _read_index(folder, say)
    return entries, _missing(items, entries, image_dir)


def _claim(
    lock: contextlib.ExitStack,
    encoder: FrozenEncoder,
    items: Sequence[Item],
    folder: Path,
    image_dir: Path,
    say: Callable[[str], None],
) -> tuple[dict[Item, Entry], list[Item]]:
    """Keep the folder until `lock` is released; what it holds, and which items it lacks."""
    lock.enter_context(sole_user(folder, wait=True))
    entries, missing = _take_stock(items, folder, image_dir, say)
    done, size = len(items) - len(missing), len(missing) * _bytes_each(encoder)
    say(
        f"features: {len(missing):,} to make, {done:,} there already, in {folder}, "
        f"{size_text(size)} more"
    )
    require_room([(folder, size)])
    return entries, missing


# --- The folder -----------------------------------------------------------------------------


def open_folder(
    root: Path, encoder: FrozenEncoder, dtype: torch.dtype, say: Callable[[str], None]
) -> Path:
    """The folder for features of this encoder; say what changed if there are others."""
    identity = encoder.identity() | {"dtype": str(dtype), "format": FORMAT}
    # A folder that moved or a branch that was renamed holds the same weights all the same.
    decisive = {key: identity[key] for key in identity if key not in ("name", "revision")}
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{Path(identity['name']).name}-{key}"
    if not (folder / "identity.json").exists():
        for other in sorted(root.glob("*/identity.json")):
            there = json.loads(other.read_text())
            changed = [name for name in decisive if there.get(name) != decisive[name]]
            say(
                f"features in {other.parent} are of another kind ({', '.join(changed)} differ): "
                "not used; delete that folder if you no longer need it"
            )
        with atomic_write(folder / "identity.json") as path:
            path.write_text(json.dumps(identity))
    return folder


def _read_index(folder: Path, say: Callable[[str], None]) -> dict[Item, Entry]:
    entries: dict[Item, Entry] = {}
    for index in sorted(folder.glob("shard_*.json")):
        shard = index.with_suffix(".bin")
        table = json.loads(index.read_text())
        if not shard.exists() or shard.stat().st_size != table["bytes"]:
            say(f"the feature shard {shard} is not whole: what it held is made anew")
            index.unlink()
            continue
        for row, (name, view, size, mtime, digest, checksum) in enumerate(table["items"]):
            entries[name, view] = Entry(shard, row, size, mtime, digest, checksum)
    return entries


def _missing(items: Iterable[Item], entries: dict[Item, Entry], image_dir: Path) -> list[Item]:
    """The items without features of the file as it is now."""
    states: dict[str, tuple[int, int]] = {}
    missing = []
    for item in items:
        entry = entries.get(item)
        if entry is None:
            missing.append(item)
            continue
        file = image_dir / item[0]
        if item[0] not in states:
            stat = os.stat(file)
            states[item[0]] = stat.st_size, stat.st_mtime_ns
        if states[item[0]] != (entry.size, entry.mtime) and file_digest(file) != entry.digest:
            missing.append(item)
    return missing


def file_digest(file: Path) -> str:
    """What tells a file's content from another's."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


# --- Building -------------------------------------------------------------------------------


@dataclass
class _Batch:
    inputs: dict[str, Tensor]
    items: list[tuple[str, int, int, int, str]]  # name, view, size, mtime, digest
    bad: dict[str, str]


def _load_batch(encoder: FrozenEncoder, image_dir: Path, items: Sequence[Item]) -> _Batch:
    images, loaded, bad = [], [], {}
    for name, view in items:
        file = image_dir / name
        try:
            stat = os.stat(file)
            image = encoder.open(file)
        except (ImageError, FileNotFoundError) as error:
            bad[name] = str(error)
            continue
        images.append(view_of(image, name, view))
        loaded.append((name, view, stat.st_size, stat.st_mtime_ns, file_digest(file)))
    return _Batch(encoder.preprocess(images) if images else {}, loaded, bad)


def encode(encoder: FrozenEncoder, inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Preprocessed pictures -> features (images, patches, width) in half precision.

    `dtype` is the precision of matrix products; the result is on the encoder's device.
    """
    device = next(encoder.parameters()).device
    with autocast(device, dtype):
        return encoder({key: value.to(device) for key, value in inputs.items()}).half()


def check_finite(features: np.ndarray | Sequence[np.ndarray]) -> None:
    """Refuse features that can't be used.

    Raises:
        UserError: some are infinite or not a number.
    """
    if not np.isfinite(features).all():
        raise UserError("the encoder gave features that are not finite: run with --precision fp32")


def _bytes_each(encoder: FrozenEncoder) -> int:
    """The size of a photo's features."""
    inputs = encoder.preprocess([Image.new("RGB", (64, 64))])
    return encode(encoder, inputs, torch.float32).nbytes


def _check_bad(bad: dict[str, str], max_bad: int) -> None:
    if len(bad) > max_bad:
        listing = "\n  ".join(list(bad.values())[:10])
        raise UserError(
            f"{len(bad)} photos can't be read, more than MAX_BAD_IMAGES = {max_bad}:\n  "
            f"{listing}\nMend them, take them out, or raise --max_bad_images."
        )


def _build(
    encoder, image_dir, items, folder, dtype, batch_size, max_bad, say, team
) -> tuple[dict[Item, Entry], dict[str, str]]:
    """Encode `items` into new shards; returns their entries, and what is wrong with bad photos."""
    entries: dict[Item, Entry] = {}
    bad: dict[str, str] = {}
    rows: list[np.ndarray] = []
    labels: list[tuple] = []
    # Photos are decoded on threads while the encoder computes; Pillow lets go of the GIL.
    chunks = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]

    def load(chunk: Sequence[Item]) -> _Batch:
        return _load_batch(encoder, image_dir, chunk)

    with Bar(len(items), "features", "photo", quiet=not team.leads) as bar:
        for batch in prefetch(load, chunks, threads=max(2, os.cpu_count() or 2)):
            bad |= batch.bad
            _check_bad(bad, max_bad)
            if batch.items:
                rows.extend(encode(encoder, batch.inputs, dtype).cpu().numpy())
                labels.extend(batch.items)
            first = bar.done == 0
            bar.step(len(batch.items) + len(batch.bad))
            if first and bar.minutes_left > 1:
                say(f"features: about {bar.minutes_left:.0f} minutes, once; they are kept")
            if rows and len(rows) * rows[0].nbytes >= SHARD_BYTES:
                write_shard(folder, rows, labels, entries, team.rank)
                rows, labels = [], []
        if rows:
            write_shard(folder, rows, labels, entries, team.rank)
    return entries, bad


def write_shard(
    folder: Path,
    rows: Sequence[np.ndarray],
    labels: Sequence[tuple[str, int, int, int, str]],
    entries: dict[Item, Entry],
    rank: int = 0,
) -> None:
    """Write features (patches, width) in half precision as a new shard; add it to `entries`.

    `labels` are each row's photo, view, and the file's size, time and hash. `rank` is which of
    the processes that write to the folder at once this is: their shards may have like numbers.

    Raises:
        UserError: features are not finite, or the disk is full.
    """
    numbers = [int(path.stem.split("_")[1]) for path in folder.glob("shard_*.bin")]
    writer = f"_{rank}" if rank else ""
    shard = folder / f"shard_{max(numbers, default=-1) + 1:05d}{writer}.bin"
    check_finite(rows)
    with atomic_write(shard) as path, open(path, "wb") as file:
        for row in rows:
            file.write(row.tobytes())
    items = [(*label, zlib.crc32(row.tobytes())) for label, row in zip(labels, rows, strict=True)]
    # The index comes last: without it the shard's features don't count.
    with atomic_write(shard.with_suffix(".json")) as path:
        table = {"bytes": shard.stat().st_size, "shape": rows[0].shape, "items": items}
        path.write_text(json.dumps(table))
    for row, (name, view, size, mtime, digest, checksum) in enumerate(items):
        entries[name, view] = Entry(shard, row, size, mtime, digest, checksum)
