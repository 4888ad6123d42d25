"""Scores equal pycocoevalcap's, with its Java tokenizer, to four decimals."""

from __future__ import annotations

import json
import random
import time

import pytest

from metrics import (
    CiderD,
    bleu,
    bootstrap_interval,
    cider_d_per_image,
    diversity,
    repeats,
    rouge_l,
    score,
    tokenize,
)
from tests.conftest import REPO

GOLDENS = json.loads((REPO / "tests/goldens/metrics.json").read_text(encoding="utf-8"))
KARPATHY = REPO.parent / "shared/data/dataset_flickr8k_trainval.json"


@pytest.mark.parametrize("text", GOLDENS["tokens"])
def test_tokens_are_javas(text):
    assert " ".join(tokenize(text)) == GOLDENS["tokens"][text]


@pytest.mark.skipif(not KARPATHY.exists(), reason="the real captions are not on this machine")
@pytest.mark.parametrize("k", range(5))
def test_human_captions_score_as_with_pycocoevalcap(k):
    images = json.loads(KARPATHY.read_text())["images"]
    human = {i["filename"]: [s["raw"] for s in i["sentences"]] for i in images
             if i["split"] == "val"}  # fmt: skip
    one = {name: group[k] for name, group in human.items()}
    found = score(one, {name: group[:k] + group[k + 1 :] for name, group in human.items()})
    assert found.keys() == GOLDENS["human"][k].keys()
    for metric, value in GOLDENS["human"][k].items():
        assert found[metric] == pytest.approx(value, abs=5e-5), metric


def test_scores_worked_by_hand():
    caption, reference = "the cat sat".split(), "the cat sat down".split()
    brevity = 2.718281828459045 ** (1 - 4 / 3)
    assert bleu([caption], [[reference]]) == pytest.approx(
        [100 * brevity] * 3 + [0.0], abs=0.05
    )
    precision, recall = 1.0, 0.75
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(caption, [reference]) == pytest.approx(100 * expected)
    assert rouge_l([], [reference]) == 0.0


def test_ciderd_by_its_definition():
    """A perfect caption of words that no other photo has scores 10 (1000 on our scale)."""
    references = {"a": [list("wxyz")], "b": [list("klmn")]}
    scorer = CiderD(references)
    assert scorer.score("a", list("wxyz")) == pytest.approx(1000)
    assert scorer.score("a", list("klmn")) == 0.0
    assert 0 < scorer.score("a", list("wxy")) < 1000
    assert scorer.score("a", []) == 0.0
    ids = CiderD({name: [[ord(c) for c in r] for r in group] for name, group in references.items()})
    for text in ("wxyz", "wxy", "wxww"):
        words = scorer.score("a", list(text))
        assert ids.score("a", [ord(c) for c in text]) == pytest.approx(words)


def test_corpus_score_is_the_mean_of_photos():
    references = {"a": ["A dog runs .", "a dog"], "b": ["two cats sleep", "cats"]}
    captions = {"a": "a dog runs", "b": "two dogs"}
    values = cider_d_per_image(captions, references)
    assert score(captions, references)["CIDEr-D"] == pytest.approx(sum(values.values()) / 2)


def test_rewards_are_quick_enough_to_train_on():
    dice = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    references = {str(i): [dice.choices(words, k=12) for _ in range(5)] for i in range(200)}
    scorer = CiderD(references)
    started = time.process_time()
    for i in range(2000):
        scorer.score(str(i % 200), dice.choices(words, k=12))
    assert time.process_time() - started < 4  # a tenth of that on a quiet machine


def test_bootstrap_interval_holds_the_mean_and_narrows():
    dice = random.Random(1)
    few, many = ([dice.gauss(50, 10) for _ in range(n)] for n in (50, 5000))
    low, high = bootstrap_interval(few)
    assert low < sum(few) / 50 < high
    assert bootstrap_interval(few) == (low, high)
    low_many, high_many = bootstrap_interval(many)
    assert high_many - low_many < (high - low) / 4


def test_failures_are_counted():
    assert repeats("a dog dog runs".split())
    assert repeats("a red shirt a red shirt".split())
    assert repeats("in the park a dog in the park".split())
    assert not repeats("a dog and a cat and a bird".split())
    found = diversity(
        {"1": "a dog", "2": "a dog", "3": "a cat cat", "4": "birds"}, ["A dog .", "a horse"]
    )
    assert found["most frequent caption"] == 0.5
    assert found["not in training"] == 0.5
    assert found["with repetition"] == 0.25
    assert found["mean length"] == pytest.approx(8 / 4)
    assert found["distinct-1"] == pytest.approx(4 / 8)
