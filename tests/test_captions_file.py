"""Captions in each form that is read: tables, JSON, lines of it, encodings, what is refused."""

from __future__ import annotations

import csv
import json
import re
import time

import pytest

from captions_file import read_captions
from dataset import load_captions
from questions_file import read_questions
from tests.data_sets import (
    COCO,
    EXPECTED,
    FORMS,
    IDS,
    check,
    lay_out,
    paths_in,
    prepared,
    rows_of,
    talk,
)
from texts import NOTHING
from utils import UserError, decoded


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


def test_what_is_ignored_of_objects_by_photo_is_said(tmp_path):
    said = {"title": "A dog", "split": "val", "visual_sentences": ["It is red."], "year": 1500}
    (tmp_path / "a.json").write_text(json.dumps({"1": said}))  # Artpedia's
    found = read_captions(tmp_path / "a.json")
    assert found.form == "a table of photos, of which visual_sentences, year are ignored"


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
    captions = [{"image_id": 1, "caption": "A", "language": each} for each in of]
    for table in ([{"image": "1.jpg", "captions": captions}], COCO | {"annotations": captions}):
        (tmp_path / "a.json").write_text(json.dumps(table))
        assert ("(language: de, en;" in read_captions(tmp_path / "a.json").form) == told[0]


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


@pytest.mark.parametrize("file", FORMS)
def test_every_form_is_recognised_and_told(tmp_path, file, capsys):
    text, says = FORMS[file]
    folder = lay_out(tmp_path / "data", {file: text})
    assert prepared(folder) == EXPECTED
    assert says in capsys.readouterr().out
    assert prepared(folder) == EXPECTED  # and again, from what was prepared
    assert (folder / file).read_bytes() == text.encode()


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


def test_a_column_of_names_is_none_of_captions(tmp_path):
    """As doccano writes it, whose captions are labels."""
    (tmp_path / "all.jsonl").write_text('{"filename": "x/1.jpg", "text": "1.jpg", "label": ["A"]}')
    with pytest.raises(UserError, match="line 1 names no photo and caption"):
        read_captions(tmp_path / "all.jsonl")


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
        *(  # what is said of several photos is none of the last one's
            (f'image;caption\n"1.jpg{mark} https://x.org/2.jpg?v=1";A\n3.jpg;B\n', {"3.jpg": ["B"]})
            for mark in ",;|"
        ),
        ("image,caption\nv1.1,A\ntrain/1,B\n", {"v1.1": ["A"], "train/1": ["B"]}),
        ("image,caption\n1.jpg,NaN\n2.jpg,#N/A\n4.jpg,#NAME?\n3.jpg,A\n", {"3.jpg": ["A"]}),
        (",caption\n1.jpg,A\n", {"1.jpg": ["A"]}),  # by pandas' index
        ("image,caption\n1.jpg,A\nimage,caption\n2.jpg,B\n", {"1.jpg": ["A"], "2.jpg": ["B"]}),
        ("image,caption\n\u202a1.jpg,A\n\ufeff2.jpg,B\n", {"1.jpg": ["A"], "2.jpg": ["B"]}),
        (",image,caption\n0,1.jpg,A\n", {"1.jpg": ["A"]}),
        ("image,caption\n1,a.jpg,A, B\n2,b.jpg,C\n", {"a.jpg": ["A, B"], "b.jpg": ["C"]}),  # R's
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
        (  # Shopify's: a product's title stands beside the first of its photos only
            "Handle,Title,Image Src,Image Alt Text\n"
            "a,A blue shirt,https://x.org/1.jpg?v=1,A man in a shirt\na,,https://x.org/2.jpg,B\n",
            {"https://x.org/1.jpg": ["A man in a shirt"], "https://x.org/2.jpg": ["B"]},
        ),
        ("image,title,alt_text\n1.jpg,A shirt,\n", {"1.jpg": ["A shirt"]}),
        ("Title,Image Src,Image Alt Text\nA shirt,1.jpg,\n", {"1.jpg": ["A shirt"]}),
        (  # most products have none
            "Title,Image Src,Image Alt Text\nA shirt,1.jpg,\nA hat,2.jpg,Hat\n",
            {"1.jpg": ["A shirt"], "2.jpg": ["A hat"]},
        ),
        (  # no line ends, but TeX's rows and rings
            "image,caption\n1.jpg,a & b \\\\n & c\n2.jpg,5 \\r{A}\n3.jpg,A\\r\\nb\n",
            {"1.jpg": ["a & b \\\\n & c"], "2.jpg": ["5 \\r{A}"], "3.jpg": ["A b"]},
        ),
        (  # WooCommerce's: a page, with its line ends as signs
            "Name,Description,Images\n"
            "X,<h2>A</h2>\\n<table><tr><td>B\\nC \\nu</td></tr></table>,1.jpg",
            {"1.jpg": ["A B C \\nu"]},
        ),
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
        ({"images": {"0": "1.jpg", "1": "2.jpg"}, "captions": {"1": "B", "0": "A"}}, AB),
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
        ({"page": 1, "photos": [{"id": 1, "src": {}, "alt": "A"}]}, {"1": ["A"]}),  # Pexels'
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
        (  # one key for all photos, not the longer one of each
            {n: {"english_caption": AB[n][0], "hindi_caption": "क" * int(n[0])} for n in AB},
            AB,
        ),
        (  # Unsplash's, of which most lack the first
            {
                n: {"description": "A" * (n == "1.jpg") or None, "alt_description": AB[n][0]}
                for n in AB
            },
            AB,
        ),
        (
            {n[0]: {"caption": AB[n][0], "thumbnail": f"small_{n}"} for n in AB},
            {"1": ["A"], "2": ["B"]},
        ),
        (  # Flickr's API
            [
                {"id": n, "title": {"_content": "x"}, "description": {"_content": AB[n][0] + " b"}}
                for n in AB
            ],
            {n: [AB[n][0] + " b"] for n in AB},
        ),
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


def test_what_databases_and_scripts_write_for_no_caption_is_passed_over(tmp_path):
    """R's NA, MySQL's and PostgreSQL's \\N, JavaScript's undefined."""
    rows = ["1.jpg\tA dog", *(f"{n}.jpg\t{text}" for n, text in enumerate(NOTHING, 2))]
    (tmp_path / "all.tsv").write_text("\n".join(rows))
    found = read_captions(tmp_path / "all.tsv")
    assert found.texts == {"1.jpg": ["A dog"]} and len(found.passed) == len(NOTHING)
    assert {"NA", "\\N", "undefined"} <= {*NOTHING}


def test_marks_of_phrases_and_of_ends_are_no_words(tmp_path):
    marked = "[/EN#1/people Two young guys] with [/EN#23/bodyparts/other shaggy hair] ."
    # As Keras', TensorFlow's and PyTorch's lessons have them, and models' tokenizers.
    ends = "startseq a dog endseq\n<sos> B <EOS>\n[START] C [END]", "<start> a startseq <end> "
    ends = f"{ends[0]}\n</s><s>D</s>\n[CLS] E [SEP]\nA <s> F<|endoftext|>", ends[1]
    ends = f"{ends[0]}\n<image>G<|im_end|>\n<think>Well.</think> H\n<|startoftext|>I", ends[1]
    filled = "[CLS] J [SEP]" + " [PAD]" * 40, "<s>K</s>" + "<pad>" * 40, "L" + "<|endoftext|>" * 40
    ends = "\n".join((ends[0], *filled)), ends[1]  # as a batch is, to its longest caption
    texts = {f"images/{n}.txt": text for n, text in enumerate((marked, *ends), 1)}
    found = prepared(lay_out(tmp_path, texts))
    assert found["1.jpg"] == ["Two young guys with shaggy hair ."]
    assert found["2.jpg"] == ["a dog", *"BCDE", "A <s> F", *"GHIJKL"]
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


@pytest.mark.parametrize("sign", ["", '""'])
def test_many_long_quoted_captions_are_read_in_seconds(tmp_path, sign):
    text = "\n".join(f"{sign}line{sign} {n} of a caption" for n in range(95))
    rows = "".join(f'{n}.jpg,"{text}"\n' for n in range(400))
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    begun = time.process_time()
    found = read_captions(tmp_path / "captions.csv")
    assert time.process_time() - begun < 3
    assert {*map(tuple, found.texts.values())} == {(text.replace('""', '"'),)}
