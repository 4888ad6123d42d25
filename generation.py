"""Write captions: greedy, beam, diverse beam and sampling, one implementation, batched and cached.

The row of a photo holds the newest token of each of its beams. The cache keeps every token that
any beam ever took, and a mask says from which of them a beam descends, so that nothing is copied
when beams are reordered, and the memory's keys and values exist once per photo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataset import Prompt
from decoder import KeyValueCache
from device import autocast
from features import Features, prefetch
from model import CaptionModel
from options import GenerationOptions
from rerank import Reranker
from tokenizer import ANSWER_ID, END_ID, MERGED_IDS, PAD_ID, START_ID, CaptionTokenizer
from utils import UserError

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Hypothesis:
    """A caption as ids, without START and END, and what the model thinks of it.

    `log_probability` is the model's own, END included, whatever the options were; `score` is
    that over length ** length_penalty, with what a `Reranker` added; `ended` is False where
    max_length cut it short; `group` is which of a diverse search's found it.
    """

    tokens: list[int]
    log_probability: float
    score: float
    ended: bool
    group: int = 0

    @property
    def ids(self) -> list[int]:
        """The tokens, and END where it ended: what the model chose, one after the other."""
        return self.tokens + [END_ID] * self.ended


@torch.no_grad()  # not inference mode, in which autocast would convert the weights at each step
def generate(
    model: CaptionModel,
    features: Tensor,
    options: GenerationOptions,
    prefixes: Sequence[Sequence[int]] | None = None,
    reranker: Reranker | None = None,
    dice: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Captions of photos, or answers about them, best first.

    Args:
        features: (images, patches, feature_width), on the model's device.
        prefixes: what each row begins with, such as a question: ids from START to ANSWER, of any
            lengths. None: START alone, for a caption.
        reranker: has a say in which captions are best, as much as the options tell.
        dice: what samples are drawn by, the same for all batches; None: new ones of the seed.

    Returns:
        For each photo up to `beam_size` hypotheses (exactly that many when sampling).
    """
    if not len(features):
        return []
    prefixes = prefixes or [[START_ID]] * len(features)
    longest = model.config.max_length - max(map(len, prefixes))
    limit = options.max_length or longest
    if not options.min_length <= limit <= longest:
        which = f"max_length {limit}" if options.max_length else f"min_length {options.min_length}"
        raise UserError(f"{which} is too long: this decoder can write {longest} tokens")
    training = model.training
    model.eval()
    try:
        rows = _Rows(model, features, options, limit, prefixes, dice or dice_of(options))
        while rows.images:
            rows.step()
        found = rows.found
    finally:
        model.train(training)
    weights = [options.rerank if len(prefix) == 1 else 0.0 for prefix in prefixes]
    if any(weights):  # of captions, not of answers
        if not reranker:
            raise UserError(
                "--rerank needs a checkpoint that holds what people said of the training photos, "
                "as training with RERANK makes it: leave it out"
            )
        expected = reranker.expected(features, [[h.ids for h in group] for group in found])
        found = [
            [replace(h, score=h.score + weight * cider) for h, cider in zip(*each, strict=True)]
            for weight, *each in zip(weights, found, expected, strict=True)
        ]
    return [_ranked(group, options) for group in found]


def dice_of(options: GenerationOptions) -> torch.Generator:
    """What the samples of all batches are drawn by: one photo's chance is no other's."""
    return torch.Generator().manual_seed(options.seed)


def generate_cached(
    model: CaptionModel,
    tokenizer: CaptionTokenizer,
    store: Features,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    *,
    reranker: Reranker | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> Iterator[Hypothesis]:
    """The best hypothesis about each photo named in `prompts`, from its cached features: a caption,
    or the answer to the question. `dtype` is the precision of matrix products.
    """
    device = next(model.parameters()).device
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    items = ([(name, 0) for name, _ in part] for part in parts)
    loaded = prefetch(store.read, items, ahead=1)  # as a batch's features may take 100 MB
    dice = dice_of(options)
    for part, features in zip(parts, loaded, strict=True):
        questions = [text.question for _, text in part]
        prefixes = tokenizer.prefixes(questions, model.config.max_length)
        with autocast(device, dtype):
            moved = features.to(device, torch.float32)
            found = generate(model, moved, options, prefixes, reranker, dice)
        yield from (group[0] for group in found)


def _ranked(found: list[Hypothesis], options: GenerationOptions) -> list[Hypothesis]:
    """Best first, of each group as many as it has beams: else one could crowd out the others."""
    size, kept = options.beam_size // options.groups, []
    taken: Counter[int] = Counter()
    for hypothesis in sorted(found, key=lambda hypothesis: -hypothesis.score):
        taken[hypothesis.group] += 1
        if taken[hypothesis.group] <= size:
            kept.append(hypothesis)
    return kept


def largest(scores: Tensor, count: int, part: int = 100) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row (rows, any) and their places, largest first.

    They lie in the parts with the largest maxima, which are found in a fraction of the time that
    `topk` takes for the whole row on a CPU.
    """
    whole = scores.shape[1] - scores.shape[1] % part
    parts = scores[:, :whole].unflatten(1, (whole // part, part))
    likely = parts.amax(2).topk(min(count, parts.shape[1]), dim=1).indices
    places = torch.arange(scores.shape[1], device=scores.device)
    rest = places[whole:].expand(len(scores), -1)
    places = torch.cat([(likely.unsqueeze(2) * part + places[:part]).flatten(1), rest], dim=1)
    best = scores.gather(1, places).topk(count, dim=1)
    return best.values, places.gather(1, best.indices)


def fitting(rows: int) -> int:
    """The next power of two or three halves of one, so that rows have few different numbers.

    For each number and length a CPU's kernels are made anew, which takes time and memory.
    """
    power = 1 << max(0, rows - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= rows else power


class _Rows:
    """The photos that are being captioned, one a row, with the state of each of their beams."""

    def __init__(
        self,
        model: CaptionModel,
        features: Tensor,
        options: GenerationOptions,
        limit: int,
        prefixes: Sequence[Sequence[int]],
        dice: torch.Generator,
    ):
        count, device = features.shape[0], features.device
        self.model, self.options, self.limit = model, options, limit
        self.found: list[list[Hypothesis]] = [[] for _ in range(count)]
        self.images = list(range(count))
        self.done: set[int] = set()  # of these, whose rows stay a while, unheeded
        self.memory = model.memory(features)
        # (rows, beams) and (rows, beams, seen): the first step has one beam, which then forks.
        self._read_prefixes(prefixes, device, (limit - 1) * options.beam_size)
        self.log_probability = torch.zeros(count, 1, device=device)
        self.ended = torch.zeros(count, 1, dtype=torch.bool, device=device)
        self.history = torch.zeros(count, 1, 0, dtype=torch.long, device=device)
        self.greedy = torch.zeros(count, dtype=torch.long, device=device)
        if options.sample:
            most = model.config.max_length - 1  # whatever the batch: the next one's draws follow
            draws = torch.rand(count, most, options.beam_size, generator=dice, device="cpu")
            self.draws = draws.to(device)

    def _read_prefixes(
        self, prefixes: Sequence[Sequence[int]], device: torch.device, room: int
    ) -> None:
        """Pass all but the last token of each prefix through the decoder at once.

        Prefixes end in the same column, so that every row goes on from there; before a shorter
        one stands padding, which no token attends to.
        """
        rows = [torch.tensor(ids, device="cpu") for ids in prefixes]
        tokens = pad_sequence(rows, True, PAD_ID, padding_side="left").to(device)
        length = tokens.shape[1]
        sizes = torch.tensor([[len(ids)] for ids in prefixes], device=device)
        places = torch.arange(length, device=device) - length + sizes  # (rows, length)
        real = (places >= 0)[:, :-1]
        self.cache = KeyValueCache(self.model.config.layers, length + room)
        self.tokens = tokens[:, -1:]
        self.start = sizes - 1  # (rows, 1): the position of the last token of the prefix
        self.descent = real.unsqueeze(1)
        if length > 1:
            causal = torch.ones(length - 1, length - 1, dtype=torch.bool, device=device).tril()
            # Padding attends to itself, as attention to nothing is no number.
            itself = torch.eye(length - 1, dtype=torch.bool, device=device)
            mask = (causal & real.unsqueeze(1)) | itself
            positions = places[:, :-1].clamp(min=0)
            self.model.decoder(tokens[:, :-1], positions, mask, self.memory, self.cache)

    def step(self) -> None:
        """Let every beam take one token; photos whose captions are complete leave the rows."""
        beams = self.tokens.shape[1]
        itself = torch.eye(beams, dtype=torch.bool, device=self.tokens.device)
        mask = torch.cat([self.descent, itself.expand(len(self.images), -1, -1)], dim=2)
        length = self.history.shape[2]
        positions = (self.start + length).expand_as(self.tokens)
        hidden = self.model.decoder(self.tokens, positions, mask, self.memory, self.cache)
        logits = self.model.decoder.logits(hidden).float()  # (rows, beams, vocab)
        allowed = self._constrain(logits.log_softmax(-1), length + 1)
        if self.options.sample:
            parents, tokens = self._draw(allowed)
        else:
            parents, tokens = self._search(allowed)
        self._advance(parents, tokens, allowed, mask)
        self._retire()

    # --- which tokens may follow ---

    def _constrain(self, allowed: Tensor, length: int) -> Tensor:
        """Log-probabilities (rows, beams, vocab) with what the options forbid taken out."""
        for never in (PAD_ID, START_ID, ANSWER_ID):  # a list of them would be sent to a GPU
            allowed[..., never] = MINUS_INFINITY
        if length < self.options.min_length:
            allowed[..., END_ID] = MINUS_INFINITY
        size = self.options.no_repeat_ngram
        if size and length > 1:
            last = self.history[:, :, -1:]
            last = last.masked_fill(last < MERGED_IDS, PAD_ID)  # a byte is no word: "400", "!!"
            allowed.scatter_(2, last, MINUS_INFINITY)
        if size and length > size:
            grams = self.history.unfold(2, size, 1)  # (rows, beams, starts, size)
            tail = self.history[:, :, length - size :].unsqueeze(2)
            repeated = (grams[..., :-1] == tail).all(-1)
            last = grams[..., -1].masked_fill(~repeated, PAD_ID)  # which is taken out already
            allowed.scatter_(2, last, MINUS_INFINITY)
        return allowed

    # --- which tokens do follow: (rows, beams) parents and tokens ---

    def _draw(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        count, beams, vocab = allowed.shape
        wanted = self.options.beam_size
        logits = allowed
        if self.options.temperature != 1:
            logits = (allowed / self.options.temperature).log_softmax(-1)
        if self.options.top_k:
            best = logits.topk(min(self.options.top_k, vocab), dim=-1)  # in bf16 many are alike
            logits = torch.full_like(logits, MINUS_INFINITY).scatter(-1, best.indices, best.values)
        probabilities = logits.exp()
        if self.options.top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True)
            # The nucleus: the fewest tokens that reach top_p, so at least the most probable one.
            most = self.options.top_p * ranked.sum(-1, keepdim=True)
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= most, 0.0)
            probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked)
        cumulative = probabilities.cumsum(-1).expand(count, wanted, vocab).contiguous()
        draws = self.draws[self.images, self.history.shape[2]]  # (rows, samples)
        # Below the whole by more than rounding, so that no draw falls beyond the last token.
        target = draws.unsqueeze(-1) * cumulative[..., -1:] * (1 - 1e-6)
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        parents = torch.arange(wanted, device=allowed.device).clamp(max=beams - 1)
        return parents.expand(count, wanted), tokens.masked_fill(self.ended, PAD_ID)

    def _search(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The best continuations; those that END are put aside as found hypotheses."""
        groups = self.options.groups
        size = self.options.beam_size // groups
        beams = self.tokens.shape[1]
        taken = torch.zeros_like(allowed[:, 0])  # (rows, vocab): by earlier groups in this step
        chosen = []
        for group in range(groups):
            # In the first step all groups fork from the one beam that there is.
            start, stop = (0, 1) if beams == 1 else (group * size, (group + 1) * size)
            scores = self.log_probability[:, start:stop, None] + allowed[:, start:stop]
            ranked = scores - self.options.diversity * taken.unsqueeze(1) if group else scores
            parents, tokens = self._best(scores, ranked, size, start, group == 0)
            taken.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=taken.dtype))
            chosen.append((parents + start, tokens))
        parents, tokens = zip(*chosen, strict=True)
        return torch.cat(parents, dim=1), torch.cat(tokens, dim=1)

    def _best(self, scores, ranked, size: int, start: int, leads: bool) -> tuple[Tensor, Tensor]:
        vocab = ranked.shape[-1]
        width = min(2 * size, ranked.shape[1] * vocab)
        values, places = largest(ranked.flatten(1), width)  # twice as many: up to `size` may be END
        parents, tokens = places // vocab, places % vocab
        ends = tokens == END_ID
        possible = values > MINUS_INFINITY
        row, rank = (ends & possible)[:, :size].nonzero(as_tuple=True)
        beam = parents[row, rank]
        self._found(row, beam + start, scores[row, beam, END_ID])
        open_first = torch.sort(ends.long(), dim=1, stable=True).indices[:, :size]
        parents, tokens = parents.gather(1, open_first), tokens.gather(1, open_first)
        if leads:
            self._keep_greedy(scores, parents, tokens)
        return parents, tokens

    def _keep_greedy(self, scores: Tensor, parents: Tensor, tokens: Tensor) -> None:
        """Hold the greedy caption in the last beam, if need be, until it ends.

        Beam search may prune it and end worse than greedy search would have.
        """
        rows = torch.arange(len(self.images), device=scores.device)
        beam = self.greedy.clamp(min=0)
        token = scores[rows, beam].argmax(-1)
        alive = self.greedy >= 0
        (over,) = (alive & (token == END_ID)).nonzero(as_tuple=True)
        self._found(over, beam[over], scores[over, beam[over], END_ID])
        alive = alive & (token != END_ID)
        same = (parents == beam[:, None]) & (tokens == token[:, None])
        lost = alive & ~same.any(1)
        for kept, own in ((parents, beam), (tokens, token)):
            kept[:, -1] = torch.where(lost, own, kept[:, -1])
        place = torch.where(lost, parents.shape[1] - 1, same.long().argmax(1))
        self.greedy = torch.where(alive, place, -1)

    # --- the new state ---

    def _advance(self, parents: Tensor, tokens: Tensor, allowed: Tensor, mask: Tensor) -> None:
        rows = torch.arange(len(self.images), device=tokens.device).unsqueeze(1)
        gained = allowed[rows, parents, tokens]
        ended = self.ended[rows, parents]
        gained = gained.masked_fill(ended, 0.0)
        self.log_probability = self.log_probability[rows, parents] + gained
        self.descent = mask[rows, parents]
        self.history = torch.cat([self.history[rows, parents], tokens.unsqueeze(2)], dim=2)
        self.ended = ended | (tokens == END_ID)
        self.tokens = tokens

    def _retire(self) -> None:
        """Put aside what is complete, and drop its rows, several at a time."""
        complete, beams = self._complete(), range(self.tokens.shape[1])
        # Cut captions count only where no other is to be had.
        wanting = [r for r in complete if self.options.sample or not self.found[self.images[r]]]
        if wanting:
            places = [(row, beam) for row in wanting for beam in beams]
            row, beam = torch.tensor(places, device=self.tokens.device).T
            self._found(row, beam, self.log_probability[row, beam], self.ended[row, beam])
        self.done.update(self.images[row] for row in complete)
        rows = sorted(range(len(self.images)), key=lambda row: self.images[row] in self.done)
        size = fitting(sum(image not in self.done for image in self.images))
        if size < len(rows):
            self._keep(rows[:size])

    def _complete(self) -> list[int]:
        """The rows where nothing better is to be expected, or there is no room for more."""
        if self.history.shape[2] == self.limit:
            return [*range(len(self.images))]
        if self.options.sample:
            return self.ended.all(1).nonzero().flatten().tolist()
        length = self.history.shape[2] ** self.options.length_penalty
        by_group = self.log_probability.unflatten(1, (self.options.groups, -1))
        open_scores = (by_group.max(2).values / length).tolist()
        greedy_ended = (self.greedy < 0).tolist()
        done = []
        for row, image in enumerate(self.images):
            found = _ranked(self.found[image], self.options)
            full = len(found) == self.options.beam_size
            worst = {h.group: h.score for h in found}  # of each group the last
            over = full and all(open_scores[row][group] <= worst[group] for group in worst)
            if over and greedy_ended[row]:
                done.append(row)
        return done

    def _keep(self, rows: list[int]) -> None:
        self.images = [self.images[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        for name in ("tokens", "log_probability", "ended", "descent", "history", "greedy", "start"):
            setattr(self, name, getattr(self, name)[index])
        self.memory = [(keys[index], values[index]) for keys, values in self.memory]
        self.cache.keep(index)

    def _found(
        self, row: Tensor, beam: Tensor, log_probability: Tensor, ended: Tensor | None = None
    ) -> None:
        """Note the hypotheses that beams hold, up to their END if it stands there already, where
        `ended` (None: here) they end: all at once, as a GPU is waited for each time it is asked."""
        group = beam // (self.options.beam_size // self.options.groups)
        parts = [part.tolist() for part in (row, self.history[row, beam], log_probability, group)]
        parts.append([True] * len(row) if ended is None else ended.tolist())
        for number, tokens, total, group, over in zip(*parts, strict=True):
            image = self.images[number]
            if image in self.done:
                continue
            if END_ID in tokens:
                tokens = tokens[: tokens.index(END_ID)]
            score = total / (len(tokens) + over) ** self.options.length_penalty
            found = Hypothesis(tokens, total, score, over, group)
            if self.options.sample or all(other.tokens != tokens for other in self.found[image]):
                self.found[image].append(found)
