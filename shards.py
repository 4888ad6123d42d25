"""Photos from WebDataset shards: more of them than RAM holds, or a disk.

A shard is a tar of photos, each with its caption beside it under the same name, here or on a
server; `webdataset` opens it. It is read once, in order: what it holds goes into a
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
from collections import Counter
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
from tokenizer import CaptionTokenizer
from utils import (
    Bar,
    UserError,
    first_line,
    hide_keys,
    redact,
    require_extra,
    require_room,
    size_text,
)

T = TypeVar("T")
Place = tuple[int, int]  # a photo's shard, by number, and its row there
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how gzip, bzip2 and xz begin
ATTEMPTS = 5  # at reading a shard that is elsewhere, without getting further
RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled each time
MOST_BYTES = {"photo": 2**26, "txt": 2**20, "json": 2**20}  # of each of a sample's files
MOST_UNPACKED = 100  # times as much as a shard's own size; photos hardly shrink
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
    paths = [url if _elsewhere(url) else Path(url).expanduser() for url in expanded]
    urls = [os.path.abspath(path) if isinstance(path, Path) else path for path in paths]
    missing = [url for url in urls if not _elsewhere(url) and not os.path.isfile(url)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} shards {pattern} are missing, first {missing[0]}: "
            "correct the numbers in braces"
        )
    if len(set(map(_identity, urls))) < len(urls):
        raise UserError(f"the shards {redact(pattern)} name one twice")
    return urls


def shard_name(url: str) -> str:
    """How a shard is called: what may be secret of its address gives way to a short hash."""
    known, name = _identity(url), redact(_identity(url))
    return name if name == known else f"{name} ({hashlib.sha256(known.encode()).hexdigest()[:6]})"


def _identity(url: str) -> str:
    """A shard's path or address without keys and signatures, which may be others tomorrow."""
    address, _, query = url.partition("?")
    if re.search(r"(?i)(signature|\bsig)=", query):
        url = address
    key = r"(?i)([?&][\w-]*(?:signature|sig|token|credential|key)[\w-]*=)[^&\s]+"
    return re.sub(r"(\w://)[^/\s@]+@", r"\1***@", re.sub(key, r"\1***", hide_keys(url)))


def _elsewhere(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def read_shard(url: str, passed: Counter[str], bad: dict[str, str]) -> Iterator[Sample]:
    """The photos of a shard that have a caption, in order; of two of one name, the first.

    A shard that is elsewhere and breaks off is read again, up to where it broke off unheard. Of
    the other samples `passed` counts those that lack something, by what it is, and `bad` gets by
    name what is wrong with those that can't be read.
    """
    heard, failures = 0, 0
    keys: set[str] = set()
    while True:
        before = heard
        try:
            unheard = itertools.chain(itertools.islice(_read_once(url), heard, None), [None])
            # Each once the next one is there: the last before a cut may lack a file.
            for (key, files), _ in itertools.pairwise(unheard):
                heard += 1
                try:
                    sample = _sample(key, files)
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    bad[key] = f"{shard_name(url)}: {key} can't be read: {first_line(error)}"
                    continue
                if isinstance(sample, Sample) and key not in keys:
                    keys.add(key)
                    yield sample
                else:
                    passed[sample if isinstance(sample, str) else "with another's name"] += 1
            return
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            # What the library and tarfile raise for what is cut off, swapped or not there.
            failures = failures + 1 if heard == before else 1
            if not _elsewhere(url) or failures == ATTEMPTS:
                raise UserError(
                    f"the shard {shard_name(url)} can't be read to its end ({first_line(error)}): "
                    "mend or replace it and run again, what is done is kept"
                ) from None
            time.sleep(RETRY_PAUSE * 2 ** (failures - 1))


def _read_once(url: str) -> Iterator[tuple[str, dict[str, tuple[str, bytes | None]]]]:
    """Each name's files: by kind the first one's suffix and content; an error if it isn't whole."""
    gopen = require_extra("webdataset.gopen", "requirements-shards.txt")
    # Closing it raises what a server's end hid.
    with contextlib.closing(gopen.gopen(url)) as opened:
        stream = _Tail(opened)
        for key, group in itertools.groupby(_files(stream), lambda file: file[0]):
            files: dict[str, tuple[str, bytes | None]] = {}
            for _, kind, suffix, content in group:
                files.setdefault(kind, (suffix, content))
            yield key, files
        while stream.read(2**20):
            pass
        # A tar that was cut off between two files looks whole to tarfile, but lacks its end mark.
        if stream.last.strip(b"\0") and not stream.first.startswith(COMPRESSED):
            raise EOFError("it has no end mark: it is cut off")


def _files(stream: _Tail) -> Iterator[tuple[str, str, str, bytes | None]]:
    """The files of a tar: name up to the first dot after folders, kind, suffix, and content.

    The content is None where it is larger than MOST_BYTES of its kind.
    """
    unpacked = 0
    tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header)  # noqa: SIM115
    for info in tar:
        tar.members = []  # or all stay in RAM
        # Names may be of any bytes, and in some headers hold a zero, which no file's may.
        name = _decoded(info.name.encode("utf-8", "surrogateescape")).replace("\0", "_")
        found = re.fullmatch(r"(?!__[^/]*__/)((?:.*/)?[^.]+)\.([^/]*)", name, re.DOTALL)
        if not info.isreg() or not found:
            continue
        suffix = found[2].lower()
        kind = "photo" if f".{suffix}" in PHOTO_SUFFIXES else suffix
        file, pieces, small = tar.extractfile(info), [], info.size <= MOST_BYTES.get(kind, 0)
        while piece := file.read(2**20):
            unpacked += len(piece)
            if unpacked > MOST_UNPACKED * stream.size + MOST_BYTES["photo"]:
                raise tarfile.ReadError(f"it unpacks to more than {MOST_UNPACKED} times its size")
            pieces += [piece] if small else []
        yield found[1], kind, suffix, b"".join(pieces) if small else None


class _Header(tarfile.TarInfo):
    """A file's header, which may not be large itself: tarfile would take it into RAM."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        if not header.isreg() and header.size > MOST_BYTES["json"]:
            raise tarfile.ReadError(f"it has a header of {size_text(header.size)}")
        return header


class _Tail:
    """A stream that remembers its size and ends."""

    def __init__(self, stream: Any):
        self.stream, self.size, self.first, self.last = stream, 0, b"", b"?"

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        self.size += len(piece)
        self.first = self.first or piece[:8]
        self.last = piece[-1024:] or self.last
        return piece


def _sample(key: str, files: dict[str, tuple[str, bytes | None]]) -> Sample | str:
    """A photo with its captions, or what it lacks.

    A `.txt` is one caption; where there is none, a `.json` has it under a name of TEXT_KEYS.
    """
    for kind, (suffix, content) in files.items():
        if content is None and kind in MOST_BYTES:
            raise ValueError(f"its .{suffix} is larger than {size_text(MOST_BYTES[kind])}")
    texts = [_line(_decoded(files["txt"][1]))] if "txt" in files else [""]
    if "json" in files and not texts[0]:
        # Numbers don't matter, and Python refuses long ones.
        table = json.loads(_decoded(files["json"][1]), parse_int=float)
        texts = next((table[key] for key in TEXT_KEYS if table.get(key)), [])
        texts = [texts] if isinstance(texts, str) else texts
    captions = [caption for caption in map(_line, texts) if caption]
    if "photo" not in files or not captions:
        return "without a caption" if "photo" in files else "without a photo"
    return Sample(key, *files["photo"], captions)


def _decoded(content: bytes) -> str:
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _line(text: str) -> str:
    """A text in one line, less control characters, and halves of them, which no file can hold."""
    whole = text.encode("utf-8", "replace").decode()
    return " ".join(re.sub(r"[\0-\x1f\x7f]", " ", whole).split())


def say_samples(photos: int, passed: Counter[str], bad: int) -> None:
    """Say how many samples shards hold, and what became of them."""
    passed = passed + Counter({"that can't be read": bad})
    listing = ", ".join(f"{count:,} {what}" for what, count in passed.items())
    print(
        f"shards: {photos + passed.total():,} samples, {photos:,} of use, {passed.total():,} "
        f"passed over{listing and f' ({listing})'}"
    )


def _version(url: str) -> list[int] | None:
    stat = None if _elsewhere(url) else os.stat(url)
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

    Args:
        encoder: on the device where it shall run.
        keep_features: whether photos are encoded now, and their features kept.
        dtype: the precision of the encoder's matrix products.
        max_bad: how many photos, or their captions, may be unreadable.
    """
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
                    require_room([(folder, size * (len(missing) - 1))])
                bar.step(1, f"{sum(shard.photos for shard in made):,} photos")
        made = list(itertools.chain.from_iterable(team.all_gather(made)))
    shards = list((known | {shard.url: shard for shard in made}).values())
    bad = [problem for shard in shards for problem in shard.bad]
    check_bad(bad, max_bad, say=bool(made))
    photos = sum(shard.photos for shard in shards)
    passed = sum((Counter(shard.passed) for shard in shards), Counter())
    say_samples(photos, passed, len(bad))
    if not photos:
        raise UserError(
            f"the shards hold no photo ({', '.join(sorted(PHOTO_SUFFIXES))}) with a caption, which "
            'is a .txt of the same name, or "caption" in a .json'
        )
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
    name = _identity(url)
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(name.split("?")[0]).removesuffix(".tar"))
    return folder / f"{stem[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"


def _read_table(path: Path) -> dict[str, Any]:
    """A shard's table: `items` are each photo's key, captions and checksum of features."""
    try:
        table = {"passed": {}, "bad": {}} | json.loads(path.read_text(encoding="utf-8"))
        if "items" not in table:  # as earlier versions wrote it
            sums = table["checksums"] or itertools.repeat(0)
            table["items"] = zip(table["keys"], table["captions"], sums, strict=False)
        table["items"] = [(key, list(texts), number) for key, texts, number in table["items"]]
        return {key: table[key] for key in ("version", "shape", "items", "passed", "bad")}
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is gone or damaged: run the same command again, which makes it anew"
        ) from None


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

    def first_texts(self, count: int = TEXTS) -> Iterator[str]:
        """Captions to learn a tokenizer from: all, or `count` of the first shards."""
        items = (item for shard in range(len(self.shards)) for item in self.table(shard)["items"])
        return itertools.islice((text for _, texts, _ in items for text in texts), count)

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

    def count(self, batch_size: int) -> int:
        """Batches in an epoch, in each process."""
        return -(-len(self) // batch_size)

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
            groups = [self.stock.table(shard)["items"][row][1] for shard, row in members]
            pairs = [("", text) for text in itertools.chain(*groups)]
            ids = iter(self.tokenizer.encode_texts(pairs, self.max_length))
            rows = [list(itertools.islice(ids, len(group))) for group in groups]
            lengths = [sum(len(ids) - 1 for ids in row) for row in rows]
            for batch in epoch_order(lengths, batch_size, (*key, pool)):
                yield [members[i] for i in batch], [rows[i] for i in batch]
