"""Captions in the forms that people have them in: recognised, and read as {photo: captions}.

A form is recognised by what stands in the file, not by its name: COCO's and Karpathy's JSON, a
list or lines of JSON objects, a table with or without a header, or a text beside each photo.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import html
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset import OTHER_SPLITS, PLAIN, TEXT_KEYS, check_name, split_in
from options import SPLITS
from photo_names import is_photo, is_there, is_unread, plain_name
from tables import Row, plain_key, table_of
from utils import SURROGATES, UserError, decoded, read_json, read_text

# Looked for in this order, in DATA_DIR and in the photo folder.
TABLES = (
    "captions.txt results.csv captions.csv captions.tsv captions.jsonl metadata.jsonl metadata.csv "
    "Flickr8k.token.txt results_20130124.token"
).split()
JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")
LISTS = (".csv", ".tsv", ".xlsx", ".parquet", ".json", *JSON_LINES)  # of other names
TEXT_SUFFIXES = (".txt", ".caption")  # beside photos
# What a table's header, or an object's keys, call the photo and its caption.
NAME_KEYS = (
    "image image_name file_name filename filepath file_path image_path path image_id "
    "image_file images img img_name img_path photo imageid image_url name id"
).split()
CAPTION_KEYS = (
    *TEXT_KEYS,
    *"comment title sentence sentences description raw caption_str reference_strs".split(),
    *"caption_text caption_en alt_text prompt conversations messages".split(),
)
TALKS = ("conversations", "messages")
SHOWN = re.compile("<img>(.+?)</img>")  # a photo within a conversation, as Qwen-VL's have it
ANSWERING = ("gpt", "assistant", "model")  # who speaks in a conversation
SPLIT_KEYS = ("split", "set_name", "subset", "partition")
PLAINLY = ("caption", "captions", "caption_str")  # which count before the other names
NUMBERS = ("image_id", "image_name", "id")  # where an object may have COCO's number, or no suffix
SAMPLE = 1000  # rows by which it is decided what is what
OBJECT = 'write {"image": "photo.jpg", "caption": "A caption"}'
ROW = "write photo.jpg,A caption"
# What is no text, by how it begins.
OTHER_KINDS = {
    b"PK\3\4": "a zip or a spreadsheet",
    b"\x1f\x8b": "packed with gzip",
    b"7z\xbc\xaf": "packed with 7z",
    b"PAR1": "a parquet file",
    b"version https://git-lfs": "Git LFS's note of a file that was not fetched",
}
NUMBER_KEYS = ("comment_number", "caption_number")
NUMBERED = re.compile(r"(?:caption|sentence|comment|text)[_ ]?\d+")  # columns: caption_1, ...
LINE_END = re.compile("\r\n|\r|\n")  # and no others: some stand within captions
TO_CAPTION = re.compile(r"caption|describe|^\W*$", re.IGNORECASE)  # a prompt that asks for one
BARE = re.compile(r"[\w./-]+")  # a photo's name without its suffix, where a header says it is one
NOTHING = "nan NaN None null NULL <NA>".split()  # what programs write for empty cells
# Flickr30k's results.csv has one row without its last delimiter:
# `2199200615.jpg| 4   A dog runs across the grass .`
MISSING_DELIMITER = re.compile(r"^(2199200615\.jpg\| 4)(?= )", re.M)
# Tables made from it with pandas have an empty caption there instead.
EMPTY_IN_THE_WILD = {"2199200615.jpg": "A dog runs across the grass ."}


@dataclass
class Captions:
    """What a file holds, and what was passed over in it, and why."""

    form: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    mended: int = 0  # captions with half an emoji, or `&amp;`, which is replaced
    older: int = 0  # files in another encoding than UTF-8
    splits: dict[str, str] = field(default_factory=dict)  # of photos, where the file says them

    def add(self, name: str, captions: Iterable[str], where: object, split: object = "") -> None:
        """Add a photo's captions, texts or lists of them; the name is relative to its folder."""
        if SURROGATES.search(name) or "\0" in name:
            self.passed.append(f"{where}: {ascii(name)} can't be the name of a photo")
            return
        name = name_within(where, name)
        if split := split_in(split):
            self.splits[name] = split
        texts = [*captions] or [""]
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"{where}: {name!r} has a caption that is no text: {odd[0]!r}")
        for text in itertools.chain.from_iterable(map(_listed, texts)):
            whole = unescaped(SURROGATES.sub("\ufffd", text))
            self.mended += whole != text
            if has_word(whole):
                self.texts.setdefault(name, []).append(whole.strip())
            else:
                self.passed.append(f"{where}: the caption {text!r} of {name!r} has no word")

    def name_of(
        self, where: str, said: Any, usage: str, bare: bool = True, strict: bool = True
    ) -> str:
        """The photo's name in a cell or value; nothing where it is passed over.

        A `bare` one may lack its suffix; what is no name is refused if `strict`.
        """
        name = plain_name(said) if isinstance(said, str) else said
        unread = is_unread(name)
        plain = bare and isinstance(name, str | int) and BARE.fullmatch(str(name)) and not unread
        if plain or (isinstance(name, str) and is_photo(name)):
            return str(name)
        why = "can't be read: make it a JPEG" if unread else "is not the name of a photo"
        # Flickr8k.token.txt has five rows of a "photo.jpg.1" that is in no archive.
        if strict and not unread and "#" not in str(said):
            raise UserError(f"{where}: {name!r} {why}: {usage}")
        self.passed.append(f"{where}: {name!r} {why}")
        return ""

    def tell(self, source: object) -> None:
        """Say what was read and what was not."""
        count = sum(map(len, self.texts.values()))
        print(f"{source} is {self.form}: {count:,} captions of {len(self.texts):,} photos")
        if self.mended:
            print(f"  mended: {self.mended:,} captions that held half a character or an HTML one")
        if self.older:
            said = (text for texts in self.texts.values() for text in texts if not text.isascii())
            print(
                f"  not UTF-8, read in Windows' Western encoding: {self.older:,} files, such as "
                f"{next(said, '')!r}"
            )
        for line in self.passed[:10]:
            print(f"  passed over: {line}")
        if len(self.passed) > 10:
            print(f"  and {len(self.passed) - 10:,} more")


def name_within(where: object, name: str) -> str:
    """A photo's name, relative to where it lay on somebody's disk; `match_names` looks for its end.

    One that begins with `../` needs a folder of its own, and none leads out of the photo folder.
    """
    name = unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))
    name = re.sub(r"^(([A-Za-z]:)?/+|(\.\./)+(?=[^/]+/))(?=[^/])", "", name)
    check_name(where, name)
    return name


def _listed(text: str) -> list[str]:
    """The captions in a cell that holds a list of them, as JSON, Python or numpy writes it."""
    if not re.match(r"\s*[\[(]\s*['\"{]", text):
        return [text]
    commas = re.sub(r"(?<=['\"])\s+(?=['\"])", ",", text.strip())
    python = (commas, re.sub(r"(?<=, )nan\b|(?<=\[)nan\b", "None", commas))
    for read, cell in ((json.loads, text), *((ast.literal_eval, each) for each in python)):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            values = read(cell)
            texts = texts_of([*values]) if isinstance(values, list | tuple) else [None]
            if all(isinstance(each, str) for each in texts):
                return texts
    return [text]


def unescaped(text: str) -> str:
    """With `&amp;` and the like as what they mean; without its semicolon `&not` is no such sign."""
    return re.sub(r"&#?\w+;", lambda sign: html.unescape(sign[0]), text)


def has_word(text: str) -> bool:
    """Has it a letter, number, mark or symbol? A caption of signs alone is an empty target."""
    return any(unicodedata.category(sign)[0] in "LNMS" for sign in text)


def read_captions(path: Path, folder: Path | None = None) -> Captions:
    """Read captions in any form that is known; the message of what is refused says the line.

    A table without a header may call the photos of a `folder` without their suffix.
    """
    table = functools.partial(_read_rows, folder=folder)
    readers = {"JSON": _read_object, "JSON lines": _read_objects, "table": table}
    try:
        form, content = read_file(path)
        found = readers[form](path, content)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: write {PLAIN}") from None
    empty = [name for name, texts in found.texts.items() if {*texts} & {*NOTHING}]
    for name in empty if len(empty) > 1 else ():  # one photo's may be somebody's caption
        none = [text for text in found.texts[name] if text in NOTHING]
        found.texts[name] = [text for text in found.texts[name] if text not in NOTHING]
        found.passed.append(f"{path}: of {name!r} {none} are a program's words for none")
    found.texts = {name: texts for name, texts in found.texts.items() if texts}
    found.older = is_older(path)
    return found


def is_older(path: Path) -> bool:
    """Is a text in Windows' older encoding, as it can be read and is not Unicode?"""
    try:
        return not decoded(path.read_bytes(), older=False)
    except UnicodeDecodeError:
        return True


def read_file(path: Path) -> tuple[str, Any]:
    """The kind of a file, and its JSON value, or its lines as `(where, line)`."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(64)
        if kind := next((kind for sign, kind in OTHER_KINDS.items() if start.startswith(sign)), ""):
            raise UserError(f"{path} is {kind}, no text: save its captions as CSV or JSON")
    if path.suffix.lower() == ".json":
        try:
            return "JSON", read_json(path, older=True)
        except UserError as error:
            if "Extra data: line 2 column 1 " not in str(error):  # what JSON lines begin with
                raise
    text = LINE_END.sub("\n", read_text(path, older=True))
    text = re.sub(r"\Asep=.\n", "\n", text)  # which Excel begins with
    text = MISSING_DELIMITER.sub(r"\1|", text)
    lines = enumerate(text.split("\n"), 1)
    rows = [(f"{path}, line {n}", row) for n, row in lines if row.strip(" \t,;|\x1a")]
    if not rows:
        raise UserError(f"{path} is empty: it needs rows like photo.jpg,A caption")
    first = rows[0][1].lstrip()
    if path.suffix.lower() in JSON_LINES or first.startswith("{"):
        if first.strip() in ("{", "[") or first.startswith("[{"):  # an object over several lines
            return "JSON", read_json(path, older=True)
        return "JSON lines", rows
    return "table", rows


# --- JSON -----------------------------------------------------------------------------------


def _read_object(path: Path, table: Any) -> Captions:
    """One JSON value for all photos."""
    if isinstance(table, list):
        named = ((f"{path}, entry {n}", entry) for n, entry in enumerate(table, 1))
        return _read_objects(path, named, "a list of objects")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} holds no captions: write {PLAIN}")
    if set(table) <= {*SPLITS, *OTHER_SPLITS}:
        return merged("captions by split", [_read_object(path, v) for v in table.values()], table)
    images, annotations = table.get("images"), table.get("annotations")
    try:
        if isinstance(images, list) and isinstance(annotations, list):
            return _read_coco(path, images, annotations)
        if isinstance(images, list) and any("sentences" in image for image in images):
            return _read_karpathy(path, images)
        objects = _objects(table)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is in no form of captions that is known ({error!r})") from None
    if objects is not None:
        return _read_object(path, objects)
    found = Captions("a table of photos")
    for name, said in table.items():
        texts = texts_of(said)
        if texts and (is_photo(name) or isinstance(said, str | list | dict)):
            found.add(name, texts, path)
        else:  # or it is the file's version
            found.passed.append(f"{path}: {name!r} needs a list of at least one caption: {PLAIN}")
    return found


def _objects(table: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The objects of photos that stand below a key, by their index, alone, or as columns."""
    entries = table.get("images") or table.get("data", table.get("annotations"))
    if entries is not None and not isinstance(entries, list):
        raise TypeError(f"a {type(entries).__name__}")
    if entries is not None and all(isinstance(entry, dict) for entry in entries):
        return entries  # `data` as TextCaps has it
    values = [*table.values()]
    lists = [v for v in values if isinstance(v, list) and v and all(map(_names_photo, v))]
    if len(lists) == 1 and not any(map(is_photo, table)):
        return lists[0]
    if all(isinstance(v, dict) and set(v) & {*NAME_KEYS} for v in values):  # by pandas' index
        return [{"image_id": key} | value for key, value in table.items()]
    if not (set(table) & {*CAPTION_KEYS} and set(table) & {*NAME_KEYS}):
        return None
    if any(isinstance(table.get(key), str) for key in NAME_KEYS):
        return [table]
    columns = [[*v.values()] if isinstance(v, dict) else v for v in values]
    if len({len(each) if isinstance(each, list) else -1 for each in columns}) > 1:
        return None
    return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]


def _names_photo(entry: Any) -> bool:
    return isinstance(entry, dict) and is_photo(str(photo_in(entry)))


def texts_of(said: Any, keys: Sequence[str] = ()) -> list[Any]:
    """The captions in a JSON value: a text, an object that has it by a usual key, a list, or the
    answer in a conversation that has one alone."""
    if isinstance(said, list) and said and all(_speaker(each) for each in said):
        answers = [each for each in said if _speaker(each) in ANSWERING]
        if len(answers) != 1:
            return []
        said = answers[0].get("value", answers[0].get("content"))
    if isinstance(said, list):
        return [text for each in said for text in texts_of(each)]
    if isinstance(said, dict):
        return texts_of(next((said[k] for k in (*keys, *CAPTION_KEYS) if said.get(k)), None))
    return [] if said is None or said != said else [said]  # nor NaN


def _speaker(said: Any) -> str:
    """Who speaks in a turn of a conversation, as LLaVA and chat models' data sets have them."""
    return str(said.get("from") or said.get("role") or "") if isinstance(said, dict) else ""


def merged(form: str, parts: Sequence[Captions], called: Iterable[object]) -> Captions:
    """The captions of several files or parts; what each is called may tell its photos' split."""
    found = Captions(form)
    for part, name in zip(parts, called, strict=True):
        for photo, texts in part.texts.items():
            found.texts.setdefault(photo, []).extend(texts)
        if split := split_in(name):
            found.splits |= dict.fromkeys(part.texts, split)
        found.splits |= part.splits
        found.passed += part.passed
        found.mended += part.mended
        found.older += part.older
    return found


def _read_coco(path: Path, images: list[dict], annotations: list[dict]) -> Captions:
    keys = [key for key in NAME_KEYS if key not in NUMBERS]
    names = {
        str(image["id"]): next((image[k] for k in keys if k in image), None) or image["file_name"]
        for image in images
    }
    found = Captions("COCO's captions")
    for entry in annotations:
        name = names.get(str(entry.get("image_id")))
        if entry.get("is_rejected") or entry.get("is_precanned"):  # as VizWiz marks what is none
            found.passed.append(f"annotation {entry.get('id')}: marked as no caption of the photo")
        elif isinstance(name, str):
            found.add(name, map(str, texts_of(entry)), path)
        else:
            found.passed.append(f"annotation {entry.get('id')}: no such image")
    return found


def _read_karpathy(path: Path, images: list[dict]) -> Captions:
    found = Captions("Karpathy's captions and split")
    for image in images:
        name = os.path.join(image.get("filepath") or "", image["filename"])
        sentences = image.get("sentences") or []
        texts = [each.get("raw") or " ".join(each.get("tokens") or []) for each in sentences]
        found.add(name, texts, path, image.get("split", ""))
    return found


def read_objects(
    entries: Iterable[tuple[str, Any]], usage: str
) -> list[tuple[str, dict[str, Any]]]:
    """JSON objects, one a line or in a list, with their keys in lower case."""
    rows = []
    for where, entry in entries:
        try:
            row = json.loads(entry) if isinstance(entry, str) else entry
            if isinstance(row, list) and len(row) > 1:
                row = {"image": row[0], "captions": row[1:]}
            row = {plain_key(key): value for key, value in row.items()}
            if isinstance(asked := row.get("prefix"), str) and "suffix" in row:  # PaliGemma's
                asks = {} if TO_CAPTION.search(asked) else {"question": asked}
                row |= asks | {"answer" if asks else "caption": row.pop("suffix")}
            shown = [each for talk in TALKS for each in SHOWN.findall(str(row.get(talk)))]
            rows.append((where, ({"image": shown[0]} if len(shown) == 1 else {}) | row))
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{where} names no photo and caption: {usage}") from None
    return rows


def _read_objects(
    path: Path, entries: Iterable[tuple[str, Any]], form: str = "JSON lines"
) -> Captions:
    """JSON objects, one a line or in a list, each with a photo and its captions."""
    rows = read_objects(entries, OBJECT)
    keys = [*dict.fromkeys(key for _, row in rows for key in row)]
    columns = [[row.get(key) for _, row in rows[:SAMPLE]] for key in keys]
    photos, captions = ([keys[i] for i in places] for places in choose_columns(keys, columns))
    talk = {*captions} & {*TALKS} and not is_photo(str(rows[0][1].get("id")))
    # Where others name photos, or there are conversations, an object's number is not a photo's.
    photos = [key for n, key in enumerate(photos) if key != "id" or not (n or talk)]
    split = next((key for key in SPLIT_KEYS if says_split(row.get(key) for _, row in rows)), "")
    others = [key for key in keys if key not in (*photos[:1], *captions[:1], split)]
    found = Captions(form + (f", of which {', '.join(others)} are ignored" if others else ""))
    for where, row in rows:
        key = next((key for key in photos if key in row), None)
        asks = row.get("question") and not any(caption in row for caption in captions)
        if asks or (key is None and any(row.get(talk) for talk in TALKS)):
            why = "asks a question: --tasks questions learns from it" if asks else "shows no photo"
            found.passed.append(f"{where} {why}")
            continue
        if key is None or not any(caption in row for caption in captions):
            raise UserError(f"{where} names no photo and caption: {OBJECT}")
        if name := found.name_of(where, photo_in(row[key]), OBJECT, bare=key in NUMBERS):
            found.add(name, texts_of(row, captions), where, row.get(split))
    return found


def photo_in(said: Any) -> Any:
    """The name in `"1.jpg"`, `["1.jpg"]` or `{"path": "1.jpg"}`."""
    if isinstance(said, list) and len(said) == 1:
        return photo_in(said[0])
    return next((said[k] for k in NAME_KEYS if k in said), said) if isinstance(said, dict) else said


# --- Tables ---------------------------------------------------------------------------------


def choose_columns(
    names: Sequence[str], columns: Sequence[Sequence[Any]]
) -> tuple[list[int], list[int]]:
    """Which columns, or keys, hold the photo and its captions, the likeliest first.

    A usual name decides, and among several what stands below: names of photos rather than
    numbers; for captions `caption` first, then the most words.
    """

    def share(place: int) -> float:
        """Of the cells in which something stands, those with a photo's name."""
        cells = [cell for cell in map(photo_in, columns[place]) if cell not in (None, "")]
        good = [isinstance(c, str) and "://" not in c and is_photo(plain_name(c)) for c in cells]
        return sum(good) / max(1, len(good))

    def words(place: int) -> int:
        return sum(len(re.findall(r"[^\W\d_]+", str(texts_of(cell)))) for cell in columns[place])

    usual = [i for key in NAME_KEYS for i, name in enumerate(names) if name == key]
    captions = [i for key in CAPTION_KEYS for i, name in enumerate(names) if name == key]
    captions = [i for i in captions if i not in usual[:1]]
    others = [i for i in range(len(names)) if usual and i not in (*usual, *captions)]
    named = [i for i in (*usual, *others) if share(i) >= 0.5]
    photos = [*dict.fromkeys((*named, *usual))]
    captions.sort(key=lambda i: (not (names[i] in PLAINLY and words(i)), -words(i)))
    return photos, captions


def says_split(cells: Iterable[Any]) -> bool:
    """Do the cells of a column tell photos to train on from those to validate?"""
    return {split_in(cell) for cell in {*map(str, cells)}} >= {"train", "val"}


def caption_columns(names: Sequence[str], captions: Sequence[int]) -> list[int]:
    """All columns of captions: those of the likeliest one's name, or of it and a number."""
    likeliest = names[captions[0]] if captions else ""
    numbered = {n for n in names if NUMBERED.fullmatch(n) and n.startswith(likeliest.rstrip("s"))}
    return [i for i, name in enumerate(names) if name and name in {likeliest, *numbered}]


def _read_rows(path: Path, lines: list[tuple[str, str]], folder: Path | None) -> Captions:
    """A table: one row a line, `name, caption` or `name, number, caption`, or as its header says.

    The delimiter is a comma, `|`, `;` or a tab, the one that comes first in the first row. Fields
    may be quoted, and hold line ends then; a delimiter within an unquoted caption belongs to it; a
    `#0` after a name is left out. One malformed row is known and mended: Flickr30k's.
    """
    delimiter, names, rows = table_of(lines, folder)
    sample = [row for _, row in rows[1 : SAMPLE + 1]]
    columns = [[row[i][0] if i < len(row) else "" for row in sample] for i in range(len(names))]
    photos, captions = choose_columns(names, columns)
    captions = caption_columns(names, captions)
    begun = not captions and any(is_photo(plain_name(name)) for name in names)
    bare = not (begun or (photos and captions)) and folder and is_there(names[0], folder)
    if begun or bare:
        numbered = len(names) > 2 and names[1].isdigit() and delimiter != " "
        names = ["image", *NUMBER_KEYS[:numbered], "caption"]
        found = _read_columns(rows, delimiter, names, 0, [len(names) - 1], False, bare)
    elif photos and captions:
        found = _read_columns(rows[1:], delimiter, names, photos[0], captions, True, True)
    else:
        what, usual = ("captions", CAPTION_KEYS) if photos else ("photos", NAME_KEYS)
        raise UserError(
            f"{rows[0][0]}: of the columns {', '.join(filter(None, names))} none is known to name "
            f"{what}: call it {usual[0]} ({', '.join(usual[1:])} are known too), and begin with a "
            "row like image,caption, or like photo.jpg,A caption"
        )
    if not found.texts:
        why = "".join(f": {line}" for line in found.passed[:1])
        raise UserError(f"{path} has no rows like photo.jpg,A caption{why}")
    return found


def _read_columns(
    rows: list[Row],
    delimiter: str,
    names: list[str],
    photo: int,
    captions: list[int],
    headed: bool,
    bare: bool,
) -> Captions:
    """Rows of these columns; where there are more than photo and caption, what lacks one of these
    is passed over, and refused otherwise.

    Without a header the last column may hold several captions, by tabs or each in quotes. Names
    may be `bare` of their suffix.
    """
    ended = headed and len(names) - 1 in (photo, *captions)  # by what may not be empty
    places = (names.index(key) for key in SPLIT_KEYS if key in names)
    told = (i for i in places if says_split(row[i][0] for _, row in rows if i < len(row)))
    split = next(told, None)
    others = [n for i, n in enumerate(names) if n and i not in (photo, *captions, split)]
    ignored = [name for name in others if name not in NUMBER_KEYS]
    found = Captions(
        "a table" + f", of which the columns {', '.join(ignored)} are ignored" * bool(ignored)
    )
    last, strict = captions[-1], not ignored and len(captions) == 1
    count = names.index(others[0]) if strict and others else None  # the caption's number
    for where, row in rows:
        row += [("", "")] * (len(names) - len(row))
        while ended and len(row) > len(names) and not row[-1][0]:
            row.pop()  # what spreadsheets write beyond the last column
        more = len(row) - len(names)
        if more and len(captions) > 1:
            found.passed.append(f"{where} has {len(row)} columns, not {len(names)}")
            continue
        whole = row[last : last + more + 1]
        if more:  # delimiters within a caption that isn't quoted
            row[last : last + more + 1] = [(delimiter.join(s for _, s in whole).strip(), "")]
        cells = [value for value, _ in row]
        if not any(cells):
            continue
        if count is not None and not cells[count].isdigit():
            raise UserError(f"{where}: {cells[count]!r} is not the number of a caption")
        name = found.name_of(where, cells[photo], ROW, bare=bare, strict=strict)
        if not name:
            continue
        texts = [cells[place] for place in captions if cells[place]]
        if more and not headed:
            if delimiter == "\t" or all(spelled.lstrip().startswith('"') for _, spelled in whole):
                texts = [value for value, _ in whole]
            elif whole[0][0] != whole[0][1].strip():  # it is quoted, and another column follows
                raise UserError(
                    f"{where} has {len(names) + more} columns: say which is what in a first row, "
                    f"such as image{delimiter}caption"
                )
        texts = texts or [EMPTY_IN_THE_WILD.get(name, "")]
        found.add(name, texts, where, "" if split is None else cells[split])
    return found
