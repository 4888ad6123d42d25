"""Photos from WebDataset shards: more of them than a memory holds, or a disk.

A shard is a tar of photos, each with its caption beside it under the same name, here or on a
server; `webdataset` opens and reads it. Of each shard stock is taken once: it is read in order,
and what it holds goes into a table of its own, and into a file of features unless the disk is to
be spared. The manifest counts the photos of all shards: it, the tables of the shards that are
being read, and a bounded pool of photos are all that is in memory.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import POOL, TEXT_KEYS, Batch, epoch_order, make_batch
from distributed import ALONE, Team
from encoder import FrozenEncoder, ImageError
from features import check_finite, encode, open_folder, prefetch, read_row
from tokenizer import CaptionTokenizer
from utils import (
    Bar,
    UserError,
    atomic_write,
    first_line,
    redact,
    require_extra,
    require_room,
    size_text,
    sole_user,
)

T = TypeVar("T")
PHOTO_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")  # of a photo in a shard
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how gzip, bzip2 and xz begin
ATTEMPTS = 5  # at reading a shard that is elsewhere, without getting further
RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled each time
OPEN_TABLES = 16  # shards whose table is in memory, a few MB each
TABLE = ("name", "version", "shape", "keys", "captions", "checksums")  # what a table holds
TEXTS = 1_000_000  # captions that the tokenizer learns from, of the first shards


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo of a shard, as it stands there, and what it shows."""

    key: str
    suffix: str  # of the photo's name: what kind of file it is
    photo: bytes
    captions: list[str]


@dataclass(frozen=True)
class Shard:
    """What the manifest says of a shard."""

    name: str
    version: tuple[int, int] | None  # a local file's size and time; None where it is elsewhere
    photos: int
    captions: int
    bytes: int  # of its features on disk; 0: they weren't kept
    url: str = ""  # where to read it; not written down, as it may hold a key


class PhotoFile(io.BytesIO):
    """A photo in memory that messages call by its name."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self.called = name

    def __str__(self) -> str:
        return self.called


# --- Reading a shard ------------------------------------------------------------------------


def expand_shards(pattern: str) -> list[str]:
    """`"cc3m/{00000..00331}.tar"` -> the shards' paths or addresses, in order.

    Raises:
        UserError: a local one is missing, or one stands there twice.
    """
    shardlists = require_extra("webdataset.shardlists", "requirements-shards.txt")
    try:
        expanded = shardlists.expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # a variable that isn't set, a brace left open
        name = shard_name(pattern)
        raise UserError(f"TRAIN_SHARDS or VAL_SHARDS {name}: {first_line(error)}") from None
    urls = [
        url if _elsewhere(url) else os.path.abspath(os.path.expanduser(url)) for url in expanded
    ]
    missing = [url for url in urls if not _elsewhere(url) and not os.path.isfile(url)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} shards {pattern} are missing, first {missing[0]}: "
            "correct the numbers in braces"
        )
    if len(set(map(shard_name, urls))) < len(urls):
        raise UserError(f"the shards {pattern} name one twice")
    return urls


def shard_name(url: str) -> str:
    """A shard's path or address without keys and signatures, which may be others tomorrow."""
    address, _, query = url.partition("?")
    signed = re.search(r"(?i)(signature|\bsig)=", query)
    return redact(address if signed else url)


def _elsewhere(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def read_shard(url: str) -> Iterator[Sample]:
    """The photos of a shard that have a caption, in order; of two of one name, the first.

    A shard that is elsewhere and breaks off is read again, up to where it broke off unheard.

    Raises:
        UserError: it can't be read to its end, or is no tar.
    """
    passed, failures = 0, 0
    keys: set[str] = set()
    while True:
        before = passed
        try:
            for raw in _whole(itertools.islice(_read_once(url), passed, None)):
                passed += 1
                sample = _sample(raw)
                if sample and sample.key not in keys:
                    keys.add(sample.key)
                    yield sample
            return
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            # What the library and tarfile raise for what is cut off, swapped or not there.
            failures = failures + 1 if passed == before else 1
            if not _elsewhere(url) or failures == ATTEMPTS:
                raise UserError(
                    f"the shard {shard_name(url)} can't be read to its end ({first_line(error)}): "
                    "mend or replace it and run again, what is done is kept"
                ) from None
            time.sleep(RETRY_PAUSE * 2 ** (failures - 1))


def _whole(samples: Iterator[T]) -> Iterator[T]:
    """The samples, each once the next one is there: the last before a cut may lack a file."""
    held = list(itertools.islice(samples, 1))
    for sample in samples:
        yield held.pop()
        held.append(sample)
    yield from held


def _read_once(url: str) -> Iterator[dict[str, Any]]:
    """The files of each photo by suffix, as bytes; an error if the shard isn't whole."""
    tars = require_extra("webdataset.tariterators", "requirements-shards.txt")
    stream = _Tail(tars.gopen.gopen(url))
    with contextlib.closing(stream):
        files = tars.tar_file_expander([{"url": url, "stream": stream}])
        yield from tars.group_by_keys(files)
        while stream.read(2**20):
            pass
        # A tar that was cut off between two files looks whole to tarfile, but lacks its end mark.
        if stream.last.strip(b"\0") and not stream.first.startswith(COMPRESSED):
            raise EOFError("it has no end mark: it is cut off")


class _Tail:
    """A stream that remembers its ends; closing it raises what a server's end hid."""

    def __init__(self, stream: Any):
        self.stream, self.first, self.last = stream, b"", b"?"

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        self.first = self.first or piece[:8]
        self.last = piece[-1024:] or self.last
        return piece

    def close(self) -> None:
        self.stream.close()


def _sample(raw: dict[str, Any]) -> Sample | None:
    suffix = next((key for key in PHOTO_KEYS if key in raw), None)
    captions = _captions(raw)
    return Sample(raw["__key__"], suffix, raw[suffix], captions) if suffix and captions else None


def _captions(raw: dict[str, Any]) -> list[str]:
    """A `.txt` is one caption; a `.json` has it under a name of TEXT_KEYS."""
    try:
        if "txt" in raw:
            texts = [raw["txt"].decode("utf-8-sig")]
        else:
            table = json.loads(raw.get("json", b"{}"))
            texts = next((table[key] for key in TEXT_KEYS if key in table), [])
            texts = [texts] if isinstance(texts, str) else texts
        return [text for text in (" ".join(text.split()) for text in texts) if text]
    except (ValueError, TypeError, AttributeError):  # not UTF-8, not JSON, or not texts
        return []


def _version(url: str) -> tuple[int, int] | None:
    if _elsewhere(url):
        return None
    stat = os.stat(url)
    return stat.st_size, stat.st_mtime_ns


# --- Taking stock ---------------------------------------------------------------------------


def take_stock(
    encoder: FrozenEncoder,
    urls: Sequence[str],
    root: Path,
    *,
    keep_features: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    max_bad: int = 0,
    say: Callable[[str], None] = print,
    team: Team = ALONE,
) -> list[Shard]:
    """Read the shards that the folder under `root` knows nothing of yet, a share in each process.

    Args:
        encoder: on the device where it shall run.
        keep_features: whether photos are encoded, and their features kept.
        dtype: the precision of the encoder's matrix products.
        max_bad: how many photos of a shard may be unreadable.

    Returns:
        The shards in the order of `urls`.

    Raises:
        UserError: a shard can't be read, more than `max_bad` photos of one can't, or the disk is
            full. Shards that were done are kept.
    """
    folder = team.on_rank0(lambda: stock_folder(encoder, root, dtype, say))
    with contextlib.ExitStack() as lock:
        known, missing = team.on_rank0(lambda: _claim(lock, folder, urls, keep_features, say))
        own = team.share(missing)
        made = []
        with Bar(len(own), "shards", "shard", quiet=not team.leads) as bar:
            for url in own:
                work = (encoder, url, folder, dtype, batch_size, max_bad)
                made.append(_encode_shard(*work) if keep_features else _list_shard(url, folder))
                if bar.done == 0:
                    _check_room(folder, made[0][0], len(missing), say)
                bar.step(1, f"{sum(shard.photos for shard, _ in made):,} photos")
        for shard, bad in itertools.chain.from_iterable(team.all_gather(made)):
            known[shard.name] = shard
            if bad:
                say("\n  ".join([f"skipped {len(bad)} photos that can't be read:", *bad]))
        if missing:
            team.on_rank0(lambda: _write_manifest(folder, known))
    found = [replace(known[shard_name(url)], url=url) for url in urls]
    if not any(shard.photos for shard in found):
        raise UserError(
            f"the shards hold no photo with a caption: a photo is one of {', '.join(PHOTO_KEYS)}, "
            'its caption a .txt of the same name, or "caption" in a .json'
        )
    return found


def stock_folder(
    encoder: FrozenEncoder, root: Path, dtype: torch.dtype, say: Callable[[str], None]
) -> Path:
    """Where the tables and features of shards are, for this encoder."""
    return open_folder(root, encoder, dtype, say) / "shards"


def _claim(
    lock: contextlib.ExitStack,
    folder: Path,
    urls: Sequence[str],
    keep_features: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Shard], list[str]]:
    """Keep the folder until `lock` is released; the shards known, and those of `urls` that lack."""
    lock.enter_context(sole_user(folder, wait=True))
    known = _read_manifest(folder)
    missing = []
    for url in urls:
        name = shard_name(url)
        path = table_path(folder, name)
        if _is_there(path, url, known.get(name), keep_features):
            continue
        # Perhaps of a run that ended before it wrote the manifest; what is damaged is made anew.
        with contextlib.suppress(UserError):
            known[name] = _shard_of(_read_table(path))
        if not _is_there(path, url, known.get(name), keep_features):
            missing.append(url)
    if missing:
        say(f"shards: {len(missing):,} to read, {len(urls) - len(missing):,} known, in {folder}")
    return known, missing


def _is_there(table: Path, url: str, shard: Shard | None, keep_features: bool) -> bool:
    """Whether what was written down of a shard is on disk, and the shard is as it was."""
    if shard is None or shard.version != _version(url) or not table.exists():
        return False
    features = table.with_suffix(".bin")
    whole = features.exists() and features.stat().st_size == shard.bytes > 0
    return whole or not (keep_features and shard.photos)


def _read_manifest(folder: Path) -> dict[str, Shard]:
    """The shards by name; none where there is no sound manifest, as the tables say it all again."""
    try:
        shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
        return {s["name"]: Shard(**s | {"version": _pair(s["version"])}) for s in shards}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _write_manifest(folder: Path, known: dict[str, Shard]) -> None:
    with atomic_write(folder / "manifest.json") as path:
        shards = [asdict(replace(shard, url="")) for shard in known.values()]
        path.write_text(json.dumps({"shards": shards}, indent=0), encoding="utf-8")


def _pair(version: list[int] | None) -> tuple[int, int] | None:
    return tuple(version) if version else None


def table_path(folder: Path, name: str) -> Path:
    """The table of the shard of this name; its features stand beside it in a `.bin`."""
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(name.split("?")[0]).removesuffix(".tar"))
    return folder / f"{stem[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"


def _shard_of(table: dict[str, Any]) -> Shard:
    photos, captions = len(table["keys"]), sum(map(len, table["captions"]))
    size = photos * math.prod(table["shape"]) * 2 if table["shape"] else 0
    return Shard(table["name"], _pair(table["version"]), photos, captions, size)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {key: table[key] for key in TABLE}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is gone or damaged: run the same command again, which makes it anew"
        ) from None


def write_table(
    folder: Path,
    url: str,
    samples: Sequence[tuple[str, list[str]]],
    shape: tuple[int, int] | None = None,
    checksums: Sequence[int] = (),
) -> Shard:
    """Write down what a shard holds: each photo's key and captions.

    Args:
        shape: (patches, width) of each photo's features, None where they aren't kept.
        checksums: of each photo's features.
    """
    keys, captions = [key for key, _ in samples], [texts for _, texts in samples]
    name = shard_name(url)
    table = {
        "name": name,
        "version": _version(url),
        "shape": shape,
        "keys": keys,
        "captions": captions,
        "checksums": list(checksums),
    }
    with atomic_write(table_path(folder, name)) as path:
        path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    return _shard_of(table)


def _list_shard(url: str, folder: Path) -> tuple[Shard, list[str]]:
    """Write down what a shard holds, without its features; its photos aren't opened."""
    return write_table(folder, url, [(s.key, s.captions) for s in read_shard(url)]), []


def _encode_shard(
    encoder: FrozenEncoder,
    url: str,
    folder: Path,
    dtype: torch.dtype,
    batch_size: int,
    max_bad: int,
) -> tuple[Shard, list[str]]:
    """Write down what a shard holds, and its photos' features, (patches, width) each.

    Photos that can't be read are left out; returned is what is wrong with them.
    """
    samples: list[tuple[str, list[str]]] = []
    checksums: list[int] = []
    bad: list[str] = []
    shape, name = None, shard_name(url)
    chunks = _chunks(read_shard(url), batch_size)

    def load(chunk: list[Sample]) -> list[tuple[Sample, dict[str, Tensor] | str]]:
        return [(sample, _prepare(encoder, name, sample.key, sample.photo)) for sample in chunk]

    threads = os.cpu_count() or 2
    with (
        atomic_write(table_path(folder, name).with_suffix(".bin")) as path,
        open(path, "wb") as file,
    ):
        for loaded in prefetch(load, chunks, threads=threads, ahead=threads + 2):
            bad += [photo for _, photo in loaded if isinstance(photo, str)]
            _check_bad(name, bad, max_bad)
            good = [(sample, photo) for sample, photo in loaded if not isinstance(photo, str)]
            if not good:
                continue
            features = encode(encoder, _join([photo for _, photo in good]), dtype).cpu().numpy()
            check_finite(features)
            for (sample, _), row in zip(good, features, strict=True):
                content = row.tobytes()
                file.write(content)
                checksums.append(zlib.crc32(content))
                samples.append((sample.key, sample.captions))
            shape = features.shape[1:]
    return write_table(folder, url, samples, shape, checksums), bad


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of up to `size` samples, read by a thread of their own."""

    def take(_: int) -> list[Sample]:
        return list(itertools.islice(samples, size))

    return itertools.takewhile(len, prefetch(take, itertools.count()))


def _prepare(encoder: FrozenEncoder, shard: str, key: str, photo: bytes) -> dict[str, Tensor] | str:
    """What `FrozenEncoder.preprocess` gives for a photo, or what is wrong with it."""
    try:
        return encoder.preprocess([encoder.open(PhotoFile(f"{shard}: {key}", photo))])
    except ImageError as error:
        return str(error)


def _join(photos: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Preprocessed photos as one batch."""
    return {name: torch.cat([photo[name] for photo in photos]) for name in photos[0]}


def _check_bad(shard: str, bad: Sequence[str], max_bad: int) -> None:
    if len(bad) > max_bad:
        listing = "\n  ".join(bad[:10])
        raise UserError(
            f"more than MAX_BAD_IMAGES = {max_bad} photos of {shard} can't be read:\n  {listing}\n"
            "Mend the shard, leave it out, or raise --max_bad_images."
        )


def _check_room(folder: Path, first: Shard, count: int, say: Callable[[str], None]) -> None:
    """By the first shard's features, say how large those of all will be; is there room for them?"""
    if first.bytes:
        say(
            f"shards: about {size_text(first.bytes * count)} of features, if all are like the "
            "first (--keep_shard_features false keeps none)"
        )
    require_room([(folder, first.bytes * (count - 1))])


# --- Batches --------------------------------------------------------------------------------


class Stock:
    """The photos of all shards, numbered through; their captions, and their features on disk."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        """Args: `shards`, as `take_stock` gave them; `folder`, `stock_folder`."""
        self.folder = folder
        self.shards = [shard for shard in shards if shard.photos]
        counts = [shard.photos for shard in self.shards]
        self.starts = list(itertools.accumulate(counts, initial=0))
        self.table = functools.lru_cache(OPEN_TABLES)(self._read_table)

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def captions(self) -> int:
        return sum(shard.captions for shard in self.shards)

    def _read_table(self, shard: int) -> dict[str, Any]:
        return _read_table(table_path(self.folder, self.shards[shard].name))

    def place(self, number: int) -> tuple[int, int]:
        """A photo's shard and row."""
        shard = bisect.bisect_right(self.starts, number) - 1
        return shard, number - self.starts[shard]

    def name(self, number: int) -> str:
        """A photo's name for people, and within this stock: `shard.tar#7`, counted from 0."""
        shard, row = self.place(number)
        return f"{self.shards[shard].name}#{row}"

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {shard.name: start for shard, start in zip(self.shards, self.starts, strict=False)}

    def number(self, name: str) -> int:
        """The photo that `name` named."""
        shard, row = name.rsplit("#", 1)
        return self._index[shard] + int(row)

    def texts(self, number: int) -> list[str]:
        """A photo's captions."""
        shard, row = self.place(number)
        return self.table(shard)["captions"][row]

    def first_texts(self, count: int = TEXTS) -> Iterator[str]:
        """Captions to learn a tokenizer from: all, or `count` of the first shards."""
        groups = itertools.chain.from_iterable(
            self.table(shard)["captions"] for shard in range(len(self.shards))
        )
        return itertools.islice(itertools.chain.from_iterable(groups), count)

    def begin(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Nothing: features on disk are read in any order."""

    def forget(self, numbers: Iterable[int]) -> None:
        """Nothing, as in `begin`."""

    def load(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch, and its photos' features (images, patches, width) in half precision.

        Raises:
            UserError: features are damaged; the message says what to delete.
        """
        if not batch.names:
            return batch, torch.empty(0)
        rows = []
        for name in batch.names:
            shard, row = self.place(self.number(name))
            table = self.table(shard)
            file = table_path(self.folder, self.shards[shard].name).with_suffix(".bin")
            content = np.empty(table["shape"], dtype=np.float16)
            with open(file, "rb") as opened:
                read_row(opened.fileno(), row, content, table["checksums"][row], file, name)
            rows.append(content)
        return batch, torch.from_numpy(np.stack(rows))


class Stream(Stock):
    """A stock without features: photos are read in the shards' order and encoded as they come."""

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        encoder: FrozenEncoder,
        dtype: torch.dtype,
        max_bad: int,
    ):
        super().__init__(folder, shards)
        self.encoder, self.dtype, self.max_bad = encoder, dtype, max_bad
        self.pool = ThreadPoolExecutor(os.cpu_count() or 2)
        self.waiting: dict[int, bytes] = {}  # photos that were read, and not yet asked for
        self.done = bytearray()  # for each photo whether it will not be asked for
        self.bad: dict[str, list[str]] = {}
        self.arrivals: Iterator[tuple[int, bytes]] = iter(())

    def begin(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Read anew: of each span's shard the photos from a first row to before a last one."""
        self.waiting, self.done, self.bad = {}, bytearray(len(self)), {}
        chunks = _chunks(self._read(spans), 32)
        self.arrivals = itertools.chain.from_iterable(chunks)

    def forget(self, numbers: Iterable[int]) -> None:
        """These photos will not be asked for; a shard of which none will is not opened."""
        for number in numbers:
            self.done[number] = True

    def _read(self, spans: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, bytes]]:
        for shard, first, last in spans:
            name, start = self.shards[shard].name, self.starts[shard]
            keys = self.table(shard)["keys"]
            wanted = {
                keys[row]: start + row for row in range(first, last) if not self.done[start + row]
            }
            if not wanted:
                continue
            for sample in read_shard(self.shards[shard].url):
                if sample.key in wanted:
                    yield wanted.pop(sample.key), sample.photo
                if not wanted:
                    break
            if wanted:
                raise UserError(
                    f"the shard {name} has changed since stock was taken, {len(wanted)} photos are "
                    f"gone: delete {table_path(self.folder, name)} and run again"
                )

    def load(self, batch: Batch) -> tuple[Batch, Tensor]:
        """As `Stock.load`; photos that can't be read are said, and carry no loss."""
        if not batch.names:
            return batch, torch.empty(0)
        numbers = [self.number(name) for name in batch.names]
        while any(number not in self.waiting for number in numbers):
            number, photo = next(self.arrivals)
            self.waiting[number] = photo
        photos = list(self.pool.map(self._prepare, numbers))
        lost = [row for row, photo in enumerate(photos) if isinstance(photo, str)]
        for row in lost:
            self._note_bad(batch.names[row].rsplit("#", 1)[0], photos[row])
            photos[row] = self.encoder.preprocess([Image.new("RGB", (self.encoder.side,) * 2)])
        return batch.without(lost), encode(self.encoder, _join(photos), self.dtype)

    def _prepare(self, number: int) -> dict[str, Tensor] | str:
        shard, row = self.place(number)
        key = self.table(shard)["keys"][row]
        return _prepare(self.encoder, self.shards[shard].name, key, self.waiting.pop(number))

    def _note_bad(self, shard: str, problem: str) -> None:
        print(f"left out: {problem}", file=sys.stderr)  # which all processes of a team are heard on
        self.bad.setdefault(shard, []).append(problem)
        _check_bad(shard, self.bad[shard], self.max_bad)


class StreamedRows:
    """The captions of a stock, cut into batches a pool at a time; see `CaptionRows`.

    Of the photos, in an epoch's order of shards, each process of a team has a part of its own, so
    that no two meet the same photo and all have the same number of batches. Within it, each photo
    is drawn from the next `buffer`.
    """

    def __init__(self, stock: Stock, tokenizer: CaptionTokenizer, max_length: int, buffer: int):
        self.stock, self.tokenizer = stock, tokenizer
        self.max_length, self.buffer = max_length, buffer

    def __len__(self) -> int:
        return len(self.stock)

    @property
    def texts(self) -> tuple[int, int]:
        """How many captions there are, and how many questions."""
        return self.stock.captions, 0

    def count(self, batch_size: int) -> int:
        """Batches in an epoch, in each process."""
        return -(-len(self) // batch_size)

    def captions_of(self, names: Iterable[str]) -> int:
        """How many captions these photos have together."""
        return sum(len(self.stock.texts(self.stock.number(name))) for name in names)

    def batches(
        self, batch_size: int, seed: int, epoch: int, skip: int = 0, team: Team = ALONE
    ) -> Iterator[Batch]:
        """The epoch's batches, without the first `skip`.

        Of those the photos, where they are only streamed, are not read again.
        """
        sizes = [len(range(rank, batch_size, team.size)) for rank in range(team.size)]
        before = sum(sizes[: team.rank])
        own = sizes[team.rank]
        begin, end = (len(self) * part // batch_size for part in (before, before + own))
        key = (seed, epoch, team.rank)
        spans = self._spans(seed, epoch, begin, end)
        self.stock.begin(spans)
        left = self.count(batch_size) - skip
        numbers = self._shuffled(spans, key)
        for pool in itertools.count():
            members = list(itertools.islice(numbers, POOL * max(1, own)))
            if not members:
                break
            for batch in self._cut(members, own, (*key, pool), skip):
                left -= 1
                yield batch
            skip = max(0, skip - -(-len(members) // own))
        for _ in range(left):  # the others are not done yet
            yield make_batch([], [])

    def _spans(self, seed: int, epoch: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """The photos from `begin` to before `end` of the epoch's order: shards, each with rows."""
        spans, place = [], 0
        for shard in np.random.default_rng((seed, epoch)).permutation(len(self.stock.shards)):
            photos = self.stock.shards[shard].photos
            first, last = max(0, begin - place), min(photos, end - place)
            if first < last:
                spans.append((int(shard), first, last))
            place += photos
        return spans

    def _shuffled(
        self, spans: Sequence[tuple[int, int, int]], key: tuple[int, ...]
    ) -> Iterator[int]:
        """The photos of the spans by number, each drawn from the next `buffer`."""
        filters = require_extra("webdataset.filters", "requirements-shards.txt")
        starts = self.stock.starts
        rows = ((starts[shard], row) for shard, *ends in spans for row in range(*ends))
        numbers = (start + row for start, row in rows)
        dice = random.Random(str(key))
        return filters.shuffle(self.buffer, initial=self.buffer, rng=dice)(numbers)

    def _cut(
        self, members: Sequence[int], batch_size: int, key: Sequence[int], skip: int
    ) -> Iterator[Batch]:
        """The batches of a pool, without the first `skip`."""
        if skip * batch_size >= len(members):
            self.stock.forget(members)
            return
        groups = [self.stock.texts(number) for number in members]
        pairs = [("", text) for text in itertools.chain(*groups)]
        ids = iter(self.tokenizer.encode_texts(pairs, self.max_length))
        rows = [list(itertools.islice(ids, len(group))) for group in groups]
        lengths = [sum(len(ids) - 1 for ids in row) for row in rows]
        order = epoch_order(lengths, batch_size, key)
        for batch in order[:skip]:
            self.stock.forget(members[i] for i in batch)
        for batch in order[skip:]:
            names = [self.stock.name(members[i]) for i in batch]
            yield make_batch(names, [rows[i] for i in batch])
