"""Photos with captions or questions out of parquet files, as data sets lie on the Hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from archive import check_unpacked
from captions_file import BARE
from columns import (
    IDS,
    SAMPLE,
    SPLIT_KEYS,
    caption_columns,
    choose_columns,
    is_given,
    languages_in,
)
from dataset import split_in
from photo_names import is_photo, plain_name
from questions_file import ANSWERS, ASKED, LETTERED, questions_in, read_entry
from tables import MOST_MEMORY, opened_parquet
from tars import MOST_BYTES
from texts import CAPTION_KEYS, PAIRS, TO_CAPTION, as_asked, plain_key, texts_of, unescaped
from utils import UserError, interpreter

# The type of a column of bytes, or of objects, alone or in lists, with `bytes`.
PICTURES = re.compile(r"(\w*list<\w+: )?(\w*binary|struct<(.*\W)?bytes: \w*binary)")
QUESTIONS = re.compile(r"\w*list<\w+: struct<(.*\W)?question: ")


# The columns by what they hold: photos (one column), captions, questions with what goes with them,
# names and splits (one or none).
Columns = dict[str, list[str]]


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
    taken: set[str] = set()
    names: dict[bytes, str] = {}  # by what tells a picture from others
    moved: set[str] = set()
    passed: list[str] = []  # what questions lack
    without: Counter[str] = Counter()  # rows without one photo, and why
    known: dict[str, str] = {}  # the columns of the file before, which files alike share
    called = {file: split_in(f"{file.parent.name}/{file.name}") for file in files}
    for file in files:
        whole = called[file] if len({*called.values()}) > 1 else ""
        with opened_parquet(file, MOST_MEMORY) as (schema, read):
            kinds = {plain_key(field.name): str(field.type) for field in schema}
            if kinds != known:
                known, columns = kinds, _columns(file, schema, read, kinds)
            for row in _rows(file, schema, read, [*itertools.chain(*columns.values())]):
                pictures = _pictures(row[columns["photos"][0]])
                if len(pictures) != 1:
                    without["with several photos" if pictures else "without a photo"] += 1
                    continue
                content, path = pictures[0]
                talk = as_asked({key: row[key] for key in columns["questions"]})
                told = [row[column] for column in columns["captions"]] or [talk.get("messages")]
                texts = texts_of([*told, talk.get("caption")])
                texts = [text for text in texts if isinstance(text, str)]
                if (size := sum(map(len, texts))) > MOST_BYTES["txt"]:
                    raise ValueError(f"a row has captions of {size:,} characters")
                own = "".join(split_in(row[column]) for column in columns["splits"]) or whole
                digest = hashlib.sha256(content).digest()[:16]
                if digest not in names:
                    said = [_called(name, row[name]) for name in columns["names"]]
                    names[digest] = _name(own, [path, *said], taken)
                elif os.path.dirname(names[digest]) != own:
                    moved.add(names[digest])
                asked = [*_questions(str(file), talk, passed)]
                yield names[digest], content, [*map(unescaped, texts)], asked
    if moved:
        example = f"each counts in the first alone, as {min(moved)!r}"
        tqdm.write(f"{len(moved):,} photos stand in several splits: {example}", file=sys.stdout)
    for why, count in without.items():
        tqdm.write(f"passed over: {count:,} rows {why}", file=sys.stdout)
    if passed:
        tqdm.write(f"passed over: {len(passed):,} questions, first: {passed[0]}", file=sys.stdout)


def _pictures(cell: Any) -> list[tuple[bytes, str]]:
    """The files of the pictures in a cell, each with its path, if it tells one."""
    each = cell if isinstance(cell, list) else [cell]
    each = [part if isinstance(part, dict) else {"bytes": part} for part in each]
    return [(part["bytes"], str(part.get("path") or "")) for part in each if part["bytes"]]


def _questions(where: str, row: dict[str, Any], passed: list[str]) -> Iterator[dict[str, Any]]:
    """A row's questions as questions.json has them; `passed` gets why others are left out."""
    for entry in questions_in(row):
        if entry.get("question"):
            try:
                yield read_entry(where, entry, answered=True)
            except UserError as error:
                passed.append(str(error))


def _rows(file: Path, schema: Any, read: Any, keys: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of an open file by their columns' plain names, refused where they become far more
    than the file holds."""
    packed, unpacked = file.stat().st_size, 0
    for part in read([name for name in schema.names if plain_key(name) in keys]):
        unpacked += part.nbytes  # what repeats itself is in the file once
        check_unpacked(file, packed, unpacked)
        for row in part.to_pylist():
            yield {plain_key(name): cell for name, cell in row.items()}


def _columns(file: Path, schema: Any, read: Any, kinds: Mapping[str, str]) -> Columns:
    """Which columns count, by their names and, as in tables, by what stands in the first rows.

    Of several with pictures, one with a usual name for photos goes before a `control_image` or an
    `audio`. What is not used is said.
    """
    photos = sorted((n for n, kind in kinds.items() if PICTURES.match(kind)), key=is_given)
    # In one of the type `null` nothing stands.
    plain = [name for name in kinds if "binary" not in kinds[name]]
    texts = [name for name in plain if re.search("string|(?<!not )null", kinds[name])]
    rows = [*itertools.islice(_rows(file, schema, read, texts), SAMPLE)] if texts else []
    found, captions, _ = choose_columns([*kinds], rows)
    captions = caption_columns(texts, [name for name in captions if name in texts])
    flat = {name for name in plain if not kinds[name].startswith("struct")}
    pairs = [pair for pair in PAIRS if {*pair} <= flat]
    lists = [name for name in kinds if QUESTIONS.match(kinds[name])]  # Visual Genome's `qas`
    asking = {*ASKED, *lists, *itertools.chain(*pairs)}
    asked = [name for name in kinds if name in asking or LETTERED.fullmatch(name)]
    asks = [str(row.get("question")) for row in rows]
    if not captions and rows and all(TO_CAPTION.search(ask) and "?" not in ask for ask in asks):
        captions, asked = [name for name in (*ANSWERS, "response") if name in kinds][:1], []
    has = f"{file} has the columns {', '.join(kinds)}"
    if not photos:
        real = {plain_key(name): name for name in schema.names}  # LAION's are URL and TEXT
        addresses = [real[key] for key in texts if any("://" in str(row[key]) for row in rows)]
        how = _how_to_fetch(file, addresses, [real[key] for key in captions])
        raise UserError(f"{has}, and {how}")
    if not (captions or pairs or lists or {"question", "questions"} & {*kinds}):
        raise UserError(f"{has}: {_how_to_rename(file)}")
    [photo, *_] = [name for name in (*found, *photos) if name in photos]
    if len(photos) > 1 and (number := re.search(r"\d+$", photo)):  # as Winoground has pairs
        captions = [name for name in captions if name.endswith(number[0])] or captions
    called = [n for n in found if n in texts and any(_called(n, row[n]) for row in rows)]
    splits = [name for name in SPLIT_KEYS if name in kinds]
    columns = {"photos": [photo], "captions": captions, "questions": asked}
    columns |= {"names": called[:1], "splits": splits[:1]}
    if ignored := [name for name in kinds if name not in itertools.chain(*columns.values())]:
        used = ", ".join(f"{what} in {', '.join(said)}" for what, said in columns.items() if said)
        tqdm.write(f"{file}: {used}; ignored: {', '.join(ignored)}", file=sys.stdout)
    if languages := languages_in(rows, captions):
        tqdm.write(f"{file} has rows{languages}", file=sys.stdout)
    return columns


def _how_to_fetch(file: Path, addresses: Sequence[str], captions: Sequence[str]) -> str:
    """What to do where there are no photos, but perhaps columns of their addresses."""
    said = "no photos: put those that it is about into DATA_DIR/images"
    if not (addresses and captions):
        return said
    words = ["img2dataset", "--url_list", str(file.parent), "--input_format", "parquet"]
    words += ["--url_col", addresses[0], "--caption_col", captions[0]]
    return f"{said} ({shlex.join([*words, '--output_folder', 'DATA_DIR/images'])})"


def _how_to_rename(file: Path) -> str:
    """What to do where no column is called as captions or questions are."""
    folder = json.dumps(str(file.parent), ensure_ascii=False)
    # An Arrow file becomes a parquet file, which counts before it.
    read = {".arrow": "a.ipc.open_stream(a.memory_map(str(f))).read_all()"}
    code = (
        "import pathlib, pyarrow as a, pyarrow.parquet as p; [p.write_table("
        f'{read.get(file.suffix, "p.read_table(f)")}.rename_columns({{"COLUMN": "caption"}}), '
        f'f.with_suffix(".parquet")) for f in pathlib.Path({folder}).glob("*{file.suffix}") '
        'if "cache-" not in f.name]'
    )
    return (
        f"it needs captions in one of {', '.join(CAPTION_KEYS)}, or a question and an answer; "
        f"COLUMN becomes such by {shlex.join([interpreter(), '-c', code])}"
    )


def _called(column: str, said: Any) -> str:
    """What a cell calls its photo, or nothing; a column of numbers may leave out the suffix."""
    name = plain_name(said) if isinstance(said, str) else ""
    if column in IDS and BARE.fullmatch(name) and not is_photo(name):
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
