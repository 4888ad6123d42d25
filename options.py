"""What can be chosen: tasks, splits, and how to write; of this, flags are made."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from settings import check_ranges, constant_comments
from utils import UserError

T = TypeVar("T")

SPLITS = ("train", "val", "test")
TASKS = ("captions", "questions")


def parse_tasks(text: str) -> tuple[str, ...]:
    """TASKS, such as "captions" or "captions,questions", as a tuple."""
    named = [part.strip() for part in text.split(",")]
    if not set(named) <= set(TASKS):
        raise UserError(f'TASKS is {text!r}: use captions, questions, or "captions,questions"')
    return tuple(task for task in TASKS if task in named)


@dataclass(frozen=True)
class GenerationOptions:
    """How to write. The defaults are greedy. Flags are made of these lines, comments included."""

    beam_size: int = 1  # beams of the search, or samples; 1: greedy
    length_penalty: float = 1.0  # scores are divided by length ** this; higher: longer captions
    min_length: int = 1  # fewest tokens of a caption, END counted
    max_length: int | None = None  # most tokens of a caption, END counted; None: all that fit
    no_repeat_ngram: int = 0  # no n-gram of this size twice, no word twice in a row; 0: allowed
    rerank: float = 0.0  # what a point of the CIDEr that a photo's look promises adds to a score
    groups: int = 1  # diverse beam search (Vijayakumar et al. 2016): beams in this many groups
    diversity: float = 0.5  # a token's loss per beam of earlier groups that took it at this step
    sample: bool = False  # draw tokens instead of searching: beam_size independent samples
    temperature: float = 1.0  # of the draws; lower: safer
    top_k: int = 0  # draw from this many tokens at most; 0: all
    top_p: float = 1.0  # draw from the fewest tokens of this probability; 1: all
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.beam_size % self.groups:
            sizes = f"beam_size is {self.beam_size}, and groups {self.groups}"
            raise UserError(f"{sizes}: it must be a multiple of groups")
        if (self.max_length or self.min_length) < self.min_length:
            raise UserError("min_length must be at most max_length")


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `GenerationOptions`; what isn't given keeps its usual value."""
    group = parser.add_argument_group("how to write (defaults: what the checkpoint says)")
    comments = constant_comments(sys.modules[__name__])
    for field in dataclasses.fields(GenerationOptions):
        if isinstance(field.default, bool):
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": int if field.default is None else type(field.default)}
        group.add_argument(f"--{field.name}", default=None, help=comments[field.name], **kind)


def given_options(flags: Any) -> dict[str, Any]:
    """The fields of `GenerationOptions` that were given as flags."""
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(GenerationOptions)}
    return {name: value for name, value in given.items() if value is not None}


def change_options(own: GenerationOptions, asked: bool, **given: Any) -> GenerationOptions:
    """A checkpoint's `own` options, or for answers the greedy ones, with some replaced."""
    usual = dataclasses.asdict(GenerationOptions() if asked else own)
    if strange := [name for name in given if name not in usual]:
        raise UserError(f"{strange[0]} is no option: there are {', '.join(usual)}")
    return typed(GenerationOptions, usual | given)


def typed(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of plain values; refused where one isn't of the type that its field has."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        hint = hints.get(name, object)
        if not fits(value, hint):
            raise UserError(f"{name} is {value!r}: it must be {getattr(hint, '__name__', hint)}")
    return kind(**values)


def fits(value: object, hint: Any) -> bool:
    """Is it of a field's type, such as `dict[str, int]`, with all its parts?"""
    kind, parts = get_origin(hint), get_args(hint)
    if kind not in (dict, list):
        return hint is Any or isinstance(value, (hint, int) if hint is float else hint)
    if not isinstance(value, kind):
        return False
    groups = (value.keys(), value.values()) if isinstance(value, dict) else (value,)
    return all(fits(v, part) for group, part in zip(groups, parts, strict=True) for v in group)
