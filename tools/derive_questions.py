"""Write questions about numbers and colours that people's captions answer, to train on as well.

Of each training photo: how many dogs there are where a caption says "two black dogs", what color
the shirt is where one says "a red shirt", if no other caption of the photo says otherwise. English
only. Photos that validate or test keep the questions that they have.

    python -m tools.derive_questions --data_dir flickr8k --questions_file questions.json \
        --out more_questions.json
    python train.py ... --tasks captions,questions --questions_file more_questions.json
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.derive_questions)

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dataset import data_paths, load_captions, load_splits
from questions_file import read_questions
from utils import check_output, run_script, write_file

WRITTEN = "two three four five six".split()
NUMBERS = {spelling: word for n, word in enumerate(WRITTEN, 2) for spelling in (word, str(n))}
COUNTED = "dogs people men children girls women boys horses kids".split()
COLOURS = "black white red blue green yellow brown orange purple pink gray grey tan".split()
COLOURED = (
    "dog shirt jacket ball hat dress helmet coat horse kayak car uniform bike boat swimsuit"
).split()
BETWEEN = 2  # most words between a number and what is counted: "two small brown dogs"


def numbers(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The numbers in a caption, with the question that each answers."""
    for place, word in enumerate(words):
        after = words[place + 1 : place + 2 + BETWEEN]
        things = [thing for thing in after if thing in COUNTED]
        if word in NUMBERS and things:
            yield f"how many {things[0]} are there?", NUMBERS[word]


def colours(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The colours in a caption, with the question that each answers."""
    for word, thing in zip(words, words[1:], strict=False):
        if word in COLOURS and thing in COLOURED:
            yield f"what color is the {thing}?", word.replace("grey", "gray")


KINDS: dict[str, Callable[[Sequence[str]], Iterator[tuple[str, str]]]] = {
    "count": numbers,
    "color": colours,
}


def derive(captions: Sequence[str]) -> list[dict[str, str]]:
    """The questions that a photo's captions answer, none against another."""
    found = []
    words = [re.findall("[a-z0-9]+", caption.lower()) for caption in captions]
    for kind, read in KINDS.items():
        answers: dict[str, list[str]] = {}
        for each in words:
            for question, answer in read(each):
                answers.setdefault(question, []).append(answer)
        found += [
            {"question": question, "answer": given[0], "type": kind}
            for question, given in answers.items()
            if len(set(given)) == 1
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    settings = commands.derive_questions(argv)
    paths = data_paths(settings)
    check_output("--out", settings.out, paths.questions, paths.captions)
    there = settings.QUESTIONS_FILE or paths.questions.exists()
    table = read_questions(Path(settings.QUESTIONS_FILE or paths.questions)) if there else {}
    captions, added = load_captions(paths.captions), Counter()
    for name in load_splits(paths.splits)["train"]:
        known = {entry["question"] for entry in table.get(name, ())}
        new = [entry for entry in derive(captions[name]) if entry["question"] not in known]
        if new:
            table[name] = [*table.get(name, ()), *new]
        added.update(entry["type"] for entry in new)
    write_file(Path(settings.out).expanduser(), json.dumps(table, ensure_ascii=False, indent=1))
    print(f"{settings.out}: {sum(map(len, table.values())):,} questions, of which are new:")
    for kind, count in added.items():
        print(f"  {count:,} of the type {kind}")
    return 0


if __name__ == "__main__":
    run_script(main)
