"""Captions and splits as files on disk, and training batches of one photo per row."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from distributed import ALONE, Team
from features import Features
from options import SPLITS, fits
from photo_names import LONGEST, by_last_part, find_names, is_drawn, is_photo, links_in
from tokenizer import ANSWER_ID, PAD_ID, CaptionTokenizer, normalize
from utils import SURROGATES, UserError, files_in, preparing, read_json, read_text, uncollected

PLAIN = '{"photo.jpg": ["caption", ...]}'  # the form of captions.json
WRITTEN = ("wandb/", "features/", "temp_download/")  # folders in DATA_DIR that hold no photos
OTHER_SPLITS = dict.fromkeys(("valid", "validate", "validation", "eval", "dev"), "val")  # in files
OTHER_SPLITS["restval"] = "train"
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join([*SPLITS, *OTHER_SPLITS])})(?:ing)?(?![a-z])")
TEXT_KEYS = ("caption", "captions", "text")  # of a photo's captions in JSON: a text, or a list

# Rows are as long as a multiple of this: so few shapes that kernels and memory are reused.
ROW_MULTIPLE = 4
POOL = 64  # batches whose photos are sorted by row length together


# --- Where things are -----------------------------------------------------------------------


@dataclass(frozen=True)
class DataPaths:
    """The files of one data set."""

    data_dir: Path
    images: Path
    captions: Path
    questions: Path
    splits: Path
    vocab: Path
    merges: Path
    features: Path


def data_paths(settings: SimpleNamespace) -> DataPaths:
    """Where a data set's files are: what is set nowhere has its usual name within DATA_DIR."""
    root = Path(settings.DATA_DIR).expanduser()

    def place(setting: str, usual: str) -> Path:
        given = vars(settings).get(setting)
        return Path(given).expanduser() if given else root / usual

    images = place("IMAGE_DIR", "images")
    # Photos may lie in DATA_DIR itself, if nothing was ever unpacked there.
    known = vars(settings).get("IMAGE_DIR") or images.exists() or (root / "prepared.json").exists()

    def has_photos(folder: Path) -> bool:
        names = itertools.islice(files_in(folder), 100_000)  # it may be all that somebody has
        return any(is_photo(n) and not (n.startswith(WRITTEN) or is_drawn(n)) for n in names)

    if not known and has_photos(root):
        images = root
    elif not known and (linked := [at for at in links_in(root) if has_photos(at)]):
        images = linked[0] if len(linked) == 1 else root

    def latest(file: Path, kind: str = "") -> Path:
        """What is in a form of its own has been converted by prepare_dataset.py."""
        converted = converted_file(root, file, kind)
        return converted if converted.exists() else file

    return DataPaths(
        data_dir=root,
        images=images,
        captions=latest(place("CAPTIONS_FILE", "captions.json")),
        questions=latest(place("QUESTIONS_FILE", "questions.json"), "questions"),
        splits=root / "splits.json",
        vocab=place("VOCAB_FILE", "vocab.json"),
        merges=place("MERGES_FILE", "merges.txt"),
        features=place("FEATURES_DIR", "features"),
    )


def place_of(source: Path, data_dir: Path) -> str:
    """What a file or folder is known by: the same for another spelling of either path, and, for
    what lies within it, where `data_dir` was moved."""
    place, root = Path(os.path.realpath(source)), os.path.realpath(data_dir)
    return str(place.relative_to(root) if place.is_relative_to(root) else place)


def converted_file(data_dir: Path, source: Path, kind: str = "") -> Path:
    """Where texts are kept that were read from `source`, a file in another form; by their `kind`,
    as a file of conversations may hold captions and questions."""
    digest = hashlib.sha256(os.fsencode(place_of(source, data_dir) + kind)).hexdigest()[:6]
    return data_dir / f"{source.stem}.{digest}.prepared.json"


# --- captions.json --------------------------------------------------------------------------


def _table_of(path: Path, table: Any, form: str) -> dict[str, Any]:
    """A table of `form`, an object of at least one photo; what it says of one is unchecked."""
    if not isinstance(table, dict):
        raise UserError(
            f"{path} holds a {type(table).__name__}, not an object: write {form}, or "
            f"have it converted by {preparing()}"
        )
    if not table:
        raise UserError(f"{path} is empty: it needs at least one photo: {form}")
    for name in table:
        check_name(path, name)
    return table


def load_captions(path: Path) -> dict[str, list[str]]:
    """Read captions.json: `{"photo.jpg": ["caption", ...]}`, names relative to the photo folder."""
    table = _table_of(path, read_json(path), PLAIN)
    for name, captions in table.items():
        if not isinstance(captions, list) or not captions:
            form = f"{PLAIN}; {preparing()} converts others"
            raise UserError(f"{path}: {name!r} needs a list of at least one caption: {form}")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise UserError(f"{path}: {name!r} has a caption that is no text: {caption!r}")
    # Half characters, of an emoji cut in two, can't be encoded.
    return {name: [SURROGATES.sub("\ufffd", text) for text in table[name]] for name in table}


@dataclass(frozen=True, slots=True)
class Text:
    """Something to say about a photo: `target`, after `question`, which a caption does not have.

    `target` is empty where nobody knows the answer; `answers` are several people's, for scoring
    as VQAv2 does; `kind` is the type of the question, such as "count".
    """

    target: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""

    @property
    def task(self) -> str:
        return "questions" if self.question else "captions"


Texts = Mapping[str, Sequence[Text]]  # about each photo
Splits = dict[str, list[str]]  # the photos of each split
Prompt = tuple[str, Text]  # a photo's name, and what is to be written about it


def load_questions(path: Path, answered: bool = True, table: Any = None) -> dict[str, list[Text]]:
    """Read questions.json: `{"photo.jpg": [{"question": ..., "answer": ...}, ...]}`.

    An entry may also have "answers" (a list of several people's, of which the most frequent one
    is the answer if none is given) and "type". With `answered` each needs an answer. `table` is
    what is in the file, if it was read before, or was of another form.
    """
    table = read_json(path) if table is None else table
    form = '{"photo.jpg": [{"question": "...", "answer": "..."}, ...]}'
    questions = {}
    for name, entries in _table_of(path, table, form).items():
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UserError(f"{path}: {name!r} needs a list of questions: {form}")
        where = f"{path}: {name!r}"
        questions[name] = [read_question(where, entry, answered) for entry in entries]
    return questions


def read_question(where: str, entry: Mapping[str, Any], answered: bool) -> Text:
    """An entry of questions.json, and of other files brought to its form; refused where it lacks
    a question, or where it is to be `answered`, an answer."""
    answers = entry.get("answers") or []
    several = map(as_text, answers) if isinstance(answers, list) else [None]
    question = entry.get("question")
    texts = [question, as_text(entry.get("answer")), as_text(entry.get("type")), *several]
    try:
        question, answer, kind, *answers = [SURROGATES.sub("\ufffd", text) for text in texts]
    except TypeError:
        raise UserError(f"{where} has a question whose parts are no text: {entry!r}") from None
    if not question.strip():
        raise UserError(f"{where} has an empty question")
    answers = [each for each in answers if each.strip()]
    if not answer.strip() and answers:
        counts = Counter(map(normalize, answers))  # "Yes." and "yes" are one answer
        answer = max(answers, key=lambda each: counts[normalize(each)])
    if answered and not answer.strip():
        raise UserError(f"{where} has a question without an answer: {question!r}")
    return Text(answer, question, tuple(answers), kind)


def as_text(value: Any) -> Any:
    """A JSON value as a text, if it is a number (3.0 is "3", as pandas makes of whole ones where
    some are missing) or nothing, as NaN is; what is neither stays as it is."""
    if isinstance(value, str):  # almost always, and VQAv2 has six million
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) else value


@uncollected()
def load_texts(
    paths: DataPaths, tasks: Sequence[str], quiet: bool = False
) -> dict[str, list[Text]]:
    """What the tasks want said about each photo: its captions, then the answers about it; says,
    unless `quiet`, how many are left out."""
    said: dict[str, list[Text]] = {}
    if "captions" in tasks:
        for name, captions in load_captions(paths.captions).items():
            said[name] = [Text(caption) for caption in captions]
    if "questions" in tasks:
        for name, questions in load_questions(paths.questions).items():
            said[name] = said.get(name, []) + questions
    texts = {name: [t for t in group if normalize(t.target)] for name, group in said.items()}
    kept, all_of = (Counter(t.task for g in table.values() for t in g) for table in (texts, said))
    for task in tasks:
        what = "captions" if task == "captions" else "answers"
        if not kept[task]:
            raise UserError(f"no {what} have a word: there is nothing to learn for TASKS {task!r}")
        if (left := all_of[task] - kept[task]) and not quiet:
            print(f"left out {left:,} {what} without a word")
    return {name: group for name, group in texts.items() if group}


def prompts_about(texts: Texts, names: Iterable[str], task: str) -> list[Prompt]:
    """What to have written about photos: one caption each, or the answer to each question."""
    prompts: list[Prompt] = []
    for name in names:
        wanted = [text for text in texts.get(name, ()) if text.task == task]
        prompts += [(name, text) for text in (wanted[:1] if task == "captions" else wanted)]
    return prompts


def answers_by_kind(asked: Iterable[Text]) -> dict[str, Counter[str]]:
    """How often each answer is given to each type of question, and under "" to all."""
    counts: dict[str, Counter[str]] = {}
    for text in asked:
        for kind in {text.kind, ""}:
            counts.setdefault(kind, Counter())[normalize(text.target)] += 1
    return counts


def references_of(texts: Texts, names: Iterable[str]) -> dict[str, list[str]]:
    """People's captions of those of the photos that have any."""
    found = {name: [t.target for t in texts.get(name, ()) if not t.question] for name in names}
    return {name: captions for name, captions in found.items() if captions}


@uncollected()
def encode_rows(
    tokenizer: CaptionTokenizer, texts: Texts, names: Sequence[str], length: int
) -> dict[str, list[list[int]]]:
    """Each photo's texts as ids, at most `length` of them."""
    pairs = [(text.question, text.target) for name in names for text in texts[name]]
    ids = iter(tokenizer.encode_texts(pairs, length))
    return {name: list(itertools.islice(ids, len(texts[name]))) for name in names}


def check_name(path: object, name: str) -> None:
    """Refuse a photo's name that leads out of the photo folder."""
    parts = name.split("/")
    leads_out = re.fullmatch("([A-Za-z]:)?", parts[0]) or ".." in parts
    if leads_out or len(name) > LONGEST or re.search("[\0\ud800-\udfff]", name):
        raise UserError(f"{path}: {name!r} is not a name within the photo folder")


def find_images(
    names: Iterable[str], image_dir: Path, max_missing: int, follow_links: bool = False
) -> list[str]:
    """Return the names whose file is there, within the folder, links followed."""
    root = os.path.realpath(image_dir) + os.sep
    resolved = functools.cache(os.path.realpath)  # once each: 30,000 photos stand in few folders
    found, missing = [], []
    for name in names:
        folder, base = os.path.split(os.path.join(root, name))
        file = os.path.join(resolved(folder), base)
        if os.path.islink(file):
            file = os.path.realpath(file)
        if not file.startswith(root) and not follow_links:
            raise UserError(
                f"{image_dir / name} is a link that leads out of the photo folder: if you laid "
                "it, use --follow_links"
            )
        (found if os.path.isfile(file) else missing).append(name)
    if len(missing) > max_missing:
        raise UserError(
            f"{len(missing)} photos are not in {image_dir}, first {missing[:3]}; at most "
            f"MAX_BAD_IMAGES = {max_missing} may be missing: add them, or take them out of the "
            "captions, or raise --max_bad_images"
        )
    if missing:
        first = f"first {missing[:10]}" if len(missing) > 10 else f"{missing}"
        print(f"skipped {len(missing)} photos that are not in {image_dir}: {first}")
    return found


# --- Splits ---------------------------------------------------------------------------------


def place_by_name(name: str) -> float:
    """A place from 0 to 1 by a hash, so that photos of a folder are nowhere side by side: the first
    by it, which MAX_IMAGES uses, are of all folders."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_by_ratio(names: Iterable[str], train_ratio: float) -> Splits:
    """Split photos by a hash of their name: adding photos never moves the others.

    A share `train_ratio` is for training; the rest is half for validation, half for testing. Of
    so few photos that none falls to training or validation, the nearest do.
    """
    if not 0 < train_ratio < 1:
        raise UserError(f"TRAIN_SPLIT_RATIO is {train_ratio}: it must lie between 0 and 1")
    middle = (1 + train_ratio) / 2
    places = {name: place_by_name(name) for name in names}
    order = sorted(places, key=places.get)
    # Where in this order training ends, and validation.
    own = [sum(place < end for place in places.values()) for end in (train_ratio, middle)]
    begin = max(1, min(own[0], len(order) - 1))
    end = max(begin + 1, own[1])
    if [begin, end] != own and len(order) > 1:
        print(
            f"of so few photos TRAIN_SPLIT_RATIO = {train_ratio} leaves none to train or to "
            "validate on: one is taken for it (--train_split_ratio changes the share)"
        )
    parts = order[:begin], order[begin:end], order[end:]
    splits = dict(zip(SPLITS, parts, strict=True))
    return check_splits(splits, f"--train_split_ratio {train_ratio}")


def split_by_karpathy(names: Iterable[str], path: Path) -> Splits:
    """Split photos as a `dataset_*.json` in Karpathy's format says (`restval` is for training), or
    a folder with a list of names for each split.

    Its names are matched as those of captions are; one that is left over, as a flat file's of
    photos in folders, by its last part. Photos that the file doesn't know belong to no split.
    """
    table = _lists_in(path) if path.is_dir() else read_json(path)
    names = [*names]
    splits: Splits = {split: [] for split in SPLITS}
    of: dict[str, str] = {}  # the split of each name in the file
    try:
        lists = {} if "images" in table else table  # {"train": ["1.jpg", ...], "val": [...]}
        images = [{"filename": name, "split": split} for split in lists for name in lists[split]]
        for image in images or table["images"]:
            name = os.path.join(image.get("filepath") or "", image["filename"])
            name, split = unicodedata.normalize("NFC", name), image["split"].lower()
            if name in of:
                raise UserError(f"{path}: {name!r} stands in it twice")
            of[name] = OTHER_SPLITS.get(split, split)
        found = find_names(of, names)
        taken = {*found.values()}
        others = {n: file for n, file in by_last_part(of, names).items() if file not in taken}
        found = others | found
        for name in of:
            if name in found:
                splits[of[name]].append(found[name])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not in Karpathy's format ({error!r} is off): it needs "
            '{"images": [{"filename": "1.jpg", "split": "train"}, ...]}, with train, val or test'
        ) from None
    return check_splits(splits, str(path))


def _lists_in(folder: Path) -> Splits:
    """The names, one a line, in texts called after splits, as `Flickr_8k.trainImages.txt`."""
    lists: Splits = {}
    for name in files_in(folder, recursive=False):
        if name.endswith(".txt") and (split := split_in(name)):
            lines = read_text(folder / name).split("\n")
            names = [line.strip() for line in lines if len(line.split()) == 1]
            lists.setdefault(split, []).extend(names)
    if not any(lists.values()):
        raise UserError(f"{folder} has no texts called after splits (train.txt, ...) with names")
    return lists


def split_in(text: object) -> str:
    """The split that a word in a text names, the last one, as in `train2017/`, `x_val.csv` or
    `valImages`."""
    words = SPLIT_WORD.findall(apart(str(text)))
    return OTHER_SPLITS.get(words[-1], words[-1]) if words else ""


def apart(text: str) -> str:
    """In lower case, words apart: `valImages` is `val images`."""
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", text).lower()


def split_by_own(
    names: Iterable[str], known: Mapping[str, str], train_ratio: float
) -> Splits | None:
    """Split photos as their captions say, or else their folders; None if they say nothing.

    Where these know training and testing alone, of the photos for training all but a share
    `train_ratio` validate.
    """
    splits: Splits = {split: [] for split in SPLITS}
    for name in sorted(names, key=place_by_name):
        if split := known.get(name) or split_in(os.path.dirname(name)):
            splits[split].append(name)
    if len(splits["train"]) > 1 and splits["test"] and not splits["val"]:
        inner = split_by_ratio(splits["train"], train_ratio)
        splits |= {"train": inner["train"], "val": inner["val"] + inner["test"]}
        said = f"{len(splits['val'])} of those to train on do instead"
        print(f"these photos' own split has none to validate: {said}")
    return splits if splits["train"] and splits["val"] else None


def check_splits(splits: Splits, source: str, needed: Sequence[str] = ("train", "val")) -> Splits:
    """The splits as they are, refused if `source` has left one of those `needed` without photos."""
    for split in needed:
        if not splits[split]:
            remedy = "more photos, another split, or --split test to score a trained model on all"
            raise UserError(f"{source} leaves no photo for {split}: {remedy}")
    return splits


def load_splits(path: Path) -> Splits:
    """Read splits.json as `prepare_dataset.py` wrote it: `{"train": [names], "val": ..., ...}`."""
    table = read_json(path)
    splits = {split: table.get(split) for split in SPLITS} if isinstance(table, dict) else None
    if not fits(splits, Splits):
        remedy = f"run {preparing()}"
        raise UserError(f"{path} is not a table of splits, each a list of photos' names: {remedy}")
    return {split: [*dict.fromkeys(names)] for split, names in splits.items()}


# --- Batches --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Photos with all their captions, one photo a row.

    `tokens` (images, row) are the captions one after the other, each from START to its last word;
    `positions` count within a caption; `segments` number the captions of a row, -1 is padding.
    `targets` are the tokens that carry a loss, all rows' in one (targets), and `places` (targets)
    says where in the flattened rows each is predicted: found here and not on a GPU, which would
    have to wait for the answer. `asked` (targets) says which of them answer a question; the
    question itself carries no loss.
    """

    names: list[str]
    tokens: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    places: Tensor
    asked: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; on CUDA from pinned RAM, without waiting for it to arrive."""
        # What else MPS has yet to fetch may be freed or written over: PyTorch #189690.
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin(self) -> Batch:
        """The batch in RAM that a GPU can fetch from by itself."""
        return self._each(Tensor.pin_memory)

    def without(self, rows: Sequence[int]) -> Batch:
        """The batch, in which these rows' tokens carry no loss; on the CPU."""
        kept = ~torch.isin(self.places // self.tokens.shape[1], torch.tensor(rows, dtype=int))
        parts = {name: getattr(self, name)[kept] for name in ("targets", "places", "asked")}
        return replace(self, **parts)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(self.names, *(change(getattr(self, f.name)) for f in fields(self)[1:]))


def make_batch(names: Sequence[str], captions: Sequence[Sequence[Sequence[int]]]) -> Batch:
    """Lay the encoded captions and questions of each photo into a row of its own; see `Batch`."""
    length = max((sum(len(ids) - 1 for ids in group) for group in captions), default=0)
    length = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
    shape = (len(captions), length)
    tokens = np.full(shape, PAD_ID)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, -1)
    targets: list[int] = []
    places: list[int] = []
    asked: list[bool] = []
    for row, group in enumerate(captions):
        start = 0
        for number, ids in enumerate(group):
            end = start + len(ids) - 1
            tokens[row, start:end] = ids[:-1]
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = number
            # Special tokens have no spelling, so ANSWER stands only where a question ends.
            question = ids.index(ANSWER_ID) if ANSWER_ID in ids else 0
            targets += ids[question + 1 :]
            places += range(row * length + start + question, row * length + end)
            asked += [question > 0] * (len(ids) - 1 - question)
            start = end
    arrays = (tokens, positions, segments, np.array(targets), np.array(places), np.array(asked))
    return Batch(list(names), *map(torch.from_numpy, arrays))


def epoch_order(lengths: Sequence[int], batch_size: int, seed: Sequence[int]) -> list[list[int]]:
    """The batches of an epoch, as indices: random, yet photos of like row length together.

    Photos are shuffled, sorted by row length within pools of POOL batches, cut into batches, and
    the batches shuffled. The order depends on the seed's numbers only, so that a run that resumes
    in mid-epoch meets the same batches.
    """
    dice = np.random.default_rng(seed)
    shuffled = dice.permutation(len(lengths))
    pool = POOL * batch_size
    batches = []
    for start in range(0, len(shuffled), pool):
        members = shuffled[start : start + pool]
        members = members[np.argsort(np.asarray(lengths)[members], kind="stable")]
        batches += [
            members[i : i + batch_size].tolist() for i in range(0, len(members), batch_size)
        ]
    return [batches[i] for i in dice.permutation(len(batches))]


class CaptionRows:
    """The encoded texts of some photos and their features, cut into batches."""

    def __init__(
        self,
        groups: dict[str, list[list[int]]],
        features: Features | None,
        views: Mapping[str, Sequence[int]] | None = None,
    ):
        """Args: each photo's texts as ids from START to END; what `load` loads from; a photo's
        views that are shown, in turn, or only 0, the photo itself."""
        # Arrays, as lists of numbers take eight times the room.
        self.groups = {name: [array("i", ids) for ids in group] for name, group in groups.items()}
        self.names, self.captions = list(self.groups), list(self.groups.values())
        self.lengths = [sum(len(ids) - 1 for ids in group) for group in self.captions]
        self.features, self.views = features, views or {}

    def __len__(self) -> int:
        return len(self.names)

    def batches(
        self, batch_size: int, seed: int, epoch: int, skip: int = 0, team: Team = ALONE
    ) -> Iterator[Batch]:
        """The epoch's batches in its own order, without the first `skip` of them; of each a process
        of a team gets its share, which may be empty."""
        for members in epoch_order(self.lengths, batch_size, (seed, epoch))[skip:]:
            own = team.share(members)
            yield make_batch([self.names[i] for i in own], [self.captions[i] for i in own])

    def load(self, batch: Batch, epoch: int | None) -> tuple[Batch, Tensor]:
        """The batch, and its photos' features (images, patches, width) in half precision.

        Each epoch shows the next view of a photo, and different photos different ones; None is
        the photo as it is.
        """
        items = []
        for name in batch.names:
            turn = 0 if epoch is None else epoch + crc32(name.encode())
            views = self.views.get(name, (0,))
            items.append((name, views[turn % len(views)]))
        return batch, self.features.read(items) if items else torch.empty(0)

    def order(self, batch_size: int, seed: int, team: Team) -> str:
        """Names the order of photos, which a run resumed in mid-epoch compares."""
        return order_name(self.names, self.lengths, batch_size, seed)

    @property
    def texts(self) -> tuple[int, int]:
        """How many captions there are, and how many questions."""
        said = sum(1 for _ in self.without_questions())
        return said, sum(map(len, self.captions)) - said

    def without_questions(self) -> Iterator[Sequence[int]]:
        """The ids of each caption."""
        return (ids for group in self.captions for ids in group if ANSWER_ID not in ids)

    def count(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return -(-len(self) // batch_size)  # pools are of whole batches but for the last


def order_name(*what: object) -> str:
    """A short name of all that an order of photos depends on."""
    return hashlib.sha256(repr((POOL, *what)).encode()).hexdigest()[:16]
