"""Which files are photos, and which of them a table means by the names that it gives."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from encoder import PHOTO_SUFFIXES
from utils import SURROGATES, UserError, files_in

OTHER_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".cr2", ".nef", ".dng", ".arw")


def is_photo(name: str) -> bool:
    return os.path.splitext(name.lower())[1] in PHOTO_SUFFIXES


def plain_name(name: str) -> str:
    """A photo's name without the number of its caption, `photo.jpg#0`, or an address's query."""
    name = name.strip().partition("?")[0] if "://" in name else name.strip()
    return re.sub(r"(#\w+)+$", "", name)


def is_unread(name: object) -> bool:
    """Is it a picture in a form that isn't read?"""
    return str(name).lower().endswith(OTHER_PICTURES)


def photos_in(folder: Path) -> list[str]:
    """The names of the photos in a folder and those below."""
    # A name in another encoding than UTF-8 can't stand in a JSON file.
    return [name for name in files_in(folder) if is_photo(name) and not SURROGATES.search(name)]


def is_there(name: str, folder: Path) -> bool:
    """Is it a photo's name in a folder, with or without its folders and suffix?"""
    there = photos_in(folder)
    return any(_alike([name], there, way) for way in (_stem, _last, _numbered))


def match_names(texts: dict[str, list[Any]], folder: Path) -> dict[str, list[Any]]:
    """What is said of photos, by the names that they really have in the folder, if there is one.

    Where a name is not there, tried are, as far as only one photo fits that nothing else names:
    Unicode's other spelling or another case, and another suffix; and, where no name at all is
    there, the name without the first of its folders, without all, and COCO's number.
    """
    if not folder.is_dir() or all(os.path.isfile(folder / name) for name in texts):
        return texts
    there = photos_in(folder)
    if not there:
        suffixes = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(f"{folder} holds no photo ({suffixes}): choose another with --image_dir")
    real = {name: name for name in texts if os.path.isfile(folder / name)}
    for way in (_spelled, _stem):
        free = {*there}.difference(real.values())
        real |= _alike([name for name in texts if name not in real], free, way)
    # Photos of one name may stand in several folders: where any is there, theirs may be missing.
    real = real or _ending(texts, there)
    real = real or _alike(texts, there, _last) or _alike(texts, there, _numbered)
    if not real:
        named = {*map(_last, texts)}
        alike = [name for name in there if _last(name) in named]
        raise UserError(
            f"no caption is of a photo that is there: {next(iter(texts))!r} is wanted, and "
            f"{folder} holds {(alike or there)[0]!r}{' and more of that name' * bool(alike)}: "
            "correct the names, or choose the folder with --image_dir"
        )
    changed = [(name, file) for name, file in real.items() if name != file]
    if changed:
        name, file = changed[0]
        print(f"{len(changed):,} names are read as those of photos, {name!r} as {file!r}")
    return {real.get(name, name): captions for name, captions in texts.items()}


def _alike(
    wanted: Iterable[str], there: Iterable[str], way: Callable[[str], str]
) -> dict[str, str]:
    free = _index(there, way)
    return {name: free[key] for key, name in _index(wanted, way).items() if key in free}


def _ending(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Names of which one is the other's end, as `x/1.jpg` is that of `data/x/1.jpg`."""
    names, files = _index(wanted, _stem), _index(there, _stem)
    pairs = {(name, files[end]) for name in wanted for end in _ends(name) if end in files}
    pairs |= {(names[end], file) for file in there for end in _ends(file) if end in names}
    counts = Counter(itertools.chain(*pairs))
    return {name: file for name, file in sorted(pairs) if counts[name] == counts[file] == 1}


def _ends(name: str) -> list[str]:
    parts = _stem(name).split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _index(names: Iterable[str], way: Callable[[str], str]) -> dict[str, str]:
    groups = defaultdict(list)
    for name in names:
        groups[way(name)].append(name)
    return {key: group[0] for key, group in groups.items() if key and len(group) == 1}


def _spelled(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold().replace("\\", "/")


def _stem(name: str) -> str:
    return os.path.splitext(_spelled(name))[0]


def _last(name: str) -> str:
    return os.path.basename(_stem(name))


def _numbered(name: str) -> str:
    """COCO's number of a photo: 42 for `COCO_val2014_000000000042.jpg` and for `000000000042`."""
    number = re.fullmatch(r"(?:coco_\w+_)?0*(\d+)", _last(name))
    return number[1] if number else ""
