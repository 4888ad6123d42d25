"""Where the decoder looked while it wrote: cross-attention, word by word, laid over the photo.

Shown is the last layer's, averaged over its heads: what it reads there is what the next word is
chosen from. Averaged over all layers, the maps of a caption's words are more alike (a correlation
of 0.48 instead of 0.32 between the words of 18 captions).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from encoder import FrozenEncoder
from model import CaptionModel
from tokenizer import CaptionTokenizer
from utils import UserError

RULER = 3_000_000  # pixels of what is shown to the processor: more tell no more, and take room
TILE = 240  # pixels along the longer side of a tile
GAP = 14  # around tiles
PAPER, INK, GLOW = (255, 255, 255), (32, 33, 36), (255, 176, 32)


@dataclass(frozen=True)
class PatchGrid:
    """Where an encoder's vectors lie on a photo."""

    rows: int  # of the patches, which stand in reading order
    columns: int
    first: int  # place of the first patch in the sequence; before it stand CLS and the like
    area: tuple[float, float, float, float]  # left, top, right, bottom seen; 0 to 1 of the photo


@dataclass(frozen=True)
class WordMap:
    """A word and how much each patch was looked at when it was written: (rows, columns).

    What is missing to a sum of 1 went to vectors that are no patches.
    """

    word: str
    weights: Tensor


def patch_grid(encoder: FrozenEncoder, size: tuple[int, int], vectors: int) -> PatchGrid:
    """The grid of an opened photo of that size (width, height), which became so many vectors.

    The processor itself is asked what it does to a photo (crop, resize, pad): it is given one
    whose red grows from left to right and whose green from top to bottom.
    """
    if getattr(encoder.processor, "do_resize", False):  # or else it counts pixels, not parts
        shrink = min(1, (RULER / math.prod(size)) ** 0.5)
        size = tuple(max(1, round(side * shrink)) for side in size)
    width, height = size
    ruler = np.zeros((height, width, 3), dtype=np.uint8)
    ruler[..., 0] = np.rint(255 * (np.arange(width) + 0.5) / width)
    ruler[..., 1] = np.rint(255 * (np.arange(height)[:, None] + 0.5) / height)
    plain = [Image.new("RGB", size, colour) for colour in ("black", "white")]
    inputs = encoder.preprocess([Image.fromarray(ruler), *plain])
    pixels = inputs["pixel_values"]
    if "spatial_shapes" in inputs:  # NaFlex: patches (3, patches, pixels), padding after them
        rows, columns = inputs["spatial_shapes"][0].tolist()
        patch, first = encoder.patch_size, 0
        pixels = pixels[:, : rows * columns].reshape(3, rows, columns, patch, patch, 3)
        pixels = pixels.permute(0, 5, 1, 3, 2, 4).reshape(3, 3, rows * patch, columns * patch)
    else:
        rows, columns = (side // encoder.patch_size for side in pixels.shape[-2:])
        first = max(0, vectors - rows * columns)
        while rows * columns > vectors:  # stages join four into one: Swin's, a CNN's
            rows, columns = -(-rows // 2), -(-columns // 2)
        if first + rows * columns != vectors:
            raise UserError("this encoder's vectors don't lie on a grid: no attention to show")
    place, black, white = pixels.double().numpy()  # (3, height, width) each
    # Where black and white came out the same, there is no photo but padding.
    inside = (black != white).all(0)
    place = (place - black)[:2] / np.where(inside, white - black, np.nan)[:2]
    left, right = _ends(np.nanmean(place[0][:, inside.any(0)], axis=0), inside.any(0))
    top, bottom = _ends(np.nanmean(place[1][inside.any(1)], axis=1), inside.any(1))
    return PatchGrid(rows, columns, first, (left, top, right, bottom))


def _ends(places: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Where a line through the places read on the ruler is at both ends of the input."""
    if np.ptp(places) < 1e-3:  # a side of one pixel, which it sees whole
        places = (np.arange(len(places)) + 0.5) / len(places)
    slope, start = np.polyfit(inside.nonzero()[0] + 0.5, places, 1)
    return float(start), float(start + slope * len(inside))


def word_maps(
    model: CaptionModel,
    tokenizer: CaptionTokenizer,
    features: Tensor,
    prefix: Sequence[int],
    tokens: Sequence[int],
    grid: PatchGrid,
) -> list[WordMap]:
    """Where the decoder looked for each word; a word in several pieces has the mean of theirs.

    Args:
        features: one photo's (1, vectors, feature_width), on the model's device.
        prefix, tokens: what it was given and what it wrote, as ids.
    """
    row = torch.tensor([[*prefix, *tokens]], device=features.device)
    weights = model.cross_attention(features, row)[0, -1].mean(0)  # (length, vectors)
    weights = weights[len(prefix) - 1 :, grid.first : grid.first + grid.rows * grid.columns]
    weights = weights.unflatten(1, (grid.rows, grid.columns)).cpu()
    return [WordMap(word, weights[places].mean(0)) for word, places in tokenizer.words(tokens)]


def draw_attention(photo: Image.Image, grid: PatchGrid, maps: Sequence[WordMap]) -> Image.Image:
    """A tile for each word (at least one), the word beneath: grey where the decoder did not look.

    The photo is as `open_image` gives it, upright RGB. Each tile goes from nothing to its own
    largest weight; what the encoder didn't see is dark.
    """
    scale = TILE / max(photo.size)
    small = photo.resize([max(1, round(side * scale)) for side in photo.size])
    fonts = fonts_for("".join(shown.word for shown in maps))
    font = ImageFont.truetype(fonts[-1].fname, 20)  # that of the rarest letters
    _, top, _, bottom = font.getbbox("Äg")
    across = min(len(maps), max(2, round((len(maps) * 1.6 * small.height / small.width) ** 0.5)))
    wide = max(small.width, *(round(font.getlength(shown.word)) for shown in maps))
    step = wide + GAP, small.height + GAP + (bottom - top) + GAP
    down = -(-len(maps) // across)
    sheet = Image.new("RGB", (across * step[0] + GAP, down * step[1] + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, shown in enumerate(maps):
        x, y = GAP + i % across * step[0], GAP + i // across * step[1]
        sheet.paste(_tile(small, grid, shown.weights), (x + (wide - small.width) // 2, y))
        place = x + wide / 2, y + small.height + GAP / 2
        pen.text(place, shown.word, fill=INK, font=font, anchor="ma")
    return sheet


def _tile(photo: Image.Image, grid: PatchGrid, weights: Tensor) -> Image.Image:
    left, right = _span(*grid.area[::2], photo.width)
    top, bottom = _span(*grid.area[1::2], photo.height)
    heat = Image.fromarray((255 * weights / weights.max()).byte().numpy())
    heat = heat.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    grey = photo.convert("L").point(lambda value: 50 + value * 0.4).convert("RGB")
    tile = grey.point(lambda value: value * 0.5)
    tile.paste(grey.crop((left, top, right, bottom)), (left, top))
    glowing = Image.blend(photo, Image.new("RGB", photo.size, GLOW), 0.35)
    tile.paste(glowing.crop((left, top, right, bottom)), (left, top), heat)
    return tile


def _span(start: float, end: float, side: int) -> tuple[int, int]:
    """A part of a side in whole pixels, at least one that is in the photo."""
    first = min(round(start * side), side - 1)
    return first, max(first + 1, round(end * side))


def fonts_for(text: str) -> list[Any]:
    """Fonts that are installed and have a text's letters between them, matplotlib's own first.

    Letters that none has are said: they are drawn as boxes.
    """
    from matplotlib import font_manager  # takes a second

    own = font_manager.findfont("DejaVu Sans")  # has more scripts than Pillow's
    found, lacking = [], {ord(sign) for sign in f"{text} " if sign.isprintable()}
    for path in (own, *(font.fname for font in font_manager.fontManager.ttflist)):
        with contextlib.suppress(OSError, RuntimeError):  # a damaged one is passed over
            font = font_manager.get_font(path)
            if has := lacking & {*font.get_charmap()}:
                found.append(font)
                lacking -= has
        if not lacking:
            break
    else:
        letter = chr(min(lacking))
        print(f"no font here draws {letter!r}, which becomes a box: install one (Noto has all)")
    return found
