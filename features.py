"""The store of features: every photo passes the encoder once, and training reads the result.

The features of some photos in half precision, one after the other, are a pack; a table beside it
says which photos, with a checksum of each one's features. Packs are only ever added, each whole
or absent, so a build that was interrupted goes on where it stopped. Several processes build a
store together, a share each.

Photos come from tars (`shards.py`), a pack each, or from a folder. Of a folder's photos the table
knows size, time and hash: one that changed is encoded again into a new pack. What is there of the
files that had its name before, or that have it in another folder, stays and counts for these.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from device import autocast
from distributed import ALONE, Team
from encoder import FrozenEncoder, ImageError, completed, decisive
from utils import Bar, UserError, atomic_write, require_room, size_text, sole_user, write_file

FORMAT = 1
PACK_BYTES = 64 * 2**20  # of the photos of a folder
OPEN_FILES = 128  # packs open at a time; macOS allows a process 256 files

In = TypeVar("In")
Out = TypeVar("Out")
Item = tuple[str, int]  # a photo's name, and which view of it
Part = tuple[list[tuple], Tensor]  # labels of photos, and features (photos, patches, width)


# --- Reading --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a photo's features stand, (patches, width), and of which file they were made."""

    pack: Path
    row: int
    shape: tuple[int, int]
    checksum: int
    size: int = 0
    mtime: int = 0
    digest: str = ""


class FeatureCache:
    """Read access to features by photo and view. Use `build_features` to get one.

    Plain reads instead of a memory map: mapped pages count as this process's, which then
    seems to grow with the data set.
    """

    def __init__(self, folder: Path, entries: Mapping[Item, Entry]):
        self.folder, self.entries = folder, entries
        latest = functools.lru_cache(OPEN_FILES)  # they stay open
        self._open = latest(lambda pack: open(pack, "rb", buffering=0))  # noqa: SIM115

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(patches, width) of each photo's features."""
        return next(iter(self.entries.values())).shape

    def read(self, items: Sequence[Item]) -> Tensor:
        """Features (items, patches, width) in half precision, checked against their checksums."""
        entries = [self.entries[item] for item in items]
        features = np.empty((len(items), *entries[0].shape), dtype=np.float16)
        for row, entry, item in zip(features, entries, items, strict=True):
            buffer = memoryview(row).cast("B")
            got = os.preadv(self._open(entry.pack).fileno(), [buffer], entry.row * row.nbytes)
            if got != row.nbytes or zlib.crc32(buffer) != entry.checksum:
                raise UserError(
                    f"the features in {entry.pack} are damaged (at {item[0]}): delete it and run "
                    "the same command again, which makes what it held anew"
                )
        return torch.from_numpy(features)


class ResidentFeatures:
    """All of a cache's features on a device, in half precision."""

    def __init__(self, cache: FeatureCache, device: torch.device):
        items = list(cache.entries)
        self.rows = {item: row for row, item in enumerate(items)}
        self.features = torch.empty(len(items), *cache.shape, dtype=torch.float16, device=device)
        starts = range(0, len(items), 256)
        parts = prefetch(lambda start: cache.read(items[start : start + 256]), starts)
        for start, part in zip(starts, parts, strict=True):
            self.features[start : start + len(part)] = part.to(device)

    def read(self, items: Sequence[Item]) -> Tensor:
        """Features (items, patches, width) in half precision, on the device."""
        index = torch.tensor([self.rows[item] for item in items], dtype=torch.long)
        if self.features.is_cuda:
            index = index.pin_memory()
        return self.features[index.to(self.features.device, non_blocking=True)]


Features = FeatureCache | ResidentFeatures


def resident_or_cached(cache: FeatureCache, device: torch.device) -> Features:
    """The features on a GPU if they take at most half of what is free there, else on disk."""
    if device.type != "cuda":
        return cache
    free, _ = torch.cuda.mem_get_info(device)
    small = len(cache.entries) * math.prod(cache.shape) * 2 <= free / 2
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


# --- The photos of a folder -----------------------------------------------------------------


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
    team: Team = ALONE,
) -> tuple[FeatureCache, list[str]]:
    """Encode what the store under `root` lacks of a folder's photos, and open it.

    `encoder` is on the device where it shall run, with matrix products in `dtype`; each process of
    a `team` encodes a share. Returns the cache, and the names of the photos, at most `max_bad`,
    that can't be read and so aren't in it.
    """
    folder = team.on_rank0(lambda: open_folder(root, encoder, dtype))

    def look() -> tuple[dict[Item, Entry], list[Item]]:
        entries = _made(items, _read_index(folder), image_dir)
        return entries, [item for item in items if item not in entries]

    def load(item: Item) -> tuple[tuple, Image.Image]:
        file = image_dir / item[0]
        stat, digest = os.stat(file), file_digest(file)  # before: it may be replaced meanwhile
        image = view_of(encoder.open(file), *item)
        return (*item, stat.st_size, stat.st_mtime_ns, digest), image

    made: dict[Item, Entry] = {}
    bad: dict[str, str] = {}
    with claimed(folder, team, look) as (entries, missing):
        if missing:
            team.on_rank0(lambda: _announce(encoder, folder, len(items), len(missing)))
            own = team.share(missing)
            parts: list[Part] = []
            encoded = encode_photos(encoder, own, batch_size, load, dtype, bad, max_bad)
            with Bar(len(own), "features", "photo", quiet=not team.leads) as bar:
                for labels, features in encoded:
                    parts += [(labels, features.cpu())] if labels else []
                    bar.step(min(batch_size, len(own) - bar.done))
                    full = sum(features.nbytes for _, features in parts) >= PACK_BYTES
                    if parts and (full or bar.done == len(own)):
                        made |= add_pack(folder, parts, team.rank)
                        parts = []
            for their_made, their_bad in team.all_gather((made, bad)):
                entries |= their_made
                bad |= their_bad
            check_bad(bad.values(), max_bad, say=True)
    if all(name in bad for name, _ in items):
        raise UserError(
            f"none of the {len(items)} photos could be encoded: are they in {image_dir}? "
            "If not, name their folder with --image_dir"
        )
    return FeatureCache(folder, entries), sorted(bad)


def _announce(encoder: FrozenEncoder, folder: Path, wanted: int, missing: int) -> None:
    """Say how much there is to make, for which the disk must have room."""
    inputs = encoder.preprocess([Image.new("RGB", (64, 64))])
    size = missing * encode(encoder, [inputs], torch.float32).nbytes
    print(
        f"features: {missing:,} to make, {wanted - missing:,} there already, in {folder}, "
        f"{size_text(size)} more"
    )
    require_room([(folder, size)], "--features_dir")


def add_pack(folder: Path, parts: Iterable[Part], rank: int = 0) -> dict[Item, Entry]:
    """Write features as a new pack; returns its entries.

    The parts' labels are each photo's name and view, and the file's size, time and hash. `rank`
    is which of the processes that write to the folder at once this is: their packs may have like
    numbers.
    """
    names = (re.match(r"shard_(\d+)", path.name) for path in folder.glob("shard_*.bin"))
    numbers = [int(name[1]) for name in names if name]
    writer = f"_{rank}" if rank else ""
    pack = folder / f"shard_{max(numbers, default=-1) + 1:05d}{writer}.bin"
    return _entries(pack, write_pack(pack, parts, {}))


def _entries(pack: Path, table: dict[str, Any]) -> dict[Item, Entry]:
    shape, rows = tuple(table["shape"]), enumerate(table["items"])
    return {
        (name, view): Entry(pack, row, shape, checksum, *file)
        for row, (name, view, *file, checksum) in rows
    }


def _read_index(folder: Path) -> dict[Item, list[Entry]]:
    """All that is there of each photo and view, of one file of that name after the other."""
    found = defaultdict(list)
    for index in sorted(folder.glob("shard_*.json")):
        pack = index.with_suffix(".bin")
        # One that others alone may read, or a disk that fails, is no damage, and ends the run.
        with contextlib.suppress(ValueError, KeyError, TypeError, RuntimeError, FileNotFoundError):
            table = json.loads(index.read_bytes())
            patches, width = map(operator.index, table["shape"])
            size = len(table["items"]) * max(1, patches) * max(1, width) * 2
            if pack.stat().st_size == size:
                for item, entry in _entries(pack, table).items():
                    found[item].append(entry)
                continue
        print(f"the features in {pack} are not whole, or damaged: what it held is made anew")
        index.unlink(missing_ok=True)  # another run may have found it so as well
    return found


def _made(
    items: Iterable[Item], found: Mapping[Item, Sequence[Entry]], image_dir: Path
) -> dict[Item, Entry]:
    """Those of the items whose file as it is now has features."""
    digests = defaultdict(set)  # frames that were rendered at once are of one size and time
    for each in itertools.chain(*found.values()):
        digests[each.size, each.mtime].add(each.digest)
    digest = functools.cache(file_digest)

    @functools.cache
    def state(file: Path) -> tuple[int, int] | None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no file can have
            stat = os.stat(file)
            return stat.st_size, stat.st_mtime_ns
        return None

    def entry_of(item: Item) -> Entry | None:
        file = image_dir / item[0]
        if not (there := state(file)):
            return None
        likely = sorted(found.get(item, ()), key=lambda each: (each.size, each.mtime) == there)
        for each in reversed(likely):
            same = (each.size, each.mtime) == there and len(digests[there]) == 1
            if same or digest(file) == each.digest:
                return each
        return None

    return {item: entry for item in items if (entry := entry_of(item))}


def file_digest(file: Path) -> str:
    """What tells a file's content from another's."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


# --- The store, wherever photos come from ---------------------------------------------------


def open_folder(root: Path, encoder: FrozenEncoder, dtype: torch.dtype) -> Path:
    """The folder for features of this encoder; says what changed if there are others."""
    identity = encoder.identity() | {"dtype": str(dtype), "format": FORMAT}
    counts = decisive(identity)
    key = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{Path(identity['name']).name}-{key}"
    found = {path.parent: _read_identity(path) for path in sorted(root.glob("*/identity.json"))}
    for place in (folder, *found):  # the encoder may have had another name: its weights count
        if decisive(completed(found.get(place, {}), identity)) == counts:
            return place
    if folder in found:
        print(f"{folder}/identity.json is damaged: it is made anew")
    for other in sorted(found.keys() - {folder}):
        changed = [name for name in counts if found[other].get(name) != counts[name]]
        print(
            f"features in {other} are of another kind ({', '.join(changed)} differ): "
            "not used; delete that folder if you no longer need it"
        )
    encoder.check()
    write_table(folder / "identity.json", identity)
    return folder


def _read_identity(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        return dict(json.loads(path.read_bytes()))
    return {}


@contextlib.contextmanager
def claimed(
    folder: Path, team: Team, look: Callable[[], tuple[Out, list[In]]]
) -> Iterator[tuple[Out, list[In]]]:
    """What is there and what is missing, as `look` finds; if some is, the folder is kept to us.

    The leader looks for all: on a network's disk another machine sees a new file late.
    """
    with contextlib.ExitStack() as lock:

        def claim() -> tuple[Out, list[In]]:
            lock.enter_context(sole_user(folder, wait=True))
            return look()  # what another process made while this one waited is not made again

        found, missing = team.on_rank0(look)
        yield team.on_rank0(claim) if missing else (found, missing)


def encode(
    encoder: FrozenEncoder, inputs: Sequence[dict[str, Tensor]], dtype: torch.dtype
) -> Tensor:
    """Preprocessed pictures -> features (images, patches, width) in half precision.

    `dtype` is the precision of matrix products; the result is on the encoder's device, and finite.
    """
    device = next(encoder.parameters()).device
    batch = {name: torch.cat([part[name] for part in inputs]).to(device) for name in inputs[0]}
    with autocast(device, dtype):
        features = encoder(batch).half()
    if not features.isfinite().all():
        wrong = "the encoder gave features that are not finite in half precision (65,504)"
        raise UserError(f"{wrong}: take other --encoder_layers, or another encoder")
    return features


def encode_photos(
    encoder: FrozenEncoder,
    photos: Iterable[In],
    batch_size: int,
    load: Callable[[In], tuple[tuple, Image.Image]],
    dtype: torch.dtype,
    bad: dict[str, str],
    max_bad: int,
) -> Iterator[Part]:
    """A batch after the other: the labels of its photos, and their features.

    `load` gives a label and a picture for a photo, a tuple that begins with its name. Those that
    can't be read are left out, and what is wrong with them goes to `bad`.
    """

    def prepare(photo: In) -> tuple[tuple, dict[str, Tensor]] | tuple[str, str]:
        try:
            label, image = load(photo)
        except ImageError as error:
            return photo[0], str(error)
        except (OSError, ValueError) as error:
            return photo[0], f"{photo[0]}: {getattr(error, 'strerror', error)}"
        return label, encoder.preprocess([image])

    # Photos are decoded on threads while the encoder computes; Pillow lets go of the GIL.
    prepared = prefetch(prepare, photos, max(2, os.cpu_count() or 2), 4 * batch_size)
    while batch := list(itertools.islice(prepared, batch_size)):
        bad |= {name: wrong for name, wrong in batch if isinstance(wrong, str)}
        check_bad(bad.values(), max_bad)
        good = [pair for pair in batch if not isinstance(pair[1], str)]
        inputs = [photo for _, photo in good]
        features = encode(encoder, inputs, dtype) if good else torch.empty(0)
        yield [label for label, _ in good], features


def check_bad(bad: Collection[str], max_bad: int, say: bool = False) -> None:
    """Refuse more photos that can't be read than may be; `bad` says what is wrong with each."""
    if len(bad) > max_bad:
        listing = "\n  ".join(list(bad)[:10])
        raise UserError(
            f"{len(bad)} photos can't be read, more than MAX_BAD_IMAGES = {max_bad}:\n  "
            f"{listing}\nMend them, take them out, or raise --max_bad_images."
        )
    if bad and say:
        listing = "\n  ".join(bad)
        print(f"skipped {len(bad)} photos that can't be read:\n  {listing}")


def write_pack(pack: Path, parts: Iterable[Part], about: dict[str, Any]) -> dict[str, Any]:
    """Write features as they come; then the table: `about`, and each photo's label and checksum."""
    items, shape = [], None
    with atomic_write(pack) as path, open(path, "wb") as file:
        for labels, features in parts:
            for label, row in zip(labels, features.cpu().numpy(), strict=True):
                content = row.tobytes()
                file.write(content)
                items.append((*label, zlib.crc32(content)))
                shape = row.shape
    table = about | {"bytes": pack.stat().st_size, "shape": shape, "items": items}
    write_table(pack.with_suffix(".json"), table)  # without it the features don't count
    return table


def write_table(path: Path, table: dict[str, Any]) -> None:
    write_file(path, json.dumps(table), "choose another --features_dir")
