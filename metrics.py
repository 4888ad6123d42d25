"""Caption scores as the field computes them, without Java: BLEU, ROUGE-L, CIDEr-D, and diversity.

All scores are on the 0..100 scale and equal those of pycocoevalcap 1.2 with its PTB tokenizer to
four decimals (`tests/test_metrics.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

Tokens = Sequence[Hashable]
ORDERS = 4  # n-grams of 1 to 4 tokens

# --- Tokens ---------------------------------------------------------------------------------


def tokenize(text: str) -> list[str]:
    """Words as the COCO caption evaluation sees them: lower case, PTB style, no punctuation."""
    return re.findall(r"[a-z0-9'\-]+", text.lower())


def ngrams(tokens: Tokens) -> list[Counter]:
    """How often each n-gram stands in the tokens; one counter for each n from 1 to 4."""
    tokens = tuple(tokens)
    return [
        Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))
        for n in range(1, ORDERS + 1)
    ]


# --- Scores ---------------------------------------------------------------------------------


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Corpus BLEU-1..4 (Papineni et al. 2002), the closest reference length for brevity."""
    matches, possible = [0] * ORDERS, [0] * ORDERS
    length = reference_length = 0
    for caption, group in zip(captions, references, strict=True):
        length += len(caption)
        reference_length += min(
            (abs(len(reference) - len(caption)), len(reference)) for reference in group
        )[1]
        counted = [ngrams(reference) for reference in group]
        for n, counts in enumerate(ngrams(caption)):
            most = Counter()
            for reference in counted:
                most |= reference[n]
            matches[n] += sum((counts & most).values())
            possible[n] += max(0, len(caption) - n)
    # The tiny terms are pycocoevalcap's: they keep the logarithm finite.
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (reference_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (matches[n] + tiny) / (possible[n] + small)
        scores.append(100 * brevity * product ** (1 / (n + 1)))
    return scores


def _common_length(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        before = 0
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], before + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(caption: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence, best over references."""
    if not caption:
        return 0.0
    common = [_common_length(reference, caption) for reference in references]
    precision = max(c / len(caption) for c in common)
    recall = max(c / len(r) if r else 0.0 for c, r in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against references whose vectors are made once.

    Document frequencies come from the references given here: for scoring those of the split, for
    self-critical training those of the training set.
    """

    SIGMA = 6.0  # of the length penalty

    def __init__(self, references: Mapping[str, Sequence[Tokens]]):
        counted = {name: [ngrams(tokens) for tokens in group] for name, group in references.items()}
        frequency: Counter = Counter()
        for group in counted.values():
            frequency.update({gram for counts in group for count in counts for gram in count})
        self._log_images = math.log(len(references)) if references else 0.0
        self._weight = {gram: self._log_images - math.log(n) for gram, n in frequency.items()}
        self._references = {
            name: [self._vector(counts) for counts in group] for name, group in counted.items()
        }

    def _vector(self, counts: Sequence[Counter]) -> tuple[list[dict], list[float], int]:
        """TF-IDF weights per order, their norms, and the number of bigrams (the 'length')."""
        weight, unseen = self._weight, self._log_images
        vector = [{g: c * weight.get(g, unseen) for g, c in count.items()} for count in counts]
        norms = [math.sqrt(sum(v * v for v in part.values())) for part in vector]
        return vector, norms, sum(counts[1].values())

    def score(self, name: str, tokens: Tokens) -> float:
        """CIDEr-D of one caption of the photo `name`, times 100."""
        vector, norms, length = self._vector(ngrams(tokens))
        total = 0.0
        for other, other_norms, other_length in self._references[name]:
            closeness = 0.0
            for n in range(ORDERS):
                mine, theirs = vector[n], other[n]
                if norms[n] == 0 or other_norms[n] == 0:
                    continue
                product = 0.0
                for gram in mine.keys() & theirs.keys():
                    product += min(mine[gram], theirs[gram]) * theirs[gram]
                closeness += product / (norms[n] * other_norms[n])
            total += closeness * math.exp(-((length - other_length) ** 2) / (2 * self.SIGMA**2))
        return 1000 * total / ORDERS / len(self._references[name])


def cider_d_per_image(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """CIDEr-D of each photo's caption; document frequencies from these references."""
    scorer = CiderD({name: [tokenize(text) for text in references[name]] for name in captions})
    return {name: scorer.score(name, tokenize(text)) for name, text in captions.items()}


def score(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """BLEU-1..4, ROUGE-L and CIDEr-D of one caption per photo against its references."""
    words = [tokenize(text) for text in captions.values()]
    others = [[tokenize(text) for text in references[name]] for name in captions]
    result = {f"BLEU-{n}": value for n, value in enumerate(bleu(words, others), 1)}
    result["ROUGE-L"] = float(np.mean([rouge_l(*pair) for pair in zip(words, others, strict=True)]))
    result["CIDEr-D"] = float(np.mean(list(cider_d_per_image(captions, references).values())))
    return result


# --- Beyond the mean ------------------------------------------------------------------------


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, samples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), resampling photos."""
    array, dice = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = array[dice.integers(0, len(array), (samples, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def repeats(tokens: Tokens) -> bool:
    """Whether a word or a pair of words stands twice in a row, or a 3-gram twice at all."""
    tokens = list(tokens)
    for n in (1, 2):
        if any(tokens[i : i + n] == tokens[i + n : i + 2 * n] for i in range(len(tokens) - n)):
            return True
    return max(ngrams(tokens)[2].values(), default=0) > 1


def diversity(captions: Mapping[str, str], training_captions: Iterable[str]) -> dict[str, float]:
    """How varied captions are, and how often they fail in the ways that users complain of.

    distinct-n: different n-grams over all n-grams (Li et al. 2016). The shares are of captions.
    """
    words = [tokenize(text) for text in captions.values()]
    seen = {" ".join(tokenize(text)) for text in training_captions}
    texts = Counter(" ".join(tokens) for tokens in words)
    result: dict[str, float] = {}
    for n in (1, 2):
        grams = Counter()
        for tokens in words:
            grams += ngrams(tokens)[n - 1]
        result[f"distinct-{n}"] = len(grams) / max(1, sum(grams.values()))
    count = max(1, len(words))
    result["mean length"] = sum(map(len, words)) / count
    result["not in training"] = sum(n for text, n in texts.items() if text not in seen) / count
    result["most frequent caption"] = max(texts.values(), default=0) / count
    result["with repetition"] = sum(map(repeats, words)) / count
    return result
