"""Which photo is meant by a name, in folders, through links, and where none is."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

import captions_search
import prepare_dataset
from captions_file import read_captions
from dataset import load_captions
from photo_names import find_names
from tests.conftest import write_photos
from tests.data_sets import EXPECTED, check, lay_out, paths_in, prepared, rows, settings_of
from utils import UserError


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


@pytest.mark.parametrize("mark", ["\t", ",", " "])
@pytest.mark.parametrize("number", ["", "#0", "#zhc#0"])
def test_a_table_without_header_may_lack_suffixes(tmp_path, mark, number):
    there = [f"ROCO-{n}.jpg" for n in (1, 2, 3)]
    table = "".join(f"ROCO-{n}{number}{mark}X-ray {n}\n" for n in (1, 2, 3))
    folder = lay_out(tmp_path, {"captions.csv": table}, there)
    assert prepared(folder) == {name: [f"X-ray {n}"] for n, name in enumerate(there, 1)}


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
        ("first.jpg", " first.jpg"),  # as cells are read, whose spaces at the ends are cut
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


def test_a_suffix_tells_a_photo_from_its_mask_in_another_folder():
    there = ["rgb/1.jpg", "masks/1.png", "rgb/2.jpg", "masks/2.png"]
    assert find_names(["1.jpg", "2.jpg"], there) == {"1.jpg": there[0], "2.jpg": there[2]}
    assert not find_names(["1", "2"], there)


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


def test_photos_behind_many_texts_are_found(tmp_path):
    for kind in ("captions", "images"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    for number in range(10_001):
        (tmp_path / f"train/captions/{number}.txt").touch()
    (tmp_path / "train/images/1.jpg").touch()
    assert paths_in(tmp_path).images == tmp_path


def test_photos_in_a_folder_of_another_name_are_found(tmp_path):
    folder = lay_out(tmp_path, {"captions.txt": rows("image,caption", "{},{}")})
    (folder / "images").rename(folder / "Flickr_Data")
    assert prepared(folder) == {f"Flickr_Data/{name}": texts for name, texts in EXPECTED.items()}


@pytest.mark.parametrize(
    "root", ["/home/me/photos/", "C:\\photos\\", "D:/", "../input/photos/", "..\\..\\x\\"]
)
def test_names_that_were_absolute_elsewhere_find_their_photos(tmp_path, root):
    data = write_photos(tmp_path / "data", 4)
    (data / "captions.json").unlink()
    rows = "".join(f"{root}{i:03d}.png,a dog\n" for i in range(4))
    (data / "captions.csv").write_text("image,caption\n" + rows)
    assert list(prepared(data)) == [f"{i:03d}.png" for i in range(4)]


def test_photos_of_a_zip_of_windows_may_have_its_folders_in_their_names(tmp_path):
    data = write_photos(tmp_path / "data", 4)  # as Python unpacks them
    (data / "captions.json").unlink()
    for photo in [*(data / "images").iterdir()]:
        photo.rename(photo.with_name(f"photos\\{photo.name}"))
    names = [f"photos\\{i:03d}.png" for i in range(4)]
    rows = "".join(f"{name},a dog\n" for name in names)
    (data / "captions.csv").write_text("image,caption\n" + rows)
    assert list(prepared(data)) == names


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


def test_lists_and_names_without_end_are_not_looked_into(tmp_path):
    name = "a/" * 2000
    photos = {f"{name}{n}.jpg": ["[" + "'a' " * 50_000 + "]"] for n in range(100)}
    (tmp_path / "captions.json").write_text(json.dumps(photos))
    begun = time.process_time()
    found = read_captions(tmp_path / "captions.json")
    assert len(find_names(found.texts, [f"b/{photo}" for photo in photos])) == 100
    assert time.process_time() - begun < 3
