"""Questions in each form that is read, from files of one's own."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

import captions_search
import prepare_dataset
from captions_file import read_captions
from dataset import data_paths, load_captions, load_questions, load_splits
from options import SPLITS
from questions_file import convert_vqa, find_questions, read_questions
from tests.data_sets import ASKED, IDS, check, lay_out, paths_in, prepared, settings_of
from texts import texts_of
from utils import UserError


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


def test_a_word_that_answers_a_question_is_no_caption(tmp_path):
    said = {
        "1.jpg": ("How many dogs?", "Two"),
        "2.jpg": ("What is this about?", "Two dogs run off"),
    }
    said["3.jpg"] = ("Describe it.", "Dogs")
    said["4.jpg"] = ("这是谁？", "他是来自拜仁慕尼黑的托马斯")
    said["5.jpg"] = ("<OD>", "table<loc_92><loc_84><loc_911><loc_245>")
    said["6.jpg"] = ("Please box the <p>ship</p>", "{<25><1><100><38>}")  # MiniGPT's, VRSBench's
    said["7.jpg"] = ("Find the dog.", "<ref>dog</ref><box>(51,12),(33,44)</box>")  # Qwen-VL's
    said["8.jpg"] = ("Locate it.", '```json\n[{"bbox_2d": [1, 22, 333, 44], "label": "dog"}]\n```')
    said["9.jpg"] = ("Where is it, exactly.", "[0.12, 0.34, 0.56, 0.78]")
    said["a.jpg"] = ("Describe it.", "Sales of four years (2018, 2019, 2020, 2021)")
    said["b.jpg"] = ("Describe it.", "A card that says to call (495) 123 45 67")
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
    assert prepared(folder) == {f"{n}.jpg": [said[f"{n}.jpg"][1]] for n in "23ab"}
    told = read_captions(folder / "llava.json").passed
    assert len(told) == 7 and all("asks a question: --tasks questions" in line for line in told)


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


QUESTIONS = [
    {"image": f"images/{n}.JPG", "question": "Which?", "answers": ["red", "red", "blue"]}
    for n in (1, 2, 3)
]


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
                {"gt_answer": "red", "option_A": "blue", "option_B": "red"},  # OmniMedVQA
                {"question": "<image 1> Which?", "answer": "red"},  # MMMU
                {"question": "<|image_1|>\nWhich?", "answer": "red"},  # Phi
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
