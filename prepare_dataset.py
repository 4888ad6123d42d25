"""Get a data set ready for training: photos, captions.json and splits.json.

Flickr30k and Flickr8k are downloaded, checked, unpacked and converted; a data set of your own is
checked where it stands. Interrupted at any point, the next run goes on from there; a data set
that is complete is recognised at once and left alone.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import requests
from tqdm import tqdm

import config
from dataset import (
    SPLITS,
    TEXT_KEYS,
    DataPaths,
    Text,
    check_name,
    data_paths,
    find_images,
    load_captions,
    load_questions,
    load_splits,
    parse_tasks,
    split_by_karpathy,
    split_by_ratio,
)
from encoder import ImageError, open_image
from features import check_bad, file_digest, prefetch
from shards import expand_shards, read_shard, say_samples
from tokenizer import CaptionTokenizer, normalize
from utils import (
    Bar,
    UserError,
    atomic_write,
    load_settings,
    read_json,
    redact,
    require_room,
    run_script,
    size_text,
    write_error,
)

# The parts of each data set's zip, in order. No checksums are published for them: a part's size
# is checked against the server's word, and each photo against the checksum (CRC) in the zip.
RELEASE = "https://github.com/awsaf49/flickr-dataset/releases/download/v1.0/"
SOURCES = {
    "flickr30k": tuple(f"{RELEASE}flickr30k_part{part:02d}" for part in range(3)),
    "flickr8k": (f"{RELEASE}flickr8k.zip",),
}
KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
# Looked for in this order.
CAPTION_TABLES = ("captions.txt", "results.csv", "captions.csv", "captions.jsonl", "metadata.jsonl")
NAME_KEYS = ("image", "image_name", "file_name", "filename", "image_id")  # of a photo in a table
MAX_ENTRY_BYTES = 256 * 2**20  # no photo is larger; what is larger in a zip is a bomb
MAX_UNPACKED_RATIO = 50  # photos hardly compress: a zip that grows more than this is a bomb
ATTEMPTS = 5  # requests in a row that bring nothing new before the download is given up
RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled each time
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of a body
CHUNK = 64 * 2**10  # bytes; at most this much is lost when a connection breaks

EXAMPLES = """examples:
  python prepare_dataset.py --dataset flickr8k --archive flickr8k.zip
  python prepare_dataset.py --dataset custom --data_dir my_photos --split ratio --check
"""

SETTINGS = (
    "DATASET DATA_DIR IMAGE_DIR CAPTIONS_FILE QUESTIONS_FILE TASKS SPLIT KARPATHY_FILE "
    "TRAIN_SPLIT_RATIO MAX_BAD_IMAGES VOCAB_SIZE MAX_CAPTION_LENGTH VAL_SHARDS"
).split()


class DamagedArchive(UserError):
    """A zip that is cut off, altered, or put together from the wrong parts."""


# --- Download -------------------------------------------------------------------------------


def download(urls: Sequence[str], folder: Path, unpack_to: Path, unpacked: int = 0) -> list[Path]:
    """Download files into `folder`, going on where an earlier run stopped; return their paths.

    Says beforehand how much there is to download. The disks must have room for it, and for as
    much again in `unpack_to`, less the `unpacked` bytes that are there already.

    Raises:
        UserError: no room, no connection, or an answer that is not the file.
    """
    targets = [folder / url.rsplit("/", 1)[1] for url in urls]
    here = [_size_here(target) for target in targets]
    sizes = [
        target.stat().st_size if target.exists() else _size_there(url)
        for url, target in zip(urls, targets, strict=True)
    ]
    total = sum(size or 0 for size in sizes)
    left = max(0, total - sum(here))
    amount = f"{size_text(left)} of {size_text(total)}"
    if None in sizes:
        amount = "an amount that the server does not tell"
    print(f"{', '.join(target.name for target in targets)}: {amount} to download")
    print(f"  to {folder}, then to unpack to {unpack_to}", flush=True)
    require_room([(folder, left), (unpack_to, max(0, total - unpacked))])
    for url, target in zip(urls, targets, strict=True):
        _download_one(url, target)
    return targets


def _size_here(target: Path) -> int:
    files = (target, target.with_name(f"{target.name}.partial"))
    return next((file.stat().st_size for file in files if file.exists()), 0)


def _size_there(url: str) -> int | None:
    try:
        head = requests.head(
            url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=TIMEOUT
        )
    except requests.RequestException:
        return None  # the request for the file itself will say what is wrong
    length = head.headers.get("Content-Length", "")
    return int(length) if head.ok and length.isdigit() else None


def _download_one(url: str, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    furthest, failures = _size_here(target), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not target.exists():
            try:
                if (reason := _fetch(url, partial)) == "":
                    _finish(partial, target)
                    return
            except requests.RequestException as error:
                # Only the kind of error: its text may hold a signed address.
                reason = type(error).__name__
            reached = partial.stat().st_size if partial.exists() else 0
            failures = 0 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures == ATTEMPTS:
                raise UserError(
                    f"{url} can't be downloaded ({reason}): run the same command again, it goes "
                    f"on after the {size_text(reached)} that are in {target.parent}"
                )
            time.sleep(RETRY_PAUSE * 2 ** max(0, failures - 1))
    except OSError as error:
        raise write_error(error, partial) from error


def _fetch(url: str, partial: Path) -> str:
    """Ask once for what `partial` lacks; return "" once it is whole, or else what was wrong.

    Beside it `.json` holds what the server said of the file: a validator, by which a changed
    file is noticed, and the size.
    """
    state = _read_state(partial)
    have = partial.stat().st_size if state and partial.exists() else 0
    if have and have == state["total"]:
        return ""
    headers = {"Accept-Encoding": "identity"}
    if have and (state["validator"] or state["total"]):
        headers["Range"] = f"bytes={have}-"
        if state["validator"]:
            headers["If-Range"] = state["validator"]
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (206, 416):
            total = _continues(response, have, state)
            if total is None:
                _forget(partial)
                return "the file has changed in between"
            if response.status_code == 416:
                return ""
            state["total"] = total
        elif response.status_code == 429 or response.status_code >= 500:
            return f"status {response.status_code}"
        elif response.status_code != 200:
            raise UserError(f"{url} answers with status {response.status_code}")
        return _receive(response, url, partial, state)


def _receive(response: requests.Response, url: str, partial: Path, state: dict[str, Any]) -> str:
    chunks = response.iter_content(CHUNK)
    first = next(chunks, b"")
    page = first[:512].lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if page or response.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(
            f"{url} answers with a web page in place of the file (a log-in page, or a proxy's?): "
            "open it in a browser"
        )
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        state = {
            "validator": _validator(response),
            "total": int(length) if length.isdigit() else None,
        }
        # Emptied first: the new validator must never stand beside the old file's bytes.
        partial.write_bytes(b"")
        with atomic_write(_state_path(partial)) as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")
    total = state["total"]
    bar = tqdm(
        desc=partial.stem,
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file wants few lines
    )
    with open(partial, "ab") as file, bar:
        bar.update(file.tell())
        for chunk in itertools.chain([first], chunks):
            file.write(chunk)
            bar.update(len(chunk))
    size = partial.stat().st_size
    if total is not None and size > total:
        _forget(partial)
        return f"{size} bytes came in place of {total}"
    # Without a size, the end of the body is all there is to go by; the zip's own checks follow.
    return "" if total in (None, size) else f"cut off after {size} of {total} bytes"


def _continues(response: requests.Response, have: int, state: dict[str, Any]) -> int | None:
    """The whole size, if this 206 or 416 says that the bytes here are the start of that file."""
    said = response.headers.get("Content-Range", "")
    place = re.fullmatch(r"bytes (\*|\d+)(?:-\d+)?/(\d+)", said)
    if not have or not place:
        return None
    begin, total = place[1], int(place[2])
    goes_on = begin == str(have) if response.status_code == 206 else have == total
    validator = _validator(response)
    same_file = validator is None or state["validator"] in (None, validator)
    return total if goes_on and same_file and state["total"] in (None, total) else None


def _validator(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag", "")
    # A weak ETag may stay while bytes change, and must not be sent in If-Range.
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _state_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_state(partial: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_path(partial).read_text(encoding="utf-8"))
        return {"validator": state["validator"], "total": state["total"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _state_path(partial).unlink(missing_ok=True)


def _finish(partial: Path, target: Path) -> None:
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    _forget(partial)


# --- Zip files ------------------------------------------------------------------------------


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
def open_zip(parts: Sequence[Path]) -> Iterator[zipfile.ZipFile]:
    """Open a zip that stands in one or several files.

    Raises:
        DamagedArchive: it is no zip, or an entry that is read within the block is damaged.
    """
    name = " + ".join(str(part) for part in parts)
    try:
        with io.BufferedReader(JoinedFiles(parts)) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError) as error:
        order = "" if len(parts) == 1 else ", or its parts are out of order"
        raise DamagedArchive(f"{name} is not a whole zip file{order} ({error})") from None
    except (NotImplementedError, OverflowError) as error:
        raise DamagedArchive(f"{name} can't be read as a zip file ({error})") from None


def select_entries(archive: zipfile.ZipFile, packed: int) -> dict[str, zipfile.ZipInfo]:
    """The photos and captions tables of a zip of `packed` bytes, by base name.

    Raises:
        UserError: an entry would leave the folder, is a link, encrypted, or stands there twice;
            or the zip is a compression bomb. Nothing has been written then.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        entry = f"the archive's entry {info.filename!r}"
        if path.is_absolute() or ".." in path.parts or ":" in info.filename:
            raise UserError(f"{entry} leads out of the folder")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{entry} is a link, not a file")
        table = path.name.lower() in CAPTION_TABLES
        if info.is_dir() or not (table or path.suffix.lower() in IMAGE_SUFFIXES):
            continue
        if path.name.startswith(".") or "__MACOSX" in path.parts:
            continue
        # A file system that ignores case would write "A.jpg" over "a.jpg".
        key = path.name.lower()
        if key in entries:
            raise UserError(f"{entry} stands there twice, perhaps in two folders")
        plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if info.flag_bits & 1 or not plain or len(path.name.encode()) > 255:
            raise UserError(f"{entry} is encrypted, oddly compressed, or has too long a name")
        entries[key] = info
    unpacked = sum(info.file_size for info in entries.values())
    largest = max((info.file_size for info in entries.values()), default=0)
    if largest > MAX_ENTRY_BYTES or unpacked > MAX_UNPACKED_RATIO * packed:
        raise UserError(
            f"the archive of {size_text(packed)} would unpack to {size_text(unpacked)}, its "
            f"largest file to {size_text(largest)}: that is no collection of photos"
        )
    return {PurePosixPath(i.filename.replace("\\", "/")).name: i for i in entries.values()}


def read_marker(paths: DataPaths) -> dict[str, Any] | None:
    """prepared.json: the data set's name and its photos' sizes, {} while it is unfinished."""
    path = paths.data_dir / "prepared.json"
    if not path.exists():
        return None
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        return {"dataset": marker["dataset"], "photos": dict(marker["photos"] or {})}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete it and run again") from None


def write_marker(paths: DataPaths, dataset: str, photos: dict[str, int]) -> None:
    """Note that these photos are all there, or, with {}, that unpacking has begun."""
    with atomic_write(paths.data_dir / "prepared.json") as temporary:
        temporary.write_text(json.dumps({"dataset": dataset, "photos": photos}), encoding="utf-8")


def extract(parts: Sequence[Path], paths: DataPaths, dataset: str) -> None:
    """Unpack the photos that are missing or of another size, and the captions table if none is.

    prepared.json says before the first photo is written that the data set is unfinished, and
    after the last one which photos it has.

    Raises:
        UserError: the archive is damaged or unsafe, or lacks photos or captions; or no room.
    """
    with open_zip(parts) as archive:
        entries = select_entries(archive, sum(part.stat().st_size for part in parts))
        tables = {n.lower(): entries.pop(n) for n in list(entries) if n.lower() in CAPTION_TABLES}
        if not entries:
            raise UserError(f"{parts[0]} holds no photos ({', '.join(IMAGE_SUFFIXES)})")
        if not (tables or paths.captions.exists() or find_table(paths.data_dir)):
            raise UserError(
                f"{parts[0]} holds no captions ({' or '.join(CAPTION_TABLES)}): write them to "
                f"{paths.captions} first"
            )
        present = photo_sizes(paths.images)
        missing = {n: info for n, info in entries.items() if present.get(n) != info.file_size}
        require_room([(paths.images, sum(info.file_size for info in missing.values()))])
        write_marker(paths, dataset, {})
        _extract_photos(archive, missing, paths.images)
        if tables and not find_table(paths.data_dir):
            name = next(name for name in CAPTION_TABLES if name in tables)
            with atomic_write(paths.data_dir / name) as temporary:
                temporary.write_bytes(archive.read(tables[name]))
    write_marker(paths, dataset, {name: info.file_size for name, info in entries.items()})


def _extract_photos(
    archive: zipfile.ZipFile, photos: Mapping[str, zipfile.ZipInfo], folder: Path
) -> None:
    # One temporary name for all: a run that was killed leaves one file, and the next reuses it.
    temporary = folder / ".unpacking.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, info in tqdm(photos.items(), desc="unpacking", unit=" photos", disable=None):
            # zipfile reads no more than the declared size, and raises if there is less or the
            # checksum is another.
            with archive.open(info) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(temporary, folder / name)
    except OSError as error:
        raise write_error(error, folder) from error
    finally:
        temporary.unlink(missing_ok=True)


def photo_sizes(folder: Path) -> dict[str, int]:
    """What is in a folder, which need not exist, and the sizes in bytes; no hidden files."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as files:
        there = (f for f in files if f.name[0] != "." and (f.is_file() or f.is_dir()))
        return {f.name: f.stat().st_size for f in there}


# --- Captions tables ------------------------------------------------------------------------

# Flickr30k's results.csv has one row without its last delimiter:
# `2199200615.jpg| 4   A dog runs across the grass .`
MISSING_DELIMITER = re.compile(r"\d+\s+(\S.*)")
# Tables made from it with pandas have an empty caption there instead.
EMPTY_IN_THE_WILD = {"2199200615.jpg": "A dog runs across the grass ."}


def find_table(folder: Path) -> Path | None:
    """The captions table in a folder, if there is one."""
    return next((folder / name for name in CAPTION_TABLES if (folder / name).is_file()), None)


def read_table(path: Path) -> dict[str, list[str]]:
    """Read a captions table: one row per line, `name, caption` or `name, number, caption`.

    The delimiter is a comma, `|` or a tab, the one that comes first in the first row. A header
    may be there; fields may be quoted; a delimiter within an unquoted caption belongs to it; a
    `#0` after a name is left out. One malformed row is known and mended: Flickr30k's.
    A `.jsonl` has an object a line: `{"image": "photo.jpg", "caption": "A caption"}`.

    Raises:
        UserError: the file is not UTF-8, or a row can't be read; the message names the line.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    rows = [(number, line.strip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty: it needs rows like photo.jpg,A caption")
    if path.suffix == ".jsonl":
        return _read_json_lines(path, rows)
    delimiter = next((mark for mark in rows[0][1] if mark in ",|\t"), ",")
    first, rest = _field(rows[0][1], delimiter)
    second, third = _field(rest, delimiter)
    if header := first.lower() in NAME_KEYS:
        numbered = second.lower() == "comment_number"
    else:
        numbered = second.isdigit() and third != ""
    captions: dict[str, list[str]] = {}
    for number, line in rows[header:]:
        where = Path(f"{path}, line {number}")
        name, caption = _read_row(where, line, delimiter, numbered)
        captions.setdefault(name, []).append(caption)
    if not captions:
        raise UserError(f"{path} has a header but no rows like photo.jpg,A caption")
    return captions


def _read_json_lines(path: Path, rows: Iterable[tuple[int, str]]) -> dict[str, list[str]]:
    form = 'write {"image": "photo.jpg", "caption": "A caption"}'
    captions: dict[str, list[str]] = {}
    for number, line in rows:
        where = Path(f"{path}, line {number}")
        try:
            row = json.loads(line)
            name = next(row[key] for key in NAME_KEYS if key in row)
            texts = next(row[key] for key in TEXT_KEYS if key in row)
        except (ValueError, TypeError, StopIteration):
            raise UserError(f"{where} names no photo and caption: {form}") from None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not name.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(f"{where}: {name!r} is not the name of a photo: {form}")
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(f"{where}: {name!r} has a caption that is no text: {form}")
        check_name(where, name)
        captions.setdefault(name, []).extend(text.strip() for text in texts)
    return captions


def _field(text: str, delimiter: str) -> tuple[str, str]:
    """The first field of a row, and what comes after its delimiter."""
    quoted = re.match(rf'\s*"((?:[^"]|"")*)"[ \r]*(?:{re.escape(delimiter)}|$)', text)
    if quoted:
        return quoted[1].replace('""', '"').strip(), text[quoted.end() :]
    field, _, rest = text.partition(delimiter)
    return field.strip(), rest


def _read_row(where: Path, line: str, delimiter: str, numbered: bool) -> tuple[str, str]:
    name, caption = _field(line, delimiter)
    name = re.sub(r"#\d+$", "", name)
    if not name.lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"{where}: {name!r} is not the name of a photo: write photo.jpg,A caption")
    check_name(where, name)
    if numbered:
        number, rest = _field(caption, delimiter)
        mended = MISSING_DELIMITER.fullmatch(number)
        if not number.isdigit() and not (mended and not rest and name in EMPTY_IN_THE_WILD):
            raise UserError(f"{where}: {number!r} is not the number of a caption")
        caption = rest if number.isdigit() else mended[1]
    caption = caption.strip()
    if quoted := re.fullmatch(r'"((?:[^"]|"")*)"', caption):
        caption = quoted[1].replace('""', '"').strip()
    elif caption.startswith('"') and caption.count('"') % 2:
        raise UserError(f"{where}: a quoted caption isn't closed on its line: join the lines")
    caption = caption or EMPTY_IN_THE_WILD.get(name, "")
    if not caption:
        raise UserError(f"{where}: {name!r} has no caption: write one, or take the row out")
    return name, caption


def ensure_captions(paths: DataPaths) -> dict[str, list[str]]:
    """Return the captions; captions.json is made from the table in DATA_DIR only if missing.

    Raises:
        UserError: there are no captions, or they can't be read.
    """
    table = find_table(paths.data_dir)
    if paths.captions.exists():
        if table and table.stat().st_mtime > paths.captions.stat().st_mtime:
            print(
                f"{table} is newer than {paths.captions}, which is used: delete the latter to "
                "have it made anew"
            )
    else:
        if table is None:
            raise UserError(
                f'{paths.captions} is missing: write {{"photo.jpg": ["caption", ...]}} there, or '
                f"put one of {', '.join(CAPTION_TABLES)} into {paths.data_dir}"
            )
        captions = read_table(table)
        with atomic_write(paths.captions) as temporary:
            text = json.dumps(captions, ensure_ascii=False, indent=1)
            temporary.write_text(text, encoding="utf-8")
    return load_captions(paths.captions)


# --- Photos ---------------------------------------------------------------------------------


def wanted_photos(tasks: Sequence[str], paths: DataPaths) -> list[str]:
    """The names of the photos that the tasks have captions or questions about."""
    names: dict[str, None] = {}
    if "captions" in tasks:
        names |= dict.fromkeys(ensure_captions(paths))
    if "questions" in tasks:
        names |= dict.fromkeys(load_questions(paths.questions))
    return list(names)


def convert_vqa(questions: Sequence[str], annotations: Sequence[str], target: Path) -> None:
    """Write questions.json from VQAv2's pairs of files, with all ten answers of each question.

    Raises:
        UserError: files don't pair, or they are not of VQA's form.
    """
    if len(questions) != len(annotations):
        raise UserError(
            "give as many --vqa_questions as --vqa_annotations, in the same order: they are pairs"
        )
    table: dict[str, list[dict[str, Any]]] = {}
    for pair in zip(questions, annotations, strict=True):
        asked, answered = (read_json(Path(path).expanduser()) for path in pair)
        try:
            _add_vqa(asked, answered, table)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{' and '.join(pair)} are no VQA pair ({error!r} is off)") from None
    with atomic_write(target) as path:
        path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    print(f"wrote {sum(map(len, table.values())):,} questions to {target}")


def _add_vqa(asked: Any, answered: Any, table: dict[str, list[dict[str, Any]]]) -> None:
    stem = f"COCO_{asked['data_subtype']}_"  # COCO's name: COCO_val2014_000000000042.jpg
    texts = {entry["question_id"]: entry["question"] for entry in asked["questions"]}
    for entry in answered["annotations"]:
        name = f"{stem}{int(entry['image_id']):012d}.jpg"
        table.setdefault(name, []).append(
            {
                "question": texts[entry["question_id"]],
                "answer": entry["multiple_choice_answer"],
                "answers": [answer["answer"] for answer in entry["answers"]],
                "type": entry["question_type"],
            }
        )


def ensure_photos(
    paths: DataPaths, dataset: str, urls: Sequence[str], archive: Sequence[str]
) -> None:
    """Unpack what IMAGE_DIR lacks, from the archive or else a download; a marker says when whole.

    Photos that were there before the first run are the user's own and are left alone.

    Raises:
        UserError: another data set is there, or the download or the archive fails.
    """
    marker = read_marker(paths)
    present = photo_sizes(paths.images)
    if marker is None and present:
        print(f"{paths.images} holds photos already: they are used as they are (empty the folder")
        print(f"to have those of {dataset} there)")
        return
    if marker and marker["dataset"] != dataset:
        raise UserError(
            f"{paths.data_dir} holds {marker['dataset']}, not {dataset}: choose another folder "
            f"with --data_dir, or --dataset {marker['dataset']}"
        )
    if marker and marker["photos"]:
        bad = [name for name, size in marker["photos"].items() if present.get(name) != size]
        if not bad:
            return
        print(f"{len(bad)} photos are missing or changed in {paths.images}, first {bad[0]}: they")
        print("are restored (with --dataset custom the folder is used as it is)", flush=True)
    parts = [Path(part).expanduser() for part in archive]
    for part in parts:
        if not part.is_file():
            raise UserError(f"--archive {part}: there is no such file")
    if not parts:
        folder = paths.data_dir / "temp_download"
        try:
            parts = download(urls, folder, paths.images, sum(present.values()))
        except UserError as error:
            raise UserError(f"{error}; or get it another way and use --archive PATH") from None
    try:
        extract(parts, paths, dataset)
    except DamagedArchive as error:
        if archive:
            raise
        for part in parts:
            part.unlink(missing_ok=True)
        raise UserError(f"{error}: removed, run the same command again to download it") from None


def unpack_shards(pattern: str, paths: DataPaths, max_bad: int) -> None:
    """Make a data set of which all photos validate, of the photos in WebDataset shards.

    Raises:
        UserError: DATA_DIR holds another data set, or a shard can't be read or used.
    """
    label = f"the shards {redact(pattern)}"
    marker = read_marker(paths)
    if marker is None and (paths.captions.exists() or photo_sizes(paths.images)):
        raise UserError(
            f"{paths.data_dir} holds a data set already: choose another folder for VAL_SHARDS' "
            "photos with --data_dir, or leave VAL_SHARDS out to validate on what is there"
        )
    if marker and marker["dataset"] != label:
        raise UserError(
            f"{paths.data_dir} holds {marker['dataset']}, not {label}: choose another folder with "
            "--data_dir"
        )
    if marker and marker["photos"] and marker["photos"] == photo_sizes(paths.images):
        return
    write_marker(paths, label, {})
    captions: dict[str, list[str]] = {}
    passed, bad = Counter(), []
    for url in expand_shards(pattern):
        unreadable: dict[str, str] = {}
        for sample in read_shard(url, passed, unreadable):
            # A key may hold a path; photos of several shards may share one.
            key = re.sub(r"[^\w.-]", "_", PurePosixPath(sample.key).name)[:40]
            name = f"{len(captions):06d}_{key}.{sample.suffix}"
            with atomic_write(paths.images / name) as temporary:
                temporary.write_bytes(sample.photo)
            captions[name] = sample.captions
        bad += unreadable.values()
    say_samples(len(captions), passed, len(bad))
    check_bad(bad, max_bad)
    if not captions:
        raise UserError(f"{label} hold no photo with a caption: nothing to validate on")
    splits = {"train": [], "val": list(captions), "test": []}
    for path, content in ((paths.captions, captions), (paths.splits, splits)):
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_marker(paths, label, photo_sizes(paths.images))


# --- Splits ---------------------------------------------------------------------------------


def ensure_karpathy_file(settings: SimpleNamespace, paths: DataPaths, url: str) -> Path:
    """The file with Karpathy's split: the one given, or the data set's own, downloaded once.

    Raises:
        UserError: there is none; the message says how to go on.
    """
    remedy = "use --split ratio, or name the file with --karpathy_file PATH"
    if settings.KARPATHY_FILE:
        path = Path(settings.KARPATHY_FILE).expanduser()
        if not path.is_file():
            raise UserError(f"KARPATHY_FILE {path} is not there: {remedy}")
        return path
    if settings.DATASET == "custom":
        raise UserError(f"SPLIT is 'karpathy', but a custom data set has no such split: {remedy}")
    name = f"dataset_{settings.DATASET}.json"
    path = paths.data_dir / name
    if path.exists():
        return path
    try:
        [archive] = download([url], paths.data_dir / "temp_download", paths.data_dir)
        _extract_karpathy(archive, name, path)
    except UserError as error:
        raise UserError(f"Karpathy's split is not to be had: {error}. To go on: {remedy}") from None
    return path


def _extract_karpathy(archive: Path, name: str, path: Path) -> None:
    try:
        with open_zip([archive]) as zipped:
            info = next((i for i in zipped.infolist() if i.filename.split("/")[-1] == name), None)
            if info is None or info.file_size > MAX_ENTRY_BYTES:
                raise UserError(f"{archive} holds no sound {name}")
            with atomic_write(path) as temporary:
                temporary.write_bytes(zipped.read(info))
    except DamagedArchive:
        archive.unlink()
        raise


def write_splits(
    settings: SimpleNamespace, paths: DataPaths, names: Iterable[str], karpathy_url: str
) -> None:
    """Split the photos as SPLIT says and write splits.json, if that changes it.

    Raises:
        UserError: the split can't be made.
    """
    if settings.SPLIT == "karpathy":
        file = ensure_karpathy_file(settings, paths, karpathy_url)
        source, splits = file.name, split_by_karpathy(names, file)
    else:
        source = f"TRAIN_SPLIT_RATIO = {settings.TRAIN_SPLIT_RATIO}"
        splits = split_by_ratio(names, settings.TRAIN_SPLIT_RATIO)
    text = json.dumps({"method": settings.SPLIT, "source": source, **splits}, ensure_ascii=False)
    if paths.splits.exists() and paths.splits.read_bytes() == text.encode():
        return
    with atomic_write(paths.splits) as temporary:
        temporary.write_bytes(text.encode())


# --- Check ----------------------------------------------------------------------------------


def check(
    settings: SimpleNamespace,
    paths: DataPaths,
    splits: Mapping[str, Sequence[str]],
    captions: Mapping[str, Sequence[str]],
    questions: Mapping[str, Sequence[Text]],
) -> list[str]:
    """Describe a prepared data set; returns what is wrong with it that training would refuse.

    Every photo is decoded, so that those that can't be read are named before training meets them.
    """
    if captions:
        describe_captions(captions, splits, settings)
    wanted = list(dict.fromkeys((*captions, *questions)))
    missing = [name for name in wanted if not (paths.images / name).is_file()]
    unsplit = len(wanted) - len(missing) - sum(map(len, splits.values()))
    print(f"missing   {len(missing)} photos, {unsplit} more are in no split")
    split_of = {name: split for split in SPLITS for name in splits[split]}
    bad: dict[str, str] = {}
    copies: dict[str, list[str]] = {}

    def look(name: str) -> tuple[str, str, str]:
        try:
            open_image(paths.images / name, least=64)
        except ImageError as error:
            return name, "", str(error)
        return name, file_digest(paths.images / name), ""

    looked = prefetch(look, split_of, threads=os.cpu_count() or 2, ahead=32)
    with Bar(len(split_of), "looking at photos", "photo") as bar:
        for name, digest, problem in looked:
            if problem:
                bad[name] = problem
            else:
                copies.setdefault(digest, []).append(name)
            bar.step(1)
    print("\n  ".join([f"broken    {len(bad)} photos can't be read", *bad.values()]))
    shared = [names for names in copies.values() if len({split_of[name] for name in names}) > 1]
    lines = [", ".join(f"{name} ({split_of[name]})" for name in names) for names in shared]
    print("\n  ".join([f"copies    {len(shared)} photos are in several splits", *lines]))
    limit = settings.MAX_BAD_IMAGES
    met = sum(split_of[name] != "test" for name in bad)  # by training
    return [
        f"{count} photos {state}, more than MAX_BAD_IMAGES = {limit}"
        for count, state in ((len(missing), "are missing"), (met, "can't be read"))
        if count > limit
    ]


def describe_captions(
    captions: Mapping[str, Sequence[str]],
    splits: Mapping[str, Sequence[str]],
    settings: SimpleNamespace,
) -> None:
    """Say how many captions a photo has, how long they are, and how many training would cut."""
    texts = [normalize(text) for group in captions.values() for text in group]
    counts = sorted(map(len, captions.values()))
    lengths = sorted(len(text.split()) for text in texts)
    words = {word for text in texts for word in text.split()}
    print(f"a photo   {counts[0]} to {counts[-1]} captions, {len(texts) / len(captions):.1f} mean")
    print(
        f"a caption {lengths[0]} to {lengths[-1]} words, {sum(lengths) / len(texts):.1f} mean, "
        f"{len(words):,} different ones"
    )
    # VAL_SHARDS leave nothing to train on here: the tokenizer of other captions will be much alike.
    learned = [text for name in splits["train"] or captions for text in captions.get(name, ())]
    longest = settings.MAX_CAPTION_LENGTH
    tokenizer = CaptionTokenizer.train(learned, settings.VOCAB_SIZE)
    rows = tokenizer.encode_texts([("", text) for text in texts], longest + 1)
    cut = sum(len(row) > longest for row in rows)
    print(f"too long  {cut} captions, beyond MAX_CAPTION_LENGTH = {longest} tokens: they are cut")


# --- Everything -----------------------------------------------------------------------------


def prepare(
    settings: SimpleNamespace,
    sources: Mapping[str, Sequence[str]] = SOURCES,
    karpathy_url: str = KARPATHY_URL,
) -> DataPaths:
    """Make sure that photos, captions.json and splits.json are there, and say where.

    Args:
        settings: the namespace of `load_settings`, with `add_arguments` of this module.
        sources: for each data set the addresses of the parts of its zip.
        karpathy_url: the zip with the files of Karpathy's splits.

    Raises:
        UserError: something is missing or unsound; what is done is kept for the next run.
    """
    names = (*sources, "custom")
    if settings.DATASET not in names:
        raise UserError(f"DATASET is {settings.DATASET!r}: use one of {', '.join(names)}")
    if settings.SPLIT not in ("karpathy", "ratio"):
        raise UserError(f"SPLIT is {settings.SPLIT!r}: use karpathy or ratio")
    paths = data_paths(
        settings.DATA_DIR,
        settings.IMAGE_DIR,
        settings.CAPTIONS_FILE,
        settings.QUESTIONS_FILE,
        settings.VOCAB_FILE,
        settings.MERGES_FILE,
        settings.FEATURES_DIR,
    )
    if settings.VAL_SHARDS:
        unpack_shards(settings.VAL_SHARDS, paths, settings.MAX_BAD_IMAGES)
        return paths
    if settings.DATASET != "custom" or settings.archive:
        ensure_photos(paths, settings.DATASET, sources.get(settings.DATASET, ()), settings.archive)
    elif not paths.images.is_dir():
        raise UserError(f"{paths.images} is missing: put your photos there, or set --image_dir")
    if settings.vqa_questions or settings.vqa_annotations:
        convert_vqa(settings.vqa_questions, settings.vqa_annotations, paths.questions)
    names = wanted_photos(parse_tasks(settings.TASKS), paths)
    found = find_images(names, paths.images, settings.MAX_BAD_IMAGES)
    write_splits(settings, paths, found, karpathy_url)
    temporary = paths.data_dir / "temp_download"
    kept = any(temporary.resolve() in Path(part).resolve().parents for part in settings.archive)
    if settings.DATASET != "custom" and temporary.is_dir() and not kept:
        shutil.rmtree(temporary)
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where things come from, and are not settings."""
    parser.add_argument(
        "--archive",
        nargs="+",
        default=[],
        metavar="PATH",
        help="zip of the data set that you have already (or its parts, in order): no download",
    )
    parser.add_argument(
        "--vqa_questions",
        nargs="+",
        default=[],
        metavar="PATH",
        help="VQAv2's question files (of train and val): questions.json is made from them",
    )
    parser.add_argument(
        "--vqa_annotations",
        nargs="+",
        default=[],
        metavar="PATH",
        help="VQAv2's annotation files, in the same order",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a data set and say what is there and what to run next."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        parser.add_argument(
            "--check",
            action="store_true",
            help="look at every photo and caption; code 1 if training would refuse them",
        )

    settings, usual = (
        load_settings(
            config, args, __doc__, only=SETTINGS, add_arguments=add_flags, epilog=EXAMPLES
        )
        for args in (argv, [])
    )
    # What is missing is to be counted, not to end the count.
    lenient = {"MAX_BAD_IMAGES": sys.maxsize} if settings.check else {}
    paths = prepare(SimpleNamespace(**vars(settings) | lenient))
    tasks = parse_tasks(settings.TASKS)
    splits = load_splits(paths.splits)
    flags = [
        text
        for name in SETTINGS
        if vars(settings)[name] != vars(usual)[name]
        for text in (f"--{name.lower()}", str(vars(settings)[name]))
    ]
    print(f"photos    {sum(map(len, splits.values()))} in {paths.images}")
    captions = load_captions(paths.captions) if "captions" in tasks else {}
    if captions:
        print(f"captions  {sum(map(len, captions.values()))} in {paths.captions}")
    questions = load_questions(paths.questions) if "questions" in tasks else {}
    if questions:
        print(f"questions {sum(map(len, questions.values()))} in {paths.questions}")
    print(f"split     {', '.join(f'{s} {len(splits[s])}' for s in SPLITS)} ({settings.SPLIT})")
    if settings.check and (problems := check(settings, paths, splits, captions, questions)):
        raise UserError("training would refuse this data set: " + "; ".join(problems))
    print(f"next      {shlex.join(['python', 'train.py', *flags])}")
    return 0


if __name__ == "__main__":
    run_script(main)
