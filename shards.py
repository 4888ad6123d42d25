"""Photos from WebDataset shards: more of them than RAM holds, or a disk.

A shard is a tar of photos, each with its caption beside it under the same name, here or on a
server; `webdataset` opens and groups it. It is read once, in order: what it holds goes into a
table of its own, and the features of its photos into a pack, unless the disk is to be spared; then
they are encoded anew in each epoch. The tables of the shards that are being read and a bounded
pool of photos are all that is in RAM.
"""

from __future__ import annotations

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import POOL, TEXT_KEYS, Batch, epoch_order, make_batch, order_name
from distributed import ALONE, Team
from encoder import FrozenEncoder, ImageError
from features import (
    Entry,
    FeatureCache,
    Item,
    check_bad,
    claimed,
    encode_photos,
    open_folder,
    prefetch,
    say_bad,
    write_pack,
    write_table,
)
from tokenizer import CaptionTokenizer
from utils import Bar, UserError, first_line, redact, require_extra, require_room, size_text

T = TypeVar("T")
PHOTO_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")  # of a photo in a shard
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how gzip, bzip2 and xz begin
ATTEMPTS = 5  # at reading a shard that is elsewhere, without getting further
RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled each time
OPEN_TABLES = 16  # shards whose table is in RAM, a few MB each
TEXTS = 1_000_000  # captions that the tokenizer learns from, of the first shards


class Sample(NamedTuple):
    """A photo of a shard, as it stands there, and what it shows."""

    key: str
    suffix: str  # of the photo's name: what kind of file it is
    photo: bytes
    captions: list[str]


# --- Reading a shard ------------------------------------------------------------------------


def expand_shards(pattern: str) -> list[str]:
    """`"cc3m/{00000..00331}.tar"` -> the shards' paths or addresses, in order."""
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


def _version(url: str) -> list[int] | None:
    if _elsewhere(url):
        return None
    stat = os.stat(url)
    return [stat.st_size, stat.st_mtime_ns]


# --- Taking stock ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What is known of a shard without opening it again."""

    url: str
    table: Path  # its photos; their features stand beside it in a `.bin`
    version: list[int] | None  # a local file's size and time; None where it is elsewhere
    photos: int
    captions: int
    bytes: int  # of its features on disk; 0: they weren't kept

    @classmethod
    def of(cls, path: Path, url: str) -> Shard:
        """What its table says."""
        table = _read_table(path)
        items, shape = table["items"], table["shape"]
        captions = sum(len(captions) for _, captions, _ in items)
        size = len(items) * math.prod(shape) * 2 if shape else 0
        return cls(url, path, table["version"], len(items), captions, size)

    @property
    def name(self) -> str:
        return shard_name(self.url)


def take_stock(
    encoder: FrozenEncoder,
    urls: Sequence[str],
    root: Path,
    *,
    keep_features: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    max_bad: int = 0,
    team: Team = ALONE,
) -> Stock:
    """Read the shards that the store under `root` knows nothing of yet, a share in each process.

    Args:
        encoder: on the device where it shall run.
        keep_features: whether photos are encoded now, and their features kept.
        dtype: the precision of the encoder's matrix products.
        max_bad: how many photos of a shard may be unreadable.
    """
    folder = team.on_rank0(lambda: open_folder(root, encoder, dtype)) / "shards"

    def look() -> tuple[dict[str, Shard], list[str]]:
        known = {url: _known(folder, url, keep_features) for url in urls}
        return known, [url for url, shard in known.items() if shard is None]

    def read(url: str) -> tuple[Shard, dict[str, str]]:
        table, bad = table_path(folder, url), {}
        about = {"name": shard_name(url), "version": _version(url)}
        if keep_features:
            load = functools.partial(_load, encoder, shard_name(url))
            samples = _read_ahead(read_shard(url), batch_size)
            parts = encode_photos(encoder, samples, batch_size, load, dtype, bad, max_bad)
            write_pack(table.with_suffix(".bin"), parts, about)
        else:
            items = [(sample.key, sample.captions, 0) for sample in read_shard(url)]
            write_table(table, about | {"shape": None, "items": items})
        return Shard.of(table, url), bad

    with claimed(folder, team, look) as (known, missing):
        if missing:
            known_count = len(urls) - len(missing)
            print(f"shards: {len(missing):,} to read, {known_count:,} known, in {folder}")
        made: list[tuple[Shard, dict[str, str]]] = []
        own = team.share(missing)
        with Bar(len(own), "shards", "shard", quiet=not team.leads) as bar:
            for url in own:
                made.append(read(url))
                if bar.done == 0 and (size := made[0][0].bytes):
                    print(
                        f"shards: about {size_text(size * len(missing))} of features, if all are "
                        "like the first (--keep_shard_features false keeps none)"
                    )
                    require_room([(folder, size * (len(missing) - 1))])
                bar.step(1, f"{sum(shard.photos for shard, _ in made):,} photos")
        for shard, bad in itertools.chain.from_iterable(team.all_gather(made)):
            known[shard.url] = shard
            say_bad(bad)
    if not any(shard.photos for shard in known.values()):
        raise UserError(
            f"the shards hold no photo with a caption: a photo is one of {', '.join(PHOTO_KEYS)}, "
            'its caption a .txt of the same name, or "caption" in a .json'
        )
    shards = [known[url] for url in urls]
    return Stock(shards) if keep_features else Stream(shards, encoder, dtype, max_bad)


def _load(encoder: FrozenEncoder, shard: str, sample: Sample) -> tuple[tuple, Image.Image]:
    file = io.BytesIO(sample.photo)
    try:
        return (sample.key, sample.captions), encoder.open(file)
    except ImageError as error:
        raise ImageError(str(error).replace(str(file), f"{shard}: {sample.key}")) from None


def _read_ahead(samples: Iterator[T], size: int) -> Iterator[T]:
    """The samples, read by a thread of their own, so many at a time."""

    def take(_: int) -> list[T]:
        return list(itertools.islice(samples, size))

    chunks = itertools.takewhile(len, prefetch(take, itertools.count()))
    return itertools.chain.from_iterable(chunks)


def _known(folder: Path, url: str, keep_features: bool) -> Shard | None:
    """A shard that is as it was, if all that is wanted of it is on disk."""
    try:
        shard = Shard.of(table_path(folder, url), url)
    except UserError:  # it isn't there, or damaged: it is made anew
        return None
    pack = shard.table.with_suffix(".bin")
    whole = shard.bytes and pack.exists() and pack.stat().st_size == shard.bytes
    kept = whole or not (keep_features and shard.photos)
    return shard if kept and shard.version == _version(url) else None


def table_path(folder: Path, url: str) -> Path:
    """The table of a shard: of each photo its key, captions, and the checksum of its features."""
    name = shard_name(url)
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(name.split("?")[0]).removesuffix(".tar"))
    return folder / f"{stem[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if "items" not in table:  # as earlier versions wrote it
            sums = table["checksums"] or itertools.repeat(0)
            table["items"] = list(zip(table["keys"], table["captions"], sums, strict=False))
        return {key: table[key] for key in ("version", "shape", "items")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is gone or damaged: run the same command again, which makes it anew"
        ) from None


# --- Batches --------------------------------------------------------------------------------

Place = tuple[int, int]  # a photo's shard, by number, and its place there


class Stock:
    """The photos of all shards; their captions, and their features on disk.

    In batches a photo is called as people call it: `shard.tar#7`, counted from 0.
    """

    def __init__(self, shards: Iterable[Shard]):
        self.shards = [shard for shard in shards if shard.photos]
        self.numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        self.table = functools.lru_cache(OPEN_TABLES)(lambda n: _read_table(self.shards[n].table))
        self.features = FeatureCache(Path(), self)

    def __len__(self) -> int:
        return sum(shard.photos for shard in self.shards)

    def name(self, place: Place) -> str:
        return f"{self.shards[place[0]].name}#{place[1]}"

    def place(self, name: str) -> Place:
        shard, row = name.rsplit("#", 1)
        return self.numbers[shard], int(row)

    def texts(self, place: Place) -> list[str]:
        """A photo's captions."""
        return self.table(place[0])["items"][place[1]][1]

    def first_texts(self, count: int = TEXTS) -> Iterator[str]:
        """Captions to learn a tokenizer from: all, or `count` of the first shards."""
        items = (item for shard in range(len(self.shards)) for item in self.table(shard)["items"])
        return itertools.islice((text for _, texts, _ in items for text in texts), count)

    def __getitem__(self, item: Item) -> Entry:
        """Where the features of a photo stand, for `FeatureCache`."""
        shard, row = self.place(item[0])
        table, pack = self.table(shard), self.shards[shard].table.with_suffix(".bin")
        return Entry(pack, row, table["shape"], table["items"][row][2])

    def begin(self, places: Iterable[Place]) -> None:
        """An epoch will ask for these photos: features on disk may be read in any order."""

    def load(self, names: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Photos' features (images, patches, width), and which rows are not what was asked for."""
        return self.features.read([(name, 0) for name in names]), []


class Stream(Stock):
    """A stock without features: photos are read in the shards' order and encoded as they come."""

    def __init__(
        self, shards: Iterable[Shard], encoder: FrozenEncoder, dtype: torch.dtype, max_bad: int
    ):
        super().__init__(shards)
        self.encoder, self.dtype, self.max_bad = encoder, dtype, max_bad

    def begin(self, places: Iterable[Place]) -> None:
        """These photos will be asked for, and are read in this order; a shard of none is not."""
        self.waiting: dict[Place, Sample] = {}  # photos that were read, and not yet asked for
        self.bad: dict[str, dict[str, str]] = {}  # of each shard
        self.arrivals = _read_ahead(self._read(places), 32)

    def _read(self, places: Iterable[Place]) -> Iterator[tuple[Place, Sample]]:
        for number, group in itertools.groupby(places, lambda place: place[0]):
            shard, items = self.shards[number], self.table(number)["items"]
            wanted = {items[place[1]][0]: place for place in group}
            for sample in read_shard(shard.url):
                if sample.key in wanted:
                    yield wanted.pop(sample.key), sample
                if not wanted:
                    break
            if wanted:
                raise UserError(
                    f"the shard {shard.name} has changed since stock was taken, {len(wanted)} "
                    f"photos are gone: delete {shard.table} and run again"
                )

    def load(self, names: Sequence[str]) -> tuple[Tensor, list[int]]:
        """As `Stock.load`; a photo that can't be read is said, and its row a blank one's."""
        lost: list[int] = []

        def load(photo: tuple[int, str]) -> tuple[tuple, Image.Image]:
            row, name = photo
            shard = name.rsplit("#", 1)[0]
            try:
                return _load(self.encoder, shard, self.waiting.pop(self.place(name)))
            except ImageError as error:
                print(f"left out: {error}", file=sys.stderr)  # where all of a team are heard
                lost.append(row)
                self.bad.setdefault(shard, {})[name] = str(error)
                check_bad(self.bad[shard], self.max_bad)
                return (), Image.new("RGB", (self.encoder.side,) * 2)

        for name in names:
            while self.place(name) not in self.waiting:
                place, sample = next(self.arrivals)
                self.waiting[place] = sample
        [(_, features)] = encode_photos(
            self.encoder, enumerate(names), len(names), load, self.dtype, {}, 0
        )
        return features, lost


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
        return sum(shard.captions for shard in self.stock.shards), 0

    def count(self, batch_size: int) -> int:
        """Batches in an epoch, in each process."""
        return -(-len(self) // batch_size)

    def order(self, batch_size: int, seed: int, team: Team) -> str:
        """As `CaptionRows.order`; by their versions, as captions are not all at hand."""
        shards = [(s.name, s.version, s.photos, s.captions) for s in self.stock.shards]
        return order_name(shards, self.max_length, self.buffer, batch_size, seed, team.size)

    def load(self, batch: Batch, epoch: int | None = None) -> tuple[Batch, Tensor]:
        """As `CaptionRows.load`, in one view; photos that can't be read carry no loss."""
        if not batch.names:
            return batch, torch.empty(0)
        features, lost = self.stock.load(batch.names)
        return batch.without(lost), features

    def batches(
        self, batch_size: int, seed: int, epoch: int, skip: int = 0, team: Team = ALONE
    ) -> Iterator[Batch]:
        """The epoch's batches, without the first `skip`.

        Of those the photos, where they are only streamed, are not read again.
        """
        sizes = [len(range(rank, batch_size, team.size)) for rank in range(team.size)]
        before, own = sum(sizes[: team.rank]), sizes[team.rank]
        part = [len(self) * edge // batch_size for edge in (before, before + own)]
        key = (seed, epoch, team.rank)
        cut = self._cut(self._shuffled(self._in_order(seed, epoch, *part), key), own, key, skip)
        # A process that is done before the others goes on with empty batches.
        cut = itertools.chain(cut, itertools.repeat(([], [])))
        cut = itertools.islice(cut, self.count(batch_size))
        behind = [bytearray(shard.photos) for shard in self.stock.shards]
        for places, _ in itertools.islice(cut, skip):
            for shard, row in places:
                behind[shard][row] = True
        reading = self._in_order(seed, epoch, *part)
        self.stock.begin(place for place in reading if not behind[place[0]][place[1]])
        for places, rows in cut:
            yield make_batch([self.stock.name(place) for place in places], rows)

    def _in_order(self, seed: int, epoch: int, begin: int, end: int) -> Iterator[Place]:
        """The photos from `begin` to before `end` of the epoch's order of shards."""
        shards = self.stock.shards
        order = np.random.default_rng((seed, epoch)).permutation(len(shards)).tolist()
        places = ((shard, row) for shard in order for row in range(shards[shard].photos))
        return itertools.islice(places, begin, end)

    def _shuffled(self, places: Iterator[Place], key: tuple[int, ...]) -> Iterator[Place]:
        """The photos, each drawn from the next `buffer`."""
        filters = require_extra("webdataset.filters", "requirements-shards.txt")
        dice = random.Random(str(key))
        return filters.shuffle(self.buffer, initial=self.buffer, rng=dice)(places)

    def _cut(
        self, places: Iterator[Place], batch_size: int, key: Sequence[int], skip: int
    ) -> Iterator[tuple[list[Place], list[list[list[int]]]]]:
        """Batches of photos, and each one's captions as ids, which of the first `skip` may lack."""
        for pool in itertools.count():
            members = list(itertools.islice(places, POOL * batch_size))
            if not members:
                return
            if (pool + 1) * POOL <= skip:
                for start in range(0, len(members), batch_size):
                    yield members[start : start + batch_size], []
                continue
            groups = [self.stock.texts(place) for place in members]
            pairs = [("", text) for text in itertools.chain(*groups)]
            ids = iter(self.tokenizer.encode_texts(pairs, self.max_length))
            rows = [list(itertools.islice(ids, len(group))) for group in groups]
            lengths = [sum(len(ids) - 1 for ids in row) for row in rows]
            for batch in epoch_order(lengths, batch_size, (*key, pool)):
                yield [members[i] for i in batch], [rows[i] for i in batch]
