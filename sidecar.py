"""What is written about photos, as files: a text beside each, JSON lines, or a table.

Written after each batch, in whole lines, so that a run that is killed loses at most a batch, and
the next one goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, lock, write_error, write_file


@dataclass(frozen=True)
class Photo:
    """A photo's file, and its name relative to the folder that was given."""

    file: Path
    name: str


class TextFiles:
    """`photo.txt` beside `photo.jpg`, or in the same place under `folder`."""

    def __init__(self, folder: Path | None, existing: str):
        self.folder, self.existing = folder, existing

    def target(self, photo: Photo) -> Path:
        place = self.folder / photo.name if self.folder else photo.file
        return place.with_suffix(".txt")

    def wanted(self, photo: Photo, question: str) -> bool:
        """Whether something is to be written about the photo."""
        if not self.target(photo).exists():
            return True
        if self.existing == "error":
            raise UserError(f"{self.target(photo)} is there: use --existing skip or overwrite")
        return self.existing != "skip"

    def write(self, rows: Sequence[tuple[Photo, str, str]]) -> None:
        """Write a batch of (photo, question, text)."""
        for photo, _, text in rows:
            target = self.target(photo)
            if self.existing == "append" and target.exists():
                text = target.read_text(encoding="utf-8").rstrip("\n") + "\n" + text
            write_file(target, text + "\n")

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
            self.file = open(path, "a+", encoding="utf-8", newline="")  # noqa: SIM115 - see close
            if not lock(self.file):
                raise UserError(f"another run is writing to {path}: give another --output")
        except OSError as error:
            raise write_error(error, path) from error
        there = path.read_bytes()
        whole = there[: there.rfind(b"\n") + 1]
        if whole and existing == "error":
            raise UserError(f"{path} is there: use --existing skip, append or overwrite")
        if existing == "overwrite":
            whole = b""
        self.file.truncate(len(whole))
        self.done = self._read(whole) if existing == "skip" else set()
        if not whole and path.suffix == ".csv":
            self._append([self.columns])

    def _read(self, content: bytes) -> set[tuple[str, str]]:
        """What is in the file already, as (name, question)."""
        try:
            text = content.decode("utf-8")
            if self.path.suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(text)))
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return {(row["file_name"], row.get("question", "")) for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
            raise UserError(
                f"{self.path} is not a file that this script wrote: give another --output, or "
                "--existing overwrite"
            ) from None

    def wanted(self, photo: Photo, question: str) -> bool:
        return (photo.name, question) not in self.done

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
            self.file.write(content.getvalue())
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise write_error(error, self.path) from error

    def close(self) -> None:
        self.file.close()


def open_output(
    kind: str, output: str | None, existing: str, folder: Path | None, asked: bool
) -> TextFiles | Table:
    """What `--write kind --output PATH --existing ...` names.

    A table stands in the `folder` that was given to be captioned, unless told otherwise.
    """
    place = Path(output).expanduser() if output else None
    if kind == "txt":
        if asked:
            raise UserError("--write txt is for captions: write answers with --write jsonl or csv")
        return TextFiles(place, existing)
    usual = "metadata.jsonl" if kind == "jsonl" else "captions.csv"
    path = (folder or Path.cwd()) / usual if place is None else place
    if path.is_dir():
        path = path / usual
    if path.suffix != f".{kind}":
        raise UserError(f"--output {path}: with --write {kind} its name must end in .{kind}")
    return Table(path, existing, asked)
