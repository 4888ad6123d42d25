"""Drawn scenes of coloured shapes, their descriptions, and a parser that checks descriptions."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from utils import atomic_write

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 205, 45),
    "green": (50, 155, 75),
    "blue": (45, 100, 215),
    "purple": (140, 70, 175),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 14, "medium": 20, "large": 28}  # pixels across
NUMBERS = {1: "a", 2: "two", 3: "three"}

# For three of the 15 kinds of each colour, a number of them that the encoder never saw. In the data
# set it is held out on one side (left, right, above, below) of another thing: such scenes are for
# testing only, and whoever describes them has put together what was learnt apart.
HELD_OUT = {
    (size, colour, SHAPES[(i + k) % len(SHAPES)]): 1 + (i + k) % 3
    for i, colour in enumerate(COLOURS)
    for k, size in enumerate(SIZES)
}

EXISTENCE = 4  # questions a scene whether something is there

IMAGE_SIZE = 96  # pixels
SUPERSAMPLING = 4  # drawn this many times larger, then averaged, for smooth edges


@dataclass(frozen=True)
class Thing:
    """One to three shapes of one kind: `Thing(2, "small", "red", "circle")`."""

    count: int
    size: str
    colour: str
    shape: str

    @property
    def held_out(self) -> bool:
        """Whether the encoder never saw this combination of number, size, colour and shape."""
        return HELD_OUT.get((self.size, self.colour, self.shape)) == self.count

    @property
    def held_out_side(self) -> str:
        """On which side the data set never trains on this combination, if it is held out."""
        place = list(HELD_OUT).index((self.size, self.colour, self.shape))
        return list(SIDES)[place % len(SIDES)]


@dataclass(frozen=True)
class Scene:
    """One kind of thing, or two of which the first is `relation` ("left" or "above") of the other.

    "Right" and "below" are ways of saying it, so that one arrangement is one `Scene`.
    """

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether a thing of a held-out combination stands on the side held out for it."""
        if self.relation is None:
            return False
        sides = (self.relation, SIDES[self.relation][0])
        return any(
            thing.held_out and thing.held_out_side == side
            for thing, side in zip(self.things, sides, strict=True)
        )

    @staticmethod
    def from_dict(entry: dict[str, Any]) -> Scene:
        """Undo `dataclasses.asdict`, also after a detour through JSON."""
        return Scene(tuple(Thing(**thing) for thing in entry["things"]), entry["relation"])


@dataclass(frozen=True)
class Mark:
    """One shape on the canvas: centre and width in pixels, the angle in radians."""

    thing: int  # index in the scene's things
    x: float
    y: float
    width: float
    angle: float


# --- Inventing and drawing ------------------------------------------------------------------


def invent(rng: random.Random, allowed: Callable[[tuple[Thing, ...]], bool]) -> Scene:
    """Invent a scene of things that are allowed together."""
    while True:
        things = tuple(
            Thing(
                rng.choice(list(NUMBERS)),
                rng.choice(list(SIZES)),
                rng.choice(list(COLOURS)),
                rng.choice(SHAPES),
            )
            for _ in range(rng.choice((1, 2, 2)))
        )
        kinds = {(thing.colour, thing.shape) for thing in things}
        if len(kinds) == len(things) and allowed(things):
            return Scene(things, rng.choice(("left", "above")) if len(things) == 2 else None)


def distinct(things: tuple[Thing, ...]) -> bool:
    """Whether no two kinds share a colour or a shape: the data set's scenes are plain ones."""
    colours, shapes = ({getattr(t, name) for t in things} for name in ("colour", "shape"))
    return len(colours) == len(shapes) == len(things)


def for_testing(things: tuple[Thing, ...]) -> bool:
    """Whether one of the things is held out of training."""
    return any(thing.held_out for thing in things)


def for_training(things: tuple[Thing, ...]) -> bool:
    """Whether none of the things is held out."""
    return not for_testing(things)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene: 96 x 96 pixels, RGB; places, tints and angles vary with `rng`."""
    return paint(scene, arrange(scene, rng), rng)


def arrange(scene: Scene, rng: random.Random) -> list[Mark]:
    """Find places for a scene's shapes, so that none overlap and the relation is plain to see."""
    if scene.relation is None:
        return _scatter(scene.things[0], rng)
    marks = []
    for index, thing in enumerate(scene.things):
        width = SIZES[thing.size] * rng.uniform(0.96, 1.04)
        # Across the relation's axis the shapes of a kind stand in a row around the middle, so
        # that along it no shape of one kind comes near the other kind.
        slot = rng.uniform(max(width + 2, 24), 31)
        shift = rng.uniform(-1, 1) * (2 if thing.count == 3 else 8)
        for number in range(thing.count):
            along = IMAGE_SIZE * (0.26 if index == 0 else 0.74) + rng.uniform(-5, 5)
            across = IMAGE_SIZE / 2 + shift + slot * (number - (thing.count - 1) / 2)
            x, y = (along, across) if scene.relation == "left" else (across, along)
            marks.append(_mark(index, x, y, width, rng))
    return marks


def _scatter(thing: Thing, rng: random.Random) -> list[Mark]:
    while True:
        marks: list[Mark] = []
        for _ in range(thing.count):
            width = SIZES[thing.size] * rng.uniform(0.96, 1.04)
            low, high = width / 2 + 2, IMAGE_SIZE - width / 2 - 2
            marks.append(_mark(0, rng.uniform(low, high), rng.uniform(low, high), width, rng))
        if all(
            max(abs(one.x - other.x), abs(one.y - other.y)) > one.width + 5
            for index, one in enumerate(marks)
            for other in marks[:index]
        ):
            return marks


def _mark(thing: int, x: float, y: float, width: float, rng: random.Random) -> Mark:
    low, high = width / 2 + 1, IMAGE_SIZE - width / 2 - 1
    x, y = min(max(x, low), high), min(max(y, low), high)
    return Mark(thing, x, y, width, rng.uniform(-0.1, 0.1))


def paint(
    scene: Scene,
    marks: list[Mark],
    rng: random.Random,
    colours: Sequence[tuple[int, int, int]] | None = None,
    shrink: int = SUPERSAMPLING,
) -> Image.Image:
    """Paint marks on a light background of varying tint.

    `colours` replace those of the things; with a smaller `shrink` the picture is larger.
    """
    scale = SUPERSAMPLING
    tint = [rng.randint(228, 250) for _ in range(3)]
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), tuple(tint))
    pen = ImageDraw.Draw(image)
    tones = [
        tuple(min(max(value + rng.randint(-9, 9), 0), 255) for value in colour)
        for colour in colours or [COLOURS[thing.colour] for thing in scene.things]
    ]
    for mark in marks:
        outline(pen, scene.things[mark.thing].shape, mark, scale, tones[mark.thing])
    return image.reduce(shrink)


def outline(
    pen: ImageDraw.ImageDraw, shape: str, mark: Mark, scale: int, fill: tuple[int, ...] | int
) -> None:
    """Fill one shape on a canvas `scale` times as large as the scene."""
    x, y, radius = mark.x * scale, mark.y * scale, mark.width * scale / 2
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    cos, sin = math.cos(mark.angle) * radius, math.sin(mark.angle) * radius
    corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _corners(shape)]
    pen.polygon(corners, fill=fill)


@functools.cache
def _corners(shape: str) -> list[tuple[float, float]]:
    """A shape's corners, within -1 to 1 in both directions; y points down."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "cross":
        arm = 0.34
        corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
        turns = [corner]
        for _ in range(3):
            turns.append([(-v, u) for u, v in turns[-1]])
        return [point for turn in turns for point in turn]
    points = []
    for step in range(10):
        angle, reach = math.pi * step / 5, 1.1 if step % 2 == 0 else 0.46
        points.append((reach * math.sin(angle), -reach * math.cos(angle) + 0.05))
    return points


# --- Describing and parsing -----------------------------------------------------------------

ALONE = (
    "{x}",
    "there {is_x} {x}",
    "the picture shows {x}",
    "a drawing of {x}",
    "{x} on a light background",
)
TOGETHER = (  # x is on the side of y that the direction names
    "{x} {is_x} {direction} {y}",
    "there {is_x} {x} {direction} {y}",
    "{y} with {x} {beside_y}",
    "the picture shows {x} {place} and {y} {opposite}",
    "{place} {is_x} {x}, and {opposite} {is_y} {y}",
)
# side: (side opposite, direction, place, beside one, beside several)
SIDES = {
    "left": ("right", "to the left of", "on the left", "on its left", "on their left"),
    "right": ("left", "to the right of", "on the right", "on its right", "on their right"),
    "above": ("below", "above", "at the top", "above it", "above them"),
    "below": ("above", "below", "at the bottom", "below it", "below them"),
}


def describe(scene: Scene) -> list[str]:
    """Describe a scene in five wordings, each of them complete; the same five each time."""
    phrases = [_phrase(thing) for thing in scene.things]
    plural = [thing.count > 1 for thing in scene.things]
    if scene.relation is None:
        return [_word(wording, "left", phrases * 2, plural * 2) for wording in ALONE]
    # Which of the two is named first is left to chance, but to the same chance for the same scene.
    rng = random.Random(repr(scene))
    opposite = SIDES[scene.relation][0]
    return [
        _word(wording, scene.relation, phrases, plural)
        if rng.random() < 0.5
        else _word(wording, opposite, phrases[::-1], plural[::-1])
        for wording in TOGETHER
    ]


def ask(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """Questions about a scene with their answers, as questions.json has them.

    Of each thing colour and count, of two things the relation both ways round, and EXISTENCE
    questions whether something is there (yes or no, as likely).
    """
    entries = []
    for thing in scene.things:
        text = f"what color {_be(thing)} the {_named(thing)}?"
        entries.append(("color", text, thing.colour))
        text = f"how many {_plural(thing.shape)} are there?"
        entries.append(("count", text, _NUMBER_WORDS[thing.count]))
    there = {(thing.colour, thing.shape) for thing in scene.things}
    # Of an absent kind at least the shape or the colour is there, so that both must be seen.
    near = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in there
        and any(colour == seen or shape == form for seen, form in there)
    ]
    for _ in range(EXISTENCE):
        answer = rng.choice(("yes", "no"))
        colour, shape = rng.choice(sorted(there) if answer == "yes" else near)
        entries.append(("existence", f"is there a {colour} {shape}?", answer))
    if scene.relation:
        opposite = SIDES[scene.relation][0]
        for side, (x, y) in ((scene.relation, scene.things), (opposite, scene.things[::-1])):
            text = f"where {_be(x)} the {_named(x)}, seen from the {_named(y)}?"
            entries.append(("relation", text, side))
    return [{"question": q, "answer": a, "type": kind} for kind, q, a in entries]


_NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _named(thing: Thing) -> str:
    return thing.shape if thing.count == 1 else _plural(thing.shape)


def _be(thing: Thing) -> str:
    return "is" if thing.count == 1 else "are"


def matches(caption: str, scene: Scene) -> bool:
    """Whether a caption is wholly right: every thing, colour, size, count and the relation."""
    parsed = parse(caption)
    if parsed is None or parsed.relation != scene.relation:
        return False
    return parsed.things == scene.things


def parse(caption: str) -> Scene | None:
    """Read a caption in any of the wordings back into a scene; None if it is none of them.

    "A is to the left of B" and "there is B to the right of A" give equal scenes. Case, spacing
    and a full stop don't count; singular and plural must agree throughout.
    """
    text = " ".join(caption.lower().split()).removesuffix(".").rstrip().replace(" ,", ",")
    for pattern, side in _grammar():
        found = pattern.fullmatch(text)
        if not found:
            continue
        things = tuple(_thing(found[name]) for name in ("x", "y") if name in pattern.groupindex)
        if side in ("right", "below"):
            return Scene(things[::-1], SIDES[side][0])
        return Scene(things, side)
    return None


def _phrase(thing: Thing) -> str:
    return f"{NUMBERS[thing.count]} {thing.size} {thing.colour} {_named(thing)}"


def _thing(phrase: str) -> Thing:
    number, size, colour, shape = phrase.split()
    count = next(count for count, word in NUMBERS.items() if word == number)
    return Thing(count, size, colour, next(name for name in SHAPES if shape.startswith(name)))


def _word(wording: str, side: str, phrases: list[str], plural: list[bool]) -> str:
    """Fill a wording with two phrases, whether text or patterns, and what must agree with them."""
    opposite, direction, place, beside_one, beside_several = SIDES[side]
    return wording.format(
        x=phrases[0],
        y=phrases[1],
        is_x="are" if plural[0] else "is",
        is_y="are" if plural[1] else "is",
        direction=direction,
        place=place,
        opposite=SIDES[opposite][2],
        beside_y=beside_several if plural[1] else beside_one,
    )


@functools.cache
def _grammar() -> list[tuple[re.Pattern[str], str | None]]:
    """Every wording as a pattern with the groups x and y, and the side of y that x is on."""
    return [(re.compile(text), side) for text, side in _patterns()]


def _patterns() -> Iterator[tuple[str, str | None]]:
    kind = f"(?:{'|'.join(SIZES)}) (?:{'|'.join(COLOURS)})"
    several = "|".join(word for count, word in NUMBERS.items() if count > 1)
    phrases = {
        False: f"{NUMBERS[1]} {kind} (?:{'|'.join(SHAPES)})",
        True: f"(?:{several}) {kind} (?:{'|'.join(f'{shape}(?:es|s)' for shape in SHAPES)})",
    }
    phrases[True] = phrases[True].replace("cross(?:es|s)", "crosses").replace("(?:es|s)", "s")
    for x in (False, True):
        for wording in ALONE:
            yield _word(wording, "left", [f"(?P<x>{phrases[x]})", ""], [x, x]), None
        for y in (False, True):
            named = [f"(?P<x>{phrases[x]})", f"(?P<y>{phrases[y]})"]
            for side in SIDES:
                for wording in TOGETHER:
                    yield _word(wording, side, named, [x, y]), side


# --- The data set ---------------------------------------------------------------------------


def build_dataset(folder: Path, train: int, val: int, test: int, seed: int) -> bool:
    """Draw a data set of so many scenes per split; return whether anything had to be drawn.

    Writes `images/scene_*.png`, `captions.json`, `questions.json`, `dataset_demo.json` (the
    splits, in Karpathy's format) and, last, `scenes.json` (what the pictures truly show). Only
    test scenes hold held-out combinations, and each of them does. A folder that already holds
    this data set is left alone.

    Raises:
        UserError: the folder can't be written.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    recipe = {"train": train, "val": val, "test": test, "seed": seed, "source": source}
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    names = [f"scene_{number:05d}.png" for number in range(len(splits))]
    if _holds(folder, recipe, names):
        return False
    (folder / "scenes.json").unlink(missing_ok=True)
    rng = random.Random(seed)
    scenes = {}
    for name, split in zip(names, splits, strict=True):
        while name not in scenes or scenes[name].held_out != (split == "test"):
            scenes[name] = invent(rng, distinct)
        with atomic_write(folder / "images" / name) as path:
            draw(scenes[name], rng).save(path, format="PNG")
    for stale in set((folder / "images").glob("scene_*.png")) - {
        folder / "images" / name for name in names
    }:
        stale.unlink()
    captions = {name: describe(scene) for name, scene in scenes.items()}
    _write_json(folder / "captions.json", captions)
    _write_json(
        folder / "questions.json",
        {name: ask(scene, random.Random(f"{seed}/{name}")) for name, scene in scenes.items()},
    )
    _write_json(folder / "dataset_demo.json", _karpathy(captions, splits))
    true_scenes = {name: asdict(scene) for name, scene in scenes.items()}
    _write_json(folder / "scenes.json", {"recipe": recipe, "scenes": true_scenes})
    return True


def _holds(folder: Path, recipe: dict[str, Any], names: list[str]) -> bool:
    try:
        recorded = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))["recipe"]
        there = {path.name for path in (folder / "images").iterdir()}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    files = ("captions.json", "questions.json", "dataset_demo.json")
    written = all((folder / file).exists() for file in files)
    return recorded == recipe and there.issuperset(names) and written


def _karpathy(captions: dict[str, list[str]], splits: list[str]) -> dict[str, Any]:
    images = []
    for number, (name, sentences) in enumerate(captions.items()):
        first = number * len(sentences)
        images.append(
            {
                "filename": name,
                "imgid": number,
                "split": splits[number],
                "sentids": list(range(first, first + len(sentences))),
                "sentences": [
                    {
                        "tokens": raw.replace(",", "").split(),
                        "raw": raw,
                        "imgid": number,
                        "sentid": first + index,
                    }
                    for index, raw in enumerate(sentences)
                ],
            }
        )
    return {"dataset": "demo", "images": images}


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
