"""Splits that the data tell themselves."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from dataset import load_splits, split_by_karpathy
from options import SPLITS
from tests.data_sets import (
    ASKED,
    EXPECTED,
    IDS,
    KARPATHY,
    OF,
    PAIRS,
    SIX,
    check,
    lay_out,
    lines_of,
    prepared,
)
from utils import UserError

LONG = {"val": "validation"}


def coco_of(split: str) -> str:
    images = [{"id": n, "file_name": name} for n, name in enumerate(SIX) if OF[name] == split]
    texts = [{"image_id": image["id"], "caption": "A dog"} for image in images]
    return json.dumps({"images": images, "annotations": texts})


COCOS = [{"id": n, "image_id": n, "file_name": name, "caption": "A"} for n, name in enumerate(SIX)]
TOLD = [each | {"split": OF[each["file_name"]]} for each in COCOS]

SPLIT_FORMS = {
    "a column": {
        "captions.csv": "image,caption,Split\n" + "".join(f"{n},A,{OF[n]}\n" for n in SIX)
    },
    "a key of objects": {
        "captions.json": json.dumps({n: {"raw": "A", "split": OF[n]} for n in SIX})
    },
    "another key": {"captions.json": json.dumps({n: {"raw": "A", "subset": OF[n]} for n in SIX})},
    "COCO's images": {"captions.json": json.dumps({"images": TOLD, "annotations": COCOS})},
    "COCO's captions": {"captions.json": json.dumps({"images": COCOS, "annotations": TOLD})},
    "a key": {
        "x.jsonl": "".join(lines_of(s, split=LONG.get(s, s)) for s in ("train", "val", "test"))
    },
    "an object": {
        "captions.json": json.dumps({s: {n: ["A"] for n in SIX if OF[n] == s} for s in OF.values()})
    },
    "an object with more": {
        "x.json": json.dumps(
            {"info": {}, **{s: {n: "A" for n in SIX if OF[n] == s} for s in SPLITS}}
        )
    },
    "COCO's pair": {
        **{f"annotations/captions_{s}2017.json": coco_of(s) for s in OF.values()},
        "annotations/instances_val2017.json": "{",  # is never read
    },
    "files": {f"{LONG.get(s, s)}.jsonl": lines_of(s) for s in OF.values()},
    "folders": {"captions.csv": "image,caption\n" + "".join(f"{n},A\n" for n in SIX)},
    "annotations": {f"images/{s}/_annotations.jsonl": lines_of(s) for s in OF.values()},
    "Karpathy's": {
        "deep/karpathy.json": json.dumps(
            {"images": [{"filename": n, "split": OF[n], "sentences": [{"raw": "A"}]} for n in SIX]}
        )
    },
}


@pytest.mark.parametrize("form", SPLIT_FORMS)
def test_a_split_of_ones_own_is_kept(tmp_path, form, capsys):
    within = form in ("folders", "annotations")
    there = [f"{OF[n]}2017/{n}" if within else n for n in SIX]
    files = {
        name.replace("images/train/", "images/train2017/"): t
        for name, t in SPLIT_FORMS[form].items()
    }
    files = {
        re.sub(r"images/(val|test)/", r"images/\g<1>2017/", name): t for name, t in files.items()
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
    folder = lay_out(tmp_path, {}, there)
    for name, text in files.items():
        (folder / name).write_text(text)
    wanted = {
        split: [n for n, o in zip(there, SIX, strict=True) if OF[o] == split] for split in SPLITS
    }
    assert check(folder) == 0
    said = capsys.readouterr().out
    assert "split of their own (train 4, val 1, test 1): --split karpathy keeps to it" in said
    assert "split are ignored" not in said.lower()
    assert check(folder, "--split", "test") == 0  # which scores those of the others, too
    assert "split of their own (train 4, val 1, test 1): --split" in capsys.readouterr().out
    for _ in range(2):  # from what was prepared, too
        assert check(folder, "--split", "karpathy") == 0
        splits = load_splits(folder / "splits.json")
        assert {split: sorted(names) for split, names in splits.items()} == wanted


def test_questions_are_of_the_split_of_cocos_images(tmp_path):
    table = {"images": TOLD, "annotations": [{"image_id": n} | ASKED for n in range(len(SIX))]}
    folder = lay_out(tmp_path, {"questions.json": json.dumps(table)}, SIX)
    assert check(folder, "--tasks", "questions", "--split", "karpathy") == 0
    splits = load_splits(folder / "splits.json")
    assert {name: split for split in splits for name in splits[split]} == {n: OF[n] for n in SIX}


def test_files_that_share_photos_are_no_splits(tmp_path):
    files = {f"{split}.jsonl": lines_of("train") for split in ("train", "val")}
    with pytest.raises(UserError, match=r"one of .*train\.jsonl, .*val\.jsonl\?"):
        check(lay_out(tmp_path, files, SIX))


@pytest.mark.parametrize(
    "names",
    [
        ("a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"),
        ("shard-000000.jsonl", "shard-000001.jsonl"),
        ("part1/captions_csv.jsonl", "part2/captions_csv2.jsonl"),
        ("train_20170902.jsonl", "validation_20170910.jsonl"),
        ("CaptionsTrain.jsonl", "CaptionsTest.jsonl"),
        ("captions_v1.jsonl", "captions_v2.jsonl"),
    ],
)
def test_parts_by_number_or_split_are_one_list(tmp_path, names):
    lines = [json.dumps({"image": n, "caption": text}) for n, text in PAIRS]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
    folder = lay_out(tmp_path, {name: lines[2 * n] for n, name in enumerate(names)})
    if "v1" in names[0]:
        with pytest.raises(UserError, match=r"one of .*v1\.jsonl, .*v2\.jsonl\?"):
            prepared(folder)
    else:
        assert prepared(folder) == {"1.jpg": ["A red dog"], "2.jpg": ["Two cats"]}


def test_karpathy_splits_photos_in_folders(tmp_path):
    splits = ["train", "val", "test"]
    images = [i | {"split": s} for i, s in zip(KARPATHY["images"], splits, strict=True)]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    for names in (list(IDS), [f"val2014/{name}" for name in IDS], [f"x/{name}" for name in IDS]):
        found = split_by_karpathy(names, tmp_path / "k.json")
        assert found == {split: [name] for split, name in zip(splits, names, strict=True)}


@pytest.mark.parametrize("column", ["", "split", "subset", "data set"])
def test_a_split_without_validation_takes_some_of_training(tmp_path, column, capsys):
    names = [f"train/{n}.jpg" for n in range(8)] + ["test/8.jpg", "test/9.jpg"]
    splits = [os.path.dirname(name) for name in names]
    if column:
        names = [f"all/{os.path.basename(name)}" for name in names]
    rows = zip(names, splits, strict=True)
    table = f"image,caption,{column}\n" + "".join(f"{n},A dog,{s}\n" for n, s in rows)
    folder = lay_out(tmp_path, {"captions.csv": table}, names)
    assert check(folder, "--split", "karpathy", "--train_split_ratio", 0.7) == 0
    splits = load_splits(folder / "splits.json")
    assert splits["test"] == names[8:] and splits["train"] and splits["val"]
    assert sorted(splits["train"] + splits["val"]) == names[:8]
    assert f"none to validate: {len(splits['val'])} of those to train" in capsys.readouterr().out


def test_a_split_of_ones_own_is_not_overwritten_and_can_be_used(tmp_path, capsys):
    mine = json.dumps({"train": ["1.jpg"], "validation": ["2.jpg"], "test": ["3.jpg"]})
    folder = lay_out(tmp_path, {"captions.json": json.dumps(EXPECTED), "splits.json": mine})
    with pytest.raises(UserError, match="--karpathy_file"):
        check(folder)
    assert (folder / "splits.json").read_text() == mine
    (folder / "splits.json").write_text('[{"image": "1.jpg", "split": "train"}]')
    with pytest.raises(UserError, match="--karpathy_file"):
        check(folder)
    (folder / "splits.json").write_text(mine)
    (folder / "splits.json").rename(folder / "mine.json")
    flags = ["--split", "karpathy", "--karpathy_file", folder / "mine.json"]
    assert check(folder, *flags) == 0
    splits = load_splits(folder / "splits.json")
    assert splits == {"train": ["1.jpg"], "val": ["2.jpg"], "test": ["3.jpg"]}
    (folder / "mine.json").write_text('{"train": ["1.jpg"], "val": ["2.jpg"]}')
    assert check(folder, *flags) == 0
    assert "mine.json says; 1 photos are of none" in capsys.readouterr().out
    (folder / "captions.json").unlink()
    for name in EXPECTED:
        (folder / "images" / name).with_suffix(".txt").write_text("A dog")
    assert check(folder, *flags) == 0  # a split of names holds no captions
    splits = zip(EXPECTED, ("train", "val", "test"), strict=True)
    images = [{"filename": name, "split": split} for name, split in splits]
    (folder / "mine.json").write_text(json.dumps({"images": images}))
    assert check(folder, *flags) == 0  # nor does one in Karpathy's form without them


def test_what_tells_another_split_than_its_photo_has_is_counted(tmp_path, capsys):
    rows = [("1.jpg", "train"), ("2.jpg", "val"), ("1.jpg", "val"), ("3.jpg", "test")]
    table = "".join(f"{name},A dog,{split}\n" for name, split in rows)
    asked = [{"image": name, "split": split} | ASKED for name, split in rows]
    asked[1]["split"] = "test"
    texts = {"captions.csv": f"image,caption,split\n{table}", "q.json": json.dumps(asked)}
    folder = lay_out(tmp_path, texts)
    flags = ["--tasks", "captions,questions", "--questions_file", folder / "q.json"]
    assert check(folder, *flags, "--split", "karpathy") == 0
    said = capsys.readouterr().out
    assert "1 captions are of another split than their photo's first" in said
    assert "2 questions tell another split than their photo has" in said
    splits = load_splits(folder / "splits.json")
    assert splits == {"train": ["1.jpg"], "val": ["2.jpg"], "test": ["3.jpg"]}
