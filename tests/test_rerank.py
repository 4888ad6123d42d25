"""Reranking: what is expected of a caption is what the captions of similar photos say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, save_for_use
from generation import generate
from inference import load_captioner
from options import GenerationOptions
from rerank import RIDGE, VARIANCE, Reranker, _inverse, fit_reranker, pool
from tests.conftest import best_file, run
from tests.test_model import build_model, features
from tokenizer import END_ID
from utils import UserError

KINDS, EACH, WIDTH = 4, 8, 6


class Store:
    """Features of photos of some kinds, which look alike; photo 13 is of kind 1."""

    def __init__(self):
        dice = torch.Generator().manual_seed(0)
        kinds = torch.randn(KINDS, 1, 5, WIDTH, generator=dice).expand(-1, EACH, -1, -1)
        noise = 0.1 * torch.randn(KINDS, EACH, 5, WIDTH, generator=dice)
        self.features = (kinds + noise).flatten(0, 1)

    def read(self, items):
        return torch.stack([self.features[name] for name, _ in items]).half()


def captions_of(photo: int) -> list[list[int]]:
    """Two captions, of words of its kind and a word of its own, or of its and the one before."""
    kind, own = photo // EACH, 100 + photo - (photo % 3 == 2)
    return [[10 + kind, 20, 30 + kind, END_ID], [20, own, 10 + kind, 10 + kind, END_ID]]


@pytest.fixture(scope="module")
def fitted() -> Reranker:
    captions = {photo: captions_of(photo) for photo in range(KINDS * EACH)}
    return fit_reranker(Store(), captions)


def vector(ids: list[int], n: int, inverse: dict) -> dict[tuple, float]:
    """The unit TF-IDF vector of a caption's n-grams, as the definition says."""
    counts = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    rare = math.log(KINDS * EACH)
    weighted = {gram: count * inverse.get(gram, rare) for gram, count in counts.items()}
    norm = math.sqrt(sum(weight**2 for weight in weighted.values())) or 1
    return {gram: weight / norm for gram, weight in weighted.items()}


def test_what_is_expected_is_the_definition(fitted):
    """The mean cosine with each training photo's captions, by the photo's weights."""
    groups = [captions_of(photo) for photo in range(KINDS * EACH)]
    holders = Counter()
    for group in groups:
        grams = (tuple(c[i : i + n]) for c in group for n in range(1, 5) for i in range(len(c)))
        holders.update({gram for gram in grams if gram})
    inverse = {gram: math.log(len(groups) / count) for gram, count in holders.items()}
    seen = Store().features[13:14]
    photos = fitted.photos.float()
    place = (pool(seen) - fitted.mean) @ fitted.query.float()
    own, alike = (
        torch.exp(-((some[:, None] - photos) ** 2).sum(-1) / (2 * VARIANCE))
        for some in (photos, place)
    )
    weights = torch.linalg.solve(own + RIDGE * torch.eye(len(own)), alike.T)[:, 0].numpy()
    candidates = [[11, 20, 31, END_ID], [20, 113, 11, 11, END_ID], [13, 20, 99, END_ID], [20]]
    wanted = []
    for ids in candidates:
        total = 0.0
        for n in range(1, 5):
            mine = vector(ids, n, inverse)
            for weight, group in zip(weights, groups, strict=True):
                for caption in group:
                    theirs = vector(caption, n, inverse)
                    total += (
                        weight
                        / 2
                        / 4
                        * sum(
                            mine[gram] * theirs[gram]
                            for gram in mine
                            if holders[gram] > 1 and gram in theirs
                        )
                    )
        wanted.append(1000 * total)
    (got,) = fitted.expected(seen, [candidates])
    assert got == pytest.approx(wanted, rel=0.01, abs=1)


@pytest.mark.parametrize("most", [KINDS * EACH, KINDS * EACH - 1, KINDS * EACH // 2])
def test_a_new_photo_expects_what_its_kind_is_called(monkeypatch, most):
    monkeypatch.setattr("rerank.MOST_PHOTOS", most)
    store = Store()
    fitted = fit_reranker(store, {photo: captions_of(photo) for photo in range(KINDS * EACH)})
    assert len(fitted.photos) == most
    dice = torch.Generator().manual_seed(1)
    means = store.features.unflatten(0, (KINDS, EACH)).mean(1)
    new = means + 0.1 * torch.randn(means.shape, generator=dice)
    candidates = [[10 + kind, 20, 30 + kind, END_ID] for kind in range(KINDS)]
    found = np.array(fitted.expected(new, [candidates] * KINDS))
    assert found.argmax(1).tolist() == list(range(KINDS))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as captions are written
        alone = fitted.expected(new[2:3], [candidates])[0]
    assert alone == pytest.approx(found[2], rel=1e-4, abs=0.01)


def test_fitting_leaves_nothing_to_chance_and_takes_none(fitted, monkeypatch):
    monkeypatch.setattr("rerank.MODES", 4)  # fewer than photos, as of thousands
    before = torch.get_rng_state()
    first, second = (_inverse(fitted.photos.float())[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


def test_a_look_is_of_the_first_vector_and_of_the_mean():
    """As each reranker that was saved has it."""
    looks = pool(torch.tensor([[[3.0, 4.0], [-3.0, 6.0], [0.0, 2.0]]]))
    assert looks.tolist() == [pytest.approx([0.6, 0.8, 0.0, 1.0])]


def test_a_file_from_before_the_kernel_is_linear(fitted):
    older = {k: v for k, v in fitted.tensors().items() if k not in ("modes", "gains")}
    looks = pool(Store().features[:3])
    wanted = (looks - fitted.mean) @ fitted.query.float() @ fitted.photos.float().T
    assert torch.allclose(Reranker.restored(older, WIDTH).shares(looks), wanted)


def test_reranking_moves_the_best_by_its_weight_and_spares_answers():
    model, photos = build_model(), features(3)
    store = Store()
    store.features = torch.randn(
        KINDS * EACH, *photos.shape[1:], generator=torch.Generator().manual_seed(2)
    )
    plain = GenerationOptions(beam_size=4)
    found = generate(model, photos, plain)
    least = [group[-1].tokens + [END_ID] * group[-1].ended for group in found]
    # Photos that look like these are called what the search likes least.
    store.features[:3] = photos
    captions = {photo: [captions_of(photo)[0]] for photo in range(KINDS * EACH)}
    captions |= {i: [least[i % 3]] for i in range(6)}
    store.features[3:6] = photos
    reranker = fit_reranker(store, captions)
    options = dataclasses.replace(plain, rerank=100.0)
    moved = generate(model, photos, options, None, reranker)
    assert [g[0].tokens + [END_ID] * g[0].ended for g in moved] == least
    assert all(g[0].score >= g[1].score for g in moved)
    for group, others in zip(found, moved, strict=True):
        chances = {tuple(h.tokens): h.log_probability for h in others}
        for h in group:
            assert chances.get(tuple(h.tokens), h.log_probability) == pytest.approx(
                h.log_probability
            )
    prefixes = [[1, 7, 8, 4]] * 3
    asked = generate(model, photos, options, prefixes)
    assert [[h.tokens for h in g] for g in asked] == [
        [h.tokens for h in g] for g in generate(model, photos, plain, prefixes)
    ]
    with pytest.raises(UserError, match="--rerank needs"):
        generate(model, photos, options)


def test_captions_that_share_nothing_give_none():
    assert fit_reranker(Store(), {photo: [[50 + photo]] for photo in range(5)}) is None


def test_photos_that_all_look_the_same_give_none():
    store = Store()
    for same in (torch.ones_like(store.features[:1]), store.features[:1]):
        store.features = same.repeat(8, 1, 1)  # of which the mean is rounded
        assert fit_reranker(store, {photo: captions_of(photo) for photo in range(8)}) is None


@pytest.mark.fault
def test_a_reranker_of_few_bytes_remembers_no_billion_photos(fitted):
    tensors = fitted.tensors()
    tensors["query"] = tensors["query"][:, :0]
    tensors["photos"] = tensors["modes"] = torch.empty(10**9, 0, dtype=torch.float16)
    tensors["gains"] = tensors["gains"][:1]
    with pytest.raises(ValueError, match="doesn't fit together"):
        Reranker.restored(tensors, WIDTH)


@pytest.mark.fault(count=10)
def test_a_reranker_that_does_not_fit_together_is_refused(trained, tmp_path):
    checkpoint = load_checkpoint(best_file(trained))
    good = checkpoint.reranker.tensors()
    wrong = {
        "photos": good["photos"][:-1],
        "query": good["query"].float(),
        "mean": good["mean"][1:],
        "starts": good["starts"] + 1,
        "places": good["places"] - 1,
        "values": good["values"][:-1],
        "grams": good["grams"][:0],
        "weights": good["weights"][None],
        "modes": good["modes"][:-1],
        "gains": good["gains"][1:],
    }
    for name, tensor in wrong.items():
        forged = dataclasses.replace(checkpoint.reranker, **{name: tensor})
        path = tmp_path / f"{name}.safetensors"
        save_for_use(path, dataclasses.replace(checkpoint, reranker=forged))
        with pytest.raises(UserError, match=f"{path.name} is not a checkpoint of this project"):
            load_checkpoint(path)


def test_training_leaves_a_reranker_that_every_way_to_caption_uses(trained, tmp_path):
    best, written = best_file(trained), tmp_path / "captions.json"
    loaded, last = load_checkpoint(best), load_checkpoint(trained / "last.pt")
    assert loaded.generation.rerank > 0
    for name, tensor in loaded.reranker.tensors().items():
        assert torch.equal(tensor, last.reranker.tensors()[name])
    flags = ["--checkpoint", best, "--data_dir", trained, "--split", "train"]
    result = run("evaluate.py", *flags, "--rerank", 50, "--save_captions", written)
    assert result.returncode == 0, result.stderr
    captions = json.loads(written.read_text())
    assert len(captions) == len(loaded.reranker.photos)
    captioner = load_captioner(best)
    photos = [trained / "images" / name for name in captions]
    assert captioner.caption(photos, rerank=50.0) == [*captions.values()]
    assert captioner.caption(photos, rerank=0.0) != [*captions.values()]
    _, (explained, *_) = captioner.explain(captioner.encoder.open(photos[0]), rerank=50.0)
    assert explained.text == captions[photos[0].name]
