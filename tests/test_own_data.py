"""A folder of photos and a table of captions of one's own: conversion, --check, training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import prepare_dataset
from dataset import load_splits
from prepare_dataset import read_table
from tests.conftest import run, small_flags
from utils import UserError


def rows_of(captions: dict[str, list[str]]) -> dict[str, str]:
    """The same captions in each form that is understood, by the file's name."""
    pairs = [(name, text) for name, texts in captions.items() for text in texts]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in pairs]
    lists = [json.dumps({"image_id": name, "captions": texts}) for name, texts in captions.items()]
    table = [f'{name},"{text}"' for name, text in pairs]
    return {
        "metadata.jsonl": "\n".join(lines) + "\n",
        "captions.jsonl": "\r\n".join(lists),
        "captions.csv": "\n".join(["file_name,caption", *table]),
        "captions.txt": "\n".join(table),
    }


@pytest.mark.parametrize("name", rows_of({}))
def test_each_form_of_captions_gives_the_same(tmp_path, name):
    captions = {"a/1.jpg": ["A dog , running .", "Two dogs"], "2.PNG": ["Schnee, überall"]}
    (tmp_path / name).write_text(rows_of(captions)[name], encoding="utf-8")
    assert read_table(tmp_path / name) == captions


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2 names no photo and caption"),
        ('{"image": "1.jpg"}', "line 2 names no photo and caption"),
        ('{"image": 7, "caption": "x"}', "7 is not the name of a photo"),
        ('{"image": "1.jpg", "caption": " "}', "a caption that is no text"),
        ('{"image": "1.jpg", "captions": ["x", 3]}', "a caption that is no text"),
        ('{"image": "../1.jpg", "caption": "x"}', "is not a name within"),
        ("[]", "line 2 names no photo and caption"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, says):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "0.jpg", "caption": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(says)):
        read_table(path)


def check(data: Path, *flags: object) -> int:
    argv = [
        "--dataset",
        "custom",
        "--data_dir",
        data,
        "--split",
        "ratio",
        "--train_split_ratio",
        0.7,
        "--check",
        *flags,
    ]
    return prepare_dataset.main([str(part) for part in argv])


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
