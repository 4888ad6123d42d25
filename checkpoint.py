"""One self-contained checkpoint format: `.safetensors` for use, `.pt` for going on with training.

Both hold the decoder's weights and a description: the decoder's size, the encoder's name, revision
and preprocessing, the tokenizer, the generation defaults and the settings it was trained with.
Neither holds the frozen encoder. A digest over all content finds any changed value.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from decoder import DecoderConfig
from encoder import FrozenEncoder, public
from model import CaptionModel
from options import GenerationOptions, typed
from rerank import Reranker
from tokenizer import CaptionTokenizer
from utils import UserError, atomic_write, last_part, lfs_note, refused, write_file

FORMAT = 3
RERANKER = "reranker."  # what the names of its tensors begin with


@dataclass
class Checkpoint:
    """A trained captioner, all but the encoder."""

    model: CaptionModel
    tokenizer: CaptionTokenizer
    encoder: dict[str, Any]  # FrozenEncoder.identity() of what it was trained on
    generation: GenerationOptions  # to caption with unless others are asked for
    tasks: tuple[str, ...]  # what it learned, of `options.TASKS`
    settings: dict[str, Any]  # the configuration it was trained with, for the record
    scores: dict[str, float]  # what was measured of it, e.g. {"val_loss": 2.5}
    training: dict[str, Any] | None = None  # for going on with training; None in a `.safetensors`
    reranker: Reranker | None = None  # to choose among the captions of a search

    def load_encoder(self, moved_to: str | None = None) -> FrozenEncoder:
        """The encoder that it was trained on, from where it is now, if no longer where it was."""
        return FrozenEncoder.load_as_trained(self.encoder, self.model.feature_width, moved_to)

    def for_others(self) -> Checkpoint:
        """As it may leave this machine, whose folders it tells by their last part."""
        settings = {n: last_part(v) if isinstance(v, str) else v for n, v in self.settings.items()}
        return replace(self, encoder=public(self.encoder), settings=settings, training=None)

    def require(self, task: str) -> None:
        """Refuse a task that it never learned."""
        if task not in self.tasks:
            ask = "ask it by --question (evaluate.py: --task questions), or " * (task == "captions")
            raise UserError(
                f"this checkpoint was not trained for {task}, only for {' and '.join(self.tasks)}: "
                f'{ask}train one with --tasks "captions,questions"'
            )

    def tensors(self) -> dict[str, Tensor]:
        """The weights and, by names that begin with `RERANKER`, what the reranker holds."""
        more = self.reranker.tensors() if self.reranker else {}
        tensors = self.model.state_dict() | {RERANKER + name: more[name] for name in more}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

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


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], of: str = "") -> None:
    """Refuse to go on with, or begin with, a checkpoint that another configuration made."""
    if differing := "; ".join(_differing(there, here, of)):
        raise UserError(
            f"the checkpoint was trained with another configuration ({differing}): "
            "restore it, or start anew with --resume_checkpoint_path none --start_checkpoint none"
        )


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], of: str) -> Iterator[str]:
    for key in {**there, **here}:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{of}{key}.")
        elif old != new:
            yield f"{of}{key} {old} there, {new} here"


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
        elif value is None or type(value) in (bool, int, float, str):
            hasher.update(f"{type(value).__name__}:{value!r};".encode())
        else:
            raise TypeError(f"{value!r} in a checkpoint: it would be saved, but not be loaded")

    feed(content)
    return hasher.hexdigest()


# --- Saving ---------------------------------------------------------------------------------


def save_for_use(path: Path, checkpoint: Checkpoint) -> str:
    """Write a `.safetensors` that `inference.py` can use, whole or not at all; its digest."""
    weights = checkpoint.tensors()
    text = json.dumps(checkpoint.description())
    metadata = {"captioner": text, "digest": digest([text, weights]), "format": "pt"}  # as HF asks
    write_file(path, save(weights, metadata))
    return metadata["digest"]


def link_for_others(path: Path, other: Path) -> None:
    """Give a checkpoint a second name under which it may leave this machine.

    It is the same file; where that tells of folders here, one that doesn't.
    """
    checkpoint = load_checkpoint(path)
    told = checkpoint.for_others()
    if told.description() == checkpoint.description():
        link_or_copy(path, other)
    else:
        save_for_use(other, told)


def save_for_training(path: Path, checkpoint: Checkpoint) -> str:
    """Write a `.pt` from which training goes on, whole or not at all; its digest."""
    content = {
        "captioner": json.dumps(checkpoint.description()),
        "model": checkpoint.tensors(),
        "training": checkpoint.training,
    }
    content["digest"] = digest(content)
    # An open file: what goes wrong with one that torch opens itself, it says in its own words.
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # in closing what the file system's own error cut off
            raise error.__context__ or error from None
    return content["digest"]


def link_or_copy(file: Path, path: Path) -> None:
    """Give a file a second name; where the file system knows no links, make a copy."""
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)


def name_again(path: Path, file: Path) -> str | None:
    """Give a checkpoint a second name, in place of what is there; its digest."""
    with atomic_write(path) as temporary:
        temporary.unlink()
        link_or_copy(file, temporary)
    return stored_digest(path)


def stored_digest(path: Path) -> str | None:
    """The digest that a checkpoint bears, its content unread; None where it is no checkpoint."""
    if not path.is_file():
        return None  # a pipe would be waited for
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
        files = (path if path.is_dir() else path.parent).glob("*.safetensors")
        newest = max(filter(Path.is_file, files), key=os.path.getmtime, default=None)
        there = f"; the newest there is {newest}" if newest else ""
        raise UserError(f"there is no checkpoint {path}: name a .safetensors or .pt{there}")
    open(path, "rb").close()  # libraries say of what may not be read that it is not there, or none
    # One that got another suffix on its way is known by its content.
    packed = path.suffix == ".pt" or (path.suffix != ".safetensors" and zipfile.is_zipfile(path))
    damaged = f"{path} is damaged, holds more than data or is not a checkpoint of this project"
    with refused(damaged + lfs_note(path)):
        content = _read_pt(path) if packed else _read_safetensors(path)
        if "captioner" not in content:
            raise UserError("it is not a captioner of ours, as an export is none")
        stored = content.pop("digest", None)
        if stored != digest(content if packed else [content["captioner"], content["model"]]):
            raise UserError("its content doesn't match its checksum")
    # Its digest is right, so nobody changed it by accident: it was never one of ours.
    other = "is not a checkpoint of this project, or of another decoder.py or model.py"
    with refused(f"{path} {other}"):
        description = json.loads(content["captioner"])
        newer = description["format"] > FORMAT
        made = None if newer else _restored(description, content["model"], content.get("training"))
    if newer:
        raise UserError(f"{path} was written by a newer version: update this project")
    if bad := [name for name, tensor in made.tensors().items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} holds weights that are not finite ({bad[0]}): take another")
    return made


def _restored(
    description: dict[str, Any], tensors: dict[str, Tensor], training: dict[str, Any] | None
) -> Checkpoint:
    """A checkpoint of its parts; raises, whatever it be, where they can't have been one's."""
    tokenizer = CaptionTokenizer.from_json(description["tokenizer"])
    config = typed(DecoderConfig, description["decoder"])
    if len(tokenizer) != config.vocab_size:
        raise ValueError("the tokenizer has another vocabulary than the decoder")
    if config.heads < 1 or not 0 <= config.dropout < 1:
        raise ValueError(f"{config.heads} heads, dropout {config.dropout}")
    held = {n.removeprefix(RERANKER): tensors[n] for n in tensors if n.startswith(RERANKER)}
    weights = {n: tensors[n] for n in tensors if not n.startswith(RERANKER)}
    if config.layers > len(weights):  # each would be built, for nothing
        raise ValueError(f"{config.layers} layers, but {len(weights)} weights")
    if other := {tensor.dtype for tensor in weights.values()} - {torch.float32}:
        raise TypeError(f"weights in {other.pop()}")
    # Without storage of its own, the model takes no RAM before the shapes are known to fit.
    with torch.device("meta"):
        model = CaptionModel(description["feature_width"], config)
    model.load_state_dict(weights, assign=True)
    model.eval()
    reranker = Reranker.restored(held, model.feature_width) if held else None
    generation = typed(GenerationOptions, description["generation"])
    tasks = tuple(description.get("tasks", ["captions"]))
    tables = encoder, settings, scores = [description[x] for x in ("encoder", "settings", "scores")]
    kinds = {*map(type, tables)}, {type(text) for text in (*tasks, encoder["name"])}
    if kinds != ({dict}, {str}):
        raise TypeError("its tasks, encoder, settings or scores are of another kind")
    return Checkpoint(
        model, tokenizer, encoder, generation, tasks, settings, scores, training, reranker
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        # Copied: tensors of the mapped file would change, or crash, with a file copied over it.
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return (file.metadata() or {}) | {"model": weights}


def _read_pt(path: Path) -> dict[str, Any]:
    # Nothing is compressed in what torch writes: the file's own size bounds what it may take.
    size = path.stat().st_size
    with zipfile.ZipFile(path) as file:
        if sum(part.file_size for part in file.infolist()) > size:
            raise ValueError("it would unpack to more than it holds")
    content = torch.load(path, map_location="cpu", weights_only=True)
    _check_size(content, 4 * size + 2**20)
    return content


def _check_size(content: Any, most: int) -> None:
    """Refuse what is larger than its file, as a value repeated by its strides or by references."""
    parts = [content]
    while parts and most >= 0:
        part = parts.pop()
        most -= 1
        if isinstance(part, Tensor):
            most -= part.numel() * part.element_size()
        elif isinstance(part, (str, bytes, bytearray)):
            most -= len(part)
        elif isinstance(part, dict):
            parts += part.keys()
            parts += part.values()
        elif isinstance(part, (list, tuple, set)):
            parts += part
    if most < 0:
        raise ValueError("it would take far more RAM than it has bytes")
