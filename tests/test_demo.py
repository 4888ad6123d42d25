"""The demo: scenes that can be told apart, honest hold-outs, and a parser that is not fooled."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import transformers

import config
import train
from demo.report import wholly_right
from demo.scenes import (
    COLOURS,
    HELD_OUT,
    NUMBERS,
    SHAPES,
    SIDES,
    SIZES,
    Scene,
    Thing,
    build_dataset,
    describe,
    draw,
    for_testing,
    for_training,
    invent,
    matches,
    parse,
)
from demo.settings import DEMO, HERE
from settings import constants
from tests.conftest import run
from utils import UserError


def scenes(count: int, held_out: bool) -> list[Scene]:
    rng = random.Random(7)
    return [invent(rng, for_testing if held_out else for_training) for _ in range(count)]


def held_out(scene: Scene) -> bool:
    if scene.relation is None:
        return False
    kinds = list(HELD_OUT)
    for thing, side in zip(scene.things, (scene.relation, SIDES[scene.relation][0]), strict=True):
        kind = (thing.size, thing.colour, thing.shape)
        if HELD_OUT.get(kind) == thing.count and list(SIDES)[kinds.index(kind) % 4] == side:
            return True
    return False


def test_a_seed_draws_the_same_picture():
    scene = scenes(1, False)[0]
    first, again, other = (draw(scene, random.Random(seed)) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.size == (96, 96) and first.mode == "RGB"


def test_all_five_wordings_of_a_scene_are_right():
    for scene in scenes(200, False) + scenes(200, True):
        captions = describe(scene)
        assert len(set(captions)) == 5
        assert all(matches(caption, scene) and parse(caption) == scene for caption in captions)


def test_one_wrong_word_is_wrong():
    two = Scene((Thing(1, "small", "red", "circle"), Thing(2, "large", "blue", "star")), "left")
    right = "a small red circle is to the left of two large blue stars"
    assert matches(right, two)
    assert matches("two large blue stars are to the right of a small red circle.", two)
    for wrong in (
        right.replace("red", "green"),
        right.replace("circle", "square"),
        right.replace("small", "large"),
        right.replace("two", "three"),
        right.replace("left", "right"),
        right.replace("to the left of", "above"),
        "two large blue stars are to the left of a small red circle",
        "a small red circle",
        right + " and more",
        "",
        "a circle",
    ):
        assert not matches(wrong, two), wrong
    table = {"a": two, "b": two}
    assert wholly_right({"a": right, "b": "a small red circle"}, table) == ["a"]


def test_held_out_combinations_stand_in_test_scenes_only(tmp_path):
    assert build_dataset(tmp_path, train=300, val=40, test=40, seed=3)
    splits = {
        image["filename"]: image["split"]
        for image in json.loads((tmp_path / "dataset_demo.json").read_text())["images"]
    }
    seen: set[str] = set()
    for name, entry in json.loads((tmp_path / "scenes.json").read_text())["scenes"].items():
        scene = Scene.from_dict(entry)
        assert held_out(scene) == (splits[name] == "test"), name
        if splits[name] == "train":
            seen |= {word for t in scene.things for word in (t.size, t.colour, t.shape, t.count)}
    assert seen == {*COLOURS, *SHAPES, *SIZES, *NUMBERS}
    assert len(HELD_OUT) == 18
    before = (tmp_path / "captions.json").stat().st_mtime_ns
    assert not build_dataset(tmp_path, train=300, val=40, test=40, seed=3)
    assert (tmp_path / "captions.json").stat().st_mtime_ns == before
    assert build_dataset(tmp_path, train=30, val=4, test=4, seed=3)


def test_the_encoder_is_small_and_whole():
    folder = HERE / "encoder"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    model, info = transformers.AutoModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == "vit"


def test_the_encoder_can_be_made_anew(tmp_path):
    few = (  # also to measure on, where the script takes a thousand
        "from demo import pretrain_encoder as script; draw = script.draw_scenes\n"
        "script.draw_scenes = lambda count, *how, **more: draw(min(count, 64), *how, **more)\n"
        "script.EPOCHS = 1; script.run_script(script.main)"
    )
    result = run("-c", few, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    kept = transformers.AutoConfig.from_pretrained(HERE / "encoder").to_dict()
    made = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert made["hidden_size"] == kept["hidden_size"] and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", DEMO)
def test_the_demo_sets_only_what_there_is(name):
    assert name in constants(config)


def test_where_the_project_is_only_to_be_read_it_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "demo").touch()
    monkeypatch.setattr("demo.settings.OUTPUT", tmp_path / "demo" / "output")
    with ExitStack() as lock, pytest.raises(UserError, match="copy this project"):
        train.claim_folders(SimpleNamespace(demo=True), lock)
