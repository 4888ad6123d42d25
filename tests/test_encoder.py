"""Encoders of each family load through the real API, give the whole sequence, and stay frozen."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from encoder import FrozenEncoder, ImageError, open_image, parse_layers
from tests.conftest import build_encoder
from utils import UserError

# The sequence of a 32-pixel picture in 8-pixel patches is 16 vectors, and one more with CLS.
FAMILIES = {"vit": 17, "clip": 17, "siglip": 16, "siglip2": 16, "dinov2": 17, "blip": 17}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_its_whole_patch_sequence(family, tmp_path):
    encoder = FrozenEncoder.load(str(build_encoder(family, tmp_path)))
    images = [Image.new("RGB", (50, 40), "red"), Image.new("RGB", (20, 60), "blue")]
    features = encoder(encoder.preprocess(images))
    assert features.shape == (2, FAMILIES[family], 32)
    assert not torch.allclose(features[0], features[1])
    assert encoder.width == 32


@pytest.mark.parametrize("family", ["vit", "clip", "siglip"])
def test_layers_are_joined_along_the_width(family, tmp_path):
    folder = str(build_encoder(family, tmp_path))
    last, both = FrozenEncoder.load(folder), FrozenEncoder.load(folder, layers=(-1, -2))
    inputs = last.preprocess([Image.new("RGB", (32, 32), "red")])
    joined = both(inputs)
    assert both.width == 64
    torch.testing.assert_close(joined[..., :32], last(inputs))
    assert not torch.allclose(joined[..., 32:], joined[..., :32])


def test_frozen_means_frozen(encoder_dir):
    encoder = FrozenEncoder.load(str(encoder_dir))
    encoder.train()
    assert not any(module.training for module in encoder.tower.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    inputs = encoder.preprocess([Image.new("RGB", (32, 32), "red")])
    first, second = encoder(inputs), encoder(inputs)
    # The tiny ViT has a dropout of 0.5: were it awake, two passes would differ.
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.mark.fault
def test_missing_weights_are_an_error(tmp_path):
    folder = build_encoder("clip", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors")
    with pytest.raises(UserError, match="partly random"):
        FrozenEncoder.load(str(folder))


def test_what_is_no_encoder_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="encoder_model_name"):
        FrozenEncoder.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="not a vision Transformer"):
        FrozenEncoder.load(str(tmp_path))


def test_layers_outside_the_tower_are_refused(encoder_dir):
    with pytest.raises(UserError, match="ENCODER_LAYERS"):
        FrozenEncoder.load(str(encoder_dir), layers=(-9,))
    with pytest.raises(UserError, match="ENCODER_LAYERS"):
        parse_layers("last")


def test_pictures_of_all_kinds_become_8_bit_rgb(tmp_path):
    file = tmp_path / "picture"
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half_red.save(file, "png")
    assert open_image(file).getpixel((0, 0)) == (255, 255, 255)  # transparent: white
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(file, "png")
    assert open_image(file).getpixel((0, 0)) == (156, 156, 156)  # 16 bits: 40000 / 256
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(file, "jpeg")
    red, green, blue = open_image(file).getpixel((0, 0))
    assert red > 200 and green < 60 and blue < 60
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (8, 4), "red").save(file, "jpeg", exif=exif)
    assert open_image(file).size == (4, 8)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(file, "png", transparency=0)
    assert open_image(file).getpixel((0, 0)) == (0, 0, 255)
    palette.save(file, "png", transparency=1)
    assert open_image(file).getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (1, 1), (7, 255)).save(file, "png")
    assert open_image(file).getpixel((0, 0)) == (7, 7, 7)  # one pixel, grey
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    assert open_image(file).getpixel((0, 0)) == (255, 0, 0)  # an animation: its first frame


@pytest.mark.fault(count=4)
def test_files_that_are_no_pictures_are_named(tmp_path):
    with pytest.raises(ImageError, match="no such picture"):
        open_image(tmp_path / "absent.jpg")
    file = tmp_path / "bad.jpg"
    for content in (b"", b"<html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(ImageError, match="bad.jpg is not a readable picture"):
            open_image(file)
    Image.effect_noise((64, 64), 50).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(ImageError, match="bad.jpg"):
        open_image(file)


@pytest.mark.fault(count=2)
def test_huge_pictures_are_read_or_refused_by_name(tmp_path, encoder_dir):
    encoder = FrozenEncoder.load(str(encoder_dir))
    Image.new("L", (10_000, 10_000), 90).save(tmp_path / "large.jpg")  # 100 megapixels
    assert encoder.open(tmp_path / "large.jpg").getpixel((5, 5)) == (90, 90, 90)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 50 kB, 1.2 GB as RGB
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(ImageError, match="bomb.png is too large"):
        encoder.open(tmp_path / "bomb.png")


def test_large_jpegs_are_decoded_small(tmp_path, encoder_dir):
    encoder = FrozenEncoder.load(str(encoder_dir))
    assert encoder.side == 32
    dice = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (9, 12, 3), generator=dice, dtype=torch.uint8).numpy()
    photo = Image.fromarray(coarse).resize((600, 450), Image.Resampling.BICUBIC)
    file = tmp_path / "large.jpg"
    exif = photo.getexif()
    exif[0x0112] = 6  # lies on its side
    photo.save(file, quality=95, exif=exif)
    small, whole = encoder.open(file), open_image(file)
    assert whole.size == (450, 600) and small.size == (113, 150)  # a quarter; an eighth is too few
    ours, theirs = (encoder.preprocess([image])["pixel_values"] for image in (small, whole))
    # Of a range of 2: a few hundredths where strong colours meet, where JPEG halves their detail.
    assert (ours - theirs).abs().mean() < 0.02 and (ours - theirs).abs().max() < 0.1
    photo.resize((100, 75)).save(file, quality=95)
    assert encoder.open(file).tobytes() == open_image(file).tobytes()


@pytest.mark.fault
def test_a_photo_with_an_odd_exif_block_is_read_and_turned(tmp_path):
    path = tmp_path / "odd.jpg"
    Image.new("RGB", (8, 6)).save(path, exif=_text_resolution())
    with Image.open(path) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)  # so the block is one that Pillow's own way fails on
    assert open_image(path).size == (6, 8)


@pytest.mark.parametrize("value", range(1, 9))
def test_each_orientation_is_brought_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        wanted = ImageOps.exif_transpose(image)
    assert np.array_equal(open_image(tmp_path / "turned.png"), wanted)


def _text_resolution() -> bytes:
    """EXIF, big-endian: orientation 6, and XResolution with the type of a text."""
    entries = [(0x0112, 3, 1, struct.pack(">HH", 6, 0)), (0x011A, 2, 4, b"72.\0")]
    body = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + body + struct.pack(">I", 0)
