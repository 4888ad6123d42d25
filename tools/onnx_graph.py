"""The decoder as an ONNX graph, and the encoder as another, checked against PyTorch.

The decoder's graph is one step of writing: features and new tokens in, the next token's logits and
what is to be remembered out. Tokenizer, special ids and the encoder's identity stand in its
metadata. The encoder's takes preprocessed photos and gives features.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401 - torch.onnx.export imports it, late and with a traceback
import torch
from PIL import Image
from torch import Tensor, nn

from checkpoint import Checkpoint
from encoder import FrozenEncoder, public
from model import CaptionModel, row_mask
from tokenizer import ANSWER_ID, END_ID, PAD_ID, START_ID
from utils import UserError, atomic_write, size_text

LIMIT = 1e-3  # what logits may differ by; rounding alone gives some 1e-5
LARGEST = 2**31 - 2**24  # bytes of weights: a file of protobuf's, as ONNX is, holds no 2 GiB
KINDS = ("keys", "values", "memory_keys", "memory_values")  # what each layer remembers
# The axes of any length, with their lengths while exporting: none is 0, 1 or another's, which the
# exporter could take for a rule.
EXAMPLE = {"batch": 2, "patches": 3, "new": 5, "seen": 4, "remembered": 7}


class JoinedCache:
    """As a `KeyValueCache`, but handed in and out: joined in each step, with no room taken."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]):
        """Args: each layer's keys and values so far, (rows, heads, seen, head width)."""
        self.seen = keys[0].shape[2]
        self.keys, self.values = list(keys), list(values)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values (rows, heads, new, head width); return all so far."""
        self.keys[layer] = torch.cat([self.keys[layer], keys], dim=2)
        self.values[layer] = torch.cat([self.values[layer], values], dim=2)
        return self.keys[layer], self.values[layer]


class DecoderStep(nn.Module):
    """What is exported. The photo's memory is remembered as the tokens are: one graph does both."""

    def __init__(self, model: CaptionModel):
        super().__init__()
        self.model = model

    def forward(
        self, features: Tensor, tokens: Tensor, positions: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The logits after the last token (batch, vocab), and the past of the next step.

        Args:
            features: (batch, patches, feature_width); no patches once they are remembered.
            tokens, positions: (batch, new), the tokens after those of the past.
            past: for each layer and each of `KINDS`, (batch, heads, seen, head width).
        """
        keys, values, memory_keys, memory_values = (past[kind::4] for kind in range(4))
        cache, memory = JoinedCache(keys, values), JoinedCache(memory_keys, memory_values)
        seen = cache.seen
        whole = tokens.new_zeros(tokens.shape[0], seen + tokens.shape[1])
        fresh = enumerate(self.model.memory(features))
        joined = [memory.append(layer, *pair) for layer, pair in fresh]
        hidden = self.model.decoder(tokens, positions, row_mask(whole)[:, seen:], joined, cache)
        present = zip(cache.keys, cache.values, memory.keys, memory.values, strict=True)
        # By a MatMul, not by a Gemm: onnxruntime's quantizer spoils the tied embedding for that.
        logits = self.model.decoder.logits(hidden[:, -1:])[:, 0]
        return logits, [x for layer in present for x in layer]


# --- To ONNX --------------------------------------------------------------------------------


def check_size(module: nn.Module, name: str) -> None:
    """Refuse what an ONNX file can't hold."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LARGEST:
        raise UserError(f"the {name} takes {size_text(size)}, an ONNX file holds at most 2 GB")


def to_onnx(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The decoder as an ONNX graph, with what its user needs to know in its metadata."""
    shapes = input_shapes(checkpoint.model)
    inputs = [torch.zeros([EXAMPLE.get(x, x) for x in shape]) for shape in shapes.values()]
    inputs[1:3] = (x.long() for x in inputs[1:3])
    axes = [{i: x for i, x in enumerate(shape) if x in EXAMPLE} for shape in shapes.values()]
    graph = _graph(
        DecoderStep(checkpoint.model),
        (*inputs[:3], inputs[3:]),
        (*axes[:3], axes[3:]),
        list(shapes),
        ["logits", *(name.replace("past", "present") for name in [*shapes][3:])],
    )
    onnx.helper.set_model_props(graph, metadata(checkpoint))
    return graph


def _graph(
    module: nn.Module, inputs: tuple, axes: tuple, names: list[str], outputs: list[str]
) -> onnx.ModelProto:
    # The exporter speaks of its own inner matters, such as a missing torchvision.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=axes,
        )
    graph = program.model_proto  # made anew each time it is asked for
    inner = graph.graph
    values = (*inner.value_info, *inner.input, *inner.output, *inner.initializer)
    # The exporter's notes name the source lines and folders of this machine.
    for part in (graph, inner, *inner.node, *values):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return graph


def input_shapes(model: CaptionModel) -> dict[str, tuple[int | str, ...]]:
    """The graph's inputs in their order, with the names of the axes that may be of any length."""
    config = model.config
    shapes = {"features": ("batch", "patches", model.feature_width)}
    shapes |= {"tokens": ("batch", "new"), "positions": ("batch", "new")}
    for layer in range(config.layers):
        for kind in KINDS:
            length = "remembered" if kind.startswith("memory") else "seen"
            shape = ("batch", config.heads, length, config.width // config.heads)
            shapes[f"past.{layer}.{kind}"] = shape
    return shapes


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the graph doesn't say; all but the tokenizer's file are JSON of plain values."""
    special = {"pad": PAD_ID, "start": START_ID, "end": END_ID, "answer": ANSWER_ID}
    return {
        "tokenizer": checkpoint.tokenizer.to_files()["tokenizer.json"],
        "special_ids": json.dumps(special),
        "max_length": json.dumps(checkpoint.model.config.max_length),
        "encoder": json.dumps(public(checkpoint.encoder)),
        "tasks": json.dumps(checkpoint.tasks),
        "generation": json.dumps(asdict(checkpoint.generation)),
    }


class EncodeStep(nn.Module):
    """The encoder's computation, without the inference mode that can't be exported."""

    def __init__(self, encoder: FrozenEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, height, width) -> features (batch, patches, feature_width)."""
        return FrozenEncoder.forward.__wrapped__(self.encoder, {"pixel_values": pixel_values})


def export_encoder(encoder: FrozenEncoder, path: Path) -> float:
    """Write the encoder's ONNX file, if it does as PyTorch does; the largest difference.

    How photos are preprocessed stands in its metadata, as the Hub's preprocessor_config.json.
    """
    inputs = encoder.preprocess([Image.effect_noise((256, 256), 64).convert("RGB")] * 2)
    if inputs.keys() != {"pixel_values"}:
        raise UserError(f"{encoder.source['name']} takes more than pixels: it can't be exported")
    pixels = inputs["pixel_values"]
    graph = _graph(EncodeStep(encoder), (pixels,), ({0: "batch"},), ["pixel_values"], ["features"])
    onnx.helper.set_model_props(graph, {"preprocessing": encoder.processor.to_json_string()})
    pixels = torch.cat([pixels, pixels.flip(-1)])
    right = encoder({"pixel_values": pixels}).numpy()

    def apart(file: Path) -> float:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        return float(np.abs(found - right).max() / np.abs(right).max())

    return write_checked(graph, path, apart)


# --- The check ------------------------------------------------------------------------------


def greedy(
    session: onnxruntime.InferenceSession, features: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Write token by token with the exported graph alone, beyond END.

    Args:
        features: (photos, patches, feature_width), single precision.

    Returns:
        The tokens given to it, (photos, length), and its logits after each, with (..., vocab).
    """
    count = len(features)
    past = {
        x.name: np.zeros((count, x.shape[1], 0, x.shape[3]), np.float32)
        for x in session.get_inputs()
        if x.name.startswith("past.")
    }
    tokens, logits = [np.full((count, 1), START_ID)], []
    for place in range(length):
        here = {"features": features, "tokens": tokens[-1], "positions": np.full((count, 1), place)}
        scores, *present = session.run(None, here | past)
        past, features = dict(zip(past, present, strict=True)), features[:, :0]
        logits.append(scores)
        choice = scores.copy()
        choice[:, [PAD_ID, START_ID, ANSWER_ID]] = -np.inf
        tokens.append(choice.argmax(1)[:, None])
    return np.concatenate(tokens[:-1], axis=1), np.stack(logits, axis=1)


@torch.no_grad()
def largest_difference(path: Path, model: CaptionModel) -> float:
    """How far the exported graph's logits are from PyTorch's, on greedy captions as long as can be.

    PyTorch reads them at once, without any cache; the photos' features are random.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    dice, found = torch.Generator().manual_seed(0), []
    for photos, patches in ((1, 1), (3, 50)):
        features = torch.randn(photos, patches, model.feature_width, generator=dice)
        tokens, logits = greedy(session, features.numpy(), model.config.max_length - 1)
        read = torch.from_numpy(tokens)
        places = torch.arange(read.shape[1]).expand_as(read)
        hidden = model.hidden(features, read, places, torch.zeros_like(read))
        found.append(np.abs(logits - model.decoder.logits(hidden).numpy()).max())
    return float(np.max(found))


def write_checked(graph: onnx.ModelProto, path: Path, apart: Callable[[Path], float]) -> float:
    """Write an ONNX file, if it does what PyTorch does; returns how far `apart` they are."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
        difference = apart(temporary)
        if not difference <= LIMIT:  # so put, no number is refused too
            raise UserError(
                f"{path} was not written: what the exported graph gives differs from PyTorch's by "
                f"{difference:.2g}, more than {LIMIT:g}"
            )
    return difference


def export(checkpoint: Checkpoint, path: Path) -> float:
    """Write the decoder's ONNX file, checked; returns the logits' largest difference."""
    model = checkpoint.model
    return write_checked(to_onnx(checkpoint), path, lambda file: largest_difference(file, model))
