"""Captions in the forms that people have them in: recognised, and read as {photo: captions}.

A form is recognised by what stands in the file, not by its name: COCO's and Karpathy's JSON, a
list or lines of JSON objects, a table with or without a header, or a text beside each photo.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import html
import io
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset import PLAIN, SURROGATES, TEXT_KEYS, check_captions, check_name
from encoder import PHOTO_SUFFIXES
from utils import UserError, decoded, files_in, read_json, read_text, write_file

# Looked for in this order, in DATA_DIR and in the photo folder.
TABLES = (
    "captions.txt results.csv captions.csv captions.tsv captions.jsonl metadata.jsonl metadata.csv "
    "Flickr8k.token.txt results_20130124.token"
).split()
# What a table's header, or an object's keys, call the photo and its caption.
NAME_KEYS = (
    "image image_name file_name filename filepath file_path image_path path image_id".split()
)
CAPTION_KEYS = (
    *TEXT_KEYS,
    *"comment title sentence sentences description raw caption_str reference_strs".split(),
)
NUMBERS = ("image_id", "image_name")  # where an object may have COCO's number, or no suffix
NUMBER_KEYS = ("comment_number", "caption_number")
NUMBERED = re.compile(r"(?:caption|sentence|comment|text)[_ ]?\d+")  # columns: caption_1, ...
LINE_END = re.compile("\r\n|\r|\n")  # and no others: some stand within captions
BARE = re.compile(r"[\w-]+")  # a photo's name without its suffix, where a header says it is one
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

    def add(self, name: str, captions: Iterable[str], where: object) -> None:
        """Add a photo's captions; the name is relative to the photo folder."""
        if SURROGATES.search(name) or "\0" in name:
            self.passed.append(f"{where}: {ascii(name)} can't be the name of a photo")
            return
        name = unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))
        # Where the photo lay on somebody's disk: `match_names` looks for its last part.
        name = re.sub(r"^([A-Za-z]:)?/+(?=[^/])", "", name)
        check_name(where, name)
        for text in itertools.chain.from_iterable(map(_listed, captions)):
            whole = unescaped(SURROGATES.sub("\ufffd", text))
            self.mended += whole != text
            if has_word(whole):
                self.texts.setdefault(name, []).append(whole.strip())
            else:
                self.passed.append(f"{where}: the caption {text!r} of {name!r} has no word")

    def tell(self, source: Path) -> None:
        """Say what was read and what was not."""
        count = sum(map(len, self.texts.values()))
        print(f"{source} is {self.form}: {count:,} captions of {len(self.texts):,} photos")
        if self.mended:
            print(f"  mended: {self.mended:,} captions that held half a character or an HTML one")
        for line in self.passed[:10]:
            print(f"  passed over: {line}")
        if len(self.passed) > 10:
            print(f"  and {len(self.passed) - 10:,} more")


def _listed(text: str) -> list[str]:
    """The captions in a cell that holds a list of them, as JSON, Python or numpy writes it."""
    if not re.match(r"\s*\[\s*['\"]", text):
        return [text]
    commas = re.sub(r"(?<=['\"])\s+(?=['\"])", ",", text.strip())
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            texts = read(text if read is json.loads else commas)
            if all(isinstance(each, str) for each in texts):
                return texts
    return [text]


def unescaped(text: str) -> str:
    """With `&amp;` and the like as what they mean; without its semicolon `&not` is no such sign."""
    return re.sub(r"&#?\w+;", lambda sign: html.unescape(sign[0]), text)


def has_word(text: str) -> bool:
    """Has it a letter, number, mark or symbol? A caption of signs alone is an empty target."""
    return any(unicodedata.category(sign)[0] in "LNMS" for sign in text)


def is_photo(name: str) -> bool:
    return os.path.splitext(name.lower())[1] in PHOTO_SUFFIXES


def find_table(*folders: Path) -> Path | None:
    """The captions table in one of the folders; where there are several, which one is said."""
    found = [folder / name for name in TABLES for folder in folders if (folder / name).is_file()]
    if len(found) > 1:
        others = ", ".join(map(str, found[1:]))
        print(f"captions are read from {found[0]}, not from {others}: --captions_file PATH chooses")
    return found[0] if found else None


def read_captions(path: Path) -> Captions:
    """Read captions in any form that is known; the message of what is refused says the line."""
    if path.suffix.lower() == ".json":
        try:
            return _read_object(path, read_json(path))
        except UserError as error:
            if "Extra data: line 2 column 1 " not in str(error):  # what JSON lines begin with
                raise
    text = LINE_END.sub("\n", read_text(path))
    text = re.sub(r"\Asep=.\n", "\n", text)  # which Excel begins with
    text = MISSING_DELIMITER.sub(r"\1|", text)
    rows = [(n, row) for n, row in enumerate(text.split("\n"), 1) if row.strip(" \t,;|")]
    if not rows:
        raise UserError(f"{path} is empty: it needs rows like photo.jpg,A caption")
    if path.suffix.lower() in (".jsonl", ".ndjson") or rows[0][1].lstrip().startswith("{"):
        return _read_objects(path, ((f"{path}, line {n}", row) for n, row in rows), "JSON lines")
    return _read_rows(path, text, rows)


# --- JSON -----------------------------------------------------------------------------------


def _read_object(path: Path, table: Any) -> Captions:
    """One JSON value for all photos."""
    try:
        if isinstance(table, list):
            named = ((f"{path}, entry {n}", entry) for n, entry in enumerate(table, 1))
            return _read_objects(path, named, "a list of objects")
        images, annotations = table.get("images"), table.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return _read_coco(path, images, annotations)
        if isinstance(images, list):
            return _read_karpathy(path, images)
        if isinstance(entries := table.get("data", annotations), list):  # as TextCaps has them
            return _read_object(path, entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is in no form of captions that is known ({error!r})") from None
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} holds no captions: write {PLAIN}")
    found = Captions("a table of photos")
    for name, texts in table.items():
        if isinstance(texts, dict):  # as kohya's: {"photo.jpg": {"caption": ..., "tags": ...}}
            texts = next((texts[key] for key in CAPTION_KEYS if key in texts), [""])
        texts = [texts] if isinstance(texts, str) else texts
        check_captions(path, name, texts, blank=True)
        found.add(name, texts, path)
    return found


def _read_coco(path: Path, images: list[dict], annotations: list[dict]) -> Captions:
    names = {str(image["id"]): image["file_name"] for image in images}
    found = Captions("COCO's captions")
    for entry in annotations:
        name, text = names.get(str(entry.get("image_id"))), str(entry.get("caption") or "")
        if name is None or not text.strip():
            found.passed.append(f"annotation {entry.get('id')}: no such image, or no caption")
        else:
            found.add(name, [text], path)
    return found


def _read_karpathy(path: Path, images: list[dict]) -> Captions:
    found = Captions("Karpathy's captions and split")
    for image in images:
        folder, name = image.get("filepath"), image["filename"]
        sentences = image.get("sentences") or []
        texts = [each.get("raw") or " ".join(each.get("tokens") or []) for each in sentences]
        if any(texts):
            found.add(f"{folder}/{name}" if folder else name, texts, path)
        else:
            found.passed.append(f"{name}: it has no sentence")
    return found


def _read_objects(path: Path, entries: Iterable[tuple[str, Any]], form: str) -> Captions:
    """JSON objects, one a line or in a list, each with a photo and its captions."""
    usage = 'write {"image": "photo.jpg", "caption": "A caption"}'
    found = Captions(form)
    for where, entry in entries:
        try:
            row = json.loads(entry) if isinstance(entry, str) else entry
            row = {key.lower(): value for key, value in row.items()}
            key = next(key for key in NAME_KEYS if key in row)
            name, texts = row[key], next(row[key] for key in CAPTION_KEYS if key in row)
        except (ValueError, TypeError, AttributeError, RecursionError, StopIteration):
            raise UserError(f"{where} names no photo and caption: {usage}") from None
        texts = [texts or ""] if isinstance(texts, str | None) else texts
        if key in NUMBERS and isinstance(name, str | int) and BARE.fullmatch(str(name)):
            name = str(name)
        elif not isinstance(name, str) or not is_photo(name):
            raise UserError(f"{where}: {name!r} is not the name of a photo: {usage}")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {name!r} has a caption that is no text: {usage}")
        found.add(name, texts, where)
    return found


# --- Tables ---------------------------------------------------------------------------------


def caption_columns(names: Sequence[str]) -> list[int]:
    """Which of these columns hold captions: one with a usual name, or those that are numbered."""
    usual = [i for key in CAPTION_KEYS for i, name in enumerate(names) if name == key][:1]
    return usual or [i for i, name in enumerate(names) if NUMBERED.fullmatch(name)]


def _read_rows(path: Path, text: str, rows: list[tuple[int, str]]) -> Captions:
    """A table: one row a line, `name, caption` or `name, number, caption`, or as its header says.

    The delimiter is a comma, `|`, `;` or a tab, the one that comes first in the first row. Fields
    may be quoted; a delimiter within an unquoted caption that comes last belongs to it; a `#0`
    after a name is left out. One malformed row is known and mended: Flickr30k's.
    """
    number, first = rows[0]
    delimiter = next((mark for mark in first if mark in ",|\t;"), ",")
    if (words := re.match(r"([^\s,|;]+) +[^\s,|;]", first)) and is_photo(_plain(words[1])):
        delimiter = " "  # where tabs were lost
    try:
        names = next(csv.reader([first], delimiter=delimiter))
        names = [re.sub("[ -]+", "_", name.strip().lower()) for name in names]
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    photo = next((i for key in NAME_KEYS for i, name in enumerate(names) if name == key), None)
    captions = caption_columns(names)
    if photo is None and not captions and any(is_photo(_plain(name)) for name in names):
        start, second = 0, _field(_field(first, delimiter)[1], delimiter)
        numbered = second[0].isdigit() and second[1] != "" and delimiter != " "
    elif photo is None or not captions:
        raise UserError(
            f"{path}, line {number}: no column is known to name "
            f"{'photos' if photo is None else 'captions'}: call them {', '.join(NAME_KEYS)} and "
            f"{', '.join(CAPTION_KEYS)}, or begin with a row like photo.jpg,A caption"
        )
    elif (photo, captions) == (0, [len(names) - 1]) and set(names[1:-1]) <= set(NUMBER_KEYS):
        start, numbered = 1, len(names) == 3
    else:
        return _read_columns(path, text, delimiter, names, photo, captions)
    found = Captions("a table")
    for number, row in rows[start:]:
        where = f"{path}, line {number}"
        name, text = _read_row(where, row, delimiter, numbered, start == 1, found.passed)
        if name:
            found.add(name, [text], where)
    if not found.texts:
        why = "".join(f": {line}" for line in found.passed[:1])
        raise UserError(f"{path} has no rows like photo.jpg,A caption{why}")
    return found


def _read_columns(
    path: Path, text: str, delimiter: str, names: list[str], photo: int, captions: list[int]
) -> Captions:
    """A table of more columns than photo and caption; quoted fields may hold line ends."""
    others = [n for i, n in enumerate(names) if n and i != photo and i not in captions]
    ignored = f", of which the columns {', '.join(others)} are ignored" if others else ""
    found = Captions(f"a table{ignored}")
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        next(row for row in reader if row)
        for row in filter(any, reader):
            where, more = f"{path}, line {reader.line_num}", len(row) - len(names)
            if more > 0:  # delimiters within a caption that isn't quoted
                end = captions[-1] + more + 1
                row[captions[-1] : end] = [delimiter.join(row[captions[-1] : end])]
            row += [""] * -more
            texts = [row[place] for place in captions if row[place].strip()]
            name = _plain(row[photo])
            if not is_photo(name) and not BARE.fullmatch(name):
                found.passed.append(f"{where}: {name!r} is not the name of a photo")
            elif not texts:
                found.passed.append(f"{where}: {name!r} has no caption")
            else:
                found.add(name, texts, where)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    if not found.texts:
        raise UserError(f"{path} has no row with a photo and a caption: {found.passed[:3]}")
    return found


def _plain(name: str) -> str:
    """A photo's name without the number of its caption: `photo.jpg#0`."""
    return re.sub(r"(#\w+)+$", "", name.strip())


def _field(text: str, delimiter: str) -> tuple[str, str]:
    """The first field of a row, and what comes after its delimiter."""
    quoted = re.match(rf'\s*"((?:[^"]|"")*)"[ \r]*(?:{re.escape(delimiter)}|$)', text)
    if quoted:
        return quoted[1].replace('""', '"').strip(), text[quoted.end() :]
    name, _, rest = text.partition(delimiter)
    return name.strip(), rest


def _read_row(
    where: str, line: str, delimiter: str, numbered: bool, headed: bool, passed: list[str]
) -> tuple[str, str]:
    name, caption = _field(line, delimiter)
    counted, name = "#" in name, _plain(name)
    if not is_photo(name) and not (headed and BARE.fullmatch(name)):
        if counted:  # Flickr8k.token.txt has five rows of a "photo.jpg.1" that is in no archive
            passed.append(f"{where}: {name!r} is not the name of a photo")
            return "", ""
        raise UserError(f"{where}: {name!r} is not the name of a photo: write photo.jpg,A caption")
    if numbered:
        number, caption = _field(caption, delimiter)
        if not number.isdigit():
            raise UserError(f"{where}: {number!r} is not the number of a caption")
    caption = caption.strip()
    if quoted := re.fullmatch(r'"((?:[^"]|"")*)"', caption):
        caption = quoted[1].replace('""', '"').strip()
    elif caption.startswith('"') and caption.count('"') % 2:
        raise UserError(f"{where}: a quoted caption isn't closed on its line: join the lines")
    caption = caption or EMPTY_IN_THE_WILD.get(name, "")
    return name, caption


# --- Texts beside photos, and names of photos --------------------------------------------------


def photos_in(folder: Path) -> list[str]:
    """The names of the photos in a folder and those below."""
    # A name in another encoding than UTF-8 can't stand in a JSON file.
    return [name for name in files_in(folder) if is_photo(name) and not SURROGATES.search(name)]


def read_texts_beside(folder: Path, place: Path | None = None) -> Captions:
    """The captions, one a line, in `photo.txt` (or `.caption`) beside `photo.jpg` or in `place`."""
    found = Captions("a text beside each photo")
    for name in photos_in(folder):
        photo = (place or folder) / name
        ends = (".txt", f"{photo.suffix}.txt", ".caption", ".TXT")
        if file := next((f for end in ends if os.path.isfile(f := photo.with_suffix(end))), None):
            text = decoded(file.read_bytes())
            if lines := [line for line in LINE_END.split(text) if line.strip()]:
                found.add(name, lines, file)
                continue
        found.passed.append(f"{folder / name}: no text beside it")
    return found


def read_nested(folder: Path) -> Captions:
    """The captions of `metadata.jsonl` or `.csv` in sub-folders, as image folders with splits have
    them; names are relative to each one's own."""
    merged = Captions("image folders with their metadata")
    for table in sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")]):
        found, place = read_captions(table), table.parent.relative_to(folder)
        merged.texts |= {str(place / name): texts for name, texts in found.texts.items()}
        merged.passed += found.passed
        merged.mended += found.mended
    return merged


def match_names(texts: dict[str, list[Any]], folder: Path) -> dict[str, list[Any]]:
    """What is said of photos, by the names that they really have in the folder.

    Where a name is not there, tried are, as far as only one photo fits that nothing else names:
    Unicode's other spelling or another case, and another suffix; and, where no name at all is
    there, the name without the first of its folders, without all, and COCO's number.
    """
    if all(os.path.isfile(folder / name) for name in texts):  # of too long a name too
        return texts
    there = photos_in(folder)
    if not there:
        suffixes = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(f"{folder} holds no photo ({suffixes}): choose another with --image_dir")
    real = {name: name for name in texts if os.path.isfile(folder / name)}
    for way in (_spelled, _stem):
        taken = set(real.values())
        free = [name for name in there if name not in taken]
        real |= _alike([name for name in texts if name not in real], free, way)
    # Photos of one name may stand in several folders: where any is there, theirs may be missing.
    real = real or _ending(texts, there)
    real = real or _alike(texts, there, _last) or _alike(texts, there, _numbered)
    if not real:
        raise UserError(
            f"no caption is of a photo that is there: {next(iter(texts))!r} is wanted, and "
            f"{folder} holds {there[0]!r}: correct the names, or choose the folder with --image_dir"
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
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/")


def _stem(name: str) -> str:
    return os.path.splitext(_spelled(name))[0]


def _last(name: str) -> str:
    return os.path.basename(_stem(name))


def _numbered(name: str) -> str:
    """COCO's number of a photo: 42 for `COCO_val2014_000000000042.jpg` and for `000000000042`."""
    number = re.fullmatch(r"(?:coco_\w+_)?0*(\d+)", _last(name))
    return number[1] if number else ""


# --- Questions --------------------------------------------------------------------------------


def convert_vqa(
    questions: Sequence[str],
    annotations: Sequence[str],
    target: Path,
    images: Path | None = None,
) -> None:
    """Write questions.json from VQAv2's pairs of files, with all ten answers of each question.

    Files of that form that other people made may lack all but questions, ids and an answer.
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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{' and '.join(pair)} are no VQA pair ({error!r} is off)") from None
    if images and images.is_dir():
        table = match_names(table, images)
    write_file(target, json.dumps(table))
    print(f"wrote {sum(map(len, table.values())):,} questions to {target}")


def _add_vqa(asked: Any, answered: Any, table: dict[str, list[dict[str, Any]]]) -> None:
    subtype = asked.get("data_subtype") or answered.get("data_subtype")
    stem = f"COCO_{subtype}_" if subtype else ""  # COCO's name: COCO_val2014_000000000042.jpg
    texts = {str(e["question_id"]): str(e["question"] or "") for e in asked["questions"]}
    passed = 0
    for entry in answered["annotations"]:
        people = entry.get("answers") or []
        answers = [str(given["answer"] if isinstance(given, dict) else given) for given in people]
        own = [entry.get(key) for key in ("multiple_choice_answer", "answer")]
        answer = next((str(text) for text in own if text not in (None, "")), "")
        question = texts.get(str(entry["question_id"]), "")
        common = max(answers, key=answers.count, default="")
        if not question.strip() or not (answer or common).strip():
            passed += 1
            continue
        number = str(entry["image_id"])
        name = f"{stem}{int(number):012d}.jpg" if number.isdigit() else number
        row = {"question": question, "answer": answer, "answers": answers}
        table.setdefault(name, []).append(row | {"type": str(entry.get("question_type") or "")})
    if passed:
        print(f"  passed over: {passed:,} annotations without a question or an answer")
