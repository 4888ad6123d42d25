"""The texts in a JSON value, or in a cell: captions, lists of them, what is asked and answered in
prompts and conversations; and what in them is no text."""

from __future__ import annotations

import ast
import contextlib
import functools
import html
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from dataset import TEXT_KEYS

CAPTION_KEYS = (
    *TEXT_KEYS,
    *"sentence sentences description raw caption_str reference_strs caption_text".split(),
    *"caption_en caption_abstract imagedescription alt_text alt report findings".split(),
    *"paragraph file_attributes task_answers product_display_name title comment prompt".split(),
    *"conversations messages texts".split(),
)
AROUND = re.compile(
    r"(?i)^(input(?=.(image|question))|output|answer|exif|iptc|xmp|(xmp_)?dc(terms)?|dublin_core)"
    r"[.:](?=\w)|\[\w*\]$"
)
LIKE_CAPTIONS = re.compile(
    r"(?!question|answer|ocr)(\w{1,30}_)?(captions?|texts?|txt|descriptions?|raw)"
    r"|captions?_(?!(id|url|choice|option)s?$)[a-z]\w*|_content"  # Flickr's, the last
)
# Notes, names and cameras' own words: none counts in the place of another key that is blank.
ASIDE = ("title", "comment", "prompt", "imagedescription")
TALKS = ("conversations", "messages", "texts")
ANSWERING = ("gpt", "assistant", "model")  # who speaks in a conversation
TO_CAPTION = re.compile(  # a prompt that asks for one
    r"caption|descr[ei]|décri|beschr|summar|опиши|mô tả|描述|描写|描绘|概括|説明して|설명|^\W*$",
    re.IGNORECASE,
)
# What is to be written, and after which prompt: PaliGemma's names, and others'.
PROMPTS = dict.fromkeys(
    "response completion answer".split(), "query problem instruction prompt".split()
)
PROMPTS |= dict(suffix=["prefix"], output=["instruction"])
PAIRS = [(answer, prompt) for answer, prompts in PROMPTS.items() for prompt in prompts]
PAIRS += [("label", "query"), ("response", "question")]  # ChartQA's
ASKS = re.compile("[?？؟]")
# Of what was asked for, and no years, sums or telephones in brackets: these are captions' own.
PLACES = re.compile(r"<loc|<\|?box|\{<\d|\[\s*[\d.]+(,\s*[\d.]+){3}\s*\]")
TAG_NAMES = "a|p|br|b|i|u|em|strong|div|span|img|ul|ol|li|h[1-6]|table|tbody|tr|t[dh]|su[bp]"
WRITTEN_ENDS = r"(?<!\\)(\\r\\n|\\[nrt](?![a-z{]))"  # of lines, as \n, not TeX's \nu, \r{A} and \\n
TAGS = re.compile(rf"\s?(((?i:</?({TAG_NAMES})(\s[^<>]*)?/?>)|{WRITTEN_ENDS})\s*)+")
STARTS = re.compile(  # after what a reasoning model thought
    r"(?is)\s*((<think>.*?</think>|startseq\s|[<\[]start[>\]]|<[bs]os>|</?s>|\[cls\]|<image>"
    r"|<\|\w{1,16}\|>)\s?){1,3}"
)
ENDS = re.compile(
    r"(\sendseq|\s?([<\[](end|pad)[>\]]|<eos>|</s>|\[sep\]|<\|\w{1,16}\|>)){1,3}\s*$", re.IGNORECASE
)
MOST_ENDS = 48  # characters of three of them: no more of a text is searched at a time
# What programs and databases write for empty cells, and spreadsheets for failed formulas.
NOTHING = r"nan NaN NA None null NULL \N undefined <NA> N/A n/a #N/A #NAME? #REF! #VALUE!".split()
NOTHING += ["#DIV/0!", "#ERROR!"]
LONGEST_LIST = 100_000  # characters of a cell that is read as one: Python takes 300 times its size


def is_rejected(row: Mapping[str, Any]) -> bool:
    """Has who looked it over rejected it, in Mechanical Turk, Toloka, Prodigy or SNLI-VE?"""
    judged = row.get("assignmentstatus") or row.get("assignment:status")
    judged = judged or ("_task_hash" in row and row.get("answer")) or row.get("gold_label")
    return str(judged).lower() in ("rejected", "reject", "ignore", "contradiction", "neutral")


def is_asked(said: Any) -> bool:
    """Is it a prompt that asks something, and no caption that a picture was made from?"""
    return isinstance(said, str) and bool(ASKS.search(said) or TO_CAPTION.search(said))


def as_asked(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what its prompt asks for, a question and its answer or a caption, called so."""
    if "question_id" in row and not {*row} & {"question", "prompt"}:  # as LLaVA asks
        row["question"] = row.pop("text", None)
    asking = {*row} & {"query", "question_id"} or is_asked(row.get("prompt"))
    if asking and isinstance(row.get("label"), str | list):  # as ChartQA, POPE and VisualGLM answer
        row["response"] = row.pop("label")
    if "question" in row and "response" in row and not {*row} & {"answer", "answers"}:
        row["answer"] = row.pop("response")
    if all(isinstance(row.get(key), list) for key in ("prompt", "completion")):  # TRL's messages
        row["messages"] = [*row.pop("prompt"), *row.pop("completion")]
    more = row.get("input")  # Alpaca's: what an instruction is about, such as the question itself
    if isinstance(more, str) and more.strip() and isinstance(row.get("instruction"), str):
        row["instruction"] = more if ASKS.search(more) else f"{row['instruction']} {more}"
    for answer, prompts in PROMPTS.items():
        prompt = next((key for key in prompts if isinstance(row.get(key), str)), "")
        if answer in row and prompt:
            asked = row.pop(prompt)
            caption = TO_CAPTION.search(asked) and "question" not in row
            asks = {} if caption else {"question": asked}
            row = asks | {"answer" if asks else "caption": row.pop(answer)} | row
            row["prefix"] = asked
    return row


def as_labelled(row: dict[str, Any]) -> dict[str, Any]:
    """An entry of Label Studio's export as a row: its task's fields, and what was typed for it, as
    captions those fields of the form that are called so, or else all."""
    done = [each for each in row["annotations"] if not each.get("was_cancelled")]
    told: dict[str, list[Any]] = {}  # by what each field of the form is called
    for each in (each for said in done for each in said["result"]):
        if {*(value := each.get("value", {}))} == {"text"}:  # no box, as OCR's has
            told.setdefault(each.get("from_name", ""), []).extend(texts_of(value))
    named = [said for name, said in told.items() if TO_CAPTION.search(name)]
    return told | row["data"] | {"caption": named or [*told.values()]}


def texts_of(said: Any) -> list[Any]:
    """The captions in a JSON value: a text, an object that has it by a usual key, a list, or the
    answers in a conversation to who asks for a caption, or the only one, unless it answers a
    question in a word or three, or with places (`<loc_92>`, `[12, 34, 56, 78]`)."""
    if talk := talk_in(said):
        asks = [bool(TO_CAPTION.search(asked)) and not ASKS.search(asked) for asked, _ in talk]
        if len(talk) == 1:
            asks = [not ASKS.search(talk[0][0]) or len(talk[0][1].split()) > 3]
        told = [answer for (_, answer), wanted in zip(talk, asks, strict=True) if wanted]
        return [answer for answer in told if not PLACES.search(answer)]
    if isinstance(said, list):
        return [text for each in said for text in texts_of(each)]
    if isinstance(said, dict):
        keys = [key for key in CAPTION_KEYS if key in said]
        usual = [key for key in keys if key not in ASIDE]
        if told := next(filter(None, map(said.get, usual)), None):
            return texts_of(told)
        like = (said[key] for key in said if LIKE_CAPTIONS.fullmatch(plain_key(str(key))))
        told = [text for text in like if isinstance(text, str) and text.strip()]
        if told or usual:  # of DCI's short_caption and extra_caption the longer counts
            return sorted(told, key=len)[-1:]
        return texts_of(next(filter(None, map(said.get, keys)), None))
    return [] if said is None or said != said else [said]  # nor NaN


@functools.lru_cache(1000)
def plain_key(name: str) -> str:
    """In lower case and words apart, without what Mechanical Turk (`Answer.caption`), Toloka
    (`OUTPUT:caption`), exiftool (`XMP:Description`) and archives (`dc.description[en]`) put around
    it, or Florence-2."""
    name = AROUND.sub("", re.sub("[ -]+", "_", name.strip().strip("<>")))
    camel = name[:1].islower()  # imageName
    return (re.sub("(?<=[a-z])(?=[A-Z])", "_", name) if camel else name).lower()


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
    """The texts in a cell that holds a list of them, as JSON, Python, numpy or models write it."""
    text = re.sub(r"\A\s*```\w*\s|```\s*\Z", "", text) if "```" in text else text
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


def unescaped(text: str) -> str:
    """With `&amp;` and the like as what they mean, escaped up to ten times; without its semicolon
    `&not` is no such sign. Flickr30k Entities' marks around phrases go as well, other programs' of
    a caption's start and end, and a page's tags, such as `<br>`, and line ends written as `\\n`."""
    text = re.sub(r"\[/EN#\d[^\s\[\]]* ([^\[\]]*)\]", r"\1", text)
    for _ in range(10 if "&" in text else 0):
        text = re.sub(r"&#?\w+;", lambda sign: html.unescape(sign[0]), text)
    text = text[begun.end() :] if (begun := STARTS.match(text)) else text
    end = whole = len(text.rstrip())
    while mark := ENDS.search(text, max(0, end - MOST_ENDS), end):  # batches are filled up by them
        end = mark.start()
    text = text[:end] if end < whole else text
    return TAGS.sub(" ", text) if "<" in text or "\\" in text else text  # which is quicker


def has_word(text: str) -> bool:
    """Has it a letter, number, mark or symbol? A caption of signs alone is an empty target."""
    return any(unicodedata.category(sign)[0] in "LNMS" for sign in text)
