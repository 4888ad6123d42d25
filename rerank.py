"""Which of the captions found is best, by what people said about photos that look alike.

A kernel ridge regression, in closed form, from what the frozen encoder makes of a whole photo to
the TF-IDF vectors of people's captions, in which CIDEr is the cosine (Vedantam et al. 2015): so
each candidate has an expected CIDEr. The search knows a caption's words one by one; this sees it
whole, and what was learned by heart weighs little in it. Retrieval of captions to choose among
candidates goes back to Devlin et al. 2015 ("Exploring Nearest Neighbor Approaches"); here all
training photos are neighbours, with the weights that the regression gives them (docs/results.md).

This file goes with a captioner into its repository, so it imports nothing of the project.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_N = 4  # of CIDEr's n-grams
RANK = 1024  # principal components of the photos that are kept
VARIANCE = 2.0  # of the Gaussian that tells how alike photos are, whose mean square is 1
LEAST_SIZE = 1e-4  # of the photos' differences, root mean square: below, they are rounding's
RIDGE = 0.1  # added to each photo's likeness to itself, which is 1
MODES = 512  # eigenvectors of the likenesses that are kept
MOST_PHOTOS = 30_000  # that are remembered, evenly chosen: 3 kB each
PHOTOS = 64  # read at a time


@dataclass(frozen=True)
class Reranker:
    """The training photos' looks and captions, as the regression needs them.

    `pool` makes `looks` (images, 2 * feature_width); a photo's likenesses to the training photos
    are Gaussians of the distances of `(looks - mean) @ query` to `photos`, and its weights for
    them are these by the inverse of their own likenesses, as `_inverse` has it.
    """

    mean: Tensor  # (looks)
    query: Tensor  # (looks, rank)
    photos: Tensor  # (photos, rank)
    modes: Tensor  # (photos, modes)
    gains: Tensor  # (modes + 1)
    grams: Tensor  # (grams): keys of the n-grams that captions of several photos share, ascending
    weights: Tensor  # (grams): their inverse document frequencies, logarithmic
    starts: Tensor  # (grams + 1): where each one's entries begin
    places: Tensor  # (entries): which photo's captions hold it
    values: Tensor  # (entries): how much of their TF-IDF vectors' length it is, on average

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], feature_width: int) -> Reranker:
        """From what `tensors` gave; raises where they can't have been a reranker's."""
        if "modes" not in tensors:  # a file from before the kernel, when weights were linear
            modes = tensors["photos"][:, :0]
            tensors = dict(tensors) | {"modes": modes, "gains": modes.new_zeros(1).float()}
        made = cls(**tensors)
        sizes, places, starts = made.sizes, made.places, made.starts
        count = sizes["photos"]  # without principal components, any number takes no byte
        expected = layout(feature_width, **sizes)
        wrong = [n for n, want in expected.items() if (tensors[n].dtype, *tensors[n].shape) != want]
        if wrong or not len(places) or not 0 <= places.min() <= places.max() < count <= MOST_PHOTOS:
            raise ValueError(f"the reranker doesn't fit together {wrong}")
        if starts[0] != 0 or starts[-1] != sizes["entries"] or starts.diff().min() < 1:
            raise ValueError("the reranker's n-grams overlap")
        return made

    @property
    def sizes(self) -> dict[str, int]:
        """What `layout` needs to know."""
        photos, rank = self.photos.shape
        modes, grams, entries = self.modes.shape[1], len(self.grams), len(self.places)
        return {"photos": photos, "rank": rank, "modes": modes, "grams": grams, "entries": entries}

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def expected(
        self, features: Tensor, captions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """The CIDEr, times 100, that captions of photos may expect.

        Args:
            features: (images, patches, feature_width).
            captions: candidates for each photo, as ids with END.
        """
        with torch.autocast("cpu", enabled=False):  # differences of products in bf16 mean nothing
            shares = self.shares(pool(features).cpu()).numpy()
        return [self._expected(*each).tolist() for each in zip(shares, captions, strict=True)]

    def shares(self, looks: Tensor) -> Tensor:
        """The weights of photos (images, looks) for the training photos: (images, photos)."""
        query, photos, modes = self._matrices
        places = (looks - self.mean) @ query
        if not modes.shape[1]:
            return places @ photos.T
        alike = likeness(places, photos)
        return self.gains[-1] * alike + (alike @ modes * self.gains[:-1]) @ modes.T

    @functools.cached_property
    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query.float(), self.photos.float(), self.modes.float()

    def _expected(self, share: np.ndarray, captions: Sequence[Sequence[int]]) -> np.ndarray:
        """As `expected`, of one photo, by its weights for the training photos."""
        grams, places, values = (x.numpy() for x in (self.grams, self.places, self.values))
        owners, keys, levels, times = _terms(captions)
        numbers = np.searchsorted(grams, keys).clip(max=len(grams) - 1)
        known = grams[numbers] == keys
        rare = np.log(len(self.photos))  # what no caption holds, or one photo's alone
        weights = times * np.where(known, self.weights.numpy()[numbers], rare)
        shared, which = np.unique(np.where(known, numbers, -1), return_inverse=True)
        promised = np.zeros(len(shared), np.float32)
        starts = self.starts.numpy()
        for place, number in enumerate(shared):
            if number >= 0:
                part = slice(starts[number], starts[number + 1])
                promised[place] = share[places[part]] @ values[part].astype(np.float32)
        gains = _unit(owners, levels, weights) * promised[which]
        return 1000 / MAX_N * np.bincount(owners, gains, len(captions))


def layout(
    feature_width: int, *, photos: int, rank: int, modes: int, grams: int, entries: int
) -> dict[str, tuple]:
    """The type and shape of each tensor of a `Reranker`, by name: (dtype, side, ...)."""
    looks = 2 * feature_width
    return {
        "mean": (torch.float32, looks),
        "query": (torch.float16, looks, rank),
        "photos": (torch.float16, photos, rank),
        "modes": (torch.float16, photos, modes),
        "gains": (torch.float32, modes + 1),
        "grams": (torch.int64, grams),
        "weights": (torch.float32, grams),
        "starts": (torch.int64, grams + 1),
        "places": (torch.int32, entries),
        "values": (torch.float16, entries),
    }


def pool(features: Tensor) -> Tensor:
    """Features (images, patches, width) -> the directions of the first vector, which may be CLS,
    and of the mean, (images, 2 * width)."""
    features = features.float()
    return F.normalize(torch.stack([features[:, 0], features.mean(1)], dim=1), dim=2).flatten(1)


def fit_reranker(store: Any, captions: Mapping[str, Sequence[Sequence[int]]]) -> Reranker | None:
    """Fit the regression on training photos; None where no two photos' captions share
    anything, or all photos look the same.

    Args:
        store: a `FeatureCache`, or one in memory, whose `read` gives features of photos' views.
        captions: each photo's, as ids with END.
    """
    names, kept = [*captions], min(len(captions), MOST_PHOTOS)
    names = [names[place * len(names) // kept] for place in range(kept)]
    table = _table([captions[name] for name in names])
    if not len(table[0]):
        return None
    items = [(name, 0) for name in names]
    parts = (items[start : start + PHOTOS] for start in range(0, len(items), PHOTOS))
    looks = torch.cat([pool(store.read(part)).cpu() for part in parts])
    mean = looks.mean(0)
    looks -= mean
    size = looks.square().sum(1).mean().sqrt()
    if size < LEAST_SIZE:
        return None
    squares, axes = (x.flip(-1) for x in torch.linalg.eigh(looks.T @ looks / size**2))
    rank = min(RANK, int((squares > 1e-5 * squares[0]).sum()))
    query = axes[:, :rank] / size
    photos = (looks @ query).half()
    modes, gains = _inverse(photos.float())
    return Reranker(mean, query.half(), photos, modes.half(), gains, *map(torch.from_numpy, table))


def likeness(some: Tensor, others: Tensor) -> Tensor:
    """How alike photos are, from 0 to 1: (some, rank), (others, rank) -> (some, others)."""
    apart = torch.cdist(some, others, compute_mode="use_mm_for_euclid_dist")
    return apart.square_().mul_(-0.5 / VARIANCE).exp_()


def _inverse(photos: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of the photos' likenesses K and RIDGE: modes, (photos, modes), and gains.

    It is `modes @ diag(gains[:-1]) @ modes.T + gains[-1]`: exact for the eigenvectors of K's
    largest eigenvalues, which subspace iteration finds (Halko et al. 2011, algorithm 4.4); all
    others are taken for equal. K itself, of all pairs, is made some rows at a time.
    """
    count = len(photos)

    def times(vectors: Tensor) -> Tensor:
        return torch.cat([likeness(part, photos) @ vectors for part in photos.split(1024)])

    dice = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, min(MODES, count), generator=dice)
    for _ in range(3):
        vectors = torch.linalg.qr(times(vectors)).Q
    values, turns = torch.linalg.eigh(vectors.T @ times(vectors))
    values = values.clamp(min=0)
    others = (count - values.sum()).clamp(min=0) / max(1, count - len(values))  # K's trace is count
    rest = 1 / (RIDGE + others)
    return vectors @ turns, torch.cat([1 / (RIDGE + values) - rest, rest[None]])


def _table(captions: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, ...]:
    """`grams` to `values` of a `Reranker`, from each photo's captions."""
    owners, keys, levels, times = _terms([ids for group in captions for ids in group])
    sizes = np.array([len(group) for group in captions])
    photos = np.repeat(np.arange(len(sizes)), sizes)[owners]
    grams, numbers = np.unique(keys, return_inverse=True)
    entries, entry = np.unique(numbers * len(sizes) + photos, return_inverse=True)
    frequencies = np.bincount(entries // len(sizes), minlength=len(grams))
    inverse = np.log(len(sizes) / frequencies)
    values = np.bincount(entry, _unit(owners, levels, times * inverse[numbers]) / sizes[photos])
    # What one photo's captions alone hold is promised by no other photo, and is half of all.
    kept = frequencies > 1
    several = kept[entries // len(sizes)]
    starts = np.concatenate([[0], np.cumsum(frequencies[kept])])
    places = (entries % len(sizes))[several].astype(np.int32)
    weights, values = inverse[kept].astype(np.float32), values[several].astype(np.float16)
    return grams[kept], weights, starts, places, values


def _unit(owners: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of n-grams, with each caption's vector of each n brought to length 1."""
    vectors = owners * MAX_N + levels
    return weights / np.sqrt(np.bincount(vectors, weights**2)).clip(min=1e-9)[vectors]


def _terms(captions: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
    """Each caption's different n-grams: which caption, a key, n - 1, and how often it is there.

    A key is the n-gram's ids as the digits of a number, which wraps beyond 64 bits.
    """
    sizes = [len(ids) for ids in captions]
    ids = np.fromiter((i for group in captions for i in group), np.int64, sum(sizes)) + 1
    caption = np.repeat(np.arange(len(sizes)), sizes)
    parts = []
    key = np.zeros(len(ids) + 1, np.int64)
    for level in range(MAX_N):
        length = max(0, len(ids) - level)
        key = key[:length] * 0x100003 + ids[level:]
        whole = caption[:length] == caption[level:]
        parts.append((caption[:length][whole], key[whole], np.full(whole.sum(), level)))
    owner, key, level = map(np.concatenate, zip(*parts, strict=True))
    order = np.lexsort((key, owner))
    owner, key, level = owner[order], key[order], level[order]
    new = np.ones(len(key), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (key[1:] != key[:-1])
    firsts = np.flatnonzero(new)
    return owner[new], key[new], level[new], np.diff(np.append(firsts, len(key)))
