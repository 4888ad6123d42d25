"""The texts in a JSON value, or in a cell: captions, lists of them, and conversations."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dataset import TEXT_KEYS

CAPTION_KEYS = (
    *TEXT_KEYS,
    *"sentence sentences description raw caption_str reference_strs caption_text".split(),
    *"caption_en caption_abstract imagedescription alt_text report findings".split(),
    *"taskanswers productdisplayname title comment prompt".split(),
    *"conversations messages texts".split(),
)
TALKS = ("conversations", "messages", "texts")
ANSWERING = ("gpt", "assistant", "model")  # who speaks in a conversation
TO_CAPTION = re.compile(  # a prompt that asks for one
    r"caption|descr[ei]|décri|beschr|summar|опиши|mô tả|描述|描写|描绘|概括|説明して|설명|^\W*$",
    re.IGNORECASE,
)
ASKS = re.compile("[?？؟]")
LONGEST_LIST = 100_000  # characters of a cell that is read as one: Python takes 300 times its size


def is_rejected(row: Mapping[str, Any]) -> bool:
    """Has who looked it over rejected it, in Mechanical Turk, Toloka or Prodigy?"""
    judged = row.get("assignmentstatus") or row.get("assignment:status")
    judged = judged or ("_task_hash" in row and row.get("answer"))
    return str(judged).lower() in ("rejected", "reject", "ignore")


def is_asked(said: Any) -> bool:
    """Is it a prompt that asks something, and no caption that a picture was made from?"""
    return isinstance(said, str) and bool(ASKS.search(said) or TO_CAPTION.search(said))


def texts_of(said: Any) -> list[Any]:
    """The captions in a JSON value: a text, an object that has it by a usual key, a list, or the
    answers in a conversation to who asks for a caption, or the only one, unless it answers a
    question in a word or three, or with places (`<loc_92>`)."""
    if talk := talk_in(said):
        asks = [bool(TO_CAPTION.search(asked)) and not ASKS.search(asked) for asked, _ in talk]
        if len(talk) == 1:
            asks = [not ASKS.search(talk[0][0]) or len(talk[0][1].split()) > 3]
        told = [answer for (_, answer), wanted in zip(talk, asks, strict=True) if wanted]
        return [answer for answer in told if "<loc" not in answer]
    if isinstance(said, list):
        return [text for each in said for text in texts_of(each)]
    if isinstance(said, dict):
        return texts_of(next((said[key] for key in CAPTION_KEYS if said.get(key)), None))
    return [] if said is None or said != said else [said]  # nor NaN


def talk_in(said: Any) -> list[tuple[str, str]]:
    """What is asked and what answered, turn by turn, in a conversation as LLaVA and chat models'
    data sets have it, or in pairs as The Cauldron; nothing in another value."""
    if not (isinstance(said, list) and said and all(isinstance(each, dict) for each in said)):
        return []
    if all({"user", "assistant"} <= {*each} for each in said):
        return [(str(each["user"] or ""), str(each["assistant"] or "")) for each in said]
    who = [each.get("from") or each.get("role") for each in said]
    if not all(who):
        return []
    words = [" ".join(map(str, texts_of(each.get("value", each.get("content"))))) for each in said]
    turns = zip(who, ["", *words], words, strict=False)
    return [(asked, answer) for speaker, asked, answer in turns if speaker in ANSWERING]


def listed(text: str, texts_in: Callable[[Any], list[Any]] = texts_of) -> list[str]:
    """The texts in a cell that holds a list of them, as JSON, Python or numpy writes it."""
    if len(text) > LONGEST_LIST or not re.match(r"\s*(\{|[\[(]\s*['\"{])", text):
        return [text]
    commas = re.sub(r"(?<=['\"])\s+(?=['\"])", ",", text.strip())
    filled = re.sub(r"(?<=, )nan\b|(?<=\[)nan\b", "None", commas)
    python = ast.literal_eval
    for read, cell in ((json.loads, text), (python, commas), (python, filled)):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            values = read(cell)
            values = [values] if isinstance(values, dict) else values  # as Label Studio has them
            texts = texts_in([*values]) if isinstance(values, list | tuple) else [None]
            if all(isinstance(each, str) for each in texts):
                return texts
    return [text]
