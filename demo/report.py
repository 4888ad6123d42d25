"""What the demo's captioner got right on scenes whose combinations it never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dataset import DataPaths, load_splits
from demo.scenes import Scene, describe, matches
from inference import load_captioner


def wholly_right(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> list[str]:
    """The pictures whose caption names every thing, colour, size, count and relation rightly."""
    return [name for name, caption in captions.items() if matches(caption, scenes[name])]


def report(checkpoint: Path, paths: DataPaths, shown: int = 5) -> float:
    """Caption the test scenes, print some beside the truth, return the share wholly right."""
    table = json.loads((paths.data_dir / "scenes.json").read_text(encoding="utf-8"))["scenes"]
    names = load_splits(paths.splits)["test"]
    scenes = {name: Scene.from_dict(table[name]) for name in names}
    captioner = load_captioner(checkpoint)
    captions: dict[str, str] = {}
    for start in range(0, len(names), 50):
        part = names[start : start + 50]
        captions |= zip(part, captioner.caption([paths.images / n for n in part]), strict=True)
    print("\ntest scenes, each with a number of things of a kind never trained on:")
    for name in names[:shown]:
        mark = "right" if matches(captions[name], scenes[name]) else "WRONG"
        print(f"  {name}  {mark}  {captions[name]}")
        print(f"  {'':{len(name)}}  truth  {describe(scenes[name])[0]}")
    right = wholly_right(captions, scenes)
    print(f"wholly right: {len(right)} of {len(names)} ({len(right) / len(names):.1%})")
    return len(right) / len(names)
