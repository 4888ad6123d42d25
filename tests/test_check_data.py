"""What --check says of a data set, and a training on what it found sound."""

from __future__ import annotations

import json
import random
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from check_data import look_alike
from dataset import load_splits
from tests.conftest import run, small_flags
from tests.data_sets import IDS, check, lay_out, prepared, rows_of
from utils import UserError


@pytest.mark.parametrize(
    ("text", "kept", "says"),
    [
        ('{"1.jpg": ["half \\ud83d", "fine"], "2.jpg": ["x"]}', 3, "mended: 1 captions"),
        ('{"1.jpg": ["A &amp; B", "fine"], "2.jpg": ["x"]}', 3, "mended: 1 captions"),
        ('{"1.jpg": ["A &amp;amp; B", "fine"], "2.jpg": ["x"]}', 3, "mended: 1 captions"),
        (
            '{"1.jpg": ["<p class=x>A 2<3</p> &lt;br/&gt;B", "fine"], "2.jpg": ["x"]}',
            3,
            "mended: 1",
        ),
        ('{"1.jpg": ["...", "fine"], "2.jpg": ["x"]}', 2, "'...' of '1.jpg' has no word"),
        ('{"1.jpg": ["fine"], "2.jpg": ["x"], "\\udcff.jpg": ["y"]}', 2, "can't be the name"),
        ('{"1.jpg": ["fine"], "2.jpg": ["x"], "a\\u0000.jpg": ["y"]}', 2, "can't be the name"),
    ],
)
def test_what_cant_be_learned_from_is_told(tmp_path, text, kept, says, capsys):
    folder = lay_out(tmp_path, {"captions.json": text})
    found = prepared(folder)
    assert sum(map(len, found.values())) == kept and "&amp;" not in str(found)
    assert "<p" not in str(found) and ("2<3" not in text or found["1.jpg"][0] == "A 2<3 B")
    assert says in capsys.readouterr().out
    assert (folder / "captions.json").read_text() == text


def test_check_describes_a_sound_data_set(photos, capsys):
    assert check(photos) == 0
    said = capsys.readouterr().out
    assert "photos    24 in" in said and "captions  48 in" in said
    assert "a photo   2 to 2 captions, 2.0 mean" in said
    assert "a caption 6 to 10 words, 8.0 mean, 12 different ones" in said
    assert "missing   0 photos" in said and "broken    0 photos" in said and "copies    0" in said
    assert "too long  0 captions, beyond MAX_CAPTION_LENGTH = 100" in said
    assert check(photos, "--max_caption_length", 8) == 0
    assert int(re.search(r"too long  (\d+)", capsys.readouterr().out)[1]) >= 24


def test_check_says_where_words_are_not_apart(tmp_path, capsys):
    texts = {"1.jpg": ["红色的狗在草地上奔跑"], "2.jpg": ["犬が走っている"], "3.jpg": ["a dog"]}
    prepared(lay_out(tmp_path, {"captions.json": json.dumps(texts)}))
    assert "words     these captions have no spaces between words" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [1, 4])
def test_check_says_where_frames_of_a_scene_are_in_several_splits(tmp_path, capsys, frames):
    (tmp_path / "images").mkdir()
    captions = {}
    for number in range(24):
        dice = random.Random(number // frames)
        colours = Image.frombytes("RGB", (8, 8), dice.randbytes(192)).resize((80, 80))
        name = f"scene_{number:02d}.png"
        colours.crop((number % frames, 0, 76 + number % frames, 76)).save(
            tmp_path / "images" / name
        )
        captions[name] = [f"a scene {number}" if number % 2 else "A scene."]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    assert ("photos to validate or test on look like one to train on" in said) == (frames > 1)
    assert "same      12 captions are 'a scene'" in said


def test_many_photos_are_compared_without_much_memory():
    pictures = np.random.default_rng(0).normal(size=(3000, 192)).astype(np.float32)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    small = {f"{number}.jpg": picture for number, picture in enumerate(pictures)}
    train = {f"train/{name}": picture for name, picture in small.items()}
    tracemalloc.start()
    pairs = look_alike(train, small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pairs == [(name, f"train/{name}") for name in small] and peak < 10e6  # all at once: 36e6


def test_check_describes_questions(tmp_path, capsys):
    asked = [
        {"question": "?", "answer": a, "type": t}
        for a, t in [("4", "a"), ("Yes.", "b"), ("yes", "b"), ("no", "b")]
    ]
    text = json.dumps({"1.jpg": asked[:1], "2.jpg": asked[1:]})
    assert check(lay_out(tmp_path, {"questions.json": text}), "--tasks", "questions") == 0
    said = capsys.readouterr().out
    assert "a photo   1 to 3 questions, 2.0 mean" in said
    assert "answers   4, 3 different ones: 'yes' 50 %" in said
    assert "answers   3 of type 'b', 2 different ones: 'yes' 67 %, 'no' 33 %" in said


def test_check_names_what_is_wrong(photos, capsys):
    assert check(photos) == 0
    splits = load_splits(photos / "splits.json")
    images = photos / "images"
    (images / splits["train"][0]).write_bytes(b"<html>")
    (images / splits["train"][1]).unlink()
    shutil.copy(images / splits["train"][2], images / splits["val"][0])
    shutil.copy(images / splits["train"][3], images / splits["train"][4])
    capsys.readouterr()
    assert check(photos) == 0  # within MAX_BAD_IMAGES
    said = capsys.readouterr().out
    assert splits["train"][1] in said and "missing   1 photos" in said
    broken = rf"broken    1 photos can't be read\n  .*{splits['train'][0]} is not a readable"
    assert re.search(broken, said)
    assert "copies    1 photos" in said
    assert f"{splits['train'][2]} (train)" in said and f"{splits['val'][0]} (val)" in said
    assert splits["train"][4] not in said
    with pytest.raises(UserError, match=r"1 photos are missing.*1 photos can't be read"):
        check(photos, "--max_bad_images", 0)
    (images / splits["train"][0]).write_bytes((images / splits["train"][2]).read_bytes())
    with pytest.raises(UserError, match="1 photos are missing, more than MAX_BAD_IMAGES = 0$"):
        check(photos, "--max_bad_images", 0)


def test_check_ends_with_code_1_and_a_message(photos):
    (photos / "images" / "000.png").unlink()
    flags = [
        "--dataset",
        "custom",
        "--data_dir",
        photos,
        "--split",
        "ratio",
        "--check",
        "--train_split_ratio",
        "0.7",
    ]
    result = run("prepare_dataset.py", *flags, "--max_bad_images", "0")
    assert result.returncode == 1 and "training would refuse" in result.stderr
    assert "Traceback" not in result.stderr
    (photos / "captions.json").write_text('{"000.png": []}')
    result = run("prepare_dataset.py", *flags)
    assert result.returncode == 1 and "'000.png' needs a list" in result.stderr


def test_from_json_lines_to_a_training(photos, encoder_dir):
    captions = json.loads((photos / "captions.json").read_text())
    (photos / "captions.json").unlink()
    (photos / "captions.jsonl").write_text(rows_of(captions)["captions.jsonl"])
    result = run("train.py", *small_flags(photos, encoder_dir), "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert json.loads((photos / "captions.json").read_text()) == captions
    assert re.search(r"features  [\d.]+ kB in \S+features/", result.stdout)


def test_check_names_what_is_not_used(tmp_path, capsys):
    files = {"captions.json": '{"1.jpg": ["A"], "2.jpg": ["B"]}', "images/4.HEIC": "x"}
    folder = lay_out(tmp_path, files)
    assert check(folder) == 0
    said = capsys.readouterr().out
    assert "1 photos, of which nothing is said, first ['3.jpg']" in said
    assert "isn't read: make them JPEGs, first ['4.HEIC']" in said
    for name in IDS:
        (folder / "images" / name).write_bytes(b"no photo")
    with pytest.raises(UserError, match="no photo of the split 'val' can be read"):
        check(folder)
