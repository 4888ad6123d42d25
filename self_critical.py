"""Self-critical training (Rennie et al. 2017): the decoder's own captions, by their reward."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from torch import Tensor

from generation import Hypothesis, generate
from metrics import CiderD, tokenize
from model import CaptionModel
from options import GenerationOptions, parse_tasks
from tokenizer import END, START_ID, CaptionTokenizer
from utils import UserError


class Critic:
    """Rewards captions of training photos with their CIDEr-D.

    Document frequencies are those of the training captions, and the end of a caption counts as
    a word: without it, captions that break off would lose nothing.
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        references: Mapping[str, Sequence[str]],
        beam_size: int,
        longest: int,
    ):
        """Args: `references`, people's captions of the training photos; beams searched a photo;
        tokens of the longest caption, END counted: one that is longer earns nothing, but a search
        that doesn't end would be as long as MAX_CAPTION_LENGTH, and all its batch with it.
        """
        if not references:
            raise UserError(
                "no photo to train on has a caption, which self-critical training wants: use "
                "--tasks questions or --scst_epochs 0"
            )
        self.tokenizer = tokenizer
        self.references = references
        self.options = GenerationOptions(beam_size=beam_size, max_length=longest)
        some = dict(itertools.islice(references.items(), 1000))  # which mostly tell it at once
        if not (tells_apart(some) or tells_apart(references)):
            raise UserError(
                "CIDEr-D, the reward of self-critical training, is 0 for every caption here (it "
                "compares photos, two at least, by words not said of all): use --scst_epochs 0"
            )

    @functools.cached_property
    def cider(self) -> CiderD:
        """Made when the stage begins: of many photos it takes long, and much RAM."""
        return CiderD(words_of(self.references))

    def rewards(self, name: str, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """CIDEr-D, times 100, of captions of one photo."""
        decode = self.tokenizer.decode
        words = [tokenize(decode(h.tokens)) + [END] * h.ended for h in hypotheses]
        return [self.cider.score(name, caption) for caption in words]

    def search(
        self, model: CaptionModel, names: Sequence[str], features: Tensor
    ) -> tuple[list[list[list[int]]], list[float], list[float]]:
        """The model's own beams as ids for each photo, none for one without references; the rewards
        of all; and what the cross-entropy of each of their targets is to be multiplied with, so
        that its gradient is the policy's.

        The beams of a search stand for samples, each measured against the others (Cornia et al.
        2020): what they differ in is what the choice of a caption depends on. Samples proper are
        so much poorer that raising them only makes captions safe and alike (docs/results.md).

        Args: `features` (images, patches, feature_width).
        """
        found: list[list[list[int]]] = [[] for _ in names]
        rewards, scales = [], []
        known = [row for row, name in enumerate(names) if name in self.references]
        searched = generate(model, features[known].float(), self.options)
        for row, beams in zip(known, searched, strict=True):
            found[row] = [[START_ID, *h.ids] for h in beams]
            own = self.rewards(names[row], beams)
            rewards += own
            pairs = zip(advantages(own), beams, strict=True)
            scales += [gain / 100 for gain, h in pairs for _ in h.ids]
        return found, rewards, scales


def words_of(references: Mapping[str, Sequence[str]]) -> dict[str, list[list[str]]]:
    """Captions as CIDEr-D's words; a word takes its room once."""
    return {
        name: [[*map(sys.intern, tokenize(caption)), END] for caption in captions]
        for name, captions in references.items()
    }


def tells_apart(references: Mapping[str, Sequence[str]]) -> bool:
    """Has any photo's first caption a CIDEr-D, as it has a word that others lack?"""
    words = words_of(references)
    cider = CiderD(words)
    return any(cider.score(name, captions[0]) for name, captions in words.items())


def advantages(rewards: Sequence[float]) -> list[float]:
    """By how much each of a photo's captions beats the mean of the others."""
    mean = sum(rewards) / len(rewards)
    return [(reward - mean) * len(rewards) / max(1, len(rewards) - 1) for reward in rewards]


def critical_epochs(settings: SimpleNamespace) -> int:
    """Epochs of the self-critical stage, which is about captions, and wants all at hand."""
    possible = "captions" in parse_tasks(settings.TASKS) and not settings.TRAIN_SHARDS
    return settings.SCST_EPOCHS if possible else 0
