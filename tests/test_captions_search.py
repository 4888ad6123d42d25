"""Where captions are found: tables, parts, texts beside photos; and when they are read again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

import captions_search
import prepare_dataset
from dataset import data_paths, load_captions, load_splits
from tests.conftest import run, write_photos
from tests.data_sets import (
    COCO,
    EXPECTED,
    FORMS,
    IDS,
    KARPATHY,
    OF,
    PAIRS,
    SIX,
    TOKENS,
    check,
    lay_out,
    lines_of,
    paths_in,
    prepared,
    rows,
    rows_of,
    settings_of,
)
from utils import UserError


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
    others = dict.fromkeys(("metadata.csv", "captions_val.csv", "captions_de.txt"), table)
    folder = lay_out(tmp_path, {"captions.csv": table} | others)
    assert prepared(folder) == EXPECTED
    said = re.search("captions.csv, not from (.*): --captions_file", capsys.readouterr().out)
    assert {Path(place).name for place in said[1].split(", ")} == {*others}


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


def test_a_converted_file_is_no_source(tmp_path):
    folder = lay_out(tmp_path, {"mine.csv": rows("image,caption", "images/{},{}")})
    assert check(folder, "--captions_file", folder / "mine.csv") == 0
    assert [*folder.glob("mine.*.prepared.json")]
    assert prepared(folder) == EXPECTED


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


@pytest.mark.parametrize("end", [".jpg.txt", ".jpg.json"])
def test_texts_in_a_folder_of_their_own_may_keep_the_suffix_of_their_photos(tmp_path, end):
    """As Supervisely's objects do, in `ann` beside `img`."""
    folder = lay_out(tmp_path, {})
    (folder / "ann").mkdir()
    for name in IDS:
        said = json.dumps({"description": "A dog"}) if end.endswith("json") else "A dog"
        (folder / "ann" / name).with_suffix(end).write_text(said)
    assert prepared(folder) == {name: ["A dog"] for name in IDS}


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
        (
            {"images/1.gt.txt": "A", "x.xml": "<a>"},
            "(in no form that is read, so .*: x.xml, images/1",
        ),
        (  # FiftyOne's, beside what describes it
            {"a.json": '{"name": "x"}', "b.json": '[["1.jpg", {"label": "A"}]]'},
            "(.*b.json, entry 1 has no caption in .*'label': 'A'",
        ),
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
