"""Get a data set ready for training: photos, captions.json and splits.json.

Flickr30k and Flickr8k are downloaded, checked, unpacked and converted; a data set of your own is
checked where it stands. Interrupted at any point, the next run goes on from there; a data set
that is complete is recognised at once and left alone.

    python prepare_dataset.py --dataset flickr8k --archive flickr8k.zip
    python prepare_dataset.py --dataset custom --data_dir my_photos --split ratio --check
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.prepare_dataset)

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from archive import MAX_ENTRY_BYTES, extract_photos, members_of, open_zip, select_entries
from captions_file import TABLES, may_list
from captions_search import (
    ensure_captions,
    find_tables,
    karpathy_files,
    lists_in,
    save_splits,
    written_splits,
)
from check_data import check
from dataset import (
    SPLIT_WORD,
    DataPaths,
    data_paths,
    find_images,
    load_captions,
    load_questions,
    load_splits,
    load_texts,
    split_by_karpathy,
    split_by_own,
    split_by_ratio,
)
from download import download
from encoder import PHOTO_SUFFIXES
from features import check_bad
from options import SPLITS, parse_tasks
from parquet import read_parquet
from photo_names import is_photo
from questions_file import Questions, convert_vqa, ensure_questions, questions_source
from shards import say_samples
from tars import expand_shards, read_shard, shards_named
from utils import (
    UserError,
    changed_at,
    command,
    files_in,
    lock,
    redact,
    refused,
    remove_leftovers,
    require_room,
    run_script,
    write_changed,
    write_file,
)

# The parts of each data set's zip, in order. No checksums are published for them: a part's size
# is checked against the server's word, and each photo against the checksum (CRC) in the zip.
RELEASE = "https://github.com/awsaf49/flickr-dataset/releases/download/v1.0/"
SOURCES = {
    "flickr30k": tuple(f"{RELEASE}flickr30k_part{part:02d}" for part in range(3)),
    "flickr8k": (f"{RELEASE}flickr8k.zip",),
}
# The zip with the files of Karpathy's splits.
KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


# --- Archives -------------------------------------------------------------------------------


def read_marker(paths: DataPaths, dataset: str = "") -> dict[str, Any] | None:
    """prepared.json: the data set's name and its photos' sizes, {} while it is unfinished; refused
    where it is of another than `dataset`."""
    path = paths.data_dir / "prepared.json"
    if not path.exists():
        return None
    text = path.read_bytes()  # another user's, or on a disk that fails, it may be whole
    with refused(f"{path} is damaged: delete it and run again"):
        marker = json.loads(text)
        known, photos = marker["dataset"], dict(marker["photos"] or {})
    if dataset and known != dataset:
        raise UserError(
            f"{paths.data_dir} holds {known}, not {dataset}: choose another folder with --data_dir"
        )
    return {"dataset": known, "photos": photos}


def write_marker(paths: DataPaths, dataset: str, photos: dict[str, int]) -> None:
    """Note that these photos are all there, or, with {}, that unpacking has begun."""
    marker = {"dataset": dataset, "photos": photos}
    write_file(paths.data_dir / "prepared.json", json.dumps(marker))


def extract(parts: Sequence[Path], paths: DataPaths, dataset: str, downloaded: bool) -> None:
    """Unpack the photos that are missing or of another size, and the captions table if none is.

    prepared.json says before the first photo is written that the data set is unfinished, and
    after the last one which photos it has.
    """
    if len(parts) > 1 and all(map(zipfile.is_zipfile, parts)):
        raise UserError(
            f"{parts[0]} and {parts[1]} are a zip each, not parts of one: unpack the one with the "
            f"captions into {paths.data_dir}, and give --archive the one with the photos"
        )
    with open_zip(parts, downloaded) as archive:
        packed = sum(part.stat().st_size for part in parts)
        there = paths.captions.exists() or find_tables(paths.data_dir, paths.images)
        entries, tables = select_entries(archive, packed)
        photos = {name: info.file_size for name, info in entries.items() if is_photo(name)}
        if not photos:
            raise UserError(f"{parts[0]} holds no photos ({', '.join(sorted(PHOTO_SUFFIXES))})")
        texts = tables or len(photos) < len(entries)
        if not (texts or there or lists_in(paths.data_dir)):
            raise UserError(
                f"{parts[0]} holds no captions ({' or '.join(TABLES)}, other lists, or a text "
                f"beside each photo): write them to {paths.captions} first"
            )
        present = photo_sizes(paths.images)
        missing = {
            name: info
            for name, info in entries.items()
            if present.get(name) != info.file_size and (is_photo(name) or name not in present)
        }
        require_room([(paths.images, sum(info.file_size for info in missing.values()))])
        write_marker(paths, dataset, {})
        extract_photos(archive, missing, paths.images)
        if tables and not there:
            name, info = next(iter(tables.items()))
            write_file(paths.data_dir / name, archive.read(info))
        taken = {info.filename for info in (*entries.values(), *[*tables.values()][:1])}
        lists = [(path, info) for path, info in members_of(archive) if may_list(path)]
        if left := [str(path) for path, info in lists if info.filename not in taken]:
            print(f"left in {parts[0]}, whose table counts: {', '.join(left[:9])}")
    write_marker(paths, dataset, photos)


def photo_sizes(folder: Path) -> dict[str, int]:
    """The files in a folder, which need not exist, and in those below, with their sizes."""
    there = (name for name in files_in(folder) if os.path.exists(folder / name))
    return {name: os.path.getsize(folder / name) for name in there}


# --- Photos ---------------------------------------------------------------------------------


def ensure_photos(paths: DataPaths, dataset: str, archive: Sequence[str]) -> None:
    """Unpack what IMAGE_DIR lacks, from the archive or else a download; a marker says when whole.
    Photos that were there before the first run are the user's own and are left alone."""
    marker = read_marker(paths, dataset)
    present = photo_sizes(paths.images)
    if marker is None and present:
        print(f"{paths.images} holds photos already: they are used as they are (empty the folder")
        print(f"to have those of {dataset} there)")
        return
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
            parts = download(SOURCES[dataset], folder, paths.images, sum(present.values()))
        except UserError as error:
            raise UserError(f"{error}; or get it another way and use --archive PATH") from None
    extract(parts, paths, dataset, downloaded=not archive)


def unpack_shards(pattern: str, paths: DataPaths, max_bad: int) -> None:
    """Make a data set of which all photos validate, of the photos in WebDataset shards."""
    label = f"the shards {redact(pattern)}"
    marker = read_marker(paths, label)
    if marker is None and (paths.captions.exists() or photo_sizes(paths.images)):
        raise UserError(
            f"{paths.data_dir} holds a data set already: choose another folder for VAL_SHARDS' "
            "photos with --data_dir, or leave VAL_SHARDS out to validate on what is there"
        )
    if marker and marker["photos"] and marker["photos"] == photo_sizes(paths.images):
        unpacked = os.path.getmtime(paths.data_dir / "prepared.json")
        there = [url for url in shards_named(pattern) if os.path.exists(url)]
        if all(changed_at(url) <= unpacked for url in there):
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
            write_file(paths.images / name, sample.photo)
            captions[name] = sample.captions
        bad += unreadable.values()
    check_bad(bad, max_bad)
    say_samples(len(captions), passed, len(bad), label)
    splits = {"train": [], "val": list(captions), "test": []}
    write_changed(paths.captions, json.dumps(captions, ensure_ascii=False))
    write_changed(paths.splits, json.dumps(splits, ensure_ascii=False))
    write_marker(paths, label, photo_sizes(paths.images))


def unpack_parquet(paths: DataPaths) -> bool:
    """Make photos, captions.json and questions.json of DATA_DIR's parquet files; are there photos?

    What was there before is the user's own, and is used as it is.
    """
    marker = read_marker(paths)
    begun = marker and marker["dataset"].startswith("parquet ")
    if not begun and (paths.captions.exists() or paths.images.is_dir()):
        return paths.images.is_dir()  # before folders of many photos are looked through
    there = sorted(paths.data_dir / name for name in files_in(paths.data_dir))
    # Beside a tar of its name it is img2dataset's, of what the tar holds.
    files = [f for f in there if f.suffix == ".parquet" and not f.with_suffix(".tar").exists()] or [
        file for file in there if file.suffix == ".arrow" and "cache-" not in file.name
    ]
    sizes = ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in files)
    label = f"parquet {sizes}"
    if not files or (marker and marker["dataset"] == label and marker["photos"]):
        return paths.images.is_dir()
    captions: dict[str, list[str]] = {}
    questions: Questions = {}
    for name, photo, texts, asked in tqdm(read_parquet(files), desc="unpacking", disable=None):
        if not captions:  # or what was put there as an error said would not count
            write_marker(paths, label, {})
        if name not in captions:
            write_changed(paths.images / name, photo)  # it may be there, of a run that was killed
        known = captions.setdefault(name, [])
        known += [text for text in texts if text not in known]
        if asked:
            questions.setdefault(name, []).extend(asked)
    print(f"{len(captions):,} photos of {len(files)} parquet files are in {paths.images}")
    names = (str(file.relative_to(paths.data_dir)) for file in files)
    heads = (re.split(r"[-_.]\d|\d{4}", name)[0] for name in names)
    if len(parts := sorted({SPLIT_WORD.sub("", head).strip("/-_") for head in heads})) > 1:
        print(f"  of {', '.join(parts)}: move away what is not to be learned, and run it again")
    if any(captions.values()) or not questions:
        captions = {name: texts or [""] for name, texts in captions.items()}
        write_changed(paths.captions, json.dumps(captions, ensure_ascii=False, indent=1))
    place = paths.data_dir / "questions.json"
    if questions and (begun or not place.exists()):
        write_changed(place, json.dumps(questions, ensure_ascii=False, indent=1))
    write_marker(paths, label, photo_sizes(paths.images))
    return True


# --- Splits ---------------------------------------------------------------------------------


def ensure_karpathy_file(settings: SimpleNamespace, paths: DataPaths) -> Path:
    """The file with Karpathy's split: given, or the one in DATA_DIR, or downloaded once."""
    remedy = (
        "use --split ratio (or test, to score a trained model on all of these photos), or name the "
        "file, or folder of lists, with --karpathy_file PATH"
    )
    if settings.KARPATHY_FILE:
        return Path(settings.KARPATHY_FILE).expanduser()
    if len(found := karpathy_files(paths.data_dir)) == 1:
        return found[0]
    if settings.DATASET == "custom":
        raise UserError(
            "SPLIT is 'karpathy', but neither a dataset_*.json, nor a column `split` or folders or "
            f"files called train and val say which photo is of which split: {remedy}"
        )
    name = f"dataset_{settings.DATASET}.json"
    path = paths.data_dir / name
    if path.exists():
        return path
    try:
        [archive] = download([KARPATHY_URL], paths.data_dir / "temp_download", paths.data_dir)
        with open_zip([archive], downloaded=True) as zipped:
            info = next((i for i in zipped.infolist() if i.filename.split("/")[-1] == name), None)
            if info is None or info.file_size > MAX_ENTRY_BYTES:
                raise UserError(f"{archive} holds no sound {name}")
            write_file(path, zipped.read(info))
    except UserError as error:
        raise UserError(f"Karpathy's split is not to be had: {error}. To go on: {remedy}") from None
    return path


def write_splits(
    settings: SimpleNamespace,
    paths: DataPaths,
    names: Iterable[str],
    note: Mapping[str, Any],
    known: Mapping[str, str],
) -> None:
    """Split the photos as SPLIT says and write splits.json, if that changes it, with the `note`
    about captions.json; `known` are the splits that captions say photos to be of."""
    names, own = [*names], None
    if settings.DATASET == "custom" and not settings.KARPATHY_FILE:
        own = split_by_own(names, known, settings.TRAIN_SPLIT_RATIO)
    if own and settings.SPLIT != "karpathy":
        told = ", ".join(f"{split} {len(group)}" for split, group in own.items())
        print(f"these photos have a split of their own ({told}): --split karpathy keeps to it")
    if settings.SPLIT == "test":
        source, splits = "all photos", {"train": [], "val": [], "test": names}
    elif settings.SPLIT == "ratio":
        source = f"TRAIN_SPLIT_RATIO = {settings.TRAIN_SPLIT_RATIO}"
        splits = split_by_ratio(names, settings.TRAIN_SPLIT_RATIO)
    else:
        source, splits, says = "the data set itself", own, "columns, files or folders say"
        if not own or len(karpathy_files(paths.data_dir)) == 1:
            file = ensure_karpathy_file(settings, paths)
            source, splits, says = file.name, split_by_karpathy(names, file), f"{file} says"
        left = len(names) - sum(map(len, splits.values()))
        print(f"split as {says}{f'; {left} photos are of none' if left else ''}")
    table = {"method": settings.SPLIT, "source": source, **splits, "captions": note}
    save_splits(paths, table)


# --- Everything -----------------------------------------------------------------------------


def prepare(settings: SimpleNamespace) -> DataPaths:
    """Make sure that photos, captions.json and splits.json are there, and say where; what is done
    before something turns out missing or unsound is kept for the next run."""
    names = (*SOURCES, "custom")
    if settings.DATASET not in names:
        raise UserError(f"DATASET is {settings.DATASET!r}: use one of {', '.join(names)}")
    if settings.SPLIT not in ("karpathy", "ratio", "test"):
        raise UserError(f"SPLIT is {settings.SPLIT!r}: use karpathy, ratio or test")
    paths, tasks = data_paths(settings), parse_tasks(settings.TASKS)
    split = settings.KARPATHY_FILE if settings.SPLIT == "karpathy" else ""
    given = [split, *settings.vqa_questions, *settings.vqa_annotations]
    for file in filter(None, given):  # said before gigabytes are downloaded
        if not os.path.exists(os.path.expanduser(file)):
            correct = "correct --karpathy_file (or use --split ratio) or --vqa_..."
            raise UserError(f"{file} is not there: {correct}")
    with sole_preparer(paths.data_dir):
        if settings.VAL_SHARDS:  # never among photos and captions of one's own elsewhere
            inside = {"IMAGE_DIR": None, "CAPTIONS_FILE": None}
            paths = data_paths(SimpleNamespace(**vars(settings) | inside))
            unpack_shards(settings.VAL_SHARDS, paths, settings.MAX_BAD_IMAGES)
            return paths
        if settings.DATASET != "custom" or settings.archive:
            ensure_photos(paths, settings.DATASET, settings.archive)
        elif not unpack_parquet(paths):
            raise UserError(no_photos(paths))
        vqa = settings.vqa_questions, settings.vqa_annotations
        if any(vqa):
            convert_vqa(*vqa, questions_source(settings, paths), paths.images)
        note = written_splits(paths).get("captions") or {}
        known = note.get("splits", {})
        if "captions" in tasks:
            paths, note, known = ensure_captions(settings, paths)
        if "questions" in tasks:
            paths, known = ensure_questions(settings, paths, known)
        names = list(load_texts(paths, tasks))
        found = find_images(names, paths.images, settings.MAX_BAD_IMAGES, settings.follow_links)
        write_splits(settings, paths, found, note, known)
        temporary = paths.data_dir / "temp_download"
        kept = any(temporary.resolve() in Path(part).resolve().parents for part in settings.archive)
        if settings.DATASET != "custom" and temporary.is_dir() and not kept:
            shutil.rmtree(temporary)
        return paths


def no_photos(paths: DataPaths) -> str:
    """That there are no photos, and how they come of what is there, where that is known."""
    said = f"{paths.images} is missing: put your photos there, or set --image_dir"
    if paths.images.is_symlink() and not paths.images.exists():
        leads = f"{paths.images} is a link to {os.readlink(paths.images)}, which is not there"
        return f"{leads}: ln -sfn /the/whole/path/of/photos {shlex.quote(str(paths.images))}"
    root, zips = shlex.quote(str(paths.data_dir)), sorted(paths.data_dir.rglob("*.zip"))
    tars = sorted(paths.data_dir.glob("*.t[ag][rz]*"))
    if len(zips) == 1:
        return f"{said}; {zips[0]} is unpacked by --archive {shlex.quote(str(zips[0]))}"
    if zips:  # of which one may hold the captions, as COCO's do
        each = 'unzip -qn "$f" -d "${f%.zip}"'
        unpack = f"find {root} -name '*.zip' | while read -r f; do {each}; done"
        return f"{said}; {len(zips)} zips are unpacked by {unpack}"
    if tars:  # whose photos may have the same names
        each = 'd="${f%.t*}"; mkdir -p "$d"; tar -xf "$f" -C "$d"'
        unpack = f"for f in {root}/*.t[ag][rz]*; do {each}; done"
        return f"{said}; tars are unpacked by {unpack} (or use --train_shards)"
    return said


@contextlib.contextmanager
def sole_preparer(folder: Path) -> Iterator[None]:
    """Keep DATA_DIR for this process's preparation; another one's is waited for.

    The lock is another than `sole_user`'s: training holds that one while it prepares, where its
    OUTPUT_DIR is the same folder.
    """
    with contextlib.ExitStack() as held:
        # Where nobody can write, what is prepared already is used, and the rest is refused.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(folder / ".prepare.lock", "a"))
            lock(file, f"waiting for another process to prepare {folder}")
            # A killed one's; a training may be at work here, and has others.
            remove_leftovers(folder, ".*.json.*.tmp")
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a data set and say what is there and what to run next."""
    settings, usual = (commands.prepare_dataset(args) for args in (argv, []))
    # What is missing is to be counted, not to end the count.
    lenient = {"MAX_BAD_IMAGES": sys.maxsize} if settings.check else {}
    paths = prepare(SimpleNamespace(**vars(settings) | lenient))
    tasks = parse_tasks(settings.TASKS)
    splits = load_splits(paths.splits)
    tested, flags = settings.SPLIT == "test", []
    for name in commands.SCORED if tested else commands.PREPARED:
        if (value := vars(settings)[name]) != vars(usual)[name]:
            flags += [f"--{name.lower()}", str(value)]
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
    flags += ["--follow_links"] * (settings.follow_links and not tested)
    whole = max(SPLITS, key=lambda split: len(splits[split]))  # that of VAL_SHARDS is val
    scored = ["--checkpoint", "CHECKPOINT", "--task", tasks[0], "--split", whole]
    shards = ["--train_shards", "TARS"] * bool(settings.VAL_SHARDS and not settings.TRAIN_SHARDS)
    script = ("evaluate.py", *scored) if tested else ("train.py", *shards)
    print(f"next      {command(*script, *flags)}")
    return 0


if __name__ == "__main__":
    run_script(main)
