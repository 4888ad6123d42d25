"""Questions: from the file to the answer and its score."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

import train
from checkpoint import load_checkpoint
from corpus import say_cut, say_repeats
from dataset import CaptionRows, Text, encode_rows, load_questions, make_batch
from evaluate import accuracy_by_kind, common_answers
from generation import generate
from inference import load_captioner
from metrics import normalize_answer, vqa_accuracy
from options import GenerationOptions, parse_tasks
from questions_file import convert_vqa
from tests.conftest import COLOURS, paint, run, small_flags, write_photos, write_questions
from tests.test_model import VOCAB, build_model, features
from tests.test_train import start
from tokenizer import ANSWER_ID, END_ID, START_ID, CaptionTokenizer
from utils import UserError

# --- The file -------------------------------------------------------------------------------

WRONG = {
    "a list": ("[]", "holds a list"),
    "empty": ("{}", "is empty"),
    "no list": ('{"a.jpg": "what?"}', "a.jpg"),
    "no text": ('{"a.jpg": [{"question": 3, "answer": "x"}]}', "no text"),
    "empty question": ('{"a.jpg": [{"question": " ", "answer": "x"}]}', "empty question"),
    "no answer": ('{"a.jpg": [{"question": "what?"}]}', "without an answer"),
    "escaping": ('{"../a.jpg": [{"question": "what?", "answer": "x"}]}', "photo folder"),
    "twice": ('{"a.jpg": [], "a.jpg": []}', "stands twice"),
    "not JSON": ("{", "not valid JSON"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_with_the_place(tmp_path, name):
    text, expected = WRONG[name]
    path = tmp_path / "questions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_questions(path)


def test_the_most_common_answer_is_learned_and_all_are_kept(tmp_path):
    path = tmp_path / "questions.json"
    answers = ["red"] * 4 + ["dark red"] * 6
    path.write_text(json.dumps({"a.jpg": [{"question": "what color?", "answers": answers}]}))
    (question,) = load_questions(path)["a.jpg"]
    assert question == Text("dark red", "what color?", tuple(answers))
    path.write_text(json.dumps({"a.jpg": [{"question": "how many?", "answer": 3}]}))
    assert load_questions(path)["a.jpg"] == [Text("3", "how many?")]
    path.write_text(json.dumps({"a.jpg": [{"question": "what color?", "answer": None}]}))
    assert load_questions(path, answered=False)["a.jpg"] == [Text(question="what color?")]
    variants = ["", "no", "Yes", "no", "yes.", "yes"]
    path.write_text(json.dumps({"a.jpg": [{"question": "is it?", "answers": variants}]}))
    assert load_questions(path)["a.jpg"] == [Text("Yes", "is it?", tuple(variants[1:]))]


def test_vqa_files_become_questions(tmp_path):
    asked = {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": 7, "image_id": 42, "question": "Is it raining?"},
            {"question_id": 8, "image_id": 42, "question": "How many dogs?"},
            {"question_id": 7, "image_id": 43, "question": "Is it day?"},
        ],
    }
    answered = {
        "annotations": [
            {
                "question_id": q,
                "image_id": image,
                "question_type": kind,
                "multiple_choice_answer": best,
                "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers)],
            }
            for q, image, kind, best, answers in (
                (7, 42, "is it", "no", ["no"] * 8 + ["yes"] * 2),
                (8, 42, "how many", "2", ["2"] * 10),
                (7, 43, "is it", "yes", ["yes"] * 10),
            )
        ]
    }
    (tmp_path / "q.json").write_text(json.dumps(asked))
    (tmp_path / "a.json").write_text(json.dumps(answered))
    pair = [str(tmp_path / "q.json")], [str(tmp_path / "a.json")]
    convert_vqa(*pair, tmp_path / "questions.json", tmp_path / "images")
    found = load_questions(tmp_path / "questions.json")
    assert list(found) == [f"COCO_val2014_0000000000{number}.jpg" for number in (42, 43)]
    assert [text.question for text in found.popitem()[1]] == ["Is it day?"]  # ids count anew
    first, second = found["COCO_val2014_000000000042.jpg"]
    assert (first.question, first.target, first.kind) == ("Is it raining?", "no", "is it")
    assert len(first.answers) == 10 and second.target == "2"
    with pytest.raises(UserError, match="pairs"):
        convert_vqa(pair[0], [], tmp_path / "questions.json", tmp_path / "images")
    with pytest.raises(UserError, match="no VQA pair"):
        convert_vqa(pair[1], pair[0], tmp_path / "questions.json", tmp_path / "images")


@pytest.mark.parametrize("form", ["VQAv2", "VQA-CP", "RSVQA"])
def test_pairs_of_vqa_tell_their_split(tmp_path, form):
    pairs = []
    for number, split in enumerate(("train", "val")):
        asked = [{"question_id": 1, "image_id": number, "question": "Which?"}]
        answered = [{"question_id": 1, "image_id": number, "answers": [{"answer": "red"}]}]
        pair, called = ({"questions": asked}, {"annotations": answered}), f"{split}_"
        if form == "VQAv2":
            pair[0]["data_subtype"], called = f"{split}2014", ""
        elif form == "VQA-CP":
            pair = [each | {"coco_split": "val2014"} for each in asked], answered
        else:
            back = {"id": 2, "active": False}  # taken back
            asked = [{"id": 1, "img_id": number, "question": "Which?", "active": True}, back]
            answered = [{"id": 9, "question_id": 1, "answer": "red", "active": True}, back]
            pair = {"questions": asked}, {"answers": answered}
        pairs.append([tmp_path / f"{called}{what}{number}.json" for what in "qa"])
        for file, content in zip(pairs[-1], pair, strict=True):
            file.write_text(json.dumps(content))
    files = [[str(file) for file in files] for files in zip(*pairs, strict=True)]
    convert_vqa(*files, tmp_path / "questions.json", tmp_path / "images")
    found = json.loads((tmp_path / "questions.json").read_text())
    stems = {"VQAv2": ("COCO_train2014_", "COCO_val2014_"), "VQA-CP": ("COCO_val2014_",) * 2}
    names = [f"{stem}{n:012d}.jpg" for n, stem in enumerate(stems.get(form, ("", "")))]
    asked = [(entry["answer"], entry["split"]) for name in names for entry in found[name]]
    assert asked == [("red", "train"), ("red", "val")]


def test_tasks():
    assert parse_tasks("questions, captions") == ("captions", "questions")
    with pytest.raises(UserError, match="TASKS"):
        parse_tasks("caption")


# --- Scores ---------------------------------------------------------------------------------


def test_vqa_accuracy_by_hand():
    ten = ["yes"] * 2 + ["no"] * 8
    # Left out in turn: a "yes" twice (1 of 9 agrees: 1/3), a "no" eight times (2 agree: 2/3).
    assert vqa_accuracy("yes", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("No.", ten) == 1
    assert vqa_accuracy("maybe", ten) == 0
    assert vqa_accuracy("the dog", ["a dog!"]) == 1
    assert vqa_accuracy("yes", ["Yes."] * 3) == vqa_accuracy("no", ["no", "no"]) == 1
    assert vqa_accuracy("no", ["no", "yes"]) == 0.5
    # A single answer of which normalising leaves nothing is no other such answer, nor silence.
    for said in ("+", "<", "A", "the", "?"):
        assert vqa_accuracy(said.lower(), [said]) == 1
        assert vqa_accuracy("", [said]) == vqa_accuracy("-", [said]) == 0
    # Where all agree to the letter, nothing is normalised.
    assert (
        vqa_accuracy("the dog", ["dog"] * 10) == 0 < vqa_accuracy("the dog", ["dog", *["Dog"] * 9])
    )


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Two", "2"),
        ("the red car", "red car"),
        ("black-and-white", "black and white"),
        ("1,000", "1000"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("left, right", "left right"),
        ("«да»", "да"),
        ("نعم؟", "نعم"),
        ("「２匹！」", "2匹"),
    ],
)
def test_answers_are_compared_as_vqa_does(answer, same):
    assert normalize_answer(answer) == normalize_answer(same) == same.removeprefix("a ")


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("its", "its"),
        ("it's", "it's"),
        ("hell", "hell"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("five oclock", "5 o'clock"),
        ("the 'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_contractions_are_mended_as_vqa_does(answer, read):
    assert normalize_answer(answer) == read


def test_baselines_by_hand():
    pairs = (("color", "red"), ("color", "red"), ("color", "blue"), ("count", "two"))
    training = [("a.jpg", Text(answer, "?", kind=kind)) for kind, answer in pairs]
    assert common_answers(training) == {"color": "red", "count": "two", "": "red"}
    spelled = [("a.jpg", Text(said, "is it?")) for said in ("No", "no.", "yes", "yes", "NO")]
    assert common_answers(spelled) == {"": "no"}
    asked = [Text("red", "?", kind="color"), Text("two", "?", kind="count")]
    table = accuracy_by_kind(asked, {"model": ["red", "three"]})
    assert table == {"all": {"model": 50}, "color": {"model": 100}, "count": {"model": 0}}


# --- Rows and prefixes ----------------------------------------------------------------------


def test_a_question_carries_no_loss():
    caption, asked = [START_ID, 10, 11, END_ID], [START_ID, 20, 21, ANSWER_ID, 22, END_ID]
    batch = make_batch(["a", "b"], [[caption, asked], [asked]])
    assert batch.targets.tolist() == [10, 11, END_ID, 22, END_ID, 22, END_ID]
    assert batch.asked.tolist() == [False] * 3 + [True] * 4
    read = batch.tokens.flatten()[batch.places]
    assert read.tolist() == [START_ID, 10, 11, ANSWER_ID, 22, ANSWER_ID, 22]
    assert CaptionRows({"a": [caption, asked]}, None).texts == (1, 1)


def test_prefixes_of_many_lengths_are_answered_as_each_alone():
    model, feature = build_model(), features(4)
    with torch.no_grad():
        model.decoder.position_embedding.weight[6:] += 4 * model.decoder.token_embedding.weight[2]
    prefixes = [[START_ID, *range(10, 10 + n), ANSWER_ID] for n in (1, 5, 3)] + [[START_ID]]
    for options in (
        GenerationOptions(max_length=7),
        GenerationOptions(3, max_length=7),
        GenerationOptions(2, sample=True, max_length=7),
    ):
        together = generate(model, feature, options, prefixes)
        for row, prefix in enumerate(prefixes):
            for hypothesis in together[row]:
                targets = hypothesis.tokens + [END_ID] * hypothesis.ended
                ids = [*prefix, *hypothesis.tokens][: len(prefix) + len(targets) - 1]
                tokens = torch.tensor([ids])
                positions = torch.arange(len(ids))[None]
                hidden = model.hidden(
                    feature[row : row + 1], tokens, positions, torch.zeros_like(tokens)
                )
                logits = model.decoder.logits(hidden)[0, len(prefix) - 1 :].log_softmax(-1)
                expected = logits[torch.arange(len(targets)), torch.tensor(targets)].sum().item()
                assert hypothesis.log_probability == pytest.approx(expected, abs=1e-3)
            if not options.sample:
                (alone,) = generate(model, feature[row : row + 1], options, [prefix])
                assert alone[0].tokens == together[row][0].tokens
    with pytest.raises(UserError, match="can write"):
        generate(model, feature[:1], GenerationOptions(), [[START_ID] + [9] * 20])
    assert VOCAB > 15


def test_captions_take_no_time_for_the_questions_that_they_have_not(monkeypatch):
    tokenizer = CaptionTokenizer.train(["what color is it?", "red and blue"] * 3, 300)
    encode, seen = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda texts: seen.extend(texts) or encode(texts))
    pairs = [("", "red"), ("what?", "blue"), ("", "and"), ("is it?", "red")]
    prefixes = [
        ids[: -len(encode([said])[0]) - 1]
        for (_, said), ids in zip(pairs, tokenizer.encode_texts(pairs, 40), strict=True)
    ]
    assert seen == ["what?", "is it?", "red", "blue", "and", "red"]
    assert prefixes == [tokenizer.prefixes([question], 40)[0] for question, _ in pairs]


def test_questions_are_encoded_the_same_way_for_learning_and_asking():
    tokenizer = CaptionTokenizer.train(["what color is it?", "red and blue"] * 3, 300)
    (ids,) = tokenizer.encode_texts([("What color is it?", "Red")], 40)
    [prefix] = tokenizer.prefixes(["what color is it?"], 40)
    assert ids[: len(prefix)] == prefix and prefix[-1] == ANSWER_ID
    assert tokenizer.decode(ids[len(prefix) :]) == "red"
    for end in ("", ".", " ?", "??", "？", " ?\n"):  # as people ask, and data sets as well
        assert tokenizer.prefixes([f"what color is it{end}"], 40) == [prefix]
    older = json.loads(tokenizer.to_json())
    del older["question_end"]  # whose questions were learned as they are
    older = CaptionTokenizer.from_json(json.dumps(older))
    assert [*older.prefixes(["what color is it"], 40)[0][:-1], 34, ANSWER_ID] == prefix
    assert CaptionTokenizer.from_json(tokenizer.to_json()).prefixes(["is it"], 40)[0][-2] == 34
    [long] = tokenizer.prefixes(["what color is it? " * 30], 40)
    assert len(long) == 20 and long[-1] == ANSWER_ID
    assert tokenizer.prefixes(["what color is it?"], 3) == [[START_ID, ANSWER_ID]]
    [text] = tokenizer.prefixes(["is <answer> a token?"], 40)
    assert text.count(ANSWER_ID) == 1


# --- Whole runs -----------------------------------------------------------------------------


def test_one_model_captions_and_answers(joint):
    said = (joint / "said.txt").read_text()
    assert "captions and" in said and "% right" in said and "CIDEr of beams" in said
    checkpoint = load_checkpoint(joint / "captioner_best_accuracy.safetensors")
    assert checkpoint.tasks == ("captions", "questions")
    captioner = load_captioner(joint / "captioner_best_accuracy.safetensors")
    pictures = [paint(colour, "left", 900 + i) for i, colour in enumerate(COLOURS)]
    answers = captioner.answer(pictures, ["what color is the square?"] * 3)
    assert answers == list(COLOURS)
    assert all("square" in caption for caption in captioner.caption(pictures))
    history = load_checkpoint(joint / "last.pt").training["progress"]["history"]
    assert history[-1]["samples"] and "?" not in str(history[-1]["samples"])  # captions first


def test_evaluate_gives_accuracy_beside_its_baselines(joint):
    command = [
        "evaluate.py",
        "--checkpoint",
        joint / "captioner_best_accuracy.safetensors",
        "--data_dir",
        joint,
        "--task",
        "questions",
    ]
    unused = run(*command, "--save_captions", "captions.json")
    assert unused.returncode == 1 and "are for captions" in unused.stderr
    result = run(*command)
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout.splitlines()[-1])
    assert set(scores["accuracies"]) == {"all", "color", "side"}
    assert set(scores["accuracies"]["all"]) == {"model", "wrong picture", "common answer"}
    assert scores["accuracies"]["color"]["model"] > scores["accuracies"]["color"]["wrong picture"]


def test_inference_answers(joint, tmp_path):
    checkpoint = joint / "captioner_best_accuracy.safetensors"
    paint("red", "left", 5).save(tmp_path / "one.png")
    paint("blue", "right", 6).save(tmp_path / "two.png")
    one = run(
        "inference.py",
        "--image_path",
        tmp_path / "one.png",
        "--checkpoint",
        checkpoint,
        "--question",
        "what color is the square?",
    )
    assert one.returncode == 0, one.stderr
    assert one.stdout.strip() == "red"
    asked = {
        "two.png": [{"question": "what color is the square?"}],
        "one.png": [{"question": "what color is the square?", "answer": "red"}],
    }
    (tmp_path / "q.json").write_text(json.dumps(asked))
    many = run(
        "inference.py",
        "--image_path",
        tmp_path,
        "--checkpoint",
        checkpoint,
        "--questions_file",
        tmp_path / "q.json",
        "--json",
    )
    assert many.returncode == 0, many.stderr
    found = json.loads(many.stdout.splitlines()[-1])
    assert found == {
        "two.png": [{"question": "what color is the square?", "answer": "blue"}],
        "one.png": [{"question": "what color is the square?", "answer": "red"}],
    }
    forms = {
        "q.csv": "image,question\ntwo.png,what color is the square?\n",
        "q.jsonl": '{"image": "one.png", "question": "what color is the square?", "answers": []}\n',
        "vqa.json": json.dumps({"data": [{"image_id": "TWO", "question": "what color?"}]}),
    }
    for name, text in forms.items():  # as prepare_dataset.py reads them, answers or not
        (tmp_path / name).write_text(text)
        command = ["inference.py", tmp_path, "--checkpoint", checkpoint, "--json"]
        told = run(*command, "--questions_file", tmp_path / name)
        assert told.returncode == 0, told.stderr
        answer, last = told.stdout.splitlines()  # how names are read stands elsewhere
        assert ".png: what color" in answer and '.png": [{"question": "what color' in last
    both = run(*command[:1], tmp_path / "two.png", *command[2:], "--questions_file", many.args[-2])
    assert both.returncode == 0 and list(json.loads(both.stdout.splitlines()[-1])) == ["two.png"]
    assert "asks about 1 photos that are not in" in both.stderr and "'one.png'" in both.stderr
    for odd in ("3", "null", '[{"image": "one.png", "question": "", "answers": 3}]'):
        (tmp_path / "q.json").write_text(odd)
        told = run(*command, "--questions_file", tmp_path / "q.json")
        assert told.returncode == 1 and "Traceback" not in told.stderr, told.stderr
    (tmp_path / "q.json").write_text(json.dumps({"three.png": [{"question": "what?"}]}))
    absent = run(
        "inference.py",
        "--image_path",
        tmp_path,
        "--checkpoint",
        checkpoint,
        "--questions_file",
        tmp_path / "q.json",
    )
    assert absent.returncode == 1 and "three.png" in absent.stderr


def test_questions_alone(tmp_path, encoder_dir):
    data = write_questions(write_photos(tmp_path / "data", 24))
    (data / "captions.json").unlink()
    flags = [*small_flags(data, encoder_dir), "--tasks", "questions", "--scst_epochs", 3]
    result = run("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert f"% right: {data / 'captioner_best_accuracy.safetensors'}" in result.stdout
    assert "epoch 2/2" in result.stdout  # no self-critical stage: it is about captions
    assert load_checkpoint(data / "captioner_best_accuracy.safetensors").tasks == ("questions",)
    refused = run(
        "inference.py",
        "--image_path",
        data / "images",
        "--checkpoint",
        data / "captioner_best_accuracy.safetensors",
    )
    assert refused.returncode == 1 and "not trained for captions" in refused.stderr
    assert "ask it by --question (evaluate.py: --task questions), or train" in refused.stderr
    told = shlex.split(result.stdout.splitlines()[-1])  # the command that the end names
    answered = run(*told[1:])
    assert answered.returncode == 0 and answered.stdout, answered.stderr


def test_a_split_without_questions_is_said(tmp_path, encoder_dir):
    data = write_questions(write_photos(tmp_path / "data", 24))
    flags = [*small_flags(data, encoder_dir), "--tasks", "captions,questions", "--epochs", 1]
    assert run("prepare_dataset.py", *flags[:8], *flags[-4:-2]).returncode == 0
    asked = json.loads((data / "questions.json").read_text())
    learned = json.loads((data / "splits.json").read_text())["train"]
    asked[learned[0]].append({"question": "what?", "answer": "..."})
    (data / "questions.json").write_text(json.dumps({name: asked[name] for name in learned}))
    result = run("train.py", *flags)
    assert result.stdout.count("left out 1 answers without a word") == 1
    assert "none      of the questions are of the split 'val': they are not scored" in result.stdout
    command = ["--checkpoint", data / "last.pt", "--data_dir", data, "--task", "questions"]
    refused = run("evaluate.py", *command)
    assert refused.returncode == 1
    assert "no photo of the split 'val' in " in refused.stderr and "has questions" in refused.stderr


def test_captions_that_the_search_would_never_write_are_counted(capsys):
    captions = ["a red dog and a red dog", "अलग अलग रंग", "a red dog"]
    tokenizer = CaptionTokenizer.train(captions * 2, 400)
    texts = {"a.jpg": [*map(Text, captions), Text("a a a a", "what?")]}
    rows = CaptionRows(encode_rows(tokenizer, texts, ["a.jpg"], 50), None)
    say_repeats(rows, 3)
    assert "2 of 3 captions say 3 tokens again or a word twice" in capsys.readouterr().out
    say_repeats(rows, 0)
    rows = CaptionRows(encode_rows(tokenizer, {"a.jpg": [Text("a red dog")]}, ["a.jpg"], 50), None)
    say_repeats(rows, 3)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("question", "answer"),
    [("what runs there?", "a small brown dog"), ("what is it that runs over there?", "dog")],
)
def test_the_length_that_is_named_keeps_whole_questions_and_answers(capsys, question, answer):
    tokenizer = CaptionTokenizer.train(["a dog runs"] * 3, 300)
    texts = {"a.jpg": [Text(answer, question), Text("a dog")]}
    length, whole = 24, tokenizer.encode_texts([(question, answer)], 1000)
    for cut in (True, False):
        rows = CaptionRows(encode_rows(tokenizer, texts, ["a.jpg"], length), None)
        assert cut != (rows.groups["a.jpg"][0].tolist() == whole[0])
        say_cut(tokenizer, texts, rows, length, fixed=True)
        said = capsys.readouterr().out
        assert said.count("a decoder begun anew with --max_caption_length") == cut
        say_cut(tokenizer, texts, rows, length)
        said = capsys.readouterr().out
        assert "begun anew" not in said
        assert ("1 of 2 texts" in said) == cut
        length = int(said.split("--max_caption_length ")[1].split()[0]) if said else 0


def test_what_answers_weigh_can_be_set(tmp_path, encoder_dir):
    data = write_questions(write_photos(tmp_path / "data", 24))
    for weight in (0.0, 1.0, 4.0):
        flags = [
            *small_flags(data, encoder_dir),
            "--tasks",
            "captions,questions",
            "--dropout",
            0,
            "--question_weight",
            weight,
        ]
        state, found = start(*flags)
        state.model.eval()
        ((batch, feature),) = next(train.batch_groups(state, found))
        groups = [found.train.groups[name] for name in batch.names]
        summed = tokens = 0.0
        for asked, counts in ((False, 1.0), (True, weight)):
            rows = [[ids for ids in group if (ANSWER_ID in ids) == asked] for group in groups]
            alone = make_batch(batch.names, rows)
            summed += counts * state.model.loss(feature.float(), alone, 0.1).item()
            tokens += counts * len(alone.targets)
        update = train.update(state, found, [(batch, feature)])
        # What is shown is nats a token, however much an answer's weigh.
        shown = (update.figures[0] / update.figures[1]).item()
        assert shown == pytest.approx(summed / tokens, rel=1e-3)
        # A batch may hold questions alone, and where nothing else is learned they weigh 1.
        rows = [[ids for ids in found.train.groups[n] if ANSWER_ID in ids] for n in batch.names]
        alone = make_batch(batch.names, rows), feature
        assert train.update(state, found, [alone]).figures[-1] == 0  # nothing bad
        found.tasks = ("questions",)
        plain = state.model.loss(feature.float(), alone[0], 0.1).item()
        loss, *_ = train.step_loss(state, found, *alone, weight)
        assert loss.item() == pytest.approx(plain, rel=1e-3)
