"""Where the captions of a data set are, and captions.json, which is made of them.

A table of a usual name counts first, then Karpathy's file, texts beside the photos, and whatever
else in DATA_DIR can be read; what is made of them knows what from, and is made anew when that
changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from captions_file import (
    LINE_END,
    TABLES,
    TEXT_SUFFIXES,
    Captions,
    is_older,
    may_list,
    merged,
    read_captions,
)
from dataset import PLAIN, SPLIT_WORD, WRITTEN, DataPaths, apart, converted_file, place_of
from photo_names import are_meant, ends_of, find_names, is_photo, match_names, photos_in
from texts import CAPTION_KEYS, plain_key, texts_of
from utils import (
    UserError,
    brief,
    changed_at,
    files_in,
    leads_out,
    preparing,
    read_json,
    read_text,
    uncollected,
    write_changed,
)

OURS = "captions.json questions.json splits.json vocab.json merges.txt prepared.json".split()
TAKEOUT = ".supplemental-metadata"  # .json, beside a photo.jpg, or before 2024 .json alone
DEPTH = 4  # of folders, in which lists of captions are looked for
CAPTION_KEY = f'"({"|".join(CAPTION_KEYS)})"'  # in a file that is JSON
KARPATHY_FILES = "dataset_*.json"
# A line of boxes, as YOLO, DOTA, KITTI and ICDAR label them: four numbers after a word at most.
BOX = re.compile(r"(\S+ )?(-?(\d+(\.\d*)?|\.\d+)[ ,]){4}")
# What a page for Stable Diffusion adds to the prompt, in a text beside the picture made from it.
PARAMETERS = re.compile(r"Negative prompt: |Steps: \d+, ")


def find_captions(
    settings: SimpleNamespace, paths: DataPaths, changed: list[Path], made_of: str = ""
) -> tuple[list[Path], Captions]:
    """Read the captions that are there, from the first place that has any, in whatever form: a
    file, a folder, or files that are parts of one.

    captions.json counts no more where what it was made of has `changed`, which is read again; where
    it is as we made it, `made_of` says of what, and its texts need no mending.
    """
    usual = paths.data_dir / "captions.json"
    if settings.CAPTIONS_FILE:
        source = Path(settings.CAPTIONS_FILE).expanduser()
        if source.is_dir():
            found, inside = read_texts_beside(paths.images, source), source / "captions.json"
            if not found.texts and inside.is_file():
                found = read_captions(inside)
            elif not found.texts:
                found = read_parts(replace(paths, data_dir=source))[1]
            return [source], found
        if not source.is_file():
            raise UserError(f"CAPTIONS_FILE {source} is not there")
        return [source], read_captions(source, paths.images)
    if changed:
        print(f"{', '.join(map(str, changed))} has changed: captions.json is made anew")
        if (found := read_again(paths, changed)).texts:
            return changed, found
    table, *others = find_tables(paths.data_dir, paths.images) or [None]
    if usual.exists() and not changed:
        places, made = made_of.split("\n"), usual.stat().st_mtime
        lists = [table] if table and place_of(table, paths.data_dir) not in places else []
        if not all((paths.data_dir / place).exists() for place in places):  # renamed, perhaps
            lists += [paths.data_dir / name for name in lists_in(paths.data_dir)]
        if newer := [file for file in lists if changed_at(file) > made]:
            remedy = f"--captions_file {shlex.quote(str(newer[0]))} takes the former"
            print(f"{newer[0]} is newer than {usual}, which is used: {remedy}")
        elif table and getattr(settings, "check", False):
            read_captions(table, paths.images).tell(table)
        if late := late_parts(paths.data_dir, places, made):
            remedy = f"rm {shlex.quote(str(usual))} has all read"
            print(f"{usual} was made before {', '.join(late)} came: {remedy}")
        return [usual], Captions("", read_json(usual)) if made_of else read_captions(usual)
    if table:
        names = files_in(paths.data_dir, recursive=False)
        alike = lists_in(paths.data_dir, [name for name in names if name.startswith("caption")])
        alike = [paths.data_dir / name for name in alike]
        others += [file for file in alike if file not in (table, *others)]
        if others:
            told = f"not from {', '.join(map(str, others))}: --captions_file PATH chooses"
            print(f"captions are read from {table}, {told}")
        return [table], read_captions(table, paths.images)
    given = [Path(settings.KARPATHY_FILE).expanduser()] if settings.KARPATHY_FILE else []
    files = [*given, *sorted(paths.data_dir.glob(KARPATHY_FILES))]
    files = [file for file in files if in_karpathys_form(file, CAPTION_KEY)]
    for file in files if given or len(files) == 1 else ():  # or else it shows which are meant
        if (found := read_captions(file)).texts:
            return [file], found
    if (found := read_folder(paths.images)).texts:
        return [paths.images], found
    return read_parts(paths)


def read_again(paths: DataPaths, sources: Iterable[Path]) -> Captions:
    """Read the captions of these places alone, though another may come first by now, such as what
    inference.py wrote about the photos."""
    parts: dict[str, Captions] = {}
    for place in sources:
        if place.is_file():
            parts[place_of(place, paths.data_dir)] = read_own(place, paths.images)
        elif place.samefile(paths.images):
            parts[""] = read_folder(place)
        else:
            parts[place_of(place, paths.data_dir)] = read_texts_beside(paths.images, place)
    return joined(parts, paths.images)


def joined(parts: Mapping[str, Captions], folder: Path) -> Captions:
    """The captions of one place, or of several, of which each may lack the others' texts."""
    found = merged(next(iter(parts.values())).form + ", in parts" * (len(parts) > 1), parts)
    elsewhere = {without_text(folder / name) for name in found.texts}
    found.passed = [line for line in dict.fromkeys(found.passed) if line not in elsewhere]
    return found


def read_parts(paths: DataPaths) -> tuple[list[Path], Captions]:
    """Read the only file with captions in DATA_DIR, or those that are parts of one."""
    others, refused = find_others(paths)
    places = [paths.data_dir / name for name in others]
    photos = Counter(name for found in others.values() for name in found.texts)
    again, count = next(iter(photos.most_common(1)), ("", 0))
    if are_alike(others) and count == 1:  # one, or parts of one
        return places, joined(others, paths.images)
    seen = f" ({refused[0]})" if refused else ""
    if paths.questions.is_file() and not others:
        raise UserError(f"{paths.questions} is there, but no captions: use --tasks questions")
    if others:
        seen = f" (one of {', '.join(map(str, places[:9]))}?)"
        called = Counter(os.path.splitext(os.path.basename(name))[0] for name in photos)
        if count == 1 == max(called.values()):  # each is about photos of its own
            own = f"captions_train{places[0].suffix} or captions_1{places[0].suffix}"
            seen = f"{seen[:-1]}, or several, each renamed like {own})"
        if are_alike(others):
            own = f"move each file into the folder of its photos, if these are {count}"
            seen += f"; {count} of them name {again!r}: {own}"
    raise UserError(
        f"{paths.data_dir / 'captions.json'} is missing: write {PLAIN} there, or put one of "
        f"{', '.join(TABLES)} into {paths.data_dir}, or a photo.txt beside each photo.jpg, or "
        f"name a file with --captions_file{seen}"
    )


def find_tables(*folders: Path) -> list[Path]:
    """The captions tables in the folders, the one that counts first."""
    places = (folder / name for name in TABLES for folder in dict.fromkeys(folders))
    return [place for place in places if place.is_file()]


def karpathy_files(folder: Path) -> list[Path]:
    """The files in Karpathy's form in a folder; data sets' own descriptions have such names too."""
    return [*filter(in_karpathys_form, sorted(folder.glob(KARPATHY_FILES)))]


def in_karpathys_form(file: Path, key: str = "") -> bool:
    """Is it JSON with objects of images, and one of the `key`s? Names by split alone are none."""
    text = file.read_bytes() if file.is_file() else b""
    images = re.search(rb'"images"\s*:\s*\[\s*\{', text)
    return bool(images and re.search(key.encode(), text))


def find_others(paths: DataPaths) -> tuple[dict[str, Captions], list[str]]:
    """What can be read in files of other names, and in folders of texts, by their names in
    DATA_DIR; and why others can't."""
    root, there = paths.data_dir, photos_in(paths.images)
    stems = {stem for name in there for stem in (name, os.path.splitext(name)[0])}  # im.jpg.txt
    ends = {end for stem in stems for end in ends_of(stem)}
    names = names_in(root)

    def read_folders(*ends_of_texts: str) -> dict[str, Captions]:
        folders = set()
        for name in names:
            parts = os.path.splitext(name)[0].split("/")
            depths = [n for n in range(1, DEPTH + 1) if "/".join(parts[n:]) in ends]
            if depths and name.endswith(ends_of_texts):
                folders.add("/".join(parts[: depths[0]]))
        texts = {name: read_texts_beside(paths.images, root / name) for name in sorted(folders)}
        return {name: captions for name, captions in texts.items() if captions.texts}

    told, foreign = [], []

    def read(file: Path) -> Captions | None:
        captions = read_own(file, paths.images)
        if any(map(is_photo, captions.texts)) or find_names(captions.texts, there):
            return captions
        wanted = [f"{file}: no photo is called {name!r}" for name in captions.texts]
        (foreign if wanted else told).extend([*wanted, *captions.passed][:1])

    lists = [name for name in lists_in(root, names) if Path(name).stem not in ends]
    lists, refused = read_lists(root, lists, "caption[^/]*$", read)
    found = read_folders(*TEXT_SUFFIXES) | lists or read_folders(".json")
    if here := {name for name in found if len(found) > 1 and are_meant(found[name].texts, there)}:
        for name in sorted(found.keys() - here):
            print(f"{root / name} is passed over: its photos are not in {paths.images}")
            del found[name]
    unasked = []  # other texts, of which lists of labels and of splits look alike, are only named
    for file in () if found else (root / n for n in names if re.fullmatch(r"[^/]+\.txt", n)):
        with contextlib.suppress(UserError):
            if file.stem not in ends and find_names(read_own(file, paths.images).texts, there):
                unasked.append(f"{file}?")
    if unasked[1:]:  # one alone would leave out the others' photos
        unasked = [", ".join([*unasked, "or several, each renamed like captions_train.txt"])]
    why = [*unasked, *refused.values(), *told, *foreign]
    unread = [n for n in names if not (is_photo(n) or n in OURS)] if not (found or why) else []
    if unread:  # such as captions.xml, captions.csv.gz, or 1.gt.txt beside 1.png
        which = ", ".join(sorted(unread, key=lambda name: name.count("/"))[:5])
        why = [f"in no form that is read, so unpack it or make a table of it: {brief(which)}"]
    return found, why


def read_lists(
    root: Path, names: Iterable[str], likely: str, read: Callable[[Path], Any], near: int = 3
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `read` finds in lists, by their names, and why others can't be read; of copies the first
    counts. Only if those with `likely` names hold nothing, the rest are read, as COCO's take
    minutes, and only then those within `near` folders or more.
    """

    def rank(name: str) -> tuple[bool, int]:
        packed = name.endswith(".parquet")  # often a copy of another
        return name.count("/") >= near, 0 if re.search(likely, name.lower()) else 1 + packed

    found, refused, copies = {}, {}, set()
    for _, group in itertools.groupby(sorted(names, key=rank), rank):
        for name in () if found else group:
            try:
                held = read(root / name)
            except UserError as error:
                refused[name] = str(error)  # the error itself would keep all that was read
                continue
            copy = os.path.basename(name), state_of(root / name)
            if held and copy not in copies:
                found[name] = held
                copies.add(copy)
    return found, refused


def names_in(root: Path) -> list[str]:
    """The files in DATA_DIR that a training hasn't written there, as far as folders tell."""
    return sorted(name for name in files_in(root) if not name.startswith(WRITTEN))


def lists_in(root: Path, names: Sequence[str] | None = None) -> list[str]:
    """Those of the files in DATA_DIR, not far down, that may be lists of captions; of all there, or
    of these `names`."""
    names = names_in(root) if names is None else names
    near = [name for name in names if name.count("/") < DEPTH and name not in OURS]
    paths = [Path(name) for name in near if not name.endswith(".prepared.json")]
    return [str(path) for path in paths if may_list(path)]


def are_alike(files: Iterable[str]) -> bool:
    """Are files, at least one, called alike but for a split and numbers, other than a version's?"""
    called = {SPLIT_WORD.sub("", apart(os.path.basename(name))) for name in files}
    return len({re.sub(r"(?<![^a-z]v)(?<!\d)\d+", "", name) for name in called}) == 1


def late_parts(root: Path, made_of: Sequence[str], made: float) -> list[str]:
    """Lists that came later beside those that captions were `made_of`, and are called alike."""
    parts = {root / name for name in made_of if Path(name).name not in TABLES}
    folders = {part.parent for part in parts if part.is_file()}
    beside = {file for folder in folders for file in folder.iterdir()}
    late = sorted(str(f) for f in beside - parts if may_list(f) and f.stat().st_ctime > made)
    return [name for name in late if are_alike([*made_of, name])]


# --- Texts beside photos, and metadata in their folders --------------------------------------


def read_texts_beside(folder: Path, place: Path | None = None) -> Captions:
    """The captions in `photo.caption`, `.txt` or `.json` beside `photo.jpg`, or in `place`, there
    by the longest end of the photo's name that no other photo has; a `place` within the photos'
    folders, or in one with photos, is theirs alone."""
    found, tags = Captions("a text beside each photo"), []
    names = photos_in(folder)
    for root in (place, place.parent) if place else ():
        within = f"{root}{os.sep}"
        if near := [name for name in names if f"{folder / name}".startswith(within)]:
            names = near
            break
    stems = {os.path.splitext(name)[0] for name in names}
    counts = Counter(end for stem in stems for end in ends_of(stem))
    for name in names:
        whole, *ends = ends_of(name)  # of which the whole is no other's, but may be its end
        ways = [whole, *(end for end in ends if counts[os.path.splitext(end)[0]] == 1)]
        photos = [place / end for end in ways] if place else [folder / name]
        # Its own text counts before one that a photo of another suffix may share, unless that of
        # photo.jpg may be photo.jpg.png's. Beside a .caption, a .txt may hold tags: kohya's do.
        suffix = photos[0].suffix
        ends = (f"{suffix}.txt", ".caption", ".txt", ".TXT")[name in stems :]
        beside = ((*map(p.with_suffix, ends), *map(Path, objects_of(str(p)))) for p in photos)
        files = filter(os.path.isfile, itertools.chain(*beside))
        told = ((file, lines) for file in files if (lines := _lines(file)))
        file, lines = next(told, ("", []))  # a blank one doesn't hide another
        if lines:
            found.add(name, lines, file)
            if file.suffix == ".caption" and os.path.isfile(text := file.with_suffix(".txt")):
                tags.append(text)
            found.older += is_older(file)
            if os.path.islink(file) and leads_out(file, place or folder):
                found.links.append(file)
            continue
        found.passed.append(without_text(folder / name))
    if tags:
        said = f"{len(tags):,} texts beside a .caption, which counts before them, first: {tags[0]}"
        found.passed.insert(0, said)
    found.drop_nothing(place or folder)
    return found


def objects_of(photo: str) -> list[str]:
    """What objects about a photo may be called: as it is, without its suffix or with it, and as by
    Google Takeout, to 46 signs and with the number of one of several photos of a name at the end.
    """
    stem, suffix = os.path.splitext(photo)
    number = f"({stem.rpartition('(')[2]}" if stem.endswith(")") else ""
    called = [stem]
    for name, end in ((photo, ""), (stem.removesuffix(number) + suffix, number)):
        room = max(0, 46 - len(os.path.basename(name)))
        called += [name + end, name + TAKEOUT[:room] + end]
    return [f"{each}.json" for each in called]


def without_text(photo: Path) -> str:
    return f"{photo}: no caption beside it"


def _lines(file: Path) -> list[str]:
    """The captions, one a line, of a text, or those of a photo's own JSON object."""
    if file.suffix == ".json":
        said = read_json(file, older=True)
        if isinstance(said, list) and [*map(type, said)] == [dict] and "SourceFile" in said[0]:
            said = {plain_key(key): value for key, value in said[0].items()}  # exiftool's
        said = said if isinstance(said, dict) else {}
        # As a `title` may be its name.
        return [text for text in texts_of(said) if not is_photo(str(text))]
    whole = (line.strip() for line in LINE_END.split(read_text(file, older=True)))
    lines = [*itertools.takewhile(lambda line: not PARAMETERS.match(line), whole)]
    return [] if any(map(BOX.match, lines)) else [line for line in lines if line]


def read_folder(folder: Path) -> Captions:
    """The captions that stand in the photos' folders: their metadata, or else texts beside them."""
    return nested if (nested := read_nested(folder)).texts else read_texts_beside(folder)


def read_nested(folder: Path) -> Captions:
    """The captions of `metadata.jsonl`, `.csv` or `.parquet` in sub-folders, as image folders with
    splits have them."""
    ends = "jsonl", "csv", "parquet"
    tables = sorted(file for end in ends for file in folder.rglob(f"*/metadata.{end}"))
    parts = (read_own(table, folder) for table in tables)  # whose folders tell their split
    return merged("image folders with their metadata", dict(enumerate(parts)))


def read_own(table: Path, folder: Path) -> Captions:
    """The captions of a table, whose names are those of the photos in its own folder if that is
    within the photos' and has some."""
    found = read_captions(table, folder)
    found.links += [table] * leads_out(table, table.parent)
    if folder not in table.parent.parents or not (there := photos_in(table.parent)):
        return found
    place, real = table.parent.relative_to(folder), find_names(found.texts, there)
    own = {name: str(place / real.get(name, name)) for name in found.texts}
    own |= {name: name for name in own if name not in real and os.path.isfile(folder / name)}
    texts = {own[name]: said for name, said in found.texts.items()}
    splits = {own[name]: split for name, split in found.splits.items()}
    return replace(found, texts=texts, splits=splits)


# --- captions.json, made of what was found --------------------------------------------------


@uncollected()
def ensure_captions(
    settings: SimpleNamespace, paths: DataPaths
) -> tuple[DataPaths, dict[str, Any], dict[str, str]]:
    """Have the captions as `{"photo.jpg": [...]}`, by the photos' real names; say where they are,
    what captions.json was made from, and which split the captions say each photo to be of.

    A table in DATA_DIR becomes captions.json, if that is missing. What the user wrote is never
    changed: a captions.json or --captions_file that needs it is converted into a file beside.
    """
    begun = time.time()
    note, changed = captions_note(paths)
    sources, found = find_captions(settings, paths, changed, note.get("source", ""))
    place, usual = ", ".join(map(str, sources)), paths.data_dir / "captions.json"
    if not settings.CAPTIONS_FILE:  # splits.json may come from a stranger, too
        given = Path(settings.KARPATHY_FILE or paths.images).expanduser()
        homes = paths.data_dir, paths.images, given
        found.links += [source for source in sources if leads_out(source, *homes)]
    if found.links and not settings.follow_links:
        leads = "lies, or is a link that leads, out of its folder: if you laid it, use"
        raise UserError(f"{found.links[0]} {leads} --follow_links")
    if not found.texts:
        raise UserError("; ".join([f"{place} holds no captions", *found.passed[:3]]))
    texts = match_names(found.texts, paths.images)
    real = zip(found.texts, texts, strict=True)  # each name, and the photo's own
    splits = {file: found.splits[name] for name, file in real if name in found.splits}
    if settings.CAPTIONS_FILE or sources == [usual]:
        kept = held_or_converted(paths.data_dir, sources[0], texts)
        if kept != sources[0]:
            found.tell(place)
        noted = {} if settings.CAPTIONS_FILE else note.get("splits", {})
        return replace(paths, captions=kept), note, splits or noted
    found.tell(place)
    content = json.dumps(texts, ensure_ascii=False, indent=1)
    made = {
        "source": "\n".join(place_of(source, paths.data_dir) for source in sources),
        "images": place_of(paths.images, paths.data_dir),
        "state": "\n".join(state_of(source, begun) for source in sources),
        "made": hashlib.sha256(content.encode()).hexdigest(),
        "splits": splits,
    }
    # Noted before: where what follows fails, captions.json would pass for the user's for ever.
    save_splits(paths, {"method": settings.SPLIT} | written_splits(paths) | {"captions": made})
    write_changed(usual, content)
    return replace(paths, captions=usual), made, splits


def held_or_converted(
    data_dir: Path, source: Path, texts: Mapping[str, list[Any]], kind: str = ""
) -> Path:
    """The file that holds these texts: their source, or else one that is written beside."""
    target = converted_file(data_dir, source, kind)
    if source.suffix.lower() == ".json" and holds(source, texts):
        if target.exists():  # where nobody may write, to remove nothing fails too
            target.unlink()
        return source
    write_changed(target, json.dumps(texts, ensure_ascii=False, indent=1))
    with contextlib.suppress(OSError):  # where nobody may write
        os.utime(target)  # as new as what it was made from
    return target


def holds(path: Path, table: Mapping[str, Any]) -> bool:
    with contextlib.suppress(UserError):  # that it is no JSON, or in an older encoding
        return read_json(path) == table
    return False


def written_splits(paths: DataPaths) -> dict[str, Any]:
    """splits.json as `prepare_dataset.py` wrote it; nothing where it is missing, or not by it."""
    table = read_json(paths.splits) if paths.splits.exists() else {}
    return table if isinstance(table, dict) and "method" in table else {}


def save_splits(paths: DataPaths, table: Mapping[str, Any]) -> None:
    """Write splits.json, if that changes it and it isn't the user's."""
    if paths.splits.exists() and not written_splits(paths):
        raise UserError(
            f"{paths.splits} would be overwritten, and was not written by this script: name it "
            "otherwise, and use it with --split karpathy --karpathy_file PATH"
        )
    write_changed(paths.splits, json.dumps(table, ensure_ascii=False))


def captions_note(paths: DataPaths) -> tuple[dict[str, Any], list[Path]]:
    """From splits.json: what captions.json was made from, if it was and is as we made it, or else
    only the splits that it told; and these sources, if they are others now."""
    note = written_splits(paths).get("captions") or {}
    made, images = paths.data_dir / "captions.json", place_of(paths.images, paths.data_dir)
    if "made" not in note or not made.exists() or note["made"] != state_of(made):
        return {"splits": note["splits"]} if note.get("splits") else {}, []
    moved = note.get("images", images) != images
    if moved and read_folder(paths.images).texts:
        return note, [paths.images]  # which have texts of their own
    sources = [paths.data_dir / place for place in note["source"].split("\n")]
    there = all(source.exists() for source in sources)
    changed = there and "\n".join(map(state_of, sources)) != note["state"]
    return note, sources if changed else []


def say_outdated(settings: SimpleNamespace, paths: DataPaths, task: str = "captions") -> None:
    """Say which texts were made from a file that has changed since, for who doesn't prepare."""
    given, made = vars(settings)[f"{task.upper()}_FILE"], getattr(paths, task)
    source = Path(given or paths.data_dir / f"{task}.json").expanduser()
    changed = [] if given or task == "questions" else captions_note(paths)[1]
    files = [source]
    if task == "questions" and not source.is_file():  # which were found in lists of a folder
        root = source if source.is_dir() else paths.data_dir
        files = [root / name for name in lists_in(root)]
    when = made.stat().st_mtime if made.exists() else math.inf
    changed = [file for file in files if file.is_file() and changed_at(file) > when] or changed
    if changed:
        names = ", ".join(map(str, changed))
        print(f"{names} has changed, and {made} was made before: {preparing()} makes it anew")


def say_other_split(paths: DataPaths, trained: Mapping[str, Any]) -> None:
    """Say if the same data were split otherwise for the training with these settings."""
    table, before = written_splits(paths), trained.get("SPLIT")
    now = table.get("source") if table.get("method") == "ratio" else table.get("method")
    if before == "ratio":
        before = f"TRAIN_SPLIT_RATIO = {trained.get('TRAIN_SPLIT_RATIO')}"
    same = Path(str(trained.get("DATA_DIR"))).name == paths.data_dir.resolve().name
    if same and now and before and now != before:
        told = f"note: the checkpoint learned from another split of these photos ({before})"
        print(f"{told}, of which some may now be scored")


def state_of(source: Path, begun: float = math.inf) -> str:
    """What changes when the captions in a file, or in a folder's texts, do; empty where some
    were saved after reading had `begun`, so that they are read again."""
    if source.is_file():
        state = hashlib.sha256(source.read_bytes()).hexdigest()
        return state if source.stat().st_ctime <= begun else ""
    # A table at the top is read as such, not as one of the texts of the photos there.
    there = [name for name in files_in(source) if name not in (*OURS, *TABLES)]
    objects = {*itertools.chain(*map(objects_of, filter(is_photo, there)))}
    ends = (*TEXT_SUFFIXES, ".csv", ".jsonl", ".parquet", *(() if objects else (".json",)))
    told = [name for name in there if name in objects or name.lower().endswith(ends)]
    states = {name: (source / name).stat() for name in told if os.path.isfile(source / name)}
    if any(state.st_ctime > begun for state in states.values()):
        return ""
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states.items()]
    return hashlib.sha256(repr(files).encode()).hexdigest()
