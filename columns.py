"""Which columns of a table, or keys of JSON objects, hold photos, captions and splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset import SPLIT_WORD, split_in
from photo_names import find_names, is_photo, photos_in, plain_name
from texts import ASIDE, CAPTION_KEYS, LIKE_CAPTIONS, PAIRS, is_asked, texts_of
from utils import brief

# What a table's header, or an object's keys, call the photo and its caption.
NAME_KEYS = (
    "image image_name file_name filename filepath file_path image_path path image_id "
    "image_file image_filename images img img_name img_path img_id photo imageid image_url "
    "captioning photo_id image_urls picture coco_id cocoid imgid name jpg png id"
).split()
SPLIT_KEYS = ("split", "set_name", "subset", "partition")
PLAINLY = ("caption", "captions", "caption_str")  # which count before the other names
IDS = "image_id image_name img_id photo_id picture coco_id cocoid imgid id".split()  # or numbers
SAMPLE = 1000  # rows by which it is decided what is what
NUMBERED = re.compile(r"(?:caption|sentence|comment|text|description|raw)[_ ]?\d+")  # caption_1
LANGUAGE_KEY = re.compile("([a-z]+_)?(lang|language|locale)(_(code|id|tag))?")  # SLAKE's q_lang


def choose_columns(
    keys: Sequence[str], rows: Sequence[Mapping[str, Any]], folder: Path | None = None
) -> tuple[list[str], list[str], str | None]:
    """Which keys, or columns, hold the photo and its captions, the likeliest first, and which one
    tells photos to train on from those to validate.

    A usual name decides, and among several what stands below: names of photos rather than
    numbers, but those of the `folder` first; for captions `caption` first, then the most words.
    """
    sample = rows[:SAMPLE]

    def share(key: str, address: bool = False) -> float:
        """Of the cells in which something stands, those with a photo's name, or address."""
        cells = [cell for row in sample if (cell := photo_in(row.get(key))) not in (None, "")]
        said = [plain_name(cell) if isinstance(cell, str) else "" for cell in cells]
        good = [is_photo(name) and ("://" in name) == address for name in said]
        return sum(good) / max(1, len(good))

    def words(key: str) -> int:
        told = (str(texts_of(row.get(key))) for row in sample)
        count = sum(len(re.findall(r"[^\W\d_]+", said)) for said in told)
        return min(count, 1) if key == "imagedescription" else count  # which cameras fill

    def is_same(key: str) -> bool:
        """Is it the same of all photos, as the `description` of a task is in a crowd's answers?"""
        cells = [str(row[key]) for row in sample if row.get(key)]
        return key not in PLAINLY and len(cells) > 9 and len({*cells}) == 1

    def is_split(said: Any) -> bool:
        return bool(SPLIT_WORD.fullmatch(str(said).lower()))

    def tells_split(key: str) -> bool:
        said = {*map(split_in, {str(row.get(key)) for row in rows})}
        return "train" in said and bool(said & {"val", "test"})

    usual, captions, splits = (
        [key for key in known if key in keys] for known in (NAME_KEYS, CAPTION_KEYS, SPLIT_KEYS)
    )
    splits += [key for key in keys if all(is_split(row.get(key)) for row in rows)]  # `data set`
    asked = sum(is_asked(row.get("prompt")) for row in sample) > len(sample) / 2
    if asked or any((key, "prompt") in PAIRS for key in keys):  # it asks for the caption
        captions = [key for key in captions if key != "prompt"]
    headed = not any(is_photo(plain_name(key)) for key in keys)
    # Such as blip_caption, re_caption, sentences_raw; a title may be a page's.
    like = [key for key in keys if LIKE_CAPTIONS.fullmatch(key) and key not in captions]
    # A shop's alt texts, one a photo, say more than its titles unless most are blank.
    alt = [key for key in like if re.search("(^|_)alt_", key) and words(key) > words("title")]
    called_so = [key for key in like if "caption" in key or key in alt]
    if headed and all(map(is_same, captions)):
        captions += called_so or like  # of WIT not `context_page_description`, an article's
    elif captions == ["title"]:
        captions = called_so or captions
    captions = [key for key in captions if share(key) < 0.5]  # a file's name, as `text` or `title`
    # A column without a name may be pandas' index.
    others = [key for key in keys if (headed or not key) and key not in (*usual, *captions)]
    others.sort(key=is_given)
    named = whole_first([key for key in (*usual, *others) if share(key) >= 0.5], rows)
    # An `id` may count rows, which would be taken for 1.jpg and so on.
    photos = [*named, *(key for key in usual if key != "id")]
    photos += [key for key in others if share(key, address=True) >= 0.5]
    plain = {key for key in PLAINLY if key in captions and words(key)}
    if not plain and any(re.fullmatch(r"caption[_ ]?\d+", key) for key in keys):
        captions = []  # all that are numbered, and no title
    captions.sort(key=lambda key: (is_same(key), key not in plain, -words(key)))
    captions[1:] = [key for key in captions[1:] if key not in ASIDE]
    photos = [*dict.fromkeys((*photos, *usual))]
    links = any("://" in str(photo_in(row.get(key))) for row in sample for key in photos)
    named = photos if links else named  # no numbers alone
    if folder and named[1:]:
        photos = [*dict.fromkeys((*there_first(named, rows, folder), *photos))]
    return photos, captions, next(filter(tells_split, splits), None)


def whole_first(keys: list[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that name photos, the first one unless another has its names with their folders,
    which tell namesakes apart: exiftool's `SourceFile` before `FileName`."""

    def said(key: str) -> list[str]:
        return [str(photo_in(row.get(key)) or "").replace("\\", "/") for row in rows]

    names = said(keys[0]) if keys[1:] else []
    for key in keys[1:]:
        whole = said(key)
        longer = all(f"/{w}".endswith(f"/{n}") for w, n in zip(whole, names, strict=True))
        if longer and len({*whole}) > len({*names}):
            return [*dict.fromkeys((key, *keys))]
    return keys


def there_first(keys: list[str], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """The columns that name photos, the first one that names some of the `folder` before others:
    whoever fetched them may have called them by their addresses, or by the `id` beside these."""
    there = photos_in(folder)
    for key in keys:
        said = [str(cell) for row in rows if (cell := photo_in(row.get(key))) not in (None, "")]
        counts = [[*map(str, range(first, first + len(said)))] for first in (0, 1)]  # of rows
        if said not in counts and find_names({*map(plain_name, {*said})}, there):
            return [*dict.fromkeys((key, *keys))]
    return keys


def languages_in(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """What is to be said of rows that say to be in several languages, or of lists of such objects
    in these columns."""
    lists = [row[key] for key in columns for row in rows if isinstance(row.get(key), list)]
    inner = [each for said in lists for each in said if isinstance(each, dict)]
    keys = dict.fromkeys((*(rows[0] if rows else ()), *(inner[0] if inner else ())))
    for key in filter(LANGUAGE_KEY.fullmatch, keys):
        said = sorted({str(row[key]) for row in (*rows, *inner) if row.get(key)})
        if len(said) > 1:
            which = brief(", ".join(said))
            return f", in several languages ({key}: {which}; the rows of one alone teach it alone)"
    return ""


def is_given(column: str) -> bool:
    """Is it of what a described picture was made from, as ControlNet's `source` of a `target`?"""
    return bool(re.match("source|mask|cond|control|hint|input|depth|canny|seg", column))


def caption_columns(keys: Iterable[str], captions: Sequence[str]) -> list[str]:
    """All columns of captions: the likeliest one, and those of its name and a number."""
    likeliest = captions[0] if captions else ""
    stem = likeliest.rstrip("s")
    numbered = [key for key in keys if NUMBERED.fullmatch(key) and key.startswith(stem)]
    return [key for key in keys if key and key in (likeliest, *numbered)]


def split_told(said: Any) -> Any:
    """What an object about a photo, if it is one, says of its split."""
    known = said if isinstance(said, dict) else {}
    return next((known[key] for key in SPLIT_KEYS if known.get(key)), "")


def photo_in(said: Any) -> Any:
    """The name in `"1.jpg"`, `["1.jpg"]` or `{"path": "1.jpg"}`."""
    if isinstance(said, list) and len(said) == 1:
        return photo_in(said[0])
    return next((said[k] for k in NAME_KEYS if k in said), said) if isinstance(said, dict) else said
