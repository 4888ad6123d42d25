"""Caption photos with a trained checkpoint: one, or folders of them, to the terminal or to files.

    python inference.py photo.jpg --checkpoint captioner_best_cider.safetensors
    python inference.py photos/ --checkpoint user/repo --write jsonl
    python inference.py photo.jpg --checkpoint user/repo --question "is it raining?"
    python inference.py photo.jpg --checkpoint user/repo --attention words.png

From Python: `load_captioner("captioner.safetensors").caption("photo.jpg")`.
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.inference)

import argparse
import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from attention import PatchGrid, WordMap, draw_attention, patch_grid, word_maps
from checkpoint import Checkpoint, load_checkpoint
from dataset import load_questions
from device import autocast, choose_device, choose_dtype
from encoder import FrozenEncoder, ImageError, as_rgb, open_image
from features import encode, prefetch
from generation import Hypothesis, dice_of, generate
from hub import locate_checkpoint
from options import GenerationOptions, change_options, given_options
from photo_names import OTHER_PICTURES, find_names, is_photo
from questions_file import read_questions
from settings import check_ranges
from sidecar import Photo, open_output
from utils import Bar, UserError, atomic_write, check_output, files_in, run_script, say_json, shown

ENCODED = 16  # pictures encoded at a time: more are no faster, and take more room
ROWS = 64  # captions or answers searched for at a time: fewer are slower
BEAMS = 1024  # of all that are searched for at a time: more take gigabytes

Picture = str | os.PathLike | BinaryIO | Image.Image
# What is asked about a picture, the picture preprocessed, or what is wrong with it.
Read = tuple[list[tuple[Picture, str]], dict[str, Tensor] | None, str]


@dataclass(frozen=True)
class Written:
    """What was written about a picture, best first; or what is wrong with the picture."""

    picture: Picture
    question: str
    texts: list[str]
    hypotheses: list[Hypothesis]  # what the model thinks of each text; see `Hypothesis`
    problem: str = ""


@dataclass(frozen=True)
class Explained:
    """A caption or an answer, what the model thinks of it, and where it looked for each word."""

    text: str
    hypothesis: Hypothesis
    words: list[WordMap]


class Captioner:
    """An encoder and a decoder that belong together, ready to caption pictures."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: FrozenEncoder,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.model = checkpoint.model.to(device).eval()
        self.tokenizer = checkpoint.tokenizer
        self.reranker, self.options = checkpoint.reranker, checkpoint.generation
        # Of a `.pt`, what training goes on with isn't kept.
        self.tasks, self.require = checkpoint.tasks, replace(checkpoint, training=None).require
        self.encoder = encoder.to(device)
        self.device, self.dtype = device, dtype
        self._process: int | None = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_process": None}  # sent to another, it is at home there

    def caption(self, pictures: Picture | Iterable[Picture], **options: Any) -> str | list[str]:
        """The best caption of a picture, or of each of several, files or Pillow images.

        One that can't be read is an ImageError; `stream` goes on instead. `options` are fields of
        `GenerationOptions` that replace the checkpoint's own.
        """
        return self._best(pictures, None, options)

    def answer(
        self, pictures: Picture | Iterable[Picture], questions: str | Iterable[str], **options: Any
    ) -> str | list[str]:
        """The answer to a question about a picture; a list, where there are several of either.

        Greedy unless `options` say otherwise; raises as `caption`.
        """
        if not isinstance(questions, str):
            questions = [*questions]
            pictures = [pictures] * len(questions) if _is_one(pictures) else [*pictures]
        return self._best(pictures, questions, options)

    def stream(
        self,
        pictures: Picture | Iterable[Picture],
        questions: str | Iterable[str] | None = None,
        *,
        batch_size: int = ROWS,
        **options: Any,
    ) -> Iterator[Written]:
        """What is written about each picture, as it is written; what can't be read is named.

        One question is asked about all, of several the next about each, or all about one picture.
        Pictures are read on threads while others are encoded, `batch_size` at a time; one that
        stands several times in a row, with other questions, is encoded once.
        """
        same = questions is None or isinstance(questions, str)
        asked = [questions] if same else [*questions]
        pictures = [pictures] * len(asked) if _is_one(pictures) else pictures
        if not same and isinstance(pictures, Sequence) and len(pictures) != len(asked):
            counts = f"{len(pictures)} pictures and {len(asked)} questions"
            raise UserError(f"{counts}: give one question for all, or one about each")
        chosen = self._options(asked if questions is not None else None, options)
        check_ranges(SimpleNamespace(batch_size=batch_size))
        asked = itertools.repeat(questions or "") if same else asked
        pictures = pictures if isinstance(pictures, Sequence) else map(_still, pictures)
        pairs = zip(pictures, asked, strict=not same)
        # By which picture it is: to compare them, Pillow would look at every pixel.
        grouped = itertools.groupby(
            pairs, lambda pair: pair[0] if isinstance(pair[0], str | os.PathLike) else id(pair[0])
        )
        groups = ([*group] for _, group in grouped)
        photos = prefetch(self._read, groups, threads=2, ahead=2 * batch_size)
        dice = dice_of(chosen)
        while chunk := list(itertools.islice(photos, batch_size)):
            yield from self._write(chunk, chosen, dice)

    def _options(self, questions: Iterable[str] | None, given: dict[str, Any]) -> GenerationOptions:
        """How to write, if it has learned what is asked for."""
        if self._process not in (None, os.getpid()):
            # Forked from where OpenMP's threads stayed: to wait for them would take for ever.
            torch.set_num_threads(1)
        self._process = os.getpid()
        self.require("captions" if questions is None else "questions")
        if not all(question.strip() for question in questions or ()):
            raise UserError("a question is empty: to have a caption written, ask none")
        return change_options(self.options, questions is not None, **given)

    def _read(self, group: list[tuple[Picture, str]]) -> Read:
        """A picture, preprocessed, from what is asked about it one question after the other."""
        try:
            return group, self.encoder.preprocess([self._open(group[0][0])]), ""
        except ImageError as error:
            return group, None, str(error)

    def _write(
        self, chunk: list[Read], options: GenerationOptions, dice: torch.Generator
    ) -> Iterator[Written]:
        inputs = [inputs for _, inputs, _ in chunk if inputs]
        parts = (inputs[start : start + ENCODED] for start in range(0, len(inputs), ENCODED))
        features = torch.cat([*map(self._encode, parts)]) if inputs else None
        readable = enumerate(group for group, inputs, _ in chunk if inputs)
        asked = [(question, place) for place, group in readable for _, question in group]
        found = self._search(asked, features, options, dice)
        for group, _, problem in chunk:
            for picture, question in group:
                hypotheses = [] if problem else next(found)
                texts = [self.tokenizer.decode(h.tokens) for h in hypotheses]
                yield Written(picture, question, texts, hypotheses, problem)

    def _search(
        self,
        asked: list[tuple[str, int]],
        features: Tensor | None,
        options: GenerationOptions,
        dice: torch.Generator,
    ) -> Iterator[list[Hypothesis]]:
        """What is found for each question (or caption, "") about a row of the features."""
        limit = self.model.config.max_length
        step = max(1, min(ROWS, BEAMS // options.beam_size))
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            prefixes = self.tokenizer.prefixes([question for question, _ in part], limit)
            rows = torch.tensor([place for _, place in part], device=self.device)
            with autocast(self.device, self.dtype):  # left before a caller goes on
                seen = features[rows]
                found = generate(self.model, seen, options, prefixes, self.reranker, dice)
            yield from found

    def _best(
        self, pictures: Any, questions: str | Sequence[str] | None, options: dict[str, Any]
    ) -> str | list[str]:
        """The best text about a picture, or about each of several."""
        found = []
        for each in self.stream(pictures, questions, **options):
            if each.problem:
                raise ImageError(each.problem)
            found.append(each.texts[0])
        return found[0] if _is_one(pictures) else found

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> features (images, patches, width)."""
        return self._encode([self.encoder.preprocess(images)])

    def _encode(self, inputs: Sequence[dict[str, Tensor]]) -> Tensor:
        # As in the feature cache, half precision included: what the decoder was trained on.
        return encode(self.encoder, inputs, self.dtype).float()

    def explain(
        self, picture: Picture, question: str | None = None, *, maps: bool = True, **options: Any
    ) -> tuple[PatchGrid | None, list[Explained]]:
        """A picture's captions, or answers to a question about it, with where each word looked.

        Args:
            picture: as in `caption`.
            maps: whether to tell where; without them there is no grid, and there are no words.
            options: as in `caption`, or for a question as in `answer`.
        """
        chosen = self._options(None if question is None else [question], options)
        (prefix,) = self.tokenizer.prefixes([question or ""], self.model.config.max_length)
        image = self._open(picture)
        features = self.features([image])
        grid = patch_grid(self.encoder, image.size, features.shape[1]) if maps else None
        model, tokenizer, explained = self.model, self.tokenizer, []
        with autocast(self.device, self.dtype):
            (found,) = generate(model, features, chosen, [prefix], self.reranker)
            for h in found:
                looked = (
                    word_maps(model, tokenizer, features, prefix, h.tokens, grid) if grid else []
                )
                explained.append(Explained(tokenizer.decode(h.tokens), h, looked))
        return grid, explained

    def _open(self, picture: Picture) -> Image.Image:
        if isinstance(picture, Image.Image):
            if 0 in picture.size:
                raise ImageError("the picture has no pixels")
            return as_rgb(picture)
        if not isinstance(picture, Picture) and not hasattr(picture, "read"):
            raise TypeError(
                f"a picture is a file or a Pillow image, not {type(picture).__name__}: of an array "
                "PIL.Image.fromarray makes one, of bytes io.BytesIO"
            )
        return self.encoder.open(picture)


def _still(picture: Picture) -> Picture:
    """A picture that stays: an animation's frames are one object, which Pillow changes."""
    with contextlib.suppress(AttributeError, IndexError, OSError, ValueError, ImageError):
        return as_rgb(picture) if picture.is_animated else picture
    return picture


def _is_one(pictures: object) -> bool:
    """Is it a picture (a Pillow image, a file's name, an open file) or nothing of the kind, and not
    several?"""
    single = isinstance(pictures, Picture | bytes | bytearray) or hasattr(pictures, "read")
    return single or not isinstance(pictures, Iterable)


def load_captioner(
    checkpoint: str | os.PathLike[str],
    *,
    revision: str | None = None,
    encoder: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Captioner:
    """Load a checkpoint and the encoder that it names.

    Args:
        checkpoint: a `.safetensors` or `.pt` file, or the Hub name `user/repo` of one.
        revision: branch, tag or commit of the Hub repo.
        encoder: where the encoder is now, if no longer where it was while training.
        device, precision: as DEVICE and PRECISION in `config.py`.
    """
    loaded = load_checkpoint(locate_checkpoint(checkpoint, revision))
    where = choose_device(str(device))
    return Captioner(loaded, loaded.load_encoder(encoder), where, choose_dtype(precision, where))


# --- Command line ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = commands.inference(argv)
    photos = find_photos(args.paths, args.recursive)
    if len(photos) == 1:
        open_image(photos[0].file)  # a wrong path is said before the models are loaded
    if args.attention:
        check_attention(args, photos)
    items = asked_about(args, photos)
    captioner = captioner_of(args)
    if args.attention:
        explain_one(captioner, args, photos[0].file)
        return
    with contextlib.ExitStack() as files:  # unlocked at once: a notebook keeps the error
        write_all(captioner, args, items, files)


def write_all(
    captioner: Captioner,
    args: argparse.Namespace,
    items: Sequence[tuple[Photo, str]],
    files: contextlib.ExitStack,
) -> None:
    """Write about photos, as it goes to the terminal and to files, which `files` closes."""
    asked = any(question for _, question in items)
    options = given_options(args)
    count = args.n_best
    if count > change_options(captioner.options, asked, **options).beam_size:
        groups = options.get("groups", 1)  # of which the beams are a multiple
        beams = f"--beam_size {-(-count // groups) * groups}"
        raise UserError(f"--n_best {count} wants as many beams: add {beams}")
    writer = open_output(args, [photo for photo, _ in items], asked, files) if args.write else None
    left = [item for item in items if writer is None or writer.wanted(*item)]
    if len(left) < len(items):
        where = f" in {args.output}, by their names in their folder" if args.output else ""
        said = f"{len(items) - len(left)} of {len(items)} are written already{where}"
        written = {photo for photo, _ in items} - {photo for photo, _ in left}
        if newer := sorted(photo.name for photo in written if photo.time > writer.time(photo)):
            said += f", but {len(newer)} of these photos are newer than that, such as {newer[0]}"
        remedy = "" if left and not newer else ": --existing overwrite writes them anew"
        print(shown(said + remedy), file=sys.stderr)
    alone = len(items) == len(args.paths) == 1 and not Path(args.paths[0]).expanduser().is_dir()
    table: dict[str, Any] = {}
    bad: dict[str, str] = {}
    found = captioner.stream(
        [photo.file for photo, _ in left],
        [question for _, question in left] if asked else None,
        batch_size=args.batch_size,
        **options,
    )
    pairs = zip(left, found, strict=True)
    with Bar(len(left), "photos", "photo", quiet=alone) as bar:
        bar.lines = sys.stderr  # standard output holds what is written about photos, and no more
        while part := list(itertools.islice(pairs, args.batch_size)):
            rows = []
            for (photo, question), each in part:
                if each.problem:
                    bad[photo.name] = each.problem
                    tqdm.write(f"can't be read: {each.problem}", file=sys.stderr)
                    continue
                texts = list(dict.fromkeys(each.texts))[:count]
                texts = [f"{args.prefix}{text}{args.suffix}" for text in texts]
                rows += [(photo, question, text) for text in texts]
                said = texts if count > 1 else texts[0]
                if question:
                    table.setdefault(photo.name, []).append({"question": question, "answer": said})
                else:
                    table[photo.name] = said
            if writer:
                writer.write(rows)
            for photo, question, text in rows:
                about = f"{shown(photo.name)}: {question}".rstrip()
                tqdm.write(text if alone else f"{about} {text}", file=sys.stdout)
            bar.step(len(part))
    if args.json:
        say_json(table)
    if bad:
        more = [f"and {len(bad) - 10} more, as said above"] * (len(bad) > 10)
        count = len({photo for photo, _ in items})
        said = f"{len(bad)} of {count} photos can't be read:"
        raise UserError("\n  ".join([said, *[*bad.values()][:10], *more]))


def find_photos(paths: Sequence[str], recursive: bool = True) -> list[Photo]:
    """The photos named, and those in the folders named, by folder and name.

    Names are relative to the folder; of several paths, as these were given. Each is named once.
    What is no photo is counted aloud, hidden files are passed over.
    """
    found: dict[str, Photo] = {}
    others: Counter[str] = Counter()

    for text in paths:
        path, above = Path(text).expanduser(), "" if len(paths) == 1 else text
        files = {above or path.name: path}
        if os.path.isdir(path):
            names = [*files_in(path, recursive, others)]
            files = {os.path.join(above, name): path / name for name in names if is_photo(name)}
            strange = (Path(name).suffix.lower() for name in names if not is_photo(name))
            others.update(shown(suffix) or "no suffix" for suffix in strange)
        for name, file in files.items():
            plain = name.encode(errors="backslashreplace").decode()  # bytes may be no UTF-8
            found.setdefault(os.path.abspath(file), Photo(file, plain))
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        advice = "" if others.keys().isdisjoint(OTHER_PICTURES) else "; make JPEGs of the pictures"
        print(f"passed over, as no photos: {kinds}{advice}", file=sys.stderr)
    if not found:
        raise UserError(f"there is no photo in {', '.join(paths)}")
    return [*found.values()]


def asked_about(args: argparse.Namespace, photos: Sequence[Photo]) -> list[tuple[Photo, str]]:
    """Each photo with what is asked about it, which is "" where a caption is wanted."""
    if not args.questions_file:
        return [(photo, args.question or "") for photo in photos]
    by_name = {photo.name: photo for photo in photos}
    file = Path(args.questions_file).expanduser()
    if not file.is_file():
        raise UserError(f"--questions_file {file}: there is no such file")
    with contextlib.redirect_stdout(sys.stderr):  # standard output holds answers, and no more
        table = load_questions(file, False, read_questions(file, answered=False))
    real = find_names(table, by_name)
    if missing := [name for name in table if name not in real]:
        said = f"{file} asks about {len(missing):,} photos that are not in {', '.join(args.paths)}"
        if not real:
            raise UserError(f"{said}, first {missing[0]!r}")
        print(shown(f"passed over: {said}, first {missing[0]!r}"), file=sys.stderr)
    there = [(by_name[real[name]], asked) for name, asked in table.items() if name in real]
    return [(photo, text.question) for photo, asked in there for text in asked]


def captioner_of(args: argparse.Namespace) -> Captioner:
    """The captioner that the flags name."""
    flags = ("checkpoint", "revision", "encoder", "device", "precision")
    return load_captioner(**{flag: getattr(args, flag) for flag in flags})


def check_attention(args: argparse.Namespace, photos: Sequence[Photo]) -> None:
    """Say what can't be drawn before the models are loaded."""
    if len(photos) > 1 or args.questions_file or args.n_best > 1 or args.write:
        raise UserError(
            "--attention draws one photo and its best caption: give one file, at most one "
            "--question, and neither --n_best nor --write"
        )
    if Path(args.attention).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--attention {args.attention}: the name must end in .png or .jpg")
    check_output("--attention", args.attention, photos[0].file, args.checkpoint)


def explain_one(captioner: Captioner, args: argparse.Namespace, path: Path) -> None:
    """Print a photo's caption, or an answer about it, and draw where the decoder looked."""
    image = captioner.encoder.open(path)
    grid, (best, *_) = captioner.explain(image, args.question or None, **given_options(args))
    if not best.words:
        raise UserError("the decoder wrote no word, so there is nothing to draw")
    out = Path(args.attention).expanduser()
    with atomic_write(out) as temporary:
        kind = "png" if out.suffix.lower() == ".png" else "jpeg"
        draw_attention(image, grid, best.words).save(temporary, kind)
    print(f"{best.text}\n{out}: where the decoder looked")
    if args.json:
        pair = {"question": args.question, "answer": best.text}
        say_json({path.name: [pair] if args.question else best.text})


if __name__ == "__main__":
    run_script(main)
