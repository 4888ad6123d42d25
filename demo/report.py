"""What the demo's captioner got right on scenes whose combinations it never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataset import DataPaths, load_questions, load_splits
from demo.scenes import Scene, describe, matches
from inference import Captioner, load_captioner

SHOWN = 5  # captions, and answers


def wholly_right(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> list[str]:
    """The pictures whose caption names every thing, colour, size, count and relation rightly."""
    return [name for name, caption in captions.items() if matches(caption, scenes[name])]


def report(checkpoint: Path, paths: DataPaths) -> None:
    """What the model says of the test scenes, beside the truth, and how much of it is right."""
    names = load_splits(paths.splits)["test"]
    captioner = load_captioner(checkpoint)
    print("\ntest scenes, each with a number of things of a kind never trained on:")
    if "captions" in captioner.tasks:
        report_captions(captioner, paths, names)
    if "questions" in captioner.tasks:
        report_answers(captioner, paths, names)


def report_captions(captioner: Captioner, paths: DataPaths, names: Sequence[str]) -> None:
    table = json.loads((paths.data_dir / "scenes.json").read_text(encoding="utf-8"))["scenes"]
    scenes = {name: Scene.from_dict(table[name]) for name in names}
    said = captioner.caption([paths.images / name for name in names])
    captions = dict(zip(names, said, strict=True))
    for name in names[:SHOWN]:
        mark = "right" if matches(captions[name], scenes[name]) else "WRONG"
        print(f"  {name}  {mark}  {captions[name]}")
        print(f"  {'':{len(name)}}  truth  {describe(scenes[name])[0]}")
    right = wholly_right(captions, scenes)
    print(f"wholly right: {len(right)} of {len(names)} ({len(right) / len(names):.1%})")


def report_answers(captioner: Captioner, paths: DataPaths, names: Sequence[str]) -> None:
    table = load_questions(paths.questions)
    asked = [(name, text) for name in names for text in table[name]]
    right: dict[str, list[bool]] = {}
    answers = captioner.answer(
        [paths.images / name for name, _ in asked], [text.question for _, text in asked]
    )
    for place, ((name, text), answer) in enumerate(zip(asked, answers, strict=True)):
        right.setdefault(text.kind, []).append(answer == text.target)
        if place < SHOWN:
            mark = "right" if answer == text.target else f"WRONG ({text.target})"
            print(f"  {name}  {text.question} {answer}  {mark}")
    for kind, marks in sorted(right.items()):
        print(f"  {kind}: {sum(marks)} of {len(marks)} answers right")
    total = [mark for marks in right.values() for mark in marks]
    print(f"answers right: {sum(total)} of {len(total)} ({sum(total) / len(total):.1%})")
