"""Photos from WebDataset shards: more of them than RAM holds, or a disk.

A shard is a tar of photos, each with its caption beside it under the same name, here or on a
server; `webdataset` opens it. It is read once, in order: what it holds goes into a
table of its own, and the features of its photos into a pack, unless the disk is to be spared; then
they are encoded anew in each epoch. The tables of the shards that are being read and a bounded
pool of photos are all that is in RAM.
"""

from __future__ import annotations

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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import POOL, Batch, CaptionRows, epoch_order, make_batch, order_name
from distributed import ALONE, Team
from encoder import PHOTO_SUFFIXES, FrozenEncoder, ImageError
from features import (
    Entry,
    FeatureCache,
    Item,
    check_bad,
    claimed,
    encode_photos,
    open_folder,
    prefetch,
    write_pack,
    write_table,
)
from tars import Sample, elsewhere, identity, read_shard, shard_name
from tokenizer import CaptionTokenizer
from utils import Bar, UserError, refused, require_extra, require_room, size_text

T = TypeVar("T")
Place = tuple[int, int]  # a photo's shard, by number, and its row there
OPEN_TABLES = 16  # shards whose table is in RAM, a few MB each
TEXTS = 1_000_000  # captions that the tokenizer learns from, of the first shards


def say_samples(photos: int, passed: Counter[str], bad: int, label: str = "the shards") -> None:
    """Say how many samples shards hold, and what became of them; refuse those without a photo."""
    passed = passed + Counter({"that can't be read": bad})
    listing = ", ".join(f"{count:,} {what}" for what, count in passed.items())
    print(
        f"shards: {photos + passed.total():,} samples, {photos:,} of use, {passed.total():,} "
        f"passed over{listing and f' ({listing})'}"
    )
    if passed["without a photo"] and passed["without a caption"]:
        print(
            "shards: a photo and its caption share their folder and name, and follow each other: "
            "tar --sort=name packs them so"
        )
    if not photos:
        raise UserError(
            f"{label} hold no photo ({', '.join(sorted(PHOTO_SUFFIXES))}) with a caption, which "
            'is a .txt of the same name, or "caption" in a .json'
        )


def _version(url: str) -> list[int] | None:
    stat = None if elsewhere(url) else os.stat(url)
    return stat and [stat.st_size, stat.st_mtime_ns]


# --- Taking stock ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What is known of a shard without opening it again; its table says more, see `_read_table`."""

    url: str
    name: str
    table: Path
    version: list[int] | None  # a local file's size and time; None where it is elsewhere
    photos: int
    captions: int
    bytes: int  # of its features on disk; 0: they weren't kept
    passed: dict[str, int]  # samples without what they need
    bad: list[str]  # what is wrong with those that can't be read

    @property
    def pack(self) -> Path:
        return self.table.with_suffix(".bin")


def known_shard(path: Path, url: str) -> Shard:
    """The shard whose table is at `path`."""
    table = _read_table(path)
    items, shape = table["items"], table["shape"]
    counts = len(items), sum(len(texts) for _, texts, _ in items)
    size = len(items) * math.prod(shape) * 2 if shape else 0
    left_out = table["passed"], list(table["bad"].values())
    return Shard(url, shard_name(url), path, table["version"], *counts, size, *left_out)


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
    With `keep_features` photos are encoded now; the rest is as in `build_features`."""
    folder = team.on_rank0(lambda: open_folder(root, encoder, dtype)) / "shards"

    def look() -> tuple[dict[str, Shard], list[str]]:
        known = {url: _known(folder, url, keep_features) for url in urls}
        return known, [url for url, shard in known.items() if shard is None]

    def read(url: str) -> Shard:
        table, passed, bad = table_path(folder, url), Counter(), {}
        about = {"name": shard_name(url), "version": _version(url), "passed": passed, "bad": bad}
        samples = read_shard(url, passed, bad)
        if keep_features:
            load = functools.partial(_load, encoder, shard_name(url))
            samples = _read_ahead(samples, batch_size)
            parts = encode_photos(encoder, samples, batch_size, load, dtype, bad, max_bad)
            write_pack(table.with_suffix(".bin"), parts, about)
        else:
            items = [(sample.key, sample.captions, 0) for sample in samples]
            write_table(table, about | {"shape": None, "items": items})
        return known_shard(table, url)

    with claimed(folder, team, look) as (known, missing):
        if missing:
            print(f"shards: {len(missing):,} of {len(urls):,} to read, in {folder}")
        made: list[Shard] = []
        own = team.share(missing)
        with Bar(len(own), "shards", "shard", quiet=not team.leads) as bar:
            for url in own:
                made.append(read(url))
                if bar.done == 0 and (size := made[0].bytes):
                    print(
                        f"shards: about {size_text(size * len(missing))} of features, if all are "
                        "like the first (--keep_shard_features false keeps none)"
                    )
                    require_room([(folder, size * (len(missing) - 1))], "--features_dir")
                bar.step(1, f"{sum(shard.photos for shard in made):,} photos")
        known |= {shard.url: shard for part in team.all_gather(made) for shard in part}
    shards = [*known.values()]
    bad = [problem for shard in shards for problem in shard.bad]
    check_bad(bad, max_bad, say=bool(missing))
    passed = sum((Counter(shard.passed) for shard in shards), Counter())
    say_samples(sum(shard.photos for shard in shards), passed, len(bad))
    return Stock(shards) if keep_features else Stream(shards, encoder, dtype, max_bad)


def _load(encoder: FrozenEncoder, shard: str, sample: Sample) -> tuple[tuple, Image.Image]:
    file = io.BytesIO(sample.photo)
    try:
        return (sample.key, sample.captions), encoder.open(file)
    except ImageError as error:
        raise ImageError(str(error).replace(str(file), f"{shard}: {sample.key}")) from None


def _read_ahead(samples: Iterator[T], size: int) -> Iterator[T]:
    """The samples, read by a thread of their own, so many at a time."""
    chunks = prefetch(lambda _: list(itertools.islice(samples, size)), itertools.count())
    return itertools.chain.from_iterable(itertools.takewhile(len, chunks))


def _known(folder: Path, url: str, keep_features: bool) -> Shard | None:
    """A shard that is as it was, if all that is wanted of it is on disk."""
    try:
        shard = known_shard(table_path(folder, url), url)
    except UserError:  # it isn't there, or damaged: it is made anew
        return None
    whole = shard.bytes and shard.pack.exists() and shard.pack.stat().st_size == shard.bytes
    kept = whole or not (keep_features and shard.photos)
    return shard if kept and shard.version == _version(url) else None


def table_path(folder: Path, url: str) -> Path:
    """The table of a shard; its features stand beside it in a `.bin`."""
    name = identity(url)
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(name.split("?")[0]).removesuffix(".tar"))
    return folder / f"{stem[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"


def _read_table(path: Path) -> dict[str, Any]:
    """A shard's table: `items` are each photo's key, captions and checksum of features."""
    there = path.read_bytes() if path.exists() else b""  # another user's may be whole
    with refused(f"{path} is gone or damaged: run the same command again, which makes it anew"):
        table = {"passed": {}, "bad": {}} | json.loads(there)
        if "items" not in table:  # as earlier versions wrote it
            sums = table["checksums"] or itertools.repeat(0)
            table["items"] = zip(table["keys"], table["captions"], sums, strict=False)
        table["items"] = [(key, list(texts), number) for key, texts, number in table["items"]]
        return {key: table[key] for key in ("version", "shape", "items", "passed", "bad")}


# --- Batches --------------------------------------------------------------------------------


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

    def first_texts(self) -> Iterator[str]:
        """Captions to learn a tokenizer from: all, or TEXTS of the first shards."""
        items = (item for shard in range(len(self.shards)) for item in self.table(shard)["items"])
        return itertools.islice((text for _, texts, _ in items for text in texts), TEXTS)

    def __getitem__(self, item: Item) -> Entry:
        """Where the features of a photo stand, for `FeatureCache`."""
        shard, row = self.place(item[0])
        table = self.table(shard)
        return Entry(self.shards[shard].pack, row, table["shape"], table["items"][row][2])

    def begin(self, places: Iterable[Place]) -> None:
        """An epoch will ask for these photos: features on disk may be read in any order."""

    def load(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch, of at least one photo, and features (images, patches, width)."""
        return batch, self.features.read([(name, 0) for name in batch.names])


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
        self.bad: list[str] = []  # what is wrong with those that couldn't be read
        self.arrivals = _read_ahead(self._read(places), 32)

    def _read(self, places: Iterable[Place]) -> Iterator[tuple[Place, Sample]]:
        for number, group in itertools.groupby(places, lambda place: place[0]):
            shard, items = self.shards[number], self.table(number)["items"]
            wanted = {items[place[1]][0]: place for place in group}
            for sample in read_shard(shard.url, Counter(), {}):
                if sample.key in wanted:
                    yield wanted.pop(sample.key), sample
                if not wanted:
                    break
            if wanted:
                raise UserError(
                    f"the shard {shard.name} has changed since stock was taken, {len(wanted)} "
                    f"photos are gone: delete {shard.table} and run again"
                )

    def load(self, batch: Batch) -> tuple[Batch, Tensor]:
        """As `Stock.load`; photos that can't be read are said, and carry no loss."""
        lost: list[int] = []

        def load(photo: tuple[int, str]) -> tuple[tuple, Image.Image]:
            row, place = photo[0], self.place(photo[1])
            try:
                return _load(self.encoder, self.shards[place[0]].name, self.waiting.pop(place))
            except ImageError as error:
                print(f"left out: {error}", file=sys.stderr)  # where all of a team are heard
                lost.append(row)
                self.bad.append(str(error))
                check_bad(self.bad, self.max_bad)
                return (), Image.new("RGB", (self.encoder.side,) * 2)

        for name in batch.names:
            while self.place(name) not in self.waiting:
                place, sample = next(self.arrivals)
                self.waiting[place] = sample
        photos, count = enumerate(batch.names), len(batch.names)
        [(_, features)] = encode_photos(self.encoder, photos, count, load, self.dtype, {}, 0)
        return batch.without(lost), features


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

    count = CaptionRows.count  # batches in an epoch, in each process

    def order(self, batch_size: int, seed: int, team: Team) -> str:
        """As `CaptionRows.order`; by their versions, as captions are not all at hand."""
        shards = [(s.name, s.version, s.photos, s.captions) for s in self.stock.shards]
        return order_name(shards, self.max_length, self.buffer, batch_size, seed, team.size)

    def load(self, batch: Batch, epoch: int | None = None) -> tuple[Batch, Tensor]:
        """As `CaptionRows.load`, in one view."""
        return self.stock.load(batch) if batch.names else (batch, torch.empty(0))

    def batches(
        self, batch_size: int, seed: int, epoch: int, skip: int = 0, team: Team = ALONE
    ) -> Iterator[Batch]:
        """The epoch's batches, without the first `skip`; where photos are only streamed, those of
        these are not read again."""
        sizes = [len(range(rank, batch_size, team.size)) for rank in range(team.size)]
        before, own = sum(sizes[: team.rank]), sizes[team.rank]
        part = [len(self) * edge // batch_size for edge in (before, before + own)]
        key = (seed, epoch, team.rank)
        shuffled = self._shuffled(self._in_order(seed, epoch, *part), key)
        # A process that is done before the others goes on with empty batches.
        cut = itertools.chain(self._cut(shuffled, own, key), itertools.repeat(([], [])))
        cut = itertools.islice(cut, self.count(batch_size))
        behind = [bytearray(shard.photos) for shard in self.stock.shards]
        for places, _ in itertools.islice(cut, skip):
            for shard, row in places:
                behind[shard][row] = True
        places = self._in_order(seed, epoch, *part)
        self.stock.begin((shard, row) for shard, row in places if not behind[shard][row])
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
        self, places: Iterator[Place], batch_size: int, key: Sequence[int]
    ) -> Iterator[tuple[list[Place], list[list[list[int]]]]]:
        """Batches of photos, and each one's captions as ids."""
        pools = iter(lambda: list(itertools.islice(places, POOL * batch_size)), [])
        for pool, members in enumerate(pools):
            groups = [self.stock.table(shard)["items"][row][1] for shard, row in members]
            pairs = [("", text) for text in itertools.chain(*groups)]
            ids = iter(self.tokenizer.encode_texts(pairs, self.max_length))
            rows = [list(itertools.islice(ids, len(group))) for group in groups]
            lengths = [sum(len(ids) - 1 for ids in row) for row in rows]
            for batch in epoch_order(lengths, batch_size, (*key, pool)):
                yield [members[i] for i in batch], [rows[i] for i in batch]


Rows = CaptionRows | StreamedRows  # what is trained on
