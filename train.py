"""Train a captioner: prepare the data, encode each photo once, then fit the decoder.

python train.py --demo                  # the built-in demo, minutes on a laptop
python train.py                         # what config.py says
python train.py --batch_size 64         # any setting, for one run
torchrun --nproc_per_node=4 train.py    # on four GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import config
import prepare_dataset
from checkpoint import Checkpoint, load_checkpoint, save_for_training, save_for_use
from dataset import (
    Batch,
    CaptionRows,
    DataPaths,
    Question,
    load_captions,
    load_questions,
    load_splits,
    make_batch,
    parse_tasks,
)
from decoder import DecoderConfig
from distributed import ALONE, Team, joined, share_gradients
from encoder import FrozenEncoder, parse_layers
from features import (
    FeatureCache,
    ResidentFeatures,
    build_features,
    prefetch,
    resident_or_cached,
)
from generation import GenerationOptions, Hypothesis, caption_cached, generate
from hub import HubPusher, locate_checkpoint, model_card
from metrics import CiderD, score, tokenize, vqa_accuracy
from model import CaptionModel
from pictures import draw_curves, draw_samples
from shards import Stock, StreamedRows, expand_shards, take_stock
from tokenizer import ANSWER_ID, END, END_ID, START_ID, CaptionTokenizer
from tracking import Tracker, memory
from utils import (
    Bar,
    UserError,
    autocast,
    choose_dtype,
    constants,
    load_settings,
    redact,
    run_script,
    seed_everything,
    size_text,
    sole_user,
)

EXAMPLES = """examples:
  python train.py --demo
  python train.py --dataset flickr8k --split ratio --epochs 10
  python train.py --resume_checkpoint_path ../assets/multimodal_image_transformer/last.pt
"""

# Settings that a run can't do without their being in a range, both ends included.
# What is measured on the validation photos after each epoch, as people call it.
MEASURES = {
    "val_cider": "CIDEr-D",
    "val_bleu4": "BLEU-4",
    "val_accuracy": "accuracy of answers",
    "val_loss": "cross-entropy",
}


# --- The data of a run ----------------------------------------------------------------------


@dataclass
class Data:
    """Captions and questions of photos, the photos by split, and their features.

    Only what the tasks want is in it, and only photos that have some of it. With TRAIN_SHARDS
    the photos to train on are in `stock` alone.
    """

    captions: dict[str, list[str]]
    questions: dict[str, list[Question]]
    splits: dict[str, list[str]]
    cache: FeatureCache
    encoder: dict[str, Any]  # FrozenEncoder.identity()
    processor: str  # the encoder's preprocessor_config.json
    stock: Stock | None = None

    def captioned(self, split: str) -> list[str]:
        """The photos of a split that have captions."""
        return [name for name in self.splits[split] if name in self.captions]

    def asked(self, names: Iterable[str]) -> list[tuple[str, Question]]:
        """The questions about some photos, each with its photo."""
        return [(name, q) for name in names for q in self.questions.get(name, [])]


def load_data(
    settings: SimpleNamespace, paths: DataPaths, device: torch.device, team: Team = ALONE
) -> Data:
    """Read what the tasks want, and encode the photos that aren't in the feature cache yet."""
    tasks = parse_tasks(settings.TASKS)
    captions = load_captions(paths.captions) if "captions" in tasks else {}
    questions = load_questions(paths.questions) if "questions" in tasks else {}
    splits = {
        split: [name for name in names if name in captions or questions.get(name)]
        for split, names in load_splits(paths.splits).items()
    }
    if settings.TRAIN_SHARDS:
        splits["train"] = []
    for split in ("val",) if settings.TRAIN_SHARDS else ("train", "val"):
        if not splits[split]:
            raise UserError(f"{paths.splits}: no photo of {split} has any {' or '.join(tasks)}")
    encoder = FrozenEncoder.load(
        settings.ENCODER_MODEL_NAME,
        settings.ENCODER_REVISION or None,
        parse_layers(settings.ENCODER_LAYERS),
    ).to(device)
    stock = load_shards(settings, paths, encoder, team) if settings.TRAIN_SHARDS else None
    views = range(settings.FEATURE_VIEWS)
    items = [(name, view) for view in views for name in splits["train"]]
    items += [(name, 0) for name in splits["val"]]
    cache, bad = build_features(
        encoder,
        paths.images,
        items,
        paths.features,
        dtype=choose_dtype(settings.PRECISION, device),
        batch_size=settings.FEATURE_BATCH_SIZE,
        max_bad=settings.MAX_BAD_IMAGES,
        team=team,
    )
    splits = {split: [n for n in names if n not in bad] for split, names in splits.items()}
    processor = encoder.processor.to_json_string()
    return Data(captions, questions, splits, cache, encoder.identity(), processor, stock)


def load_shards(
    settings: SimpleNamespace, paths: DataPaths, encoder: FrozenEncoder, team: Team
) -> Stock:
    """What TRAIN_SHARDS hold: their features on disk, or the photos as they come.

    Raises:
        UserError: settings don't go with shards, or a shard can't be read.
    """
    if settings.FEATURE_VIEWS != 1 or settings.TASKS.strip() != "captions":
        raise UserError(
            "TRAIN_SHARDS are learned from in one view and for captions only: use "
            "--feature_views 1 --tasks captions"
        )
    device = next(encoder.parameters()).device
    dtype = choose_dtype(settings.PRECISION, device)
    return take_stock(
        encoder,
        expand_shards(settings.TRAIN_SHARDS),
        paths.features,
        keep_features=settings.KEEP_SHARD_FEATURES,
        dtype=dtype,
        batch_size=settings.FEATURE_BATCH_SIZE,
        max_bad=settings.MAX_BAD_IMAGES,
        team=team,
    )


def load_tokenizer(settings: SimpleNamespace, paths: DataPaths, data: Data) -> CaptionTokenizer:
    """The tokenizer the user gave, or a new one learned from the training texts."""
    if bool(settings.VOCAB_FILE) != bool(settings.MERGES_FILE):
        raise UserError("VOCAB_FILE and MERGES_FILE belong together: give both or neither")
    if settings.VOCAB_FILE:
        return CaptionTokenizer.load(paths.vocab, paths.merges)

    def texts() -> Iterator[str]:
        for name in data.captioned("train"):
            yield from data.captions[name]
        for _, question in data.asked(data.splits["train"]):
            yield from (question.text, question.answer)
        if data.stock:
            yield from data.stock.first_texts()

    tokenizer = CaptionTokenizer.train(texts(), settings.VOCAB_SIZE)
    tokenizer.save(paths.vocab, paths.merges)
    return tokenizer


def encode_rows(
    tokenizer: CaptionTokenizer,
    data: Data,
    split: str,
    max_length: int,
    features: FeatureCache | ResidentFeatures,
    views: int,
) -> CaptionRows:
    """The captions and then the questions of each photo of a split."""
    names = data.splits[split]
    groups: dict[str, list[list[int]]] = {name: [] for name in names}
    texts = [(name, "", text) for name in names for text in data.captions.get(name, [])]
    texts += [(name, question.text, question.answer) for name, question in data.asked(names)]
    encoded = tokenizer.encode_texts([pair for _, *pair in texts], max_length)
    for (name, *_), ids in zip(texts, encoded, strict=True):
        groups[name].append(ids)
    return CaptionRows(groups, features, views)


# --- The state of a run ---------------------------------------------------------------------


@dataclass
class Progress:
    """How far training is; saved with each checkpoint, so that a run goes on where it was."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done in the epoch under way
    step: int = 0  # updates done
    seconds: float = 0.0  # spent training, validation included
    loss_sum: float = 0.0  # of the epoch under way, in nats; self-critical: CIDEr-D of beams
    loss_count: int = 0  # tokens; self-critical: captions
    best_loss: float = math.inf
    best_cider: float = -math.inf
    best_accuracy: float = -math.inf
    best_path: str = ""
    written: list[str] = field(default_factory=list)  # names of best-loss checkpoints on disk
    bad_steps: int = 0  # in a row, without a finite loss and gradient
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry an epoch
    wandb_id: str = ""
    job: str = ""  # torchrun's name for it


@dataclass
class Run:
    """Everything that training needs, built once by `start_run`."""

    settings: SimpleNamespace
    team: Team
    paths: DataPaths
    output: Path
    device: torch.device
    dtype: torch.dtype
    data: Data
    tokenizer: CaptionTokenizer
    rows: dict[str, CaptionRows | StreamedRows]
    features: FeatureCache | ResidentFeatures
    model: CaptionModel  # what the optimizer moves
    shared: nn.Module | None  # in a team: what its losses are computed in; see `share_gradients`
    average: CaptionModel  # its moving average, or itself; this is validated and saved
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    progress: Progress
    critic: Critic | None  # where there is a self-critical stage

    @property
    def epochs(self) -> int:
        return self.settings.NUM_EPOCHS + critical_epochs(self.settings)

    @property
    def self_critical(self) -> bool:
        return self.progress.epoch >= self.settings.NUM_EPOCHS

    def checkpoint(
        self, scores: dict[str, float], training: dict[str, Any] | None = None
    ) -> Checkpoint:
        settings = self.settings
        kept = on_record(settings)
        options = GenerationOptions(
            settings.BEAM_SIZE, settings.LENGTH_PENALTY, no_repeat_ngram=settings.NO_REPEAT_NGRAM
        )
        return Checkpoint(
            self.average,
            self.tokenizer,
            self.data.encoder,
            options,
            parse_tasks(settings.TASKS),
            kept,
            scores,
            training,
        )

    def training_state(self) -> dict[str, Any]:
        """What going on needs; all processes of a team ask for it together."""
        first, *others = self.team.all_gather(random_state(self.device))
        return {
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
            "random": first,
            "other_random": others,  # of the other processes, by rank
        }


def on_record(settings: SimpleNamespace) -> dict[str, Any]:
    """The settings as checkpoints and trackers keep them: an address may hold a key."""
    values = {name: getattr(settings, name) for name in constants(config)}
    return {name: redact(v) if isinstance(v, str) else v for name, v in values.items()}


def critical_epochs(settings: SimpleNamespace) -> int:
    """Epochs of the self-critical stage, which is about captions, and wants all in memory."""
    possible = "captions" in parse_tasks(settings.TASKS) and not settings.TRAIN_SHARDS
    return settings.SCST_EPOCHS if possible else 0


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def set_random_state(run: Run, saved: dict[str, Any] | None) -> None:
    """Give each process of a team its own course of chance, the saved one if there is one."""
    states = [saved["random"], *saved.get("other_random", [])] if saved else []
    team = run.team
    if states and len(states) != team.size:
        print(
            f"trained by {len(states)} processes before, {team.size} now: those that are new "
            "draw their own random numbers"
        )
    if team.rank < len(states):
        restore_random_state(states[team.rank], run.device)
    elif not team.leads:
        torch.manual_seed(run.settings.SEED + team.rank + run.progress.step)


def start_run(settings: SimpleNamespace, team: Team = ALONE) -> Run:
    """Prepare the data and build the model, new or as the checkpoint to resume from has it."""
    device = team.device(settings.DEVICE)
    decoder_config(settings, vocab_size=1)  # what doesn't fit is said before photos are encoded
    paths = team.on_rank0(lambda: prepare_dataset.prepare(settings))
    output = output_dir(settings)
    resumed = find_resumed(settings.RESUME_CHECKPOINT_PATH)
    begun = resumed or find_started(settings.START_CHECKPOINT)
    data = load_data(settings, paths, device, team)
    tokenizer = (
        begun.tokenizer if begun else team.on_rank0(lambda: load_tokenizer(settings, paths, data))
    )
    seed_everything(settings.SEED)
    size = decoder_config(settings, len(tokenizer))
    width = data.cache.shape[1]
    if begun:
        check_begun(begun, size, data.encoder)
    average = (begun.model if begun else CaptionModel(width, size)).to(device)
    model = copy.deepcopy(average) if settings.EMA_DECAY else average
    if resumed:
        model.load_state_dict(resumed.training["weights"])
    if settings.COMPILE:
        model.hidden = torch.compile(model.hidden, dynamic=True)  # rows differ in length
    features = resident_or_cached(data.cache, device)
    rows = {"val": encode_rows(tokenizer, data, "val", size.max_length, features, 1)}
    if data.stock:
        rows["train"] = StreamedRows(
            data.stock, tokenizer, size.max_length, settings.SHUFFLE_BUFFER
        )
    else:
        rows["train"] = encode_rows(
            tokenizer, data, "train", size.max_length, features, settings.FEATURE_VIEWS
        )
    optimizer = make_optimizer(model, settings)
    groups = math.ceil(
        rows["train"].count(settings.BATCH_SIZE) / settings.GRADIENT_ACCUMULATION_STEPS
    )
    schedule = make_schedule(optimizer, settings, groups)
    progress = Progress()
    if resumed:
        optimizer.load_state_dict(resumed.training["optimizer"])
        schedule.load_state_dict(resumed.training["schedule"])
        renew_settings(optimizer, schedule, settings)
        progress = Progress(**resumed.training["progress"])
    progress.job = team.job
    dtype = choose_dtype(settings.PRECISION, device)
    critic = Critic(tokenizer, data) if critical_epochs(settings) else None
    run = Run(
        settings,
        team,
        paths,
        output,
        device,
        dtype,
        data,
        tokenizer,
        rows,
        features,
        model,
        share_gradients(model, team),
        average,
        optimizer,
        schedule,
        progress,
        critic,
    )
    set_random_state(run, resumed.training if resumed else None)
    return run


def output_dir(settings: SimpleNamespace) -> Path:
    return Path(settings.OUTPUT_DIR or settings.DATA_DIR).expanduser()


def decoder_config(settings: SimpleNamespace, vocab_size: int) -> DecoderConfig:
    """The decoder's size as configured.

    Raises:
        UserError: the figures don't fit each other.
    """
    if settings.DECODER_EMBED_DIM % settings.DECODER_HEADS:
        raise UserError(
            f"DECODER_EMBED_DIM = {settings.DECODER_EMBED_DIM} is no multiple of "
            f"DECODER_HEADS = {settings.DECODER_HEADS}: change one of them"
        )
    return DecoderConfig(
        vocab_size=vocab_size,
        width=settings.DECODER_EMBED_DIM,
        layers=settings.DECODER_LAYERS,
        heads=settings.DECODER_HEADS,
        ff_dim=settings.DECODER_FF_DIM,
        max_length=settings.MAX_CAPTION_LENGTH,
        dropout=settings.DROPOUT,
    )


def find_resumed(path: str | None) -> Checkpoint | None:
    """The checkpoint to go on from; None, said aloud, where there is none."""
    if not path:
        return None
    path = str(Path(path).expanduser())  # a shell leaves `--flag=~/file` as it is
    if not Path(path).is_file():
        print(f"there is no checkpoint {path} to resume from: training from scratch")
        return None
    checkpoint = load_checkpoint(path)
    if checkpoint.training is None:
        raise UserError(f"{path} is for use only: resume from the .pt beside it, or from last.pt")
    return checkpoint


def find_started(checkpoint: str | None) -> Checkpoint | None:
    """The checkpoint to begin with, here or on the Hub, said aloud; None where none is wanted."""
    if not checkpoint:
        return None
    print(f"beginning with the decoder and tokenizer of {checkpoint}")
    return load_checkpoint(locate_checkpoint(checkpoint))


def saved_by_job(settings: SimpleNamespace, team: Team) -> str | None:
    """The `last.pt` of this very job, which torchrun has started again; None if there is none."""
    last = output_dir(settings) / "last.pt"
    # A job that nobody named is "none", like others that may have left a file here.
    named = team.job not in ("", "none")
    if not (named or team.restarts) or not last.is_file():
        return None
    job = load_checkpoint(last).training["progress"].get("job")
    return str(last) if job == team.job else None


def check_begun(checkpoint: Checkpoint, size: DecoderConfig, encoder: dict[str, Any]) -> None:
    """Refuse to go on with, or begin with, a checkpoint that another configuration made.

    Raises:
        UserError: the decoder or the encoder differ; the message says in what.
    """
    there, here = asdict(checkpoint.model.config), asdict(size)
    for key in ("weights", "layers", "preprocessing"):
        there[f"encoder {key}"], here[f"encoder {key}"] = checkpoint.encoder[key], encoder[key]
    differing = [
        f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]
    ]
    if differing:
        raise UserError(
            f"the checkpoint was trained with another configuration ({'; '.join(differing)}): "
            "restore it, or start anew with --resume_checkpoint_path none --start_checkpoint none"
        )


def make_optimizer(model: CaptionModel, settings: SimpleNamespace) -> torch.optim.Optimizer:
    """AdamW that decays matrices, not biases, norms or embeddings of positions."""
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
        fused=True,  # and so able to skip a bad step by itself: see `update`
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: SimpleNamespace, per_epoch: int
) -> LambdaLR:
    """The learning rate of each update.

    Linear warm-up, a cosine from LEARNING_RATE to MIN_LEARNING_RATE at the end of NUM_EPOCHS, and
    in the self-critical stage a line from SCST_LEARNING_RATE to MIN_LEARNING_RATE.
    """
    updates, critical = per_epoch * settings.NUM_EPOCHS, per_epoch * critical_epochs(settings)
    warmup = max(1, min(settings.WARMUP_STEPS, updates // 10))
    peak = settings.LEARNING_RATE
    floor = min(peak, settings.MIN_LEARNING_RATE)
    critical_peak = settings.SCST_LEARNING_RATE
    critical_floor = min(critical_peak, settings.MIN_LEARNING_RATE)

    def rate(step: int) -> float:
        if critical and step >= updates:
            left = max(0.0, 1 - (step - updates) / critical)
            return critical_floor + (critical_peak - critical_floor) * left
        if step < warmup:
            return peak * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, updates - warmup))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, lambda step: rate(step) / peak)


def renew_settings(
    optimizer: torch.optim.Optimizer, schedule: LambdaLR, settings: SimpleNamespace
) -> None:
    """Give a resumed run the learning rate and weight decay that are set now."""
    schedule.base_lrs = [settings.LEARNING_RATE] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = settings.LEARNING_RATE
        group["lr"] = settings.LEARNING_RATE * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    optimizer.param_groups[0]["weight_decay"] = settings.WEIGHT_DECAY


# --- One epoch ------------------------------------------------------------------------------


def with_features(
    run: Run, split: str, batches: Iterable[Batch], epoch: int | None
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches and the features of their photos, read ahead, on the run's device."""

    def load(batch: Batch) -> tuple[Batch, Tensor]:
        return to_device(run.device, *run.rows[split].load(batch, epoch))

    return prefetch(load, batches)


def to_device(device: torch.device, batch: Batch, features: Tensor) -> tuple[Batch, Tensor]:
    """Both on the device; where that is a GPU, without waiting for them to arrive."""
    if device.type == "cuda":
        batch = batch.pin()
        features = features if features.is_cuda else features.pin_memory()
    return batch.to(device), features.to(device, non_blocking=True)


def training_batches(run: Run) -> Iterator[tuple[Batch, Tensor]]:
    """What is left of the epoch under way."""
    settings, progress = run.settings, run.progress
    batches = run.rows["train"].batches(
        settings.BATCH_SIZE, settings.SEED, progress.epoch, progress.batch, run.team
    )
    return with_features(run, "train", batches, progress.epoch)


def train_epoch(run: Run, tracker: Tracker, stop: StopSignal) -> bool:
    """The rest of the epoch under way; after a whole update, early if any process is asked to stop.

    Returns:
        Whether one was, the same in all processes of a team.
    """
    settings, progress = run.settings, run.progress
    # Without dropout in the self-critical stage: the gradient is of the model that searched.
    run.model.train(not run.self_critical)
    total = run.rows["train"].count(settings.BATCH_SIZE)
    accumulate = settings.GRADIENT_ACCUMULATION_STEPS
    meter = Meter(run, total)
    ledger = Ledger(run, tracker)
    group: list[tuple[Batch, Tensor]] = []
    for pair in training_batches(run):
        group.append(pair)
        if len(group) < accumulate and progress.batch + len(group) < total:
            continue
        ledger.note(update(run, group, stop.asked))
        progress.batch += len(group)
        meter.show(group)
        group = []
        if ledger.stopping:
            break
    ledger.settle()
    meter.close()
    return ledger.stopping


@dataclass
class Update:
    """What one update found; the tensors are scalars on the run's device, the same in a team."""

    step: int
    names: list[str]  # of this process's photos
    count: Tensor  # tokens, or captions in the self-critical stage
    stop: Tensor  # how many processes are asked to stop
    summed: Tensor  # loss in nats, or CIDEr-D in the self-critical stage
    norm: Tensor  # of the gradient
    bad: Tensor  # 1 where loss or gradient were not finite, and so nothing was changed
    rate: float  # the learning rate


class Ledger:
    """Keeps the account of updates, on a GPU one step late, so that the step never waits."""

    def __init__(self, run: Run, tracker: Tracker):
        self.run, self.tracker = run, tracker
        self.late = 1 if run.device.type == "cuda" else 0
        self.waiting: deque[Update] = deque()
        self.since, self.counted = time.monotonic(), 0  # what the shown rate is of
        self.stopping = False

    def note(self, update: Update) -> None:
        self.waiting.append(update)
        while len(self.waiting) > self.late:
            self._enter(self.waiting.popleft())

    def settle(self) -> None:
        """Enter what still waits."""
        while self.waiting:
            self._enter(self.waiting.popleft())

    def _enter(self, update: Update) -> None:
        progress = self.run.progress
        self.stopping = self.stopping or bool(update.stop.item())
        if update.bad.item():
            self._enter_bad(update)
            return
        summed, count = update.summed.item(), int(update.count.item())
        progress.bad_steps = 0
        progress.loss_sum += summed
        progress.loss_count += count
        self.counted += count
        if update.step % 20 == 0:
            self._track(update, summed / max(1, count))

    def _track(self, update: Update, loss: float) -> None:
        kind, unit = ("beam_cider", "captions") if self.run.self_critical else ("loss", "tokens")
        now = time.monotonic()
        rate = self.counted / (now - self.since)
        self.since, self.counted = now, 0
        values = {f"train/{kind}": loss, f"train/{unit}_per_s": rate}
        values |= {"train/learning_rate": update.rate, "train/grad_norm": update.norm.item()}
        self.tracker.log(values | memory(self.run.device), update.step)

    def _enter_bad(self, update: Update) -> None:
        """Say which photos gave a loss or gradient that is not finite.

        Raises:
            UserError: too many in a row; the checkpoints are as they were.
        """
        progress, limit = self.run.progress, self.run.settings.MAX_BAD_STEPS
        progress.bad_steps += 1
        names = [name for part in self.run.team.all_gather(update.names) for name in part]
        say(f"step {update.step}: the loss or gradient is not finite, no update; photos: {names}")
        if progress.bad_steps >= limit:
            raise UserError(
                f"{limit} steps in a row were not finite: lower --learning_rate or use "
                f"--precision fp32, and resume from {self.run.output / 'last.pt'}"
            )


def batch_loss(
    run: Run, model: CaptionModel, batch: Batch, features: Tensor, **options: Any
) -> Tensor:
    """Summed cross-entropy of a batch in nats, computed in the run's precision."""
    with autocast(run.device, run.dtype):
        return model.loss(features.float(), batch, **options)


def no_loss(run: Run) -> Tensor:
    """A loss of 0 with a gradient for each weight, as the other processes wait for all of them."""
    return 0 * sum(parameter.sum() for parameter in run.model.parameters())


class Critic:
    """Rewards captions of training photos with their CIDEr-D (Rennie et al. 2017).

    Document frequencies are those of the training captions, and the end of a caption counts as
    a word: without it, captions that break off would lose nothing.
    """

    def __init__(self, tokenizer: CaptionTokenizer, data: Data):
        self.tokenizer = tokenizer
        self.cider = CiderD(
            {
                name: [[*tokenize(caption), END] for caption in data.captions[name]]
                for name in data.captioned("train")
            }
        )

    def rewards(self, name: str, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """CIDEr-D, times 100, of captions of one photo."""
        decode = self.tokenizer.decode
        words = [tokenize(decode(h.tokens)) + [END] * h.ended for h in hypotheses]
        return [self.cider.score(name, caption) for caption in words]


def advantages(rewards: Sequence[float]) -> list[float]:
    """By how much each of a photo's captions beats the mean of the others."""
    mean = sum(rewards) / len(rewards)
    return [(reward - mean) * len(rewards) / max(1, len(rewards) - 1) for reward in rewards]


def self_critical_loss(run: Run, batch: Batch, features: Tensor) -> tuple[Tensor, float, int]:
    """The policy gradient's loss on the model's own beams, their summed rewards, and their number.

    The beams of a search stand for samples, each measured against the others (Cornia et al.
    2020): what they differ in is what the choice of a caption depends on. Samples proper are so
    much poorer that raising them only makes captions safe and alike (README, What was tried).
    """
    rows = [row for row, name in enumerate(batch.names) if name in run.data.captions]
    if not rows:
        return no_loss(run), 0.0, 0
    names = [batch.names[row] for row in rows]
    options = GenerationOptions(beam_size=run.settings.SCST_BEAM_SIZE)
    with autocast(run.device, run.dtype):
        beams = generate(run.model, features[rows].float(), options)
    rewards = [run.critic.rewards(*pair) for pair in zip(names, beams, strict=True)]
    ids = [[[START_ID, *h.tokens] + [END_ID] * h.ended for h in group] for group in beams]
    scales = torch.tensor(
        [
            advantage / 100
            for group, captions in zip(rewards, ids, strict=True)
            for advantage, caption in zip(advantages(group), captions, strict=True)
            for _ in caption[1:]
        ]
    )
    found = make_batch(names, ids).to(run.device)
    loss = batch_loss(run, run.model, found, features[rows], scales=scales.to(run.device))
    return loss, sum(map(sum, rewards)), sum(map(len, rewards))


def answers_loss(run: Run, batch: Batch, features: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of the answers about a batch's photos, in nats, and their tokens."""
    groups = [
        [ids for ids in run.rows["train"].groups[name] if ANSWER_ID in ids] for name in batch.names
    ]
    rows = [row for row, group in enumerate(groups) if group]
    if not rows:
        return torch.zeros((), device=run.device), 0
    names = [batch.names[row] for row in rows]
    asked = make_batch(names, [groups[row] for row in rows])
    smoothing = run.settings.LABEL_SMOOTHING
    loss = batch_loss(
        run, run.model, asked.to(run.device), features[rows], label_smoothing=smoothing
    )
    return loss, len(asked.targets)


def step_loss(run: Run, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor | float, int]:
    """What an update's gradient is of: the loss summed over a batch.

    Returns:
        The loss, the figure to show, and what that is summed over: nats and tokens, or in the
        self-critical stage CIDEr-D and captions.
    """
    settings = run.settings
    if run.self_critical:
        loss, value, parts = self_critical_loss(run, batch, features)
        if run.data.questions:  # or answering would be forgotten
            answered, tokens = answers_loss(run, batch, features)
            counts = run.team.all_reduce(torch.tensor([parts, tokens], dtype=torch.float32))
            weight = settings.QUESTION_WEIGHT * max(1.0, counts[0].item())
            loss = loss + weight / max(1.0, counts[1].item()) * answered
        return loss, value, parts
    if not batch.names:
        return no_loss(run), 0.0, 0
    scales = None
    if run.data.questions and settings.QUESTION_WEIGHT != 1:
        scales = torch.where(batch.asked, settings.QUESTION_WEIGHT, 1.0)
    loss = batch_loss(
        run, run.model, batch, features, label_smoothing=settings.LABEL_SMOOTHING, scales=scales
    )
    return loss, loss.detach(), len(batch.targets)


def add_gradient(
    run: Run, batch: Batch, features: Tensor, last: bool
) -> tuple[Tensor | float, int]:
    """Add a batch's gradient, or with the `last` of a group the team's mean of all added so far.

    Returns:
        This process's figure and count of `step_loss`.
    """
    if run.shared is None:
        loss, value, parts = step_loss(run, batch, features)
        loss.backward()
        return value, parts
    with contextlib.nullcontext() if last else run.shared.no_sync():
        loss, value, parts = run.shared(step_loss, run, batch, features)
        loss.backward()
    return value, parts


def update(run: Run, group: Sequence[tuple[Batch, Tensor]], stop: bool = False) -> Update:
    """One optimizer step on the batches of a group, unless loss or gradient are not finite.

    The gradient is that of the mean over the whole group and over all processes of a team, so
    that accumulation changes nothing but memory, and their number nothing but time.
    """
    settings, progress = run.settings, run.progress
    totals = torch.zeros(3, device=run.device)
    for number, (batch, features) in enumerate(group, start=1):
        value, parts = add_gradient(run, batch, features, number == len(group))
        totals[0] += value
        totals[1] += parts
    totals[2] = stop
    summed, count, stopping = run.team.all_reduce(totals)
    scale = run.team.size / count.clamp(min=1)
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.GRADIENT_CLIP)
    bad = (~torch.isfinite(norm + summed)).float()
    run.optimizer.found_inf = bad  # the fused optimizer does nothing where this is 1
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_ema(run, bad)
    rate = run.schedule.get_last_lr()[0]
    run.schedule.step()
    progress.step += 1
    names = [name for batch, _ in group for name in batch.names]
    return Update(progress.step, names, count, stopping, summed, norm, bad, rate)


@torch.no_grad()
def update_ema(run: Run, bad: Tensor) -> None:
    """Move the averaged weights towards the model's; early on faster, as there is little past."""
    if run.average is run.model:
        return
    step = run.progress.step
    decay = min(run.settings.EMA_DECAY, (1 + step) / (10 + step))
    share = (1 - decay) * (1 - bad)
    for average, weight in zip(run.average.parameters(), run.model.parameters(), strict=True):
        average.lerp_(weight, share)


class Meter(Bar):
    """The progress of an epoch, with loss, learning rate and speed."""

    def __init__(self, run: Run, total: int):
        super().__init__(
            total,
            f"epoch {run.progress.epoch + 1}/{run.epochs}",
            "batch",
            run.progress.batch,
            quiet=not run.team.leads,
        )
        rows = run.rows["train"]
        self.run, self.captions, self.each = run, 0.0, sum(rows.texts) / len(rows)

    def show(self, group: Sequence[tuple[Batch, Tensor]]) -> None:
        progress, taken = self.run.progress, time.monotonic() - self.started
        own = sum(len(batch.names) for batch, _ in group) * self.each
        self.captions += own * self.run.team.size  # the others' shares are about as large
        self.step(
            len(group),
            f"loss {progress.loss_sum / max(1, progress.loss_count):.3f}, "
            f"lr {self.run.schedule.get_last_lr()[0]:.1e}, {self.captions / taken:.0f} captions/s",
        )


# --- Validation -----------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Cross-entropy per token on the validation photos, without label smoothing, in nats."""
    batches = run.rows["val"].batches(run.settings.BATCH_SIZE, seed=0, epoch=0, team=run.team)
    batches = (batch for batch in batches if batch.names)
    totals = torch.zeros(2, device=run.device)
    for batch, features in with_features(run, "val", batches, None):
        totals[0] += batch_loss(run, run.average, batch, features)
        totals[1] += len(batch.targets)
    summed, tokens = run.team.all_reduce(totals).tolist()
    return summed / tokens


def validation_captions(run: Run) -> dict[str, str]:
    """Greedy captions of the first SCORED_IMAGES (at least SAMPLE_IMAGES) validation photos."""
    settings = run.settings
    names = run.data.captioned("val")[: max(settings.SCORED_IMAGES, settings.SAMPLE_IMAGES)]
    options = GenerationOptions(no_repeat_ngram=settings.NO_REPEAT_NGRAM)
    own = run.team.share(names)
    found = caption_cached(run.average, run.features, own, options, dtype=run.dtype)
    texts = run.team.gather([run.tokenizer.decode(hypothesis.tokens) for _, hypothesis in found])
    return dict(zip(names, texts, strict=True))


def validation_answers(run: Run) -> list[tuple[str, Question, str]]:
    """Greedy answers to the questions about the first SCORED_IMAGES validation photos."""
    settings = run.settings
    names = run.data.splits["val"][: max(settings.SCORED_IMAGES, settings.SAMPLE_IMAGES)]
    asked = run.data.asked(names)
    own = run.team.share(asked)
    limit = run.model.config.max_length
    prefixes = run.tokenizer.prefixes([q.text for _, q in own], limit)
    found = caption_cached(
        run.average,
        run.features,
        [name for name, _ in own],
        GenerationOptions(),
        prefixes,
        dtype=run.dtype,
    )
    texts = run.team.gather([run.tokenizer.decode(hypothesis.tokens) for _, hypothesis in found])
    return [(name, q, text) for (name, q), text in zip(asked, texts, strict=True)]


@dataclass
class Validation:
    """What an epoch's model is worth: scores, and what it wrote for them."""

    scores: dict[str, float]
    captions: dict[str, str]
    answers: list[tuple[str, Question, str]]


def validate(run: Run) -> Validation:
    run.average.eval()
    scores = {"val_loss": validation_loss(run)}
    captions = validation_captions(run)
    scored = dict(list(captions.items())[: run.settings.SCORED_IMAGES])
    if scored:
        found = score(scored, {name: run.data.captions[name] for name in scored})
        scores |= {"val_cider": found["CIDEr-D"], "val_bleu4": found["BLEU-4"]}
    answers = validation_answers(run)
    if answers and run.settings.SCORED_IMAGES:
        right = [
            vqa_accuracy(answer, question.answers or [question.answer])
            for _, question, answer in answers
        ]
        scores["val_accuracy"] = 100 * sum(right) / len(right)
    return Validation(scores, captions, answers)


# --- Checkpoints and the world outside ------------------------------------------------------


def save(run: Run, scores: dict[str, float]) -> Path | None:
    """Write what the epoch earned; returns the new best checkpoint's `.safetensors`, if any.

    Each new best validation loss gives a `.pt` and a `.safetensors`, the best CIDEr and the best
    accuracy of answers a `.safetensors` each, and `last.pt` is where a run goes on. Of a team the
    first process writes.
    """
    settings, progress = run.settings, run.progress
    best = None
    better = []
    for measure in ("cider", "accuracy"):  # before any file is written, so that each .pt knows
        if scores.get(f"val_{measure}", -math.inf) > getattr(progress, f"best_{measure}"):
            setattr(progress, f"best_{measure}", scores[f"val_{measure}"])
            better.append(measure)
    if scores["val_loss"] < progress.best_loss:
        progress.best_loss = scores["val_loss"]
        stem = f"{settings.CHECKPOINT_PREFIX}_epoch_{progress.epoch}"
        stem += f"_val_loss_{scores['val_loss']:.4f}"
        best = run.output / f"{stem}.safetensors"
        progress.best_path = str(best)
        progress.written.append(stem)
        write_for_use(run, best, scores)
        write_for_training(run, run.output / f"{stem}.pt", scores)
        while 0 < settings.KEEP_CHECKPOINTS < len(progress.written):
            old = progress.written.pop(0)
            for suffix in (".pt", ".safetensors"):
                (run.output / f"{old}{suffix}").unlink(missing_ok=True)
    for measure in better:
        write_for_use(run, best_path(run, measure), scores)
    write_for_training(run, run.output / "last.pt", scores)
    return best


def set_aside(run: Run) -> None:
    """Keep what an earlier training left in OUTPUT_DIR under the names that a new one writes."""
    names = ["last.pt", *(best_path(run, measure).name for measure in ("cider", "accuracy"))]
    there = [run.output / name for name in names if (run.output / name).exists()]
    number = next(n for n in itertools.count(1) if not any(run.output.glob(f"previous_{n}_*")))
    for path in there:
        path.replace(path.with_name(f"previous_{number}_{path.name}"))
    if there:
        print(
            "an earlier training's files are kept as "
            + ", ".join(f"previous_{number}_{path.name}" for path in there)
        )


def write_for_use(run: Run, path: Path, scores: dict[str, float]) -> None:
    run.team.on_rank0(lambda: save_for_use(path, run.checkpoint(scores)))


def write_for_training(run: Run, path: Path, scores: dict[str, float]) -> None:
    training = run.training_state()
    run.team.on_rank0(lambda: save_for_training(path, run.checkpoint(scores, training)))


def best_path(run: Run, measure: str) -> Path:
    return run.output / f"{run.settings.CHECKPOINT_PREFIX}_best_{measure}.safetensors"


def start_tracking(run: Run) -> Tracker:
    """Begin the tracked run, or go on with the one that the checkpoint names."""
    settings = run.settings
    tracker = Tracker(
        run.output,
        project=settings.WANDB_PROJECT,
        entity=settings.WANDB_ENTITY or None,
        name=settings.WANDB_RUN_NAME or None,
        run_id=run.progress.wandb_id,
        config=on_record(settings),
        report=say,
    )
    run.progress.wandb_id = tracker.run_id
    return tracker


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step and save. A second one stops at once.

    Not so under torchrun, which passes on what the process may have got already, and stops it
    after a while in any case.
    """

    def __init__(self, team: Team) -> None:
        self.asked = False
        self.team = team
        self.before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and not self.team.job:
            raise KeyboardInterrupt
        self.asked = True
        if self.team.leads:
            again = "" if self.team.job else "; once more stops at once"
            print(f"\nstopping after this step{again}", file=sys.stderr)

    def release(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Print a line without tearing a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


# --- The whole run --------------------------------------------------------------------------


def describe(run: Run) -> None:
    """The summary at the start: what is trained on what, and where the output goes."""
    settings, rows = run.settings, run.rows
    counts = zip(rows["train"].texts, ("captions", "questions"), strict=True)
    texts = [f"{count:,} {kind}" for count, kind in counts if count]
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    cache = run.data.cache
    patches, width = cache.shape
    kept = len(cache.entries)
    source = f"{settings.DATASET}, split by {settings.SPLIT}"
    if stock := run.data.stock:
        source = redact(f"{settings.TRAIN_SHARDS}, and {settings.VAL_SHARDS or source} to validate")
        kept += len(stock) if settings.KEEP_SHARD_FEATURES else 0
    size = size_text(kept * patches * width * 2)
    processes = run.team.size
    devices = f"{processes} processes, {run.device.type}" if processes > 1 else str(run.device)
    print(
        f"data      {len(rows['train']):,} photos with {' and '.join(texts)} to train on, "
        f"{len(rows['val']):,} to validate ({source})\n"
        f"encoder   {settings.ENCODER_MODEL_NAME}, frozen: {patches} vectors of {width} a photo\n"
        f"features  {size} in {cache.folder}\n"
        f"decoder   {parameters:.1f} M parameters: width {run.model.config.width}, "
        f"{run.model.config.layers} layers, {len(run.tokenizer):,} tokens\n"
        f"device    {devices}, {str(run.dtype).removeprefix('torch.')}, seed {settings.SEED}\n"
        f"output    {run.output}"
    )
    if run.data.stock and settings.SCST_EPOCHS:
        print("stages    cross-entropy only: self-critical training wants all captions in memory")
    if run.progress.step:
        print(f"resumed   after {run.progress.epoch} epochs and {run.progress.batch} batches")
    if run.progress.epoch >= run.epochs:
        print(f"nothing to train: all {run.epochs} epochs are done; for more, raise --epochs")


def report_epoch(run: Run, found: Validation, stage: str, loss: float) -> None:
    progress, scores = run.progress, found.scores
    text = f"epoch {progress.epoch}/{run.epochs}: {stage}, val loss {scores['val_loss']:.4f}"
    if "val_cider" in scores:
        text += f", CIDEr {scores['val_cider']:.1f}, BLEU-4 {scores['val_bleu4']:.1f} (greedy)"
    if "val_accuracy" in scores:
        text += f", answers {scores['val_accuracy']:.1f} % right"
    say(f"{text}, {progress.seconds / 60:.1f} min")
    for name in run.data.captioned("val")[: run.settings.SAMPLE_IMAGES]:
        say(f"  {name}: {found.captions[name]}")
        say(f"    (a human: {run.data.captions[name][0]})")
    for name, question, answer in found.answers[: run.settings.SAMPLE_IMAGES]:
        say(f"  {name}: {question.text} {answer} (a human: {question.answer})")


def fit(run: Run, tracker: Tracker, pusher: HubPusher | None, stop: StopSignal) -> bool:
    """Train for the epochs that are left; each ends with validation and checkpoints.

    Returns:
        Whether it stopped before the end, because it was asked to.
    """
    progress = run.progress
    while progress.epoch < run.epochs:
        started = time.monotonic()
        if train_epoch(run, tracker, stop):
            progress.seconds += time.monotonic() - started
            write_for_training(run, run.output / "last.pt", {})
            return True
        loss = progress.loss_sum / max(1, progress.loss_count)
        stage = f"CIDEr of beams {loss:.1f}" if run.self_critical else f"train loss {loss:.4f}"
        values = {
            "train_beam_cider" if run.self_critical else "train_loss": loss,
            "train_learning_rate": run.schedule.get_last_lr()[0],
        }
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.loss_count = 0, 0.0, 0
        found = validate(run)
        scores = found.scores
        values |= scores
        samples = sample_texts(run, found)
        progress.history.append({"epoch": progress.epoch, **values, "samples": samples})
        progress.seconds += time.monotonic() - started
        report_epoch(run, found, stage, loss)
        best = save(run, scores)
        track_epoch(run, tracker, values)
        if best and pusher:
            push(run, pusher, best, progress.history[-1])
        elif pusher:
            pusher.retry()
    return False


def sample_texts(run: Run, found: Validation) -> dict[str, str]:
    """What was written about the first SAMPLE_IMAGES validation photos: captions, else answers."""
    texts = found.captions or {
        name: f"{question.text} {answer}" for name, question, answer in found.answers
    }
    return dict(itertools.islice(texts.items(), run.settings.SAMPLE_IMAGES))


def track_epoch(run: Run, tracker: Tracker, values: dict[str, float]) -> None:
    """Show an epoch's figures, and what has been written in all epochs up to it."""
    progress = run.progress
    shown = {name.replace("_", "/", 1): value for name, value in values.items()}
    tracker.log(shown | {"epoch": progress.epoch}, progress.step)
    rows = [
        (entry["epoch"], name, text)
        for entry in progress.history
        for name, text in entry["samples"].items()
    ]
    if rows:
        tracker.log_captions(rows, run.paths.images, progress.step)


def scores_of(entry: dict[str, Any]) -> dict[str, float]:
    """What an epoch in the history measured on the validation photos, as people call it."""
    return {label: entry[name] for name, label in MEASURES.items() if name in entry}


def push(run: Run, pusher: HubPusher, path: Path, entry: dict[str, Any]) -> None:
    """Hand the checkpoint of an epoch to the uploader, with all that makes it of use elsewhere."""
    settings, data = run.settings, run.data
    scored = min(settings.SCORED_IMAGES, len(data.splits["val"]))
    card = model_card(
        repo_id=settings.HF_REPO_ID,
        encoder=data.encoder["name"],
        encoder_revision=data.encoder["revision"],
        dataset=settings.DATASET,
        split=f"{settings.SPLIT} val",
        scorer=f"metrics.py, greedily, on {scored:,} photos; the loss on all",
        scores=scores_of(entry),
        command=redact(shlex.join(["python", "train.py", *settings.arguments])),
        samples=entry["samples"],
    )
    description = run.checkpoint(scores_of(entry)).description()
    del description["tokenizer"]  # it has files of its own
    files = run.tokenizer.to_files() | {
        "README.md": card,
        "config.json": json.dumps(description, indent=2) + "\n",
        "preprocessor_config.json": data.processor,
    }
    pusher.push(path, files, f"epoch {entry['epoch']}")


def push_best(run: Run, pusher: HubPusher) -> None:
    """At the end, let the newest on the Hub be the best, which need not be the last pushed."""
    entry = best_epoch(run)
    if entry["val_loss"] > run.progress.best_loss:
        push(run, pusher, best_checkpoint(run), entry)


def best_checkpoint(run: Run) -> Path:
    """The checkpoint whose captions, or else answers, were best, as far as they were scored."""
    if run.progress.best_cider > -math.inf:
        return best_path(run, "cider")
    if run.progress.best_accuracy > -math.inf:
        return best_path(run, "accuracy")
    return Path(run.progress.best_path)


def best_epoch(run: Run) -> dict[str, Any]:
    """The entry in the history of the epoch that gave `best_checkpoint`."""
    history = run.progress.history
    for measure in ("val_cider", "val_accuracy"):
        if scored := [entry for entry in history if measure in entry]:
            return max(scored, key=lambda entry: entry[measure])
    return min(history, key=lambda entry: entry["val_loss"])


def resume_command(run: Run) -> str:
    """The command of this run, going on from `last.pt`."""
    arguments = list(run.settings.arguments)
    for i, argument in enumerate(arguments):
        if argument.split("=")[0] == "--resume_checkpoint_path":
            del arguments[i : i + (1 if "=" in argument else 2)]
            break
    command = [*run.team.command(), "train.py", *arguments]
    return redact(shlex.join([*command, "--resume_checkpoint_path", str(run.output / "last.pt")]))


def draw(run: Run) -> None:
    """Draw what was learned; a picture that fails is named, and spoils nothing."""
    history, output = run.progress.history, run.output
    if not history:
        return
    try:
        draw_curves(history, output / "training_curves.png")
        draw_samples(history, run.paths.images, output / "samples.png", run.data.captions)
        print(f"pictures: {output / 'training_curves.png'}, {output / 'samples.png'}")
    except (UserError, OSError) as error:
        print(f"pictures can't be drawn: {error}")


def finish(run: Run) -> None:
    """Say where the result is and how to use it."""
    progress = run.progress
    if not progress.best_path:
        return  # no epoch was asked for, and `describe` said so
    print(f"\nbest checkpoint (validation loss {progress.best_loss:.4f}): {progress.best_path}")
    checkpoint = best_checkpoint(run)
    if progress.best_cider > -math.inf:
        print(f"best captions (greedy CIDEr {progress.best_cider:.1f}): {checkpoint}")
    photo = run.paths.images / (run.data.splits["test"] or run.data.splits["val"])[0]
    print("caption a picture:")
    line = ["python", "inference.py", "--image_path", str(photo), "--checkpoint", str(checkpoint)]
    print(f"  {shlex.join(line)}")


def command_line(argv: Sequence[str] | None) -> SimpleNamespace:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--demo", action="store_true", help="train on the built-in demo")
        prepare_dataset.add_arguments(parser)

    def preset(flags: argparse.Namespace) -> dict[str, Any]:
        if not flags.demo:
            return {}
        from demo.settings import DEMO  # what only the demo needs is loaded only for it

        return DEMO

    settings = load_settings(
        config,
        argv,
        __doc__.splitlines()[0],
        add_arguments=add_arguments,
        preset=preset,
        epilog=EXAMPLES,
    )
    settings.arguments = list(sys.argv[1:] if argv is None else argv)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    settings = command_line(argv)
    with joined(settings.DEVICE) as team, contextlib.ExitStack() as lock:
        team.on_rank0(lambda: claim_folders(settings, lock))
        if not team.leads:
            settings.WANDB_PROJECT = settings.HF_REPO_ID = ""
        saved = team.on_rank0(lambda: saved_by_job(settings, team))
        settings.RESUME_CHECKPOINT_PATH = saved or settings.RESUME_CHECKPOINT_PATH
        return train_and_report(settings, team)


def claim_folders(settings: SimpleNamespace, lock: contextlib.ExitStack) -> None:
    """Draw the demo's pictures if need be; keep OUTPUT_DIR until `lock` is released."""
    if settings.demo:
        from demo.scenes import build_dataset
        from demo.settings import OUTPUT, SCENES

        build_dataset(OUTPUT, **SCENES)
    lock.enter_context(sole_user(output_dir(settings)))


def train_and_report(settings: SimpleNamespace, team: Team) -> int:
    """The run itself, from the data to the last line; returns the exit code."""
    run = start_run(settings, team)
    describe(run)
    stop = StopSignal(team)
    if not run.progress.step and not run.progress.epoch:
        team.on_rank0(lambda: set_aside(run))
    tracker = start_tracking(run)
    pusher = HubPusher(settings.HF_REPO_ID, report=say) if settings.HF_REPO_ID else None
    try:
        stopped = fit(run, tracker, pusher, stop)
        if run.progress.history:
            tracker.log_checkpoint(best_checkpoint(run), scores_of(best_epoch(run)))
            if pusher and not stopped:
                push_best(run, pusher)
    finally:
        tracker.close()
        if pusher:
            pusher.close()
        stop.release()
    if team.leads:
        draw(run)
    if stopped:
        print(f"stopped; go on with: {resume_command(run)}")
        return 130
    if settings.demo and team.leads:
        from demo.report import report

        report(best_checkpoint(run), run.paths)
    finish(run)
    return 0


if __name__ == "__main__":
    run_script(main)
