"""A folder of photos and a table of captions of one's own: conversion, --check, training."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import captions_search
import commands
import config
import prepare_dataset
from captions_file import read_captions
from check_data import look_alike
from dataset import (
    DataPaths,
    data_paths,
    load_captions,
    load_questions,
    load_splits,
    split_by_karpathy,
)
from options import SPLITS
from photo_names import find_names
from questions_file import convert_vqa, find_questions, read_questions
from settings import Parser, load_settings
from tests.conftest import run, small_flags, write_photos
from texts import NOTHING, texts_of
from utils import UserError, decoded


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
    assert read_captions(tmp_path / name).texts == captions


def test_a_row_has_its_caption_in_another_column_where_the_usual_one_is_blank(tmp_path):
    head = "SourceFile,Description,ImageDescription,Caption-Abstract,Comment\n"
    rows = "1.jpg,A red dog,A,,\n2.jpg,,SONY DSC,Two cats,\n3.jpg,,SONY DSC,,too blurry\n"
    (tmp_path / "captions.csv").write_text(head + rows)
    found = read_captions(tmp_path / "captions.csv")
    assert found.texts == {"1.jpg": ["A red dog"], "2.jpg": ["Two cats"]}
    assert "imagedescription, comment are ignored" in found.form


@pytest.mark.parametrize("blank", ["", ",", '"",""', " , "])
def test_a_row_of_blank_cells_says_nothing(tmp_path, blank):
    (tmp_path / "a.csv").write_text(f'"image","caption"\n"1.jpg","A dog"\n{blank}\n"2.jpg","B"\n')
    found = read_captions(tmp_path / "a.csv")
    assert found.texts == {"1.jpg": ["A dog"], "2.jpg": ["B"]} and not found.passed


@pytest.mark.parametrize("of", [["en", "de"], ["en", "en"]])
def test_rows_in_several_languages_are_said(tmp_path, of, capsys):
    table, objects = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text(f"image,caption,lang\n1.jpg,A dog,{of[0]}\n1.jpg,Ein Hund,{of[1]}\n")
    row = {"image": "1.jpg", "caption": "A dog", "question": "Is it?", "answer": "yes"}
    objects.write_text("\n".join(json.dumps(row | {"q_lang": each}) for each in of))
    read_questions(objects)
    said = [read_captions(table).form, read_captions(objects).form, capsys.readouterr().out]
    told = ["(lang: de, en;" in said[0], "(q_lang: de, en;" in said[1], "(q_lang: de" in said[2]]
    assert told == [of[0] != of[1]] * 3


@pytest.mark.parametrize("ids", [("id", 51), ("image_id", 51), ("id", 1)])
@pytest.mark.parametrize("called", ["ids", "addresses"])
@pytest.mark.parametrize("form", ["csv", "json"])
def test_photos_are_called_by_their_address_or_the_id_beside_it(tmp_path, ids, called, form):
    """But not by what counts rows, whose photos may be others."""
    key, first = ids
    names = [str(first + n) if called == "ids" else f"x{n}" for n in range(3)]
    photos = [f"https://a.org/x{n}.jpg?size=2" for n in range(3)]
    rows = [(first + n, photo, f"A dog {n}") for n, photo in enumerate(photos)]
    table = "\n".join(",".join(map(str, row)) for row in [(key, "image_url", "caption"), *rows])
    objects = [{key: n, "image_url": photo, "caption": text} for n, photo, text in rows]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / f"images/{name}.jpg").touch()
    text = table if form == "csv" else json.dumps(objects)
    (tmp_path / f"list.{form}").write_text(text)
    found = read_captions(tmp_path / f"list.{form}", tmp_path / "images").texts
    by_id = called == "ids" and first > 1
    expected = names if by_id else [photo.removesuffix("?size=2") for photo in photos]
    assert found == {name: [f"A dog {n}"] for n, name in enumerate(expected)}


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ("{}.jpg\ten\tA dog that runs {}", 0),
        ("{}.jpg\tA dog that runs over grass\tuser_{}", 0),
        ("{}.jpg\t2021-05-0{} 12:00\tA dog that runs", 0),
        ("{}.jpg,golden retriever,A dog that runs over the grass and along a stone wall, {}", 0),
        ("{}.jpg,A dog that runs {},dog", 0),
        ("{}.jpg\tA dog {}\tIt runs over the grass, and along a wall", 2),
        ("{}.jpg,dog, a ball on the grass that it runs after {}", 1),
        ("{}.jpg,1girl,solo,long hair,hat{}", 1),
    ],
)
def test_without_a_header_a_label_is_no_caption(tmp_path, row, captions):
    path = tmp_path / "captions.txt"
    path.write_text("".join(row.replace("{}", f"{n}") + "\n" for n in range(4)))
    if captions:
        assert [len(texts) for texts in read_captions(path).texts.values()] == [captions] * 4
    else:
        with pytest.raises(UserError, match="say which is what in a first row"):
            read_captions(path)


PAIRED = {
    "pairs.csv": 'Input.image1,Input.image2,Answer.caption1,Answer.caption2\n1.jpg,2.jpg,"A,",B\n'
    "3.jpg,,C,\n",
    "pairs.jsonl": '{"image_0": "1.jpg", "image_1": "2.jpg", "caption_0": "A,", "caption_1": "B"}\n'
    '{"image_0": "3.jpg", "image_1": null, "caption_0": "C", "caption_1": null}\n',
}


@pytest.mark.parametrize("name", PAIRED)
def test_captions_numbered_as_their_photos_are_each_of_its_own(tmp_path, name):
    (tmp_path / name).write_text(PAIRED[name])
    assert read_captions(tmp_path / name).texts == {"1.jpg": ["A,"], "2.jpg": ["B"], "3.jpg": ["C"]}


def test_a_photo_in_base64_fills_no_message(tmp_path):
    (tmp_path / "captions.tsv").write_text(f"0\t100\tA dog\t{'/9j/4AAQ' * 1000}\n")  # OFA's
    with pytest.raises(UserError) as error:
        read_captions(tmp_path / "captions.tsv")
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2 names no photo and caption"),
        ('{"image": "1.jpg"}', "line 2 names no photo and caption"),
        ('{"image": 7, "caption": "x"}', "7 is not the name of a photo"),
        ('{"image": "1.jpg", "captions": ["x", 3]}', "a caption that is no text"),
        ('{"image": "../1.jpg", "caption": "x"}', "is not a name within"),
        ("[]", "line 2 names no photo and caption"),
        ('{"image": "1.jpg", "body": "x"}', "caption, with image, body: write"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, says):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "0.jpg", "caption": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(says)):
        read_captions(path)


# --- Every form, from the file to what is trained on -------------------------------------------

PAIRS = [("1.jpg", "A red dog"), ("1.jpg", "A dog runs"), ("2.jpg", "Two cats"), ("3.jpg", "A car")]
SENTENCES = {name: [{"raw": t} for n, t in PAIRS if n == name] for name, _ in PAIRS}
IDS = {"1.jpg": 1, "2.jpg": 2, "3.jpg": 3}
COCO = {
    "images": [{"id": number, "file_name": name} for name, number in IDS.items()],
    "annotations": [{"image_id": IDS[name], "id": 7, "caption": text} for name, text in PAIRS],
}
KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": name, "split": "train", "sentences": sentences}
        for name, sentences in SENTENCES.items()
    ]
}
TOKENS = "".join(f"{name}#{n}\t{text}\n" for n, (name, text) in enumerate(PAIRS))


def rows(header: str, line: str) -> str:
    return f"{header}\n" + "".join(f"{line.format(name, text)}\n" for name, text in PAIRS)


FORMS = {  # file: (content, what is said of it)
    "captions.json": (json.dumps(COCO), "COCO's captions: 4 captions of 3 photos"),
    "dataset_coco.json": (json.dumps(KARPATHY), "Karpathy's captions and split: 4 captions"),
    "Flickr8k.token.txt": (TOKENS + "1.jpg.1#0\tA row\n", "'1.jpg.1' is not the name of a photo"),
    "results_20130124.token": (TOKENS, "a table: 4 captions of 3 photos"),
    "metadata.csv": (rows("width,file_name,text,split", '9,{},"{}",train'), "width, split are ign"),
    "images/metadata.csv": (rows("file_name,text", "{},{}"), "a table: 4 captions of 3 photos"),
    "images/metadata.jsonl": (
        "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in PAIRS),
        "JSON lines: 4 captions of 3 photos",
    ),
    "captions.tsv": (rows("filepath\tid\ttitle", "{}\t5\t{}"), "the columns id are ignored"),
    "captions.csv": (rows("image;caption", "{};{}"), "a table: 4 captions of 3 photos"),
    "captions.txt": (rows("image,caption", "{},{}").replace("\n", "\r"), "a table: 4 captions"),
    "styles.csv": (
        rows("id,season,productDisplayName", '{},Fall,"{}"'),
        "columns season are ignored",
    ),
    "results.csv": (rows("image,caption", "images/{},{}"), "'images/1.jpg' as '1.jpg'"),
}


def lay_out(folder: Path, files: dict[str, str], names: list[str] | None = None) -> Path:
    (folder / "images").mkdir(parents=True)
    for name in names or IDS:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 70), tuple(name.encode()[:3].ljust(3))).save(folder / "images" / name)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


def paths_in(folder: Path, **others: str) -> DataPaths:
    return data_paths(SimpleNamespace(DATA_DIR=folder, **others))


def prepared(folder: Path, *flags: object) -> dict[str, list[str]]:
    assert check(folder, *flags) == 0
    return load_captions(paths_in(folder).captions)


EXPECTED = {name: [text for n, text in PAIRS if n == name] for name in IDS}


@pytest.mark.parametrize("file", FORMS)
def test_every_form_is_recognised_and_told(tmp_path, file, capsys):
    text, says = FORMS[file]
    folder = lay_out(tmp_path / "data", {file: text})
    assert prepared(folder) == EXPECTED
    assert says in capsys.readouterr().out
    assert prepared(folder) == EXPECTED  # and again, from what was prepared
    assert (folder / file).read_bytes() == text.encode()


def test_a_text_beside_each_photo(tmp_path, capsys):
    folder = lay_out(
        tmp_path, {"images/1.txt": "A red dog\nA dog runs", "images/2.txt": "Two cats"}
    )
    assert prepared(folder) == {"1.jpg": EXPECTED["1.jpg"], "2.jpg": ["Two cats"]}
    assert "3.jpg: no caption beside it" in capsys.readouterr().out


@pytest.mark.parametrize("end", [".json", ".jpg.json", ".jpg.supplemental-metadata.json"])
def test_an_object_beside_a_photo_may_have_its_name_for_a_title(tmp_path, end):
    """As Google Takeout's have, and what downloads albums."""
    said = {"title": "1.jpg", "description": "A red dog"}
    other = {"title": "2.jpg", "description": ""}
    texts = {f"images/1{end}": json.dumps(said), f"images/2{end}": json.dumps(other)}
    folder = lay_out(tmp_path, texts)
    assert prepared(folder, "--split", "test") == {"1.jpg": ["A red dog"]}
    (folder / f"images/1{end}").write_text(json.dumps(said | {"description": "A dog"}))
    assert prepared(folder, "--split", "test") == {"1.jpg": ["A dog"]}


def test_objects_of_google_takeout_have_cut_names_and_numbers_at_their_end(tmp_path):
    objects = {
        "PXL_20230412_183045123.jpg": "PXL_20230412_183045123.jpg.supplemental-metada.json",
        "PXL_20230412_183045123(2).jpg": "PXL_20230412_183045123.jpg.supplemental-metada(2).json",
        "1(1).jpg": "1.jpg.supplemental-metadata(1).json",
        "2(1).jpg": "2(1).jpg.supplemental-metadata.json",  # which was called so when it was new
        "3(1).jpg": "3.jpg(1).json",  # before 2024
        f"{'x' * 45}.jpg": f"{'x' * 45}.jpg.json",
    }
    told = {
        f"images/{at}": json.dumps({"description": f"A {name}!"}) for name, at in objects.items()
    }
    folder = lay_out(tmp_path, told, [*objects, "1.jpg", f"{'x' * 45}.png"])
    assert prepared(folder) == {name: [f"A {name}!"] for name in objects}
    (folder / f"images/{objects['1(1).jpg']}").write_text('{"description": "A dog"}')
    assert prepared(folder)["1(1).jpg"] == ["A dog"]


def test_an_object_beside_a_photo_may_call_its_caption_as_columns_do(tmp_path):
    said = {"short_caption": "A dog", "extra_caption": "A red dog runs", "num_text": 3}
    said["title"] = "T"
    blank = {"short_caption": " ", "raw": {"width": 3}}
    texts = {"images/1.json": json.dumps(said), "images/2.json": json.dumps(blank)}
    folder = lay_out(tmp_path, texts)
    assert prepared(folder, "--split", "test") == {"1.jpg": ["A red dog runs"]}


def test_an_object_beside_a_photo_may_be_exiftools(tmp_path):
    """As osxphotos writes it: in a list of one, with keys that say where a text stood."""
    said = {"EXIF:ImageDescription": "SONY DSC", "XMP:Title": "T", "XMP:Description": "A dog"}
    names = ["Beach.jpeg", "DSC_1.jpeg", "Our house.jpeg"]
    told = {f"images/{n}.json": json.dumps([{"SourceFile": n, **said}]) for n in names}
    assert prepared(lay_out(tmp_path, told, names)) == {name: ["A dog"] for name in names}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"image": "1", "Description": {"Caption": "A red dog", "Sex": "male"}},
            {"image": "2", "Description": {"Caption": "A cat"}},
        ),
        ({"1.jpg": {"keywords": "b", "clinical-description": "A red dog"}}, {"2.jpg": ["A cat"]}),
        ({"image": "1", "caption": {"<CAPTION>": "A red dog"}}, {"image": "2", "caption": "A cat"}),
    ],
    ids=["MedPix", "DeepEyeNet", "Florence-2"],
)
def test_an_object_that_holds_a_caption_may_call_it_in_other_ways(tmp_path, first, second):
    folder = lay_out(tmp_path, {"all.json": json.dumps([first, second])})
    assert prepared(folder) == {"1.jpg": ["A red dog"], "2.jpg": ["A cat"]}


def test_an_object_that_names_no_caption_is_not_called_a_blank_one(tmp_path):
    entries = [{"image": "1.jpg", "caption": {"en": "A dog"}}, {"image": "2.jpg", "caption": "B"}]
    (tmp_path / "all.json").write_text(json.dumps(entries))
    [why] = read_captions(tmp_path / "all.json").passed
    assert why.endswith("entry 1 has no caption in {'en': 'A dog'}")


@pytest.mark.parametrize(
    "rows",
    [
        'file,Dublin Core:Title,Dublin Core:Description\n{0},Nothing,"{1}"\n',
        'id,filename,dc.description[en]\n7,{0},"{1}"\n',
        'caption_id,english_caption,bengali_caption\n{0}#0,"{1}",কুকুর\n',
        'photoPath,imageCaption,createdAt\n{0},"{1}",2023\n',
        '#TYPE System.IO.FileInfo\n"Name","Caption"\n"{0}","{1}"\n',
    ],
    ids=["Omeka", "DSpace", "BAN-Cap", "JavaScript", "PowerShell"],
)
def test_a_header_may_be_as_archives_and_scripts_write_it(tmp_path, rows):
    text = rows.format("1.jpg", "A red dog, running")
    (tmp_path / "all.csv").write_text(text)
    assert read_captions(tmp_path / "all.csv").texts == {"1.jpg": ["A red dog, running"]}


def test_objects_may_be_called_as_pages_and_scripts_do(tmp_path):
    """A page's photos, and SNLI-VE, whose contradictions are no captions."""
    entries = [{"src": "1.jpg", "alt": "A red dog", "width": 3}]
    told = {"captionID": "2.jpg#0", "sentence1": "A cat", "sentence2": "An animal"}
    entries = [entries, [told | {"gold_label": said} for said in ("neutral", "entailment")]]
    for n, wanted in enumerate(({"1.jpg": ["A red dog"]}, {"2.jpg": ["A cat", "An animal"]})):
        (tmp_path / f"{n}.json").write_text(json.dumps(entries[n]))
        assert read_captions(tmp_path / f"{n}.json").texts == wanted


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (  # what osxphotos says of Apple's library, whose photos were exported by the other name
            "all.csv",
            "filename,original_filename,description,path\n"
            "0A-9.jpeg,2.JPG,A cat,/Users/a/originals/0/0A-9.jpeg\n",
            {"2.jpg": ["A cat"]},
        ),
        ("all.csv", "title,description\nFile:A red dog.jpg,A dog\n", {"A_red_dog.jpg": ["A dog"]}),
        ("all.json", {"n": 1, "items": [{"file": "2.jpg", "caption": "A"}]}, {"2.jpg": ["A"]}),
        ("all.json", {"photos": {"-Mx": {"file": "2.jpg", "caption": "A"}}}, {"2.jpg": ["A"]}),
    ],
    ids=["osxphotos", "Wikimedia", "a page of an API", "Firebase"],
)
def test_photos_are_known_by_the_names_that_exports_give_them(tmp_path, name, content, expected):
    text = content if isinstance(content, str) else json.dumps(content)
    folder = lay_out(tmp_path, {name: text}, [*IDS, "A_red_dog.jpg"])
    assert prepared(folder, "--split", "test") == expected


def test_lists_of_the_same_photos_are_not_told_to_become_parts(tmp_path):
    """UCM's and Sydney's captions, in Karpathy's form and as lines."""
    images = [{"filename": "1.tif", "sentences": [{"raw": "A dog"}], "split": "train"}]
    texts = {"dataset.json": json.dumps({"images": images}), "descriptions_UCM.txt": "1 A dog\n"}
    with pytest.raises(UserError, match=r"descriptions_UCM.txt\?\)$"):
        prepared(lay_out(tmp_path, texts))


def test_what_made_a_picture_is_no_caption_of_it(tmp_path):
    """As Stable Diffusion's web interfaces write it below the prompt."""
    text = "A red dog,\nrunning\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Seed: 1"
    plain = "A cat\nSteps: 20, Sampler: Euler a"
    folder = lay_out(tmp_path, {"images/1.txt": text, "images/2.txt": plain})
    assert prepared(folder) == {"1.jpg": ["A red dog,", "running"], "2.jpg": ["A cat"]}


def test_a_column_of_names_is_none_of_captions(tmp_path):
    """As doccano writes it, whose captions are labels."""
    (tmp_path / "all.jsonl").write_text('{"filename": "x/1.jpg", "text": "1.jpg", "label": ["A"]}')
    with pytest.raises(UserError, match="line 1 names no photo and caption"):
        read_captions(tmp_path / "all.jsonl")


def test_photos_that_differ_in_their_suffix_have_each_its_own_text(tmp_path):
    """As inference.py writes them; a text that no other stands beside is both photos'."""
    folder = lay_out(tmp_path, {"images/1.txt": "A", "images/2.txt": "B"}, ["1.jpg", "1.png"])
    assert prepared(folder) == {"1.jpg": ["A"], "1.png": ["A"]}
    (folder / "images/1.png.txt").write_text("B")
    assert prepared(folder) == {"1.jpg": ["A"], "1.png": ["B"]}


def test_a_photo_that_is_called_like_anothers_text(tmp_path):
    """A photo that was saved anew as PNG: `1.jpg.txt` is `1.jpg.png`'s, as inference.py writes."""
    folder = lay_out(
        tmp_path, {"images/1.txt": "A", "images/1.jpg.txt": "B"}, ["1.jpg", "1.jpg.png"]
    )
    assert prepared(folder) == {"1.jpg": ["A"], "1.jpg.png": ["B"]}


def test_captions_count_before_tags_beside_the_same_photo(tmp_path, capsys):
    """As kohya's scripts write both: BLIP's sentence to 1.caption, the tagger's words to 1.txt."""
    texts = {"images/1.txt": "dog, red", "images/1.caption": "A red dog", "images/2.txt": "Two"}
    texts["images/2.caption"] = " "  # a photo that BLIP was not asked about
    assert prepared(lay_out(tmp_path, texts)) == {"1.jpg": ["A red dog"], "2.jpg": ["Two"]}
    said = "1 texts beside a .caption, which counts before them, first: .*images/1.txt"
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("images/1.txt", "Café".encode("latin-1")),
        ("images/1.txt", "Café".encode("utf-16")),
        ("images/1.TXT", "Café".encode("utf-8-sig")),
        ("images/1.txt", "\r\rCaf\u00e9\u2028\r".encode()),
        ("texts/1.txt", "Café".encode()),
    ],
)
def test_a_text_in_any_encoding_beside_a_photo_or_in_a_folder_of_texts(tmp_path, file, content):
    folder = lay_out(tmp_path, {"images/2.txt": "Two", "images/3.txt": "Three"})
    (folder / "texts").mkdir()
    (folder / file).write_bytes(content)
    source = folder / Path(file).parent
    for name in ("2.txt", "3.txt"):
        (folder / "images" / name).rename(source / name)
    assert check(folder, "--captions_file", source) == 0
    found = load_captions(paths_in(folder, CAPTIONS_FILE=str(source)).captions)
    assert found["1.jpg"] == ["Café"] and set(found) == set(IDS)


@pytest.mark.parametrize("file", ["coco_val.json", "my.tsv", "notes"])
def test_captions_file_names_any_form_anywhere(tmp_path, file):
    texts = {"coco_val.json": json.dumps(COCO), "my.tsv": rows("image\tcaption", "{}\t{}")}
    (tmp_path / file).write_text(texts.get(file, TOKENS))
    mine = {"1.jpg": ["mine"], "2.jpg": ["too"]}
    folder = lay_out(tmp_path / "data", {"captions.json": json.dumps(mine)})
    flags = ("--captions_file", tmp_path / file)
    assert check(folder, *flags) == 0 and check(folder, *flags) == 0
    found = load_captions(paths_in(folder, CAPTIONS_FILE=str(tmp_path / file)).captions)
    assert found == EXPECTED
    assert prepared(folder) == mine


@pytest.mark.parametrize("parts", [("captions_train2017.json", "captions_val2017.json"), ()])
def test_captions_file_names_a_folder_with_parts_of_one_list(tmp_path, parts):
    """COCO's pair beside photos that lie where nobody may write."""
    folder, source = lay_out(tmp_path / "data", {}), tmp_path / "annotations"
    source.mkdir()
    (source / "instances_train2017.json").write_text(json.dumps(COCO | {"annotations": []}))
    for number, name in enumerate(parts):
        part = [each for each in COCO["annotations"] if (each["image_id"] == 1) == (number == 0)]
        (source / name).write_text(json.dumps(COCO | {"annotations": part}))
    if not parts:
        (source / "captions.json").write_text(json.dumps(EXPECTED))
    assert check(folder, "--captions_file", source) == 0
    assert load_captions(paths_in(folder, CAPTIONS_FILE=str(source)).captions) == EXPECTED


def test_photos_and_table_in_one_folder(tmp_path, capsys):
    folder = lay_out(tmp_path, {"captions.csv": rows("image,caption", "{},{}")})
    for photo in (folder / "images").iterdir():
        photo.rename(folder / photo.name)
    (folder / "images").rmdir()
    assert prepared(folder) == EXPECTED
    assert "not from" not in capsys.readouterr().out  # one file in one place


# --- Encodings, names without a suffix, splits ---------------------------------------------------


@pytest.mark.parametrize("file", ["captions.csv", "captions.json", "mine.csv"])
def test_windows_encoding_is_read_and_said(tmp_path, file, capsys):
    text = {
        "json": json.dumps({n: ["Café’s"] for n in IDS}, ensure_ascii=False),
        "csv": "image,caption\n" + "".join(f"{n},Café’s\n" for n in IDS),
    }[file.partition(".")[2]]
    folder = lay_out(tmp_path, {})
    (folder / file).write_bytes(text.encode("cp1252"))
    flags = ["--captions_file", folder / file] if file == "mine.csv" else []
    assert check(folder, *flags) == 0 and check(folder, *flags) == 0
    given = {"CAPTIONS_FILE": str(folder / file)} if flags else {}
    assert load_captions(paths_in(folder, **given).captions) == {n: ["Café’s"] for n in IDS}
    assert "not UTF-8: 1 read in Windows' Western encoding ('Café’s')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("一只狗在跑", "gbk"),
        ("一隻狗在跑", "big5"),
        ("犬が走る", "shift-jis"),
        ("ドッグ", "shift-jis"),
        ("개가 달린다", "euc-kr"),
        ("собака бежит", "cp1251"),
        ("คลื่น", "cp874"),
    ],
)
@pytest.mark.parametrize("file", ["captions.csv", "images/1.txt", "captions.json"])
def test_another_encoding_is_refused_with_what_converts_it(tmp_path, file, text, encoding):
    folder = lay_out(tmp_path, {})
    whole = {
        "captions.csv": f"image,caption\n1.jpg,{text}\n2.jpg,{text}\n",
        "captions.json": json.dumps({"1.jpg": [text]}, ensure_ascii=False),
    }
    (folder / file).write_bytes(whole.get(file, text).encode(encoding))
    with pytest.raises(UserError, match=rf"{file} is not UTF-8.*iconv -f ENCODING .*{file} > "):
        check(folder)


@pytest.mark.parametrize("text", ["Größe", "d’été", "Été", "«Où»", "naïve façade, «déjà» vu"])
def test_short_western_texts_are_known_and_flawed_unicode_is_not_one(text):
    for encoding in ("cp1252", "utf-16-le", "utf-16-be"):
        assert decoded(text.encode(encoding)) == text
    for flawed in (f"{text} {text}".encode() + b"\xe9", text.encode("utf-16") + b"x"):
        with pytest.raises(UnicodeDecodeError):
            decoded(flawed)


@pytest.mark.parametrize("mark", ["\t", ",", " "])
@pytest.mark.parametrize("number", ["", "#0", "#zhc#0"])
def test_a_table_without_header_may_lack_suffixes(tmp_path, mark, number):
    there = [f"ROCO-{n}.jpg" for n in (1, 2, 3)]
    table = "".join(f"ROCO-{n}{number}{mark}X-ray {n}\n" for n in (1, 2, 3))
    folder = lay_out(tmp_path, {"captions.csv": table}, there)
    assert prepared(folder) == {name: [f"X-ray {n}"] for n, name in enumerate(there, 1)}


SIX = [f"{n}.jpg" for n in range(1, 7)]
OF = dict(zip(SIX, "train train train train val test".split(), strict=True))
LONG = {"val": "validation"}


def coco_of(split: str) -> str:
    images = [{"id": n, "file_name": name} for n, name in enumerate(SIX) if OF[name] == split]
    texts = [{"image_id": image["id"], "caption": "A dog"} for image in images]
    return json.dumps({"images": images, "annotations": texts})


def lines_of(part: str, **more: str) -> str:
    said = [{"image": n, "caption": "A dog", **more} for n in SIX if OF[n] == part]
    return "\n".join(map(json.dumps, said)) + "\n"


SPLIT_FORMS = {
    "a column": {
        "captions.csv": "image,caption,Split\n" + "".join(f"{n},A,{OF[n]}\n" for n in SIX)
    },
    "a key of objects": {
        "captions.json": json.dumps({n: {"raw": "A", "split": OF[n]} for n in SIX})
    },
    "a key": {
        "x.jsonl": "".join(lines_of(s, split=LONG.get(s, s)) for s in ("train", "val", "test"))
    },
    "an object": {
        "captions.json": json.dumps({s: {n: ["A"] for n in SIX if OF[n] == s} for s in OF.values()})
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


def test_what_is_said_where_texts_are_no_captions_or_names_are_several(tmp_path):
    boxes = (
        "0 0.5 0.5 0.1 0.1\n1 .5 .5 .1 .1",  # YOLO's
        "gsd:0.1\n2753 2408 2861 2385 2888 2468 2805 2502 plane 0",  # DOTA's
        "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65",  # KITTI's
        "377,117,463,117,465,130,378,130,Genaxis Theatre",  # ICDAR's
    )
    for number, lines in enumerate(boxes):
        folder = lay_out(tmp_path / f"{number}", {"images/1.txt": lines})
        with pytest.raises(UserError, match="captions.json is missing"):
            check(folder)
    folder = lay_out(tmp_path / "b", {"captions.csv": "1.jpg,A\n"}, ["a/1.jpg", "b/1.jpg"])
    with pytest.raises(UserError, match=r"'1\.jpg' is wanted.*'a/1\.jpg' and more of that name"):
        check(folder)
    folder = lay_out(tmp_path / "c", {"captions.csv": "foto,caption\n1,A\n"})
    with pytest.raises(UserError, match="to name photos: call it image.* or name another file"):
        check(folder)


def test_lists_of_other_names_about_photos_of_their_own_are_told_how_to_become_parts(tmp_path):
    """As Localized Narratives' and RedCaps' are called."""
    names = "open_images_train_v6_captions.jsonl", "open_images_validation_captions.jsonl"
    folder = lay_out(tmp_path, {name: lines_of("train") for name in names}, SIX)
    with pytest.raises(UserError, match=r"validation_captions\.jsonl\?\)"):  # of the same photos
        check(folder)
    (folder / names[1]).write_text(lines_of("val"))
    with pytest.raises(UserError, match=r"\?, or several, each renamed like captions_train\.jsonl"):
        check(folder)
    (folder / names[0]).rename(folder / "captions_train.jsonl")
    (folder / names[1]).rename(folder / "captions_val.jsonl")
    assert len(prepared(folder)) == 5


def test_files_of_one_name_beside_their_photos_are_parts(tmp_path):
    folder = lay_out(tmp_path, {}, ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"])
    for kind in ("cat", "dog"):
        (folder / "images" / kind / "labels.csv").write_text(f"image,caption\n1.jpg,A {kind}\n")
    assert prepared(folder) == {"cat/1.jpg": ["A cat"], "dog/1.jpg": ["A dog"]}


def test_texts_in_a_folder_beside_the_photos_folder(tmp_path):
    folder = lay_out(tmp_path, {})
    (folder / "images").rename(folder / "photos")
    (folder / "captions").mkdir()
    for name in IDS:
        (folder / "captions" / name).with_suffix(".txt").write_text("A dog")
    assert prepared(folder) == {f"photos/{name}": ["A dog"] for name in IDS}


@pytest.mark.parametrize("given", [False, True])
def test_who_does_not_prepare_is_told_of_what_has_changed(tmp_path, given, capsys):
    folder = lay_out(tmp_path, {"captions.csv": rows("image,caption", "{},{}")})
    os.utime(folder / "captions.csv", (2**32,) * 2)  # as a zip from another time zone may have it
    flags = ["--captions_file", folder / "captions.csv"] if given else []
    assert check(folder, *flags) == 0
    settings = settings_of(folder, *flags)
    captions_search.say_outdated(settings, data_paths(settings))
    assert "has changed" not in capsys.readouterr().out
    before = time.time() - 9
    made = data_paths(settings).captions
    os.utime(made, (before, before))
    (folder / "captions.csv").write_text(rows("image,caption", "{},{}  "))  # to the same effect
    captions_search.say_outdated(settings, data_paths(settings))
    assert "captions.csv has changed, and" in capsys.readouterr().out
    assert check(folder, *flags) == 0
    capsys.readouterr()
    captions_search.say_outdated(settings, data_paths(settings))
    assert "has changed" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [False, True])
def test_who_does_not_prepare_is_told_of_questions_that_have_changed(tmp_path, given, capsys):
    folder = lay_out(tmp_path, {"vqa.json": json.dumps(QUESTIONS)})
    flags = ["--tasks", "questions", *(["--questions_file", folder / "vqa.json"] * given)]
    assert check(folder, *flags) == 0
    settings = settings_of(folder, *flags)
    for ago, said in ((0, False), (9, True)):
        made = data_paths(settings).questions
        before = time.time() + 1 - ago
        os.utime(made, (before, before))
        capsys.readouterr()
        captions_search.say_outdated(settings, data_paths(settings), "questions")
        assert ("vqa.json has changed, and" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg"),
        ("a.jpg", "A.JPG"),
        ("a.jpg", "a.png"),
        ("images/x/a.jpg", "a.jpg"),
        ("https://x.org/y/a.jpg", "a.jpg"),
        ("my%20photo.jpg", "my photo.jpg"),
        ("1.0", "1.png"),
        ("img.v1", "img.v1.jpg"),
        ("x/img.v1", "img.v1.jpg"),
        ("y/1.0", "x/1.png"),
        ("a.jpg", "deep/er/a.jpg"),
        ("x\\a.jpg", "x/a.jpg"),
        ("42.jpg", "COCO_val2014_000000000042.jpg"),
        ("/data/upload/1/0a1b2c3d-a.jpg", "a.jpg"),
        ("a:b.jpg", "a:b.jpg"),
        ("n" * 240 + ".jpg", "n" * 240 + ".jpg"),
    ],
)
def test_names_are_found_as_they_stand_on_disk(tmp_path, wanted, there, capsys):
    two = json.dumps({wanted: ["One"]})
    folder = lay_out(tmp_path, {"captions.json": two}, [there, "other.gif", "another.gif"])
    check_one = ["--train_split_ratio", 0.5, "--max_bad_images", 0]
    with pytest.raises(UserError, match="leaves no photo"):  # of one photo no two splits are made
        check(folder, *check_one)
    assert load_captions(paths_in(folder).captions) == {there: ["One"]}


def test_numbers_that_lost_their_zeros_are_found_beside_others_that_had_none():
    there = ["x/0007.jpg", "x/0070.jpg", "x/1000.jpg", "y/0007.jpg"]
    found = {"x/7": there[0], "x/70.jpg": there[1], "x/1000.jpg": there[2]}
    assert find_names([*found, "z/7.jpg"], there) == found


NAMESAKES = ["2.jpg", "b/2.JPG", "sub/2.jpg", "sub/deep/2.jpg", "6.jpg", "6.JPG", "a.jpg", "a.png"]


@pytest.mark.parametrize("above", ["", "images", "my_photos/images"])
def test_namesakes_in_several_folders_are_told_apart_by_these(above):
    given = {f"{above}/{name}".lstrip("/"): name for name in NAMESAKES}
    assert find_names(given, NAMESAKES) == given
    assert not find_names(["x/2.jpg", "y/2.jpg"], ["2.jpg"])
    gone = find_names(["x/sub/2.jpg", "x/gone/2.jpg"], NAMESAKES)
    assert gone == {"x/sub/2.jpg": "sub/2.jpg"}


def test_texts_in_a_folder_of_their_own_are_the_namesakes_in_theirs(tmp_path, capsys):
    folder = lay_out(tmp_path, {}, NAMESAKES)
    (folder / "texts/sub/deep").mkdir(parents=True)
    (folder / "texts/b").mkdir()
    for name in NAMESAKES:
        (folder / f"texts/{name}.txt").write_text(name.replace("/", " "))
    (folder / "texts/sub/2.jpg.txt").rename(folder / "texts/sub/2.txt")
    found = captions_search.read_texts_beside(folder / "images", folder / "texts").texts
    assert found == {name: [name.replace("/", " ")] for name in NAMESAKES}


def test_label_studios_tasks_and_lists_of_words(tmp_path, capsys):
    said = [{"result": [{"value": {"text": ["A dog"]}}, {"value": {"choices": ["x"]}}]}]
    said += [{"was_cancelled": True, "result": [{"value": {"text": ["A draft"]}}]}]  # was skipped
    task = {"id": 7, "annotations": said, "data": {"captioning": "/data/local-files/?d=1.jpg"}}
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    assert read_captions(tmp_path / "tasks.json").texts == {"1.jpg": ["A dog"]}
    said[0]["result"] = [
        {"from_name": "note", "value": {"text": ["Unsure"]}},
        {"from_name": "caption", "value": {"text": ["A dog"]}},
        {"from_name": "transcription", "value": {"x": 1, "y": 2, "text": ["STOP"]}},  # in a box
        {"type": "relation", "from_id": "a", "to_id": "b"},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    assert read_captions(tmp_path / "tasks.json").texts == {"1.jpg": ["A dog"]}
    (tmp_path / "tasks.json").write_text(json.dumps([{"data": {"image": "1.jpg"}}]))
    with pytest.raises(UserError, match="entry 1 names no photo and caption"):
        read_captions(tmp_path / "tasks.json")
    (tmp_path / "words.jsonl").write_text('{"image": "1.jpg", "caption": ["a", "dog", "is", "it"]}')
    read_captions(tmp_path / "words.jsonl").tell("words")
    assert "every caption is one word" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a b.zip", "--archive '.*a b.zip'"),
        ("a b.tar.gz", "; tars are unpacked by for f in "),  # each into a folder of its own
        ("1.tar 1.parquet 2.tar", "; tars are unpacked by for f in "),  # img2dataset's
        ("1.zip 2.zip", "2 zips are unpacked by find "),
    ],
)
def test_what_lies_there_in_place_of_photos_is_named(tmp_path, name, says):
    folder = lay_out(tmp_path, {"captions.csv": "image,caption\n1.jpg,A dog\n"}, [])
    for each in name.split(" ") if name[0] == "1" else [name]:
        (folder / each).touch()
    shutil.rmtree(folder / "images", ignore_errors=True)
    with pytest.raises(UserError, match=f"images is missing: .*{says}"):
        check(folder)
    (folder / "images").symlink_to("photos/here")
    with pytest.raises(UserError, match="images is a link to photos/here, which is not there"):
        check(folder)


def test_a_missing_photo_is_not_taken_for_one_of_another_folder(tmp_path):
    names = ["a/1.jpg", "b/1.jpg", "c/2.jpg", "n" * 300 + ".jpg"]
    table = json.dumps({name: ["A"] for name in names})
    folder = lay_out(tmp_path, {"captions.json": table}, ["a/1.jpg", "c/2.jpg"])
    assert set(prepared(folder)) == set(names)
    with pytest.raises(UserError, match="b/1.jpg"):
        prepare_dataset.prepare(settings_of(folder, "--max_bad_images", 0))


@pytest.mark.parametrize("root", ["C:\\me\\photos\\", "/data/", "data/images/"])
def test_folders_tell_photos_of_one_name_apart(tmp_path, root):
    table = {f"{root}{name}": [name] for name in ("a/1.jpg", "b/1.jpg", "c/2.jpg", "3.jpg")}
    there = ["a/1.jpg", "b/1.jpg", "d/2.jpg", "3.JPG"]
    found = prepared(lay_out(tmp_path, {"captions.json": json.dumps(table)}, there))
    photos = {name: captions for name, captions in found.items() if name in there}
    assert photos == {"a/1.jpg": ["a/1.jpg"], "b/1.jpg": ["b/1.jpg"], "3.JPG": ["3.jpg"]}
    assert len(found) == 4  # nor is another folder's photo taken for the one that is missing


def test_a_folder_without_photos_is_said(tmp_path):
    files = {"captions.json": '{"1.jpg": ["A"]}', "images/1.heic": "x"}
    folder = lay_out(tmp_path, files, ["1.jpg"])
    (folder / "images" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"images holds no photo \(\.avif, .*--image_dir"):
        check(folder)


def test_no_name_that_fits_is_said_with_one_of_each(tmp_path):
    folder = lay_out(tmp_path, {"captions.json": '{"x.jpg": ["X"]}'})
    with pytest.raises(UserError, match=r"'x\.jpg' is wanted, and .* holds '1\.jpg'.*--image_dir"):
        check(folder)


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.json", "[" * 100_000),
        ("captions.json", '{"1.jpg": ' + "9" * 5000 + "}"),
        ("captions.json", '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}'),
        ("captions.json", '{"data": 5}'),
        ("captions.json", '{"1.jpg": ' + "[" * 900 + "]" * 900 + "}"),
        ("captions.json", '["1.jpg"]'),
        ("captions.jsonl", "{" + '"a":{' * 50_000),
        ("captions.csv", "photo_key,words\n1.jpg,A dog\n"),
        ("captions.json", '[{"image": "1.jpg", "caption_choices": ["A dog", "B"]}]'),
        ("captions.csv", "image,split\n1.jpg,train\n"),
        ("captions.csv", "image,prompt,response\n1.jpg,Describe it,A dog\n"),
        ("captions.csv", 'id,image,caption\n1,1.jpg,"Stop\n2,2.jpg,Go\n3,3.jpg,"No" way\n'),
        ("captions.csv", 'image_id,title,caption\n1,"A big,B\n2,C,D\n3,"A small,E\n'),
        ("captions.csv", '1.jpg,"A dog",train\n'),
        ("captions.csv", "1.jpg\tA dog\ttrain\n"),
        ("captions.csv", "7\t1.jpg\tA dog\t0.87\n"),
        ("captions.csv", "1.jpg\t2021-11-06\tA dog\n"),
        ("captions.csv", "1,A dog,1.jpg\n"),
        ("captions.csv", "7,1.jpg\n8,2.jpg\n"),
        ("captions.csv", "1.jpg\tA dog\tdog&&cat\t" + 9 * "/9j/4AAQ" + "\n"),
        ("captions.csv", "PK\3\4 a workbook"),
        ("captions.csv", "version https://git-lfs.github.com/spec/v1\n"),
        ("captions.csv", 'image,caption,split\n1.jpg,"' + "x" * 200_000 + '",train\n'),
    ],
)
def test_what_is_no_form_is_refused_in_a_line(tmp_path, name, text):
    folder = lay_out(tmp_path, {name: text})
    with pytest.raises(UserError, match=re.escape(str(folder / name))) as caught:
        check(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


NAMESAKE_ROWS = {"x/1.jpg": ["A"], "y/1.jpg": ["B"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,caption,split\na.jpg,A dog, running,train", {"a.jpg": ["A dog, running"]}),
        ("split,caption,image\ntrain,A, B,a.jpg", {"a.jpg": ["A, B"]}),
        ('id,image,caption\n1,a.jpg,"A ""b"", c"', {"a.jpg": ['A "b", c']}),
        ("image,caption_1,caption_2\na.jpg,A,B\n", {"a.jpg": ["A", "B"]}),
        ("image,caption,x\n1000,A,1\n", {"1000": ["A"]}),
        ("image,caption\n1000,A\n", {"1000": ["A"]}),
        (
            "image_id,image_file,caption\n1,6.jpg,six\n2,5.jpg,five",
            {"6.jpg": ["six"], "5.jpg": ["five"]},
        ),
        ("image,path,caption\nhttp://x/1.png,6.jpg,six\n", {"6.jpg": ["six"]}),
        ("filename,comment,description\n1.jpg,todo,A dog runs\n", {"1.jpg": ["A dog runs"]}),
        ("image,text,caption\n1.jpg,Stop and go now,A sign\n", {"1.jpg": ["A sign"]}),
        ("image,sentence,raw\n1.jpg,0,A dog\n", {"1.jpg": ["A dog"]}),
        ("image,Description 1,Description 2\n1.jpg,A,B\n", {"1.jpg": ["A", "B"]}),
        ("image,caption,caption_2\n1.jpg,A,B\n", {"1.jpg": ["A", "B"]}),
        ("image,caption,caption\n1.jpg,A,B\n", {"1.jpg": ["A", "B"]}),
        ('id,image,caption\n1,1.jpg,"A\nB"\n2,2.jpg,C', {"1.jpg": ["A\nB"], "2.jpg": ["C"]}),
        ('image,caption\n1.jpg,"A\nB"\n2.jpg,C', {"1.jpg": ["A\nB"], "2.jpg": ["C"]}),
        ('image,caption\n1.jpg,"A, B\nC, D\n"\n2.jpg,C', {"1.jpg": ["A, B\nC, D"], "2.jpg": ["C"]}),
        (
            'caption,image\n"A, B\nC, D",1.jpg\n"C, ""D""",2.jpg',
            {"1.jpg": ["A, B\nC, D"], "2.jpg": ['C, "D"']},
        ),
        ('caption,image\n"A, B,1.jpg\nC,2.jpg', {"1.jpg": ['"A, B'], "2.jpg": ["C"]}),
        ('1.jpg,"A dog","Two dogs"\n2.jpg,"B"', {"1.jpg": ["A dog", "Two dogs"], "2.jpg": ["B"]}),
        ("1.jpg\tA dog\tTwo dogs", {"1.jpg": ["A dog", "Two dogs"]}),
        ('image,caption\n1.jpg,"A \\"big\\" dog"', {"1.jpg": ['A "big" dog']}),
        ("image,caption\n1.jpg,\"['A dog', None]\"", {"1.jpg": ["A dog"]}),
        ("image,caption\n1.jpg,\"['My nan', nan]\"", {"1.jpg": ["My nan"]}),
        ('image,caption\n1.jpg,"{""text"": [""A"", ""B""], ""number"": 2}"', {"1.jpg": ["A", "B"]}),
        ('image,caption\n1.jpg,"{""x"": 2}"\n1.jpg,B', {"1.jpg": ["B"]}),
        ("image,caption\n1.jpg,\"('A', 'B')\"", {"1.jpg": ["A", "B"]}),
        ("image,caption\n1.jpg,\"[{'raw': 'A', 'tokens': ['a']}]\"", {"1.jpg": ["A"]}),
        ("image,caption\n1.HEIC,A\n1.jpg,B\n", {"1.jpg": ["B"]}),
        ("image,caption\nv1.1,A\ntrain/1,B\n", {"v1.1": ["A"], "train/1": ["B"]}),
        ("image,caption\n1.jpg,NaN\n2.jpg,#N/A\n4.jpg,#NAME?\n3.jpg,A\n", {"3.jpg": ["A"]}),
        (",caption\n1.jpg,A\n", {"1.jpg": ["A"]}),  # by pandas' index
        ("image,caption\n1.jpg,A\nimage,caption\n2.jpg,B\n", {"1.jpg": ["A"], "2.jpg": ["B"]}),
        ("image,caption\n\u202a1.jpg,A\n\ufeff2.jpg,B\n", {"1.jpg": ["A"], "2.jpg": ["B"]}),
        (",image,caption\n0,1.jpg,A\n", {"1.jpg": ["A"]}),
        ("image,caption\n1.jpg,None\n3.jpg,A\n", {"1.jpg": ["None"], "3.jpg": ["A"]}),
        ("photo,caption\n1.jpg (https://x.org/a/9),A\n", {"1.jpg": ["A"]}),  # as Airtable has it
        ("image_url,caption\nhttps://x.org/1.jpg?w=2,A\n", {"https://x.org/1.jpg": ["A"]}),
        ("image,caption_1,caption_2\n1.jpg,A, B,C\n2.jpg,D,E", {"2.jpg": ["D", "E"]}),
        ("image,caption\n1.jpg,A,,\n2.jpg,B, C,\n", {"1.jpg": ["A"], "2.jpg": ["B, C"]}),
        ("image,caption,note\n1.jpg,A, B,\n", {"1.jpg": ["A, B"]}),
        # As people keep them: the photo last, and other signs after its name, or comments first.
        ('"A, B",x (1).png\nC,x (2).png', {"x (1).png": ["A, B"], "x (2).png": ["C"]}),
        ("A, B,1.jpg\nC,2.jpg\n", {"1.jpg": ["A, B"], "2.jpg": ["C"]}),
        ("1.jpg#0@Two@dogs\n1.jpg#1@A: B , C", {"1.jpg": ["Two@dogs", "A: B , C"]}),
        ("# image: caption\n# 2 rows\n\n1.jpg: A, B: C\n", {"1.jpg": ["A, B: C"]}),
        ("a b.jpg: A\nc.jpg:B", {"a b.jpg": ["A"], "c.jpg": ["B"]}),
        ("C:/1.jpg A dog: B\n", {"1.jpg": ["A dog: B"]}),
        ("1.jpg ### A - B\n2.jpg C ### D", {"1.jpg": ["A - B"], "2.jpg": ["C ### D"]}),
        ("1.jpg 10 dogs\n2.jpg 2 cats", {"1.jpg": ["10 dogs"], "2.jpg": ["2 cats"]}),
        ("1.jpg,A\n2.jpg,10,000 dogs", {"1.jpg": ["A"], "2.jpg": ["10,000 dogs"]}),
        ("1.jpg: 10:30 A\n2.jpg: B", {"1.jpg": ["10:30 A"], "2.jpg": ["B"]}),
        ("1.jpg\tA\t-\n2.jpg\tB\tC", {"1.jpg": ["A"], "2.jpg": ["B", "C"]}),
        ("1.jpg@2x.jpg,A\n", {"1.jpg@2x.jpg": ["A"]}),
        ("# ,image,caption,split\n0,1.jpg,A,train\n", {"1.jpg": ["A"]}),
        ("# caption,image\nA,1.jpg\n", {"1.jpg": ["A"]}),
        ("# MSVD\n#\n1.jpg A dog\n", {"1.jpg": ["A dog"]}),
        ("image,title,caption_1,caption_2\n1.jpg,A long title,A,B\n", {"1.jpg": ["A", "B"]}),
        ("photo_id,label,caption\n-x_1,food,A\n", {"-x_1": ["A"]}),  # Yelp's
        (
            "SourceFile,Title,Caption-Abstract\n./1.jpg,T,A dog\n",
            {"1.jpg": ["A dog"]},
        ),  # exiftool's
        ("SourceFile,EXIF:ImageDescription\n./1.jpg,A dog\n", {"1.jpg": ["A dog"]}),
        (  # as WIT has them: an article's text is none
            "image_url,context_page_description,caption_reference_description\n"
            "x/1.jpg,Dogs are animals that bark,A red dog\n",
            {"x/1.jpg": ["A red dog"]},
        ),
        (  # VGG Image Annotator's
            "filename,file_size,file_attributes,region_count,region_attributes\n"
            '1.jpg,12,"{""quality"":""good"",""caption"":""A, B""}",0,"{}"\n2.jpg,9,"{}",0,"{}"\n',
            {"1.jpg": ["A, B"]},
        ),
        # Namesakes in several folders are told apart by the column that has these, and only then.
        ("FileName,path,caption\n1.jpg,x/1.jpg,A\n1.jpg,C:\\y\\1.jpg,B\n", NAMESAKE_ROWS),
        ("filename,crop,caption\n1.jpg,x/1_1.jpg,A\n1.jpg,x/2_1.jpg,B\n", {"1.jpg": ["A", "B"]}),
        ("filename,path,caption\n1.jpg,x/1.jpg,A\n", {"1.jpg": ["A"]}),
        # Toloka's, and Mechanical Turk's, of which the task's own description is no caption.
        (
            "INPUT:image\tOUTPUT:caption\tGOLDEN:caption\tHINT:text\tASSIGNMENT:status\n"
            "1.jpg\tA\t\t\tAPPROVED\n2.jpg\tB\t\t\tREJECTED\n",
            {"1.jpg": ["A"]},
        ),
        *(
            (
                f"Title,Description,AssignmentStatus,Input.image_url,Input.caption,Answer.{said}\n"
                + "".join(
                    f"Task,Write what you see,Approved,{n}.jpg,x,{cell.format(n)}\n"
                    for n in range(10)
                )
                + "Task,Write what you see,Rejected,10.jpg,x,No\n",
                {f"{n}.jpg": [f"Dog {n}"] for n in range(10)},
            )
            for said, cell in (
                ("caption", "Dog {}"),
                ("description", "Dog {}"),
                ("taskAnswers", '"[{{""caption"":""Dog {}""}}]"'),
            )
        ),
    ],
)
def test_the_header_decides(tmp_path, text, expected):
    (tmp_path / "table.csv").write_text(text)
    assert read_captions(tmp_path / "table.csv").texts == expected


COCO_OF_STRINGS = {**COCO, "images": [i | {"id": str(i["id"])} for i in COCO["images"]]}
AB = {"1.jpg": ["A"], "2.jpg": ["B"]}
VIA = {
    f"{n}.jpg99": {"filename": f"{n}.jpg", "size": 99, "regions": [], "file_attributes": told}
    for n, told in ((1, {"caption": "A", "public": "no"}), (2, {"caption": "B"}))
}
ROWS = [{"image_id": "1.jpg", "caption": "A"}, {"image_id": 42, "caption": "B"}]


def talk(who: str, what: str, one: str, other: str, answer: str) -> list[dict]:
    return [{who: one, what: "<image>\nDescribe it."}, {who: other, what: answer}]


TWICE = [*talk("from", "value", "x", "gpt", "C"), *talk("from", "value", "x", "gpt", "D")]
TWICE[2]["value"] = "Can you describe its colour?"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (COCO_OF_STRINGS, EXPECTED),
        ({**COCO, "annotations": [{"image_id": 1, "caption": None}]}, {}),
        ({"annotations": ROWS}, {"1.jpg": ["A"], "42": ["B"]}),
        ({"data": ROWS}, {"1.jpg": ["A"], "42": ["B"]}),
        ({"data": [{"image_id": "1.jpg", "caption_str": "A"}]}, {"1.jpg": ["A"]}),
        ({"data": [{"image_id": "1", "reference_strs": ["A", "B"]}]}, {"1": ["A", "B"]}),
        ({"images": [{"filename": "1.jpg", "sentences": None}]}, {}),
        (
            {"images": [{"filename": "1.jpg", "sentences": [{"tokens": ["a", "dog"]}]}]},
            {"1.jpg": ["a dog"]},
        ),
        ({"1.jpg": ["A", ""], "2.jpg": {"tags": "x"}}, {"1.jpg": ["A"]}),
        ({"1.jpg": ["A", None], "2.jpg": [], "3.jpg": None}, {"1.jpg": ["A"]}),
        ({"1.jpg": [{"caption": "A"}], "2.jpg": {"sentences": [{"raw": "B"}]}}, AB),
        ({"images": [{"file_name": "1.jpg", "captions": ["A"]}]}, {"1.jpg": ["A"]}),
        (
            {
                "images": [{"id": 1, "filename": "1.jpg"}],
                "annotations": [
                    {"image_id": 1, "captions": ["A"]},
                    {"image_id": 1, "caption": "Bad photo", "is_rejected": True},
                ],
            },
            {"1.jpg": ["A"]},
        ),
        ({"train": {"1.jpg": ["A"]}, "val": [{"image": "2.jpg", "caption": "B"}]}, AB),
        ({n: {"image": f"{3 - n}.jpg", "caption": "BA"[n - 1]} for n in (1, 2)}, AB),
        ({"image": ["1.jpg", "2.jpg"], "caption": ["A", "B"]}, AB),
        ({"image": "1.jpg", "caption": "A dog"}, {"1.jpg": ["A dog"]}),
        ({"image": {"0": "1.jpg", "1": "2.jpg"}, "caption": {"0": "A", "1": "B"}}, AB),
        ([{"image_id": n, "img": f"{3 - n}.jpg", "caption": "BA"[n - 1]} for n in (1, 2)], AB),
        ([["1.jpg", "A"], ["2.jpg", "B"]], AB),
        (
            {
                "version": 1,
                "captions": [{"image": f"{n}.jpg", "text": "AB"[n - 1]} for n in (1, 2)],
            },
            AB,
        ),
        (
            {"data": [{"image_path": "1.jpg", "caption_str": "A", "reference_strs": ["A", "B b"]}]},
            {"1.jpg": ["A"]},  # TextCaps has a row for each of its references
        ),
        (
            [
                {"image": "1.jpg", "prefix": "caption en", "suffix": "A"},
                {"image": "2.jpg", "prefix": "<DETAILED_CAPTION>", "suffix": "B"},
                {"image": "2.jpg", "prefix": "what is red?", "suffix": "C"},
            ],
            AB,
        ),
        (
            [
                {"image": "1.jpg", "instruction": "Describe it in a sentence.", "response": "A"},
                {"image": "2.jpg", "instruction": "Write a caption", "input": "", "output": "B"},
                {"image": "2.jpg", "prompt": "What is red here, please?", "completion": "C"},
                {"image": "2.jpg", "instruction": "What is red?", "response": "C"},
            ],
            AB,  # a prompt is the caption only where nothing answers it
        ),
        (
            [
                {"img": "1.jpg", "prompt": "描述这张图片。", "label": "A"},  # as VisualGLM has them
                {"images": ["2.jpg"], "query": "<image>Describe it.", "response": "B"},  # ms-swift
                {"imgname": "3.jpg", "query": "Find the sum", "label": "14"},  # ChartQA
                {"image": "4.jpg", "prompt": "What is red?", "answer": "a dog"},
            ],
            AB,
        ),
        (  # ControlNet's
            [{"source": "9.jpg", "target": f"{n}.jpg", "prompt": "AB"[n - 1]} for n in (1, 2)],
            AB,
        ),
        ([{"image": f"{n}.jpg", "prompt": "Is it?", "text": "AB"[n - 1]} for n in (1, 2)], AB),
        (
            [{"image": "1.jpg", "prompt": "A? B", "label": 1}] * 2
            + [{"image": f"{n}.jpg", "prompt": "a b", "label": "fake"} for n in (2, 3, 4)],
            {"1.jpg": ["A? B"] * 2, "2.jpg": ["a b"], "3.jpg": ["a b"], "4.jpg": ["a b"]},
        ),
        ([{"Image Path": " 1.jpg", "Caption": "A"}, {"image-path": "2.jpg", "caption": "B"}], AB),
        ({"version": 1, "1.jpg": ["A"], "2.jpg": "B"}, AB),
        ([{"image": "1.HEIC", "text": "X"}, {"image": "1.jpg", "text": "A"}], {"1.jpg": ["A"]}),
        ([{"image": {"path": "1.jpg"}, "text": "A"}, {"images": ["2.jpg"], "text": "B"}], AB),
        (
            [{"image": [*AB], "text": "X"}, {"image": "1.jpg", "text": "A"}],
            {"1.jpg": ["A"]},  # what is said of two photos is passed over, as a question is
        ),
        (
            [
                {"image": "1.jpg", "conversations": talk("from", "value", "human", "gpt", "A")},
                {"images": ["2.jpg"], "messages": talk("role", "content", "user", "model", "B")},
                {"image": "3.jpg", "conversations": TWICE},
                {"id": "1", "messages": talk("role", "content", "user", "model", "Hi")},
            ],
            AB | {"3.jpg": ["C"]},  # of several answers those to who asks for a caption
        ),
        (
            [
                {
                    "id": str(3 - n),
                    "conversations": [
                        {"from": "user", "value": f"Picture 1: <img>{n}.jpg</img>\nDescribe it"},
                        {"from": "assistant", "value": "AB"[n - 1]},
                    ],
                }
                for n in (1, 2)
            ],
            AB,  # as Qwen-VL has it: the number is not the photo's
        ),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image", **shown}, {"text": "Hi"}]},
                        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    ]
                }
                for shown, answer in (
                    ({"image": "1.jpg"}, "A"),
                    ({"image_url": {"url": "2.jpg"}}, "B"),
                    ({"image_url": {"url": "data:image/jpeg;base64,9j"}}, "C"),
                )
            ],
            AB,
        ),
        ([{"id": f"{n}.jpg", "name": "x", "caption": "AB"[n - 1]} for n in (1, 2)], AB),
        ({"1.jpg": ["A", float("nan")], "2.jpg": ["B"]}, AB),
        ({"version": 1, "captions": AB}, AB),
        (  # VGG Image Annotator's project, and its export, which is the object below the second key
            {"_via_settings": {"ui": {"name": "x"}}, "_via_img_metadata": VIA, "_via_version": "2"},
            AB,
        ),
        (VIA, AB),
        ([{"url": "x/1.jpg", "image_id": 7, "paragraph": "A"}], {"x/1.jpg": ["A"]}),  # Stanford's
        ({"data": [{"image": n} | {"caption": AB[n][0]} for n in AB], "urls": {"1.jpg": "x"}}, AB),
        ({"annotations": AB}, AB),
        (
            {"columns": ["image", "caption"], "data": [{"image": n, "caption": AB[n]} for n in AB]},
            AB,
        ),
        ({"columns": ["image", "caption"], "index": [0, 1], "data": [*AB.items()]}, AB),  # pandas
        ({kind: [{"filename": f"{kind}.jpg", "raw": AB[f"{kind}.jpg"]}] for kind in "12"}, AB),
        ([{"image": "1.jpg", "caption_1": "A", "caption_2": "B"}], {"1.jpg": ["A", "B"]}),
        (
            [{"image": "x-1", "text": "A"}, {"images": "2", "captions": ["B"]}],
            {"x-1": ["A"], "2": ["B"]},
        ),
        (
            [
                {"title": "me irl", "img_fname": f"{n}.jpg", "img_captions": ["AB"[n - 1]]}
                for n in (1, 2)  # as MemeCap has them
            ],
            AB,
        ),
        ([{"filename": "1.jpg", "raw": "A", "raw_1": "B"}], {"1.jpg": ["A", "B"]}),
        *(  # an object's own number is not its photo's
            ([{"id": 1, key: 7, "caption": "A"}], {"7": ["A"]})
            for key in ("picture", "coco_id", "cocoid", "imgid")
        ),
        (  # what says why a caption is missing is none
            [
                {"image": "1.jpg", "caption": "A", "comment": "", "title": "x"},
                {"image": "2.jpg", "caption": "", "comment": "blurry, skip", "title": "y"},
            ],
            {"1.jpg": ["A"]},
        ),
        ({n: {"caption": AB[n][0] * (n == "1.jpg"), "title": "x"} for n in AB}, {"1.jpg": ["A"]}),
        ({n: {"tags": ["x"], "vibe_description": AB[n][0]} for n in AB}, AB),
        ({n: {"title": "x", "blip_caption": AB[n][0]} for n in AB}, AB),
        ({"1.jpg": {"caption_1": "A", "caption_2": "B"}}, {"1.jpg": ["A", "B"]}),
        ([{"question_id": 1, "image": "1.jpg", "text": "How many points?\nAnswer in a word."}], {}),
        ({"image_urls": ["http://x/1.jpg"], "captions": ["A"]}, {"http://x/1.jpg": ["A"]}),  # SBU
        (
            [
                {"path": f"{n}.jpg", "caption": said, "answer": judged, "_task_hash": 1}  # Prodigy
                for n, said, judged in ((1, "A", "accept"), (2, "B", "accept"), (3, "C", "reject"))
            ],
            AB,
        ),
        (
            [
                {"image": f"{n}.jpg", "question_text": "x y", "blip_caption": "AB"[n - 1]}
                for n in (1, 2)
            ],
            AB,
        ),
    ],
)
def test_json_of_other_people(tmp_path, table, expected):
    path = tmp_path / "table.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(json.dumps(table), encoding=encoding)
        found = read_captions(path)
        assert found.texts == expected and (expected or found.passed)


def test_json_lines_in_a_file_of_another_name(tmp_path):
    (tmp_path / "table.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read_captions(tmp_path / "table.json").texts == {"1.jpg": ["A"], "42": ["B"]}


def test_a_part_that_comes_later_is_said_until_it_is_read(tmp_path, capsys):
    folder = lay_out(tmp_path / "a b", {"train.jsonl": lines_of("train")}, SIX)
    (folder / "test.csv").write_text("image\n" + "\n".join(n for n in SIX if OF[n] == "test"))
    assert len(prepared(folder)) == len(prepared(folder)) == 4
    assert "came" not in capsys.readouterr().out  # of what holds no captions
    (folder / "val.jsonl").write_text(lines_of("val"))
    assert len(prepared(folder)) == 4
    [remedy] = re.findall(r"made before \S.*/val\.jsonl came: (rm .*) has", capsys.readouterr().out)
    assert os.system(remedy) == 0
    assert len(prepared(folder, "--split", "karpathy")) == len(prepared(folder)) == 5
    assert "came" not in capsys.readouterr().out


def test_two_tables_are_said(tmp_path, capsys):
    table = rows("image,caption", "{},{}")
    folder = lay_out(tmp_path, {"captions.csv": table, "metadata.csv": table})
    assert prepared(folder) == EXPECTED
    assert "captions.csv, not from" in capsys.readouterr().out


def test_captions_of_ones_own_give_way_to_no_newer_table(tmp_path, capsys):
    own = json.dumps({name: ["My own words"] for name in IDS})
    folder = lay_out(tmp_path / "a b", {"captions.json": own})
    os.utime(folder / "captions.json", (1, 1))
    for name in ("captions.csv", "metadata.csv"):  # as inference.py writes them
        (folder / "images" / name).write_text(rows("image,caption", "{},{}"))
    assert prepared(folder) == json.loads(own)
    said = capsys.readouterr().out
    assert "delete" not in said and "not from" not in said
    [flags] = re.findall(r"used: (--captions_file '.*') takes the former", said)
    assert check(folder, *shlex.split(flags)) == 0 and "is newer" not in capsys.readouterr().out
    assert load_captions(paths_in(folder, CAPTIONS_FILE=shlex.split(flags)[1]).captions) == EXPECTED
    assert (folder / "captions.json").read_text() == own


def test_a_table_that_was_renamed_and_then_corrected_is_said(tmp_path, capsys):
    folder = lay_out(tmp_path, {"captions.csv": rows("image,caption", "{},{}")})
    assert prepared(folder) == EXPECTED
    renamed = (folder / "captions.csv").rename(folder / "my words.csv")
    capsys.readouterr()
    assert prepared(folder) == EXPECTED and "newer" not in capsys.readouterr().out  # the same
    os.utime(renamed, (2**32,) * 2)
    assert prepared(folder) == EXPECTED
    assert re.search("my words.csv is newer .* takes the former", capsys.readouterr().out)


def settings_of(folder: Path, *flags: object):
    argv = ["--dataset", "custom", "--data_dir", folder, "--split", "ratio", *flags]
    parser = Parser("")
    commands.add_sources(parser)
    return load_settings(config, [str(text) for text in argv], parser)


def test_vqa_files_of_other_people(tmp_path, capsys):
    asked = {"questions": [{"question_id": 1, "question": "Which?", "image_id": 42}]}
    answered = {
        "annotations": [
            {"question_id": 1, "image_id": 42, "answers": ["red", "red", "blue"]},
            {"question_id": 2, "image_id": 42, "answer": "lost"},
        ]
    }
    asked["questions"] += [{"question_id": n, "question": "How many?"} for n in (3, 4, "5")]
    asked["questions"] += [{"question_id": 6, "question": None}]
    own = ({"answer": 0}, {"answers": [{"answer": ""}]}, {"answers": [2]}, {"answer": "x"})
    answered["annotations"] += [
        {"question_id": n, "image_id": 42} | answer for n, answer in enumerate(own, 3)
    ]
    folder = lay_out(tmp_path / "d", {}, ["COCO_val2014_000000000042.jpg"])
    for name, table in (("q", asked), ("a", answered)):
        (tmp_path / name).write_text(json.dumps(table))
    files = [str(tmp_path / "q")], [str(tmp_path / "a")]
    convert_vqa(*files, folder / "questions.json", folder / "images")
    found = load_questions(folder / "questions.json")
    assert [text.target for text in found["COCO_val2014_000000000042.jpg"]] == ["red", "0", "2"]
    assert "passed over: 3 annotations" in capsys.readouterr().out


def test_karpathy_splits_photos_in_folders(tmp_path):
    splits = ["train", "val", "test"]
    images = [i | {"split": s} for i, s in zip(KARPATHY["images"], splits, strict=True)]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    for names in (list(IDS), [f"val2014/{name}" for name in IDS], [f"x/{name}" for name in IDS]):
        found = split_by_karpathy(names, tmp_path / "k.json")
        assert found == {split: [name] for split, name in zip(splits, names, strict=True)}


# --- The check --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", "image,caption\n0.jpg,a dog\n1.jpg,\n"),
        ("captions.tsv", "image\tsize\tcaption\n0.jpg\t3\ta dog\n1.jpg\t3\t \n"),
        ("captions.txt", "0.jpg,a dog\n1.jpg,\n"),
        ("a.jsonl", '{"image": "0.jpg", "text": "a dog"}\n{"image": "1.jpg", "text": null}'),
        ("a.json", '[{"image": "0.jpg", "text": "a dog"}, {"image": "1.jpg", "text": " "}]'),
    ],
)
def test_a_photo_without_a_caption_is_passed_over_and_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = read_captions(tmp_path / name)
    assert found.texts == {"0.jpg": ["a dog"]}
    (line,) = found.passed
    assert "1.jpg" in line and str(tmp_path / name) in line


@pytest.mark.parametrize("file", ["captions.csv", "images/1.txt", "dataset_x.json"])
def test_captions_are_made_anew_when_their_source_changes(tmp_path, file, capsys):
    """Also where the file has an older date, as those that are copied have."""
    old, new = (
        {
            "captions.csv": f"image,caption\n1.jpg,{word}\n2.jpg,B\n",
            "images/1.txt": word,
            "dataset_x.json": json.dumps(KARPATHY).replace("A red dog", word),
        }[file]
        for word in ("An old dog", "A new cat")
    )
    others = {"images/2.txt": "B"} if "images" in file else {}
    folder = lay_out(tmp_path, {file: old, **others})
    assert prepared(folder)["1.jpg"][0] == "An old dog"
    (folder / file).write_text(new)
    os.utime(folder / file, (1, 1))
    assert prepared(folder)["1.jpg"][0] == "A new cat"
    assert "has changed: captions.json is made anew" in capsys.readouterr().out
    mine = {"1.jpg": ["Mine"], "2.jpg": ["B"]}
    (folder / "captions.json").write_text(json.dumps(mine))
    (folder / file).write_text(old)
    assert prepared(folder) == mine  # what people wrote themselves is kept


@pytest.mark.parametrize("file", ["captions.csv", "images/1.txt"])
def test_captions_saved_while_they_are_read_are_read_again(tmp_path, file, monkeypatch):
    """Thousands of texts take seconds, in which somebody writes on; a copy keeps its older date."""
    old, new = (
        f"image,caption\n1.jpg,{said}\n2.jpg,B\n" if file.endswith("csv") else said
        for said in ("A dog", "A cat that sleeps")
    )
    folder = lay_out(tmp_path, {"images/2.txt": "B"} | {file: old})
    find = captions_search.find_captions

    def find_while_it_is_saved(*args):
        found = find(*args)
        time.sleep(0.02)  # a file's times are in steps
        (folder / file).write_text(new)
        os.utime(folder / file, (1, 1))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(captions_search, "find_captions", find_while_it_is_saved)
        assert prepared(folder)["1.jpg"] == ["A dog"]
    assert prepared(folder)["1.jpg"] == ["A cat that sleeps"]


def test_a_table_of_a_later_date_that_says_the_same_is_what_captions_json_holds(tmp_path, capsys):
    """As one that was saved without a change, or comes from a clock that is ahead."""
    folder = lay_out(tmp_path, {"captions.csv": "image,caption\n1.jpg,A dog\n2.jpg,B\n"})
    prepared(folder)
    os.utime(folder / "captions.csv", (2**32, 2**32))
    prepared(folder)
    assert "is newer" not in capsys.readouterr().out


@pytest.mark.parametrize("before", [False, True], ids=["the first", "a later one"])
def test_captions_are_followed_after_a_preparation_that_failed(tmp_path, before):
    """As it has made captions.json, the next one must not take that for the user's own."""
    folder = lay_out(tmp_path, {"labels.csv": "image,caption\n1.jpg,A dog\n2.jpg,B\n"})
    if before:
        prepared(folder)
    lost = "".join(f"gone{number}.jpg,C\n" for number in range(11))
    (folder / "labels.csv").write_text(f"image,caption\n1.jpg,A cat\n2.jpg,B\n{lost}")
    with pytest.raises(UserError, match="take them out of the captions"):
        prepare_dataset.prepare(settings_of(folder))
    (folder / "labels.csv").write_text("image,caption\n1.jpg,A cow\n2.jpg,B\n")
    assert prepared(folder) == {"1.jpg": ["A cow"], "2.jpg": ["B"]}


def test_what_programs_write_for_no_caption_is_passed_over_beside_photos_too(tmp_path):
    said = dict(zip(IDS, ["A dog", "nan", "None"], strict=False))
    folder = lay_out(tmp_path, {f"images/{n[:-4]}.txt": text for n, text in said.items()})
    found = captions_search.read_texts_beside(folder / "images")
    assert found.texts == {"1.jpg": ["A dog"]} and len(found.passed) == 2


def test_what_databases_and_scripts_write_for_no_caption_is_passed_over(tmp_path):
    """R's NA, MySQL's and PostgreSQL's \\N, JavaScript's undefined."""
    rows = ["1.jpg\tA dog", *(f"{n}.jpg\t{text}" for n, text in enumerate(NOTHING, 2))]
    (tmp_path / "all.tsv").write_text("\n".join(rows))
    found = read_captions(tmp_path / "all.tsv")
    assert found.texts == {"1.jpg": ["A dog"]} and len(found.passed) == len(NOTHING)
    assert {"NA", "\\N", "undefined"} <= {*NOTHING}


def written_by_hand(place: str, text: str) -> dict[str, str]:
    """Files that say `text` of 1.jpg and 2.jpg, which for metadata in a sub-folder lie there."""
    if place == "images/1.txt":
        return {place: text, "images/2.txt": text}
    names = ("1.jpg", "2.jpg")
    lines = [json.dumps({"file_name": name, "text": text}) for name in names]
    table = "file_name,text\n" + "".join(f"{name},{text}\n" for name in names)
    return {place: table if place.endswith("csv") else "\n".join(lines)}


@pytest.mark.parametrize("written", ["images/captions.csv", "images/metadata.jsonl"])
@pytest.mark.parametrize(
    "place", ["images/1.txt", "images/x/metadata.jsonl", "mine.csv", "images/metadata.csv"]
)
def test_what_a_model_wrote_is_not_taken_for_what_people_wrote(tmp_path, place, written):
    names = [f"{'x/' * ('x/' in place)}{n}.jpg" for n in (1, 2)]
    folder = lay_out(tmp_path, {}, names)
    for text in ("Said", "Said anew"):  # when theirs changes it is read again, and no other
        for file, content in written_by_hand(place, text).items():
            (folder / file).write_text(content)
        assert prepared(folder) == {name: [text] for name in names}
        machine = rows_of({name: ["Written"] for name in names})
        (folder / written).write_text(machine[os.path.basename(written)])
        assert prepared(folder) == {name: [text] for name in names}


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


def test_a_table_that_lies_there_twice_counts_once(tmp_path):
    table = "image_name| comment_number| comment\n" + "".join(f"{n}| 0| {t}\n" for n, t in PAIRS)
    (tmp_path / "images" / "inner").mkdir(parents=True)
    for place in ("images/list.csv", "images/inner/list.csv"):
        (tmp_path / place).write_text(table)
    for name in IDS:
        Image.new("RGB", (70, 70)).save(tmp_path / "images" / "inner" / name)
    found = prepared(tmp_path)
    assert found == {f"inner/{name}": texts for name, texts in EXPECTED.items()}


def test_a_list_of_numbers_is_found_by_the_photos_it_means(tmp_path):
    names = {f"COCO_val2014_{n:012}.jpg": n for n in (1, 2, 3)}
    lines = [json.dumps({"image_id": str(n), "caption": "A dog"}) for n in names.values()]
    folder = lay_out(tmp_path, {"narratives_val.jsonl": "\n".join(lines)}, [*names])
    assert prepared(folder) == dict.fromkeys(names, ["A dog"])


def test_a_word_that_answers_a_question_is_no_caption(tmp_path):
    said = {
        "1.jpg": ("How many dogs?", "Two"),
        "2.jpg": ("What is this about?", "Two dogs run off"),
    }
    said["3.jpg"] = ("Describe it.", "Dogs")
    said["4.jpg"] = ("这是谁？", "他是来自拜仁慕尼黑的托马斯")
    said["5.jpg"] = ("<OD>", "table<loc_92><loc_84><loc_911><loc_245>")
    entries = [
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{asked}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for name, (asked, answer) in said.items()
    ]
    folder = lay_out(tmp_path, {"llava.json": json.dumps(entries)})
    assert prepared(folder) == {name: [said[name][1]] for name in ("2.jpg", "3.jpg")}
    told = read_captions(folder / "llava.json").passed
    assert len(told) == 3 and all("asks a question: --tasks questions" in line for line in told)


@pytest.mark.parametrize("asked", ["请描述这张图片", "Décrivez l'image", "画像を説明してください"])
def test_who_asks_to_describe_in_another_language_gets_a_caption(asked):
    asked_twice = [asked, "A", "他取得过哪些成就？", "B"]
    who = ["user", "assistant"] * 2
    talk = [{"role": r, "content": c} for r, c in zip(who, asked_twice, strict=True)]
    assert texts_of(talk) == ["A"]


def test_choices_in_our_own_form_are_what_is_learned(tmp_path):
    entry = {"question": "Which?", "choice": {"A": "a dog", "B": "a cat"}, "answer": "B"}
    plain = {"question": "Is it?", "answer": "yes", "note": 1}
    (tmp_path / "q.json").write_text(json.dumps({"1": [entry, plain], "2": [plain]}))
    chosen, same = read_questions(tmp_path / "q.json")["1"]
    assert chosen["answer"] == "a cat" and same == plain


def test_marks_of_phrases_and_of_ends_are_no_words(tmp_path):
    marked = "[/EN#1/people Two young guys] with [/EN#23/bodyparts/other shaggy hair] ."
    # As Keras', TensorFlow's and PyTorch's lessons have them, and models' tokenizers.
    ends = "startseq a dog endseq\n<sos> B <EOS>\n[START] C [END]", "<start> a startseq <end> "
    ends = f"{ends[0]}\n</s><s>D</s>\n[CLS] E [SEP]\nA <s> F<|endoftext|>", ends[1]
    ends = f"{ends[0]}\n<image>G<|im_end|>\n<think>Well.</think> H\n<|startoftext|>I", ends[1]
    texts = {f"images/{n}.txt": text for n, text in enumerate((marked, *ends), 1)}
    found = prepared(lay_out(tmp_path, texts))
    assert found["1.jpg"] == ["Two young guys with shaggy hair ."]
    assert found["2.jpg"] == ["a dog", *"BCDE", "A <s> F", *"GHI"]
    assert found["3.jpg"] == ["a startseq"]


def test_what_a_model_answers_and_a_page_shows_is_read_without_its_marks(tmp_path):
    answer = '```json\n{"caption": "A red dog", "tags": ["dog"]}\n```'
    link = 'A cat by <a href="https://a.org/x" rel="n">Ann</a>'
    rows = [("1.jpg", answer), ("2.jpg", link)]
    with open(tmp_path / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    assert read_captions(tmp_path / "all.csv").texts == {
        "1.jpg": ["A red dog"],
        "2.jpg": ["A cat by Ann"],
    }


def test_what_captions_were_made_of_is_known_from_elsewhere(tmp_path, monkeypatch):
    """From another folder, after DATA_DIR was moved, and after a run without captions."""
    table = "image,caption,split\n" + "".join(
        f'{name},"{text}",{"val" if name == "3.jpg" else "train"}\n' for name, text in PAIRS
    )
    monkeypatch.chdir(lay_out(tmp_path / "data", {"captions.csv": table}))
    own = ["--split", "karpathy"]
    prepared(Path("."), *own)
    monkeypatch.chdir(tmp_path)
    questions = {name: [{"question": "Which?", "answer": "red"}] for name in IDS}
    (tmp_path / "data" / "questions.json").write_text(json.dumps(questions))
    assert check(tmp_path / "data", "--tasks", "questions") == 0
    folder = (tmp_path / "data").rename(tmp_path / "moved")
    text = (folder / "captions.csv").read_text()
    (folder / "captions.csv").write_text(text.replace(PAIRS[0][1], "A new cat"))
    assert prepared(folder, *own)[PAIRS[0][0]][0] == "A new cat"
    splits = load_splits(folder / "splits.json")
    made = (folder / "captions.json").read_text()
    (folder / "captions.json").write_text(made.replace("A new cat", "My cat"))
    assert prepared(folder, *own)[PAIRS[0][0]][0] == "My cat"
    assert load_splits(folder / "splits.json") == splits


def test_texts_beside_other_photos_are_theirs(tmp_path):
    for name in ("cat", "dog"):
        lay_out(tmp_path / name, {f"images/{n}.txt": f"A {name}" for n in (1, 2, 3)})
    for name in ("cat", "dog"):
        found = prepared(tmp_path, "--image_dir", tmp_path / name / "images")
        assert found == {photo: [f"A {name}"] for photo in IDS}


def test_what_a_training_writes_beside_photos_changes_no_captions(tmp_path, capsys):
    files = {f"images/{n}.txt": "A dog" for n in (1, 2, 3)}
    folder = lay_out(tmp_path, files)
    for file in (folder / "images").iterdir():
        file.rename(folder / file.name)
    (folder / "images").rmdir()
    made = prepared(folder)
    for name in ("last.pt", "merges.txt", "samples.png", "splits.json"):
        (folder / name).touch()
    assert prepared(folder) == made and "made anew" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["captions.json", "talks.json"])
def test_a_file_may_hold_captions_and_questions(tmp_path, file, capsys):
    rows = []
    for name in IDS:
        for asked, said in (("Describe it.", "A dog runs"), ("Is it wet?", "no")):
            talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
            rows.append({"image": name, "conversations": talk})
    folder = lay_out(tmp_path, {file: json.dumps(rows)})
    flags = ["--captions_file", folder / file] * (file != "captions.json")
    assert check(folder, *flags) == 0
    told = re.search(r"asks a question: (--.*) learns from it", capsys.readouterr().out)[1]
    flags += told.replace("FILE", str(folder / file)).split()
    assert check(folder, *flags) == check(folder, *flags, "--tasks", "captions,questions") == 0
    places = {name: str(folder / file) for name in ("CAPTIONS_FILE", "QUESTIONS_FILE")}
    paths = paths_in(folder, **places)
    assert load_captions(paths.captions) == {name: ["A dog runs"] for name in IDS}
    assert [len(asked) for asked in load_questions(paths.questions).values()] == [1] * len(IDS)


def test_a_converted_file_is_no_source(tmp_path):
    folder = lay_out(tmp_path, {"mine.csv": rows("image,caption", "images/{},{}")})
    assert check(folder, "--captions_file", folder / "mine.csv") == 0
    assert [*folder.glob("mine.*.prepared.json")]
    assert prepared(folder) == EXPECTED


def test_photos_are_looked_for_behind_links_where_there_are_none_else(tmp_path):
    folder = lay_out(tmp_path / "data", {"captions.csv": rows("image,caption", "Images/{},{}")})
    (folder / "images").rename(tmp_path / "far")
    (folder / "Images").symlink_to("../far")
    (folder / "notes").symlink_to(folder / "captions.csv")
    assert prepared(folder) == EXPECTED
    for place in (folder / "out", tmp_path / "runs"):  # in which trainings have drawn
        place.mkdir()
        (place / "samples.png").touch()
    (folder / "linked").symlink_to("../runs")
    assert paths_in(folder).images == folder / "Images"
    lay_out(tmp_path / "other", {}, ["4.jpg"])
    (folder / "more").symlink_to("../other/images")
    found = prepared(folder, "--follow_links")
    assert found == {f"Images/{name}": said for name, said in EXPECTED.items()}


@pytest.mark.parametrize("texts", [True, False])
def test_folders_of_photos_may_be_links_if_the_user_says_so(tmp_path, texts):
    files = {f"images/{name[0]}.txt": "\n".join(said) for name, said in EXPECTED.items()}
    table = {"captions.csv": rows("image,caption", "{},{}")}
    folder = lay_out(tmp_path / "data", files if texts else table)
    (folder / "images").rename(tmp_path / "far")
    (folder / "images").mkdir()
    (folder / "images" / "train").symlink_to(tmp_path / "far")
    (folder / "images" / "round").symlink_to(".")
    with pytest.raises(UserError, match="train/1.jpg is a link that leads out .* --follow_links"):
        prepared(folder)
    found = {f"train/{name}": said for name, said in EXPECTED.items()}
    assert prepared(folder, "--follow_links") == found


def test_what_was_converted_is_found_by_another_path_to_it(tmp_path, monkeypatch):
    folder = lay_out(tmp_path / "a", {"captions.json": json.dumps(COCO)})
    assert prepared(folder) == EXPECTED
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder / "images")
    for place in ("..", tmp_path / "link", f"{folder}/images/.."):
        assert load_captions(paths_in(Path(place)).captions) == EXPECTED
    folder.rename(tmp_path / "b")
    assert load_captions(paths_in(tmp_path / "b").captions) == EXPECTED


@pytest.mark.parametrize(
    "name",
    (
        "train.csv Captions.CSV my_captions.json annotations/captions_val2017.json a/b.ndjson "
        "Flickr8k_text/Flickr8k.token.txt human_captions.txt"
    ).split(),
)
def test_the_only_file_with_captions_is_taken(tmp_path, name, capsys):
    lines, table = FORMS["images/metadata.jsonl"][0], rows("image,caption", "{},{}")
    texts = {".json": json.dumps(COCO), ".ndjson": lines, ".txt": TOKENS}
    text = texts.get(Path(name).suffix, table)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    folder = lay_out(tmp_path, {name: text, "dataset_info.json": '{"features": 1}'})
    assert prepared(folder) == EXPECTED
    assert f"{name} is " in capsys.readouterr().out


def test_a_folder_of_texts_or_of_objects_is_found(tmp_path, capsys):
    """As CUB has its texts, and img2dataset its objects."""
    folder = lay_out(tmp_path, {}, ["a/1.jpg", "a/2.jpg", "a/3.jpg"])
    (folder / "text/a").mkdir(parents=True)
    for name in ("1", "2"):
        (folder / f"text/a/{name}.txt").write_text("A\nB")
    assert prepared(folder) == {"a/1.jpg": ["A", "B"], "a/2.jpg": ["A", "B"]}
    shutil.rmtree(folder / "text")
    (folder / "captions.json").unlink()
    said = {"caption": "An old dog", "url": "https://x/y.jpg", "width": 70}
    for name in ("2", "3"):
        (folder / f"images/a/{name}.json").write_text(json.dumps(said))
    assert prepared(folder) == {"a/2.jpg": ["An old dog"], "a/3.jpg": ["An old dog"]}
    (folder / "images/a/2.json").write_text(json.dumps(said | {"caption": "A cat"}))
    assert prepared(folder)["a/2.jpg"] == ["A cat"]


def test_objects_in_a_folder_of_their_own_are_found_where_no_list_is(tmp_path):
    folder = lay_out(tmp_path, {}, ["1.jpg", "2.jpg"])
    (folder / "annotations").mkdir()
    for text in ("A dog", "An old dog"):  # and read again when they change
        for n in (1, 2):
            said = {"image": f"{n}.jpg", "caption": f"{text} {n}"}
            (folder / f"annotations/{n}.json").write_text(json.dumps(said))
        assert prepared(folder) == {"1.jpg": [f"{text} 1"], "2.jpg": [f"{text} 2"]}
    (folder / "captions.json").unlink()
    (folder / "list.csv").write_text("image,caption\n1.jpg,A list's\n2.jpg,A list's\n")
    assert prepared(folder) == {"1.jpg": ["A list's"], "2.jpg": ["A list's"]}


@pytest.mark.parametrize(
    ("photos", "texts", "without"),
    [
        (("train/images/1.jpg", "train/images/2.jpg", "valid/images/1.jpg"), "captions", ""),
        (("cub/images/a/1.jpg", "cub/images/b/1.jpg", "cub/images/b/2.jpg"), "text", "cub/images"),
    ],
)
def test_a_folder_of_texts_may_lie_beside_that_of_the_photos(tmp_path, photos, texts, without):
    """As Roboflow lays out a split, and AttnGAN CUB; texts that are alike in name are apart."""
    folder = lay_out(tmp_path, {}, [f"../{name}" for name in photos])
    (folder / "images").rmdir()
    for name in photos:
        inner = f"{texts}{name.removeprefix(without)}" if without else name.replace("images", texts)
        file = (folder / inner).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Of {name}")
    assert prepared(folder) == {name: [f"Of {name}"] for name in photos}


def test_photos_behind_many_texts_are_found(tmp_path):
    for kind in ("captions", "images"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    for number in range(10_001):
        (tmp_path / f"train/captions/{number}.txt").touch()
    (tmp_path / "train/images/1.jpg").touch()
    assert paths_in(tmp_path).images == tmp_path


def test_a_text_in_one_of_several_folders_is_not_missed_in_the_others(tmp_path, capsys):
    folder = lay_out(tmp_path, {}, [f"{n}.jpg" for n in range(5)])
    for n in range(4):
        place = folder / "captions" / ("train", "val")[n % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.txt").write_text(f"Number {n}")
    for number in ("Number", "No."):  # again after a change, too
        (folder / "captions/val/3.txt").write_text(f"{number} 3")
        assert prepared(folder)["3.jpg"] == [f"{number} 3"]
        said = [line for line in capsys.readouterr().out.split("\n") if "beside it" in line]
        assert said == [f"  passed over: {folder}/images/4.jpg: no caption beside it"]


def test_a_text_that_may_be_of_several_photos_is_of_none(tmp_path):
    folder = lay_out(tmp_path, {}, ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg", "dog/3.jpg"])
    (folder / "texts").mkdir()
    for number in (1, 2, 3):
        (folder / f"texts/{number}.txt").write_text(f"Number {number}")
    assert prepared(folder) == {"dog/2.jpg": ["Number 2"], "dog/3.jpg": ["Number 3"]}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train.csv": "a,b\n1,2"}, "(.*train.csv, line 1: of the columns a, b none is known"),
        (
            {"x.csv": "image,caption\n1.jpg,A\n,B\n"},
            "(.*x.csv, line 3: '' is not the name of .*merged",
        ),
        ({"x.json": '{"0.1": ["A"]}'}, "(.*x.json: no photo is called '0.1'"),
        ({"x.json": '{"1.jpg": {"seed": 7}}'}, "(.*x.json: '1.jpg' needs a list"),
        ({"x.xlsx": "PK\3\4"}, "(.*x.xlsx is a spreadsheet, or packed: save"),
        ({"some.txt": TOKENS, "names.txt": "1.jpg"}, "(.*/some.txt?)"),
        (
            {"train.txt": "1.jpg\tA", "val.txt": "2.jpg\tA"},
            "(.*/train.txt., .*/val.txt., or several",
        ),
        ({"x.xls": "PK\3\4"}, "(.*x.xls is a spreadsheet, or packed: save"),
        (dict.fromkeys(("a.json", "b.json"), json.dumps(COCO)), "(one of .*a.json, .*b.json?)"),
    ],
)
def test_where_no_file_is_to_be_chosen_those_there_are_named(tmp_path, files, says):
    folder = lay_out(tmp_path, files)
    (folder / "features").mkdir()  # what a training wrote is no candidate
    (folder / "features/identity.json").write_text("[1]")
    with pytest.raises(UserError) as refused:
        check(folder)
    assert re.search(says.replace("(", r"\(").replace("?)", r"\?\)"), str(refused.value))


def test_photos_in_a_folder_of_another_name_are_found(tmp_path):
    folder = lay_out(tmp_path, {"captions.txt": rows("image,caption", "{},{}")})
    (folder / "images").rename(folder / "Flickr_Data")
    assert prepared(folder) == {f"Flickr_Data/{name}": texts for name, texts in EXPECTED.items()}


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


QUESTIONS = [
    {"image": f"images/{n}.JPG", "question": "Which?", "answers": ["red", "red", "blue"]}
    for n in (1, 2, 3)
]


ASKED = {"question": "Which?", "answer": "red"}


def turns(asking: str, answering: str, said: str, who: str) -> list[dict[str, str]]:
    """A conversation with a question, an answer, and then something else than a question."""
    texts = ((asking, "<image>\nWhich?"), (answering, "red"), (asking, "Describe it."))
    return [{who: speaker, said: text} for speaker, text in (*texts, (answering, "A red dog"))]


CHAT = turns("user", "assistant", "content", "role")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(QUESTIONS)),
        ("a.json", json.dumps({"data": QUESTIONS})),
        ("a.json", json.dumps({n: entry for n, entry in enumerate(QUESTIONS)})),
        ("a.jsonl", "\n".join(map(json.dumps, QUESTIONS))),
        ("a.csv", "image,question,answer\n1,Which?,red\n2,Which?,red\n3,Which?,red\n"),
        (
            "a.csv",
            "image,question,answer\n" + "".join(f"../x/{n}.jpg,Which?,red\n" for n in (1, 2, 3)),
        ),
        (
            "a.jsonl",
            "\n".join(
                json.dumps({"image": f"{n}.jpg", "prefix": asked, "suffix": "red"})
                for n in (1, 2, 3)
                for asked in ("Which?", "caption")
            ),
        ),
        ("a.json", json.dumps({e["image"]: [e] for e in QUESTIONS})),
        (
            "a.csv",
            "image,question,answers\n"
            + "".join(f"{n},Which?,\"['red', 'red', 'blue']\"\n" for n in (1, 2, 3)),
        ),
        (
            "a.csv",
            "image,question,answers\n"
            + "".join(f"{n},Which?,\"[{{'answer': 'red'}}]\"\n" for n in (1, 2, 3)),
        ),
        (
            "a.csv",  # PMC-VQA
            "Figure_path,Question,Answer\n" + "".join(f"{n}.jpg,Which?,red\n" for n in (1, 2, 3)),
        ),
        ("a.csv", "1.jpg,Which?,red\n2.jpg,Which?,red\n3.jpg,Which?,red\n"),  # without a header
        ("a.json", json.dumps({"info": {"split": "val"}, "questions": QUESTIONS})),  # CLEVR
        ("a.json", json.dumps({e["image"]: e | {"image": ""} for e in QUESTIONS})),
        ("a.json", json.dumps([{"id": n, "qas": [ASKED]} for n in (1, 2, 3)])),  # Visual Genome
        ("a.json", json.dumps({"images": [{"filename": n, "qa_pairs": [ASKED]} for n in IDS]})),
        (  # ViTextVQA, as COCO
            "a.json",
            json.dumps(
                {
                    "images": [{"id": 9 - n, "filename": f"{n}.jpg"} for n in (1, 2, 3)],
                    "annotations": [{"id": n, "image_id": 9 - n} | ASKED for n in (1, 2, 3)],
                }
            ),
        ),
        (  # OpenViVQA; who asks about a photo that isn't told asks about none
            "a.json",
            json.dumps(
                {
                    "images": {str(9 - n): f"{n}.jpg" for n in (1, 2, 3)},
                    "annotations": {str(n): {"image_id": 9 - n} | ASKED for n in (1, 2, 3, 8)},
                }
            ),
        ),
        ("a.json", json.dumps({n: [{k.title(): v for k, v in ASKED.items()}] for n in IDS})),
        (
            "a.json",
            json.dumps([{"image": n, "questions": ["Which?"], "answers": ["red"]} for n in IDS]),
        ),
        (  # OCR-VQA's own file
            "a.json",
            json.dumps(
                {
                    n[0]: {"URL": "http://x/7.jpg", "questions": ["Which?"], "answers": ["red"]}
                    for n in IDS
                }
            ),
        ),
        (  # LLaVA: conversations, some about no photo
            "a.json",
            json.dumps(
                [
                    {"id": n, "image": n, "conversations": turns("human", "gpt", "value", "from")}
                    for n in IDS
                ]
                + [{"id": 9, "conversations": turns("human", "gpt", "value", "from")}]
            ),
        ),
        (
            "a.jsonl",
            "\n".join(json.dumps({"images": [n], "messages": CHAT}) for n in IDS),
        ),
        (  # Qwen-VL
            "a.json",
            json.dumps(
                [
                    {
                        "id": f"x{n}",
                        "conversations": [
                            {"from": "user", "value": f"Picture 1: <img>{n}</img>\nWhich?"},
                            {"from": "assistant", "value": "red"},
                        ],
                    }
                    for n in IDS
                ]
            ),
        ),
        ("a.txt", "".join(f"{n[0]}|Which?|red\n" for n in IDS)),  # VQA-Med
        (  # POPE
            "a.json",
            "\n".join(
                json.dumps({"question_id": 1, "image": n, "text": "Which?", "label": "red"})
                for n in IDS
            ),
        ),
        ("a.csv", 2 * "image,question,answer\n" + "".join(f"{n},Which?,red\n" for n in IDS)),
        ("a.csv", ",question,answer,img_id\n" + "".join(f"0,Which?,red,{n[0]}\n" for n in IDS)),
        *(
            ("a.json", json.dumps([{"image": n, "question": "Which?"} | said for n in IDS]))
            for said in (
                {"direct_answers": ["red", "red", "blue"]},  # A-OKVQA
                {"choices": ["blue", "red"], "answer": 1},  # ScienceQA
                {"options": "['blue', 'red']", "answer": "(B)"},
                {"options": [{"text": "blue"}, {"text": "red"}], "answer": "B"},
                {"options": {"A": "blue", "B": "red"}, "answer": "B"},
                {"options": ["blue", "red"], "answer": "b"},
                {"options": ["A. blue", "B. red"], "answer": "B. red"},
                {"ground_truth": [{"full_answer": "red", "ui_elements": []}]},  # ScreenQA
                {"correct_answer": "red"},
                {"Choice A": "blue", "Choice B": "red", "answer": "B"},  # PMC-VQA
                {"Choice A": "blue", "Choice B": "red", "answer": 1},
                {"Choice A": " A:blue ", "Choice B": " B:red ", "answer": "B"},
                {"question": "<image>\nWhich?", "answer": "red"},
                {"options": ["1", "red"], "answer": "red"},
                {"answers": ["red"], "answer_type": ["single span"]},  # InfographicVQA
            )
        ),
        (
            "a.csv",  # Alpaca
            "image,instruction,input,output\n"
            + "".join(f"{n},Answer briefly.,Which?,red\n" for n in IDS),
        ),
        (
            "a.csv",  # Mechanical Turk
            "AssignmentStatus,Input.image_url,Input.question,Answer.answer\n"
            + "".join(f"Approved,{n},Which?,red\n" for n in IDS)
            + "Rejected,1.jpg,Which?,no\n",
        ),
        (
            "a.json",  # Label Studio
            json.dumps(
                [
                    {
                        "data": {"image": n, "question": "Which?"},
                        "annotations": [
                            {"result": [{"from_name": "answer", "value": {"text": ["red"]}}]}
                        ],
                    }
                    for n in IDS
                ]
            ),
        ),
    ],
)
def test_questions_in_other_forms_find_their_photos(tmp_path, name, text):
    folder = lay_out(tmp_path, {name: text})
    flags = ["--tasks", "questions", "--questions_file", folder / name]
    assert check(folder, *flags) == 0
    found = load_questions(paths_in(folder, QUESTIONS_FILE=str(folder / name)).questions)
    assert {photo: [(t.question, t.target) for t in texts] for photo, texts in found.items()} == {
        photo: [("Which?", "red")] for photo in IDS
    }


@pytest.mark.parametrize("name", ["questions.json", "q.csv", "by.json"])
def test_a_split_that_questions_tell_is_kept(tmp_path, name):
    splits = dict(zip(IDS, ("train", "validation", "test"), strict=True))
    entries = {n: ASKED | {"split": split} for n, split in splits.items()}
    text = json.dumps({n: [entry] for n, entry in entries.items()})
    if name == "q.csv":
        text = "Image,Split,Question,Answer\n" + "".join(f"{n},{splits[n]},?,3\n" for n in IDS)
    if name == "by.json":
        text = json.dumps({splits[n]: [{"image": n} | ASKED] for n in IDS})
    folder = lay_out(tmp_path, {name: text})
    flags = ["--tasks", "questions", "--questions_file", folder / name, "--split", "karpathy"]
    assert check(folder, *flags) == 0
    splits = load_splits(folder / "splits.json")
    assert splits == {"train": ["1.jpg"], "val": ["2.jpg"], "test": ["3.jpg"]}


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


def test_questions_of_several_splits_may_stand_in_files_of_their_own(tmp_path, capsys):
    files = {f"{s}.json": [{"image": n} | ASKED] for s, n in zip(SPLITS, IDS, strict=True)}
    texts = {name: json.dumps(content) for name, content in files.items()}
    folder = lay_out(tmp_path, texts | {"captions.txt": "1.jpg,A dog\n"})
    flags = ["--tasks", "questions", "--split", "karpathy"]
    assert check(folder, *flags) == 0
    assert "questions of test.json, train.json, val.json" in capsys.readouterr().out
    assert load_splits(folder / "splits.json") == dict(zip(SPLITS, ([n] for n in IDS), strict=True))
    assert {*load_questions(paths_in(folder).questions)} == {*IDS}
    (folder / "more.json").write_text(texts["val.json"])
    with pytest.raises(UserError, match=r"questions in more.json, test.json, .*_file chooses"):
        find_questions(folder)
    (folder / "more.json").rename(folder / "my questions.json")
    assert {*find_questions(folder)} == {dict(zip(SPLITS, IDS, strict=True))["val"]}
    (folder / "copy").mkdir()
    (folder / "copy/my questions.json").write_text(texts["val.json"])
    assert [len(asked) for asked in find_questions(folder).values()] == [1]  # copies count once
    (folder / "copy/my questions.json").unlink()
    (folder / "my questions.json").rename(folder / "val.json")
    (folder / "images/x").mkdir()  # as each photo of SLAKE has its own too
    (folder / "images/x/question.json").write_text(texts["val.json"])
    assert {*find_questions(folder)} == {*IDS}
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no questions: write questions.json"):
        find_questions(tmp_path / "none")
    (tmp_path / "none/x.csv").write_text("image,question,answer\n1.jpg,Is it, then?,no\n")
    with pytest.raises(UserError, match="no questions.*x.csv, line 2 has 4 columns, not 3: put qu"):
        find_questions(tmp_path / "none")


def test_questions_without_an_answer_are_passed_over_and_said(tmp_path, capsys):
    file = tmp_path / "q.csv"
    file.write_text("image,question,answer\n1.jpg,Which?,\n2.jpg,Which?,red\n,Which?,red\n")
    assert [*read_questions(file)] == ["2.jpg"]
    assert "passed over: 2 questions, the first as" in (said := capsys.readouterr().out)
    assert "line 2 has no answer" in said
    assert [*read_questions(file, answered=False)] == ["1.jpg", "2.jpg"]
    rows = "/data/local-files/?d=1.jpg,Which?,red\nhttps://x.org/2.jpg?w=3,Which?,red\n"
    file.write_text(f"image,question,answer\n{rows}")
    assert [*read_questions(file)] == ["1.jpg", "https://x.org/2.jpg"]  # as captions call them
    file.with_suffix(".json").write_text('[{"image": "1.jpg", "question": NaN}]')
    with pytest.raises(UserError, match="names no photo and question, with image, question:"):
        read_questions(file.with_suffix(".json"))
    file.write_text("image,question,answer\n1.jpg,Which?,\n")
    with pytest.raises(UserError, match="line 2 has no answer"):
        read_questions(file)
    entry = '[{"image": [], "image_id": 0, "question": "Who?", "answer": "I"}]'
    file.with_suffix(".json").write_text(entry)
    assert [*read_questions(file.with_suffix(".json"))] == ["0"]  # where photos count from there


def test_a_comma_that_may_be_of_the_question_or_the_answer_is_refused(tmp_path):
    file = tmp_path / "q.csv"
    file.write_text("image,question,answer\n1.jpg,is it red, or blue?,red\n")
    with pytest.raises(UserError, match=r"q\.csv, line 2 has 4 columns, not 3: put quotes around"):
        read_questions(file)
    file.write_text("image,question\n1.jpg,is it red, or blue?\n2.jpg,which?,\n")
    found = read_questions(file, answered=False)
    assert [found[n][0]["question"] for n in found] == ["is it red, or blue?", "which?"]
    file.write_text("image,question,multiple_choice_answer\n1.jpg,which?,red, blue\n")
    with pytest.raises(UserError, match="line 2 has 4 columns"):
        read_questions(file)


@pytest.mark.parametrize(
    ("entry", "answer", "answers"),
    [
        ({"answer": ["net", "ball", "net"]}, "net", ["net", "ball", "net"]),
        ({"answer": "red", "answers": ""}, "red", []),
        ({"answer": 0}, "0", []),
        ({"answer": "A", "choices": "A) a dog, B) a cat"}, "A", []),
        ({"answer": 2, "choices": [1, 2, 3]}, "2", []),
        ({"answer": 0, "choices": ["2", "0"]}, "2", []),  # IconQA
        ({"answer": "0", "choices": ["2", "0"]}, "0", []),
        ({"answer": 2.0}, "2", []),
        ({"answer": float("nan"), "answers": [float("nan"), 2.5]}, "2.5", ["2.5"]),
        ({"answers": {"answer": ["red", "blue"], "answer_id": [1, 2]}}, "red", ["red", "blue"]),
        ({"answers": ["no", "Yes", "no", "yes.", "yes"]}, "Yes", "no Yes no yes. yes".split()),
        ({"answers": ["", "red", None]}, "red", ["red"]),
        ({"answer": {"text": "red"}}, None, None),
        ({"answers": ["red", ["blue"]]}, None, None),
        ({"question": ["Which?"], "answer": "red"}, None, None),
    ],
)
def test_answers_are_texts_and_several_may_stand_under_either_name(
    tmp_path, entry, answer, answers
):
    file = tmp_path / "q.json"
    file.write_text(json.dumps([{"image": "1.jpg", "question": "Which?"} | entry]))
    if answers is None:
        with pytest.raises(UserError, match="parts are no text"):
            read_questions(file)
    else:
        [question] = read_questions(file)["1.jpg"]
        assert (question["answer"], question["answers"]) == (answer, answers)


def test_numbers_of_choices_that_count_from_one_are_refused(tmp_path):
    file, entry = tmp_path / "q.json", {"image": "1.jpg", "question": "Which?"}
    for answer in (2, "2", "(2)"):
        told = [entry | {"answer": each, "choices": ["red", "blue"]} for each in (1, answer)]
        file.write_text(json.dumps(told))
        with pytest.raises(UserError, match=r"entry 2 has number 2 of 2 choices.*count from 0"):
            read_questions(file)


def test_vqa_files_of_two_sets_are_refused(tmp_path):
    (tmp_path / "q").write_text(
        json.dumps({"questions": [{"question_id": 1, "question": "Which?"}]})
    )
    (tmp_path / "a").write_text(json.dumps({"annotations": [{"question_id": 2, "image_id": 1}]}))
    with pytest.raises(UserError, match="in the same order"):
        pair = [str(tmp_path / "q")], [str(tmp_path / "a")]
        convert_vqa(*pair, tmp_path / "questions.json", tmp_path / "images")
    assert not (tmp_path / "questions.json").exists()


def test_vqa_files_write_over_nothing(tmp_path):
    folder = lay_out(tmp_path, {})
    number = {"question_id": 1, "image_id": "1.jpg"}
    (tmp_path / "q").write_text(json.dumps({"questions": [number | {"question": "Which?"}]}))
    answers = [number | {"multiple_choice_answer": "red"}]
    (tmp_path / "a").write_text(json.dumps({"annotations": answers}))
    files = ["--vqa_questions", tmp_path / "q", "--vqa_annotations", tmp_path / "a"]
    old = [{"image": f"{n}.JPG", "question": "Old?", "answer": "yes"} for n in (1, 2, 3)]
    (folder / "questions.json").write_text(json.dumps(old))
    for _ in range(2):
        settings = settings_of(folder, "--tasks", "questions", *files)
        with pytest.raises(UserError, match=r"questions\.json holds other questions.*delete it"):
            prepare_dataset.prepare(settings)
        prepare_dataset.prepare(settings_of(folder, "--tasks", "questions"))  # converts `old`
    assert json.loads((folder / "questions.json").read_text()) == old
    (folder / "questions.json").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="leaves no photo"):  # of one photo
            prepare_dataset.prepare(settings)
        found = load_questions(paths_in(folder).questions)
        assert [text.target for text in found["1.jpg"]] == ["red"]


def test_answers_without_a_word_are_left_out(tmp_path, capsys):
    table = {n: [{"question": "Which?", "answer": a} for a in ("...", "red")] for n in IDS}
    folder = lay_out(tmp_path, {"questions.json": json.dumps(table)})
    assert check(folder, "--tasks", "questions") == 0
    assert "left out 3 answers without a word" in capsys.readouterr().out
    (folder / "questions.json").write_text(json.dumps({n: table[n][:1] for n in IDS}))
    with pytest.raises(UserError, match="no answers have a word"):
        check(folder, "--tasks", "questions")


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


@pytest.mark.parametrize(
    "root", ["/home/me/photos/", "C:\\photos\\", "D:/", "../input/photos/", "..\\..\\x\\"]
)
def test_names_that_were_absolute_elsewhere_find_their_photos(tmp_path, root):
    data = write_photos(tmp_path / "data", 4)
    (data / "captions.json").unlink()
    rows = "".join(f"{root}{i:03d}.png,a dog\n" for i in range(4))
    (data / "captions.csv").write_text("image,caption\n" + rows)
    assert list(prepared(data)) == [f"{i:03d}.png" for i in range(4)]


def test_a_list_far_down_counts_where_none_is_nearer(tmp_path):
    places = [f"all_data/{split}/radiology" for split in ("train", "validation", "test")]  # ROCO's
    names = [f"{place}/images/ROCO_{n}.jpg" for n, place in enumerate(places)]
    for n, place in enumerate(places):
        (tmp_path / place / "images").mkdir(parents=True)
        Image.new("RGB", (70, 70), (n, 0, 0)).save(tmp_path / names[n])
        (tmp_path / place / "captions.txt").write_text(f"ROCO_{n}\t A, b\n")
    assert prepared(tmp_path, "--split", "karpathy") == {name: ["A, b"] for name in names}
    (tmp_path / "captions.json").unlink()
    nearer = "image,caption\n" + "".join(f"{name},C\n" for name in names)
    (tmp_path / "all_data/mine.csv").write_text(nearer)
    assert prepared(tmp_path, "--split", "karpathy") == {name: ["C"] for name in names}


def test_names_of_a_list_are_looked_for_below_its_own_folder(tmp_path):
    names = {f"{split}/images/{n}.jpg": f"{split} {n}" for split in ("train", "val") for n in "123"}
    missing = "val/images/4.jpg"  # which is not the one to train on
    lay_out(tmp_path, {}, [*names, "train/images/4.jpg"])
    for file in [*(tmp_path / "images").iterdir()]:
        file.rename(tmp_path / file.name)
    (tmp_path / "images").rmdir()
    for split in ("train", "val"):
        said = {**names, missing: "val 4"}
        rows = [f"{Path(n).name},{said[n]}\n" for n in said if n.startswith(split)]
        (tmp_path / split / "captions.csv").write_text("image,caption\n" + "".join(rows))
    found = prepared(tmp_path, "--split", "karpathy")
    assert found == {**{n: [text] for n, text in names.items()}, "val/4.jpg": ["val 4"]}


def test_a_list_in_one_folder_may_name_photos_of_others(tmp_path):
    folder = lay_out(tmp_path, {}, ["a/1.jpg", "b/2.jpg"])
    (folder / "images/a/list.csv").write_text("image,caption\na/1.jpg,A\nb/2.jpg,B\n")
    assert prepared(folder) == {"a/1.jpg": ["A"], "b/2.jpg": ["B"]}


def karpathy_of(names: list[str]) -> str:
    images = [
        {"filename": n, "split": OF.get(n, "train"), "sentences": [{"raw": "A"}]} for n in names
    ]
    return json.dumps({"images": images})


@pytest.mark.parametrize("place", ["dataset_{}.json", "caption_datasets/dataset_{}.json"])
def test_of_several_lists_those_of_photos_that_are_there_count(tmp_path, place, capsys):
    """As caption_datasets.zip has Karpathy's three, whose numbers may be alike by chance."""
    photos = [*SIX, *(f"{n}.jpg" for n in range(7, 121))]
    coco = karpathy_of([f"COCO_val2014_{n:012d}.jpg" for n in range(120, 1000)])
    lists = {"coco": coco, "flickr30k": karpathy_of(photos), "flickr8k": karpathy_of(["x.jpg"])}
    (tmp_path / "caption_datasets").mkdir()
    folder = lay_out(tmp_path, {place.format(name): text for name, text in lists.items()}, photos)
    assert prepared(folder, "--split", "karpathy") == dict.fromkeys(photos, ["A"])
    assert capsys.readouterr().out.count("is passed over: its photos are not in") == 2
    (folder / "captions.json").unlink()
    (folder / place.format("flickr8k")).write_text(karpathy_of(["4.jpg", "x.jpg"]))
    with pytest.raises(UserError, match="one of .*flickr30k.json, .*flickr8k.json"):
        prepared(folder)


def test_lists_of_photos_of_one_name_in_several_folders_are_candidates(tmp_path):
    there = {"train": SIX, "val": SIX[:2]}
    lists = {f"{split}.csv": "".join(f"{n},A\n" for n in names) for split, names in there.items()}
    photos = [f"{split}/{n}" for split, names in there.items() for n in names]
    folder = lay_out(tmp_path, lists, photos)
    says = r"one of .*train\.csv, .*val\.csv\?\); 2 of them name '1.jpg': move each file into the"
    with pytest.raises(UserError, match=says):
        prepared(folder)
    for split in there:
        (folder / f"{split}.csv").rename(folder / "images" / split / f"{split}.csv")
    assert prepared(folder, "--split", "karpathy") == {photo: ["A"] for photo in photos}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_metadata_in_sub_folders_is_read(tmp_path, elsewhere):
    data = write_photos(tmp_path / "data", 6)
    (data / "captions.json").unlink()
    for number, split in enumerate(("train", "validation")):
        (data / "images" / split).mkdir()
        rows = []
        for i in range(3 * number, 3 * number + 3):
            name = f"{i:03d}.png"
            (data / "images" / name).rename(data / "images" / split / name)
            rows.append(json.dumps({"file_name": name, "text": f"a dog {i}"}))
        (data / "images" / split / "metadata.jsonl").write_text("\n".join(rows))
    if elsewhere:
        (data / "images").rename(tmp_path / "far")
    found = prepared(data, *["--image_dir", tmp_path / "far"] * elsewhere)
    assert found["train/002.png"] == ["a dog 2"] and found["validation/003.png"] == ["a dog 3"]
    assert len(found) == 6


@pytest.mark.parametrize("sign", ["", '""'])
def test_many_long_quoted_captions_are_read_in_seconds(tmp_path, sign):
    text = "\n".join(f"{sign}line{sign} {n} of a caption" for n in range(95))
    rows = "".join(f'{n}.jpg,"{text}"\n' for n in range(400))
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    begun = time.process_time()
    found = read_captions(tmp_path / "captions.csv")
    assert time.process_time() - begun < 3
    assert {*map(tuple, found.texts.values())} == {(text.replace('""', '"'),)}


def test_texts_beside_photos_that_are_links_elsewhere_need_the_flag(tmp_path):
    write_photos(tmp_path / "data", 2)
    (tmp_path / "data" / "captions.json").unlink()
    (tmp_path / "secret").write_text("a secret of another's\n")
    (tmp_path / "data" / "images" / "001.txt").write_text("a cat\n")
    flags = ["--dataset", "custom", "--split", "ratio", "--data_dir", "data"]
    (tmp_path / "data" / "images" / "000.txt").symlink_to(tmp_path / "secret")
    told = run("prepare_dataset.py", *flags, cwd=tmp_path)
    assert told.returncode == 1 and "000.txt lies, or is a link that leads, out" in told.stderr
    assert not (tmp_path / "data" / "captions.json").exists()
    told = run("prepare_dataset.py", *flags, "--follow_links", cwd=tmp_path)
    assert told.returncode == 0, told.stderr


@pytest.mark.fault
@pytest.mark.parametrize("way", ["table", "list", "splits"])
def test_captions_elsewhere_need_the_flag(tmp_path, way):
    """As a login in ~/.netrc, of which a stranger calls a photo `machine.png`."""
    write_photos(tmp_path / "data", 9)
    captions, name = tmp_path / "data" / "captions.json", tmp_path / "data" / "images" / "000.png"
    name.rename(name.with_stem("machine"))
    (tmp_path / ".netrc").write_text("machine api.example password secret\n")
    if way == "splits":
        made = hashlib.sha256(captions.read_bytes()).hexdigest()
        note = {"source": "../.netrc", "images": "images", "state": "", "made": made, "splits": {}}
        table = {"method": "ratio", "captions": note}
        (tmp_path / "data" / "splits.json").write_text(json.dumps(table))
    else:
        captions.unlink()
        link = tmp_path / "data" / {"table": "captions.csv", "list": "some.csv"}[way]
        link.symlink_to("../.netrc")
    before = captions.read_bytes() if captions.exists() else b""
    with pytest.raises(UserError, match=r"lies, or .* use --follow_links"):
        prepare_dataset.main(
            ["--dataset", "custom", "--split", "test", "--data_dir", f"{tmp_path}/data"]
        )
    assert (captions.read_bytes() if captions.exists() else b"") == before


@pytest.mark.fault
def test_texts_of_others_are_not_written_through_a_link(tmp_path):
    write_photos(tmp_path / "data", 9)
    captions = tmp_path / "data" / "captions.json"
    captions.rename(captions.with_stem("some"))
    captions.symlink_to("../.bash_aliases")
    with pytest.raises(UserError, match="captions.json would be written, and is a link out"):
        prepare_dataset.main(
            ["--dataset", "custom", "--split", "test", "--data_dir", f"{tmp_path}/data"]
        )
    assert not (tmp_path / ".bash_aliases").exists()


def test_lists_and_names_without_end_are_not_looked_into(tmp_path):
    name = "a/" * 2000
    photos = {f"{name}{n}.jpg": ["[" + "'a' " * 50_000 + "]"] for n in range(100)}
    (tmp_path / "captions.json").write_text(json.dumps(photos))
    begun = time.process_time()
    found = read_captions(tmp_path / "captions.json")
    assert len(find_names(found.texts, [f"b/{photo}" for photo in photos])) == 100
    assert time.process_time() - begun < 3


def test_what_was_made_of_many_captions_is_not_parsed_again(photos, monkeypatch, capsys):
    (photos / "captions.json").rename(photos / "caption_list.json")
    monkeypatch.setattr("captions_file.LONG", 100)
    flags = ["--dataset", "custom", "--data_dir", str(photos), "--split", "ratio"]
    prepare_dataset.main(flags)
    assert f"reading {photos / 'caption_list.json'} (" in capsys.readouterr().out
    made = (photos / "captions.json").read_bytes(), (photos / "splits.json").read_bytes()
    prepare_dataset.main(flags)
    assert "reading" not in capsys.readouterr().out
    assert made == ((photos / "captions.json").read_bytes(), (photos / "splits.json").read_bytes())
    (photos / "captions.json").write_text((photos / "captions.json").read_text() + " ")
    prepare_dataset.main(flags)
    assert f"reading {photos / 'captions.json'} (" in capsys.readouterr().out
