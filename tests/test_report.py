"""The pictures of a training, read back with Pillow; and the history that they are drawn from."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import report
from attention import fonts_for
from report import beside, dataset_name, draw_curves, draw_samples
from tests.conftest import REPO, paint, run, small_flags, write_photos
from utils import Bar


def entries(count: int, **more: float) -> list[dict]:
    return [
        {
            "epoch": epoch,
            "train_loss": 4 / epoch,
            "val_loss": 5 / epoch,
            "val_cider": 9.0 * epoch,
            "train_learning_rate": 1e-3 / epoch,
            "samples": {"a.png": f"text {epoch}"},
        }
        | more
        for epoch in range(1, count + 1)
    ]


def pixels(path: Path) -> np.ndarray:
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((abs(picture - np.array(colour)).sum(-1) < 12).sum() > 20)


def test_each_curve_is_there_only_if_it_was_measured(tmp_path):
    orange = (221, 107, 32)
    draw_curves(entries(3), tmp_path / "plain.png")
    plain = pixels(tmp_path / "plain.png")
    assert has_colour(plain, orange)
    draw_curves(entries(3, val_accuracy=50.0), tmp_path / "answers.png")
    assert pixels(tmp_path / "answers.png").shape[1] > plain.shape[1]  # a panel more
    draw_curves(
        [
            {
                "epoch": 1,
                "val_loss": 2.0,
                "train_learning_rate": 1e-3,
                "train_beam_cider": 3.0,
                "samples": {},
            }
        ],
        tmp_path / "one.png",
    )
    assert not has_colour(pixels(tmp_path / "one.png"), orange)


def test_samples_show_the_photos_and_three_epochs(tmp_path, monkeypatch):
    paint("red", "left", 0).save(tmp_path / "a.png")
    written = []
    from matplotlib.axes import Axes

    text = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, *a, **k: written.append(s) or text(self, x, y, s, **k)
    )
    draw_samples(entries(9), tmp_path, tmp_path / "s.png", {"a.png": ["costs $5 or \x08", "other"]})
    assert written == [
        "epoch 1",
        "text 1",
        "epoch 5",
        "text 5",
        "epoch 9",
        "text 9",
        "a human",
        "costs $5 or \\x08",
    ]
    assert has_colour(pixels(tmp_path / "s.png"), (220, 30, 30))


def test_samples_leave_out_epochs_that_wrote_about_other_photos(tmp_path, monkeypatch):
    paint("red", "left", 0).save(tmp_path / "a.png")
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    other = [entry | {"samples": {"gone.png": "x"}} for entry in entries(4)]
    draw_samples([*other, *entries(6)[4:]], tmp_path, tmp_path / "s.png", {})
    assert [text.get_text() for text in drawn[0].axes[1].texts] == [
        *("epoch 5", "text 5", "epoch 6", "text 6")
    ]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("letters", ["a word ", "W" * 80, "\u4e00"])
def test_long_captions_leave_photos_and_other_rows_room(tmp_path, monkeypatch, letters):
    paint("red", "left", 0).save(tmp_path / "a.png")
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    history = [{"epoch": n, "samples": {"a.png": letters * 60}} for n in (1, 2, 3)]
    draw_samples(history, tmp_path, tmp_path / "s.png", {"a.png": [letters * 60]})
    drawn[0].draw_without_rendering()
    picture, text = drawn[0].axes
    assert picture.get_position().width > 0.2
    boxes = [each.get_window_extent() for each in text.texts]
    rows = list(zip(boxes[::2], boxes[1::2], strict=True))  # a label and its words
    assert all(label.x1 < words.x0 for label, words in rows)
    assert all(above.y0 > below.y1 for (_, above), (_, below) in itertools.pairwise(rows))
    lines = text.texts[1].get_text().splitlines()
    assert all(len(line) <= 32 for line in lines) or letters != "\u4e00"


def test_epochs_are_whole_numbers_even_of_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    draw_curves(entries(1), tmp_path / "one.png")
    assert all(set(axes.get_xticks()) <= {0, 1, 2} for axes in drawn[0].axes)
    draw_curves(entries(3), tmp_path / "three.png")
    assert [text.get_text() for text in drawn[1].axes[1].texts] == ["27.0"]  # the best score


def test_what_is_said_is_in_a_log_at_once(monkeypatch):
    log = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(log))
    report.say("epoch 1")
    assert log.getvalue() == b"epoch 1\n"
    monkeypatch.setattr(Bar, "PAUSE", -1.0)
    with Bar(2, "features", "photo") as bar:
        bar.step(1)
        assert b"features  50%" in log.getvalue()


def test_letters_are_drawn_by_a_font_that_has_them_or_it_is_said(tmp_path, capsys, recwarn):
    assert [font.family_name for font in fonts_for("A dog, un été, собака, كلب")] == ["DejaVu Sans"]
    assert len(fonts_for("a \u1d8a")) == 2  # which DejaVu lacks
    assert capsys.readouterr().out == ""
    paint("red", "left", 0).save(tmp_path / "a.png")
    draw_samples(entries(1), tmp_path, tmp_path / "s.png", {"a.png": ["\U0001fae8 \U00016fe1"]})
    assert "no font here draws" in capsys.readouterr().out and not list(recwarn)


def test_one_epoch_and_no_samples(tmp_path):
    paint("red", "left", 0).save(tmp_path / "a.png")
    draw_samples(entries(1), tmp_path, tmp_path / "s.png", {})
    assert pixels(tmp_path / "s.png").min() < 100
    draw_samples([{"epoch": 1, "samples": {}}], tmp_path, tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("shards", "name"),
    {
        "sets/cc3m/{00000..00331}.tar": "cc3m",
        "{00000..00331}.tar": "mine",
        "pipe:curl -s -H 'key: 1' https://a.b/cc3m/{0..9}.tar": "mine",  # a command is a secret
        "https://huggingface.co/datasets/x/cc3m-wds/resolve/main/cc3m-{0..9}.tar": "cc3m-wds",
    }.items(),
)
def test_what_tars_are_called(shards, name):
    assert dataset_name(SimpleNamespace(TRAIN_SHARDS=shards, DATA_DIR="x/mine")) == name


def test_a_card_says_which_tars_were_scored():
    """And not that the scores were measured on the photos that it was trained on."""
    settings = SimpleNamespace(DATASET="flickr8k", TRAIN_SHARDS="cc3m/{0..9}.tar", VAL_SHARDS=None)
    assert dataset_name(settings) == "cc3m"
    assert dataset_name(settings, "VAL_SHARDS") == "flickr8k"
    settings.VAL_SHARDS = "/data/own/7.tar"
    assert dataset_name(settings, "VAL_SHARDS") == "own"


@pytest.mark.parametrize("name", ["training_curves.png", "samples.png"])
def test_a_picture_that_can_not_be_written_spoils_nothing(tmp_path, encoder_dir, name):
    data = write_photos(tmp_path / "data", 24)
    (data / name).mkdir()
    result = run("train.py", *small_flags(data, encoder_dir), "--epochs", 1, pictures=True)
    assert result.returncode == 0 and "pictures can't be drawn" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("settings", "drawn"), [(b"text.usetex: True\n", True), (b"font.family: caf\xe9\n", False)]
)
def test_what_its_user_has_set_for_matplotlib_spoils_nothing(
    tmp_path, encoder_dir, settings, drawn
):
    (tmp_path / "matplotlibrc").write_bytes(settings)
    data = write_photos(tmp_path / "data", 24)
    flags = [*small_flags(data, encoder_dir), "--epochs", 1]
    result = run("train.py", *flags, pictures=True, MATPLOTLIBRC=str(tmp_path))
    assert result.returncode == 0 and "best val loss" in result.stdout, result.stderr
    assert (data / "samples.png").exists() == drawn
    assert ("pictures can't be drawn" in result.stdout) != drawn


def test_a_command_names_a_script_that_is_found_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    assert beside("train.py") == "train.py"
    monkeypatch.chdir(tmp_path)
    assert Path(beside("train.py")) == REPO / "train.py"


def test_the_best_answers_are_not_named_as_the_best_captions(joint, encoder_dir, tmp_path):
    for name in ("last.pt", "captioner_best_accuracy.safetensors"):  # and no best captions
        shutil.copy(joint / name, tmp_path)
    more = "--tasks captions,questions --epochs 30 --scst_epochs 2 --dropout 0".split()
    more += ["--output_dir", tmp_path, "--resume_checkpoint_path", tmp_path / "last.pt"]
    result = run("train.py", *small_flags(joint, encoder_dir), *more)
    assert result.returncode == 0 and "nothing to train" in result.stdout, result.stderr
    assert f"% right: {tmp_path / 'captioner_best_accuracy.safetensors'}" in result.stdout
    assert "best CIDEr" not in result.stdout


def test_the_command_in_the_end_is_about_a_photo_that_was_read(trained, encoder_dir, tmp_path):
    data = shutil.copytree(trained, tmp_path / "data")
    for name in json.loads((data / "splits.json").read_text())["test"]:
        (data / "images" / name).write_bytes(b"no photo")
    resume = ["--resume_checkpoint_path", data / "last.pt"]
    result = run("train.py", *small_flags(data, encoder_dir), *resume)
    assert result.returncode == 0 and "nothing to train" in result.stdout, result.stderr
    *_, command = result.stdout.strip().splitlines()
    caption = run(*shlex.split(command)[1:], "--encoder", encoder_dir)
    assert caption.returncode == 0 and caption.stdout, caption.stderr
