"""Captions of folders: to the terminal, into files, interrupted and gone on with; from Python."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import inference
from encoder import ImageError
from inference import load_captioner
from sidecar import Photo, Table, TextFiles
from tests.conftest import REPO, paint, run
from tests.forked import Forked
from utils import Bar, UserError, files_in

NAMES = ["a.jpg", "b.PNG", "sub/c.jfif", "sub/deep/d.webp"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photos of several kinds in nested folders, with what is no photo between them."""
    root = tmp_path / "photos"
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"jfif": "jpeg"}.get(name.split(".")[1].lower())
        paint("red", "left", i).save(root / name, kind)
    (root / "notes.txt").write_text("mine")
    (root / "._a.jpg").write_bytes(b"\0\5\26\7")  # what a Mac leaves beside a photo
    (root / "@eaDir").mkdir()  # a Synology disk's previews
    paint("red", "left", 0).save(root / "@eaDir" / "SYNOPHOTO_THUMB_M.jpg")
    return root


@pytest.fixture
def caption(trained):
    """Run inference.py with a checkpoint."""
    checkpoint = trained / "captioner_best_cider.safetensors"
    return lambda *args, **env: run("inference.py", *args, "--checkpoint", checkpoint, **env)


def test_a_folder_is_told_line_by_line_with_its_sub_folders(folder, caption):
    result = caption(folder, "--json")
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    table = json.loads(last)
    assert list(table) == NAMES
    assert lines == [f"{name}: {text}" for name, text in table.items()]
    assert "passed over, as no photos: 1 .txt\n" in result.stderr
    (folder / "e.HEIC").write_bytes(b"x")
    flat = caption(folder, "--no-recursive", "--json")
    assert list(json.loads(flat.stdout.splitlines()[-1])) == NAMES[:2]
    assert "1 .heic, 1 .txt; make JPEGs of the pictures\n" in flat.stderr


def test_a_photo_of_90_megapixels_is_captioned_without_a_warning(tmp_path, caption):
    Image.new("L", (9500, 9500)).save(tmp_path / "a.jpg")
    result = caption(tmp_path / "a.jpg")
    assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr


def test_progress_is_not_told_among_the_captions(folder, trained, monkeypatch, capsys):
    monkeypatch.setattr(Bar, "PAUSE", -1.0)
    checkpoint = trained / "captioner_best_cider.safetensors"
    inference.main([str(folder), "--checkpoint", str(checkpoint), "--batch_size", "2"])
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == NAMES
    assert err.count("photos ") == 2 and "min left" in err


def test_one_photo_has_its_caption_alone_and_several_have_names(folder, caption):
    one = caption(folder / "a.jpg")
    assert one.returncode == 0 and ":" not in one.stdout and len(one.stdout.splitlines()) == 1
    both = caption(folder / "a.jpg", folder / "sub", "--batch_size", 1)
    assert [line.split(": ")[0] for line in both.stdout.splitlines()] == [
        str(folder / name) for name in ("a.jpg", "sub/c.jfif", "sub/deep/d.webp")
    ]


def test_text_files_stand_beside_the_photos(folder, caption):
    texts = [(folder / name).with_suffix(".txt") for name in NAMES]
    texts[0].write_text("mine\n")
    texts[1].touch()  # as other programs leave it for a photo that has no caption yet
    result = caption(folder, "--write", "txt", "--prefix", "sks, ", "--suffix", ".")
    assert result.returncode == 0, result.stderr
    assert texts[0].read_text() == "mine\n"
    assert all(
        t.read_text().startswith("sks, ") and t.read_text().endswith(".\n") for t in texts[1:]
    )
    assert caption(folder, "--write", "txt", "--existing", "error").returncode == 1
    assert caption(folder, "--write", "txt", "--existing", "append").returncode == 0
    assert len(texts[0].read_text().splitlines()) == 2
    assert caption(folder, "--write", "txt", "--existing", "overwrite").returncode == 0
    assert len(texts[0].read_text().splitlines()) == 1 and "mine" not in texts[0].read_text()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_name_each_photo_once(folder, caption, kind, tmp_path):
    result = caption(folder, "--write", kind, "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    file = folder / {"jsonl": "metadata.jsonl", "csv": "captions.csv"}[kind]

    def rows() -> list[dict]:
        text = file.read_text().splitlines()
        return (
            [json.loads(line) for line in text] if kind == "jsonl" else list(csv.DictReader(text))
        )

    assert {row["file_name"]: row["text"] for row in rows()} == said
    assert caption(folder, "--write", kind).returncode == 0 and len(rows()) == 4
    assert caption(folder, "--write", kind, "--existing", "append").returncode == 0
    assert len(rows()) == 8
    assert caption(folder, "--write", kind, "--existing", "overwrite").returncode == 0
    assert len(rows()) == 4
    refused = caption(folder, "--write", kind, "--existing", "error")
    assert refused.returncode == 1 and "--existing" in refused.stderr
    named = caption(folder, "--write", kind, "--output", tmp_path / "x.txt")
    assert named.returncode == 1 and "must end in" in named.stderr


def test_text_files_hold_all_texts_and_stay_where_they_are_sent(folder, caption, tmp_path):
    paint("red", "left", 9).save(folder / "a.png")  # a namesake, in a batch of its own
    (folder / "b.txt").write_bytes(b"caf\xe9\r\n")
    (folder / "sub" / "c.txt").write_bytes(b"")
    kind = "--write", "txt", "--existing"
    best = "--batch_size", 1, "--n_best", 2, "--beam_size", 3
    assert caption(folder, *kind, "append", *best).returncode == 0
    a, b, c = (folder / name for name in ("a.jpg.txt", "b.txt", "sub/c.txt"))
    assert (
        not (folder / "a.txt").exists()
        and len(a.read_text().splitlines()) == 2
        and len(c.read_text().splitlines()) == 2
    )
    assert len((folder / "a.png.txt").read_text().splitlines()) == 2
    (folder / "a.png.txt").unlink()  # as in a run that was killed between the two
    again = caption(folder, *kind, "skip")
    assert again.returncode == 0 and len((folder / "a.png.txt").read_text().splitlines()) == 1
    assert b.read_text("utf-8").startswith("café\na ") and b.read_bytes().count(b"\n") == 3
    before = sorted(folder.rglob("*"))
    out = tmp_path / "out"
    result = caption(folder / "b.PNG", folder / "sub", *kind, "overwrite", "--output", out)
    assert result.returncode == 0, result.stderr
    assert sorted(folder.rglob("*")) == before
    assert len([*out.rglob("b.txt")]) == 1 and len([*out.rglob("*.txt")]) == 3
    result = caption(folder, *kind, "skip", "--output", folder / "a.jpg")
    assert result.returncode == 1 and "choose another folder" in result.stderr


def test_a_namesake_that_comes_later_is_captioned_too(folder, caption):
    assert caption(folder, "--write", "txt").returncode == 0
    paint("blue", "right", 9).save(folder / "a.png")
    assert "3 of 5 are written" in caption(folder, "--write", "txt").stderr
    assert (folder / "a.png.txt").exists() and (folder / "a.jpg.txt").exists()


def test_photos_given_one_by_one_take_no_text_of_anothers(folder, caption):
    paint("blue", "right", 9).save(folder / "a.png")
    for name in ("a.jpg", "a.png"):
        result = caption(folder / name, "--write", "txt")
        assert result.stdout and (folder / f"{name}.txt").read_text() == result.stdout
    (folder / "a.txt").write_text("whose?\n")
    result = caption(folder, "--write", "txt")
    assert "1 texts may be of any of several photos" in result.stderr and "a.txt: " in result.stderr
    for place in (folder, folder / "sub"):  # one folder after the other, into one place
        paint("blue", "left", 7).save(place / "e.png")
        result = caption(place / "e.png", "--write", "csv", "--output", folder / "all.csv")
    assert "1 of 1" in result.stderr and "all.csv, by their names in their folder" in result.stderr


def test_people_s_own_texts_are_added_to_in_any_encoding(folder, caption):
    (folder / "a.txt").write_bytes("schön\r\n".encode("utf-16"))
    (folder / "b.txt").write_bytes("schön".encode("cp1252"))
    (folder / "sub/c.txt").write_bytes(b"\n")  # emptied by hand
    assert caption(folder, "--write", "txt", "--existing", "append").returncode == 0
    for name in ("a.txt", "b.txt"):
        assert (folder / name).read_text("utf-8").startswith("schön\n")
    (folder / "sub/c.txt").write_bytes(b"\n")
    assert "3 of 4 are written" in caption(folder, "--write", "txt").stderr
    foreign = "一只狗在草地上奔跑".encode("gb18030")
    (folder / "b.txt").write_bytes(foreign)
    result = caption(folder, "--write", "txt", "--existing", "append")
    assert "b.txt is not UTF-8" in result.stderr and result.stdout == ""
    assert (folder / "b.txt").read_bytes() == foreign


@pytest.mark.fault
def test_a_table_on_a_disk_that_knows_no_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    photo = Photo(tmp_path / "a.jpg", "a.jpg")
    with contextlib.ExitStack() as files:
        Table(tmp_path / "x.jsonl", "skip", False, files).write([(photo, "", "a dog")])
    assert json.loads((tmp_path / "x.jsonl").read_text())["text"] == "a dog"


def test_a_table_takes_any_sign_on_any_python(tmp_path):
    photo = Photo(tmp_path / "a.jpg", "a.jpg")
    with contextlib.ExitStack() as files:
        Table(tmp_path / "x.csv", "skip", False, files).write([(photo, "", "a\0dog\7")])
    assert (tmp_path / "x.csv").read_text().splitlines()[1] == "a.jpg,a\ufffddog\7"
    photo = Photo(tmp_path / "b\r.jpg", "b\r.jpg")  # from a list with Windows' line ends
    with contextlib.ExitStack() as files:
        Table(tmp_path / "y.csv", "skip", True, files).write([(photo, "a dog?\r", "yes")])
    with contextlib.ExitStack() as files:
        assert not Table(tmp_path / "y.csv", "skip", True, files).wanted(photo, "a dog?\r")


def test_a_text_s_place_is_checked_before_the_work(tmp_path):
    (tmp_path / "a.txt").mkdir()
    photo = Photo(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(UserError, match="a.txt is no file"):
        TextFiles(None, "skip", [photo], []).wanted(photo, "")


def test_a_text_that_came_meanwhile_is_kept(tmp_path):
    """As what people write by hand beside the next photos, while a folder is captioned."""
    photo = Photo(tmp_path / "a.jpg", "a.jpg")
    writer = TextFiles(None, "skip", [photo], [])
    assert writer.wanted(photo, "")
    (tmp_path / "a.txt").write_text("by hand")
    writer.write([(photo, "", "a dog")])
    assert (tmp_path / "a.txt").read_text() == "by hand"


@pytest.mark.fault
def test_texts_beside_photos_that_nobody_may_write_beside(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    photo = Photo(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(UserError, match="name another folder with --output"):
        TextFiles(None, "skip", [photo], []).write([(photo, "", "a dog")])


def test_few_photos_are_held_decoded(trained, folder, monkeypatch):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors")
    opened, held, read = [], [], captioner._open

    def counted(path):
        image = read(path)
        opened.append(weakref.ref(image))
        held.append(sum(ref() is not None for ref in opened))
        return image

    monkeypatch.setattr(captioner, "_open", counted)
    captioner.caption([folder / name for name in NAMES] * 10)
    assert len(held) == 40 and max(held) <= 4  # on two threads, each with its last one


def test_a_photo_that_is_named_twice_is_captioned_once(folder, caption):
    (folder / "linked").symlink_to(folder / "sub")
    result = caption(folder / "sub" / "c.jfif", folder, folder, "--json")
    assert len(json.loads(result.stdout.splitlines()[-1])) == len(NAMES)
    assert len(result.stdout.splitlines()) == len(NAMES) + 1
    assert "2 links to folders" in result.stderr


ROW, CELLS = '{"file_name": "a.jpg", "text": "mine"}\n', "file_name,text\na.jpg,mine\n"


@pytest.mark.parametrize(
    ("kind", "there", "says"),
    [
        ("jsonl", ROW, "1 of 4 are written"),
        ("jsonl", ROW.strip(), "1 of 4 are written"),  # as an editor leaves it
        ("jsonl", "\ufeff" + ROW.replace("}", ', "question": null}'), "1 of 4 are written"),
        ("jsonl", ROW.replace("mine", "\u2028\x85"), "1 of 4 are written"),
        ("jsonl", ROW.replace("file_name", "image"), "holds other rows"),
        ("jsonl", ROW.replace("text", "answer"), "holds other rows"),
        ("jsonl", '{"file_name": ' + "[" * 100_000 + "\n", "holds other rows"),
        ("csv", "\ufeff" + CELLS.replace("\n", "\r\n"), "1 of 4 are written"),  # as Excel does
        ("csv", CELLS.strip(), "has no end, and is dropped: a.jpg,mine"),
        ("csv", CELLS.strip().replace("\n", "\r\n"), "1 of 4 are written"),  # as Google Sheets
        ("csv", CELLS.replace("text", "question,answer"), "holds other rows"),
        ("csv", "text,file_name\nmine,a.jpg\n", "holds other rows"),
        ("csv", CELLS.replace("mine", '"mi'), "holds other rows"),
    ],
)
def test_what_a_table_holds_already_is_kept_or_said(folder, caption, kind, there, says):
    file = folder / {"jsonl": "metadata.jsonl", "csv": "captions.csv"}[kind]
    file.write_bytes(there.encode())
    wrong = caption(folder, "--write", kind, "--existing", "overwrite", "--max_length", 10_000)
    assert wrong.returncode == 1 and file.read_bytes() == there.encode()
    again = caption(folder, "--write", kind, "--existing", "error")
    assert again.returncode == 1 and "is there" in again.stderr
    result = caption(folder, "--write", kind)
    assert says in result.stderr, result.stderr
    if "other" in says:
        assert result.returncode == 1 and file.read_bytes() == there.encode()
        return
    assert file.read_text().startswith(there.replace("\r", "") if "1 of" in says else CELLS[:15])
    names = file.read_text().count(".jfif"), file.read_text().count("a.jpg")
    assert result.returncode == 0 and names == (1, 1)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_goes_on_whatever_the_names(tmp_path, caption, kind):
    photo = tmp_path / "a.png"
    paint("red", "left", 1).save(photo)
    for name in (b"caf\xe9.png", "a\u2028\x9b\x7fb.png".encode(), b"two\nlines.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).symlink_to(photo)
    first = caption(tmp_path, "--write", kind)
    assert first.returncode == 0 and len(first.stdout.splitlines()) == 4, first.stderr
    assert "4 of 4 are written" in caption(tmp_path, "--write", kind).stderr
    told = caption(tmp_path, "--json").stdout
    assert "a\u2028\x9b\x7fb.png" in json.loads(told.splitlines()[-1]) and "\x7f" not in told
    alone = caption(photo, "--write", kind)  # its table stands beside it
    assert "1 of 1 are written" in alone.stderr and alone.stdout == ""


@pytest.mark.fault(count=2)
def test_a_killed_run_goes_on_with_nothing_twice_and_nothing_missing(tmp_path, trained):
    folder = tmp_path / "many"
    for i in range(60):
        place = folder / f"part{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        paint("blue", "right", i).save(place / f"{i:02d}.png")
    (folder / "part1" / "bad.jpg").write_bytes(b"no photo")
    checkpoint = trained / "captioner_best_cider.safetensors"
    command = ["inference.py", folder, "--write", "jsonl", "--batch_size", 4]
    command += ["--checkpoint", checkpoint]
    with Forked(*command) as process:
        seen = [process.stdout.readline() for _ in range(14)]
        process.kill()
        assert process.wait() == -signal.SIGKILL
    file = folder / "metadata.jsonl"
    assert len(file.read_text().splitlines()) >= len(seen) - 4  # at most a batch is lost
    with open(file, "a") as torn:
        torn.write('{"file_name": "part0/00.png", "te')  # as a kill in mid-write leaves it
    result = run(*command)
    assert result.returncode == 1 and "1 of 61 photos can't be read" in result.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    counts = Counter(row["file_name"] for row in rows)
    assert set(counts) == {f"part{i % 3}/{i:02d}.png" for i in range(60)}
    assert set(counts.values()) == {1}


def test_many_photos_that_cannot_be_read_are_named_once_and_some_at_the_end(folder, caption):
    for i in range(12):
        (folder / f"z{i:02d}.jpg").write_bytes(b"no photo")
    result = caption(folder, "--write", "jsonl")
    lines = result.stderr.splitlines()
    assert sum(line.startswith("can't be read: ") for line in lines) == 12
    assert "12 of 16 photos can't be read:" in lines[-12]
    assert "z09.jpg" in lines[-2] and lines[-1] == "  and 2 more, as said above"


def test_what_is_written_already_is_said_and_so_is_how_to_write_it_anew(folder, caption):
    assert caption(folder, "--write", "jsonl").returncode == 0
    again = caption(folder, "--write", "jsonl").stderr
    assert "4 of 4 are written already: --existing overwrite writes them anew" in again
    (folder / "a.jpg").rename(folder / "new.jpg")
    assert "3 of 4 are written already\n" in caption(folder, "--write", "jsonl").stderr


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_photo_that_changed_since_it_was_written_about_is_said(folder, caption, form):
    os.utime(folder / "b.PNG", (time.time() + 9999,) * 2)  # its camera's clock is fast
    caption(folder, "--write", form)
    os.utime(folder / "a.jpg", (time.time() + 60,) * 2)
    shutil.copy(folder / "a.jpg", folder / "new.jpg")
    said = caption(folder, "--write", form).stderr
    assert "4 of 5 are written already, but 1 of these photos are newer than that" in said
    assert "such as a.jpg: --existing overwrite writes them anew" in said


def test_a_folder_that_cannot_be_read_is_said_to_be_passed_over(tmp_path, capsys):
    assert [*files_in(tmp_path / "locked", True, Counter())] == []  # root may read any
    assert f"passed over: {tmp_path}/locked can't be read (No such file" in capsys.readouterr().err


def test_what_cannot_be_done_is_said_before_the_models_load(folder, caption):
    for args, message in (
        (["https://example.org/a.jpg"], "/a.jpg, an address: give a file"),
        ([folder, "--attention", "x.png"], "--attention draws one photo"),
        ([folder / "a.jpg", "--attention", "x.png", "--n_best", 2], "--attention draws one photo"),
        ([folder / "a.jpg", "--attention", folder / "a.jpg"], "is what is read"),
        ([folder, ""], "PHOTO is empty"),
        ([folder / "none"], "there is no such picture"),
        ([folder / "a.jpg", "--write", "txt", "--question", "why?"], "--write txt is for captions"),
    ):
        result = caption(*args)
        assert result.returncode == 1 and message in result.stderr, result.stderr
    both = [folder, "--question", "why?", "--questions_file", "q.json"]
    for args in ([], [folder, "--output", "x.csv"], both):
        assert caption(*args).returncode == 2


def test_several_answers_and_answers_in_a_table(joint, tmp_path):
    command = ["inference.py", "--checkpoint", joint / "captioner_best_accuracy.safetensors"]
    photo = joint / "images" / "000.png"
    asked = run(
        *command, photo, "--question", "what color is the square?", "--n_best", 2, "--beam_size", 3
    )
    assert asked.returncode == 0 and len(asked.stdout.splitlines()) == 2, asked.stderr
    told = run(*command, photo, "--question", "why?", "--n_best", 2, "--beam_size", 3, "--json")
    assert len(json.loads(told.stdout.splitlines()[-1])["000.png"][0]["answer"]) == 2
    table = tmp_path / "answers.csv"
    many = run(
        *command,
        joint / "images",
        "--questions_file",
        joint / "questions.json",
        "--write",
        "csv",
        "--output",
        table,
    )
    assert many.returncode == 0, many.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 96 and set(rows[0]) == {"file_name", "question", "answer"}
    asked = tmp_path / "q.jsonl"
    asked.write_text('{"image": "000.png", "question": "why?"}\n')
    flags = ["--questions_file", asked, "--write", "jsonl", "--existing", "overwrite", "--output"]
    over = run(*command, joint / "images", *flags, asked)
    assert over.returncode == 1 and "is what is read" in over.stderr
    assert "why?" in asked.read_text()


def test_from_python(trained, folder):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors", precision="fp32")
    paths = [folder / name for name in NAMES]
    single = [captioner.caption(path) for path in paths]
    assert single == captioner.caption(paths) == captioner.caption([str(path) for path in paths])
    assert captioner.caption([Image.open(path) for path in paths]) == single
    assert captioner.caption([]) == []
    assert captioner.caption(paths * 10) == single * 10
    (folder / "bad.jpg").write_bytes(b"")
    streamed = list(captioner.stream([paths[0], folder / "bad.jpg", paths[1]], batch_size=2))
    assert [each.texts[:1] for each in streamed] == [[single[0]], [], [single[1]]]
    assert "bad.jpg" in streamed[1].problem
    with pytest.raises(ImageError, match="bad.jpg"):
        captioner.caption(folder / "bad.jpg")
    with pytest.raises(UserError, match="not trained for questions"):
        captioner.answer(paths[0], "why?")
    for wrong in (np.zeros((8, 8, 3)), [np.zeros((8, 8, 3))] * 2, [None], None, 3, b"\xff\xd8"):
        with pytest.raises(TypeError, match="a picture is a file or a Pillow image, not"):
            captioner.caption(wrong)
    with pytest.raises(ImageError, match="https://example.org/a.jpg is an address: download"):
        captioner.caption("https://example.org/a.jpg")
    with pytest.raises(ImageError, match="no pixels"):
        captioner.caption(Image.new("RGB", (0, 5)))
    with pytest.raises(UserError, match="batch_size is 0"):
        captioner.caption(paths, batch_size=0)
    with open(paths[0], "rb") as file:
        assert captioner.caption(file) == single[0]
    assert [each.texts[0] for each in captioner.stream(str(paths[0]))] == single[:1]
    assert captioner.explain(paths[0])[1][0].text == single[0]
    frames = [Image.open(path).convert("RGB").resize((32, 32)) for path in paths]
    frames[0].save(folder / "frames.tiff", save_all=True, append_images=frames[1:])
    with Image.open(folder / "frames.tiff") as film:
        assert captioner.caption(ImageSequence.Iterator(film)) == captioner.caption(frames)


@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": math.nan},
        {"rerank": math.nan},
        {"max_length": 0},
        {"temperature": math.nan, "sample": True},
        {"length_penalty": 1e9},
        {"no_repeat_ngram": -3},
        {"seed": 2**70},
        {"beam_size": 2.0},
        {"beam_size": "3"},
        {"n_best is no option: there are beam_size, ": 1},
    ],
)
def test_options_from_python_are_held_to_the_ranges_of_flags(trained, folder, options):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors")
    with pytest.raises(UserError, match=next(iter(options))):
        captioner.caption(folder / "a.jpg", **options)


def test_samples_are_the_same_in_batches_of_any_size_and_of_each_photo_others(trained, folder):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors")
    same = [folder / "a.jpg", Image.open(folder / "a.jpg")] * 2
    said = [
        [each.texts for each in captioner.stream(same, batch_size=size, sample=True, seed=3)]
        for size in (1, 3, 64)
    ]
    assert said[0] == said[1] == said[2]
    assert said[0][0] != said[0][1] != said[0][2]


def test_texts_are_not_written_below_a_file(folder, caption):
    result = caption(folder, "--write", "txt", "--output", folder / "notes.txt")
    assert result.returncode == 1 and "notes.txt can't be written to" in result.stderr
    assert not result.stdout


def test_more_beams_than_words_are_searched(trained, folder):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors")
    beams = len(captioner.tokenizer) + 20
    assert captioner.caption(folder / "a.jpg", beam_size=beams)


def test_a_streams_precision_is_its_own(trained, folder):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors", precision="bf16")
    for _ in captioner.stream([folder / name for name in NAMES]):
        assert not torch.is_autocast_enabled("cpu")  # in what the caller does meanwhile


def test_a_program_may_have_another_default_device(trained, folder):
    photo, checkpoint = folder / "a.jpg", trained / "captioner_best_cider.safetensors"
    drawn = {"sample": True, "beam_size": 1}
    captioner = load_captioner(checkpoint)
    before = captioner.caption(photo), captioner.caption(photo, **drawn)
    torch.set_default_device("meta")  # as "cuda" on a machine that has one
    try:
        captioner = load_captioner(checkpoint, device="cpu")
        assert (captioner.caption(photo), captioner.caption(photo, **drawn)) == before
    finally:
        torch.set_default_device(None)


def test_an_empty_question_is_refused(joint):
    captioner = load_captioner(joint / "captioner_best_accuracy.safetensors")
    for question in ("", " ", ["why?", ""]):
        with pytest.raises(UserError, match="a question is empty"):
            captioner.answer(joint / "images" / "000.png", question)
    with pytest.raises(UserError, match="a question is empty"):
        captioner.explain(joint / "images" / "000.png", "")


def test_half_a_character_in_a_question_is_replaced(joint):
    command = ["inference.py", joint / "images" / "000.png", "--question", "why \udcff?"]
    result = run(*command, "--checkpoint", joint / "captioner_best_accuracy.safetensors")
    assert result.returncode == 0, result.stderr


def test_nobody_need_hear_what_is_written_to_files(folder, trained):
    checkpoint = trained / "captioner_best_cider.safetensors"
    words = [sys.executable, "inference.py", folder, "--checkpoint", checkpoint, "--write", "csv"]
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *map(str, words)]
    assert subprocess.run(closed, cwd=REPO).returncode == 1  # no lines came out
    assert len((folder / "captions.csv").read_text().splitlines()) == 1 + len(NAMES)


def test_a_terminal_without_a_letter_costs_no_caption(folder, caption):
    (folder / "a.jpg").rename(folder / "日本é.jpg")
    result = caption(folder, "--write", "csv", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "\\u65e5" in result.stdout, result.stderr
    table = (folder / "captions.csv").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 1 + len(NAMES) and "日本é.jpg" in table


def test_what_cannot_be_read_is_named_and_stops_nothing(folder, caption):
    (folder / "bad.jpg").write_bytes(b"<html>")
    os.mkfifo(folder / "pipe.jpg")  # which is not waited for
    result = caption("--image_path", folder, "--batch_size", 2, "--beam_size", 3, "--json")
    assert result.returncode == 1 and "pipe.jpg is a pipe" in result.stderr
    assert "bad.jpg is not a readable picture" in result.stderr
    assert list(json.loads(result.stdout.splitlines()[-1])) == NAMES


def test_what_is_given_is_never_written_over(folder, caption):
    (folder / "a.jpg").rename(folder / "a.txt")
    before = (folder / "a.txt").read_bytes()
    result = caption(folder / "a.txt", "--write", "txt", "--existing", "overwrite")
    assert result.returncode == 1 and "a.txt would be" in result.stderr
    assert (folder / "a.txt").read_bytes() == before


@pytest.mark.parametrize("flag", ["--question", "--questions_file", "--attention", "--encoder"])
def test_a_flag_that_is_empty_is_not_one_that_is_missing(folder, caption, flag):
    result = caption(folder / "a.jpg", flag, "")
    assert result.returncode == 1 and f"{flag} is empty" in result.stderr


@pytest.mark.parametrize("place", ["~nobody-here/x.csv", "x" * 300 + ".csv", "/proc/none/x.csv"])
def test_a_place_that_can_not_be_is_said_in_a_line(folder, caption, place):
    result = caption(folder, "--write", "csv", "--output", place)
    assert result.returncode == 1 and len(result.stderr.splitlines()) < 4, result.stderr
    assert "error: " in result.stderr and "Traceback" not in result.stderr


def test_a_photo_is_encoded_once_for_all_its_questions(joint, monkeypatch):
    captioner = load_captioner(joint / "captioner_best_accuracy.safetensors")
    photos = [joint / "images" / f"00{i}.png" for i in range(3)]
    questions = ["what color is the square?", "is the square on the left?"]
    encoded = []
    encode = inference.encode
    monkeypatch.setattr(
        inference,
        "encode",
        lambda tower, inputs, dtype: (
            encoded.append(sum(len(each["pixel_values"]) for each in inputs))
            or encode(tower, inputs, dtype)
        ),
    )
    pictures = [photo for photo in photos for _ in questions]
    answers = captioner.answer(pictures, questions * 3)
    assert sum(encoded) == 3
    assert answers == [captioner.answer(p, q) for p in photos for q in questions]
    assert answers == [a for photo in photos for a in captioner.answer(photo, questions)]
    assert answers[::2] == captioner.answer(iter(photos), questions[0])
    assert answers[:2] == captioner.answer(photos[0], (q for q in questions))
    assert answers[:2] == [each.texts[0] for each in captioner.stream(photos[0], questions)]
    encoded.clear()
    with pytest.raises(UserError, match="3 pictures and 2 questions"):
        captioner.answer(photos, questions)
    with pytest.raises(UserError, match="3 pictures and 2 questions"):
        next(captioner.stream(photos, questions))
    assert not encoded


def test_a_notebook_that_keeps_an_error_keeps_no_file_locked(folder, trained, monkeypatch):
    (folder / "bad.jpg").write_bytes(b"x")
    words = [str(folder), "--checkpoint", str(trained / "last.pt"), "--write", "csv"]
    made: list[inference.Captioner] = []
    load = inference.captioner_of
    monkeypatch.setattr(inference, "captioner_of", lambda args: made.append(load(args)) or made[-1])
    kept = []
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 5 photos can't be read") as error:
            inference.main(words)
        kept.append(error.value)
    assert made[0].require.__self__.training is None  # of a `.pt`, thrice the weights


def test_a_captioner_works_in_other_processes(trained, photos, tmp_path):
    checkpoint = trained / "captioner_best_cider.safetensors"
    captioner = load_captioner(checkpoint, precision="fp32")
    captioner.encoder.layers = (-2,)  # where the library lays hooks
    photo = str(photos / "images" / "000.png")
    features = captioner.features([Image.open(photo)])
    (tmp_path / "captioner").write_bytes(pickle.dumps(captioner))
    code = (
        "import os, pickle, sys, torch; from PIL import Image\n"
        "captioner = pickle.load(open(sys.argv[1], 'rb')); image = Image.open(sys.argv[2])\n"
        "torch.save(captioner.features([image]), sys.argv[3]); captioner.caption(image)\n"
        "if not (child := os.fork()):\n"  # as a server's worker: threads stay behind
        "    os._exit(captioner.caption(image) == '' or torch.get_num_threads() > 1)\n"
        "sys.exit(os.waitpid(child, 0)[1])"
    )
    made = tmp_path / "made"
    other = run("-c", code, tmp_path / "captioner", photo, made, OMP_NUM_THREADS="2")
    assert other.returncode == 0, other.stderr
    assert torch.equal(torch.load(made), features)


def odd_pictures(folder: Path) -> list[Path]:
    """Files that Pillow's own conversion to RGB makes black, white, or leaves on their side."""
    ramp = np.arange(64 * 64).reshape(64, 64)
    clear = Image.fromarray((ramp % 256).astype(np.uint8)).convert("RGBA")
    clear.putalpha(Image.fromarray((ramp // 16).astype(np.uint8)))
    turned = paint("red", "left", 1)
    exif = turned.getexif()
    exif[0x0112] = 6
    pictures = {
        "clear.png": (clear, {}),
        "deep.png": (Image.fromarray((ramp * 16).astype(np.uint16)), {}),
        "twelve.tif": (Image.fromarray(ramp.astype(np.uint16)), {}),
        "float.tif": (Image.fromarray((ramp / ramp.max()).astype(np.float32)), {}),
        "floats.tif": (Image.fromarray((ramp * 16).astype(np.float32)), {}),
        "whole.tif": (Image.fromarray((ramp * 16).astype(np.int32)), {}),
        "turned.jpg": (turned, {"exif": exif}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(folder / name, **options)
    return [folder / name for name in pictures]


def test_pillow_images_get_what_files_get(tmp_path, trained):
    captioner = load_captioner(trained / "captioner_best_cider.safetensors", precision="fp32")
    for path in odd_pictures(tmp_path):
        seen = captioner.encoder.open(path)
        low, high = np.percentile(np.asarray(seen), [5, 95])
        assert high - low > 60, f"{path.name} is seen without its contrast"
        with Image.open(path) as image:
            given, read = (next(captioner.stream([picture])) for picture in (image, path))
        assert given.hypotheses == read.hypotheses, path.name
