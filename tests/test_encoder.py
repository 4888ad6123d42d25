"""Encoders of each family load through the real API, give the whole sequence, and stay frozen."""

from __future__ import annotations

import json
import os
import pty
import shutil
import socket
import struct
import tempfile
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from attention import patch_grid
from encoder import (
    PHOTO_FORMATS,
    PHOTO_SUFFIXES,
    FrozenEncoder,
    ImageError,
    as_rgb,
    open_image,
    parse_layers,
    quiet_library,
)
from features import open_folder
from tests.conftest import build_encoder, run, vision_sizes
from tests.forked import Forked
from utils import UserError

# The sequence of a 32-pixel picture in 8-pixel patches is 16 vectors, and one more with CLS.
FAMILIES = {
    "vit": 17,
    "clip": 17,
    "siglip": 16,
    "siglip2": 16,
    "dinov2": 17,
    "dinov3": 21,  # with four registers
    "blip": 17,
    "metaclip_2": 17,
    "resnet": 16,
    "convnext": 16,
}


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
    apart = FrozenEncoder.load(folder, layers=parse_layers("cls, -2,-1"))(inputs)
    torch.testing.assert_close(apart[:, 1:, :32], joined[:, 1:, 32:])
    torch.testing.assert_close(apart[:, :1, :32], joined[:, :1, :32])
    torch.testing.assert_close(apart[..., 32:], joined[..., :32])


def test_of_a_network_of_convolutions_the_last_maps_alone_are_taken(tmp_path):
    folder = str(build_encoder("resnet", tmp_path))
    with pytest.raises(UserError, match="has the layer -1 alone: .*, or --encoder_layers=-1$"):
        FrozenEncoder.load(folder, layers=(-1, -4))
    encoder = FrozenEncoder.load(folder)
    inputs = encoder.preprocess([Image.radial_gradient("L").convert("RGB")])
    maps = encoder.tower(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(inputs)[0, 6], maps[0, :, 1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_sees_pictures_of_another_size(family, tmp_path):
    folder = str(build_encoder(family, tmp_path))
    usual, larger = FrozenEncoder.load(folder), FrozenEncoder.load(folder, image_size=48)
    larger.check()
    images = [Image.new("RGB", (50, 40), "red"), Image.radial_gradient("L").convert("RGB")]
    features = larger(larger.preprocess(images))
    assert features.shape == (2, FAMILIES[family] + 36 - 16, 32) and larger.side == 48
    again = FrozenEncoder.load_as_trained(larger.identity(), 32)
    assert torch.equal(again(again.preprocess(images)), features)
    assert "image_size" not in usual.identity()  # or features made before it would be made anew
    assert FrozenEncoder.load(folder, image_size=32).identity() == usual.identity()


@pytest.mark.parametrize("size", [50, 8192, -8, "48"])
def test_a_size_that_is_no_number_of_patches_is_refused(encoder_dir, size):
    with pytest.raises(UserError, match=f"ENCODER_IMAGE_SIZE is {size}: .* a multiple of that"):
        FrozenEncoder.load(str(encoder_dir), image_size=size)


def test_patches_may_have_a_height_and_a_width(encoder_dir, tmp_path):
    """As InternVL's configuration says it."""
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"patch_size": [8, 8]}))
    encoder = FrozenEncoder.load(str(folder), image_size=48)
    assert patch_grid(encoder, (50, 40), 37).columns == 6


def test_an_encoder_in_the_home_folder_is_found(encoder_dir, monkeypatch):
    """Written into config.py, or as `--encoder_model_name=~/...`, no shell finds it."""
    monkeypatch.setenv("HOME", str(encoder_dir.parent))
    identity = FrozenEncoder.load(f"~/{encoder_dir.name}").identity()
    assert identity == FrozenEncoder.load(str(encoder_dir)).identity()


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


def test_a_file_that_is_written_over_changes_no_loaded_encoder(encoder_dir, tmp_path):
    """Mapped weights would become the other's, or end the process where the file grew shorter."""
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    encoder = FrozenEncoder.load(str(folder))
    before = {name: weight.clone() for name, weight in encoder.tower.state_dict().items()}
    for file in folder.glob("*.safetensors"):
        others = {name: weight + 1 for name, weight in load_file(file).items()}
        save_file(others, tmp_path / "other", {"format": "pt"})
        shutil.copyfile(tmp_path / "other", file)
    after = encoder.tower.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.fault
def test_missing_weights_are_an_error(tmp_path):
    folder = build_encoder("clip", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors")
    with pytest.raises(UserError, match="partly random"):
        FrozenEncoder.load(str(folder))


def test_what_is_no_encoder_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="give another with --encoder_model_name .Val"):
        FrozenEncoder.load(str(tmp_path))
    trained = {"name": str(tmp_path), "layers": [-1]}  # which only --encoder can move
    with pytest.raises(UserError, match="give another with --encoder .Val"):
        FrozenEncoder.load_as_trained(trained, 32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="with --encoder_model_name .it is a gpt2 model, not a v"):
        FrozenEncoder.load(str(tmp_path))
    (build_encoder("vit", tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="[(]it has no preprocessor_config.json: copy that of"):
        FrozenEncoder.load(str(tmp_path))


def test_a_library_that_the_preprocessing_needs_is_named(encoder_dir, monkeypatch):
    """OWLv2's needs scipy, which it misses only when it is given a picture."""

    def resize(*_, **__):
        raise ImportError("\nIt requires scipy but it was not found. Install it with:\n`pip`.\n")

    monkeypatch.setattr(transformers.ViTImageProcessorPil, "resize", resize)
    with pytest.raises(UserError, match="loaded .* give .*It requires scipy .* with: `pip`"):
        FrozenEncoder.load(str(encoder_dir))


def test_files_that_git_lfs_did_not_fetch_are_named(encoder_dir, tmp_path):
    note = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((Path(encoder_dir) / name).read_bytes())
    (tmp_path / "model.safetensors").write_text(note)
    with pytest.raises(UserError, match=r"model\.safetensors is Git LFS's note of it: run git lfs"):
        FrozenEncoder.load(str(tmp_path))
    (tmp_path / "a.jpg").write_text(note)
    with pytest.raises(UserError, match=r"a\.jpg is Git LFS's note of it"):
        open_image(tmp_path / "a.jpg")


def odd_encoder(kind: str):
    """A model and processor that load, and don't make the same sequence of every picture."""
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessorPil(size=size)
    if kind == "leaves patches out at random":
        model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**vision_sizes()))
    elif kind == "layers of several widths":
        config = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
        model = transformers.SwinModel(
            transformers.SwinConfig(**config, depths=[1, 1], num_heads=[2, 4])
        )
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision_sizes()))
        edge = {"shortest_edge": 32}
        processor = transformers.CLIPImageProcessorPil(size=edge, do_center_crop=False)
    return model, processor


@pytest.mark.fault
@pytest.mark.parametrize(
    "kind", ["leaves patches out at random", "layers of several widths", "no crop"]
)
def test_an_encoder_of_another_kind_is_refused_before_photos_are_encoded(kind, tmp_path):
    for part in odd_encoder(kind):
        part.save_pretrained(tmp_path / "odd")
    encoder = FrozenEncoder.load(str(tmp_path / "odd"), layers=(-1, -3))
    with pytest.raises(UserError, match="makes no sequence of .*: choose another"):
        open_folder(tmp_path / "features", encoder, torch.float32)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", {"num_hidden_layers": 100_000}),
        ("config.json", {"depths": [100_000]}),
        ("preprocessor_config.json", {"size": {"height": 100_000, "width": 100_000}}),
    ],
)
def test_an_encoder_that_says_to_be_without_end_is_refused(encoder_dir, tmp_path, name, said):
    shutil.copytree(encoder_dir, tmp_path / "encoder")
    file = tmp_path / "encoder" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(UserError, match="says that it has 100,000 (layers|pixels)"):
        FrozenEncoder.load(str(tmp_path / "encoder"))


def test_layers_outside_the_tower_are_refused(encoder_dir):
    with pytest.raises(UserError, match="ENCODER_LAYERS"):
        FrozenEncoder.load(str(encoder_dir), layers=(-9,))
    deeper = {"name": "moved", "layers": [-9]}
    with pytest.raises(UserError, match="-1: give another with --encoder$"):  # and no other flag
        FrozenEncoder.load_as_trained(deeper, 32, str(encoder_dir))
    for text in ("last", "cls,", "CLS,-2"):
        with pytest.raises(UserError, match="ENCODER_LAYERS"):
            parse_layers(text)
    with pytest.raises(UserError, match="ENCODER_LAYERS"):
        FrozenEncoder.load(str(encoder_dir), layers=parse_layers("cls"))


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
    with pytest.raises(ImageError, match="bomb.png is not a readable picture: Image size"):
        encoder.open(tmp_path / "bomb.png")


# --- What comes from outside ----------------------------------------------------------------

GHOST = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.fault(count=3)
@pytest.mark.parametrize("name", ["a.eps", "a.jpg", "a.png"])
def test_no_picture_starts_a_program(tmp_path, monkeypatch, name):
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / name).write_bytes(GHOST)
    with pytest.raises(ImageError, match=f"{name} is not a readable picture"):
        open_image(tmp_path / name)
    assert not started.exists()


def test_each_suffix_is_of_a_format_that_is_read():
    Image.init()
    of = {suffix: form for suffix, form in Image.EXTENSION.items() if suffix in PHOTO_SUFFIXES}
    assert of.keys() == PHOTO_SUFFIXES and {*of.values()} - {"MPO"} <= {*PHOTO_FORMATS}


@pytest.mark.fault(count=3)
@pytest.mark.parametrize("answer", ["1\n", "y\n"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_no_code_of_an_encoder_runs_and_nobody_is_asked(tmp_path, file, answer):
    """On a terminal, and with the answer waiting on standard input."""
    folder, mark = build_encoder("vit", tmp_path / "encoder"), tmp_path / "executed"
    described = json.loads((folder / file).read_text())
    classes = {"AutoConfig": "evil.E", "AutoModel": "evil.E", "AutoImageProcessor": "evil.E"}
    described |= {"auto_map": classes, "model_type": "evil", "image_processor_type": "Evil"}
    (folder / file).write_text(json.dumps(described))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass E: pass\n")
    code = "import sys\nfrom encoder import FrozenEncoder\nFrozenEncoder.load(sys.argv[1])"
    for says, reads in (pty.openpty(), os.pipe()[::-1]):
        os.write(says, answer.encode() * 3)
        with Forked("-c", code, folder, stdin=Connection(reads)) as process:
            said, errors = process.communicate(60)
        os.close(says)
        assert "UserError: the encoder" in errors and "can't be loaded" in errors
        assert "[y/N]" not in said + errors
        assert not mark.exists()


PEAK = r"""
import re, sys
from encoder import FrozenEncoder
from utils import UserError
encoder = FrozenEncoder.load(sys.argv[1])
try:
    image = encoder.open(sys.argv[2])
    encoder(encoder.preprocess([image]))
    print("read")
except UserError as error:
    print(error)
# What `getrusage` tells of may be the peak of the process that started this one.
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


def tags_that_are_all_of_it(size: int) -> bytes:
    """A TIFF of one directory, whose 2,000 tags each point to `size` bytes."""
    tags = (struct.pack("<HHLL", 40_000 + n, 1, size, 8) for n in range(2000))
    head = struct.pack("<LH", 8, 2000)
    return b"".join([b"II*\0", head, *tags, bytes(4 + size)])


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", check)


@pytest.mark.fault(count=6)
def test_exif_and_tags_that_take_many_times_their_size_are_refused(tmp_path):
    bomb = tags_that_are_all_of_it(400_000)
    (tmp_path / "tags.tif").write_bytes(bomb)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for name, exif in {"tags.png": bomb, "signs.png": b"Exif\0\0" * 400_000}.items():
        (tmp_path / name).write_bytes(content[:33] + chunk(b"eXIf", exif) + content[33:])
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg", exif=Image.Exif())
    content = (tmp_path / "a.jpg").read_bytes()
    parts = [b"Exif\0\0" + bomb[n : n + 65_000] for n in range(0, len(bomb), 65_000)]
    parts = [b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part for part in parts]
    (tmp_path / "tags.jpg").write_bytes(b"".join([content[:2], *parts, content[20:]]))
    for kind in ("avif", "webp"):
        photo = Image.new("RGB", (4, 4))
        photo.save(tmp_path / f"tags.{kind}", exif=b"Exif\0\0" + tags_that_are_all_of_it(80_000))
    for name in ("tags.tif", "tags.png", "signs.png", "tags.jpg", "tags.avif", "tags.webp"):
        tracemalloc.start()
        with pytest.raises(ImageError, match=f"{name} .* (EXIF|passed over)"):
            open_image(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 100e6
        tracemalloc.stop()


@pytest.mark.fault
def test_a_tiff_of_few_pixels_in_a_large_tile_is_refused(tmp_path):
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 2**15, 323: 2**15, 324: 134}
    tags[325] = len(tile := zlib.compress(bytes(2**20)))  # of 1 MB, a whole one gives 1 GB
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<LH", 8, len(tags))
    (tmp_path / "a.tif").write_bytes(head + entries + bytes(4) + tile)
    with pytest.raises(ImageError, match="too large a picture: it has 1074 megapixels"):
        open_image(tmp_path / "a.tif")


@pytest.mark.fault(count=4)
def test_pictures_of_rows_or_tiles_without_end_are_refused(tmp_path):
    Image.new("1", (1, 1)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    size = b"IHDR" + struct.pack(">IIBBBBB", 1, 40_000_000, 1, 0, 0, 0, 0)
    header = size + struct.pack(">I", zlib.crc32(size))
    (tmp_path / "tall.png").write_bytes(content[:12] + header + content[12 + len(header) :])
    with pytest.raises(ImageError, match="tall.png is too large a picture: it has 160 megapixels"):
        open_image(tmp_path / "tall.png")
    for plain in (False, True):  # with boxes around it, and without
        Image.new("RGB", (255, 257)).save(tmp_path / "a.jp2", no_jp2=plain)
        content = (tmp_path / "a.jp2").read_bytes()
        start = content.index(b"\xff\x51") + 22  # of its tiles' width and height
        for size in (64, 1):
            tiles = content[:start] + struct.pack(">II", size, size) + content[start + 8 :]
            (tmp_path / f"{size}.jp2").write_bytes(tiles)
        assert open_image(tmp_path / "64.jp2").size == (255, 257)
        with pytest.raises(ImageError, match=r"1\.jp2 .*: it has 65,535 tiles of 3 components"):
            open_image(tmp_path / "1.jp2")


@pytest.mark.fault(count=5)
def test_pictures_that_are_passed_over_without_end_are_refused(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    scan = content[content.rindex(b"\xff\xda") :][:10]
    (tmp_path / "scans.jpg").write_bytes(content[:-2] + scan * 100_000 + content[-2:])
    Image.new("P", (4, 4)).save(tmp_path / "a.gif")
    content = (tmp_path / "a.gif").read_bytes()
    start = content.index(b",\0\0")
    comments = b"!\xfe\x01a\0" * 500_000
    (tmp_path / "comments.gif").write_bytes(content[:start] + comments + content[start:])
    comment = b"!\xfe" + b"\x01a" * 500_000 + b"\0"
    (tmp_path / "comment.gif").write_bytes(content[:start] + comment + content[start:])
    (tmp_path / "comments.ppm").write_bytes(b"P3 4 4 255\n" + b"#\n" * 500_000 + b"0 " * 48)
    started = time.monotonic()
    (tmp_path / "deep.ppm").write_bytes(b"P6 1100 1000 65535\n" + bytes(6_600_000))
    for name in ("scans.jpg", "comments.gif", "comment.gif", "comments.ppm"):
        with pytest.raises(ImageError, match=f"{name} .* passed over"):
            open_image(tmp_path / name)
    assert time.monotonic() - started < 5
    with pytest.raises(ImageError, match=r"deep\.ppm .*: save it as JPEG or PNG"):
        open_image(tmp_path / "deep.ppm")  # which Pillow reads by the pixel
    assert open_image(tmp_path / "a.jpg").size == (64, 64) and open_image(tmp_path / "a.gif")


def bomb(folder: Path, name: str) -> Path:
    path = folder / name.replace(" ", "_")
    if "line" in name:
        size = (1, 10_000) if "high" in name else (20_000, 1)
        Image.new("1", size).save(path.with_suffix(".png"))
    elif "large" in name:
        Image.new("RGBA", (13_300, 13_300)).save(path.with_suffix(".png"), compress_level=1)
    elif "just" in name:
        picture = Image.new("RGBA", (6900, 6900), (9, 9, 9, 9))
        picture.save(path.with_suffix(".png"), compress_level=1)
    else:
        picture = Image.new("RGB", (10_000, 10_000), "red")
        picture.save(path.with_suffix(".jpg"), progressive=True)
    return next(folder.glob(path.name + ".*"))


@pytest.mark.fault
@pytest.mark.parametrize(
    "name, said",
    {
        "line high": "read",
        "line wide": "read",
        "large png": "is too large a picture: it has 177 megapixels",
        "just not too large": "read",
        "jpeg in passes": "is too large a picture: it has 100 megapixels",
    }.items(),
)
def test_no_picture_takes_a_gigabyte(tmp_path, name, said):
    encoder = build_encoder("clip", tmp_path / "encoder")
    result = run("-c", PEAK, encoder, bomb(tmp_path, name))
    *text, peak = result.stdout.splitlines()
    assert said in text[-1], result.stderr
    assert int(peak) < 1_000_000


def test_a_stretched_picture_is_seen_as_its_middle(tmp_path):
    encoder = FrozenEncoder.load(str(build_encoder("clip", tmp_path)))
    gradient = Image.linear_gradient("L").resize((3, 1200)).convert("RGB")
    long = encoder.preprocess([gradient])["pixel_values"]
    whole = dict(encoder.processor(images=[gradient], return_tensors="pt"))["pixel_values"]
    torch.testing.assert_close(long, whole, rtol=0, atol=0.02)
    for size in ((1, 1200), (1200, 1), (1, 1)):
        assert encoder(encoder.preprocess([gradient.resize(size)])).isfinite().all()


RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
DEEP = {
    "float 0 to 1": RAMP,
    "float 0 to 255": RAMP * 255,
    "float 0 to 65535": RAMP * 65535,
    "float 0 to 5": RAMP * 5,
    "float -1 to 1": RAMP * 2 - 1,
    "int32": (RAMP * 2_000_000_000).astype(np.int32),
    "16 in int32": (RAMP * 65535).astype(np.int32),
    "16 bits": (RAMP * 65535).astype(np.uint16),
    "12 in 16": (RAMP * 4095).astype(np.uint16),
    "8 in 16": (RAMP * 255).astype(np.uint16),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_keep_their_shades(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / "deep.tif")
    for picture in (open_image(tmp_path / "deep.tif"), as_rgb(Image.fromarray(DEEP[name]))):
        shades = np.asarray(picture)[..., 0].astype(float)
        assert np.abs(shades - RAMP * 255).max() < 2


def test_numbers_without_a_sign_are_read_as_such(tmp_path):
    shades = (RAMP * (2**32 - 256)).astype(np.uint32)
    Image.fromarray(shades.view(np.int32)).save(tmp_path / "deep.tif")
    content = (tmp_path / "deep.tif").read_bytes()
    signed, plain = (struct.pack("<HHIHH", 339, 3, 1, sign, 0) for sign in (2, 1))
    assert content.count(signed) == 1
    (tmp_path / "deep.tif").write_bytes(content.replace(signed, plain))
    read = np.asarray(open_image(tmp_path / "deep.tif"))[..., 0].astype(float)
    assert np.abs(read - RAMP * 255).max() < 2


@pytest.mark.fault
def test_colours_in_the_lower_of_16_bits_are_refused_and_not_black(tmp_path):
    def png(most):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        shades = np.repeat(RAMP[..., None] * most, 3, -1).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in shades)
        (tmp_path / "deep.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        )
        return tmp_path / "deep.png"

    assert np.abs(np.asarray(open_image(png(65535)))[..., 0] - RAMP * 255).max() < 2
    for most in (255, 4095):
        with pytest.raises(ImageError, match="at most 12 of 16 bits"):
            open_image(png(most))


def test_a_picture_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((np.tile(RAMP, (8, 8)) * 255).astype(np.uint8)).save(
        tmp_path / "turned.jpg", exif=exif
    )
    once = open_image(tmp_path / "turned.jpg")
    assert np.array_equal(np.asarray(as_rgb(once)), np.asarray(once))
    with Image.open(tmp_path / "turned.jpg") as image:
        as_rgb(image)
        assert image.getexif()[0x0112] == 6  # what was given is as before


def test_a_hot_pixel_darkens_nothing_and_white_may_be_0(tmp_path):
    hot = np.tile(RAMP, (8, 8))
    shades = (hot * 65535).astype(np.uint16)
    Image.fromarray(65535 - shades).save(tmp_path / "over.tif", tiffinfo={262: 0, 274: 6})
    turned = np.asarray(open_image(tmp_path / "over.tif"))[..., 0]
    assert np.abs(np.rot90(turned) - hot * 255).max() < 2
    hot[0, 0] = 1e6
    Image.fromarray(hot).save(tmp_path / "hot.tif")
    seen = np.asarray(open_image(tmp_path / "hot.tif"))[..., 0].astype(float)
    assert np.abs(seen - np.tile(RAMP, (8, 8)) * 255)[1:].max() < 2


@pytest.mark.fault
def test_values_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.where(RAMP > 0.5, np.nan, RAMP)).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="nan.tif is not a readable picture: .* no numbers"):
        open_image(tmp_path / "nan.tif")


def test_a_clear_shade_of_16_bits_is_white_and_black_stays_black(tmp_path):
    grey = np.array([[0, 30000], [40000, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "clear.png", transparency=40000)
    with Image.open(tmp_path / "clear.png") as image:
        assert image.info["transparency"] == 40000
    assert np.asarray(open_image(tmp_path / "clear.png"))[..., 0].tolist() == [[0, 117], [255, 255]]


SILENT = """
import sys, time
from encoder import FrozenEncoder
from utils import UserError
FrozenEncoder.load(sys.argv[1])  # so that all is imported
started = time.monotonic()
try:
    FrozenEncoder.load("me/none")
except UserError as error:
    print(time.monotonic() - started, error)
"""


@pytest.mark.fault(count=2)
def test_a_hub_that_is_silent_is_said_within_seconds(encoder_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it never answers; at 9 is none
        for port in (server.getsockname()[1], 9):
            address = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
            result = run("-c", SILENT, encoder_dir, **address)
            seconds, said = result.stdout.strip().split(" ", 1)
            assert float(seconds) < 5 and "is there a network?" in said


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
    Image.new("RGB", (9000, 8000)).save(file)  # too large to be read whole
    assert open_image(file).size == (2250, 2000)
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


def test_a_machine_without_room_for_temporary_files_is_told_apart_from_a_wrong_folder(monkeypatch):
    """As a container whose file system is to be read only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(UserError, match="TMPDIR"):
        FrozenEncoder.load("demo/encoder")


def test_the_library_says_what_it_said_after_threads_have_loaded_encoders():
    library = transformers.utils.logging
    seen, before = [], (library.get_verbosity(), library.is_progress_bar_enabled())

    def load(seconds: float) -> None:
        with quiet_library():
            time.sleep(seconds)
            seen.append((library.get_verbosity(), library.is_progress_bar_enabled()))

    with ThreadPoolExecutor(2) as threads:
        [*threads.map(load, (0.05, 0.1))]
    assert seen == [(library.ERROR, False)] * 2
    assert before == (library.get_verbosity(), library.is_progress_bar_enabled())
