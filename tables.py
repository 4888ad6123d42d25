"""The rows of a table as people write them, with quotes of several kinds and line ends within, and
of parquet and Arrow files.

The csv module would need to be told the delimiter, and a stray quote swallows what follows.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photo_names import is_photo, is_there, plain_name
from texts import CAPTION_KEYS, plain_key
from utils import UserError, bounded_memory, first_line, lfs_note, require_extra, size_text

# Bytes that rows, and the pages they are packed in, may take at a time beside four times the file's
# own: photos don't shrink, and pyarrow writes pages of a thousand.
MOST_MEMORY = 2**29
MOST_TEXTS = 2**31  # bytes that a parquet file's rows may take without photos
MOST_LINES = 100  # of a quoted caption
Field = tuple[str, str]  # its value, and how it is spelled
Row = tuple[str, list[Field]]  # where it stands, and its fields


@dataclass
class Table:
    """The names in the first row, and all rows, unless that is said to be a header."""

    delimiter: str
    names: list[str]
    rows: list[Row]
    headed: bool = False

    def drop_header(self) -> None:
        """Take off the first row, wherever it stands: tables are joined with theirs."""
        header = [value for value, _ in self.rows[0][1]]
        self.rows = [row for row in self.rows if [value for value, _ in row[1]] != header]

    def cells(self, row: Row) -> dict[str, str]:
        """A row's values by the names of their columns."""
        return {name: value for name, (value, _) in zip(self.names, row[1], strict=False)}

    def objects(self, columns: Collection[str]) -> list[tuple[str, dict[str, str]]]:
        """Its rows as objects; a delimiter in a text that isn't quoted is refused where it might
        stand in several of the `columns` that hold texts."""
        rows, texts = [], [place for place, name in enumerate(self.names) if name in columns]
        for where, row in self.rows:
            whole = self.fit(row, texts[0] if texts else 0, texts == [len(self.names) - 1])
            if len(whole) > 1 and len(texts) != 1:
                width = len(self.names)
                raise UserError(
                    f"{where} has {width + len(whole) - 1} columns, not {width}: put quotes around "
                    f"a text that holds a {self.delimiter!r}"
                )
            rows.append((where, self.cells((where, row))))
        return rows

    def fit(self, row: list[Field], column: int, ended: bool) -> list[Field]:
        """Have a row as many cells as there are columns: those that are too many are one with that
        of a column, whose text isn't quoted and has delimiters in it. Returns what it was made of.
        Where the last column may not be empty (`ended`), spreadsheets write empty ones beyond."""
        while ended and len(row) > len(self.names) and not row[-1][0]:
            row.pop()
        end = max(0, len(row) - len(self.names)) + column + 1
        row += [("", "")] * (len(self.names) - len(row))
        if len(whole := row[column:end]) > 1:
            row[column:end] = [(self.delimiter.join(s for _, s in whole).strip(), "")]
        return whole


def table_of(lines: list[tuple[str, str]], folder: Path | None = None) -> Table:
    """A table of lines; its first row may call a photo of the `folder` without its suffix. Of
    columns of one name all but the first have their place after it, or before a crowd's."""
    delimiter = delimiter_of(lines[0][1], folder)
    dash = re.match(r"\S+ +([-#=>:~–—]{1,3}) ", lines[0][1])
    if delimiter == " " and dash:  # 1.jpg - A dog
        apart = re.compile(rf"^(\S+) +{re.escape(dash[1])} ")
        lines = [(where, apart.sub(r"\1 ", text)) for where, text in lines]
    rows = [*whole_rows(lines, delimiter)]
    names: list[str] = []
    for place, (value, _) in enumerate(rows[0][1]):
        key = plain_key(value.lstrip("# "))
        again = f"{place}_{key}" if re.search("[.:]", value) else f"{key}_{place}"
        names.append(again if key and key in names else key)
    # R's rows begin with their number, of which its header says nothing.
    shown = any(is_photo(plain_name(value)) for _, row in rows[1:2] for value, _ in row[1:])
    counted = ((number, row) for number, (_, row) in enumerate(rows[1:], start=1))
    if shown and all(len(row) > len(names) and row[0][0] == str(n) for n, row in counted):
        names.insert(0, "")
    return Table(delimiter, names, rows)


def delimiter_of(first: str, folder: Path | None) -> str:
    """What parts the fields of a first row: the usual sign that comes first, or after a photo's
    name a space, or what tabs became (`:`, `@`)."""
    usual = next((mark for mark in first if mark in ",|\t;"), ",")
    begin, *rest = first.split(usual)
    words = re.match(r"([^\s,|;]+) +[^\s,|;]", first)
    name = plain_name(words[1]) if words else ""
    signs = [] if rest and is_photo(plain_name(begin)) else re.finditer("[:@]", begin)
    sign = next((at[0] for at in signs if is_photo(plain_name(begin[: at.start()]))), "")
    bare = name and not sign and not (rest and is_photo(plain_name(rest[-1])))
    if is_photo(name) or (bare and folder and is_there(name, folder)):
        return " "
    return sign or usual


def is_comment(line: str) -> bool:
    """Is it a comment before the rows, and no header, which numpy writes so as well?"""
    keys = [plain_key(cell) for cell in re.split(r"[,|\t;]", line.lstrip("# "))]
    headed = keys[1:] and {*keys} & {*CAPTION_KEYS, "question"}
    return f"{line} ".startswith(("# ", "#TYPE ")) and not headed  # PowerShell's


def whole_rows(lines: list[tuple[str, str]], delimiter: str) -> Iterator[Row]:
    """The rows of a table; one that ends within quotes goes on with the lines after it."""
    mark = re.escape(delimiter)
    end = rf"[ \r]*{mark}"
    field = re.compile(  # quotes within quotes are doubled, or else follow a backslash
        rf'[ ]*"((?:[^"]|"")*)"{end}|[ ]*"((?:[^"\\]|\\.)*)"{end}|([^{mark}]*){mark}'
    )

    def fields(text: str) -> list[Field]:
        if len(text) > csv.field_size_limit():
            raise UserError(f"{where} is longer than {csv.field_size_limit():,}")
        found = []
        for match in field.finditer(text + delimiter):  # so that the last one has an end too
            doubled, escaped, plain = match.groups("")  # of which one stands there
            value = plain or doubled.replace('""', '"') or re.sub(r"\\(.)", r"\1", escaped)
            found.append((value.strip(), match[0].removesuffix(delimiter)))
        return found

    def opened(row: list[Field]) -> list[Field]:
        """The fields from one on that begins with a quote which nothing closes, if one does."""
        spelled = [s.lstrip() for _, s in row]
        begun = (n for n, s in enumerate(spelled) if s.startswith('"') and s.count('"') % 2)
        first = next(begun, len(row))
        return row[first:] if delimiter.join(spelled[first:]).count('"') % 2 else []

    def names_photo(row: list[Field]) -> bool:
        return any(is_photo(plain_name(value)) for value, _ in row)

    place = 0
    while place < len(lines):
        where, text = lines[place]
        row, place = fields(text), place + 1
        alone, named = (row, place), names_photo(row)
        last = min(len(lines), place + MOST_LINES)
        while opened(row) and place < last:
            more = lines[place][1]
            names = names_photo(fields(more))
            if named and names:
                break
            text, place, named = f"{text}\n{more}", place + 1, named or names
            if '"' in more.replace('""', ""):  # or nothing is closed
                row = fields(text)
        if opened(row) or any("\n" in s and s.lstrip()[:1] != '"' for _, s in row):
            row, place = alone
            if not names_photo(opened(row)[1:]):  # as a caption before its photo may have one
                raise UserError(f"{where}: a quoted caption isn't closed before the next")
        yield where, row


@contextlib.contextmanager
def opened_parquet(
    file: Path, memory: int
) -> Iterator[tuple[Any, Callable[[Sequence[str]], Iterator[Any]]]]:
    """A parquet file, or an Arrow file as `save_to_disk` of the library `datasets` writes it: its
    schema, and what gives some columns' rows, few at a time. What can't be read, or becomes more
    bytes than `memory` and four times its own, is refused."""
    pq = require_extra("pyarrow.parquet", "requirements-parquet.txt", "reading parquet")
    import pyarrow  # without which there is no `pq`

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # its own reserves gigabytes ahead
    most = memory + 4 * file.stat().st_size
    try:
        with bounded_memory(most), contextlib.ExitStack() as files:
            if file.suffix == ".arrow":
                stream = pyarrow.ipc.open_stream(files.enter_context(pyarrow.memory_map(str(file))))
                whole = stream.read_all()  # which stays on the disk
                yield whole.schema, lambda keys: whole.select(keys).to_batches(max_chunksize=8)
            else:  # without a buffer it reads groups of rows whole
                table = files.enter_context(pq.ParquetFile(file, buffer_size=2**20))
                few = {"batch_size": 8, "use_threads": False}
                yield table.schema_arrow, lambda keys: table.iter_batches(columns=keys, **few)
    except (ValueError, OSError) as error:  # pyarrow's own are kinds of these
        kind = "an Arrow stream" if file.suffix == ".arrow" else "parquet"
        why = f"{first_line(error)}{lfs_note(file)}"
        raise UserError(f"{file} can't be read as {kind}: {why}") from None
    except MemoryError:
        raise UserError(
            f"{file} has rows or pages that become more than {size_text(most)}: that is no "
            "collection of photos, or it needs to be written in smaller pages"
        ) from None


def parquet_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file, without the photos in it."""
    with opened_parquet(file, MOST_TEXTS) as (schema, read):
        columns = [field.name for field in schema if "binary" not in str(field.type)]
        return [row for part in read(columns) for row in part.to_pylist()]
