"""Zips of photos, in one file or in parts: read without a copy, and refused where they lie."""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from captions_file import TABLES, TEXT_SUFFIXES, may_list
from photo_names import is_photo
from utils import UserError, lock, remove_leftovers, size_text, write_error

MAX_ENTRY_BYTES = 256 * 2**20  # no photo is larger; what is larger in a zip is a bomb
MAX_UNPACKED_RATIO = 50  # photos hardly compress: a zip that grows more than this is a bomb
CAPTION_FILES = ("captions.json", *TABLES)  # the first that a zip holds counts
TABLE_NAMES = tuple(name.lower() for name in CAPTION_FILES)
ODD = (ValueError, NotImplementedError, OverflowError)  # what else zipfile raises for some zips
Member = tuple[PurePosixPath, zipfile.ZipInfo]  # a file's path in a zip, and what it says of it
Entries = dict[str, zipfile.ZipInfo]  # by the name that each gets


class JoinedFiles(io.RawIOBase):
    """Several files read as one, so that the parts of a zip need no copy."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [open(path, "rb") for path in paths]
        self.ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        self.position = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.ends[-1]}[whence]
        if base + offset < 0:
            raise ValueError("a place before the start of the file")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        part = bisect.bisect_right(self.ends, self.position)
        if part == len(self.files):
            return 0
        self.files[part].seek(self.position - self.ends[part], os.SEEK_END)
        count = self.files[part].readinto(buffer)
        self.position += count
        return count

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()


@contextlib.contextmanager
def open_zip(parts: Sequence[Path], downloaded: bool) -> Iterator[zipfile.ZipFile]:
    """Open a zip in one or several files. One that is cut off, altered, or put together from the
    wrong parts is refused within the block, and removed where it was `downloaded`."""
    name = " + ".join(str(part) for part in parts)
    try:
        with io.BufferedReader(JoinedFiles(parts)) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, *ODD) as error:
        order = "" if len(parts) == 1 else ", or its parts are out of order"
        remedy = "unpack others into DATA_DIR"
        if downloaded:
            for part in parts:
                part.unlink()
            remedy = "removed, run the same command again to download it"
        raise UserError(f"{name} is not a whole zip file{order} ({error}): {remedy}") from None


def check_unpacked(source: object, packed: int, unpacked: int, largest: int = 0) -> None:
    """Refuse a source that unpacks to far more bytes than it has, or to a file too `largest`."""
    if largest > MAX_ENTRY_BYTES or unpacked > MAX_UNPACKED_RATIO * packed:
        file = f", its largest file to {size_text(largest)}" if largest else ""
        raise UserError(
            f"{source} of {size_text(packed)} would unpack to {size_text(unpacked)}{file}: that is "
            "no collection of photos"
        )


def select_entries(archive: zipfile.ZipFile, packed: int) -> tuple[Entries, Entries]:
    """What is for the photo folder in a zip of `packed` bytes, by name, less the folders that all
    of it is in; and its captions tables by theirs, the one that counts first.

    Without a captions table of a usual name, or with one of them twice, all that may hold captions
    is for the photo folder too. What is unsafe is refused before anything is written.
    """
    members = [*members_of(archive)]
    lists = [(path, info) for path, info in members if path.name.lower() in TABLE_NAMES]
    tables = {path.name.lower(): (path, info) for path, info in lists}
    if not tables or len(tables) < len(lists):
        wanted, tables = [*_with_texts(members)], {}
    else:
        wanted = [(path, info) for path, info in members if is_photo(path.name)]
    taken: set[str] = set()
    for path, info in (*wanted, *tables.values()):
        entry = f"the archive's entry {info.filename!r}"
        # A file system that ignores case would write "A.jpg" over "a.jpg".
        if str(path).lower() in taken:
            raise UserError(f"{entry} stands there twice")
        taken.add(str(path).lower())
        plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if info.flag_bits & 1 or not plain or len(path.name.encode()) > 255:
            raise UserError(f"{entry} is encrypted, oddly compressed, or has too long a name")
    sizes = [info.file_size for _, info in (*wanted, *tables.values())]
    check_unpacked("the archive", packed, sum(sizes), max(sizes, default=0))
    top = os.path.commonpath([path.parent for path, _ in wanted]) if wanted else ""
    entries = {str(path.relative_to(top)): info for path, info in wanted}
    ordered = [name for name in CAPTION_FILES if name.lower() in tables]
    return entries, {name: tables[name.lower()][1] for name in ordered}


def members_of(archive: zipfile.ZipFile) -> Iterator[Member]:
    """The files of a zip, less hidden ones; a path that leads elsewhere is refused."""
    for info in archive.infolist():
        name = info.filename
        if not info.flag_bits & 0x800:  # macOS writes UTF-8 all the same
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode()
        path = PurePosixPath(name.replace("\\", "/"))
        entry = f"the archive's entry {info.filename!r}"
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
            raise UserError(f"{entry} leads out of the folder")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{entry} is a link, not a file")
        hidden = "__MACOSX" in path.parts or any(part.startswith(".") for part in path.parts)
        if path.name and not (hidden or info.is_dir()):
            yield path, info


def _with_texts(members: Sequence[Member]) -> Iterator[Member]:
    """The photos of a tree, and what may hold their captions: lists, and texts beside them."""
    photos = [path for path, _ in members if is_photo(path.name)]
    stems = {stem for photo in photos for stem in (photo.stem, photo.name)}
    for path, info in members:
        beside = path.suffix.lower() in TEXT_SUFFIXES and path.stem in stems
        text = beside or may_list(path) or path.name.lower() in TABLE_NAMES
        if is_photo(path.name) or (text and info.file_size <= MAX_ENTRY_BYTES):
            yield path, info


def extract_photos(archive: zipfile.ZipFile, photos: Entries, folder: Path) -> None:
    # One temporary name for all of this process, for several may unpack into one folder, each
    # for a DATA_DIR of its own. A run that was killed leaves one file, which the next removes.
    temporary = folder / f".unpacking.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, ".unpacking.*.tmp")
        for name, info in tqdm(photos.items(), desc="unpacking", unit=" photos", disable=None):
            # zipfile reads no more than the declared size, and raises if there is less or the
            # checksum is another.
            with archive.open(info) as source, open(temporary, "wb") as target:
                lock(target)
                shutil.copyfileobj(source, target)
                target.flush()
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, folder / name)
    except OSError as error:
        raise write_error(error, Path(error.filename2 or folder)) from error
    finally:
        temporary.unlink(missing_ok=True)
