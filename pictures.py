"""A picture as the encoder is to see it: 8-bit RGB, upright, transparency laid on white.

It goes along with a captioner that is exported, and so imports nothing of the project.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners put into 16
PHOTOMETRIC = 262  # the TIFF tag, which is 0 where 0 is white
BITS = 258  # the TIFF tag, bits of each colour
SIGNED = 339  # the TIFF tag, of which 1, or none, is for whole numbers without a sign
MOST_EXIF = 70_000  # bytes; each of its 6,000 tags may be as long as all of it, and take a copy
ORIENTATION = 0x0112  # the EXIF tag, and what brings each of its values upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as 8-bit RGB, upright, on white; raises what Pillow does where it can't be read."""
    deep = ";16" in str(getattr(image, "tile", ""))
    image.load()
    if deep and image.mode in ("RGB", "RGBA", "LA"):  # of whose colours Pillow keeps eight bits
        if max(high for _, high in image.convert("RGB").getextrema()) < 16:
            raise ValueError("its colours fill at most 12 of 16 bits: save it in 8 bits a colour")
    check_exif(len(image.info.get("exif") or b""))
    check_exif(len(image.info.get("Raw profile type exif") or "") // 2)  # in hexadecimal digits
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    image = _eight_bits(image) if image.mode.startswith(("I", "F")) else image
    # Pillow's own way to turn it also writes EXIF anew, and fails where another tag is odd.
    image = image.transpose(turn) if turn is not None else image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    picture = image.convert("RGB")
    picture.info.clear()  # or what it says of being turned would be heeded twice
    return picture


def check_exif(size: int) -> None:
    if size > MOST_EXIF:
        raise ValueError(f"its EXIF has {size:,} bytes, of which at most {MOST_EXIF:,} are read")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey in more than 8 bits, or in floats, by its bit depth or else its own range: Pillow's
    conversion would clip it to white, or round it to black."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if values.dtype == np.int32 and tags.get(BITS) == (32,) and tags.get(SIGNED, (1,)) == (1,):
        values = values.view(np.uint32)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("it holds values that are no numbers")
    whole = values.dtype.kind != "f"
    usual = high if whole else float(np.percentile(values, 99.9))
    if high - low > 20 * (usual - low) > 0:  # a hot pixel: all else would be black
        high, values = usual, values.clip(max=usual)
    if whole and low >= 0 and high < 2 ** DEPTHS[-1]:
        bits = next(bits for bits in DEPTHS if high < 2**bits)
        grey = values >> (bits - 8)
    elif not whole and low >= 0 and (high <= 1 or 127 < high <= 255):
        grey = values * (255 if high <= 1 else 1)
    else:
        low = min(low, 0)
        grey = (values - np.float32(low)) * (255 / (high - low or 1))
    if tags.get(PHOTOMETRIC) == 0:  # Pillow turns only eight bits over
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, 255, grey)
    return Image.fromarray(grey.astype(np.uint8))
