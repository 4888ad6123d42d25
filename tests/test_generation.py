"""Generation: what it returns is what the model says, whatever the way it was found."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

import generation
from generation import generate, largest
from options import GenerationOptions
from tests.conftest import Waits
from tests.test_model import VOCAB, build_model, features, plain_logits
from tokenizer import ANSWER_ID, END_ID, PAD_ID, SPECIAL_TOKENS, START_ID
from utils import UserError

OPTIONS = {
    "greedy": GenerationOptions(),
    "beam": GenerationOptions(beam_size=4),
    "long": GenerationOptions(beam_size=4, length_penalty=2.0),
    "no penalty": GenerationOptions(beam_size=4, length_penalty=0.0),
    "groups": GenerationOptions(beam_size=6, groups=3, diversity=1.0),
    "no repeats": GenerationOptions(beam_size=3, no_repeat_ngram=1),
    "bounds": GenerationOptions(beam_size=3, min_length=6, max_length=9),
    "sample": GenerationOptions(beam_size=3, sample=True),
    "nucleus": GenerationOptions(beam_size=3, sample=True, top_p=0.8, top_k=5, temperature=0.7),
}


def log_probability(model, feature, hypothesis) -> float:
    """What a full forward pass says of a hypothesis."""
    targets = hypothesis.tokens + ([END_ID] if hypothesis.ended else [])
    logits = plain_logits(model, feature, [START_ID, *hypothesis.tokens][: len(targets)])
    chosen = logits.log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets)]
    return chosen.sum().item()


@pytest.fixture
def ending():
    """A model that likes to end after some words, as trained ones do."""
    model = build_model()
    with torch.no_grad():
        decoder = model.decoder
        decoder.position_embedding.weight[4:] += 4 * decoder.token_embedding.weight[END_ID]
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_equal_a_full_forward(ending, name):
    options, feature = OPTIONS[name], features(5)
    for row, group in enumerate(generate(ending, feature, options)):
        assert 1 <= len(group) <= options.beam_size
        assert [h.score for h in group] == sorted((h.score for h in group), reverse=True)
        for h in group:
            expected = log_probability(ending, feature[row], h)
            assert h.log_probability == pytest.approx(expected, abs=1e-3)
            length = len(h.tokens) + h.ended
            assert h.score == pytest.approx(h.log_probability / length**options.length_penalty)
            assert not {PAD_ID, START_ID, END_ID, ANSWER_ID} & set(h.tokens)
        if not options.sample:  # none twice, and one that was cut only where no other is to be had
            assert len({tuple(h.tokens) for h in group}) == len(group)
            assert len({h.ended for h in group}) == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_neither_order_nor_company_matters(ending, name):
    feature = features(12)  # so many that rows which are done stay a while
    if OPTIONS[name].sample:
        pytest.skip("draws belong to a place in the batch")
    together = generate(ending, feature, OPTIONS[name])
    alone = [generate(ending, feature[i : i + 1], OPTIONS[name])[0] for i in (3, 0, 4, 1, 2)]
    for i, group in zip((3, 0, 4, 1, 2), alone, strict=True):
        assert [h.tokens for h in group] == [h.tokens for h in together[i]]


def test_one_beam_is_greedy_search(ending):
    feature = features(5)
    for row, group in enumerate(generate(ending, feature, GenerationOptions())):
        ids = [START_ID]
        while len(ids) < ending.config.max_length:
            logits = plain_logits(ending, feature[row], ids)[-1]
            logits[[PAD_ID, START_ID, ANSWER_ID]] = float("-inf")
            ids.append(int(logits.argmax()))
            if ids[-1] == END_ID:
                break
        assert group[0].tokens == [i for i in ids[1:] if i != END_ID]


def test_stopping_early_costs_no_better_caption(monkeypatch, ending):
    """Of a model that ends soon, yet not at once, a search to the end finds the same best."""
    decoder = ending.decoder
    with torch.no_grad():
        decoder.position_embedding.weight[4:] -= 2 * decoder.token_embedding.weight[END_ID]
    feature, options = features(20), GenerationOptions(4, length_penalty=2.0)
    early = generate(ending, feature, options)

    def at_the_end(rows) -> list[int]:
        return [*range(len(rows.images))] * (rows.history.shape[2] == rows.limit)

    monkeypatch.setattr(generation._Rows, "_complete", at_the_end)
    for some, others in zip(early, generate(ending, feature, options), strict=True):
        assert some[0].tokens == others[0].tokens


@pytest.mark.parametrize("beams", [2, 3, 8])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_more_beams_never_score_less_than_greedy(ending, beams, penalty):
    feature = features(20)
    one = generate(ending, feature, GenerationOptions(1, penalty))
    more = generate(ending, feature, GenerationOptions(beams, penalty))
    finished = [pair for pair in zip(one, more, strict=True) if pair[0][0].ended]
    assert len(finished) > 5  # a greedy caption that was cut is no caption to compare with
    for greedy, beam in finished:
        assert beam[0].score >= greedy[0].score - 1e-5


def test_wide_beam_finds_the_best_of_all(ending):
    """With as many beams as there are prefixes, the search is exhaustive."""
    feature = features(1)
    options = GenerationOptions(beam_size=VOCAB, length_penalty=0.0, max_length=2)
    best = generate(ending, feature, options)[0][0]
    first = plain_logits(ending, feature[0], [START_ID])[-1].log_softmax(-1)
    scores = {}
    for token in range(4, VOCAB):
        second = plain_logits(ending, feature[0], [START_ID, token])[-1].log_softmax(-1)
        scores[token,] = (first[token] + second[END_ID]).item()
    scores[()] = first[END_ID].item()
    assert tuple(best.tokens) == max(scores, key=scores.get)


def test_bounds_and_repeats_are_kept(ending):
    feature = features(5)
    for group in generate(ending, feature, OPTIONS["bounds"]):
        assert all(6 <= len(h.tokens) + 1 and len(h.tokens) + h.ended <= 9 for h in group)
    repeating = generate(ending, feature, GenerationOptions(min_length=15))
    tokens = [group[0].tokens for group in repeating]
    assert any(len(set(ids)) < len(ids) for ids in tokens)  # so there is something to forbid
    for group in generate(ending, feature, GenerationOptions(no_repeat_ngram=1, min_length=15)):
        assert len(set(group[0].tokens)) == len(group[0].tokens)


@pytest.mark.parametrize("merged", [len(SPECIAL_TOKENS), generation.MERGED_IDS])
def test_no_ngram_twice_and_no_token_twice_in_a_row(monkeypatch, merged):
    """A model that says its last token again, or the one before, is held to neither; but single
    bytes may follow themselves, or nobody could write "400"."""
    monkeypatch.setattr("generation.MERGED_IDS", merged)
    model, feature = build_model(), features(6)
    with torch.no_grad():
        model.decoder.token_embedding.weight *= 8  # the tied embedding likes what it just read
    options = {"min_length": 15, "max_length": 15}

    def repeats(found) -> tuple[int, int]:
        ids = [group[0].tokens for group in found]
        stutters = sum(a == b for group in ids for a, b in pairwise(group))
        pairs = [list(pairwise(group)) for group in ids]
        return stutters, sum(len(group) - len(set(group)) for group in pairs)

    assert min(repeats(generate(model, feature, GenerationOptions(**options)))) > 0
    for way in ({}, {"beam_size": 3}, {"sample": True, "beam_size": 2}):
        chosen = GenerationOptions(no_repeat_ngram=2, **options, **way)
        stutters, pairs = repeats(generate(model, feature, chosen))
        assert (stutters > 0, pairs) == (merged > VOCAB, 0)


@pytest.mark.parametrize("total", [3, 100, 250, 7669])
def test_the_largest_are_those_that_topk_finds(total):
    scores = torch.randn(5, total, generator=torch.Generator().manual_seed(0))
    scores[0, 2:] = float("-inf")  # as most are of a row whose tokens are forbidden
    for count in (1, 3, 20):
        expected = scores.topk(min(count, total), dim=1)
        values, places = largest(scores, min(count, total))
        assert torch.equal(values, expected.values)
        assert torch.equal(scores.gather(1, places), values)
        assert torch.equal(places[1:], expected.indices[1:])


def test_samples_follow_the_seed_and_the_distribution(ending):
    feature = features(1)
    options = [GenerationOptions(200, sample=True, max_length=1, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (generate(ending, feature, option)[0] for option in options)
    assert first == again
    assert first != other
    logits = plain_logits(ending, feature[0], [START_ID])[-1]
    logits[[PAD_ID, START_ID, ANSWER_ID]] = float("-inf")
    probabilities = logits.softmax(-1)
    likely = int(probabilities.argmax())
    share = sum(h.tokens == [likely] for h in first) / 200
    assert share == pytest.approx(probabilities[likely].item(), abs=0.12)
    narrow = GenerationOptions(50, sample=True, max_length=1, top_k=1)
    assert {tuple(h.tokens) for h in generate(ending, feature, narrow)[0]} == {(likely,)}
    alike = build_model()
    with torch.no_grad():
        alike.decoder.token_embedding.weight[:] = 0  # all as likely, as some are in bf16
    assert len({tuple(h.tokens) for h in generate(alike, feature, narrow)[0]}) == 1
    for temperature in (0.5, 2.0):
        wanted = (logits / temperature).softmax(-1).sort(descending=True)
        for size in (2, 4):  # the nucleus: the fewest that reach top_p
            top_p = wanted.values[:size].sum().item() - 1e-3
            options = GenerationOptions(
                1000, sample=True, max_length=1, temperature=temperature, top_p=top_p
            )
            drawn = Counter(h.ids[0] for h in generate(ending, feature, options)[0])
            assert drawn.keys() == set(wanted.indices[:size].tolist())
            likely = wanted.values[0].item() / wanted.values[:size].sum().item()
            assert drawn.most_common(1)[0][1] / 1000 == pytest.approx(likely, abs=0.06)


def test_a_search_asks_for_all_that_ended_at_once(ending):
    """Each answer is waited for until a GPU has done all that it was told."""
    for options in (GenerationOptions(beam_size=4), GenerationOptions(3, sample=True)):
        with Waits() as waits:
            found = generate(ending, features(5), options)
        assert sum(map(len, found)) > 10 and not waits.found


def test_groups_differ_more_than_beams(ending):
    feature = features(8)
    plain = generate(ending, feature, GenerationOptions(6))
    diverse = generate(ending, feature, GenerationOptions(6, groups=6, diversity=20.0))

    def first_tokens(found):
        return sum(len({tuple(h.tokens[:1]) for h in group}) for group in found)

    assert first_tokens(diverse) > first_tokens(plain)
    options = GenerationOptions(6, groups=3, diversity=20.0, max_length=1)
    assert {len(group) for group in generate(build_model(), feature, options)} == {6}


def test_each_group_gives_as_many_captions_as_it_has_beams(ending):
    """A few had filled all places with variants of theirs, and those of the others were lost."""
    for found in generate(ending, features(8), GenerationOptions(6, groups=6, diversity=20.0)):
        assert len({h.tokens[0] for h in found}) == len(found) == 6  # none begins as another
    for found in generate(ending, features(8), GenerationOptions(6, groups=3, diversity=2.0)):
        assert Counter(h.group for h in found) == {0: 2, 1: 2, 2: 2}


def test_about_no_photo_nothing_is_written(ending):
    assert generate(ending, features(2)[:0], GenerationOptions()) == []


def test_impossible_options_are_refused(ending):
    for wrong in (
        {"beam_size": 4, "groups": 3},
        {"temperature": 0},
        {"top_p": 0},
        {"min_length": 5, "max_length": 4},
    ):
        with pytest.raises(UserError):
            GenerationOptions(**wrong)
    with pytest.raises(UserError, match="can write 15 tokens"):
        generate(ending, features(1), GenerationOptions(max_length=99))
    with pytest.raises(UserError, match="min_length 99 is too long: this decoder can write 15"):
        generate(ending, features(1), GenerationOptions(min_length=99))
