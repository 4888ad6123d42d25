"""Captions in the forms that people have them in: recognised, and read as {photo: captions}.

A form is recognised by what stands in the file, not by its name: COCO's and Karpathy's JSON, a
list or lines of JSON objects, a table with or without a header, or a text beside each photo.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from columns import (
    IDS,
    NAME_KEYS,
    NUMBERED,
    SPLIT_KEYS,
    caption_columns,
    choose_columns,
    languages_in,
    photo_in,
    split_told,
)
from dataset import OTHER_SPLITS, PLAIN, SPLIT_WORD, check_name, split_in
from options import SPLITS
from photo_names import LONGEST, is_photo, is_there, is_unread, plain_name
from tables import Table, is_comment, parquet_rows, table_of
from texts import (
    ASIDE,
    CAPTION_KEYS,
    LIKE_CAPTIONS,
    NOTHING,
    TALKS,
    as_asked,
    as_labelled,
    has_word,
    is_rejected,
    listed,
    plain_key,
    talk_in,
    texts_of,
    unescaped,
)
from utils import SURROGATES, UserError, brief, decoded, lfs_note, read_json, read_text, size_text

Entry = tuple[str, Any]  # where it stands, and a JSON value, or a line that holds one

# Looked for in this order, in DATA_DIR and in the photo folder.
TABLES = (
    "captions.txt results.csv captions.csv captions.tsv captions.jsonl metadata.jsonl metadata.csv "
    "metadata.parquet Flickr8k.token.txt results_20130124.token"
).split()
JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")
LISTS = (*".csv .tsv .xlsx .xls .ods .parquet .json".split(), *JSON_LINES)  # of other names
TEXT_SUFFIXES = (".txt", ".caption")  # beside photos
# A photo within a conversation, as Qwen-VL's, Transformers' and OpenAI's forms have it.
SHOWN = re.compile(r"(?<=<img>)[^<]+(?=</img>)|(?<='image': ')[^']+|(?<='url': ')(?!data:)[^']+")
LONG = 2**25  # bytes of captions, which take some ten seconds to read
QUESTION = "asks a question: --tasks questions --questions_file FILE learns from it"
OBJECT = 'write {"image": "photo.jpg", "caption": "A caption"}'
ROW = "write photo.jpg,A caption"
# How zips, which spreadsheets are, begin, and older spreadsheets, and what gzip or 7z packed.
OTHER_KINDS = (b"PK\3\4", b"\xd0\xcf\x11\xe0", b"\x1f\x8b", b"7z\xbc\xaf")
# A number or a date, an address or packed bytes, or a split: of another column than captions'.
NO_CAPTION = re.compile(rf"\d[\d.:/ -]*|[!-~]{{25,}}|{SPLIT_WORD.pattern}", re.IGNORECASE)
NUMBER_KEYS = ("comment_number", "caption_number")
LINE_END = re.compile("\r\n|\r|\n")  # and no others: some stand within captions
BARE = re.compile(r"[\w./-]+")  # a photo's name without its suffix, where a header says it is one
# Flickr30k's results.csv has one row without its last delimiter:
# `2199200615.jpg| 4   A dog runs across the grass .`
MISSING_DELIMITER = re.compile(r"^(2199200615\.jpg\| 4)(?= )", re.M)


def may_list(path: PurePath) -> bool:
    """May it be a list of captions, by its name?"""
    text = path.suffix.lower() == ".txt" and re.search("caption|description", path.name.lower())
    return bool(text) or path.suffix.lower() in LISTS or path.name in TABLES


@dataclass
class Captions:
    """What a file holds, and what was passed over in it, and why."""

    form: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    mended: int = 0  # captions with half an emoji, `&amp;` or marks, which is replaced
    older: int = 0  # files in another encoding than UTF-8
    splits: dict[str, str] = field(default_factory=dict)  # of photos, where the file says them
    mixed: int = 0  # captions of another split than the first that their photo is said to be of
    links: list[Path] = field(default_factory=list)  # texts that lie outside their folder

    def add(self, name: str, captions: Iterable[str], where: object, split: object = "") -> None:
        """Add a photo's captions, texts or lists of them; the name is relative to its folder."""
        if SURROGATES.search(name) or "\0" in name or len(name) > LONGEST:
            self.passed.append(f"{where}: {ascii(name)} can't be the name of a photo")
            return
        name = name_within(where, name)
        if split := split_in(split):
            self.mixed += self.splits.setdefault(name, split) != split
        texts = [*captions] or [""]
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"{where}: {name!r} has a caption that is no text: {odd[0]!r}")
        for text in (text for cell in texts for text in listed(cell) or [""]):
            whole = unescaped(SURROGATES.sub("\ufffd", text))
            self.mended += whole != text
            if has_word(whole):
                self.texts.setdefault(name, []).append(whole.strip())
            else:
                self.passed.append(f"{where}: the caption {text!r} of {name!r} has no word")

    def drop_nothing(self, where: object) -> None:
        """Pass over what programs write where there is no caption."""
        empty = [name for name, texts in self.texts.items() if {*texts} & {*NOTHING}]
        for name in empty if len(empty) > 1 else ():  # one photo's may be somebody's caption
            none = [text for text in self.texts[name] if text in NOTHING]
            self.texts[name] = [text for text in self.texts[name] if text not in NOTHING]
            self.passed.append(f"{where}: of {name!r} {none} are a program's words for none")
        self.texts = {name: texts for name, texts in self.texts.items() if texts}

    def name_of(self, where: str, said: Any, usage: str, bare: bool, strict: bool = True) -> str:
        """The photo's name in a cell or value; nothing where it is passed over. A `bare` one may
        lack its suffix; what is no name is refused if `strict`."""
        name = plain_name(said) if isinstance(said, str) else said
        unread = is_unread(name)
        bare = bare and isinstance(name, str | int) and bool(BARE.fullmatch(str(name)))
        several = re.split("[,;|]", str(said))  # as shops have all of a product in a cell
        if several[1:] and all(is_photo(plain_name(each)) for each in several):
            self.passed.append(f"{where} shows {len(several)} photos, not one")
            return ""
        if is_photo(str(name)) or (bare and not unread):
            return str(name)
        why = "can't be read: make it a JPEG" if unread else "is not the name of a photo"
        why += " (below a merged cell, write the name in each row)" * (name == "")
        # Flickr8k.token.txt has five rows of a "photo.jpg.1" that is in no archive.
        if strict and not unread and "#" not in str(said):
            raise UserError(f"{where}: {name!r} {why}: {usage}")
        self.passed.append(f"{where}: {name!r} {why}")
        return ""

    def tell(self, source: object) -> None:
        """Say what was read and what was not."""
        texts = [*itertools.chain(*self.texts.values())]
        count = len(texts)
        print(f"{source} is {self.form}: {count:,} captions of {len(self.texts):,} photos")
        if count > 3 * len(self.texts) and all(t.isascii() and " " not in t for t in texts):
            print("  every caption is one word: if they are the words of one, join them by spaces")
        if self.mended:
            print(f"  mended: {self.mended:,} captions that held half a character, HTML or marks")
        if self.older:
            sample = next((text for text in texts if not text.isascii()), "")
            print(f"  not UTF-8: {self.older:,} read in Windows' Western encoding ({sample!r});")
            print("  if it is another, convert what was read by iconv -f ENCODING -t UTF-8")
        if self.mixed:
            print(f"  {self.mixed:,} captions are of another split than their photo's first, which")
            print("  counts for all of them: splits are by photo")
        for line in self.passed[:10]:
            print(f"  passed over: {brief(line)}")
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


def read_captions(path: Path, folder: Path | None = None) -> Captions:
    """Read captions in any form that is known; what is refused is said with its line. A table
    without a header may call the photos of a `folder` without their suffix."""
    try:
        kind, content = read_file(path)
        read = {"table": _read_table, "JSON": _read_json}.get(kind)
        found = read(path, content, folder) if read else _read_objects(content, kind, folder)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: write {PLAIN}") from None
    found.drop_nothing(path)
    found.older = is_older(path)
    return found


def is_older(path: Path) -> bool:
    """Is a text in Windows' older encoding, as it can be read and is not Unicode?"""
    try:
        return path.suffix != ".parquet" and not decoded(path.read_bytes(), older=False)
    except UnicodeDecodeError:
        return True


def read_file(path: Path) -> tuple[str, Any]:
    """The kind of a file, and its JSON value, or its lines as `(where, line)`."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, no file")  # to read it may never end
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > LONG:
            print(f"reading {path} ({size_text(size)})", flush=True)
        start = file.read(64)
        if start.startswith(OTHER_KINDS):
            raise UserError(f"{path} is a spreadsheet, or packed: save its captions as CSV or JSON")
        if note := lfs_note(path):
            raise UserError(f"{path} is no text{note}")
        if start.startswith(b"PAR1"):
            return "JSON", parquet_rows(path)
    if path.suffix.lower() == ".json":
        try:
            return "JSON", _rows_named(read_json(path, older=True))
        except UserError as error:
            if "Extra data: line 2 column 1 " not in str(error):  # what JSON lines begin with
                raise
    text = LINE_END.sub("\n", read_text(path, older=True))
    text = re.sub(r"\Asep=.\n", "\n", text)  # which Excel begins with
    text = MISSING_DELIMITER.sub(r"\1|", text)
    lines = enumerate(text.split("\n"), 1)
    full = ((f"{path}, line {n}", row) for n, row in lines if row.strip(" \t,;|\x1a"))
    rows = [*itertools.dropwhile(lambda row: is_comment(row[1]), full)]
    if not rows:
        raise UserError(f"{path} is empty: it needs rows like photo.jpg,A caption")
    first = rows[0][1].lstrip()
    if path.suffix.lower() in JSON_LINES or first.startswith("{"):
        if first.strip() in ("{", "[") or first.startswith("[{"):  # an object over several lines
            return "JSON", _rows_named(read_json(path, older=True))
        return "JSON lines", rows
    return "table", rows


# --- JSON -----------------------------------------------------------------------------------


def _rows_named(table: Any) -> Any:
    """Rows below the names of their columns, as pandas and Weights & Biases write them, as
    objects; any other JSON value as it is."""
    with contextlib.suppress(TypeError, KeyError, ValueError):  # a slice, as objects have none
        return [dict(zip(table["columns"], row[:], strict=True)) for row in table["data"]]
    return table


def _read_json(path: Path, table: Any, folder: Path | None) -> Captions:
    """One JSON value for all photos."""
    if isinstance(table, list):
        entries = [(f"{path}, entry {n}", entry) for n, entry in enumerate(table, 1)]
        return _read_objects(entries, "a list of objects", folder)
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} holds no captions: write {PLAIN}")
    by_split = table.keys() & {*SPLITS, *OTHER_SPLITS}
    if len(by_split) in (len(table), 2, 3):
        others = ", ".join(name for name in table if name not in by_split)
        form = "captions by split" + f", of which {brief(others)} are ignored" * bool(others)
        return merged(form, {s: _read_json(path, table[s], folder) for s in table if s in by_split})
    images, annotations = table.get("images"), table.get("annotations")
    try:
        if isinstance(images, list) and isinstance(annotations, list):
            return _read_coco(path, images, annotations)
        if isinstance(images, list) and any("sentences" in image for image in images):
            return _read_karpathy(path, images)
        objects = _objects(table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is in no form of captions that is known ({error!r})") from None
    if objects is not None:
        return _read_json(path, objects, folder)
    found = Captions("a table of photos")
    for name, said in table.items():
        texts = texts_of(said)
        if texts and (is_photo(name) or isinstance(said, str | list | dict)):
            found.add(name, texts, path, split_told(said))
        else:  # or it is the file's version
            found.passed.append(f"{path}: {name!r} needs a list of at least one caption: {PLAIN}")
    keys = dict.fromkeys(key for said in table.values() if isinstance(said, dict) for key in said)
    others = [key for key in keys if plain_key(key) not in (*CAPTION_KEYS, *SPLIT_KEYS)]
    others = [key for key in others if not LIKE_CAPTIONS.fullmatch(plain_key(key))]
    found.form += f", of which {brief(', '.join(others))} are ignored" if others else ""
    return found


def _objects(table: dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any] | None:
    """Photos' objects that stand below a key, by their index, alone, or as columns; or a table."""

    def names_photo(entry: Any) -> bool:
        said = [photo_in(entry), *entry.values()] if isinstance(entry, dict) else []
        return any(isinstance(each, str) and is_photo(each) for each in said)

    values = [*table.values()]
    entries = table.get("images") or table.get("data", table.get("annotations"))
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        return entries  # `data` as TextCaps has it
    lists = [[*v.values()] if isinstance(v, dict) else v for v in values]  # VIA's are by an id
    lists = [v for v in lists if isinstance(v, list) and v and all(map(names_photo, v))]
    if len(lists) in (1, len(values)) and not any(map(is_photo, table)):
        return [*itertools.chain(*lists)]  # one, or those of kinds of scenes, as NWPU has them
    tables = [v for v in values if isinstance(v, dict) and v and all(map(is_photo, v))]
    if len(tables) == 1 and not any(map(is_photo, table)):
        return tables[0]

    keys = [{*map(plain_key, v)} if isinstance(v, dict) else set() for v in values]
    like = [{*filter(LIKE_CAPTIONS.fullmatch, each)} for each in keys]
    # Several captions of which none is a usual one, that all photos may have one key's.
    told = not set().union(*keys) & ({*CAPTION_KEYS} - {*ASIDE}) and max(map(len, like)) > 1
    told = told and all(like) and all(is_photo(key) or BARE.fullmatch(key) for key in table)
    # By pandas' index, or by a photo, with captions that are numbered?
    if told or all(any(k in NAME_KEYS or NUMBERED.fullmatch(k) for k in each) for each in keys):
        return [{"image_id": key} | value for key, value in table.items()]
    if not (set(table) & {*CAPTION_KEYS} and set(table) & {*NAME_KEYS}):
        lists = [v for v in values if isinstance(v, list) and v and isinstance(v[0], dict)]
        alone = len(lists) == 1 < len(table) and not any(map(is_photo, table))
        return lists[0] if alone else None  # of Pexels' photos, by number
    if any(isinstance(table.get(key), str) for key in NAME_KEYS):
        return [table]
    if any(isinstance(v, dict) for v in values):  # by an index, of which each has its own order
        index = dict.fromkeys(itertools.chain(*values))
        return [{name: column[at] for name, column in table.items()} for at in index]
    return [dict(zip(table, row, strict=True)) for row in zip(*values, strict=True)]


def merged(form: str, parts: Mapping[Any, Captions]) -> Captions:
    """The captions of several files or parts; what each is called may tell its photos' split."""
    found = Captions(form)
    for called, part in parts.items():
        split = split_in(called)
        for photo, texts in part.texts.items():
            found.texts.setdefault(photo, []).extend(texts)
            if told := part.splits.get(photo, split):
                found.mixed += len(texts) * (found.splits.setdefault(photo, told) != told)
        found.mixed += part.mixed
        found.passed += part.passed
        found.links += part.links
        found.mended += part.mended
        found.older += part.older
    return found


def _read_coco(path: Path, images: list[dict], annotations: list[dict]) -> Captions:
    keys = [key for key in NAME_KEYS if key not in IDS]
    names = {
        str(image["id"]): next((image[k] for k in keys if k in image), None) or image["file_name"]
        for image in images
    }
    splits = {str(image["id"]): split_told(image) for image in images}
    found = Captions("COCO's captions" + languages_in(annotations))
    for entry in annotations:
        name = names.get(number := str(entry.get("image_id")))
        if entry.get("is_rejected") or entry.get("is_precanned"):  # as VizWiz marks what is none
            found.passed.append(f"annotation {entry.get('id')}: marked as no caption of the photo")
        elif isinstance(name, str):
            split = split_told(entry) or splits[number]
            found.add(name, map(str, texts_of(entry)), path, split)
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


def read_objects(entries: Sequence[Entry], usage: str) -> list[tuple[str, dict[str, Any]]]:
    """JSON objects, one a line or in a list, with their keys in lower case."""
    rows = []
    for where, entry in entries:
        try:
            row = json.loads(entry) if isinstance(entry, str) else entry
            if isinstance(row, list) and len(row) > 1:
                row = {"image": row[0], "captions": row[1:]}
            elif len(row) == 1 and is_photo(str(name := next(iter(row)))):  # {"1.jpg": ...}
                row = {"image": name, "captions": row[name]}
            if isinstance(row.get("data"), dict):
                row = as_labelled(row)
            row = as_asked({plain_key(key): value for key, value in row.items()})
            shown = [each for talk in TALKS for each in SHOWN.findall(str(row.get(talk)))]
            row = ({"image": shown[0]} if len(shown) == 1 else {}) | row
            rows += [(where, each) for each in pairs_in(row)]
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            raise UserError(f"{where} names no photo and caption: {usage}") from None
    return rows


def pairs_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each photo and its caption where several are numbered alike, `image_1` with
    `caption_1` and so on, as a task of Mechanical Turk has them; or the row itself."""
    photos, captions = {}, {}
    for key in (key for key in row if key[-1:].isdigit()):  # few are, of millions of rows
        stem, number = re.fullmatch(r"(?s)(.*?)_?(\d*)", key).groups()
        if number and stem in NAME_KEYS:
            photos[number] = key
        elif NUMBERED.fullmatch(key):
            captions[number] = key
    if len(photos) < 2 or photos.keys() != captions.keys():
        return [row]
    rest = {k: v for k, v in row.items() if k not in (*photos.values(), *captions.values())}
    shown = [number for number, key in photos.items() if row[key] or row[captions[number]]]
    return [rest | {"image": row[photos[n]], "caption": row[captions[n]]} for n in shown]


def _read_objects(entries: Sequence[Entry], form: str, folder: Path | None) -> Captions:
    """JSON objects, one a line or in a list, each with a photo and its captions."""
    rows = read_objects(entries, OBJECT)
    objects = [row for _, row in rows]
    keys = [*dict.fromkeys(key for row in objects for key in row)]
    photos, captions, split = choose_columns(keys, objects, folder)
    talk = {*captions} & {*TALKS} and not is_photo(str(rows[0][1].get("id")))
    # Where others name photos, or there are conversations, an object's number is not a photo's.
    photos = [key for n, key in enumerate(photos) if key != "id" or not (n or talk)]
    columns = caption_columns(keys, captions)
    others = [key for key in keys if key and key not in (*photos[:1], *columns, split)]
    form += f", of which {', '.join(others)} are ignored" if others else ""
    found = Captions(form + languages_in(objects, columns))
    for where, row in rows:
        photo = next((key for key in photos if key in row), None)
        told = [row[key] for key in (*columns, *captions, *ASIDE) if key in row]
        shown = photo_in(row.get(photo))
        if row.get("question") and not told:
            found.passed.append(f"{where} {QUESTION}")
        elif is_rejected(row):
            found.passed.append(f"{where} was rejected")
        elif photo is None and any(row.get(talk) for talk in TALKS):
            found.passed.append(f"{where} shows no photo")
        elif photo is None or not told:
            keys = ", ".join([*row][:9])
            raise UserError(f"{where} names no photo and caption, with {keys}: {OBJECT}")
        elif isinstance(shown, list):  # as reports have that are about two X-rays
            found.passed.append(f"{where} shows {len(shown)} photos, not one")
        elif name := found.name_of(where, shown, OBJECT, isinstance(shown, str) or photo in IDS):
            texts = texts_of([row[key] for key in columns if row.get(key)])
            texts = texts or texts_of(next(filter(None, map(row.get, captions)), None))
            odd = next((each for each in told if each and isinstance(each, list | dict)), None)
            if texts or odd is None:
                found.add(name, texts, where, row.get(split))
            else:
                why = QUESTION if talk_in(odd) else f"has no caption in {brief(str(odd))}"
                found.passed.append(f"{where} {why}")
    return found


# --- Tables ---------------------------------------------------------------------------------


def _read_table(path: Path, lines: list[tuple[str, str]], folder: Path | None) -> Captions:
    """A table: one row a line, `name, caption` or `name, number, caption` or `caption, name`, or as
    its header says.

    The delimiter is a comma, `|`, `;` or a tab, the one that comes first in the first row. Fields
    may be quoted, and hold line ends then; a delimiter within an unquoted caption belongs to it; a
    `#0` after a name is left out. One malformed row is known and mended: Flickr30k's.
    """
    table = table_of(lines, folder)
    if len(pairs_in(dict.fromkeys(table.names, "filled"))) > 1:
        table.drop_header()
        rows = table.objects(table.names)
        return _read_objects(rows, "a table of photos numbered as their captions", folder)
    rows = [*map(table.cells, table.rows[1:])]
    photos, told, split = choose_columns(table.names, rows, folder)
    captions = caption_columns(table.names, told)
    instead = [key for key in told if key in CAPTION_KEYS and key not in (*captions, "text")]
    table.headed = bool(photos and captions)
    shown = [is_photo(plain_name(value)) for value, _ in table.rows[0][1]]
    begun = not captions and any(shown)
    if table.headed:
        table.drop_header()
    elif begun or (folder and is_there(plain_name(table.rows[0][1][0][0]), folder)):
        numbered = len(table.names) > 2 and table.names[1].isdigit() and table.delimiter in ",|;\t"
        table.names = ["image", *NUMBER_KEYS[:numbered], "caption"]
        if shown[-1] and not (shown[0] or NO_CAPTION.fullmatch(table.rows[0][1][0][0])):
            table.names = ["caption", "image"]
        photos, captions, instead, split = ["image"], ["caption"], [], None
    else:
        what, usual = ("captions", CAPTION_KEYS) if photos else ("photos", NAME_KEYS)
        names = brief(", ".join(filter(None, table.names)))  # or a photo in base64
        raise UserError(
            f"{table.rows[0][0]}: of the columns {names} none is known to name {what}: call it "
            f"{usual[0]} ({', '.join(usual[1:12])} are known too), and begin with a row like "
            "image,caption, or like photo.jpg,A caption; or name another file, or a folder of "
            "texts, with --captions_file"
        )
    found = _read_rows(table, photos[0], captions, instead, split, bare=not begun)
    found.form += languages_in(rows) if table.headed else ""
    if not found.texts:
        why = "".join(f": {line}" for line in found.passed[:1])
        raise UserError(f"{path} has no rows like photo.jpg,A caption{why}")
    return found


def has_labels(table: Table, column: int) -> bool:
    """Is what stands in a column of captions, or at the end of it, in all rows one word, or one of
    few, beside a text of thrice its length: a label, a language, or whose caption it is?"""
    cells = [row[column : column + 1 + len(row) - len(table.names)] for _, row in table.rows]
    if table.delimiter not in ",;|\t" or min(map(len, cells)) < 2:
        return False
    for label, text, end in ((0, 1, 1), (-1, -2, -1)):
        said = [row[label][0] for row in cells]
        few = len({*said}) <= len(said) / 3 or not any(re.search(r"\s", each) for each in said)
        longer = sum(len(row[text][0]) for row in cells) > 3 * sum(map(len, said))
        if few and longer and not any(row[end][1].startswith(" ") for row in cells):
            return True
    return False


def _read_rows(
    table: Table,
    photo: str,
    captions: Sequence[str],
    instead: Sequence[str],
    split: str | None,
    bare: bool,
) -> Captions:
    """Rows of these columns, and where captions are blank of one `instead`; where there are more
    than photo and caption, what lacks one is passed over, and refused otherwise.

    Without a header the last column may hold several captions, by tabs or each in quotes. Names
    may be `bare` of their suffix.
    """
    last = table.names.index(captions[-1])
    others = [name for name in table.names if name and name not in (photo, *captions, split)]
    ignored = [name for name in others if name not in (*NUMBER_KEYS, *instead)]
    columns = f", of which the columns {', '.join(ignored)} are ignored" if ignored else ""
    found = Captions(f"a table{columns}")
    strict = not (ignored or instead) and len(captions) == 1
    labelled = not table.headed and has_labels(table, last)
    ended = table.headed and table.names[-1] in (photo, *captions)  # by what may not be empty
    for where, row in table.rows:
        whole = table.fit(row, last, ended)
        width = len(row) + len(whole) - 1
        if len(whole) > 1 and len(captions) > 1:
            found.passed.append(f"{where} has {width} columns, not {len(row)}")
            continue
        cells = table.cells((where, row))
        if is_rejected(cells):
            found.passed.append(f"{where} was rejected")
            continue
        if not any(cells.values()):  # `"",""`, as a blank line
            continue
        if wrong := [cells[key] for key in others if strict and not cells[key].isdigit()]:
            raise UserError(f"{where}: {wrong[0]!r} is not the number of a caption")
        if name := found.name_of(where, cells[photo], ROW, bare, strict):
            texts = [cells[key] for key in captions if cells[key]]
            texts = texts or [*filter(None, map(cells.get, instead))][:1]
            if len(whole) > 1 and not table.headed:
                apart = table.delimiter == "\t" or all(s.lstrip()[:1] == '"' for _, s in whole)
                texts = [value for value, _ in whole] if apart else texts
                # Quoted, and another column follows; or a row's number before `caption, name`.
                odd = whole[0][0] != whole[0][1].strip() or (last == 0 and whole[0][0].isdigit())
                if labelled or (any(map(NO_CAPTION.fullmatch, texts)) if apart else odd):
                    raise UserError(
                        f"{where} has {width} columns: say which is what in a first row, "
                        f"such as image{table.delimiter}caption"
                    )
            found.add(name, texts, where, cells.get(split))
    return found
