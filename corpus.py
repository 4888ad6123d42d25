"""What a training learns from: texts about photos, their features, and the tokenizer."""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from captions_search import say_other_split
from checkpoint import Checkpoint, check_same
from dataset import (
    CaptionRows,
    DataPaths,
    Splits,
    Texts,
    check_splits,
    data_paths,
    encode_rows,
    load_splits,
    load_texts,
    place_by_name,
    prompts_about,
    references_of,
)
from device import choose_dtype
from distributed import ALONE, Team
from encoder import FrozenEncoder, completed, decisive, parse_layers
from features import FeatureCache, build_features, resident_or_cached
from options import parse_tasks
from rerank import Reranker, fit_reranker
from self_critical import Critic, critical_epochs
from shards import Rows, Stock, StreamedRows, take_stock
from tars import expand_shards, identity, shard_name, shards_named
from tokenizer import ANSWER_ID, END_ID, MERGED_IDS, CaptionTokenizer
from utils import UserError

SIDES = re.compile(  # the words for left and right, in some languages, in lower case
    r"\b(left|right|links|rechts|linke[nrs]?|rechte[nrs]?|gauche|droite|izquierd[ao]|derech[ao]|"
    r"sinistra|destra|esquerd[ao]|direit[ao]|слева|справа|лев\w+|прав\w+)\b|[左右]|왼|오른"
)
MANY = 50_000  # photos whose texts take minutes to become tokens
MANY_REPEAT = 0.05  # of captions; 0.5 % of Flickr8k's do, and most of those of three sentences


@dataclass
class Data:
    """Texts about photos, the photos by split, and their features, as rows to train on.

    Only what the tasks want is in it, and only photos that have some of it. With TRAIN_SHARDS
    the photos to train on are in `train` alone.
    """

    paths: DataPaths
    tasks: tuple[str, ...]
    texts: Texts
    splits: Splits
    encoder: dict[str, Any]  # FrozenEncoder.identity()
    tower: dict[str, Any]  # FrozenEncoder.for_others(), preprocessor included
    cache: FeatureCache
    tokenizer: CaptionTokenizer
    train: Rows
    val: CaptionRows
    critic: Critic | None  # where there is a self-critical stage

    @functools.cached_property
    def reranker(self) -> Reranker | None:
        """What chooses among captions found, where photos and captions are at hand to fit it."""
        if isinstance(self.train, StreamedRows):
            return None
        captions = {
            name: [ids[1:] for ids in group if ANSWER_ID not in ids]
            for name, group in self.train.groups.items()
        }
        captions = {name: group for name, group in captions.items() if group}
        return fit_reranker(self.train.features, captions) if len(captions) > 1 else None


def load_data(
    settings: SimpleNamespace,
    paths: DataPaths,
    device: torch.device,
    team: Team = ALONE,
    begun: Checkpoint | None = None,
) -> Data:
    """Read what the tasks want, and encode the photos that aren't in the feature cache yet.

    The tokenizer is that of `begun`, from which training goes on; without it the one that was
    given is loaded, or one learned. Where an epoch would have fewer than MIN_STEPS, BATCH_SIZE
    becomes less.
    """
    tasks = parse_tasks(settings.TASKS)
    splits = load_splits(paths.splits)  # at once, as another preparation may split otherwise
    texts = load_texts(paths, tasks, quiet=True)  # as its preparation has said what is left out
    splits = {split: [name for name in names if name in texts] for split, names in splits.items()}
    if settings.TRAIN_SHARDS:
        splits["train"] = []
    if settings.MAX_IMAGES:
        splits = first_photos(splits, settings.MAX_IMAGES)
    needed = ("val",) if settings.TRAIN_SHARDS else ("train", "val")
    check_splits(splits, f"leaving out photos without {' or '.join(tasks)}", needed)
    tokenizer = given_tokenizer(settings, begun)
    name, revision = settings.ENCODER_MODEL_NAME, settings.ENCODER_REVISION or None
    layers = parse_layers(settings.ENCODER_LAYERS)
    size = settings.ENCODER_IMAGE_SIZE
    encoder = FrozenEncoder.load(name, revision, layers, image_size=size).to(device)
    identity = encoder.identity()
    if begun:  # before photos are encoded
        before = completed(begun.encoder, identity)
        check_same(decisive(before), decisive(identity), "encoder ")
        if not begun.training:  # a training that goes on compares the photos themselves
            say_other_split(paths, begun.settings)
    how = {
        "dtype": choose_dtype(settings.PRECISION, device),
        "batch_size": settings.FEATURE_BATCH_SIZE,
        "max_bad": settings.MAX_BAD_IMAGES,
        "team": team,
    }
    urls, keep = shards_to_train(settings), settings.KEEP_SHARD_FEATURES
    stock = take_stock(encoder, urls, paths.features, keep_features=keep, **how) if urls else None
    views = views_to_show(texts, splits["train"], settings.FEATURE_VIEWS)
    turns = range(settings.FEATURE_VIEWS)
    items = [(name, view) for view in turns for name in splits["train"] if view in views[name]]
    items += [(name, 0) for name in splits["val"]]
    cache, bad = build_features(encoder, paths.images, items, paths.features, **how)
    splits = {split: [n for n in names if n not in bad] for split, names in splits.items()}
    check_splits(splits, "leaving out photos that can't be read", needed)
    if len(texts) > MANY:
        print(f"tokens    of the texts about {len(texts):,} photos are made: a minute or several")
    if tokenizer is None:
        learned = functools.partial(texts_to_learn, texts, splits["train"], stock)
        places = settings.VOCAB_SIZE, paths.vocab, paths.merges
        tokenizer = team.on_rank0(lambda: CaptionTokenizer.learned(learned, *places))
    features, length = resident_or_cached(cache, device), settings.MAX_CAPTION_LENGTH
    train = CaptionRows(encode_rows(tokenizer, texts, splits["train"], length), features, views)
    val = CaptionRows(encode_rows(tokenizer, texts, splits["val"], length), features)
    say_cut(tokenizer, texts, train, length, fixed=begun is not None)
    say_repeats(train, settings.NO_REPEAT_NGRAM)
    critic = None
    if stock:
        train = StreamedRows(stock, tokenizer, length, settings.SHUFFLE_BUFFER)
    elif critical_epochs(settings):
        references = references_of(texts, splits["train"])
        longest = max(map(len, train.without_questions()), default=2) - 1
        critic = Critic(tokenizer, references, settings.SCST_BEAM_SIZE, longest)
    if train.count(settings.BATCH_SIZE) < settings.MIN_STEPS:
        settings.BATCH_SIZE = fewer = max(1, len(train) // settings.MIN_STEPS)
        steps, asked = train.count(fewer), f"MIN_STEPS asks for {settings.MIN_STEPS}"
        print(f"batch     {fewer} photos, so that an epoch has {steps} steps ({asked})")
    tower = encoder.for_others(weights=False)
    return Data(paths, tasks, texts, splits, identity, tower, cache, tokenizer, train, val, critic)


def views_to_show(texts: Texts, names: Iterable[str], count: int) -> dict[str, range]:
    """The first `count` views of each photo, but no mirror image of one of which is said what is
    on its left or right."""

    def tells_sides(name: str) -> bool:
        said = "\n".join(f"{text.question} {text.target}" for text in texts[name])
        return bool(SIDES.search(said.lower()))

    return {name: range(0, count, 1 + (count > 1 and tells_sides(name))) for name in names}


def first_photos(splits: Splits, most: int) -> Splits:
    """So many photos in all, of each split its share, and of one that has any at least one: the
    first by a hash, as a list may be sorted by what is to be seen."""
    total = max(1, sum(map(len, splits.values())))
    parts = {split: sorted(names, key=place_by_name) for split, names in splits.items()}
    return {split: names[: -(-most * len(names) // total)] for split, names in parts.items()}


def say_cut(
    tokenizer: CaptionTokenizer, texts: Texts, rows: CaptionRows, length: int, fixed: bool = False
) -> None:
    """Say how many texts are longer than what is learned of them, a question or what is said;
    `fixed`: by the checkpoint that training goes on from."""
    pairs = [(t.question, t.target) for name in rows.names for t in texts[name]]
    learned = [ids for name in rows.names for ids in rows.groups[name]]
    likely = [
        (pair, len(ids))
        for pair, ids in zip(pairs, learned, strict=True)
        if ids[-1] != END_ID or (pair[0] and ids.index(ANSWER_ID) + 1 >= length // 2)
    ]
    whole = tokenizer.encode_texts([pair for pair, _ in likely], sys.maxsize)
    cut = [ids for ids, (_, kept) in zip(whole, likely, strict=True) if len(ids) > kept]
    if cut:
        asked = (2 * ids.index(ANSWER_ID) + 2 for ids in cut if ANSWER_ID in ids)
        longest = max(*map(len, cut), *asked, 0)
        half = ", of which a question takes half at most" * any(ANSWER_ID in ids for ids in cut)
        anew = "a decoder begun anew with " * fixed
        print(
            f"cut       {len(cut):,} of {len(pairs):,} texts, to MAX_CAPTION_LENGTH = {length} "
            f"tokens{half}; {anew}--max_caption_length {longest} would keep all"
        )


def say_repeats(rows: CaptionRows, size: int) -> None:
    """Say if many of people's captions hold what a search with NO_REPEAT_NGRAM never writes."""
    captions = [*rows.without_questions()]
    count = 0
    for ids in captions if size else ():
        if len({*ids}) == len(ids):
            continue  # most: at a start, 150,000 captions are looked through
        grams = [*zip(*(ids[start:] for start in range(size)), strict=False)]
        twice = any(word == after >= MERGED_IDS for word, after in itertools.pairwise(ids))
        count += twice or len({*grams}) < len(grams)
    if count > MANY_REPEAT * len(captions):
        print(
            f"repeats   {count:,} of {len(captions):,} captions say {size} tokens again or a word "
            f"twice in a row, which NO_REPEAT_NGRAM = {size} keeps the decoder from: "
            "--no_repeat_ngram 0 lets it"
        )


def shards_to_train(settings: SimpleNamespace) -> list[str]:
    """What TRAIN_SHARDS name, if anything; refuses settings that they don't go with."""
    if not settings.TRAIN_SHARDS:
        if settings.VAL_SHARDS:
            raise UserError("VAL_SHARDS validate: name those to train on with --train_shards")
        return []
    if (settings.FEATURE_VIEWS, settings.TASKS.strip(), settings.MAX_IMAGES) != (1, "captions", 0):
        raise UserError(
            "TRAIN_SHARDS are learned from whole, in one view and for captions only: use "
            "--feature_views 1 --tasks captions --max_images 0 (for a first try, name few shards)"
        )
    urls = expand_shards(settings.TRAIN_SHARDS)
    held = {*map(identity, shards_named(settings.VAL_SHARDS or ""))}
    if both := [url for url in urls if identity(url) in held]:
        raise UserError(
            f"TRAIN_SHARDS and VAL_SHARDS both name {shard_name(both[0])}: what validates must "
            "not be learned from, so take it out of TRAIN_SHARDS"
        )
    return urls


def texts_to_learn(texts: Texts, names: Sequence[str], stock: Stock | None) -> Iterator[str]:
    """What a tokenizer is learned from: the captions to train on, then questions and answers."""
    for captions in references_of(texts, names).values():
        yield from captions
    for _, text in prompts_about(texts, names, "questions"):
        yield from (text.question, text.target)
    if stock:
        yield from stock.first_texts()


def given_tokenizer(settings: SimpleNamespace, begun: Checkpoint | None) -> CaptionTokenizer | None:
    """The tokenizer of what training goes on from, or else that which the user gave, if any."""
    if begun:
        return begun.tokenizer
    if bool(settings.VOCAB_FILE) != bool(settings.MERGES_FILE):
        raise UserError("VOCAB_FILE and MERGES_FILE belong together: give both or neither")
    paths = data_paths(settings)
    return CaptionTokenizer.load(paths.vocab, paths.merges) if settings.VOCAB_FILE else None
