"""Scores equal pycocoevalcap's with its Java tokenizer; `make_metrics_goldens.py` made these."""

from __future__ import annotations

import json
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metrics import (
    CiderD,
    bootstrap_interval,
    diversity,
    score,
    tokenize,
    vqa_accuracy,
    without_spaces,
)
from tests.conftest import REPO
from tokenizer import normalize

GOLDENS = json.loads((REPO / "tests/goldens/metrics.json").read_text(encoding="utf-8"))
CORPUS = GOLDENS["corpus"]
KARPATHY = REPO.parent / "shared/data/dataset_flickr8k_trainval.json"
FOUR_DECIMALS = {"abs": 5e-5, "rel": 0}


@pytest.mark.parametrize("text", GOLDENS["tokens"])
def test_tokens_are_javas(text):
    assert " ".join(tokenize(text)) == GOLDENS["tokens"][text]


@settings(deadline=2000)  # milliseconds: a rule that backtracks without end takes far longer
@given(st.text() | st.text(alphabet="aAn5 .,;:-'’\"/&@(<>!_"))
@example("a" * 5000 + "'" * 5000)
@example("a." * 5000 + "-" * 5000)
@example("<a " * 2000)
def test_any_text_has_tokens(text):
    """No text stops the tokenizer, and a token never holds what the scorers cut at."""
    for token in tokenize(text):
        assert token and token == token.lower()
        assert token.split(" ") == [token]


def test_scores_of_a_small_corpus():
    """It has an empty caption, an empty reference, a fraction ("1 1/2") and a stutter in it."""
    captions, references = CORPUS["captions"], CORPUS["references"]
    found, per_image = score(captions, references)
    assert found == pytest.approx(CORPUS["scores"], **FOUR_DECIMALS)
    assert [*per_image] == [*captions]
    assert [*per_image.values()] == pytest.approx(CORPUS["per_image"], **FOUR_DECIMALS)
    assert found["CIDEr-D"] == pytest.approx(np.mean([*per_image.values()]))


def human_captions() -> dict[str, list[str]]:
    images = json.loads(KARPATHY.read_text(encoding="utf-8"))["images"]
    return {
        image["filename"]: [sentence["raw"] for sentence in image["sentences"]]
        for image in images
        if image["split"] == "val"
    }


needs_photos = pytest.mark.skipif(
    not KARPATHY.exists(), reason="the real captions are not on this machine"
)


@needs_photos
def test_scores_of_generated_captions():
    """What a model of ours wrote for the real validation photos, against all five humans."""
    generated = GOLDENS["generated"]
    found, _ = score(generated["captions"], human_captions())
    assert found == pytest.approx(generated["scores"], **FOUR_DECIMALS)


@needs_photos
@pytest.mark.parametrize("k", range(5))
def test_scores_of_human_captions(k):
    """Each human caption of the real validation photos against the photo's other four."""
    human = human_captions()
    one = {name: group[k] for name, group in human.items()}
    others = {name: group[:k] + group[k + 1 :] for name, group in human.items()}
    assert score(one, others)[0] == pytest.approx(GOLDENS["human"][k], **FOUR_DECIMALS)


def test_scores_worked_by_hand():
    captions = {"a": "the cat sat"}
    references = {"a": ["the cat sat down"]}
    brevity = 100 * math.exp(1 - 4 / 3)
    found, _ = score(captions, references)
    assert [found[f"BLEU-{n}"] for n in (1, 2, 3)] == pytest.approx([brevity] * 3, abs=1e-4)
    precision, recall = 1.0, 0.75
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert found["ROUGE-L"] == pytest.approx(100 * expected)


def test_references_must_fit_the_captions():
    pairs = {"a": "a dog"}
    for captions, references in (
        (pairs, {"a": ["a dog"], "b": ["a cat"]}),
        (pairs, {"a": []}),
        ({}, {}),
    ):
        with pytest.raises(ValueError, match="of each a caption and a reference"):
            score(captions, references)


# --- CIDEr-D as a reward --------------------------------------------------------------------

UNLIKE = {"a": [list("wxyz")], "b": [list("klmn")]}


def test_cider_d_of_a_perfect_caption_is_ten():
    scorer = CiderD(UNLIKE)
    assert scorer.score("a", list("wxyz")) == pytest.approx(1000)
    assert scorer.score("a", list("klmn")) == 0
    assert scorer.score("a", []) == 0


def test_cider_d_of_a_shorter_caption_by_hand():
    """Of n-grams that all weigh the same, "wxy" has 3 of 4, 2 of 3, 1 of 2 and 0 of 1."""
    cosines = [3 / math.sqrt(3 * 4), 2 / math.sqrt(2 * 3), 1 / math.sqrt(1 * 2), 0]
    expected = 10 * sum(cosines) / 4 * math.exp(-(1**2) / (2 * 6**2))
    assert CiderD(UNLIKE).score("a", list("wxy")) == pytest.approx(100 * expected)


def test_cider_d_does_not_pay_for_repetition():
    scorer = CiderD(UNLIKE)
    assert scorer.score("a", list("wxwxwxwx")) < scorer.score("a", list("wx"))


def test_cider_d_takes_words_or_ids_one_by_one():
    captions, references = CORPUS["captions"], CORPUS["references"]
    words: dict[str, int] = {}

    def ids(text: str) -> list[int]:
        pieces = " ".join(tokenize(text)).split()
        return [words.setdefault(piece, len(words)) for piece in pieces]

    scorer = CiderD({name: [ids(text) for text in group] for name, group in references.items()})
    twice = list(captions) * 2
    found = [scorer.score(name, ids(captions[name])) for name in twice]
    assert found == pytest.approx(np.array(CORPUS["per_image"] * 2), **FOUR_DECIMALS)


def test_document_frequencies_come_from_the_references_given():
    """A word that every photo has is worth nothing; a rare one decides."""
    scorer = CiderD({"a": [["dog", "red"]], "b": [["dog", "blue"]], "c": [["dog", "green"]]})
    assert scorer.score("a", ["dog"]) == 0
    assert scorer.score("a", ["red"]) > 0
    with_end = CiderD({"a": [["x", "END"]], "b": [["y", "END"]]})
    assert with_end.score("a", ["x", "END"]) > with_end.score("a", ["x"])
    with pytest.raises(ValueError, match="at least one reference"):
        CiderD({"a": []})


# --- Around the scores ----------------------------------------------------------------------


def test_bootstrap_interval():
    few, many = (np.random.default_rng(1).normal(50, 10, size) for size in (100, 10_000))
    low, high = bootstrap_interval(few)
    assert high - few.mean() == pytest.approx(few.mean() - low, rel=0.1)
    # The standard error of a mean of 100 is a tenth of the deviation; 95 % is 1.96 of them a side.
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 10, rel=0.15)
    assert bootstrap_interval(few) == (low, high)
    narrow = bootstrap_interval(many)
    assert narrow[1] - narrow[0] < (high - low) / 5


def test_diversity_is_counted():
    captions = ["A dog .", "a dog", "a cat cat", "birds", "in the park a dog in the park"]
    found = diversity(captions, training_captions=["a Dog!", "a horse"])
    assert found["distinct-1"] == pytest.approx(100 * 7 / 16)
    assert found["distinct-2"] == pytest.approx(100 * 7 / 11)
    assert found["length"] == pytest.approx(16 / 5)
    assert found["repetitive"] == pytest.approx(40)
    assert found["most_frequent"] == pytest.approx(40)
    assert found["novel"] == pytest.approx(60)
    assert diversity(["a red dog and a red cat"], [])["repetitive"] == 0


@pytest.mark.parametrize("said", ["一只 狗 在 跑 。", "一只狗在跑。", "कुत्ता है।", "کتا ہے۔", "Да."])
def test_no_script_s_closing_full_stop_is_learned_or_scored(said):
    bare = said.rstrip(" .。।۔")
    assert normalize(said) == bare.lower()
    assert tokenize(said) == tokenize(bare)
    assert vqa_accuracy(bare, [said]) == vqa_accuracy(bare, [said] * 3) == 1


@pytest.mark.parametrize("text", ["Một người đàn ông", "İki köpek", "un café"])
def test_people_s_spelling_of_letters_is_the_decoder_s(text):
    for said in (text, unicodedata.normalize("NFD", text)):
        written = normalize(said)
        assert tokenize(written) == tokenize(said) == tokenize(text.replace("İ", "i"))
        assert vqa_accuracy(written, [said]) == vqa_accuracy(written, [said] * 3) == 1


def test_a_script_without_spaces_is_scored_sign_by_sign_and_that_is_said():
    assert tokenize("一个穿着T恤的人") == [*"一个穿着t恤的人"]
    assert tokenize("男の子がスケートボードに乗る") == [*"男の子が", "スケートボード", *"に乗る"]
    assert tokenize("「犬」と猫が２匹、ﾎﾞｰﾙで遊ぶ。") == [*"犬と猫が2匹、", "ボール", *"で遊ぶ"]
    assert tokenize("2只狗和3只猫") == [*"2只狗和3只猫"]  # a number parts no words
    assert tokenize("สุนัขวิ่ง") == ["สุ", "นั", "ข", "วิ่", "ง"]
    references = {"1": ["一只狗在草地上跑"], "2": ["一个男人在骑自行车"]}
    written = {"1": "一只狗在跑步", "2": "一个女人骑车"}
    assert score(written, references)[0]["CIDEr-D"] > 30
    odd = ["一只狗在跑。", "犬が走っている", "สุนัขวิ่งบนหญ้า"]
    assert all(without_spaces([text, text, "a dog"]) for text in odd)
    for text in ("一只 棕色 的 狗 在 草地 上 奔跑 。", "สุนัข วิ่ง บน หญ้า", "갈색 개가", "狗"):
        assert not without_spaces([text, text, odd[0]])
    assert not without_spaces([])
