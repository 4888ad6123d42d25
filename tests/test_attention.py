"""Attention shown is attention paid, and a place on the map is that place in the photo."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import attention
import inference
from attention import PatchGrid, WordMap, draw_attention, patch_grid, word_maps
from encoder import FrozenEncoder
from generation import generate
from inference import load_captioner
from model import CaptionModel
from tests.conftest import build_encoder, run
from tests.test_model import build_model, captions, features
from tokenizer import ANSWER_ID, START_ID, CaptionTokenizer
from utils import UserError

FAMILIES = ["vit", "clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "blip"]
SIZES = [(60, 40), (40, 100)]


# --- The weights ----------------------------------------------------------------------------


def test_the_weights_are_those_of_the_decoders_own_attention():
    model = build_model()
    tokens = torch.tensor(captions([6]))
    keys = [keys for keys, _ in model.memory(torch.randn(1, 8, 24))]
    # With 8 patches, heads of width 8, and as the value of a patch 1 at its own place: what a
    # head mixes are its weights.
    memory = [(k, torch.eye(8).expand(1, 4, 8, 8)) for k in keys]
    mixed = []
    for block in model.decoder.blocks:
        block.cross_out.register_forward_pre_hook(
            lambda _, given: mixed.append(given[0].unflatten(2, (4, 8)).transpose(1, 2))
        )
    model.memory = lambda _: memory
    weights = model.cross_attention(features(1), tokens)
    assert weights.shape == (1, 3, 4, 8, 8)
    assert weights.std(-1).mean() > 0.02  # far from uniform
    torch.testing.assert_close(weights, torch.stack(mixed, dim=1), rtol=0, atol=1e-5)
    assert not any(block.cross_q._forward_hooks for block in model.decoder.blocks)


def test_another_threads_photo_is_not_looked_at():
    model, row = build_model(), torch.tensor(captions([5]))
    alone, other = model.cross_attention(features(1), row), torch.tensor(captions([4]))

    def meanwhile(*_) -> None:
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model.cross_attention, torch.randn(1, 8, 24), other).result()

    hook = model.decoder.blocks[1].cross_q.register_forward_pre_hook(meanwhile)
    assert torch.equal(model.cross_attention(features(1), row), alone)


def test_several_captions_of_a_photo_have_each_their_own_weights():
    model = build_model()
    rows = captions([5, 5])
    both = model.cross_attention(features(1).expand(2, -1, -1), torch.tensor(rows))
    alone = torch.cat([model.cross_attention(features(1), torch.tensor([ids])) for ids in rows])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.01


# --- From weights to words ------------------------------------------------------------------


class Letters(CaptionTokenizer):
    """Words over the ids of the small model: an even id begins one."""

    def __init__(self):
        pass

    def words(self, ids):
        starts = [i for i, token in enumerate(ids) if i == 0 or token % 2 == 0]
        ends = [*starts[1:], len(ids)]
        return [(f"w{a}", list(range(a, b))) for a, b in zip(starts, ends, strict=True)]


def maps(model: CaptionModel, prefix: list[int], tokens: list[int]) -> list[torch.Tensor]:
    grid = PatchGrid(2, 4, 1, (0, 0, 1, 1))
    shown = word_maps(model, Letters(), features(1), prefix, tokens, grid)
    return [each.weights for each in shown]


@pytest.mark.parametrize("prefix", [[START_ID], [START_ID, 9, 30, ANSWER_ID]])
def test_a_words_map_is_of_the_moment_when_it_was_chosen(prefix):
    model = build_model()
    before = maps(model, prefix, [10, 12, 14, 16])
    assert [each.shape for each in before] == [(2, 4)] * 4
    changed = maps(model, prefix, [10, 12, 20, 16])
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(before, changed, strict=True)]
    # The third word differs only after it was chosen: the fourth knows of it, it itself doesn't.
    assert same == [True, True, True, False]
    asked = torch.tensor([[*prefix, 10, 12, 14, 16]])
    weights = model.cross_attention(features(1), asked)[0, -1].mean(0)[len(prefix) - 1, 1:]
    torch.testing.assert_close(before[0].flatten(), weights)


def test_pieces_of_one_word_share_a_map():
    model = build_model()
    one, two = maps(model, [START_ID], [10, 13, 12])
    whole = model.cross_attention(features(1), torch.tensor([[START_ID, 10, 13, 12]]))
    places = whole[0, -1].mean(0)[:, 1:].unflatten(1, (2, 4))
    torch.testing.assert_close(one, places[:2].mean(0))
    torch.testing.assert_close(two, places[2])


def test_words_of_a_text_and_their_pieces():
    tokenizer = CaptionTokenizer.train(["a red dog", "a red dog runs"] * 3, 300)
    for text in ("a red dog", "a zebra's red, wet nose", "größer 犬", ""):
        [ids] = tokenizer.encode([text])
        words = tokenizer.words(ids)
        assert [word for word, _ in words] == text.split()
        assert [place for _, group in words for place in group] == list(range(len(ids)))
    assert len(tokenizer.words(tokenizer.encode(["a zebra"])[0])[1][1]) > 1
    [ids] = tokenizer.encode(["红T恤, 狗"])  # never seen, so of three pieces each
    assert [word for word, _ in tokenizer.words(ids)] == ["红", "t恤", ",", "狗"]


# --- From patches to places -----------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request, tmp_path_factory) -> FrozenEncoder:
    folder = build_encoder(request.param, tmp_path_factory.mktemp(request.param))
    # The vectors before the first layer, where a random tower has not mixed them yet.
    return FrozenEncoder.load(str(folder), layers=(-4,))


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(90, 160, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(grid: PatchGrid, row: int, column: int, size: tuple[int, int]) -> list[float]:
    """Left, top, right and bottom of a patch on a photo, in pixels."""
    left, top, right, bottom = grid.area
    wide, high = (right - left) / grid.columns, (bottom - top) / grid.rows
    corner = left + column * wide, top + row * high
    return [
        part * side
        for part, side in zip((*corner, corner[0] + wide, corner[1] + high), size * 2, strict=True)
    ]


def features_of(encoder: FrozenEncoder, image: Image.Image) -> torch.Tensor:
    return encoder(encoder.preprocess([image]))[0]


@pytest.mark.parametrize("size", SIZES)
def test_a_changed_place_changes_the_patch_that_the_grid_names(encoder, size):
    plain = noise(size)
    before = features_of(encoder, plain)
    grid = patch_grid(encoder, size, len(before))
    assert (grid.rows, grid.columns) == (4, 4)
    for patch in range(16):
        left, top, right, bottom = box(grid, patch // 4, patch % 4, size)
        changed = plain.copy()
        inner = [round(left + 1), round(top + 1), round(right - 1), round(bottom - 1)]
        changed.paste((255, 0, 0), inner)
        moved = (features_of(encoder, changed) - before).norm(dim=1)
        assert moved[grid.first + patch] > 0.5 * moved.sum(), patch


@pytest.mark.parametrize("size", SIZES)
def test_what_lies_outside_the_area_is_not_seen(encoder, size):
    plain = noise(size)
    before = features_of(encoder, plain)
    grid = patch_grid(encoder, size, len(before))
    left, top, right, bottom = (p * s for p, s in zip(grid.area, size * 2, strict=True))
    other = Image.new("RGB", size, (255, 0, 0))
    inner = [round(left) - 2, round(top) - 2, round(right) + 2, round(bottom) + 2]
    other.paste(plain.crop(inner), inner[:2])
    # As far as resizing looks; where all is seen, nothing is left to change.
    torch.testing.assert_close(features_of(encoder, other), before)
    whole = max(abs(a - b) for a, b in zip(grid.area, (0, 0, 1, 1), strict=True)) < 0.01
    crops = type(encoder.processor).__name__.startswith(("CLIP", "Bit"))
    assert whole != crops


def test_the_area_of_a_centre_crop_is_exact(tmp_path):
    encoder = FrozenEncoder.load(str(build_encoder("clip", tmp_path)))
    # 480 x 320 becomes 48 x 32, of which the middle 32 x 32 stays.
    area = patch_grid(encoder, (480, 320), 17).area
    assert np.allclose(area, (1 / 6, 0, 5 / 6, 1), atol=0.003)


@pytest.mark.parametrize("size", [(2600, 1700), (300, 16000)])
def test_large_photos_are_measured_on_small_ones(encoder, size, monkeypatch):
    shown = []
    preprocess = encoder.preprocess
    monkeypatch.setattr(
        encoder, "preprocess", lambda x: shown.extend(each.size for each in x) or preprocess(x)
    )
    vectors = 17 + 4 * (encoder.tower.config.model_type == "dinov2_with_registers")
    small = patch_grid(encoder, size, vectors)
    assert max(map(math.prod, shown)) < 3.1e6
    monkeypatch.setattr(attention, "RULER", math.prod(size))
    whole = patch_grid(encoder, size, vectors)
    assert size in shown and np.allclose(small.area, whole.area, atol=1e-3)


def test_padding_is_no_part_of_the_photo(tmp_path):
    encoder = FrozenEncoder.load(str(build_encoder("clip", tmp_path)))
    encoder.processor.do_resize = False
    # 20 x 32 in the middle of 32 x 32: six pixels of padding on each side.
    area = patch_grid(encoder, (20, 32), 17).area
    assert np.allclose(area, (-6 / 20, 0, 26 / 20, 1), atol=0.005)


def test_photos_that_lie_on_their_side(tmp_path, encoder_dir):
    encoder = FrozenEncoder.load(str(encoder_dir), layers=(-4,))
    upright = noise((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, paint in (("plain", False), ("changed", True)):
        photo = upright.copy()
        if paint:
            photo.paste((255, 0, 0), (48, 2, 58, 8))  # as it is seen: on top, on the right
        photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"{name}.png", exif=exif)
    plain, changed = (encoder.open(tmp_path / f"{name}.png") for name in ("plain", "changed"))
    assert plain.size == (60, 40)
    before = features_of(encoder, plain)
    grid = patch_grid(encoder, plain.size, len(before))
    moved = (features_of(encoder, changed) - before).norm(dim=1)
    assert moved.argmax() == grid.first + 3


def test_naflex_grids_of_any_shape_with_padding_after_them(tmp_path):
    encoder = FrozenEncoder.load(str(build_encoder("siglip2", tmp_path)))
    encoder.square = False  # as its processor alone would do it
    encoder.processor.max_num_patches = 16
    grid = patch_grid(encoder, (60, 24), 16)
    assert grid.rows < grid.columns and grid.rows * grid.columns < 16 and grid.first == 0
    assert np.allclose(grid.area, (0, 0, 1, 1), atol=0.01)


@pytest.mark.parametrize(
    ("family", "layer", "rows", "size"),
    [("swin", -1, 4, 32), ("swin", -3, 8, 32), ("swin", -1, 5, 36), ("convnext", -1, 4, 32)],
)
def test_a_tower_that_joins_patches_has_a_smaller_grid(tmp_path, family, layer, rows, size):
    encoder = FrozenEncoder.load(str(build_encoder(family, tmp_path)), None, (layer,), "", size)
    before = features_of(encoder, plain := noise((size, size)))
    grid = patch_grid(encoder, plain.size, len(before))
    assert (grid.rows, grid.columns, grid.first) == (rows, rows, 0)
    changed = plain.copy()
    changed.paste((255, 0, 0), [round(side) for side in box(grid, 1, 1, plain.size)])
    assert (features_of(encoder, changed) - before).norm(dim=1).argmax() == grid.columns + 1


def test_an_encoder_without_a_grid_is_refused(encoder_dir):
    with pytest.raises(UserError, match="grid"):
        patch_grid(FrozenEncoder.load(str(encoder_dir)), (40, 40), 9)


# --- The picture ----------------------------------------------------------------------------


def test_the_brightest_place_of_a_tile_is_where_the_weight_is():
    photo = Image.new("RGB", (240, 120), (128, 128, 128))
    weights = torch.full((2, 4), 0.01)
    weights[1, 2] = 0.9
    grid = PatchGrid(2, 4, 1, (0.25, 0, 0.75, 1))
    sheet = draw_attention(photo, grid, [WordMap("dog", weights), WordMap("runs", weights)])
    saturation = np.asarray(sheet.convert("HSV"))[:, :, 1].astype(float)
    y, x = np.unravel_index(saturation[:, : sheet.width // 2].argmax(), saturation.shape)[:2]
    y, x = np.argwhere(saturation[:, :256] == saturation[:, :256].max()).mean(0) - 14
    # The area is pixels 60 to 180; the patch in column 2 of 4, row 1 of 2 lies at 120 to 150.
    assert 118 < x < 152 and 60 < y < 120
    outside, inside = sheet.getpixel((14 + 20, 14 + 20)), sheet.getpixel((14 + 70, 14 + 20))
    assert outside[0] < inside[0]  # what the encoder never saw is dark


@pytest.mark.parametrize("family", ["vit", "clip", "siglip2"])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 5000)])
def test_photos_of_few_pixels_are_drawn(tmp_path, family, size):
    encoder = FrozenEncoder.load(str(build_encoder(family, tmp_path)))
    photo = Image.new("RGB", size, (128, 128, 128))
    grid = patch_grid(encoder, size, len(features_of(encoder, photo)))
    draw_attention(photo, grid, [WordMap("dog", torch.ones(grid.rows, grid.columns))])


def test_the_command_draws_captions_and_answers(joint, tmp_path, monkeypatch):
    photo, checkpoint = joint / "images" / "000.png", joint / "captioner_best_cider.safetensors"
    plain = run("inference.py", "--image_path", photo, "--checkpoint", checkpoint)
    for more in ([], ["--question", "what color is the square?"]):
        out = tmp_path / f"{len(more)}.png"
        result = run(
            "inference.py",
            "--image_path",
            photo,
            "--checkpoint",
            checkpoint,
            "--attention",
            out,
            "--json",
            *more,
        )
        assert result.returncode == 0, result.stderr
        said = result.stdout.splitlines()
        (last,) = json.loads(said[-1]).values()
        text = last[0]["answer"] if more else last
        assert said[0] == text and (more or text == plain.stdout.strip())
        with Image.open(out) as picture:
            assert picture.width > 200
    captioner = load_captioner(checkpoint)
    image = captioner.encoder.open(photo)
    grid, found = captioner.explain(image)
    features, options = captioner.features([image]), captioner.options
    (same,) = generate(captioner.model, features, options, None, captioner.reranker)
    assert [each.hypothesis.tokens for each in found] == [h.tokens for h in same]
    assert " ".join(word.word for word in found[0].words) == found[0].text
    assert (grid.rows, grid.columns, grid.first) == (4, 4, 1)
    monkeypatch.setattr(inference, "patch_grid", None)  # without maps no grid is made
    grid, plain = captioner.explain(image, maps=False)
    assert grid is None and [each.text for each in plain] == [each.text for each in found]


@pytest.mark.parametrize(
    "flags, expected",
    [(["--attention", "x.png"], "draws one photo"), (["--attention", "x.gif"], ".png or .jpg")],
)
def test_what_can_not_be_drawn_is_said_before_loading(tmp_path, flags, expected):
    photo = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(photo)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    path = tmp_path if "one" in expected else photo
    result = run("inference.py", "--image_path", path, "--checkpoint", "absent.pt", *flags)
    assert result.returncode == 1 and expected in result.stderr
    assert "Traceback" not in result.stderr
