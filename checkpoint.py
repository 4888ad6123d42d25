"""One self-contained checkpoint format: `.safetensors` for use, `.pt` for going on with training.

Both hold the decoder's weights and a description: the decoder's size, the encoder's name, revision
and preprocessing, the tokenizer, the generation defaults and the settings it was trained with.
Neither holds the frozen encoder. A digest over all content finds any changed value.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from decoder import DecoderConfig
from generation import GenerationOptions
from model import CaptionModel
from tokenizer import CaptionTokenizer
from utils import UserError, atomic_write, first_line, write_error

FORMAT = 1


@dataclass
class Checkpoint:
    """A trained captioner, all but the encoder.

    Args:
        encoder: `FrozenEncoder.identity()` of the encoder it was trained on.
        generation: options to caption with unless others are asked for.
        tasks: what it learned, of `dataset.TASKS`.
        settings: the configuration it was trained with, for the record.
        scores: what was measured of it, e.g. {"val_loss": 2.5}.
        training: what going on with training needs; None in a `.safetensors`.
    """

    model: CaptionModel
    tokenizer: CaptionTokenizer
    encoder: dict[str, Any]
    generation: GenerationOptions
    tasks: tuple[str, ...]
    settings: dict[str, Any]
    scores: dict[str, float]
    training: dict[str, Any] | None = None

    def require(self, task: str) -> None:
        """Refuse a task of `dataset.TASKS` that it never learned."""
        if task not in self.tasks:
            raise UserError(
                f"this checkpoint was not trained for {task}, only for {' and '.join(self.tasks)}: "
                f'train one with --tasks "captions,questions"'
            )

    def description(self) -> dict[str, Any]:
        """All but weights and training state, as plain values."""
        return {
            "format": FORMAT,
            "feature_width": self.model.feature_width,
            "decoder": asdict(self.model.config),
            "encoder": self.encoder,
            "tokenizer": self.tokenizer.to_json(),
            "generation": asdict(self.generation),
            "tasks": list(self.tasks),
            "settings": self.settings,
            "scores": self.scores,
        }


def digest(content: Any) -> str:
    """A hash of tensors and plain values, however nested."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().view(-1)
            hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hasher.update(flat.view(torch.uint8).numpy())
        elif isinstance(value, dict):
            hasher.update(b"{")
            for key in sorted(value, key=str):
                feed(str(key))
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            hasher.update(f"[{len(value)}".encode())
            for part in value:
                feed(part)
        else:
            hasher.update(f"{type(value).__name__}:{value!r};".encode())

    feed(content)
    return hasher.hexdigest()


# --- Saving ---------------------------------------------------------------------------------


def save_for_use(path: Path, checkpoint: Checkpoint) -> str:
    """Write a `.safetensors` that `inference.py` can use, whole or not at all; its digest."""
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    text = json.dumps(checkpoint.description())
    metadata = {"captioner": text, "digest": digest([text, weights])}
    with atomic_write(path) as temporary:
        try:
            save_file(weights, temporary, metadata=metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # the library keeps it in its text
            if number:
                raise write_error(OSError(int(number[1]), str(error)), path) from error
            raise UserError(f"{path} can't be written: {error}") from error
    return metadata["digest"]


def save_for_training(path: Path, checkpoint: Checkpoint) -> str:
    """Write a `.pt` from which training goes on, whole or not at all; its digest."""
    content = {
        "captioner": json.dumps(checkpoint.description()),
        "model": checkpoint.model.state_dict(),
        "training": checkpoint.training,
    }
    content["digest"] = digest(content)
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            # What torch makes of a full disk; the file system's own error is its cause or context.
            if isinstance(error.__context__, OSError):
                raise write_error(error.__context__, path) from error
            raise UserError(f"{path} can't be written (is the disk full?): {error}") from error
    return content["digest"]


def stored_digest(path: Path) -> str | None:
    """The digest that a checkpoint bears, its content unread; None where it is no checkpoint."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("digest")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("digest")
    except Exception:  # noqa: BLE001 - what is no checkpoint fails in any way, and bears none
        return None


# --- Loading --------------------------------------------------------------------------------


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a `.safetensors` or `.pt` checkpoint, verified; nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    try:
        description = json.loads(content["captioner"])
        if description["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer version: update this project")
        return Checkpoint(
            _restore_model(description, content["model"]),
            CaptionTokenizer.from_json(description["tokenizer"]),
            description["encoder"],
            GenerationOptions(**description["generation"]),
            tuple(description.get("tasks", ["captions"])),
            description["settings"],
            description["scores"],
            content.get("training"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # Its digest is right, so nobody changed it by accident: it was never one of ours.
        raise UserError(f"{path} is not a checkpoint of this project ({error!r})") from None


class _NoDraws(TorchFunctionMode):
    """Leaves out drawing first weights: without storage torch would load its compiler for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _restore_model(description: dict[str, Any], weights: dict[str, Tensor]) -> CaptionModel:
    # Without storage of its own, the model takes no memory before the shapes are known to fit.
    with torch.device("meta"), _NoDraws():
        config = DecoderConfig(**description["decoder"])
        model = CaptionModel(description["feature_width"], config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True).eval()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a .safetensors file: {error}") from None
    if "captioner" not in metadata:
        raise UserError(f"{path} holds weights, but not a captioner of this project")
    if metadata.get("digest") != digest([metadata["captioner"], weights]):
        raise UserError(f"{path} is damaged: its content doesn't match its checksum")
    return {"captioner": metadata["captioner"], "model": weights}


def _read_pt(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged or not a .pt checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_line(error)
        raise UserError(f"{path} is refused: it holds more than data ({reason})") from None
    except Exception as error:  # noqa: BLE001 - a changed byte can make any nonsense of a pickle
        raise UserError(f"{path} is damaged: {error!r}") from None
    if not isinstance(content, dict) or "captioner" not in content:
        raise UserError(f"{path} is not a checkpoint of this project")
    stored = content.pop("digest", None)
    if stored != digest(content):
        raise UserError(f"{path} is damaged: its content doesn't match its checksum")
    return content
