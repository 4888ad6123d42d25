"""Export a captioner for people and programs that don't have this project.

A folder that plain `transformers` loads (`pipeline("image-text-to-text")`), or an ONNX file:

    python -m tools.export --checkpoint captioner_best_cider.safetensors --format transformers
    pip install -r requirements-export.txt
    python -m tools.export --checkpoint captioner_best_cider.safetensors --with-encoder
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.export)

import argparse
import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save

from checkpoint import Checkpoint, load_checkpoint
from encoder import FrozenEncoder
from hub import locate_checkpoint, repository_files
from tokenizer import START_ID
from utils import UserError, check_output, lock, require_extra, run_script, size_text, write_file

LIMIT = 1e-4  # what logits may differ by; rounding alone gives some 1e-6


def write_folder(
    checkpoint: Checkpoint, encoder: FrozenEncoder, folder: Path, weights: bool
) -> None:
    """Without the encoder's `weights` its name is written, from which it will be loaded."""
    files = repository_files(checkpoint, encoder.for_others(weights))
    tensors = checkpoint.tensors()
    if weights:
        tower = encoder.tower.state_dict()
        tensors |= {f"tower.{name}": tensor.contiguous() for name, tensor in tower.items()}
    write_file(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    for name, text in files.items():
        write_file(folder / name, text)


@torch.no_grad()
def logits_difference(
    checkpoint: Checkpoint, encoder: FrozenEncoder, folder: Path, weights: bool
) -> float:
    """How far the folder's logits, loaded as others will, are from ours, about noise."""
    options = {} if weights else {"encoder": encoder.source["name"]}
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    photo = Image.effect_noise((224, 224), 64).convert("RGB")
    inputs = encoder.preprocess([photo])
    tokens = torch.arange(START_ID, checkpoint.model.config.max_length)[None]
    tokens = tokens % checkpoint.model.config.vocab_size
    places = torch.arange(tokens.shape[1])[None]
    hidden = checkpoint.model.hidden(encoder(inputs), tokens, places, torch.zeros_like(tokens))
    theirs = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
    return float((theirs - checkpoint.model.decoder.logits(hidden)).abs().max())


def main(argv: Sequence[str] | None = None) -> None:
    args = commands.export(argv)
    {"onnx": as_onnx, "transformers": as_folder}[args.format](args)


def as_folder(args: argparse.Namespace) -> None:
    """The folder for `transformers`, with the encoder unless told otherwise."""
    out = Path(args.out).expanduser()
    made = out / "unfinished"
    check_output("--out", out / "config.json")
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.callback(os.close, place := os.open(out, os.O_RDONLY))
        if lock(place) is False or any(path != made for path in out.iterdir()):
            other = "is there already, or another run is writing to it"
            raise UserError(f"--out {out} {other}: give the name of a new folder")
        try:
            shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
            checkpoint = checkpoint_of(args)
            encoder = checkpoint.load_encoder(args.encoder)
            weights = args.with_encoder is not False
            write_folder(checkpoint, encoder, made, weights)
            difference = logits_difference(checkpoint, encoder, made, weights)
            if not difference <= LIMIT:
                raise UserError(f"{out}'s logits differ by {difference:.2g} from ours: a bug")
            for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(out / file.name)  # last what is looked for first: a kill leaves none
            made.rmdir()
        except BaseException:  # Ctrl-C, too: what was not compared is not left to be used
            shutil.rmtree(out, ignore_errors=True)
            raise
    size = size_text(sum(file.stat().st_size for file in out.iterdir()))
    print(f"{out}: {size}, logits within {difference:.1g} of ours")
    name = encoder.source["name"]
    needs = f', model_kwargs={{"encoder": {name!r}}}' if not weights and os.path.isdir(name) else ""
    print(
        f'  pipeline("image-text-to-text", {os.fspath(out)!r}, trust_remote_code=True{needs})'
        f'("photo.jpg", text="{"" if "captions" in checkpoint.tasks else "is it raining?"}")'
    )


def as_onnx(args: argparse.Namespace) -> None:
    """The decoder as an ONNX file, and if wanted the encoder as another."""
    out = Path(args.out).expanduser()
    check_output("--out", out, args.checkpoint)
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: the name must end in .onnx")
    graphs = require_extra("tools.onnx_graph", "requirements-export.txt", "the export")
    checkpoint = checkpoint_of(args)
    graphs.check_size(checkpoint.model, "decoder")
    encoder = checkpoint.load_encoder(args.encoder) if args.with_encoder else None
    if encoder:
        graphs.check_size(encoder, "encoder")
    difference = graphs.export(checkpoint, out)
    print(f"{out}: {size_text(out.stat().st_size)}, logits within {difference:.1g} of PyTorch's")
    if encoder:
        path = out.with_suffix(f".encoder{out.suffix}")
        difference = graphs.export_encoder(encoder, path)
        size = size_text(path.stat().st_size)
        print(f"{path}: {size}, features within {difference:.1g} of PyTorch's")


def checkpoint_of(args: argparse.Namespace) -> Checkpoint:
    return load_checkpoint(locate_checkpoint(args.checkpoint, args.revision))


if __name__ == "__main__":
    run_script(main)
