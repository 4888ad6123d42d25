"""Photos with captions or questions out of parquet files, as data sets lie on the Hub."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from archive import check_unpacked
from captions_file import (
    BARE,
    CAPTION_KEYS,
    NUMBERS,
    SAMPLE,
    SPLIT_KEYS,
    caption_columns,
    choose_columns,
    texts_of,
)
from dataset import split_in
from photo_names import is_photo, plain_name
from questions_file import ASKED, questions_in, read_entry
from tables import plain_key
from tars import MOST_BYTES
from utils import UserError, bounded_memory, first_line, require_extra, size_text

# Bytes that rows, and the pages they are packed in, may take at a time beside four times the file's
# own: photos don't shrink, and pyarrow writes pages of a thousand.
MOST_MEMORY = 2**29


@dataclass(frozen=True)
class Columns:
    """Which columns hold the photos, their captions, questions, names and split."""

    photo: str
    captions: list[str]
    asked: list[str]  # questions, answers and what goes with them
    names: list[str]  # one, or none, as of the next
    split: list[str]

    def all(self) -> list[str]:
        others = (*self.captions, *self.asked, *self.names, *self.split)
        return [*dict.fromkeys((self.photo, *others))]


def read_parquet(
    files: Sequence[Path],
) -> Iterator[tuple[str, bytes, list[str], list[dict[str, Any]]]]:
    """Each row's photo: its name, its file's content, captions, and questions as questions.json has
    them; a row without a photo is left out.

    Photos stand in a column of bytes, or of `{"bytes": ..., "path": ...}` as the library
    `datasets` writes it; captions in one that is called as in tables, or in `caption_0` and so on.
    Their split, as a column or files of several splits say it, is the photo's folder. Rows with
    the same picture, as where each has one of its captions, are one photo, of its first split.
    """
    pq = require_extra("pyarrow.parquet", "requirements-parquet.txt", "reading parquet")
    import pyarrow  # without which there is no `pq`

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # its own reserves gigabytes ahead
    taken: set[str] = set()
    names: dict[bytes, str] = {}  # by what tells a picture from others
    moved: set[str] = set()
    passed: list[str] = []  # what questions lack
    bare = 0  # rows without a photo
    known: dict[str, str] = {}  # the columns of the file before, which files alike share
    called = {file: split_in(f"{file.parent.name}/{file.name}") for file in files}
    for file in files:
        whole = called[file] if len({*called.values()}) > 1 else ""
        try:
            opened = pq.ParquetFile(file, buffer_size=2**20)  # or it reads groups of rows whole
            most = MOST_MEMORY + 4 * file.stat().st_size
            with bounded_memory(most), opened as table:
                groups = map(table.metadata.row_group, range(table.num_row_groups))
                unpacked = sum(group.total_byte_size for group in groups)
                check_unpacked(file, file.stat().st_size, unpacked)
                kinds = {plain_key(field.name): str(field.type) for field in table.schema_arrow}
                if kinds != known:
                    known, columns = kinds, _columns(file, table, kinds)
                for row in _rows(file, table, columns.all()):
                    image = row[columns.photo]
                    image = image if isinstance(image, dict) else {"bytes": image}
                    bare += not image["bytes"]
                    if content := image["bytes"]:
                        texts = texts_of([row[column] for column in columns.captions])
                        texts = [text for text in texts if isinstance(text, str)]
                        if (size := sum(map(len, texts))) > MOST_BYTES["txt"]:
                            raise ValueError(f"a row has captions of {size:,} characters")
                        own = "".join(split_in(row[column]) for column in columns.split) or whole
                        digest = hashlib.sha256(content).digest()[:16]
                        if digest not in names:
                            said = [_called(name, row[name]) for name in columns.names]
                            names[digest] = _name(own, [image.get("path") or "", *said], taken)
                        elif os.path.dirname(names[digest]) != own:
                            moved.add(names[digest])
                        talk = {key: row[key] for key in columns.asked}
                        asked = [*_questions(str(file), talk, passed)]
                        yield names[digest], content, texts, asked
        except (ValueError, OSError) as error:  # pyarrow's own are kinds of these
            raise UserError(f"{file} can't be read as parquet: {first_line(error)}") from None
        except MemoryError:
            raise UserError(
                f"{file} has rows or pages that become more than {size_text(most)}: that is no "
                "collection of photos, or it needs to be written in smaller pages"
            ) from None
    if moved:
        example = f"each counts in the first alone, as {min(moved)!r}"
        tqdm.write(f"{len(moved):,} photos stand in several splits: {example}", file=sys.stdout)
    if bare:
        tqdm.write(f"passed over: {bare:,} rows without a photo", file=sys.stdout)
    if passed:
        tqdm.write(f"passed over: {len(passed):,} questions, first: {passed[0]}", file=sys.stdout)


def _questions(where: str, row: dict[str, Any], passed: list[str]) -> Iterator[dict[str, Any]]:
    """A row's questions as questions.json has them; `passed` gets why others are left out."""
    for entry in questions_in(row):
        if entry.get("question"):
            try:
                yield read_entry(where, entry, answered=True)
            except UserError as error:
                passed.append(str(error))


def _rows(file: Path, table: Any, keys: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of an open file by their columns' plain names, refused where they become far more
    than the file holds."""
    packed, unpacked = file.stat().st_size, 0
    columns = [name for name in table.schema_arrow.names if plain_key(name) in keys]
    for part in table.iter_batches(batch_size=8, columns=columns, use_threads=False):
        unpacked += part.nbytes  # what repeats itself is in the file once
        check_unpacked(file, packed, unpacked)
        for row in part.to_pylist():
            yield {plain_key(name): cell for name, cell in row.items()}


def _holds_photos(kind: str) -> bool:
    """Is a column, by its type, one of bytes, or of objects that have them as `bytes`?"""
    if kind.startswith("struct<"):
        return bool(re.search(r"\bbytes: \w*binary", kind))
    return "binary" in kind.split("list<")[0]


def _columns(file: Path, table: Any, kinds: Mapping[str, str]) -> Columns:
    """Which columns count, by their names and, as in tables, by what stands in the first rows.

    Of several with pictures, one with a usual name for photos goes before a `control_image` or an
    `audio`. What is not used is said.
    """
    photos = [name for name, kind in kinds.items() if _holds_photos(kind)]
    # In one of the type `null` nothing stands.
    plain = [name for name in kinds if "binary" not in kinds[name]]
    texts = [name for name in plain if re.search("string|(?<!not )null", kinds[name])]
    rows = [*itertools.islice(_rows(file, table, texts), SAMPLE)] if texts else []
    found, captions, _ = choose_columns([*kinds], rows)
    captions = caption_columns(texts, [name for name in captions if name in texts])
    asked = [name for name in kinds if name in ASKED]
    if not photos or not (captions or "question" in kinds):
        raise UserError(
            f"{file} has the columns {', '.join(kinds)}: it needs one with the photos' bytes, and "
            f"captions in one of {', '.join(CAPTION_KEYS)}, or a question and an answer"
        )
    [photo, *_] = [name for name in (*found, *photos) if name in photos]
    called = [n for n in found if n in texts and any(_called(n, row[n]) for row in rows)]
    splits = [name for name in SPLIT_KEYS if name in kinds]
    columns = Columns(photo, captions, asked, called[:1], splits[:1])
    if ignored := [name for name in kinds if name not in columns.all()]:
        parts = {"captions": captions, "questions": asked, "names": columns.names}
        used = f"photos are in the column {photo}"
        used += "".join(f", {what} in {', '.join(there)}" for what, there in parts.items() if there)
        tqdm.write(f"{file}: {used}; ignored: {', '.join(ignored)}", file=sys.stdout)
    return columns


def _called(column: str, said: Any) -> str:
    """What a cell calls its photo, or nothing; a column of numbers may leave out the suffix."""
    name = plain_name(said) if isinstance(said, str) else ""
    if column in NUMBERS and BARE.fullmatch(name) and not is_photo(name):
        return f"{name}.jpg"
    return name if is_photo(name) else ""


def _name(split: str, said: Sequence[str], taken: set[str]) -> str:
    """The first of a photo's names that no other of its split has, or else a number."""
    names = [os.path.basename(name.replace("\\", "/")) for name in said]
    names = [re.sub(r"[^\w.-]", "_", name)[-60:] for name in names]
    numbers = (f"{number:06d}.jpg" for number in itertools.count(len(taken)))
    for name in itertools.chain(names, numbers):
        place = os.path.join(split, name)
        if is_photo(name) and not name.startswith(".") and place.lower() not in taken:
            break
    taken.add(place.lower())
    return place
