"""Photos with captions out of parquet files, the form in which data sets lie on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from archive import check_unpacked
from captions_file import CAPTION_KEYS, SPLIT_KEYS, caption_columns, choose_columns, texts_of
from dataset import split_in
from photo_names import is_photo
from tables import plain_key
from utils import UserError, first_line, require_extra


def read_parquet(files: Sequence[Path]) -> Iterator[tuple[str, bytes, list[str]]]:
    """Each photo's name, its file's content, and its captions; what has no photo is left out.

    Photos stand in a column of bytes, or of `{"bytes": ..., "path": ...}` as the library
    `datasets` writes it; captions in one that is called as in tables, or in `caption_0` and so on.
    Their split, as a column or files of several splits say it, is the photo's folder.
    """
    pq = require_extra("pyarrow.parquet", "requirements-parquet.txt", "reading parquet")
    taken: set[tuple[str, str]] = set()
    called = {file: split_in(f"{file.parent.name}/{file.name}") for file in files}
    for file in files:
        whole = called[file] if len({*called.values()}) > 1 else ""
        try:
            with pq.ParquetFile(file) as table:
                photo, captions, split = _columns(file, table.schema_arrow)
                groups = map(table.metadata.row_group, range(table.num_row_groups))
                packed, unpacked = file.stat().st_size, 0
                check_unpacked(file, packed, sum(group.total_byte_size for group in groups))
                for part in table.iter_batches(batch_size=8, columns=[photo, *captions, *split]):
                    unpacked += part.nbytes  # what repeats itself is in the file once
                    check_unpacked(file, packed, unpacked)
                    for row in part.to_pylist():
                        image = row[photo]
                        image = image if isinstance(image, dict) else {"bytes": image}
                        if content := image["bytes"]:
                            texts = texts_of([row[column] for column in captions])
                            texts = [text for text in texts if isinstance(text, str)]
                            own = "".join(split_in(row[column]) for column in split) or whole
                            name = _name(own, image.get("path"), taken)
                            yield name, content, texts
        except (ValueError, OSError) as error:  # pyarrow's own are kinds of these
            raise UserError(f"{file} can't be read as parquet: {first_line(error)}") from None


def _holds_photos(kind: str) -> bool:
    """Is a column, by its type, one of bytes, or of objects that have them as `bytes`?"""
    if kind.startswith("struct<"):
        return bool(re.search(r"\bbytes: \w*binary", kind))
    return "binary" in kind.split("list<")[0]


def _columns(file: Path, schema: Any) -> tuple[str, list[str], list[str]]:
    """The column of photos, those of their captions, and that of their split, if there is one."""
    kinds = {field.name: str(field.type) for field in schema}
    photos = [name for name, kind in kinds.items() if _holds_photos(kind)]
    names = {name: plain_key(name) for name in kinds}
    captions = caption_columns(names, choose_columns(names, [])[1])
    if not photos or not captions:
        raise UserError(
            f"{file} has the columns {', '.join(kinds)}: it needs one with the photos' bytes, and "
            f"captions in one of {', '.join(CAPTION_KEYS)}"
        )
    splits = [name for key in SPLIT_KEYS for name in names if names[name] == key]
    return photos[0], captions, splits[:1]


def _name(split: str, path: str | None, taken: set[tuple[str, str]]) -> str:
    """The photo's own name, or a number where it has none or another photo of its split has it."""
    name = re.sub(r"[^\w.-]", "_", os.path.basename((path or "").replace("\\", "/")))[-60:]
    number = len(taken)
    while not is_photo(name) or name.startswith(".") or (split, name.lower()) in taken:
        name, number = f"{number:06d}.jpg", number + 1
    taken.add((split, name.lower()))
    return os.path.join(split, name)
