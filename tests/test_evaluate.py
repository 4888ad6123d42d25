"""Scoring: what evaluate.py prints and writes, and the scorers that others made."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import commands
import evaluate
from dataset import data_paths, load_texts
from encoder import open_image
from tests.conftest import build_encoder, run, write_photos, write_questions
from utils import UserError


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    """A tiny CLIP with a tokenizer of single letters."""
    folder = build_encoder("clip", tmp_path_factory.mktemp("clip"))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


def scores_of(result) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_evaluate_scores_and_reports(trained, clip_dir):
    best = trained / "captioner_best_cider.safetensors"
    scores = scores_of(
        run("evaluate.py", "--checkpoint", best, "--data_dir", trained, "--clip", clip_dir)
    )
    assert scores["split"] == "val" and scores["images"] > 0
    assert all(0 <= scores[f"BLEU-{n}"] <= 100 for n in (1, 2, 3, 4))
    assert math.isfinite(scores["CIDEr-D"])
    assert 0 <= scores["CLIPScore"] <= 250 and "CLIPScore" not in scores["not computed"]
    assert set(scores["not computed"]) | set(scores) >= {"METEOR", "SPICE"}
    report = (trained / "captioner_best_cider_val.html").read_text()
    assert report.count("data:image/jpeg;base64") >= scores["images"]
    assert "name=viewport" in report
    (terms,) = re.findall("<dl>.*</dl>", report)
    for line in re.search("<pre>(.*?)</pre>", report, re.S)[1].splitlines()[2:]:
        name = re.match("[^:, ]+", line)[0]
        assert name.rstrip("1234") in terms, f"{name} is not explained"
        assert not re.fullmatch(r"\S+( +[\d.]+)+", line) or len(line) <= 32, "wider than a phone"


def test_the_way_of_writing_can_be_chosen(tmp_path, trained):
    best = trained / "captioner_best_cider.safetensors"
    flags = ["evaluate.py", "--checkpoint", best, "--data_dir", trained]
    written = tmp_path / "captions.json"
    scores = scores_of(run(*flags, "--max_length", 2, "--beam_size", 1, "--save_captions", written))
    captions = json.loads(written.read_text())
    assert len(captions) == scores["images"] and all(map(str.strip, captions.values()))
    assert scores["length"] <= 2 and scores["options"]["max_length"] == 2
    wrong = run(*flags, "--groups", 3)  # of 10 beams
    assert wrong.returncode == 1 and "beam_size is 10, and groups 3" in wrong.stderr
    too_long = run(*flags, "--max_length", 99)
    assert too_long.returncode == 1 and "can write 19 tokens" in too_long.stderr


def test_scores_name_the_checkpoint_that_was_scored(tmp_path, trained, monkeypatch, capsys):
    """Also where a training that goes on has put a better one in its place meanwhile."""
    best, score = tmp_path / "best.safetensors", evaluate.score_captions
    shutil.copy(trained / "captioner_best_cider.safetensors", best)
    expected = evaluate.file_digest(best)[:16]
    monkeypatch.setattr(evaluate, "score_captions", lambda s: best.write_bytes(b"x") and score(s))
    evaluate.main(["--checkpoint", str(best), "--data_dir", str(trained)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"] == expected


def test_photos_of_another_source_are_scored_whole(tmp_path, joint):
    data = write_questions(write_photos(tmp_path / "held_out", count=12))
    scored = ["evaluate.py", "--checkpoint", joint / "captioner_best_cider.safetensors"]
    scored += ["--data_dir", data]
    lost = run(*scored, "--task", "questions", "--questions_file", data / "questions.json").stderr
    assert re.search(r"splits.json is missing: .*--split test --tasks questions --data_dir", lost)
    assert f"--questions_file {data / 'questions.json'}" in lost
    prepared = ["prepare_dataset.py", "--dataset", "custom", "--data_dir", data, "--split"]
    names = {"images": [{"filename": f"{i:03d}.png", "split": "test"} for i in range(12)]}
    (data / "dataset_mine.json").write_text(json.dumps(names))
    assert "or --split test to score" in run(*prepared, "karpathy").stderr
    assert "evaluate.py --checkpoint CHECKPOINT" in run(*prepared, "test").stdout
    with pytest.raises(UserError, match="SPLIT is 'test', which leaves no photo to train on"):
        commands.train(["--split", "test"])
    assert "of the split 'val' in" in (said := run(*scored).stderr) and ": --split test has" in said
    captions = scores_of(run(*scored, "--split", "test"))
    assert captions["images"] == 12 and "novel" not in captions  # which nobody knows
    answers = scores_of(run(*scored, "--split", "test", "--task", "questions"))
    assert answers["questions"] == 24
    assert set(answers["accuracies"]["all"]) == {"model", "wrong picture"}


def test_reports_about_other_data_do_not_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "mine" / "best.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    found = {
        data: evaluate.report_path(
            commands.evaluate(["--checkpoint", str(checkpoint), "--data_dir", data])
        )
        for data in ("mine", "other/")
    }
    names = {"mine": "best_val.html", "other/": "best_other_val.html"}
    assert found == {data: tmp_path / "mine" / name for data, name in names.items()}
    hub = commands.evaluate(["--checkpoint", "me/captioner", "--data_dir", "mine"])
    assert evaluate.report_path(hub) == Path("me_captioner_mine_val.html")


def test_questions_that_lie_elsewhere_are_to_be_named(tmp_path):
    with pytest.raises(UserError, match=r"questions\.json is missing: .*--questions_file"):
        load_texts(data_paths(SimpleNamespace(DATA_DIR=tmp_path)), ["questions"])


def test_another_split_of_what_was_learned_from_is_said(tmp_path, trained):
    data = shutil.copytree(trained, tmp_path / trained.name)
    flags = ["evaluate.py", "--checkpoint", data / "captioner_best_cider.safetensors"]
    flags += ["--data_dir", data, "--report", tmp_path / "report.html"]
    assert "note:" not in run(*flags).stdout
    splits = json.loads((data / "splits.json").read_text()) | {"source": "TRAIN_SPLIT_RATIO = 0.3"}
    (data / "splits.json").write_text(json.dumps(splits))
    captions = json.loads((data / "captions.json").read_text())
    del captions[splits["val"][0]], captions[splits["val"][1]][1:]
    (data / "captions.json").write_text(json.dumps(captions))
    said = (scored := run(*flags)).stdout
    scores, report = scores_of(scored), (tmp_path / "report.html").read_text()
    assert scores["left out"] == 1 and scores["precision"] in ("float32", "bfloat16")
    assert f"human: of the {scores['images'] - 1} photos with several captions" in report
    assert re.search(f"cider.safetensors, .*{scores['images']} photos .1 left out.,", report)
    assert "note: the checkpoint learned from another split of these photos (TRAIN_" in said
    assert "left out 1 photos of the split, for which there are no captions" in said
    captions = dict.fromkeys(captions, ["一只棕色的狗在草地上奔跑。"])
    (data / "captions.json").write_text(json.dumps(captions))
    assert "no spaces between words" not in said and "no spaces between words" in run(*flags).stdout


def test_what_is_read_is_not_written_over(tmp_path, trained):
    best = trained / "captioner_best_cider.safetensors"
    made = tmp_path / "features"
    flags = ["evaluate.py", "--checkpoint", best, "--data_dir", trained, "--features_dir", made]
    before = best.read_bytes(), (trained / "captions.json").read_bytes()
    for more, says in (
        (["--report", best], "is what is read"),
        (["--save_captions", trained / "captions.json"], "is what is read"),
        (["--report", tmp_path], "is no file"),
        (["--report", "/dev/null"], "is no file"),
        (["--report", tmp_path / "x", "--save_captions", tmp_path / "x"], "written already"),
        (["--save_captions", best / "x.json"], "can't be written to"),
        (["--clip", "no/clip"], "can't be loaded"),
        (["--features_dir", best], "choose another --features_dir"),
    ):
        result = run(*flags, *more)
        assert result.returncode == 1 and says in result.stderr, result.stderr
        assert not made.exists()  # said before photos are encoded
    assert (best.read_bytes(), (trained / "captions.json").read_bytes()) == before


def test_clip_score_is_what_its_paper_says(tmp_path, clip_dir):
    data = write_photos(tmp_path / "data", 3)
    files = sorted((data / "images").iterdir())
    captions = ["a red square", "a dog", "zebra"]
    device = torch.device("cpu")
    clip = evaluate.load_clip(str(clip_dir), device)
    found = evaluate.clip_score(clip, files, captions, device)
    model = transformers.CLIPModel.from_pretrained(clip_dir).eval()
    words = transformers.AutoTokenizer.from_pretrained(clip_dir)
    processor = transformers.AutoImageProcessor.from_pretrained(clip_dir, backend="pil")
    total = 0.0
    for file, caption in zip(files, captions, strict=True):
        ids = words(
            f"A photo depicts {caption}", return_tensors="pt", truncation=True, max_length=16
        )
        pixels = processor(images=open_image(file), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(**ids, pixel_values=pixels)
        cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds).item()
        total += 2.5 * max(cosine, 0)
    assert found == pytest.approx(100 * total / 3, rel=1e-3, abs=1e-3)
    with pytest.raises(UserError, match="can't be loaded"):
        evaluate.load_clip(str(tmp_path / "nothing"), device)


def test_what_is_no_clip_gives_no_score(tmp_path, clip_dir):
    other = build_encoder("siglip", tmp_path / "siglip")  # whose weights CLIP's class would lack
    for file in clip_dir.glob("token*"):
        shutil.copy(file, other)
    for folder in (other, build_encoder("clip", tmp_path / "clip")):  # which has no tokenizer
        with pytest.raises(UserError, match="the CLIP model .* can't be loaded"):
            evaluate.load_clip(str(folder), torch.device("cpu"))


@pytest.mark.fault(count=4)
def test_a_broken_clip_is_refused_in_a_line(tmp_path, clip_dir):
    def says(file: str, **said: object) -> None:
        (folder / file).write_text(json.dumps(json.loads((clip_dir / file).read_text()) | said))

    folder = tmp_path / "clip"
    endless, large = {"num_hidden_layers": 10_000_000}, {"shortest_edge": 1_000_000}
    for harm, reason in (
        (lambda: (folder / "model.safetensors").write_bytes(b"cut off"), "can't be loaded"),
        (lambda: (folder / "config.json").write_text("[]"), "can't be loaded"),
        (lambda: says("config.json", text_config=endless), "10,000,000 layers"),
        (lambda: says("preprocessor_config.json", size=large), "1,000,000 pixels along a side"),
    ):
        shutil.copytree(clip_dir, folder, dirs_exist_ok=True)
        harm()
        with pytest.raises(UserError, match=f"the .* '{folder}' .*{reason}"):
            evaluate.load_clip(str(folder), torch.device("cpu"))


def test_java_scores_are_computed_or_their_lack_is_explained(monkeypatch):
    captions, references = {"a": "a dog runs"}, {"a": ["a dog runs", "the dog is running"]}
    monkeypatch.setenv("PATH", "/nowhere")
    assert evaluate.java_scores(captions, references) == (
        {},
        {"METEOR": "needs Java", "SPICE": "needs Java"},
    )


@pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs Java and pycocoevalcap",
)
def test_meteor_knows_a_good_caption():
    references = {"a": ["a dog runs on grass", "the dog is running"], "b": ["two men sit"] * 2}
    good, _ = evaluate.java_scores({"a": "a dog runs", "b": "two men sit"}, references)
    poor, _ = evaluate.java_scores({"a": "a cat", "b": "one woman"}, references)
    assert good["METEOR"] > poor["METEOR"]
