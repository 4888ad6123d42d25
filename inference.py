"""Caption a picture, or a folder of them, with a trained checkpoint.

    python inference.py --image_path photo.jpg --checkpoint captioner_best_cider.safetensors
    python inference.py --image_path photos/ --checkpoint user/repo --json
    python inference.py --image_path photo.jpg --checkpoint user/repo --question "is it raining?"
    python inference.py --image_path photo.jpg --checkpoint user/repo --attention words.png

From Python: `load_captioner("captioner.safetensors").caption(["photo.jpg"])`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from attention import PatchGrid, WordMap, draw_attention, patch_grid, word_maps
from checkpoint import Checkpoint, load_checkpoint
from dataset import Question, load_questions
from encoder import FrozenEncoder, ImageError, open_image
from features import encode
from generation import (
    GenerationOptions,
    Hypothesis,
    add_option_flags,
    change_options,
    generate,
    given_options,
)
from hub import locate_checkpoint
from tokenizer import START_ID
from utils import (
    UserError,
    atomic_write,
    autocast,
    choose_device,
    choose_dtype,
    run_script,
    script_parser,
)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

T = TypeVar("T")


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
        self.options = checkpoint.generation
        self.tasks, self.require = checkpoint.tasks, checkpoint.require
        self.encoder = encoder.to(device)
        self.device, self.dtype = device, dtype

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> features (images, patches, width)."""
        # As in the feature cache, half precision included: what the decoder was trained on.
        return encode(self.encoder, [self.encoder.preprocess(images)], self.dtype).float()

    def hypotheses(
        self, images: Sequence[Image.Image], **options: Any
    ) -> list[list[tuple[str, Hypothesis]]]:
        """For each picture its captions, best first, with what the model thinks of them.

        Args:
            options: fields of `GenerationOptions` that replace the checkpoint's own.
        """
        chosen = change_options(self.options, **options)
        with autocast(self.device, self.dtype):
            found = generate(self.model, self.features(images), chosen)
        return [[(self.tokenizer.decode(h.tokens), h) for h in group] for group in found]

    def caption(
        self, images: Sequence[str | os.PathLike[str] | Image.Image], **options: Any
    ) -> list[str]:
        """The best caption of each picture, given as a file or as a Pillow image.

        Raises:
            ImageError: a file is missing or no picture.
            UserError: the checkpoint was trained for questions only.
        """
        self.require("captions")
        return [group[0][0] for group in self.hypotheses(self._open(images), **options)]

    def answer(
        self,
        images: Sequence[str | os.PathLike[str] | Image.Image],
        questions: Sequence[str],
        **options: Any,
    ) -> list[str]:
        """The answer to a question about each picture; greedy unless options say otherwise.

        Raises:
            ImageError: a file is missing or no picture.
            UserError: the checkpoint wasn't trained for questions.
        """
        self.require("questions")
        prefixes = self._prefixes(questions)
        chosen = change_options(GenerationOptions(), **options)
        with autocast(self.device, self.dtype):
            features = self.features(self._open(images))
            found = generate(self.model, features, chosen, prefixes)
        return [self.tokenizer.decode(group[0].tokens) for group in found]

    def explain(
        self, image: Image.Image, question: str | None = None, **options: Any
    ) -> tuple[PatchGrid, list[Explained]]:
        """A picture's captions, or answers to a question about it, with where each word looked.

        Args:
            image: as `encoder.open` gives it.
            options: as in `hypotheses`, or for a question as in `answer`.

        Raises:
            UserError: the checkpoint wasn't trained for that, or its encoder has no patches.
        """
        self.require("captions" if question is None else "questions")
        usual = self.options if question is None else GenerationOptions()
        prefixes = [[START_ID]] if question is None else self._prefixes([question])
        features = self.features([image])
        grid = patch_grid(self.encoder, image.size, features.shape[1])
        with autocast(self.device, self.dtype):
            (found,) = generate(self.model, features, change_options(usual, **options), prefixes)
            return grid, [
                Explained(
                    self.tokenizer.decode(h.tokens),
                    h,
                    word_maps(self.model, self.tokenizer, features, prefixes[0], h.tokens, grid),
                )
                for h in found
            ]

    def _prefixes(self, questions: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.prefixes(questions, self.model.config.max_length)

    def _open(self, images: Sequence[str | os.PathLike[str] | Image.Image]) -> list[Image.Image]:
        return [
            im.convert("RGB") if isinstance(im, Image.Image) else self.encoder.open(im)
            for im in images
        ]


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

    Raises:
        UserError: the checkpoint or its encoder can't be loaded, or they don't fit each other.
    """
    loaded = load_checkpoint(locate_checkpoint(checkpoint, revision))
    where = torch.device(choose_device(device))
    tower = FrozenEncoder.load_as_trained(loaded.encoder, loaded.model.feature_width, encoder)
    return Captioner(loaded, tower, where, choose_dtype(precision, where))


# --- Command line ---------------------------------------------------------------------------


def add_captioner_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `captioner_of` reads."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=".safetensors, .pt, or user/repo on the Hub")
    add("--revision", help="branch, tag or commit on the Hub [newest]")
    add("--encoder", help="the encoder, if it moved since training [as the checkpoint says]")
    add("--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    add("--precision", default="auto", help="auto, bf16 or fp32 [%(default)s]")


def captioner_of(args: argparse.Namespace) -> Captioner:
    """The captioner that the flags name; raises as `load_captioner`."""
    return load_captioner(
        args.checkpoint,
        revision=args.revision,
        encoder=args.encoder,
        device=args.device,
        precision=args.precision,
    )


def find_pictures(path: Path) -> list[Path]:
    """The picture, or the pictures of a folder in the order of their names.

    Raises:
        UserError: there is no such file, or no picture in the folder.
    """
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"there is no picture in the folder {path}")
    return found


def write_about(
    items: Sequence[tuple[Path, str]],
    batch_size: int,
    write: Callable[[list[Image.Image], list[str]], list[T]],
    captioner: Captioner,
) -> tuple[list[T | None], dict[str, str]]:
    """What `write` says of each picture (with a question), and what is wrong with unreadable ones.

    It is None where the picture can't be read.
    """
    written: list[T | None] = []
    bad: dict[str, str] = {}
    bar = tqdm(total=len(items), unit="photo", disable=True if len(items) == 1 else None)
    with bar:
        for start in range(0, len(items), batch_size):
            images: list[Image.Image | None] = []
            part = items[start : start + batch_size]
            for file, _ in part:
                try:
                    images.append(captioner.encoder.open(file))
                except ImageError as error:
                    images.append(None)
                    bad[file.name] = str(error)
            there = [(image, text) for image, (_, text) in zip(images, part, strict=True) if image]
            found = iter(write(*map(list, zip(*there, strict=True))) if there else [])
            written += [next(found) if image else None for image in images]
            bar.update(len(part))
    return written, bad


def questions_of(args: argparse.Namespace, files: Sequence[Path]) -> list[tuple[Path, Question]]:
    """The pictures with what is asked about each; none where captions are wanted.

    Raises:
        UserError: the questions file names a picture that isn't there.
    """
    if args.question:
        return [(file, Question(args.question)) for file in files]
    if not args.questions_file:
        return []
    by_name = {file.name: file for file in files}
    table = load_questions(Path(args.questions_file).expanduser(), answered=False)
    missing = [name for name in table if name not in by_name]
    if missing:
        raise UserError(
            f"{args.questions_file} asks about {len(missing)} pictures that are not in "
            f"{args.image_path}, first {missing[0]!r}"
        )
    return [(by_name[name], question) for name, group in table.items() for question in group]


def command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_path", required=True, help="a picture, or a folder of pictures")
    add_captioner_flags(parser)
    add("--question", help="answer this question about each picture instead of captioning it")
    add("--questions_file", help="answer many: a questions.json, with or without answers")
    add("--attention", help="draw where the decoder looked, word by word, into this .png or .jpg")
    add("--n_best", type=int, default=1, help="captions of each picture, best first [%(default)s]")
    add("--batch_size", type=int, default=16, help="pictures at once [%(default)s]")
    add("--json", action="store_true", help="last line: captions by name, or questions and answers")
    add_option_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = command_line(argv)
    path = Path(args.image_path).expanduser()
    files = find_pictures(path)
    if len(files) == 1 and not path.is_dir():
        open_image(path)  # a wrong path is said before the models are loaded
    if args.attention:
        check_attention(args, path)
    chosen = given_options(args)
    captioner = captioner_of(args)
    if args.attention:
        return explain_one(captioner, args, path, chosen)
    batch_size = max(1, args.batch_size)
    if args.question or args.questions_file:
        bad = answer_all(captioner, questions_of(args, files), batch_size, chosen, args.json)
    else:
        bad = caption_all(captioner, args, files, batch_size, chosen)
    if bad:
        listing = "\n  ".join(bad.values())
        raise UserError(f"{len(bad)} of {len(files)} pictures can't be read:\n  {listing}")
    return 0


def check_attention(args: argparse.Namespace, path: Path) -> None:
    """Say what can't be drawn before the models are loaded.

    Raises:
        UserError: more than one picture, or a file name of another kind.
    """
    if path.is_dir() or args.questions_file:
        raise UserError("--attention draws one picture: give a file and at most one --question")
    if Path(args.attention).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--attention {args.attention}: the name must end in .png or .jpg")


def explain_one(
    captioner: Captioner, args: argparse.Namespace, path: Path, options: dict[str, Any]
) -> int:
    """Print a picture's caption, or an answer about it, and draw where the decoder looked."""
    image = captioner.encoder.open(path)
    grid, found = captioner.explain(image, args.question or None, **options)
    best = found[0]
    if not best.words:
        raise UserError("the decoder wrote no word, so there is nothing to draw")
    out = Path(args.attention).expanduser()
    with atomic_write(out) as temporary:
        kind = "png" if out.suffix.lower() == ".png" else "jpeg"
        draw_attention(image, grid, best.words).save(temporary, kind)
    print(best.text)
    print(f"{out}: where the decoder looked")
    if args.json:
        pair = {"question": args.question, "answer": best.text}
        print(json.dumps({path.name: [pair] if args.question else best.text}, ensure_ascii=False))
    return 0


def caption_all(
    captioner: Captioner,
    args: argparse.Namespace,
    files: Sequence[Path],
    batch_size: int,
    options: dict[str, Any],
) -> dict[str, str]:
    """Print the pictures' captions; returns what is wrong with those that can't be read.

    Raises:
        UserError: more captions of a picture are wanted than are searched for.
    """
    captioner.require("captions")
    if args.n_best < 1:
        raise UserError(f"--n_best is {args.n_best}: it must be at least 1")
    beams = change_options(captioner.options, **options).beam_size
    if args.n_best > beams:
        count = args.n_best
        raise UserError(f"--n_best {count} wants as many beams: add --beam_size {count}")

    def write(images: list[Image.Image], _: list[str]) -> list[list[str]]:
        found = captioner.hypotheses(images, **options)
        return [list(dict.fromkeys(text for text, _ in group))[: args.n_best] for group in found]

    written, bad = write_about([(file, "") for file in files], batch_size, write, captioner)
    captions = {file.name: best for file, best in zip(files, written, strict=True) if best}
    named = Path(args.image_path).expanduser().is_dir()
    for name, best in captions.items():
        for caption in best:
            print(f"{name}: {caption}" if named else caption)
    if args.json:
        single = {name: best[0] for name, best in captions.items()}
        print(json.dumps(captions if args.n_best > 1 else single, ensure_ascii=False))
    return bad


def answer_all(
    captioner: Captioner,
    asked: Sequence[tuple[Path, Question]],
    batch_size: int,
    options: dict[str, Any],
    as_json: bool,
) -> dict[str, str]:
    """Print the answers; returns what is wrong with the pictures that can't be read."""

    def write(images: list[Image.Image], questions: list[str]) -> list[str]:
        return captioner.answer(images, questions, **options)

    items = [(file, question.text) for file, question in asked]
    written, bad = write_about(items, batch_size, write, captioner)
    table: dict[str, list[dict[str, str]]] = {}
    alone = len(items) == 1
    for (file, question), answer in zip(items, written, strict=True):
        if answer is None:
            continue
        table.setdefault(file.name, []).append({"question": question, "answer": answer})
        print(answer if alone else f"{file.name}: {question} {answer}")
    if as_json:
        print(json.dumps(table, ensure_ascii=False))
    return bad


if __name__ == "__main__":
    run_script(main)
