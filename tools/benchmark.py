"""Measure this project beside Hugging Face's own captioning model, in one process, in turn.

    python -m tools.benchmark                 # everything, some minutes on two cores
    python -m tools.benchmark --only train    # one part
    python -m tools.benchmark --device cuda   # on a GPU, whose losses are checked with the CPU's

The rival is `VisionEncoderDecoderModel` (ViT-B/16 and a GPT-2-shaped decoder of our default size)
in the plain PyTorch loop of its documentation. Weights are random and photos synthetic: neither
changes how long anything takes. Every figure is the median of interleaved repetitions, with the
smallest and the largest. The last line is one JSON object.
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.benchmark)

import contextlib
import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch, CaptionRows
from decoder import DecoderConfig
from device import autocast, choose_device, choose_dtype
from encoder import FrozenEncoder
from features import build_features
from generation import generate
from model import CaptionModel
from options import GenerationOptions
from tokenizer import END_ID, PAD_ID, SPECIAL_TOKENS, START_ID
from utils import UserError, run_script

VOCAB, PATCHES, WIDTH = 10000, 197, 768  # default vocabulary; what ViT-B/16 gives
CAPTIONS = 5  # a photo
IGNORED = -100  # a target that the libraries' losses leave out
EPOCHS = 20
MOST_APART = 0.01  # of loss and gradient, in bf16 (on a CPU 1e-5 and 4e-4)
LENGTH = 12  # tokens of a caption while generation is timed: about Flickr's mean


def median(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def interleaved(
    works: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each piece of work `repeats` times, in turn, after one pass that doesn't count."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # what was queued is done
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            started = now()
            work()
            times[name].append(now() - started)
    return {name: taken[1:] for name, taken in times.items()}


# --- What is worked on ----------------------------------------------------------------------


def write_photos(folder: Path, count: int) -> list[str]:
    """Photos of Flickr's size and about its weight, as JPEG."""
    dice = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(count)]
    for name in names:
        coarse = Image.fromarray(dice.integers(0, 255, (38, 50, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / name, quality=90)
    return names


def flickr_like_captions(photos: int) -> dict[str, list[list[int]]]:
    """Captions as long as Flickr's: 12.1 tokens on average, START counted, 4 to 40."""
    dice = np.random.default_rng(0)
    lengths = np.clip(np.rint(dice.gamma(6.2, 1.8, (photos, CAPTIONS))), 3, 38).astype(int)
    first = len(SPECIAL_TOKENS)
    return {
        f"{i}": [[START_ID, *dice.integers(first, VOCAB, n).tolist(), END_ID] for n in group]
        for i, group in enumerate(lengths)
    }


# --- The contestants: ours, and what others would write, decoders of one size ---------------


def our_model(device: torch.device) -> CaptionModel:
    return CaptionModel(WIDTH, DecoderConfig(VOCAB)).to(device)


def rival_model(device: torch.device) -> transformers.VisionEncoderDecoderModel:
    """ViT-B/16, frozen as ours is, and a decoder from scratch of our default size."""
    size = DecoderConfig(VOCAB)
    decoder = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=size.ff_dim,
        n_positions=size.max_length,
        add_cross_attention=True,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(), decoder
    )
    model = transformers.VisionEncoderDecoderModel(config)
    model.config.decoder_start_token_id, model.config.pad_token_id = START_ID, PAD_ID
    model.encoder.requires_grad_(False)
    return model.to(device)


class TorchDecoder(nn.Module):
    """What PyTorch's own layers make: pre-norm, tied embedding, features repeated a caption."""

    def __init__(self, size: DecoderConfig):
        super().__init__()
        self.project = nn.Linear(WIDTH, size.width)
        self.tokens = nn.Embedding(size.vocab_size, size.width)
        self.places = nn.Embedding(size.max_length, size.width)
        layer = nn.TransformerDecoderLayer(
            size.width,
            size.heads,
            size.ff_dim,
            size.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, size.layers, nn.LayerNorm(size.width))

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features (captions, patches, WIDTH), tokens (captions, length) -> logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = nn.Transformer.generate_square_subsequent_mask(len(places), tokens.device)
        x = self.tokens(tokens) + self.places(places)
        x = self.decoder(x, self.project(features), tgt_mask=mask, tgt_is_causal=True)
        return F.linear(x, self.tokens.weight)


def padded(captions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Captions as tokens and targets (captions, longest - 1)."""
    tokens = [torch.tensor(ids[:-1]) for ids in captions]
    targets = [torch.tensor(ids[1:]) for ids in captions]
    pad = nn.utils.rnn.pad_sequence
    return pad(tokens, True, padding_value=PAD_ID), pad(targets, True, padding_value=IGNORED)


def training_step(
    loss: Callable[[], Tensor], model: nn.Module, dtype: torch.dtype
) -> Callable[[], None]:
    """A step as who knows the matter makes it: `dtype` by autocast, the fused optimizer."""
    learned = [p for p in model.parameters() if p.requires_grad]
    device = learned[0].device
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=device.type != "mps")

    def step() -> None:
        with autocast(device, dtype):
            found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cached_rivals(
    features: Tensor, captions: Sequence[Sequence[Sequence[int]]], dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """Training steps with libraries' decoders: features from memory, repeated a caption, the same
    captions padded to the longest.

    Args:
        features: (photos, PATCHES, WIDTH) in half precision.
        captions: those of each step, CAPTIONS a photo.
    """
    device = features.device
    hf, plain = rival_model(device).train(), TorchDecoder(DecoderConfig(VOCAB)).to(device).train()

    def hf_loss(repeated: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=repeated)
        return hf(encoder_outputs=encoded, decoder_input_ids=tokens, labels=targets).loss

    def plain_loss(repeated: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = plain(repeated, tokens).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=0.1)

    def step_of(model: nn.Module, loss_of: Callable[..., Tensor]) -> Callable[[], None]:
        queue = itertools.cycle(captions)

        def loss() -> Tensor:
            repeated = features.float().repeat_interleave(CAPTIONS, dim=0)
            return loss_of(repeated, *(part.to(device) for part in padded(next(queue))))

        return training_step(loss, model, dtype)

    return {"hf_cached": step_of(hf, hf_loss), "torch_decoder": step_of(plain, plain_loss)}


# --- Training -------------------------------------------------------------------------------


def useful_multiply_adds(batch: Batch, size: DecoderConfig) -> float:
    """What the mathematics of one training step's forward pass needs, padding left out."""
    tokens, images = len(batch.targets), len(batch.names)
    w = size.width
    linear = size.layers * (4 * w * w + 2 * w * w + 2 * w * size.ff_dim) + w * size.vocab_size
    lengths = torch.stack([(batch.segments == k).sum(1) for k in range(CAPTIONS)]).double()
    own = size.layers * w * float((lengths * (lengths + 1)).sum())  # causal: half of the square
    cross = size.layers * 2 * PATCHES * w * tokens
    memory = images * PATCHES * (WIDTH * w + size.layers * 2 * w * w)
    return tokens * linear + own + cross + memory


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second in the matrix products of the decoder's feed-forward layer."""
    a = torch.randn(2048, 512, device=device, dtype=dtype)
    b = torch.randn(2048, 512, device=device, dtype=dtype)
    taken = interleaved({"mm": lambda: [a @ b.T for _ in range(10)]}, 5, device)["mm"]
    return 10 * 2048 * 512 * 2048 / statistics.median(taken)


def check_losses(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """The loss a token and the gradient's length of one batch, here and on a CPU in fp32."""
    rows = CaptionRows(flickr_like_captions(32), None)
    batch = next(rows.batches(32, 0, 0))
    features = torch.randn(32, PATCHES, WIDTH)
    reference = our_model(torch.device("cpu")).eval()
    figures = []
    for model, kind in ((reference, torch.float32), (copy.deepcopy(reference).to(device), dtype)):
        place = next(model.parameters()).device
        with autocast(place, kind):
            loss = model.loss(features.to(place), batch.to(place)) / len(batch.targets)
        loss.backward()
        gradient = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
        figures.append((loss.item(), gradient.item()))
    (right, steep), (found, found_steep) = figures
    if not (abs(found / right - 1) < MOST_APART and abs(found_steep / steep - 1) < MOST_APART):
        raise UserError(f"loss and gradient of one batch are {figures[1]}, on a CPU {figures[0]}")
    return {"loss": found, "cpu_loss": right, "gradient": found_steep, "cpu_gradient": steep}


def measure_training(
    device: torch.device, dtype: torch.dtype, repeats: int, compiled: bool
) -> dict[str, object]:
    """Captions a second over 20 epochs, ours beside the rival's, and how near the limit."""
    texts = flickr_like_captions(2048)
    rows = CaptionRows(texts, None)
    batches = list(rows.batches(32, 0, 0))
    ours, rival = our_model(device).train(), rival_model(device).train()
    if compiled:
        ours.hidden = torch.compile(ours.hidden, dynamic=True)
    features = torch.randn(32, PATCHES, WIDTH, dtype=torch.float16, device=device)
    queue = itertools.cycle(batches)

    def our_loss() -> Tensor:
        batch = next(queue).to(device)
        return ours.loss(features.float(), batch, label_smoothing=0.1) / 2000

    rival_optimizer = torch.optim.AdamW(rival.decoder.parameters(), lr=1e-4)
    _, labels = padded([ids for group in flickr_like_captions(2).values() for ids in group][:8])
    processor = transformers.ViTImageProcessorPil()
    captions = [[ids for name in batch.names for ids in texts[name]] for batch in batches]
    cached = cached_rivals(features, captions, dtype)

    def rival_step() -> None:
        images = [Image.open(photos / f"{i}.jpg").convert("RGB") for i in range(8)]
        pixels = processor(images=images, return_tensors="pt").pixel_values
        loss = rival(pixel_values=pixels.to(device), labels=labels.to(device)).loss
        loss.backward()
        rival_optimizer.step()
        rival_optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder)
        write_photos(photos, 8)
        works = {"ours": training_step(our_loss, ours, dtype), "rival": rival_step} | cached
        times = interleaved(works, repeats, device)
    took = {name: statistics.median(taken) for name, taken in times.items()}
    best = min(cached, key=took.get)
    timed = itertools.islice(itertools.cycle(batches), 1, repeats + 1)
    useful = [3 * useful_multiply_adds(batch, ours.config) for batch in timed]
    rates = [work / taken for work, taken in zip(useful, times["ours"], strict=True)]
    limit = matmul_rate(device, dtype)
    padding = [float((batch.segments < 0).double().mean()) for batch in batches]
    return {
        "our_step_seconds": median(times["ours"]),
        "rival_step_seconds": median(times["rival"]),
        **{f"{name}_step_seconds": median(times[name]) for name in cached},
        "best_rival": best,
        "train_vs_best_rival": took[best] / took["ours"],
        "our_captions_per_second_decoder": 32 * CAPTIONS / took["ours"],
        "rival_captions_per_second": 8 / took["rival"],
        "matmul_gflops": 2 * limit / 1e9,
        "train_matmul_share": statistics.median(rates) / limit,
        "padding_share": statistics.mean(padding),
    }


# --- Generation -----------------------------------------------------------------------------


def measure_generation(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Beam 5 over 32 photos, as long as Flickr's captions, from encoder output, ours and theirs."""
    ours, rival = our_model(device).eval(), rival_model(device).eval()
    features = torch.randn(32, PATCHES, WIDTH, device=device)
    options = GenerationOptions(beam_size=5, min_length=LENGTH, max_length=LENGTH)

    def rival_captions() -> None:
        # A new one each time: `generate` repeats what it is given for each beam, in place.
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=features)
        rival.generate(
            encoder_outputs=encoded, num_beams=5, min_new_tokens=LENGTH, max_new_tokens=LENGTH
        )

    fast = autocast(device, dtype)
    works = {
        "our_beam_seconds": fast(lambda: generate(ours, features, options)),
        "rival_beam_seconds": rival_captions,
        "rival_beam_autocast_seconds": fast(rival_captions),
    }
    times = interleaved(works, repeats, device)
    own, *others = map(statistics.median, times.values())
    found = {name: median(taken) for name, taken in times.items()}
    return found | {"generate_vs_hf": min(others) / own}


# --- Features -------------------------------------------------------------------------------


def measure_features(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Building the cache from JPEG files, beside the encoder alone on prepared pixels."""
    count, batch_size = 64, 16
    tower = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False).to(device)
    encoder = FrozenEncoder(tower, transformers.ViTImageProcessorPil(), (-1,), {"name": "vit"})
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        names = write_photos(photos, count)
        image = Image.open(photos / names[0]).convert("RGB")
        inputs = encoder.preprocess([image] * batch_size)

        def build() -> None:
            items = [(name, 0) for name in names]
            how = {"dtype": dtype, "batch_size": batch_size}
            with tempfile.TemporaryDirectory(dir=folder) as root, contextlib.redirect_stdout(None):
                build_features(encoder, photos, items, Path(root), **how)

        @autocast(device, dtype)
        def bare() -> None:
            for _ in range(count // batch_size):
                encoder({key: value.to(device) for key, value in inputs.items()})

        times = interleaved({"build": build, "bare": bare}, repeats, device)
    ours, alone = (count / statistics.median(taken) for taken in times.values())
    return {
        "features_images_per_second": ours,
        "encoder_images_per_second": alone,
        "features_vs_encoder": ours / alone,
    }


# --- All of it ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = commands.benchmark(argv)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device)
    result = shown(
        {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "dtype": str(dtype),
            "torch": torch.__version__,
        }
    )
    measured = {
        "losses": lambda: check_losses(device, dtype),
        "train": lambda: measure_training(device, dtype, args.repeats, args.compile),
        "generate": lambda: measure_generation(device, dtype, args.repeats),
        "features": lambda: measure_features(device, dtype, args.repeats),
    }
    for part, measure in measured.items():
        if args.only in (None, part):
            result |= shown(measure())
    if "our_step_seconds" in result and "features_images_per_second" in result:
        # The encoder runs once a photo, for all of its captions in all epochs.
        once = 1 / (result["features_images_per_second"] * EPOCHS * CAPTIONS)
        ours = 1 / (1 / result["our_captions_per_second_decoder"] + once)
        ratio = ours / result["rival_captions_per_second"]
        result |= shown({"our_captions_per_second": ours, "train_vs_hf": ratio})
    print(json.dumps(result))


def shown(found: dict[str, object]) -> dict[str, object]:
    """The figures, printed as they come."""
    for name, value in found.items():
        print(f"{name:<36}{value}", flush=True)
    return found


if __name__ == "__main__":
    run_script(main)
