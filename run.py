"""The state of a training: made new or resumed, moved by updates, saved so as to go on to the bit.

What can be derived is not kept: which epochs were best follows from the history.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint import (
    Checkpoint,
    check_same,
    load_checkpoint,
    name_again,
    save_for_training,
    save_for_use,
    stored_digest,
)
from corpus import Data
from dataset import Text, check_name
from decoder import DecoderConfig
from device import choose_dtype
from distributed import Team, share_gradients
from encoder import parse_layers
from hub import locate_checkpoint
from model import CaptionModel
from options import GenerationOptions, fits, parse_tasks, typed
from rerank import Reranker
from self_critical import critical_epochs
from settings import FILES, OR_ON_HUB, TEXTS_OR_NONE, check_ranges, constants
from shards import Rows
from utils import UserError, last_part, redact, refused


@dataclass(frozen=True)
class Measure:
    """A figure of the validation photos: its name, how a line says it, and which epoch is best.

    The best epoch's weights are kept as `{prefix}_{keep}.safetensors`, what it was filled in.
    """

    label: str
    line: str
    keep: str = ""


# By their names in the history. A new one needs a line here, and its value in `train.validate`.
MEASURES = {
    "val_loss": Measure(
        "cross-entropy", "val loss {:.4f}", keep="epoch_{epoch}_val_loss_{val_loss:.4f}"
    ),
    "val_cider": Measure("CIDEr-D", "CIDEr {:.1f}", keep="best_cider"),
    "val_bleu4": Measure("BLEU-4", "BLEU-4 {:.1f} (greedy)"),
    "val_accuracy": Measure("accuracy of answers", "answers {:.1f} % right", keep="best_accuracy"),
}
KEPT = [name for name, measure in MEASURES.items() if measure.keep]
LASTING = [name for name in KEPT if name != "val_loss"]  # kept under one name for all epochs
# The parts of a decoder's configuration, and the settings that say them.
SIZES = dict(width="DECODER_EMBED_DIM", layers="DECODER_LAYERS", heads="DECODER_HEADS")
SIZES |= dict(ff_dim="DECODER_FF_DIM", max_length="MAX_CAPTION_LENGTH")


class Written(NamedTuple):
    """What was said about a photo, where `text` was asked for."""

    name: str
    text: Text
    said: str


@dataclass
class Progress:
    """How far training is; saved with each checkpoint, so that a run goes on where it was."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done in the epoch under way
    order: str = ""  # of which order of photos and stage, by `train.order_of`
    judged: str = ""  # by which photos, texts and search the history's epochs were judged
    by: str = ""  # and by which photos and texts alone
    step: int = 0  # updates done
    seconds: float = 0.0  # spent training, validation included
    loss_sum: float = 0.0  # of the epoch under way, in nats; self-critical: CIDEr-D of beams
    loss_count: int = 0  # tokens; self-critical: captions
    bad_steps: int = 0  # in a row, without a finite loss and gradient
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry an epoch
    written: dict[str, str] = field(default_factory=dict)  # files of this run, and their digests
    since: dict[str, int] = field(default_factory=dict)  # measures whose bests lie elsewhere
    wandb_id: str = ""
    job: str = ""  # torchrun's name for it

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Progress:
        """As it was saved, or an error; what older versions kept and can be derived is left out."""
        known = {part.name for part in fields(cls)}
        progress = typed(cls, {name: value for name, value in saved.items() if name in known})
        check_ranges(progress)
        for entry in progress.history:
            figures = [entry[name] for name in entry if name.startswith(("train_", "val_"))]
            finite = fits(entry["epoch"], int) and all(map(math.isfinite, figures))
            if not finite or not fits(entry["samples"], dict[str, str]):
                raise ValueError(f"its history holds {entry}")
        for name in (*progress.written, *(name for e in progress.history for name in e["samples"])):
            check_name("its progress", name)
        return progress


class Run:
    """A training under way, in one process of its team."""

    def __init__(
        self,
        settings: SimpleNamespace,
        team: Team,
        device: torch.device,
        data: Data,
        begun: Checkpoint | None = None,
    ):
        """Build the model, new or as a checkpoint has it; with its training state, go on there."""
        self.settings, self.team, self.device = settings, team, device
        self.dtype, self.output = choose_dtype(settings.PRECISION, device), output_dir(settings)
        self.tokenizer = data.tokenizer
        self.encoder = data.encoder  # FrozenEncoder.identity() of what made the features
        torch.manual_seed(settings.SEED)
        size = decoder_config(settings, len(data.tokenizer))
        made = CaptionModel(data.cache.shape[1], size)
        if begun:
            made.load_state_dict(begun.model.state_dict())
        self.average = made.to(device)  # what is validated and saved
        # What the optimizer moves: the same, or what the average follows.
        self.model = copy.deepcopy(self.average) if settings.EMA_DECAY else self.average
        if settings.COMPILE:
            self.model.hidden = torch.compile(self.model.hidden, dynamic=True)  # lengths differ
        self.shared = share_gradients(self.model, team)  # through which `train.update` works
        self.optimizer = make_optimizer(self.model, settings)
        self.progress = Progress()
        self.reranker: Reranker | None = None  # chooses among captions found with the average
        saved = begun.training if begun else None
        if saved:
            self.model.load_state_dict(saved["weights"])
            # Its moments; how it goes on is as is set now.
            how = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(saved["optimizer"] | {"param_groups": how})
            self.progress = Progress.restored(saved["progress"])
            self.reranker = begun.reranker  # until it is fitted to what is trained on now
            say_other_settings(settings, begun.settings)
        self.progress.job = team.job
        set_random_state(self, saved)

    @property
    def epochs(self) -> int:
        return self.settings.NUM_EPOCHS + critical_epochs(self.settings)

    @property
    def self_critical(self) -> bool:
        return self.progress.epoch >= self.settings.NUM_EPOCHS

    # --- what an update needs ---

    @torch.no_grad()
    def update_ema(self, bad: Tensor) -> None:
        """Move the averaged weights towards the model's; early on faster: there is little past."""
        if self.average is self.model:
            return
        step = self.progress.step
        decay = min(self.settings.EMA_DECAY, (1 + step) / (10 + step))
        share = (1 - decay) * (1 - bad)
        for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, share)

    def updates_per_epoch(self, rows: Rows) -> int:
        batches = rows.count(self.settings.BATCH_SIZE)
        return math.ceil(batches / self.settings.GRADIENT_ACCUMULATION_STEPS)

    # --- what was best ---

    def bests(self, measure: str) -> list[dict[str, Any]]:
        """The epochs in the history that were the best so far when they ended; of those that
        score the same, such as 0, the loss tells which is better."""

        def worth(entry: Mapping[str, Any]) -> tuple[float, float]:
            return 0.0 if measure == "val_loss" else entry[measure], -entry["val_loss"]

        found: list[dict[str, Any]] = []
        for entry in self.progress.history:
            counts = measure in entry and entry["epoch"] > self.progress.since.get(measure, 0)
            if counts and (not found or worth(entry) > worth(found[-1])):
                found.append(entry)
        return found

    def compare_from_here(self, measures: Iterable[str]) -> None:
        """Leave the epochs so far out of comparisons; the next best sets their files aside."""
        self.progress.since |= dict.fromkeys(measures, self.progress.epoch)
        for measure in LASTING:
            self.progress.written.pop(self.file_of(measure, {}).name, None)

    def file_of(self, measure: str, entry: Mapping[str, Any]) -> Path:
        """Where the weights of an epoch that was best in a measure are, for use."""
        name = MEASURES[measure].keep.format(**entry)
        return self.output / f"{self.settings.CHECKPOINT_PREFIX}_{name}.safetensors"

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to use, and its epoch: the best captions, else answers, else loss.

        A score that is 0 throughout says nothing about which epoch was best.
        """
        for measure in ("val_cider", "val_accuracy", "val_loss"):
            bests = self.bests(measure)
            if bests and bests[-1][measure] > 0:
                return self.file_of(measure, bests[-1]), bests[-1]
        return None

    # --- saving ---

    def end_epoch(self, scores: dict[str, float], written: Sequence[Written], rate: float) -> None:
        """Enter the epoch into the history, with what was written about a few photos."""
        progress, count = self.progress, self.settings.SAMPLE_IMAGES
        kind = "train_beam_cider" if self.self_critical else "train_loss"
        figure = progress.loss_sum / max(1, progress.loss_count)
        captions = [each for each in written if not each.text.question] or written
        samples = {each.name: f"{each.text.question} {each.said}".strip() for each in captions}
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.loss_count = 0, 0.0, 0
        progress.history.append(
            {"epoch": progress.epoch, kind: figure, "train_learning_rate": rate}
            | scores
            | {"samples": dict(itertools.islice(samples.items(), count))}
        )

    def checkpoint(
        self, scores: dict[str, float], training: dict[str, Any] | None = None
    ) -> Checkpoint:
        """The averaged weights as a `Checkpoint`, with what resuming needs or without it."""
        settings = self.settings
        options = GenerationOptions(
            settings.BEAM_SIZE,
            settings.LENGTH_PENALTY,
            no_repeat_ngram=settings.NO_REPEAT_NGRAM,
            rerank=settings.RERANK if self.reranker else 0.0,
        )
        return Checkpoint(
            self.average,
            self.tokenizer,
            self.encoder,
            options,
            parse_tasks(settings.TASKS),
            on_record(settings),
            scores,
            training,
            self.reranker,
        )

    def save(self, scores: dict[str, float]) -> Path | None:
        """Write what the epoch that just ended earned; of a team the first process writes.

        Each new best validation loss gives a `.safetensors` and a `.pt`, the best of each measure
        with a name of its own a `.safetensors`; `last.pt` is where a run goes on. Returns the
        `.safetensors` of a new best validation loss, if it is one.
        """
        ended = self.progress.history[-1]
        won = {name: self.file_of(name, ended) for name in KEPT if ended in self.bests(name)[-1:]}
        best = won.pop("val_loss", None)
        if best:
            self._write(best, save_for_use, self.checkpoint(scores))
        for path in won.values():
            self._write(path, save_for_use, self.checkpoint(scores), waiting(path))
        self.save_training(scores, best and best.with_suffix(".pt"))
        for path in won.values():  # now that `last.pt` knows it: it may be the end of an older one
            self.team.on_rank0(functools.partial(waiting(path).replace, path))
        keep = self.settings.KEEP_CHECKPOINTS
        for entry in self.bests("val_loss")[:-keep] if keep else ():
            old = self.file_of("val_loss", entry)
            for path in (old, old.with_suffix(".pt")):
                if self.progress.written.pop(path.name, None) and self.team.leads:
                    path.unlink(missing_ok=True)
        return best

    def save_training(self, scores: dict[str, float], also: Path | None = None) -> None:
        """Write `last.pt`, and under the name `also` the same file."""
        first, *others = self.team.all_gather(random_state(self.device))
        training = {
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "random": first,
            "other_random": others,  # of the other processes, by rank
        }
        last = self.output / "last.pt"
        self._write(also or last, save_for_training, self.checkpoint(scores, training))
        if also:  # second, so that what `last.pt` tells of is there
            self._write(last, name_again, also)

    def _write(
        self,
        path: Path,
        write: Callable[[Path, Any], str],
        content: Any,
        place: Path | None = None,
    ) -> None:
        """Let `write` make the file, at first in another `place` if one is given; another
        training's of that name is set aside before."""

        def first() -> str:
            if path.name not in self.progress.written:
                set_aside([path])
            return write(place or path, content)

        self.progress.written[path.name] = self.team.on_rank0(first)


# --- Starting and resuming ------------------------------------------------------------------


def find_checkpoint(settings: SimpleNamespace, team: Team) -> Checkpoint | None:
    """The checkpoint to go on from, or else to begin with; None to train from scratch."""
    saved = team.on_rank0(lambda: saved_by_job(settings, team))
    settings.RESUME_CHECKPOINT_PATH = saved or settings.RESUME_CHECKPOINT_PATH
    if settings.RESUME_CHECKPOINT_PATH:
        path = Path(settings.RESUME_CHECKPOINT_PATH).expanduser()  # --flag=~/file keeps its ~
        if path.is_file():
            checkpoint = load_to_resume(settings, path)
            settings.START_CHECKPOINT = checkpoint.settings.get("START_CHECKPOINT")  # as it began
            return checkpoint
        if path.exists():
            raise UserError(f"{path} is no file: give a .pt, such as {path / 'last.pt'}")
        print(f"there is no checkpoint {path} to resume from: training from scratch")
    if settings.START_CHECKPOINT:
        print(f"beginning with the decoder and tokenizer of {settings.START_CHECKPOINT}")
        path = locate_checkpoint(settings.START_CHECKPOINT)
        return replace(load_checkpoint(path), training=None)
    return None


def load_to_resume(settings: SimpleNamespace, path: Path) -> Checkpoint:
    """A checkpoint with a training's state; refuses one that no run can have written."""
    checkpoint = load_checkpoint(path)
    saved, model = checkpoint.training, checkpoint.model
    if saved is None:
        raise UserError(f"{path} is for use only: resume from the .pt beside it, or from last.pt")
    begin = f"give --resume_checkpoint_path none --start_checkpoint {path}"
    with refused(f"{path} holds no state of a training to go on from: to use its weights, {begin}"):
        Progress.restored(saved["progress"])
        weights, own = saved["weights"], model.state_dict()
        pairs = [(weights.get(name), own.get(name)) for name in {**weights, **own}]
        kept = kept_by(make_optimizer(model, settings))
        for number, held in saved["optimizer"]["state"].items():  # of weights that were moved
            pairs += [(held[name], x) for name, x in kept[number].items() if torch.is_tensor(x)]
        chance = [saved["random"], *saved.get("other_random", [])]
        pairs += [(state["cpu"], torch.get_rng_state()) for state in chance]
        for there, wanted in pairs:
            fit = (there.shape, there.dtype) == (wanted.shape, wanted.dtype)
            if not fit or not there.isfinite().all():
                raise ValueError(f"a tensor of {there.dtype} {[*there.shape]} is none of its own")
    return checkpoint


def saved_by_job(settings: SimpleNamespace, team: Team) -> str | None:
    """The `last.pt` of this very job, which torchrun has started again; None if there is none."""
    last = output_dir(settings) / "last.pt"
    if not team.job or not last.is_file():
        return None
    job = load_to_resume(settings, last).training["progress"].get("job")
    return str(last) if job == team.job else None


def keep_apart(run: Run) -> Progress:
    """Find which files in OUTPUT_DIR this run wrote before; set aside what it would write over.

    Bests whose files are elsewhere count no more: the next epoch is the best again.
    """
    source, progress = Path(run.settings.RESUME_CHECKPOINT_PATH or "").expanduser(), run.progress
    standing = ["last.pt", *(run.file_of(name, {}).name for name in LASTING)]
    for best in (run.output / name for name in standing[1:]):
        if progress.written.get(best.name, "") == stored_digest(waiting(best)):
            waiting(best).replace(best)  # a kill came between
    # What it goes on from can't have noted its own digest, under either of its names.
    newest = [run.file_of("val_loss", e).with_suffix(".pt").name for e in run.bests("val_loss")]
    known = (*standing, *progress.written, *newest[-1:])
    there = {name: stored_digest(run.output / name) for name in known}
    # A file is this run's if its digest is one that it noted, or of what it goes on from.
    mine = {stored_digest(source), *progress.written.values()} - {None}
    progress.written = {name: digest for name, digest in there.items() if digest in mine}
    set_aside([run.output / name for name in standing if name not in progress.written])
    for measure in KEPT:
        bests = run.bests(measure)
        if bests and (file := run.file_of(measure, bests[-1])).name not in progress.written:
            progress.since[measure] = progress.epoch
            best = f"the best so far in {MEASURES[measure].label} ({bests[-1][measure]:.4g})"
            print(f"resumed   without {file}, {best}: what comes is not compared with it")
    return progress


def make_optimizer(model: CaptionModel, settings: SimpleNamespace) -> torch.optim.Optimizer:
    """AdamW that decays matrices, not biases, norms or embeddings of positions; `train.update`
    gives all its groups one learning rate."""
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.dim() == 2 and "position" not in n]
    others = [p for n, p in named.items() if p.dim() != 2 or "position" in n]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )


def kept_by(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimizer keeps of each weight, found by a step that changes none."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()["state"]


def check_settings(settings: SimpleNamespace, begun: Checkpoint | None, team: Team) -> None:
    """Refuse what can't be, what isn't the same in all processes of a team, or a decoder's size
    that isn't that of what training goes on from."""
    own = deciding(constants(settings))
    for name, value in team.on_rank0(lambda: own).items():
        if own.get(name) != value:
            raise UserError(
                f"{name} is {own.get(name)!r} in one process and {value!r} in the first one: start "
                "all with the same flags and config.py"
            )
    parse_layers(settings.ENCODER_LAYERS)
    choose_dtype(settings.PRECISION, torch.device("cpu"))
    size = decoder_config(settings, vocab_size=len(begun.tokenizer) if begun else 1)
    if begun:
        configs = (begun.model.config, size)
        check_same(*({name: vars(c)[part] for part, name in SIZES.items()} for c in configs))


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what is learned: numbers and texts, but for names and places."""
    others = {*TEXTS_OR_NONE, "DATASET", "CHECKPOINT_PREFIX", "DEVICE"}
    kept = (n for n in values if n not in others and not n.endswith((*FILES, *OR_ON_HUB)))
    return {n: values[n] for n in kept if isinstance(values[n], str | int | float)}


def say_other_settings(settings: SimpleNamespace, saved: Mapping[str, Any]) -> None:
    """Say what is set otherwise than where a run goes on, which may be another training's place."""
    now, before = deciding(on_record(settings)), deciding(saved)
    other = [f"{n} {now[n]} (was {before[n]})" for n in now if before.get(n, now[n]) != now[n]]
    if other:
        print(f"resumed   with {', '.join(other)}")


def decoder_config(settings: SimpleNamespace, vocab_size: int) -> DecoderConfig:
    if settings.DECODER_EMBED_DIM % settings.DECODER_HEADS:
        raise UserError(
            f"DECODER_EMBED_DIM = {settings.DECODER_EMBED_DIM} is no multiple of "
            f"DECODER_HEADS = {settings.DECODER_HEADS}: change one of them"
        )
    sizes = {part: vars(settings)[name] for part, name in SIZES.items()}
    return DecoderConfig(vocab_size=vocab_size, dropout=settings.DROPOUT, **sizes)


# --- Random numbers -------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(run: Run, saved: dict[str, Any] | None) -> None:
    """Give each process of a team its own course of chance, the saved one if there is one."""
    states = [saved["random"], *saved.get("other_random", [])] if saved else []
    team, device = run.team, run.device
    if states and len(states) != team.size:
        print(f"resumed   with {team.size} processes (was {len(states)})")
    if team.rank < len(states):
        state = states[team.rank]
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
        elif device.type == "mps" and "mps" in state:
            torch.mps.set_rng_state(state["mps"])
    elif not team.leads:
        torch.manual_seed(run.settings.SEED + team.rank + run.progress.step)


# --- Settings and files ---------------------------------------------------------------------


def on_record(settings: SimpleNamespace) -> dict[str, Any]:
    """The settings as checkpoints and trackers keep them, which others may see: an address may hold
    a key, and folders of this machine are told by their last part. What else people write in
    config.py, such as a module or a set, no file of ours can hold."""
    return {
        name: redact(last_part(value)) if isinstance(value, str) else value
        for name, value in constants(settings).items()
        if isinstance(value, str | int | float | None)
    }


def output_dir(settings: SimpleNamespace) -> Path:
    return Path(settings.OUTPUT_DIR or settings.DATA_DIR).expanduser()


def waiting(best: Path) -> Path:
    """Where a best lies until `last.pt` knows it, in whose place it then comes."""
    return best.with_name(f"next_{best.name}")


def set_aside(paths: Iterable[Path]) -> None:
    """Keep another training's files in a folder under other names, `previous_1_...`, and say so."""
    there = [path for path in paths if path.exists()]
    if there:
        taken = there[0].parent.glob
        number = next(n for n in itertools.count(1) if not any(taken(f"previous_{n}_*")))
        kept = [path.replace(path.with_name(f"previous_{number}_{path.name}")) for path in there]
        print(f"an earlier training's files are kept as {', '.join(path.name for path in kept)}")
