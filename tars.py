"""Samples out of WebDataset tars, here or on a server: bounded, each one counted or named.

`webdataset` opens a tar, `tarfile` reads it; what neither looks at is checked here: that it is
whole, that nothing in it is larger than memory, and that what is wrong with one sample costs no
other.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from encoder import PHOTO_SUFFIXES
from photo_names import LONGEST
from texts import NOTHING, as_asked, has_word, texts_of, unescaped
from utils import UserError, decoded, first_line, hide_keys, redact, require_extra, size_text

ATTEMPTS = 5  # at reading a shard that is elsewhere, without getting further
RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled each time
MOST_SHARDS = 1_000_000  # that a pattern's braces may name
MOST_BYTES = {"photo": 2**26, "txt": 2**20, "json": 2**20}  # of each of a sample's files
TOO_LONG = "with too long a name"
JOINED = "it goes on after its end mark: several tars were joined"
MOST_UNPACKED = 100  # times as much as a shard's own size; photos hardly shrink
MEANT = {  # by curl's codes, as the library has it say nothing
    "curl ended with code 6": "there is no such server",
    "curl ended with code 7": "the server can't be reached",
    "curl ended with code 22": "the server has no such file, or doesn't accept the login or "
    "signature",
    "curl ended with code 60": "the server's certificate is not one to trust",
}


class Sample(NamedTuple):
    """A photo of a shard, as it stands there, and what it shows."""

    key: str
    suffix: str  # of the photo's name: what kind of file it is
    photo: bytes
    captions: list[str]


# --- Reading a shard ------------------------------------------------------------------------


def expand_shards(pattern: str) -> list[str]:
    """What `shards_named` gives; refuses a shard that is missing or named twice."""
    urls = shards_named(pattern)
    missing = [url for url in urls if not elsewhere(url) and not os.path.isfile(url)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} shards {pattern} are missing, first {missing[0]}: "
            "correct the name, or the numbers in braces (cc3m/{00000..00331}.tar, or cc3m/*.tar)"
        )
    if len(set(map(identity, urls))) < len(urls):
        raise UserError(f"the shards {redact(pattern)} name one twice")
    return urls


def shards_named(pattern: str) -> list[str]:
    """`"cc3m/{00000..00331}.tar"` or `"cc3m/*.tar"` -> the shards' paths or addresses, in order."""
    shardlists = require_extra("webdataset.shardlists", "requirements-shards.txt")
    try:
        ranges = re.findall(r"\{(\d+)\.\.(\d+)", pattern)
        if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MOST_SHARDS:
            raise ValueError(f"more than {MOST_SHARDS:,} shards: correct the numbers in braces")
        expanded = shardlists.expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # a variable that isn't set, a brace left open
        name = shard_name(pattern)
        raise UserError(f"TRAIN_SHARDS or VAL_SHARDS {name}: {first_line(error)}") from None
    paths = [u if elsewhere(u) else os.path.abspath(os.path.expanduser(u)) for u in expanded]
    there = ([] if elsewhere(path) else sorted(glob.glob(path)) for path in paths)
    return [url for path, found in zip(paths, there, strict=True) for url in found or [path]]


def shard_name(url: str) -> str:
    """How a shard is called: what may be secret of its address gives way to a short hash."""
    known, name = identity(url), redact(identity(url))
    return name if name == known else f"{name} ({hashlib.sha256(known.encode()).hexdigest()[:6]})"


def identity(url: str) -> str:
    """A shard's path or address without keys and signatures, which may be others tomorrow."""
    address, _, query = url.partition("?")
    if re.search(r"(?i)(signature|\bsig)=", query):
        url = address
    key = r"(?i)([?&][\w-]*(?:signature|sig|token|credential|key)[\w-]*=)[^&\s]+"
    return re.sub(r"(\w://)[^/\s@]+@", r"\1***@", re.sub(key, r"\1***", hide_keys(url)))


def elsewhere(url: str) -> bool:
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
            ended = r"\(\(\[?'([\w./-]+).* exit (\d+) .*"  # of the library's `Pipe`
            reason = re.sub(ended, r"\1 ended with code \2", first_line(error))
            reason = MEANT.get(reason, reason)
            if not elsewhere(url) or failures == ATTEMPTS:
                raise UserError(
                    f"the shard {shard_name(url)} can't be read to its end ({reason}): "
                    "mend or replace it, or correct its name, and run again, what is done is kept"
                ) from None
            time.sleep(RETRY_PAUSE * 2 ** (failures - 1))


def _read_once(url: str) -> Iterator[tuple[str, dict[str, tuple[str, bytes | None]]]]:
    """Each name's files: by kind the first one's suffix and content; an error if it isn't whole."""
    gopen = require_extra("webdataset.gopen", "requirements-shards.txt")
    # Closing it raises what a server's end hid.
    with contextlib.closing(gopen.gopen(url)) as opened:
        # The library's own `read` drops what a program wrote once that has failed.
        stream = _Sized(getattr(opened, "stream", opened))
        for key, group in itertools.groupby(_files(stream), lambda file: file[0]):
            files: dict[str, tuple[str, bytes | None]] = {}
            for _, kind, suffix, content in group:
                files.setdefault(kind, (suffix, content))
            yield key, files


def _files(stream: _Sized) -> Iterator[tuple[str, str, str, bytes | None]]:
    """The files of a tar: name up to the first dot after folders, kind, suffix, and content, which
    is None where it is larger than MOST_BYTES of its kind."""

    def letter(byte: re.Match) -> str:  # that is not UTF-8, but of Windows' older encoding
        return byte[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace")

    unpacked, file = 0, io.BufferedReader(stream)
    if file.peek(2)[:2] == b"\x1f\x8b":  # tarfile would end after the first of several joined
        file = gzip.open(file)
    tar = tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header)  # noqa: SIM115
    for info in tar:
        tar.members = []  # or all stay in RAM
        # Names may be of any bytes, and in some headers hold a zero, which no file's may.
        name = re.sub("[\udc80-\udcff]", letter, info.name).replace("\0", "_")
        if not info.isreg():
            continue
        if len(name) > LONGEST:
            yield name[:LONGEST], TOO_LONG, "", None
            continue
        found = re.fullmatch(r"(?!__[^/]*__/)((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
        if not found:
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
    while rest := tar.fileobj.read(2**20):
        if b"ustar" in rest:  # a header's
            raise tarfile.ReadError(JOINED)
    if getattr(getattr(tar.fileobj, "cmp", None), "unused_data", b"").strip(b"\0"):
        raise tarfile.ReadError(JOINED)  # after being packed


class _Header(tarfile.TarInfo):
    """A file's header, which may not be large itself: tarfile would take it into RAM. A broken one
    is an error: tarfile would take it, and where a tar is cut off between files, for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the end mark
            raise
        except tarfile.HeaderError as error:
            why = f"it has no end mark, but is cut off or broken: {error}"
            first = tar.fileobj.tell() <= tarfile.BLOCKSIZE
            raise tarfile.ReadError("it is no tar" if first else why) from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # meant to be overridden
        if not self.isreg() and self.size > MOST_BYTES["json"]:
            raise tarfile.ReadError(f"it has a header of {size_text(self.size)}")
        return super()._proc_member(tar)


class _Sized(io.RawIOBase):
    """A stream that remembers its size."""

    def __init__(self, stream: Any):
        self.stream, self.size = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self.stream.read(len(buffer))
        buffer[: len(piece)] = piece
        self.size += len(piece)
        return len(piece)


def _sample(key: str, files: dict[str, tuple[str, bytes | None]]) -> Sample | str:
    """A photo with its captions, or what it lacks. A `.txt` is one caption; where there is none, a
    `.json` has it under a usual name, if no title."""
    if TOO_LONG in files:
        return TOO_LONG
    for kind, (suffix, content) in files.items():
        if content is None and kind in MOST_BYTES:
            raise ValueError(f"its .{suffix} is larger than {size_text(MOST_BYTES[kind])}")
    texts = [_line(decoded(files["txt"][1]))] if "txt" in files else [""]
    if "json" in files and not has_word(texts[0]):
        # Numbers don't matter, and Python refuses long ones.
        table = json.loads(decoded(files["json"][1]), parse_int=float)
        texts = texts_of(as_asked(table) | {"title": None})
    lines = map(_line, filter(None, texts))
    captions = [line for line in lines if has_word(line) and line not in NOTHING]
    if "photo" not in files:
        dotted = any(f".{kind.rpartition('.')[2]}" in PHOTO_SUFFIXES for kind in files)
        return "with a dot in the photo's name" if dotted else "without a photo"
    if not captions:
        return "without a caption"
    return Sample(key, *files["photo"], captions)


def _line(text: str) -> str:
    """A text in one line, less control characters, and halves of them, which no file can hold."""
    whole = unescaped(text.encode("utf-8", "replace").decode())
    return " ".join(re.sub(r"[\0-\x1f\x7f]", " ", whole).split())
