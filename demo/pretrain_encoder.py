"""Pretrain the demo's tiny vision Transformer on drawn scenes: `python demo/pretrain_encoder.py`.

The network learns to say, for each patch that a shape covers, the shape's colour, form and size,
how many of its kind there are, and on which side of the other kind it stands. Each of these has a
linear head of its own on the patch's vector, so that the vectors keep them apart; the heads are
thrown away afterwards. No scene drawn here holds a held-out combination, and no caption is read.

Half of the scenes are painted in colours that have no name in the captions, and say nothing about
colour: what a shape is must not be read off its colour, or a red star, never seen in that size, is
taken for what red things of that size usually are.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its folder is on the path, the project's is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import commands

if __name__ == "__main__":
    commands.begin(commands.pretrain_encoder)

import random
import time

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from demo.scenes import (
    COLOURS,
    IMAGE_SIZE,
    NUMBERS,
    SHAPES,
    SIDES,
    SIZES,
    Mark,
    Scene,
    arrange,
    for_testing,
    for_training,
    invent,
    outline,
    paint,
)
from device import autocast, choose_device, choose_dtype
from utils import run_script

PATCH = 12  # pixels
GRID = IMAGE_SIZE // PATCH
PLACES = ("alone", *SIDES)
ASPECTS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "count": tuple(NUMBERS),
    "place": PLACES,
}
UNNAMED = (  # black, grey, brown, pink, cyan, lime, navy, maroon, olive, teal, magenta
    (30, 30, 30),
    (128, 128, 128),
    (120, 70, 30),
    (250, 150, 190),
    (60, 200, 210),
    (160, 225, 60),
    (25, 30, 90),
    (100, 15, 35),
    (120, 120, 40),
    (0, 105, 105),
    (225, 40, 175),
)
DRAWN, EPOCHS = 40_000, 4  # scenes, and passes over them
BATCH_SIZE, LEARNING_RATE = 64, 1.5e-3
COVERED = 0.06  # share of a patch that a shape must cover to be asked for there


def main() -> None:
    """Draw scenes, pretrain, report the heads' accuracy on fresh scenes, save the encoder."""
    out = commands.pretrain_encoder().out
    torch.manual_seed(0)
    rng = random.Random("pretraining 0")
    start = time.perf_counter()
    images, labels = draw_scenes(DRAWN, rng, held_out=False)
    print(f"drew {DRAWN} scenes in {time.perf_counter() - start:.0f} s", flush=True)
    encoder, heads = pretrain(images, labels)
    for held_out in (False, True):
        name = "held-out" if held_out else "familiar"
        print(f"per patch, {name} combinations:", accuracies(encoder, heads, rng, held_out))
    encoder.cpu().save_pretrained(out)
    processor().save_pretrained(out)
    print(f"saved {out} after {time.perf_counter() - start:.0f} s")


def new_encoder() -> ViTModel:
    """A vision Transformer of 0.9 million parameters over 8 x 8 patches."""
    return ViTModel(
        ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            attn_implementation="eager",  # in bf16 on a CPU twice as fast as the fused kernel
        ),
        add_pooling_layer=False,
    )


def processor() -> ViTImageProcessorPil:
    """The preprocessing that belongs to the encoder: -1 to 1 at the scenes' own size."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def draw_scenes(
    number: int, rng: random.Random, held_out: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scenes and label their patches.

    Returns images (scenes, 3, 96, 96) as bytes and labels (scenes, patches, aspects), -1 where
    no shape covers the patch.
    """
    images = np.empty((number, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.empty((number, GRID * GRID, len(ASPECTS)), np.int64)
    for index in range(number):
        unnamed = not held_out and rng.random() < 0.5
        scene = invent(rng, for_testing if held_out else for_training)
        marks = arrange(scene, rng)
        colours = rng.sample(UNNAMED, len(scene.things)) if unnamed else None
        images[index] = np.asarray(paint(scene, marks, rng, colours))
        labels[index] = patch_labels(scene, marks)
        if unnamed:
            labels[index, :, list(ASPECTS).index("colour")] = -1
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def patch_labels(scene: Scene, marks: list[Mark]) -> np.ndarray:
    """The aspects of the thing that covers most of each patch: (patches, aspects), or -1."""
    canvas = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    pen = ImageDraw.Draw(canvas)
    for mark in marks:
        outline(pen, scene.things[mark.thing].shape, mark, 1, mark.thing + 1)
    pixels = np.asarray(canvas).reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2)
    pixels = pixels.reshape(GRID * GRID, PATCH * PATCH)
    labels = np.full((GRID * GRID, len(ASPECTS)), -1)
    share = np.stack([(pixels == index + 1).mean(1) for index in range(len(scene.things))])
    for index, thing in enumerate(scene.things):
        place = "alone"
        if scene.relation is not None:
            place = scene.relation if index == 0 else SIDES[scene.relation][0]
        values = (thing.colour, thing.shape, thing.size, thing.count, place)
        answer = [list(names).index(v) for names, v in zip(_names(), values, strict=True)]
        labels[(share[index] > COVERED) & (share.argmax(0) == index)] = answer
    return labels


def _names() -> tuple[tuple[object, ...], ...]:
    return tuple(ASPECTS.values())


def pretrain(images: torch.Tensor, labels: torch.Tensor) -> tuple[ViTModel, nn.Linear]:
    """Train encoder and heads together; one line per epoch."""
    device = choose_device()
    dtype = choose_dtype("auto", device)
    encoder = new_encoder().to(device).train()
    heads = nn.Linear(encoder.config.hidden_size, sum(map(len, ASPECTS.values()))).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    start = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        batches = torch.randperm(len(images)).split(BATCH_SIZE)
        batches = [batch for batch in batches if len(batch) == BATCH_SIZE]
        for batch in batches:
            with autocast(device, dtype):
                logits = heads(encode(encoder, images[batch].to(device)))
            loss = sum(losses(logits.float(), labels[batch].to(device)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        elapsed = time.perf_counter() - start
        print(
            f"epoch {epoch}/{EPOCHS}  loss {total / len(batches):.4f}  {elapsed:.0f} s",
            flush=True,
        )
    return encoder.eval(), heads


def encode(encoder: ViTModel, images: torch.Tensor) -> torch.Tensor:
    """Bytes (images, 3, 96, 96) to patch vectors (images, patches, 128), CLS left out."""
    pixels = images.float() / 127.5 - 1
    return encoder(pixel_values=pixels).last_hidden_state[:, 1:]


def losses(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The cross-entropy of each aspect, over the patches that have a label."""
    parts = logits.split([len(names) for names in ASPECTS.values()], dim=-1)
    return [
        F.cross_entropy(part.flatten(0, 1), labels[..., index].flatten(), ignore_index=-1)
        for index, part in enumerate(parts)
    ]


@torch.inference_mode()
def accuracies(
    encoder: ViTModel, heads: nn.Linear, rng: random.Random, held_out: bool
) -> dict[str, float]:
    """Share of covered patches whose aspect is read rightly, on fresh scenes."""
    images, labels = draw_scenes(1000, rng, held_out)
    device = heads.weight.device
    logits = heads(encode(encoder, images.to(device))).cpu()
    covered = (labels >= 0).all(-1)
    parts = logits.split([len(names) for names in ASPECTS.values()], dim=-1)
    return {
        name: round((part.argmax(-1) == labels[..., i])[covered].float().mean().item(), 4)
        for i, (name, part) in enumerate(zip(ASPECTS, parts, strict=True))
    }


if __name__ == "__main__":
    run_script(main)
