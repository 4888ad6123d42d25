"""Data sets in parquet files, as they lie on the Hub: unpacked once, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import prepare_dataset
from dataset import load_captions, load_questions
from parquet import read_parquet
from tests.conftest import run
from utils import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


FLAGS = ["--dataset", "custom", "--split", "ratio", "--data_dir"]


def photo(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 12), (shade, 0, 0)).save(content, "JPEG", comment=str(shade))
    return content.getvalue()


def write(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=33, compression="zstd")
    return path


def images(count: int, first: int = 0) -> list[dict]:
    """Pictures that differ from each other, and, by `first`, from those of another call."""
    return [{"bytes": photo(first + i), "path": f"x/{i}.jpg"} for i in range(count)]


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"image": images(2), "caption": [["A dog", "Two dogs"], ["b"]]}, ["A dog", "Two dogs"]),
        ({"image": images(2), "text": ["A dog", "b"], "id": [1, 2]}, ["A dog"]),
        (
            {"img": [photo(0), photo(1)], "caption_0": ["A", "b"], "caption_1": ["B", "c"]},
            ["A", "B"],
        ),
        ({"image": images(2), "Caption Text": ["A dog", "b"]}, ["A dog"]),
        ({"image": images(2), "sentences": [[{"raw": "A dog"}], [{"raw": "b"}]]}, ["A dog"]),
        ({"image": images(2), "title": ["No", "x"], "description": ["A dog", "b"]}, ["A dog"]),
        ({"image": images(2), "annotations_captions": [["A dog"], ["b"]]}, ["A dog"]),
        ({"image": images(2), "en_text": ["A dog", "b"], "zh_text": ["\u72d7", "b"]}, ["A dog"]),
        ({"jpg": images(2), "txt": ["A dog", "b"], "__key__": ["0", "1"]}, ["A dog"]),
        (
            {
                "image": images(2),
                "question": ["Please come up with a caption for the image"] * 2,
                "answer": [["A dog", "Two dogs"], ["b"]],
            },
            ["A dog", "Two dogs"],
        ),
        ({"image": images(2), "caption": ["", ""], "text": ["A dog", "b"]}, ["A dog"]),
        ({"image": images(2), "caption": [3, 4], "text": ["A dog", "b"]}, ["A dog"]),
        ({"control_image": images(2, 9), "image": images(2), "prompt": ["A dog", "b"]}, ["A dog"]),
        ({"source": images(2, 9), "target": images(2), "prompt": ["A dog", "b"]}, ["A dog"]),
        (
            {
                "image_0": images(2),
                "image_1": images(2, 9),
                "caption_0": ["A dog", "b"],
                "caption_1": ["A dog of image_1", "b"],
            },
            ["A dog"],
        ),
        (
            {"audio": [{"bytes": b"RIFF"}] * 2, "image": images(2), "text": ["A dog", "b"]},
            ["A dog"],
        ),
    ],
)
def test_photos_and_captions_are_found_by_their_columns(tmp_path, columns, texts):
    found = list(read_parquet([write(tmp_path / "a.parquet", columns)]))
    assert [content for _, content, *_ in found] == [photo(0), photo(1)]
    assert found[0][2] == texts
    names = ["000000.jpg", "000001.jpg"] if "img" in columns else ["0.jpg", "1.jpg"]
    assert [name for name, *_ in found] == names


def test_a_path_that_is_no_text_names_no_photo(tmp_path):
    columns = {"image": [{"bytes": photo(0), "path": 5}], "caption": ["a"]}
    [(name, *_)] = read_parquet([write(tmp_path / "a.parquet", columns)])
    assert name == "000000.jpg"


def test_objects_without_bytes_are_no_photos(tmp_path):
    columns = {"image": [{"data": photo(0), "name": "0.jpg"}], "caption": ["a"]}
    file = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match="the columns image, caption, and no photos: put"):
        list(read_parquet([file]))
    both = write(tmp_path / "b.parquet", columns | {"img": images(1)})
    assert [name for name, *_ in read_parquet([both])] == ["0.jpg"]


@pytest.mark.parametrize(
    "said",
    [
        {"question": ["Which?", "", "How?"], "answer": ["red", "x", ""]},
        {
            "Question": ["Which?"] * 3,
            "answers": [[{"answer": "red", "answer_id": 1}], [], [{"answer": " ", "answer_id": 2}]],
        },
        {"questions": [["Which?", ""], [], []], "answers": [["red", "x"], [], []]},  # OCR-VQA
        {"query": ["Which?", "Why?", "How?"], "label": [["red"], [""], []]},  # ChartQA
        {"question": ["Which?", "", ""], "answer": ["red", "", ""], "prompt": ["Describe it."] * 3},
        {"query": ["Which?", "Why?", "How?"], "answer": [["red"], [""], []]},  # ViDoRe
        {"question": ["Which?", "", "How?"], "response": ["red", "x", ""]},
        {"instruction": ["Which?", "Why?", "How?"], "response": ["red", "", ""]},
        {"problem": ["<image>Which?", "Why?", "How?"], "answer": ["red", "", ""]},  # Geometry3k
        {  # Visual Genome
            "url": ["https://x.org/1.jpg"] * 3,
            "qas": [[{"qa_id": 1, "question": "Which?", "answer": "red"}], [], []],
        },
        {  # TRL
            "prompt": [[{"role": "user", "content": "Which?"}]] * 3,
            "completion": [[{"role": "assistant", "content": said}] for said in ("red", "", "")],
        },
        {  # MMBench
            "question": ["Which?", "", "How?"],
            "A": ["blue", "x", "x"],
            "B": ["red", "x", "x"],
            "answer": ["B", "A", ""],
        },
    ],
)
def test_questions_beside_photos_are_unpacked(tmp_path, said):
    write(tmp_path / "a.parquet", {"image": images(3)} | said)
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "b.parquet", {"image": images(3, 5)} | said)
    prepare_dataset.main([*FLAGS, str(tmp_path), "--tasks", "questions"])
    found = load_questions(tmp_path / "questions.json")
    assert [(t.question, t.target) for group in found.values() for t in group] == [
        ("Which?", "red")
    ] * 2
    assert not (tmp_path / "captions.json").exists()


def test_prompts_ask_for_captions_and_questions(tmp_path):
    said = {"prefix": ["Which?", "caption en"], "suffix": ["red", "A dog"]}  # PaliGemma's
    file = write(tmp_path / "a.parquet", {"image": images(2)} | said)
    rows = [
        (captions, [q["answer"] for q in asked]) for *_, captions, asked in read_parquet([file])
    ]
    assert rows == [([], ["red"]), (["A dog"], [])]


def test_questions_that_lack_a_part_are_passed_over(tmp_path, capsys):
    columns = {"image": images(2), "caption": ["A", "B"], "question": ["Which?", "What?"]}
    file = write(tmp_path / "a.parquet", columns | {"answer": [{"value": "x"}, {"value": "y"}]})
    assert [row[2:] for row in read_parquet([file])] == [(["A"], []), (["B"], [])]
    assert "passed over: 2 questions" in capsys.readouterr().out


def test_rows_without_a_photo_are_left_out_and_counted(tmp_path, capsys):
    columns = {"image": [None, *images(1)], "caption": ["A", "B"]}
    assert [row[2] for row in read_parquet([write(tmp_path / "a.parquet", columns)])] == [["B"]]
    assert "passed over: 1 rows without a photo" in capsys.readouterr().out


def test_lists_of_photos_count_where_they_have_one(tmp_path, capsys):
    talk = [
        {"user": "Which?", "assistant": "red", "source": "VQAv2"},
        {"user": "Describe the image.", "assistant": "A dog", "source": "x"},
    ]
    listed = {"images": [[photo(0)], [photo(1)]], "text": ["A", "b"]}
    assert len(list(read_parquet([write(tmp_path / "b.parquet", listed)]))) == 2
    shown = images(4)
    columns = {"images": [shown[:1], [], shown[1:3], shown[3:]], "texts": [talk] * 3 + [talk[:1]]}
    found = list(read_parquet([write(tmp_path / "train-00000.parquet", columns)]))
    question = {"question": "Which?", "answer": "red", "answers": [], "type": ""}
    assert [row[:1] + row[2:] for row in found] == [
        ("0.jpg", ["A dog"], [question]),
        ("3.jpg", [], [question]),
    ]
    said = capsys.readouterr().out
    assert "1 rows without a photo" in said and "1 rows with several photos" in said


def test_what_save_to_disk_wrote_is_read(tmp_path):
    for n, split in enumerate(("train", "validation")):
        table = pa.table({"image": images(9, 9 * n), "text": ["a red one"] * 9})
        (tmp_path / split).mkdir()
        with pa.OSFile(f"{tmp_path / split}/data-00000-of-00001.arrow", "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
    prepare_dataset.main([*FLAGS, str(tmp_path), "--split", "karpathy"])
    splits = json.loads((tmp_path / "splits.json").read_text())
    assert (len(splits["train"]), len(splits["val"])) == (9, 9)


def test_a_parquet_file_may_be_a_table_of_photos_in_a_folder(tmp_path):
    for split in ("train", "validation"):
        columns = {"file_name": ["1.jpg", "2.jpg"], "text": ["a red one"] * 2}
        write(tmp_path / split / "metadata.parquet", columns)
        for n in (1, 2):
            (tmp_path / split / f"{n}.jpg").write_bytes(photo(n))
    prepare_dataset.main([*FLAGS, str(tmp_path), "--split", "karpathy"])
    captions = load_captions(tmp_path / "captions.json")
    assert captions["train/1.jpg"] == ["a red one"] and len(captions) == 4


def test_what_is_to_be_done_with_other_columns_is_said(tmp_path, capsys):
    columns = {"its; URL": ["https://x/1.jpg"], "TEXT": ["A"]}  # LAION's are in capitals
    file = write(tmp_path / "a" / "1.parquet", columns)
    fetch = f"--url_list {file.parent} --input_format parquet --url_col 'its; URL'"
    fetch += " --caption_col TEXT --output_folder DATA_DIR/images"
    with pytest.raises(UserError, match=fetch):
        list(read_parquet([file]))
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="1.parquet is Git LFS's note of it: run git lfs pull"):
        list(read_parquet([file]))


def test_parts_are_named_and_questions_alone_want_their_task(tmp_path, capsys):
    for n, part in enumerate(("ar", "de-train")):
        columns = {"image": images(9, n * 9), "question": ["Red?"] * 9, "answer": ["yes"] * 9}
        write(tmp_path / "data" / f"{part}-00000-of-00001.parquet", columns)
    with pytest.raises(UserError, match="but no captions: use --tasks questions"):
        prepare_dataset.main([*FLAGS, str(tmp_path)])
    assert "of data/ar, data/de: move away" in capsys.readouterr().out
    prepare_dataset.main([*FLAGS, str(tmp_path), "--tasks", "questions"])


def test_rows_or_captions_in_several_languages_are_said(tmp_path, capsys):
    said = [[{"lang": "en", "text": f"A {n}"}, {"lang": "de", "text": f"Ein {n}"}] for n in "ab"]
    write(tmp_path / "x/a.parquet", {"image": images(2), "captions": said})
    columns = {"image": images(2), "caption": ["A", "Ein"], "language": ["en", "de"]}
    write(tmp_path / "y/a.parquet", columns)
    for folder in ("x", "y"):
        prepare_dataset.main([*FLAGS, str(tmp_path / folder)])
        assert "in several languages (lang" in capsys.readouterr().out


def test_columns_that_are_not_used_are_named_once_for_files_alike(tmp_path, capsys):
    files = []
    for n, shortest in enumerate(("title", "text")):  # in each file another has more words
        columns = {"text": ["A dog"], "title": ["Two dogs"], shortest: ["One"], "id": [1]}
        columns = {"masks": [[photo(9)]], "mask": [photo(9)], "image": images(1, n)} | columns
        files.append(write(tmp_path / f"{n}.parquet", columns))
    assert [texts for _, _, texts, _ in read_parquet(files)] == [["A dog"], ["One"]]
    says = "photos in image, captions in text; ignored: masks, mask, title, id"
    assert capsys.readouterr().out == f"{files[0]}: {says}\n"


@pytest.mark.parametrize(
    ("column", "said", "names"),
    [
        ("filename", ["COCO_1.jpg", "val/COCO_2.jpg"], ["COCO_1.jpg", "COCO_2.jpg"]),
        ("image_id", ["139", "140"], ["139.jpg", "140.jpg"]),
        ("file_name", ["../../a b.png", ".jpg"], ["a_b.png", "000001.jpg"]),
        ("name", ["cat", "dog"], ["000000.jpg", "000001.jpg"]),
        ("file_name", ["a.jpg", "A.jpg"], ["a.jpg", "000001.jpg"]),
        ("filename", [None, "a.jpg"], ["000000.jpg", "a.jpg"]),
    ],
)
def test_a_column_may_name_the_photos(tmp_path, column, said, names):
    pictures = [each | {"path": None} for each in images(2)]
    columns = {"image": pictures, column: said, "caption": ["a", "b"]}
    found = read_parquet([write(tmp_path / "a.parquet", columns)])
    assert [name for name, *_ in found] == names


def test_rows_of_the_same_picture_are_one_photo(tmp_path, capsys):
    shown = [each for each in images(2) for _ in range(3)]
    texts = ["a", "b", "b", "c", "d", None]
    for split, columns in {
        "train": {"image": shown, "text": texts},
        "val": {"image": [*images(1), *images(2, 5)], "text": ["e", "f", "g"]},
    }.items():
        write(tmp_path / f"{split}.parquet", columns)
    prepare_dataset.main([*FLAGS, str(tmp_path), "--split", "karpathy"])
    captions = load_captions(tmp_path / "captions.json")
    assert captions["train/0.jpg"] == ["a", "b", "e"] and captions["train/1.jpg"] == ["c", "d"]
    splits = json.loads((tmp_path / "splits.json").read_text())
    assert sorted(splits["train"]) == ["train/0.jpg", "train/1.jpg"]
    assert sorted(splits["val"]) == ["val/0.jpg", "val/1.jpg"]
    says = "1 photos stand in several splits: each counts in the first alone, as 'train/0.jpg'"
    assert says in capsys.readouterr().out
    assert len([*(tmp_path / "images").rglob("*.jpg")]) == 4


def test_photos_without_a_name_get_one_that_no_other_has(tmp_path):
    pictures = [
        {"bytes": photo(i), "path": path}
        for i, path in enumerate(("000001.jpg", None, "a\0b:.png", "é" * 300 + ".jpg"))
    ]
    file = write(tmp_path / "a.parquet", {"image": pictures, "caption": list("abcd")})
    names = [name for name, *_ in read_parquet([file])]
    assert names == ["000001.jpg", "000002.jpg", "a_b_.png", "é" * 56 + ".jpg"]


def test_two_photos_of_one_name_stay_two(tmp_path):
    files = [
        write(tmp_path / f"{i}.parquet", {"image": images(2, i * 9), "caption": [f"a{i}", f"b{i}"]})
        for i in range(2)
    ]
    found = {name: texts for name, _, texts, _ in read_parquet(files)}
    assert found == {"0.jpg": ["a0"], "1.jpg": ["b0"], "000002.jpg": ["a1"], "000003.jpg": ["b1"]}


@pytest.mark.parametrize("column", [False, True])
def test_splits_of_files_or_a_column_are_folders(tmp_path, column):
    texts = {"image": images(2), "caption": ["a", "b"]}
    if column:
        write(tmp_path / "test.parquet", texts | {"Split": ["train", "dev"]})
    else:
        for n, split in enumerate(("train", "validation")):
            columns = texts | {"image": images(2, n * 9)}
            write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", columns)
    prepare_dataset.main([*FLAGS, str(tmp_path), "--split", "karpathy"])
    splits = json.loads((tmp_path / "splits.json").read_text())
    names = [[0], [1]] if column else [[0, 1], [0, 1]]
    assert sorted(splits["train"]) == [f"train/{n}.jpg" for n in names[0]]
    assert sorted(splits["val"]) == [f"val/{n}.jpg" for n in names[1]]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_what_is_told_of_other_columns_helps(tmp_path, suffix):
    folder = tmp_path / "o'clock"
    folder.mkdir()
    table = {"image": images(3), "En": ["A dog", "b", "c"], "de": ["Ein Hund", "b", "c"]}
    file = write(folder / "a.parquet", table)
    if suffix == ".arrow":
        for name in ("a.arrow", "cache-a.arrow"):
            with pa.OSFile(str(folder / name), "wb") as target:
                with pa.ipc.new_stream(target, pa.table(table).schema) as stream:
                    stream.write_table(pa.table(table))
        file.unlink()
    (folder / "README.md").write_text("of the Hub")
    flags = [*FLAGS, str(folder)]
    with pytest.raises(UserError, match="COLUMN becomes such by ") as caught:
        prepare_dataset.main(flags)
    told = str(caught.value).partition("COLUMN becomes such by ")[2]
    subprocess.run(told.replace("COLUMN", "En"), shell=True, check=True)
    assert prepare_dataset.main(flags) == 0
    assert [*load_captions(folder / "captions.json").values()] == [["A dog"], ["b"], ["c"]]


def test_photos_that_are_put_where_an_error_says_count(tmp_path):
    write(tmp_path / "a.parquet", {"image_id": ["0.jpg", "1.jpg"], "caption": ["a dog", "a cat"]})
    with pytest.raises(UserError, match="put those that it is about into DATA_DIR/images"):
        prepare_dataset.main([*FLAGS, str(tmp_path)])
    (tmp_path / "images").mkdir()
    for number in (0, 1):
        (tmp_path / f"images/{number}.jpg").write_bytes(photo(number))
    assert prepare_dataset.main([*FLAGS, str(tmp_path)]) == 0


@pytest.mark.fault(count=5)
def test_what_is_no_data_set_of_photos_is_refused_in_a_line(tmp_path, monkeypatch):
    plain = write(tmp_path / "plain.parquet", {"caption": ["a"], "label": [3]})
    whole = write(tmp_path / "whole.parquet", {"image": images(9), "caption": ["a"] * 9})
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-9])
    zeros = [{"bytes": bytes(2**20) + photo(i), "path": None} for i in range(99)]
    bombs = [
        write(tmp_path / f"bomb{i}.parquet", {"image": each, "caption": ["a"] * 99})
        for i, each in enumerate((zeros, zeros[:1] * 99))
    ]
    for file, says in (
        (plain, "has the columns caption, label, and no photos: put"),
        (cut, "can't be read as parquet"),
        *((bomb, "that is no collection of photos") for bomb in bombs),
    ):
        with pytest.raises(UserError, match=says):
            list(read_parquet([file]))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install -r requirements-parquet.txt"):
        list(read_parquet([whole]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory")
def test_what_a_page_unpacks_to_is_refused_before_it_is_there(tmp_path, monkeypatch):
    padding = os.urandom(3 * 2**20)  # so that the file's size doesn't tell
    lists = pa.array([["a" * 2**20] * 100, ["b"]], pa.list_(pa.string()))  # stands there once
    bombs = {"page": ["a" * 10**8, "b"], "nested": lists, "text": ["a " * 10**6, "b"]}
    monkeypatch.setattr("parquet.MOST_MEMORY", 2**25)
    for name, captions in bombs.items():
        file = write(tmp_path / name, {"image": [photo(1), padding], "caption": captions})
        before = resource.getrlimit(resource.RLIMIT_DATA)
        said = "captions of 2,0" if name == "text" else r"pages that become more than 4\d.\d MB"
        with pytest.raises(UserError, match=said):
            list(read_parquet([file]))
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_parquet_is_read_where_the_system_takes_no_limits(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:  # as macOS does
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("resource.setrlimit", refuse)
    file = write(tmp_path / "some.parquet", {"image": images(2), "caption": ["a", "b"]})
    assert len(list(read_parquet([file]))) == 2


def test_a_download_from_the_hub_becomes_a_data_set(tmp_path):
    columns = {"image": images(40), "caption": [[f"photo {i}", "a red one"] for i in range(40)]}
    write(tmp_path / "data" / "train-00000-of-00001.parquet", columns)
    (tmp_path / "data" / "._train-00000-of-00001.parquet").write_bytes(b"of a Mac")
    first = run("prepare_dataset.py", *FLAGS, tmp_path, "--check")
    assert first.returncode == 0, first.stderr
    assert "40 photos of 1 parquet files are in" in first.stdout
    captions = load_captions(tmp_path / "captions.json")
    assert captions["7.jpg"] == ["photo 7", "a red one"] and len(captions) == 40
    assert (tmp_path / "images" / "7.jpg").read_bytes() == photo(7)
    again = run("prepare_dataset.py", *FLAGS, tmp_path)
    assert again.returncode == 0 and "parquet" not in again.stdout
    (tmp_path / "images" / "mine.jpg").write_bytes(photo(99))
    assert run("prepare_dataset.py", *FLAGS, tmp_path).returncode == 0


@pytest.mark.fault
def test_killed_while_unpacking_it_goes_on(tmp_path):
    write(tmp_path / "a.parquet", {"image": images(30), "caption": ["a red one"] * 30})
    code = (
        "import os, signal, prepare_dataset\n"
        "write, count = prepare_dataset.write_changed, []\n"
        "def stop(*args):\n"
        "    count.append(0)\n"
        f"    len(count) < 12 or os.kill(os.getpid(), {signal.SIGKILL.value})\n"
        "    write(*args)\n"
        "prepare_dataset.write_changed = stop\n"
        f"prepare_dataset.main({[*FLAGS, str(tmp_path)]!r})\n"
    )
    killed = run("-c", code)
    assert killed.returncode == -signal.SIGKILL
    there = {photo: photo.stat().st_mtime_ns for photo in (tmp_path / "images").glob("*.jpg")}
    assert 0 < len(there) < 30
    assert run("prepare_dataset.py", *FLAGS, tmp_path).returncode == 0
    assert len(list((tmp_path / "images").glob("*.jpg"))) == 30
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 30
    assert there == {photo: photo.stat().st_mtime_ns for photo in there}  # they stay


def test_photos_of_ones_own_are_left_alone(tmp_path):
    write(tmp_path / "a.parquet", {"image": images(3), "caption": ["a"] * 3})
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"my{i}.jpg").write_bytes(photo(i))
    (tmp_path / "captions.txt").write_text("my0.jpg,mine\nmy1.jpg,mine too\n")
    prepare_dataset.main([*FLAGS, str(tmp_path)])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["my0.jpg", "my1.jpg"]
