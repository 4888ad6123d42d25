"""What a training tells: on the terminal, in pictures, to the tracker, on the Hub."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import sys
import textwrap
import time
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attention import fonts_for
from corpus import Data
from dataset import prompts_about, references_of
from encoder import open_image
from hub import HubPusher, model_card, refusal, repository_files
from metrics import without_spaces
from photo_names import DRAWN
from run import KEPT, MEASURES, Run, Written, on_record
from tracking import Tracker
from utils import Bar, UserError, atomic_write, beside, command, redact, shown, size_text

FEW_UPDATES = 300  # fewer teach a decoder words, but hardly what follows what
FEW_PHOTOS = 15_000
FEW_SCORED = 20  # captions of fewer photos are better in one epoch than in another by chance
GREY = "#718096"
BLUE = "#2b6cb0"
COLOURS = {"training": "#dd6b20", "": GREY}  # of a line, by its label
FOLDERS = r"(?<![\w:/.])~?/(?:[^\s/='\"]+/)+"  # of a command's absolute paths: nobody's business


class Report(contextlib.AbstractContextManager):
    """Tells of a run from its first line to its last; of a team the first process does.

    Nothing of what fails here stops the training.
    """

    def __init__(self, run: Run, data: Data, at_end: Callable[[Path, Data], None] | None):
        """Args: `at_end`, what else to tell of the best checkpoint and the data."""
        self.run, self.data, self.at_end = run, data, at_end
        settings, leads = run.settings, run.team.leads
        self._describe()
        self.tracker = Tracker(
            run.output,
            project=settings.WANDB_PROJECT if leads else "",
            entity=settings.WANDB_ENTITY or None,
            name=settings.WANDB_RUN_NAME or None,
            run_id=run.progress.wandb_id,
            config=on_record(settings),
            report=say,
        )
        run.progress.wandb_id = self.tracker.run_id
        repository = settings.HF_REPO_ID if leads else ""
        if repository and (why := refusal(data.tower)):
            say(f"Hub: nothing is pushed: {why}")
            repository = ""
        self.pusher = HubPusher(repository, report=say)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close()
        if kind and "last.pt" in self.run.progress.written:
            print(f"to go on from what is saved: {self._resuming()}")

    def close(self) -> None:
        self.tracker.close()
        self.pusher.close()

    def _describe(self) -> None:
        """The summary at the start: what is trained on what, and where the output goes."""
        run, data, settings = self.run, self.data, self.run.settings
        counts = zip(data.train.texts, ("captions", "questions"), strict=True)
        texts = " and ".join(f"{count:,} {kind}" for count, kind in counts if count)
        parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
        patches, width = data.cache.shape
        kept = len(data.cache.entries)
        source = f"{settings.DATASET}, split by {settings.SPLIT}"
        if settings.TRAIN_SHARDS:
            source = f"{settings.TRAIN_SHARDS}, and {settings.VAL_SHARDS or source} to validate"
            kept += len(data.train) if settings.KEEP_SHARD_FEATURES else 0
        processes = run.team.size
        devices = f"{processes} processes, {run.device.type}" if processes > 1 else str(run.device)
        print(
            f"data      {len(data.train):,} photos with {texts} to train on, "
            f"{len(data.val):,} to validate ({redact(source)})\n"
            f"encoder   {settings.ENCODER_MODEL_NAME}, frozen: {patches} vectors of {width} a "
            f"photo\nfeatures  {size_text(kept * patches * width * 2)} in {data.cache.folder}\n"
            f"decoder   {parameters:.1f} M parameters: width {run.model.config.width}, "
            f"{run.model.config.layers} layers, {len(run.tokenizer):,} tokens\n"
            f"device    {devices}, {str(run.dtype).removeprefix('torch.')}, seed {settings.SEED}\n"
            f"output    {run.output}"
        )
        if settings.TRAIN_SHARDS and settings.SCST_EPOCHS:
            print("stages    cross-entropy only: self-critical training wants all captions at hand")
        there = references_of(data.texts, data.splits["val"])
        scored = min(len(there), settings.SCORED_IMAGES)
        if scored and (odd := without_spaces([x for group in there.values() for x in group])):
            print(f"scores    {odd}")
        if "captions" in data.tasks and settings.SCORED_IMAGES and scored < FEW_SCORED:
            none = "none: CIDEr compares photos, and under 2 are scored; the loss chooses"
            said = none if scored < 2 else f"of {scored} photos hardly tell which epoch is best"
            left = settings.SPLIT == "ratio" and scored < settings.SCORED_IMAGES
            more = " (a lower --train_split_ratio leaves more)" * left
            print(f"scores    {said}{more}")
        for task, split in itertools.product(data.tasks, ("train", "val")):
            if (names := data.splits[split]) and not prompts_about(data.texts, names, task):
                what = "learned" if split == "train" else "scored"
                print(f"none      of the {task} are of the split {split!r}: they are not {what}")
        updates = run.updates_per_epoch(data.train) * settings.NUM_EPOCHS
        begun = settings.START_CHECKPOINT or run.progress.epoch >= run.epochs
        if 0 < updates < FEW_UPDATES and not begun:
            lower = ", or lower --batch_size" * (settings.BATCH_SIZE > 1)
            print(
                f"few       only {updates} updates: what it writes will be poor "
                f'("a man is a the a"); raise --num_epochs{lower}'
            )
        if len(data.train) < FEW_PHOTOS and run.model.config.width > 256:
            print(f"small     --preset small is meant for fewer than {FEW_PHOTOS:,} photos")
        if run.progress.step:
            print(f"resumed   after {run.progress.epoch} epochs and {run.progress.batch} batches")
        if run.progress.epoch >= run.epochs:
            print(f"nothing to train: all {run.epochs} epochs are done; for more, raise --epochs")

    # --- while it trains ---

    def ledger(self) -> Ledger:
        return Ledger(self.run, self.data.train.count(self.run.settings.BATCH_SIZE), self.tracker)

    def epoch(self, best: Path | None, written: Sequence[Written]) -> None:
        """Tell of the epoch that has ended and been saved; `best` is its checkpoint, if it won."""
        run, progress = self.run, self.run.progress
        entry = progress.history[-1]
        learned, beams = entry.get("train_loss"), entry.get("train_beam_cider")
        stage = f"CIDEr of beams {beams:.1f}" if learned is None else f"train loss {learned:.4f}"
        parts = [m.line.format(entry[name]) for name, m in MEASURES.items() if name in entry]
        parts = [stage, *parts, f"{progress.seconds / 60:.1f} min"]
        say(f"epoch {progress.epoch}/{run.epochs}: {', '.join(parts)}")
        humans = references_of(self.data.texts, {each.name for each in written})
        count = run.settings.SAMPLE_IMAGES
        for name, _, said in [each for each in written if not each.text.question][:count]:
            say(f"  {name}: {said}\n    (a human: {humans[name][0]})")
        for name, text, said in [each for each in written if each.text.question][:count]:
            say(f"  {name}: {text.question} {said} (a human: {text.target})")
        figures = {name.replace("_", "/", 1): entry[name] for name in entry if name != "samples"}
        self.tracker.log(figures, progress.step)
        rows = [(e["epoch"], *pair) for e in progress.history for pair in e["samples"].items()]
        if rows:
            self.tracker.log_captions(rows, self.data.paths.images, progress.step)
        if best:
            self._push(best, entry)
        else:
            self.pusher.retry()

    def _push(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Hand the checkpoint of an epoch to the uploader, with all that makes it of use there."""
        if not self.pusher.active:
            return
        run, data, settings = self.run, self.data, self.run.settings
        scored, tars = min(settings.SCORED_IMAGES, len(data.splits["val"])), settings.VAL_SHARDS
        checkpoint = run.checkpoint(scores_of(entry))
        begun = redact(shlex.join(["python", "train.py", *settings.arguments]))
        card = model_card(
            settings.HF_REPO_ID,
            checkpoint,
            dataset_name(settings),
            scored=dataset_name(settings, "VAL_SHARDS"),
            split=redact(tars).split("/")[-1] if tars else f"{settings.SPLIT} val",
            scorer=f"metrics.py, greedily, on {scored:,} photos; the loss on all",
            command=re.sub(FOLDERS, "", begun),
            samples=entry["samples"],
            question=self._question(data.splits["val"]),
            language="en" if settings.DATASET != "custom" and not settings.TRAIN_SHARDS else None,
        )
        files = repository_files(checkpoint, data.tower) | {"README.md": card}
        self.pusher.push(path, files, f"epoch {entry['epoch']}")

    # --- at the end ---

    def stopped(self) -> int:
        """Say how to go on; returns the exit code."""
        self.close()
        self._draw()
        print(f"stopped; go on with: {self._resuming()}")
        return 130

    def _resuming(self) -> str:
        """The command that goes on from `last.pt`; of a flag given twice the last counts."""
        last = ["--resume_checkpoint_path", str(self.run.output / "last.pt")]
        given = self.run.settings.arguments
        given = given[:-2] if given[-2:] == last else given
        return redact(shlex.join([*self.run.team.command(), beside("train.py"), *given, *last]))

    def finished(self) -> int:
        """Say where the result is and how to use it; returns the exit code."""
        run, best = self.run, self.run.best()
        if best is None:
            return 0  # no epoch was asked for, and the summary said so
        path, entry = best
        self.tracker.log_checkpoint(path, scores_of(entry))
        losses = run.bests("val_loss")
        if losses and entry is not losses[-1]:
            self._push(path, entry)  # the newest on the Hub shall be the best
        self.close()
        self._draw()
        if self.at_end and run.team.leads:
            self.at_end(path, self.data)
        print()
        for measure in KEPT:  # of some the file may be gone, and so none be the best
            for won in run.bests(measure)[-1:]:
                line = MEASURES[measure].line.format(won[measure])
                print(f"best {line}: {run.file_of(measure, won)}")
        name = self.data.splits["val"][0]  # which was read; of those to test none was
        photo, question = self.data.paths.images / name, self._question([name])
        flags = ["--image_path", photo, "--checkpoint", path]
        flags += ["--question", question] if question else []
        act = "ask about" if question else "caption"
        print(f"{act} a picture:\n  {command('inference.py', *flags)}")
        return 0

    def _question(self, names: Sequence[str]) -> str:
        """A question about the photos for who learned only to answer; else ""."""
        if "captions" in self.data.tasks:
            return ""
        return prompts_about(self.data.texts, names, "questions")[0][1].question

    def _draw(self) -> None:
        """Draw what was learned; a picture that fails is named, and spoils nothing."""
        run, history = self.run, self.run.progress.history
        if not history or not run.team.leads:
            return
        curves, samples = (run.output / name for name in DRAWN)
        try:
            from matplotlib import style  # takes a second

            # A matplotlibrc may want LaTeX, or fonts that aren't here.
            with style.context("default"):
                draw_curves(history, curves)
                humans = references_of(self.data.texts, history[-1]["samples"])
                drawn = draw_samples(history, self.data.paths.images, samples, humans)
            print(f"pictures: {curves}{f', {samples}' if drawn else ''}")
        except Exception as error:  # noqa: BLE001 - a broken matplotlibrc fails in any way
            print(f"pictures can't be drawn: {shown(error)}")


def scores_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """What an epoch in the history measured on the validation photos, as people call it."""
    return {measure.label: entry[name] for name, measure in MEASURES.items() if name in entry}


def dataset_name(settings: SimpleNamespace, shards: str = "TRAIN_SHARDS") -> str:
    """What the data set is called: one's own tars or photos by their folder, or by DATA_DIR."""
    # .../cc3m/{0..9}.tar, or the Hub's .../cc3m/resolve/main/0.tar
    if tars := getattr(settings, shards):
        folders = redact(tars).split("/")[:-1]
        named = [part for part in folders if part not in ("", ".", "..", "resolve", "main")]
        if named:
            return named[-1]
    elif settings.DATASET != "custom":
        return settings.DATASET
    return Path(settings.DATA_DIR).resolve().name


def say(text: str) -> None:
    """Print a line without tearing a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


# --- Updates --------------------------------------------------------------------------------


@dataclass
class Update:
    """What one update found, the same in a team."""

    step: int
    batches: int
    names: list[str]  # of this process's photos
    # On the run's device. Of all processes: loss in nats and tokens (self-critical: CIDEr-D and
    # captions), how many are asked to stop, photos; the norm of the gradient; and 1 where loss or
    # gradient were not finite, and so nothing was changed.
    figures: Tensor
    rate: float  # the learning rate
    copied: torch.Event | None = None  # after which a GPU's figures can be read here


class Ledger:
    """Keeps the account of an epoch's updates, on a GPU one step late: the step never waits."""

    def __init__(self, run: Run, batches: int, tracker: Tracker):
        """Args: `batches` of the whole epoch."""
        self.run, self.tracker = run, tracker
        self.late = 1 if run.device.type == "cuda" else 0
        self.waiting: deque[Update] = deque()
        self.since, self.counted = time.monotonic(), 0  # what the tracked rate is of
        self.photos = 0
        self.stopping = False
        label = f"epoch {run.progress.epoch + 1}/{run.epochs}"
        self.bar = Bar(batches, label, "batch", run.progress.batch, quiet=not run.team.leads)

    def note(self, update: Update) -> None:
        if update.figures.is_cuda:  # asked for later, they would come after the next step as well
            update.figures = update.figures.to("cpu", non_blocking=True)
            update.copied = torch.cuda.current_stream(self.run.device).record_event()
        self.waiting.append(update)
        self._enter(self.late)
        progress = self.run.progress
        rate = self.photos / (time.monotonic() - self.bar.started)
        figure = progress.loss_sum / max(1, progress.loss_count)
        text = f"CIDEr of beams {figure:.1f}" if self.run.self_critical else f"loss {figure:.3f}"
        self.bar.step(update.batches, f"{text}, lr {update.rate:.1e}, {rate:.0f} photos/s")

    def settle(self) -> None:
        self._enter(0)
        self.bar.close()

    def _enter(self, late: int) -> None:
        """Enter the updates that wait, but for the newest `late`."""
        progress = self.run.progress
        while len(self.waiting) > late:
            update = self.waiting.popleft()
            if update.copied:
                update.copied.synchronize()
            figure, count, stop, photos, norm, bad = update.figures.tolist()
            self.stopping = stop > 0  # who is asked once stays so
            self.photos += int(photos)
            if bad:
                self._enter_bad(update)
                continue
            progress.bad_steps = 0
            progress.loss_sum += figure
            progress.loss_count += int(count)
            self.counted += int(count)
            if update.step % 20 == 0:
                self._track(update, figure / max(1, count), norm)

    def _track(self, update: Update, loss: float, norm: float) -> None:
        kind, unit = ("beam_cider", "captions") if self.run.self_critical else ("loss", "tokens")
        now = time.monotonic()
        rate = self.counted / (now - self.since)
        self.since, self.counted = now, 0
        values = {f"train/{kind}": loss, f"train/{unit}_per_s": rate}
        values |= {"train/learning_rate": update.rate, "train/grad_norm": norm}
        self.tracker.log(values, update.step)

    def _enter_bad(self, update: Update) -> None:
        """Say which photos gave a loss or gradient that is not finite; too many in a row end it."""
        progress, limit = self.run.progress, self.run.settings.MAX_BAD_STEPS
        progress.bad_steps += 1
        names = [name for part in self.run.team.all_gather(update.names) for name in part]
        say(f"step {update.step}: the loss or gradient is not finite, no update; photos: {names}")
        if progress.bad_steps >= limit:
            raise UserError(
                f"{limit} steps in a row were not finite: lower --learning_rate or use "
                f"--precision fp32, and resume from {self.run.output / 'last.pt'}"
            )


# --- Pictures -------------------------------------------------------------------------------


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses, each score and the learning rate by epoch as a PNG.

    An entry of the history holds "epoch", "val_loss", "train_learning_rate", and where measured
    "train_loss" and the others of `MEASURES`.
    """
    from matplotlib.figure import Figure  # takes a second; without pyplot it needs no display
    from matplotlib.ticker import MaxNLocator

    scores = [m for m in MEASURES if m != "val_loss" and any(m in entry for entry in history)]
    panels = {
        "loss, nats a token": {"train_loss": "training", "val_loss": "validation"},
        **{f"{MEASURES[name].label}, greedy": {name: "validation"} for name in scores},
        "learning rate at the epoch's end": {"train_learning_rate": ""},
    }
    figure = Figure(figsize=(4.3 * len(panels), 4), layout="constrained")
    critical = [entry["epoch"] for entry in history if "train_beam_cider" in entry]
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.set_title(title)
        for name, label in lines.items():
            points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
            if points:
                colour = COLOURS.get(label, BLUE)
                axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", ms=3)
            if name in scores:
                best = max(points, key=lambda point: point[1])
                place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{best[1]:.1f}", best, color=colour, **place)
        if critical:
            span = (critical[0] - 0.5, critical[-1] + 0.5)
            axes.axvspan(*span, color=GREY, alpha=0.12, lw=0, label="self-critical")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if title.startswith("loss") or critical:
            axes.legend(frameon=False)
    _save(figure, path)


def draw_samples(
    history: Sequence[Mapping[str, Any]],
    image_dir: Path,
    path: Path,
    humans: Mapping[str, Sequence[str]],
) -> bool:
    """Draw photos with what was written about them at the first, middle and last epoch as a PNG,
    and the first caption by `humans`; says whether there were any.

    The "samples" of an entry in the history are {photo: text}.
    """
    from matplotlib.figure import Figure

    names = list(history[-1]["samples"])
    if not names:
        return False
    told = [entry for entry in history if entry["samples"].keys() & names]  # these photos' epochs
    told = [told[i] for i in sorted({0, len(told) // 2, len(told) - 1})]
    said = [text for each in told for text in each["samples"].values()]
    said += [text for captions in humans.values() for text in captions[:1]]
    families = [font.family_name for font in fonts_for("".join(said))]
    figure = Figure(figsize=(9, 2.2 * len(names)), layout="constrained")
    table = figure.subplots(len(names), 2, width_ratios=(1, 3), squeeze=False)
    for name, (picture, text) in zip(names, table, strict=True):
        picture.imshow(open_image(image_dir / name, 400))
        texts = [(f"epoch {e['epoch']}", e["samples"].get(name, ""), "black") for e in told]
        texts += [("a human", caption, GREY) for caption in humans.get(name, ())[:1]]
        for row, (label, words, colour) in enumerate(texts):
            height = 1 - row / len(texts)
            kind = {"va": "top", "color": colour, "transform": text.transAxes, "fontsize": 10}
            kind |= {"family": families, "in_layout": False}  # photos keep their size
            text.text(0, height, label, weight="bold", **kind)
            # Chinese letters are twice as wide as Latin ones. A dollar in a caption is no formula.
            wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in words)
            words = textwrap.fill(shown(words), 32 if wide else 64, max_lines=3)
            text.text(0.16, height, words, parse_math=False, **kind)
        picture.axis("off")
        text.axis("off")
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not")  # see `fonts_for`
        figure.savefig(temporary, format="png", dpi=120)
