"""Which files are photos, and which of them a table means by the names that it gives."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from encoder import PHOTO_SUFFIXES
from utils import SURROGATES, UserError, files_in

Way = Callable[[str], str]  # of cutting a name to what counts of it
ALIKE = str.maketrans("\\ ", "/_")  # Windows' folders, and what becomes of spaces in the web
# Byte order marks within a file, and what Windows puts before a path that is copied.
UNSEEN = "\u200b\u200e\u200f\u202a\u202c\u2060\ufeff"
LONGEST = 4096  # bytes that a path may have
DEEPEST = 100  # folders, one in the other, of which a name's ends are looked at
DRAWN = ("training_curves.png", "samples.png")  # in OUTPUT_DIR, by a training
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".cr2", ".nef", ".dng", ".arw")


def is_photo(name: str) -> bool:
    return os.path.splitext(name.lower())[1] in PHOTO_SUFFIXES


def plain_name(name: str) -> str:
    """A photo's name without the number of its caption, `photo.jpg#0`, or an address's query, or
    Airtable's address after it, `photo.jpg (https://...)`, or Label Studio's before it,
    `/data/local-files/?d=photo.jpg`, or unseen signs around it."""
    name = re.sub(r" \(https?://[^ ()]+\)$", "", name.strip().strip(UNSEEN))
    name = re.sub(r"^(\S*/local-files/\?d=|File:)", "", name)  # Wikimedia's, the latter
    name = name.strip().partition("?")[0] if "://" in name else name.strip()
    parts = name.split("#")
    while len(parts) > 1 and re.fullmatch(r"\w+", parts[-1]):
        parts.pop()
    return "#".join(parts)


def is_unread(name: object) -> bool:
    """Is it a picture in a form that isn't read?"""
    return str(name).lower().endswith(OTHER_PICTURES)


def is_drawn(name: str) -> bool:
    """Is it one of the pictures that a training draws in OUTPUT_DIR?"""
    return os.path.basename(name) in DRAWN


def links_in(folder: Path) -> list[Path]:
    """The links in a folder, not hidden ones, in order."""
    return sorted(at for at in folder.glob("[!.]*") if at.is_symlink())


def photos_in(folder: Path) -> list[str]:
    """The names of the photos in a folder and those below; if none is there, behind links in it."""
    names = [*files_in(folder)]
    if all(map(is_drawn, filter(is_photo, names))):
        links = links_in(folder)
        names = [os.path.join(at.name, name) for at in links for name in files_in(at)]
    # A name in another encoding than UTF-8 can't stand in a JSON file.
    return [name for name in names if is_photo(name) and not SURROGATES.search(name)]


def is_there(name: str, folder: Path) -> bool:
    """Is it a photo's name in a folder, with or without its folders and suffix?"""
    return bool(find_names([name], photos_in(folder)))


def find_names(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Which of the photos there the names mean: {name: photo}, of a photo one name at most.

    A name that is not there is read in these ways, each of which counts as far as one name and one
    photo alone become the same by it.
    """
    spellings = (
        _spelled,  # caf%C3%A9.JPG is café.jpg
        _bare,  # a.jpg is a.png, and img.v1 is img.v1.jpg
        _stem,  # 1.0 is 1.jpg
        _unpadded,  # x/1.jpg is x/0001.jpg: spreadsheets drop zeros
    )
    # Photos of one name may stand in several folders: where any is there, theirs may be missing.
    if_none_is_there = (
        _ending,  # C:/photos/x/1.jpg is x/1.jpg
        _by(os.path.basename),  # y/1.jpg is x/1.jpg
        _by(_core),  # 42 is COCO_val2014_000000000042.jpg, upload/1/0a1b2c3d-1.jpg is 1.jpg
    )
    wanted, there = [*wanted], {*there}

    def spelled(names: Iterable[str]) -> dict[str, str]:
        found = {name: name for name in names if name in there}
        for way in spellings:
            left = [name for name in names if name not in found]
            found |= _alike(left, there.difference(found.values()), way)
        return found

    found = spelled(wanted)
    # Below the folders that all names share, namesakes in several folders are told apart.
    shared = [] if found else os.path.commonprefix([name.split("/")[:-1] for name in wanted])
    for depth in range(1, len(shared) + 1) if len(shared) < DEEPEST else ():
        whole = {name.split("/", depth)[depth]: name for name in wanted}
        if not {*map(_bare, there)}.isdisjoint(map(_bare, whole)):
            found = {whole[name]: photo for name, photo in spelled(whole).items()}
            if len(found) < len(wanted):
                found = max(found, _ending(wanted, there, _bare), key=len)
            if found:
                return found
    # At last by the suffix: x/1.jpg is the photo, and masks/1.png is not.
    for way, cut in (*itertools.product(if_none_is_there, (_bare, _stem)), (_ending, _spelled)):
        found = found or way(wanted, there, cut)
    return found


def match_names(texts: dict[str, list[Any]], folder: Path) -> dict[str, list[Any]]:
    """What is said of photos, by the names that they really have in the folder, if there is one."""
    if not folder.is_dir() or all(os.path.isfile(folder / name) for name in texts):
        return texts
    there = photos_in(folder)
    if not there:
        suffixes = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(f"{folder} holds no photo ({suffixes}): choose another with --image_dir")
    real = find_names(texts, [*there, *(name for name in texts if os.path.isfile(folder / name))])
    if not real:
        named = {*map(_last_part, texts)}
        alike = [name for name in there if _last_part(name) in named]
        raise UserError(
            f"no text is of a photo that is there: {next(iter(texts))!r} is wanted, and "
            f"{folder} holds {(alike or there)[0]!r}{' and more of that name' * bool(alike)}: "
            "correct the names, or choose the folder with --image_dir"
        )
    changed = [(name, file) for name, file in real.items() if name != file]
    if changed:
        name, file = changed[0]
        print(f"{len(changed):,} names are read as those of photos, {name!r} as {file!r}")
    return {real.get(name, name): captions for name, captions in texts.items()}


def by_last_part(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Which of the photos there the names mean by their last part alone, as far as no other name
    and no other photo has the same: {name: photo}."""
    return _alike(wanted, there, _last_part)


def are_meant(wanted: Collection[str], there: Collection[str]) -> bool:
    """May the names be of the photos there, or of some of one name, and by more than chance, by
    which COCO's numbers are some of Flickr30k's?"""
    least, parts = min(len(wanted), len(there)) / 100, {*map(_last_part, there)}
    alike = sum(_last_part(name) in parts for name in wanted)
    return alike > least or len(find_names(wanted, there)) > least


# --- How names may be alike -------------------------------------------------------------------


def _alike(wanted: Iterable[str], there: Iterable[str], way: Way) -> dict[str, str]:
    free = _index(there, way)
    return {name: free[key] for key, name in _index(wanted, way).items() if key in free}


def _index(names: Iterable[str], way: Way) -> dict[str, str]:
    groups = defaultdict(list)
    for name in names:
        groups[way(name)].append(name)
    return {key: group[0] for key, group in groups.items() if key and len(group) == 1}


def _spelled(name: str) -> str:
    """In Unicode's usual spelling, without an address's signs, spaces or case, as cells are cut."""
    return unicodedata.normalize("NFC", unquote(name).strip()).casefold().translate(ALIKE)


def _bare(name: str) -> str:
    """Without a photo's suffix."""
    name = _spelled(name)
    return os.path.splitext(name)[0] if is_photo(name) else name


def _stem(name: str) -> str:
    """Without any suffix."""
    return os.path.splitext(_spelled(name))[0]


def _unpadded(name: str) -> str:
    """Without a number's leading zeros, where the name is one."""
    folder, last = os.path.split(_stem(name))
    return os.path.join(folder, last.lstrip("0") or "0") if last.isdecimal() else ""


def _last_part(name: str) -> str:
    return os.path.basename(_bare(name))


def _ending(wanted: Iterable[str], there: Iterable[str], cut: Way) -> dict[str, str]:
    """Names of which one is the other's end, as `x/1.jpg` is that of `data/x/1.jpg`."""
    names, files = _index(wanted, cut), _index(there, cut)
    pairs = {(name, files[end]) for name in wanted for end in ends_of(cut(name)) if end in files}
    pairs |= {(names[end], file) for file in there for end in ends_of(cut(file)) if end in names}
    counts = Counter(itertools.chain(*pairs))
    return {name: file for name, file in sorted(pairs) if counts[name] == counts[file] == 1}


def ends_of(name: str) -> list[str]:
    """`a/b/1`, `b/1` and `1`."""
    parts = name.split("/") if name.count("/") <= DEEPEST else [name]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _by(key: Way) -> Callable[..., dict[str, str]]:
    """The way of taking names for each other of which, once cut, one and one have the same key."""
    return lambda wanted, there, cut: _alike(wanted, there, lambda name: key(cut(name)))


def _core(name: str) -> str:
    """Without what COCO and Label Studio put before a photo's number or name."""
    core = re.sub(r"^(coco_\w+_(?=\d+$)|[0-9a-f]{8}-)", "", os.path.basename(name))
    return _unpadded(core) or core
