"""Pictures of a training: its curves, and what it wrote about the same photos while it learned."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder import open_image
from utils import atomic_write

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#718096"
SCORES = {  # of the history: how they are named, and drawn
    "val_cider": ("CIDEr-D", BLUE),
    "val_bleu4": ("BLEU-4", ORANGE),
    "val_accuracy": ("answers right, %", GREEN),
}


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses, scores and learning rate by epoch as a PNG.

    Args:
        history: an entry an epoch, in order: "epoch", "val_loss", "train_learning_rate", and
            where measured "train_loss", "val_cider", "val_bleu4" and "val_accuracy".

    Raises:
        UserError: the file can't be written.
    """
    from matplotlib.figure import Figure  # takes a second; without pyplot it needs no display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, scores, rate = figure.subplots(1, 3)

    def line(axes: Any, name: str, label: str, colour: str) -> None:
        points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", ms=3)

    line(loss, "train_loss", "training", ORANGE)
    line(loss, "val_loss", "validation", BLUE)
    loss.set_title("loss, nats a token")
    for name, (label, colour) in SCORES.items():
        line(scores, name, label, colour)
        best = max((e for e in history if name in e), key=lambda e: e[name], default=None)
        if best:
            scores.annotate(
                f"{best[name]:.1f}",
                (best["epoch"], best[name]),
                color=colour,
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
            )
    scores.set_title("validation, greedy")
    line(rate, "train_learning_rate", "learning rate", GREY)
    rate.set_title("learning rate at the epoch's end")
    critical = [entry["epoch"] for entry in history if "train_beam_cider" in entry]
    for axes in (loss, scores, rate):
        if critical:
            axes.axvspan(
                critical[0] - 0.5,
                critical[-1] + 0.5,
                color=GREY,
                alpha=0.12,
                lw=0,
                label="self-critical",
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not rate and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    _save(figure, path)


def draw_samples(
    history: Sequence[Mapping[str, Any]],
    image_dir: Path,
    path: Path,
    humans: Mapping[str, Sequence[str]],
) -> None:
    """Draw photos with what was written about them at the first, middle and last epoch as a PNG.

    Args:
        history: as for `draw_curves`; each entry's "samples" are {photo: text}.
        humans: captions by people, of which each photo shows the first, if it has any.

    Raises:
        UserError: a photo can't be read, or the file can't be written.
    """
    from matplotlib.figure import Figure

    shown = [history[i] for i in sorted({0, len(history) // 2, len(history) - 1})]
    names = list(shown[-1]["samples"])
    if not names:
        return
    figure = Figure(figsize=(9, 2.2 * len(names)), layout="constrained")
    table = figure.subplots(len(names), 2, width_ratios=(1, 3), squeeze=False)
    for name, (picture, text) in zip(names, table, strict=True):
        picture.imshow(open_image(image_dir / name, 400))
        texts = [(f"epoch {e['epoch']}", e["samples"].get(name, ""), "black") for e in shown]
        texts += [("a human", caption, GREY) for caption in humans.get(name, ())[:1]]
        for row, (label, words, colour) in enumerate(texts):
            height = 0.92 - row * 0.9 / len(texts)
            kind = {"va": "top", "color": colour, "transform": text.transAxes, "fontsize": 11}
            text.text(0, height, label, weight="bold", **kind)
            # As it is: a dollar in a caption is no formula.
            text.text(0.16, height, textwrap.fill(words, 64, max_lines=3), parse_math=False, **kind)
        picture.axis("off")
        text.axis("off")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
