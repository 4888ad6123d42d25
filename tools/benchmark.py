"""Measure this project beside Hugging Face's own captioning model, in one process, in turn.

    python -m tools.benchmark                 # everything, about ten minutes on two cores
    python -m tools.benchmark --only train    # one part
    python -m tools.benchmark --only scaling  # several processes beside one, under torchrun

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
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import transformers
from PIL import Image

from dataset import Batch, CaptionRows
from decoder import DecoderConfig
from device import autocast, choose_device, choose_dtype
from distributed import joined, share_gradients
from encoder import FrozenEncoder
from features import FeatureCache, add_pack, build_features, write_pack
from generation import generate
from model import CaptionModel
from options import GenerationOptions
from shards import Stock, StreamedRows, known_shard, table_path
from tokenizer import CaptionTokenizer
from tools.rivals import (
    CAPTIONS,
    PATCHES,
    VOCAB,
    WIDTH,
    cached_rivals,
    flickr_like_captions,
    our_model,
    padded,
    rival_model,
)
from utils import resident_kilobytes, run_script

T = TypeVar("T")
REPO = Path(__file__).resolve().parents[1]
EPOCHS = 20
LENGTH = 12  # tokens of a caption while generation is timed: about Flickr's mean
FLICKR30K = 29000  # photos to train on


def median(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, the device's queue included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    works: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each piece of work `repeats` times, in turn, after one pass that doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if repeat:
                times[name].append(taken)
    return times


# --- What is worked on ----------------------------------------------------------------------


def write_photos(folder: Path, count: int) -> list[str]:
    """Photos of Flickr's size and about its weight, as JPEG."""
    dice = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(dice.integers(0, 255, (38, 50, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return [f"{i}.jpg" for i in range(count)]


def bare_encoder(device: torch.device) -> FrozenEncoder:
    with tempfile.TemporaryDirectory() as folder:
        transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False).save_pretrained(
            folder
        )
        transformers.ViTImageProcessorPil().save_pretrained(folder)
        return FrozenEncoder.load(folder).to(device)


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
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-4, fused=device.type != "mps")
    rival_optimizer = torch.optim.AdamW(rival.decoder.parameters(), lr=1e-4)
    queue = iter(batches * 10)
    done: list[Batch] = []

    def our_step() -> None:
        done.append(next(queue))
        batch = done[-1].to(device)
        with autocast(device, dtype):
            loss = ours.loss(features.float(), batch, label_smoothing=0.1)
        (loss / 2000).backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        our_optimizer.step()
        our_optimizer.zero_grad()

    pairs = [ids for group in flickr_like_captions(2).values() for ids in group][:8]
    _, labels = padded(pairs)
    processor = transformers.ViTImageProcessorPil()
    others = iter(batches * 10)  # the same captions, in the same order
    cached = cached_rivals(
        features, lambda: [ids for name in next(others).names for ids in texts[name]], dtype
    )

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
        rival.encoder.requires_grad_(False)  # ours is frozen: so is theirs, to their advantage
        works = {"ours": our_step, "rival": rival_step} | cached
        times = interleaved(works, repeats, device)
    took = {name: statistics.median(taken) for name, taken in times.items()}
    best = min(cached, key=took.get)
    useful = [3 * useful_multiply_adds(batch, ours.config) for batch in done[1:]]
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
        "flickr30k_20_epochs_minutes": took["ours"] * FLICKR30K / 32 * EPOCHS / 60,
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

    def our_captions() -> None:
        with autocast(device, dtype):
            generate(ours, features, options)

    def rival_captions() -> None:
        # A new one each time: `generate` repeats what it is given for each beam, in place.
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=features)
        rival.generate(
            encoder_outputs=encoded, num_beams=5, min_new_tokens=LENGTH, max_new_tokens=LENGTH
        )

    def rival_captions_fast() -> None:
        with autocast(device, dtype):
            rival_captions()

    works = {"ours": our_captions, "rival": rival_captions, "fast": rival_captions_fast}
    times = interleaved(works, repeats, device)
    fastest = min(statistics.median(times[name]) for name in ("rival", "fast"))
    return {
        "our_beam_captions_per_second": 32 / statistics.median(times["ours"]),
        "rival_beam_captions_per_second": 32 / statistics.median(times["rival"]),
        "our_beam_seconds": median(times["ours"]),
        "rival_beam_seconds": median(times["rival"]),
        "rival_beam_autocast_seconds": median(times["fast"]),
        "generate_vs_hf": fastest / statistics.median(times["ours"]),
    }


# --- Features -------------------------------------------------------------------------------


def measure_features(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Building the cache from JPEG files, beside the encoder alone on prepared pixels."""
    count, batch_size = 64, 16
    encoder = bare_encoder(device)
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

        def bare() -> None:
            for _ in range(count // batch_size):
                with autocast(device, dtype):
                    encoder({key: value.to(device) for key, value in inputs.items()})

        times = interleaved({"build": build, "bare": bare}, repeats, device)
    return {
        "features_images_per_second": count / statistics.median(times["build"]),
        "encoder_images_per_second": count / statistics.median(times["bare"]),
        "features_vs_encoder": statistics.median(times["bare"]) / statistics.median(times["build"]),
    }


# --- Memory and start-up ---------------------------------------------------------------------

STEPS = 128


def resident_after_steps(photos: int) -> tuple[float, float]:
    """Train a small decoder on a synthetic cache; the most MB held, and seconds a step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = synthetic_cache(Path(folder), photos)
        rows = CaptionRows(flickr_like_captions(photos), cache)
        epochs = itertools.count()
        batches = itertools.chain.from_iterable(rows.batches(32, 0, epoch) for epoch in epochs)
        return held(rows, itertools.islice(batches, STEPS), 64, VOCAB)


def held(
    rows: CaptionRows | StreamedRows,
    batches: Iterable[Batch],
    feature_width: int,
    vocab: int,
    every: int = 1,
) -> tuple[float, float]:
    """Load batches and train a small decoder on `every` so-manieth; see `resident_after_steps`."""
    size = DecoderConfig(vocab, width=64, layers=1, heads=1, ff_dim=64)
    model = CaptionModel(feature_width, size)
    started, most = time.perf_counter(), 0.0
    for step, batch in enumerate(batches):
        batch, features = rows.load(batch, None)
        if step % every == 0:
            model.loss(features.float(), batch).backward()
            model.zero_grad()
            most = max(most, resident_kilobytes() / 1024)
    return most, (time.perf_counter() - started) / (step + 1)


def synthetic_cache(folder: Path, photos: int) -> FeatureCache:
    """A cache of random features, written as `build_features` writes it."""
    entries: dict = {}
    for start in range(0, photos, 256):
        part = [f"{i}" for i in range(start, min(photos, start + 256))]
        block = np.random.default_rng(start).random((len(part), 196, 64)).astype(np.float16)
        labels = [(name, 0, 0, 0, "") for name in part]
        entries |= add_pack(folder, [(labels, torch.from_numpy(block))])
    return FeatureCache(folder, entries)


def resident_after_streaming(photos: int) -> tuple[float, float]:
    """Meet every photo of a synthetic stock of shards once, and train on some; found as above."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        stock = synthetic_stock(Path(folder), photos)
        tokenizer = CaptionTokenizer.train(stock.first_texts(20000), VOCAB)
        rows = StreamedRows(stock, tokenizer, max_length=40, buffer=5000)
        return held(rows, rows.batches(32, 0, 0), 32, len(tokenizer), every=50)


def sentences(dice: np.random.Generator, count: int) -> list[str]:
    """Captions of 11 words, as often as words are in a language."""
    letters = np.random.default_rng(0)
    words = ["".join(letters.choice(list("etaoinshrdlu"), 5)) for _ in range(8000)]
    return [" ".join(words[rank] for rank in row) for row in dice.zipf(1.2, (count, 11)) % 8000]


def synthetic_stock(folder: Path, photos: int, each: int = 10000) -> Stock:
    """Shards of `each` photos with a caption and features of 2 vectors of 32, as if encoded."""
    dice = np.random.default_rng(0)
    shards = []
    for start in range(0, photos, each):
        captions = sentences(dice, each)
        labels = [(f"{start + i:09d}", [text]) for i, text in enumerate(captions)]
        block = dice.random((each, 2, 32)).astype(np.float16)
        url = f"pipe:{start // each:05d}"
        table = table_path(folder, url)
        parts = [(labels, torch.from_numpy(block))]
        write_pack(table.with_suffix(".bin"), parts, {"name": url, "version": None})
        shards.append(known_shard(table, url))
    return Stock(shards)


def measure_memory() -> dict[str, object]:
    """Resident memory, a process each: the same steps on 500, 2,000 and 8,000 photos; and every
    photo of shards with ten thousand, a hundred thousand and a million."""
    kept = alone_each(resident_after_steps, (500, 2000, 8000))
    streamed = alone_each(resident_after_streaming, (10_000, 100_000, 1_000_000))
    return {
        "rss_mb": [round(peak) for peak, _ in kept],
        "rss_growth_mb": kept[-1][0] - kept[0][0],
        "rss_step_seconds": [round(each, 4) for _, each in kept],
        "rss_streamed_mb": [round(peak) for peak, _ in streamed],
        "streamed_photos_per_second": [round(32 / each) for _, each in streamed],
    }


def alone_each(work: Callable[[int], T], sizes: Sequence[int]) -> list[T]:
    """What `work` finds for each size, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(work, sizes, chunksize=1)


def measure_startup() -> dict[str, object]:
    """How long `train.py` takes until its first step, with a cache of 30,000 photos."""
    count = 30000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 32)
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 16}
        tower = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
        tower.save_pretrained(folder / "encoder")
        side = {"height": 32, "width": 32}
        transformers.ViTImageProcessorPil(size=side).save_pretrained(folder / "encoder")
        (folder / "images").mkdir()
        texts = iter(sentences(np.random.default_rng(0), CAPTIONS * count))
        captions = {}
        for i in range(count):
            Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(folder / f"images/{i}.png")
            captions[f"{i}.png"] = list(itertools.islice(texts, CAPTIONS))
        (folder / "captions.json").write_text(json.dumps(captions))
        flags = (
            "--dataset custom --split ratio --epochs 0 --scst_epochs 0 --encoder_layers=-1".split()
        )
        flags += ["--data_dir", name, "--encoder_model_name", f"{name}/encoder"]
        flags += ["--wandb_project", "", "--hf_repo_id", ""]
        command = [sys.executable, REPO / "train.py", *flags]
        taken = []
        for _ in range(3):  # the first makes the cache
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            taken.append(time.perf_counter() - started)
    return {"startup_seconds_30000": min(taken[1:]), "first_start_seconds_30000": taken[0]}


# --- Several processes -----------------------------------------------------------------------


def time_shared_steps(device_name: str, precision: str, repeats: int) -> None:
    """What torchrun starts in each process of `measure_scaling`; the first prints the times.

    A step is of 32 photos shared by all; beside it stands adding up as many numbers alone, and
    the processors' time for the step, which other work on the machine hardly changes.
    """
    with joined(device_name) as team:
        device = team.device(device_name)
        dtype = choose_dtype(precision, device)
        rows = CaptionRows(flickr_like_captions(32 * (repeats + 1)), None)
        model = our_model(device).train()
        shared = share_gradients(model, team)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        batches = rows.batches(32, 0, 0, team=team)
        features = torch.randn(32, PATCHES, WIDTH, device=device)
        gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)
        processor: list[float] = []

        def step() -> None:
            started = time.process_time()
            batch = next(batches).to(device)
            own = features[: len(batch.names)]
            with autocast(device, dtype):
                loss = shared(model.loss, own, batch, 0.1)
            (loss / 2000).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            processor.append(time.process_time() - started)

        works = {"step": step, "all_reduce": lambda: team.all_reduce(gradients)}
        times = interleaved(works, repeats, device)
        summed = [sum(each) for each in zip(*team.all_gather(processor), strict=True)]
        times["processor"] = summed[1:]
        print(json.dumps({name: median(taken) for name, taken in times.items()}))


def measure_scaling(device: torch.device, precision: str, repeats: int) -> dict[str, object]:
    """Training steps of the same 32 photos by 1, 2, ... processes of a GPU or one thread each."""
    count = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    sizes = [size for size in (1, 2, 4, 8) if size <= count]
    found: dict[str, object] = {}
    for size in sizes:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={size}"
        worker = f"-m tools.benchmark --worker --repeats {repeats}"
        where = f"--device {device.type} --precision {precision}"
        command = [sys.executable, *f"{torchrun} {worker} {where}".split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        said = subprocess.check_output(command, text=True, env=environment)
        times = json.loads(said.splitlines()[-1])
        taken = times["step"]["median"]
        found |= {
            f"scaling_{size}_step_seconds": times["step"],
            f"scaling_{size}_captions_per_second": 32 * CAPTIONS / taken,
            f"scaling_{size}_process_seconds_per_photo": size * taken / 32,
            f"scaling_{size}_processor_seconds_per_photo": times["processor"]["median"] / 32,
        }
        if size > 1:
            alone = found["scaling_1_step_seconds"]["median"]
            found[f"scaling_{size}_efficiency"] = alone / (size * taken)
            found[f"scaling_{size}_all_reduce_seconds"] = times["all_reduce"]
    return found


# --- All of it ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = commands.benchmark(argv)
    torch.manual_seed(0)
    if args.worker:
        time_shared_steps(args.device, args.precision, args.repeats)
        return 0
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": str(dtype),
        "torch": torch.__version__,
    }
    measured = {
        "train": lambda: measure_training(device, dtype, args.repeats, args.compile),
        "generate": lambda: measure_generation(device, dtype, args.repeats),
        "features": lambda: measure_features(device, dtype, args.repeats),
        "memory": measure_memory,
        "startup": measure_startup,
        "scaling": lambda: measure_scaling(device, args.precision, args.repeats),
    }
    show(result)
    for part, measure in measured.items():
        if args.only in (None, part):
            found = measure()
            show(found)
            result |= found
    if "our_step_seconds" in result and "features_images_per_second" in result:
        # The encoder runs once a photo, for all of its captions in all epochs.
        once = 1 / (result["features_images_per_second"] * EPOCHS * CAPTIONS)
        ours = 1 / (1 / result["our_captions_per_second_decoder"] + once)
        ratio = ours / result["rival_captions_per_second"]
        show(together := {"our_captions_per_second": ours, "train_vs_hf": ratio})
        result |= together
    print(json.dumps(result))
    return 0


def show(found: dict[str, object]) -> None:
    for name, value in found.items():
        print(f"{name:<36}{value}", flush=True)


if __name__ == "__main__":
    run_script(main)
