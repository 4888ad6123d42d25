"""Caption a picture, or a folder of them, with a trained checkpoint.

    python inference.py --image_path photo.jpg --checkpoint captioner_best_cider.safetensors
    python inference.py --image_path photos/ --checkpoint user/repo --json

From Python: `load_captioner("captioner.safetensors").caption(["photo.jpg"])`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import Checkpoint, load_checkpoint
from encoder import FrozenEncoder, ImageError, open_image
from generation import (
    Hypothesis,
    add_option_flags,
    change_options,
    generate,
    given_options,
)
from hub import download_checkpoint
from utils import UserError, autocast, choose_device, choose_dtype, run_script

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


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
        self.encoder = encoder.to(device)
        self.device, self.dtype = device, dtype

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> features (images, patches, width)."""
        inputs = {key: value.to(self.device) for key, value in
                  self.encoder.preprocess(images).items()}  # fmt: skip
        with autocast(self.device, self.dtype):
            # Half precision as in the feature cache: what the decoder was trained on.
            return self.encoder(inputs).half().float()

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
        """
        opened = [im.convert("RGB") if isinstance(im, Image.Image) else self.encoder.open(im)
                  for im in images]  # fmt: skip
        return [group[0][0] for group in self.hypotheses(opened, **options)]


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
    loaded = load_checkpoint(_locate(checkpoint, revision))
    where = torch.device(choose_device(device))
    tower = FrozenEncoder.load_as_trained(loaded.encoder, encoder)
    return Captioner(loaded, tower, where, choose_dtype(precision, where))


def _locate(checkpoint: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(checkpoint)
    if os.path.exists(name) or Path(name).suffix in (".safetensors", ".pt"):
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return download_checkpoint(name, revision)
    raise UserError(f"there is no checkpoint {name}")


# --- Command line ---------------------------------------------------------------------------


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


def caption_files(
    captioner: Captioner, files: Sequence[Path], batch_size: int, options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by file name, and what is wrong with the files that can't be read."""
    captions: dict[str, str] = {}
    bad: dict[str, str] = {}
    bar = tqdm(total=len(files), unit="photo", disable=True if len(files) == 1 else None)
    with bar:
        for start in range(0, len(files), batch_size):
            part, images = files[start : start + batch_size], {}
            for file in part:
                try:
                    images[file.name] = captioner.encoder.open(file)
                except ImageError as error:
                    bad[file.name] = str(error)
            if images:
                found = captioner.caption(list(images.values()), **options)
                captions |= zip(images, found, strict=True)
            bar.update(len(part))
    return captions, bad


def command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image_path", required=True, help="a picture, or a folder of pictures")
    add("--checkpoint", required=True, help=".safetensors, .pt, or user/repo on the Hub")
    add("--revision", help="branch, tag or commit on the Hub [newest]")
    add("--encoder", help="the encoder, if it moved since training [as the checkpoint says]")
    add("--batch_size", type=int, default=16, help="pictures at once [%(default)s]")
    add("--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    add("--precision", default="auto", help="auto, bf16 or fp32 [%(default)s]")
    add("--json", action="store_true", help='last line: {"name.jpg": "caption", ...}')
    add_option_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = command_line(argv)
    path = Path(args.image_path).expanduser()
    files = find_pictures(path)
    if len(files) == 1 and not path.is_dir():
        open_image(path)  # a wrong path is said before the models are loaded
    chosen = given_options(args)
    captioner = load_captioner(
        args.checkpoint,
        revision=args.revision,
        encoder=args.encoder,
        device=args.device,
        precision=args.precision,
    )
    captions, bad = caption_files(captioner, files, max(1, args.batch_size), chosen)
    for name, caption in captions.items():
        print(f"{name}: {caption}" if path.is_dir() else caption)
    if args.json:
        print(json.dumps(captions, ensure_ascii=False))
    if bad:
        listing = "\n  ".join(bad.values())
        raise UserError(f"{len(bad)} of {len(files)} pictures have no caption:\n  {listing}")
    return 0


if __name__ == "__main__":
    run_script(main)
