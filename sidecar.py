"""What is written about photos, as files: a text beside each, JSON lines, or a table.

Written after each batch, in whole lines, so that a run that is killed loses at most a batch, and
the next one goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, lock, write_error, write_file


@dataclass(frozen=True)
class Photo:
    """A photo's file, and its name relative to the folder that was given."""

    file: Path
    name: str


class TextFiles:
    """`photo.txt` beside `photo.jpg`, or in the same place under `folder`; a text a line."""

    def __init__(self, folder: Path | None, existing: str, photos: Iterable[Photo]):
        """Where `photo.txt` would be several photos', have it the first one's, and `photo.png.txt`
        another's; refuse where that is not enough, or a photo's place."""
        self.folder, self.existing = folder, existing
        self.own: dict[Path, Path] = {}  # the photo that each text is about
        photos = {os.path.abspath(photo.file): photo for photo in photos}
        for photo in photos.values():
            self.own.setdefault(self._usual(photo), photo.file)
        counts = Counter(os.path.abspath(self.target(photo)) for photo in photos.values())
        twice = [target for target, count in counts.items() if count > 1 or target in photos]
        if twice:
            raise UserError(
                f"{twice[0]} would be another photo's as well, or is one: give another --output, "
                "or name folders one by one"
            )

    def _usual(self, photo: Photo) -> Path:
        # An absolute name, or one with "..", would lead out of the folder.
        parts = [part for part in Path(photo.name).parts if part not in ("/", "..")]
        place = self.folder.joinpath(*parts) if self.folder else photo.file
        return place.with_suffix(".txt")

    def target(self, photo: Photo) -> Path:
        usual = self._usual(photo)
        if self.own.get(usual, photo.file) == photo.file:
            return usual
        return usual.with_name(f"{photo.file.name}.txt")

    def wanted(self, photo: Photo, question: str) -> bool:
        """Whether something is to be written about the photo."""
        if not os.path.exists(self.target(photo)):
            return True
        if self.existing == "error":
            raise UserError(f"{self.target(photo)} is there: use --existing skip or overwrite")
        return self.existing != "skip"

    def write(self, rows: Sequence[tuple[Photo, str, str]]) -> None:
        """Write a batch of (photo, question, text)."""
        texts: dict[Path, list[str]] = {}
        for photo, _, text in rows:
            texts.setdefault(self.target(photo), []).append(text)
        for target, lines in texts.items():
            added = self.existing == "append" and target.exists()
            there = target.read_bytes().rstrip(b"\r\n") if added else b""
            new = "\n".join([*lines, ""]).encode(errors="backslashreplace")
            write_file(target, there + b"\n" + new if there else new)

    def close(self) -> None:
        """Nothing is open."""


class Table:
    """As `TextFiles`, one file of rows: `metadata.jsonl`, or a CSV with a header."""

    def __init__(self, path: Path, existing: str, asked: bool):
        """Open it, less a last line that a killed run left half-written.

        Where questions are answered (`asked`), they have a column.
        """
        self.path, self.existing = path, existing
        self.columns = ["file_name", "question", "answer"] if asked else ["file_name", "text"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
            if not lock(self.file):
                raise UserError(f"another run is writing to {path}: give another --output")
        except OSError as error:
            raise write_error(error, path) from error
        there = path.read_bytes()
        if there and existing == "error":
            raise UserError(f"{path} is there: use --existing skip, append or overwrite")
        there = b"" if existing == "overwrite" else there
        table = path.suffix == ".csv"
        # What is there stays until more is written; an editor leaves a last line without its end.
        self.begin = "\n" if there.endswith(b"}") and not table else ""
        self.keep: int | None = len(there) if self.begin else there.rfind(b"\n") + 1
        if last := there[self.keep :].decode(errors="replace"):
            print(f"{path}: its last line has no end, and is dropped: {last}", file=sys.stderr)
        if table and not self.keep:
            self.begin = ",".join(self.columns) + "\n"
        rows = self._read(there[: self.keep])
        self.done = rows if existing == "skip" else set()

    def _read(self, content: bytes) -> set[tuple[str, ...]]:
        """What is in the file already, as (name,) or (name, question)."""
        try:
            text = content.decode("utf-8-sig")  # with Excel's mark or without
            if self.path.suffix == ".csv":
                rows = csv.DictReader(io.StringIO(text), strict=True)
                if text and rows.fieldnames != self.columns:
                    raise ValueError
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            return {tuple(row[column] for column in self.columns)[:-1] for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
            raise UserError(
                f"{self.path} holds other rows than this run would write: give another --output, "
                "or --existing overwrite"
            ) from None

    def wanted(self, photo: Photo, question: str) -> bool:
        return (photo.name, question)[: len(self.columns) - 1] not in self.done

    def write(self, rows: Sequence[tuple[Photo, str, str]]) -> None:
        asked = len(self.columns) == 3
        self._append(
            [[p.name, question, text] if asked else [p.name, text] for p, question, text in rows]
        )

    def _append(self, rows: Sequence[Sequence[str]]) -> None:
        content = io.StringIO()
        if self.path.suffix == ".csv":
            csv.writer(content, lineterminator="\n").writerows(rows)
        else:
            for row in rows:
                record = dict(zip(self.columns, row, strict=True))
                content.write(json.dumps(record, ensure_ascii=False) + "\n")
        try:
            if self.keep is not None:
                self.file.truncate(self.keep)
            self.file.write(self.begin + content.getvalue())
            self.keep, self.begin = None, ""
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise write_error(error, self.path) from error

    def close(self) -> None:
        self.file.close()


def open_output(
    kind: str,
    output: str | None,
    existing: str,
    folder: Path | None,
    asked: bool,
    photos: Iterable[Photo],
) -> TextFiles | Table:
    """What `--write kind --output PATH --existing ...` names, for texts about `photos`.

    A table stands in the `folder` that was given to be captioned, unless told otherwise.
    """
    place = Path(output).expanduser() if output else None
    if kind == "txt":
        if asked:
            raise UserError("--write txt is for captions: write answers with --write jsonl or csv")
        return TextFiles(place, existing, photos)
    usual = "metadata.jsonl" if kind == "jsonl" else "captions.csv"
    path = (folder or Path.cwd()) / usual if place is None else place
    if path.is_dir():
        path = path / usual
    if path.suffix != f".{kind}":
        raise UserError(f"--output {path}: with --write {kind} its name must end in .{kind}")
    return Table(path, existing, asked)
