"""A look at every photo and caption of a prepared data set, before training meets them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
from PIL import Image

from dataset import DataPaths, Texts, answers_by_kind
from encoder import ImageError, open_image
from features import file_digest, prefetch
from metrics import without_spaces
from options import SPLITS
from photo_names import is_photo, is_unread
from tokenizer import CaptionTokenizer, normalize
from utils import Bar, files_in

ALIKE = 0.96  # correlation of small pictures: few photos of different scenes reach it
MANY_SAME = 0.3  # of captions: as many as that are chosen wherever the photo tells little
MANY_ALIKE = 0.05  # of photos to score on, which no collection of scenes taken once has


def check(
    settings: SimpleNamespace,
    paths: DataPaths,
    splits: Mapping[str, Sequence[str]],
    captions: Mapping[str, Sequence[str]],
    questions: Texts,
) -> list[str]:
    """Describe a prepared data set; returns what is wrong with it that training would refuse."""
    if captions:
        describe_captions(captions, splits, settings)
    if questions:
        describe_questions(questions)
    wanted = list(dict.fromkeys((*captions, *questions)))
    missing = [name for name in wanted if not os.path.isfile(paths.images / name)]
    unsplit = len(wanted) - len(missing) - sum(map(len, splits.values()))
    print(f"missing   {len(missing)} photos, {unsplit} more are in no split")
    files = set(files_in(paths.images)).difference(wanted)
    for what, names in (
        ("photos, of which nothing is said", sorted(filter(is_photo, files))),
        ("pictures in a form that isn't read: make them JPEGs", sorted(filter(is_unread, files))),
    ):
        if names:
            print(f"unused    {len(names)} {what}, first {names[:3]}")
    split_of = {name: split for split in SPLITS for name in splits[split]}
    bad: dict[str, str] = {}
    copies: dict[str, list[str]] = {}
    small: dict[str, np.ndarray] = {}

    def look(name: str) -> tuple[str, str, str]:
        try:
            small[name] = in_small(open_image(paths.images / name, least=64))
            return name, file_digest(paths.images / name), ""
        except ImageError as error:
            return name, "", str(error)

    looked = prefetch(look, split_of, threads=os.cpu_count() or 2, ahead=32)
    with Bar(len(split_of), "looking at photos", "photo") as bar:
        for name, digest, problem in looked:
            if problem:
                bad[name] = problem
            else:
                copies.setdefault(digest, []).append(name)
            bar.step(1)
    print("\n  ".join([f"broken    {len(bad)} photos can't be read", *bad.values()]))
    shared = [names for names in copies.values() if len({split_of[name] for name in names}) > 1]
    lines = [", ".join(f"{name} ({split_of[name]})" for name in names) for names in shared]
    print("\n  ".join([f"copies    {len(shared)} photos are in several splits", *lines]))
    sound = [name for name in split_of if name not in bad]  # in an order that no thread changes
    learned = {name: small[name] for name in sound if split_of[name] == "train"}
    scored = {name: small[name] for name in sound if name not in learned}
    pairs = look_alike(learned, scored)
    if len(pairs) > MANY_ALIKE * len(scored):
        print(
            f"alike     {len(pairs)} of {len(scored)} photos to validate or test on look like one "
            f"to train on, as {' and '.join(pairs[0])}: if they are of one scene, scores say too "
            "much; --split karpathy --karpathy_file FILE keeps scenes together (docs/data.md)"
        )
    limit = settings.MAX_BAD_IMAGES
    met = sum(split_of[name] != "test" for name in bad)  # by training
    problems = [
        f"{count} photos {state}, more than MAX_BAD_IMAGES = {limit}"
        for count, state in ((len(missing), "are missing"), (met, "can't be read"))
        if count > limit
    ]
    dark = [s for s in ("train", "val") if splits[s] and bad.keys() >= {*splits[s]}]
    return problems + [f"no photo of the split {split!r} can be read" for split in dark]


def in_small(image: Image.Image) -> np.ndarray:
    """A picture as 8 by 8 colours about their mean, of length 1, or 0 where it has one colour."""
    pixels = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32).ravel()
    pixels -= pixels.mean()
    return pixels / max(1.0, float(np.linalg.norm(pixels)))


def look_alike(
    train: Mapping[str, np.ndarray], scored: Mapping[str, np.ndarray]
) -> list[tuple[str, str]]:
    """Those of the scored photos that look like one to train on, with the one most like it."""
    known, stacked = [*train], np.stack([*train.values()] or [np.zeros(192, np.float32)])
    names, pairs = [*scored], []
    for start in range(0, len(names), 64):  # as all of COCO's at once take gigabytes
        part = names[start : start + 64]
        found = np.stack([scored[name] for name in part]) @ stacked.T
        best = zip(part, found.argmax(1), found.max(1), strict=True)
        pairs += [(name, known[place]) for name, place, most in best if most > ALIKE]
    return pairs


def describe_captions(
    captions: Mapping[str, Sequence[str]],
    splits: Mapping[str, Sequence[str]],
    settings: SimpleNamespace,
) -> None:
    """Say how many captions a photo has, how long they are, and how many training would cut."""
    texts = [normalize(text) for group in captions.values() for text in group]
    counts = sorted(map(len, captions.values()))
    lengths = sorted(len(text.split()) for text in texts)
    words = {word for text in texts for word in text.split()}
    print(f"a photo   {counts[0]} to {counts[-1]} captions, {len(texts) / len(captions):.1f} mean")
    mean, known = sum(lengths) / len(texts), f"{len(words):,} different ones"
    print(f"a caption {lengths[0]} to {lengths[-1]} words, {mean:.1f} mean, {known}")
    usual, times = Counter(texts).most_common(1)[0]
    if times > MANY_SAME * len(texts):
        print(f"same      {times} captions are {usual!r}: what is learned may be to say just that")
    if odd := without_spaces(texts):
        print(f"words     {odd}")
    # VAL_SHARDS leave nothing to train on here: the tokenizer of other captions will be much alike.
    learned = [text for name in splits["train"] or captions for text in captions.get(name, ())]
    longest = settings.MAX_CAPTION_LENGTH
    tokenizer = CaptionTokenizer.train(learned, settings.VOCAB_SIZE)
    rows = tokenizer.encode_texts([("", text) for text in texts], longest + 1)
    cut = sum(len(row) > longest for row in rows)
    print(f"too long  {cut} captions, beyond MAX_CAPTION_LENGTH = {longest} tokens: they are cut")


def describe_questions(questions: Texts) -> None:
    """Say how many questions a photo has, and which answers are common, to all and by type."""
    asked = [text for group in questions.values() for text in group]
    counts = sorted(map(len, questions.values()))
    print(f"a photo   {counts[0]} to {counts[-1]} questions, {len(asked) / len(counts):.1f} mean")
    told = answers_by_kind(asked)
    for kind, answers in sorted(told.items(), key=lambda each: (-each[1].total(), each[0]))[:11]:
        whole = answers.total()
        most = ", ".join(f"{said!r} {100 * n / whole:.0f} %" for said, n in answers.most_common(3))
        of = f"{whole:,}" + f" of type {kind!r}" * bool(kind)
        print(f"answers   {of}, {len(answers):,} different ones: {most}")
