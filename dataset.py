"""Captions and splits as files on disk, and training batches of one photo per row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UserError

SPLITS = ("train", "val", "test")

# --- Where things are -----------------------------------------------------------------------


@dataclass(frozen=True)
class DataPaths:
    """The files of one data set."""

    data_dir: Path
    images: Path
    captions: Path
    splits: Path
    vocab: Path
    merges: Path
    features: Path


def data_paths(
    data_dir: str | os.PathLike[str],
    image_dir: str | None = None,
    captions_file: str | None = None,
    vocab_file: str | None = None,
    merges_file: str | None = None,
    features_dir: str | None = None,
) -> DataPaths:
    """Resolve a data set's files: what is None has its usual name within `data_dir`."""
    root = Path(data_dir).expanduser()

    def place(given: str | None, usual: str) -> Path:
        return Path(given).expanduser() if given else root / usual

    return DataPaths(
        data_dir=root,
        images=place(image_dir, "images"),
        captions=place(captions_file, "captions.json"),
        splits=root / "splits.json",
        vocab=place(vocab_file, "vocab.json"),
        merges=place(merges_file, "merges.txt"),
        features=place(features_dir, "features"),
    )


# --- captions.json --------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark, in which no key stands twice.

    Raises:
        UserError: the file is missing, not UTF-8, not JSON, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise UserError(f"{path}: the key {twice!r} stands twice: merge the two entries")
        return result

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run python prepare_dataset.py") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def load_captions(path: Path) -> dict[str, list[str]]:
    """Read captions.json: `{"photo.jpg": ["caption", ...]}`, names relative to the photo folder.

    Raises:
        UserError: the file or an entry is not of that form; the message names the entry.
    """
    table = read_json(path)
    form = '{"photo.jpg": ["caption", ...]}'
    if not isinstance(table, dict):
        raise UserError(f"{path} holds a {type(table).__name__}, not an object: write {form}")
    if not table:
        raise UserError(f"{path} is empty: it needs at least one photo: {form}")
    for name, captions in table.items():
        check_name(path, name)
        if not isinstance(captions, list) or not captions:
            raise UserError(f"{path}: {name!r} needs a list of at least one caption: {form}")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise UserError(f"{path}: {name!r} has a caption that is no text: {caption!r}")
    return table


def check_name(path: Path, name: str) -> None:
    """Refuse a photo's name that leads out of the photo folder.

    Raises:
        UserError: the name is empty, absolute, or holds `..`, a backslash or a zero byte.
    """
    parts = name.split("/")
    if parts[0] == "" or ":" in parts[0] or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(f"{path}: {name!r} is not a name within the photo folder")


def find_images(names: Iterable[str], image_dir: Path, max_missing: int) -> list[str]:
    """Return the names whose file is there, within the folder, links followed.

    Raises:
        UserError: the folder is missing, a link leads out of it, or more than `max_missing`
            photos are missing; the message names some.
    """
    if not image_dir.is_dir():
        raise UserError(f"the photo folder {image_dir} is missing: run python prepare_dataset.py")
    root = os.path.realpath(image_dir) + os.sep
    found, missing = [], []
    for name in names:
        file = os.path.realpath(os.path.join(root, name))
        if not file.startswith(root):
            raise UserError(f"{image_dir / name} is a link that leads out of the photo folder")
        (found if os.path.isfile(file) else missing).append(name)
    if len(missing) > max_missing:
        raise UserError(
            f"{len(missing)} photos are not in {image_dir}, first {missing[:3]}; at most "
            f"MAX_BAD_IMAGES = {max_missing} may be missing: add them, or take them out of the "
            "captions, or raise --max_bad_images"
        )
    if missing:
        print(f"skipped {len(missing)} photos that are not in {image_dir}: {missing}")
    return found


# --- Splits ---------------------------------------------------------------------------------


def split_by_ratio(names: Iterable[str], train_ratio: float) -> dict[str, list[str]]:
    """Split photos by a hash of their name: adding photos never moves the others.

    A share `train_ratio` is for training; the rest is half for validation, half for testing.

    Raises:
        UserError: the ratio is not between 0 and 1, or a split that training needs is empty.
    """
    if not 0 < train_ratio < 1:
        raise UserError(f"TRAIN_SPLIT_RATIO is {train_ratio}: it must lie between 0 and 1")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(names):
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        middle = (1 + train_ratio) / 2
        splits["train" if place < train_ratio else "val" if place < middle else "test"].append(name)
    return _checked(splits, f"the ratio {train_ratio}")


def split_by_karpathy(names: Iterable[str], path: Path) -> dict[str, list[str]]:
    """Split photos as a `dataset_*.json` in Karpathy's format says; `restval` is for training.

    Photos that the file doesn't know belong to no split.

    Raises:
        UserError: the file is not of that format, or a split that training needs is empty.
    """
    table = read_json(path)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    known = set(names)
    seen: set[str] = set()
    try:
        for image in table["images"]:
            name, split = image["filename"], image["split"]
            if name in seen:
                raise UserError(f"{path}: {name!r} stands in it twice")
            seen.add(name)
            if name in known:
                splits["train" if split == "restval" else split].append(name)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not in Karpathy's format ({error!r} is off)") from None
    return _checked(splits, str(path))


def _checked(splits: dict[str, list[str]], source: str) -> dict[str, list[str]]:
    for split in ("train", "val"):
        if not splits[split]:
            raise UserError(f"{source} leaves no photo for {split}: more photos or another split")
    return splits


def load_splits(path: Path) -> dict[str, list[str]]:
    """Read splits.json as `prepare_dataset.py` wrote it: `{"train": [names], "val": ..., ...}`.

    Raises:
        UserError: the file is missing or not of that form.
    """
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(table.get(s), list) for s in SPLITS):
        raise UserError(f"{path} is not a table of splits: run python prepare_dataset.py")
    return {split: table[split] for split in SPLITS}
