"""What is written about photos, as files: a text beside each, JSON lines, or a table.

Written after each batch, in whole lines, so that a run that is killed loses at most a batch, and
the next one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from photo_names import is_photo
from utils import (
    UserError,
    changed_at,
    check_output,
    files_in,
    lock,
    read_text,
    refused,
    shown,
    write_error,
    write_file,
)


@dataclass(frozen=True)
class Photo:
    """A photo's file, and its name relative to the folder that was given."""

    file: Path
    name: str

    @property
    def time(self) -> float:
        return changed_at(self.file) if os.path.exists(self.file) else 0.0


class TextFiles:
    """`photo.txt` beside `photo.jpg`, or in the same place under `folder`; a text a line."""

    def __init__(
        self, folder: Path | None, existing: str, photos: Sequence[Photo], inputs: Iterable[Path]
    ):
        """Where `photo.txt` would be several photos', given or beside these, have `photo.jpg.txt`
        and `photo.png.txt`: one that came later doesn't take another's text for its own. Refuse
        where that is not enough, or one of the `inputs`."""
        self.existing = existing
        self.targets: dict[Photo, Path] = {}
        beside = {
            place: Counter(Path(name).stem for name in files_in(place, False) if is_photo(name))
            for place in {photo.file.parent for photo in photos}
        }
        taken = {Path(os.path.abspath(file)) for file in inputs}
        shared = set()
        for photo in photos:  # an absolute name, or one with "..", would lead out of the folder
            parts = [part for part in Path(photo.name).parts if part not in ("/", "..")]
            place = folder.joinpath(*parts) if folder else photo.file
            target = Path(os.path.abspath(place.with_suffix(".txt")))
            if beside[photo.file.parent][photo.file.stem] > 1:
                shared.add(target)
                target = target.with_name(f"{photo.file.name}.txt")
            if target in taken:
                raise UserError(
                    f"{target} would be another photo's as well, or is what is read: give another "
                    "--output, or name folders one by one"
                )
            taken.add(target)
            self.targets[photo] = target
        if unclear := sorted(filter(os.path.isfile, shared - taken)):
            said = f"{len(unclear)} texts may be of any of several photos, such as {unclear[0]}"
            print(shown(f"{said}: each gets photo.jpg.txt, which counts first"), file=sys.stderr)

    def wanted(self, photo: Photo, question: str) -> bool:
        """Whether something is to be written about the photo."""
        target = self.targets[photo]
        if self.existing == "error" and os.path.exists(target):
            raise UserError(f"{target} is there: use --existing skip or overwrite")
        if self.existing == "append":
            _text(target)  # one that can't be read is said before the work begins
        # An empty one is none of ours: programs and people leave such where no text is yet.
        there = self.existing == "skip" and os.path.isfile(target) and target.read_bytes().strip()
        if not there:
            check_output("--output", target)
        return not there

    def time(self, photo: Photo) -> float:
        """When what is there about the photo was written."""
        return os.path.getmtime(self.targets[photo])

    def write(self, rows: Sequence[tuple[Photo, str, str]]) -> None:
        """Write a batch of (photo, question, text)."""
        for photo, group in itertools.groupby(rows, lambda row: row[0]):
            if not self.wanted(photo, ""):
                continue  # somebody has written about it meanwhile
            target = self.targets[photo]
            lines = [text.encode(errors="backslashreplace") for _, _, text in group]
            if self.existing == "append" and (there := _text(target)):
                lines.insert(0, there.encode())
            content = b"\n".join([*lines, b""])
            write_file(target, content, "name another folder with --output")


def _text(file: Path) -> str:
    """What is in a text that is to be longer, in whatever encoding people's editors wrote it."""
    return read_text(file, older=True).rstrip("\r\n") if file.exists() else ""


class Table:
    """As `TextFiles`, one file of rows: `metadata.jsonl`, or a CSV with a header."""

    def __init__(self, path: Path, existing: str, asked: bool, files: contextlib.ExitStack):
        """Open it until `files` closes it, less a last line that a killed run left half-written.

        Where questions are answered (`asked`), they have a column.
        """
        self.path, self.asked, self.csv = path, asked, path.suffix == ".csv"
        self.columns = ["file_name", "question", "answer"] if asked else ["file_name", "text"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Open, and so locked, for as long as the run lasts.
            how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
            self.file = files.enter_context(open(path, "a+", **how))
            if lock(self.file) is False:
                raise UserError(f"another run is writing to {path}: give another --output")
            there = path.read_bytes()
        except OSError as error:
            raise write_error(error, path) from error
        if there and existing == "error":
            raise UserError(f"{path} is there: use --existing skip, append or overwrite")
        there = b"" if existing == "overwrite" else there
        # Editors and spreadsheets leave a last line without its end, a killed run half of one: a
        # table is others' as long as its last line end is Windows', which is ours at the next.
        end = there.rfind(b"\n") + 1
        whole = there[:end].endswith(b"\r\n") if self.csv else there.endswith(b"}")
        self.keep = len(there.rstrip(b"\r\n")) if whole else end
        if last := there[self.keep :].decode(errors="replace").strip():
            print(
                f"{path}: its last line has no end, and is dropped: {shown(last)}", file=sys.stderr
            )
        header = ",".join(self.columns) if self.csv and not self.keep else ""
        self.begin: str | None = header + "\n" if header or whole else ""
        rows = self._read(there[: self.keep])
        self.done = rows if existing == "skip" else set()

    def _read(self, content: bytes) -> set[tuple[str, ...]]:
        """What is in the file already, as (name,) or (name, question)."""
        excel = " with commas (Excel: save as CSV UTF-8)" * self.csv
        with refused(
            f"{self.path} holds other rows than this run would write, or is not UTF-8{excel}: "
            "give another --output, or --existing overwrite"
        ):
            text = content.decode("utf-8-sig")  # with Excel's mark or without
            if self.csv:
                rows = csv.DictReader(io.StringIO(text), strict=True)
                if text and rows.fieldnames != self.columns:
                    raise UserError(f"its columns are {', '.join(rows.fieldnames)}")
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            return {tuple(row[column] for column in self.columns)[:-1] for row in rows}

    def wanted(self, photo: Photo, question: str) -> bool:
        return (photo.name, question)[: 1 + self.asked] not in self.done

    def time(self, photo: Photo) -> float:
        return os.path.getmtime(self.path)  # before this run writes; of one row nobody knows it

    def write(self, rows: Sequence[tuple[Photo, str, str]]) -> None:
        try:
            if self.begin is not None:  # what was there stays until more is written
                self.file.truncate(self.keep)
                self.file.write(self.begin)
                self.begin = None
            for photo, question, text in rows:
                row = [photo.name, question, text] if self.asked else [photo.name, text]
                if self.csv:
                    # Python 3.10 can't write a zero, nor read it; before 3.13 "\r" gets no quotes.
                    cells = [cell.replace("\0", "\ufffd") for cell in row]
                    quotes = csv.QUOTE_ALL if "\r" in "".join(cells) else csv.QUOTE_MINIMAL
                    csv.writer(self.file, quoting=quotes, lineterminator="\n").writerow(cells)
                else:
                    record = dict(zip(self.columns, row, strict=True))
                    self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            self.file.buffer.raw.close()  # or what has no room is written again when it is closed
            raise write_error(error, self.path) from error


def open_output(
    args: argparse.Namespace, photos: Sequence[Photo], asked: bool, files: contextlib.ExitStack
) -> TextFiles | Table:
    """What `--write`, `--output` and `--existing` name, for texts about `photos`.

    A table stands in the folder that was given to be captioned, unless told otherwise, and is open
    until `files` closes it. Nothing that is read is written over.
    """
    read = [*dict.fromkeys(photo.file for photo in photos)]
    read += [Path(name) for name in (args.checkpoint, args.questions_file) if name]
    place = Path(args.output).expanduser() if args.output else None
    if args.write == "txt":
        if asked:
            raise UserError("--write txt is for captions: write answers with --write jsonl or csv")
        return TextFiles(place, args.existing, photos, read)
    folder = Path(args.paths[0]).expanduser() if len(args.paths) == 1 else Path.cwd()
    path = place or (folder if folder.is_dir() else folder.parent)
    if path.is_dir():
        path /= "metadata.jsonl" if args.write == "jsonl" else "captions.csv"
    if path.suffix != f".{args.write}":
        raise UserError(
            f"--output {path}: with --write {args.write} its name must end in .{args.write}"
        )
    check_output("--output", path, *read)
    return Table(path, args.existing, asked, files)
