"""Train a captioner: prepare the data, encode each photo once, then fit the decoder.

python train.py --demo                  # the built-in demo, minutes on a laptop
python train.py                         # what config.py says
python train.py --batch_size 64         # any setting, for one run
python train.py --preset small          # several at once, for some thousand photos
python train.py --resume_checkpoint_path ../assets/multimodal_image_transformer/last.pt
torchrun --nproc_per_node=4 train.py    # on four GPUs
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.train)

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import prepare_dataset
from corpus import Data, given_tokenizer, load_data, shards_to_train
from dataset import Batch, Prompt, make_batch, order_name, prompts_about, references_of
from device import autocast, release_memory
from distributed import StopSignal, joined
from features import prefetch
from generation import generate_cached
from metrics import score, vqa_accuracy
from model import CaptionModel
from options import GenerationOptions
from report import Ledger, Report, Update
from run import MEASURES, Run, Written, check_settings, find_checkpoint, keep_apart, output_dir
from self_critical import critical_epochs
from shards import Rows, StreamedRows
from tokenizer import ANSWER_ID
from utils import UserError, refused, run_script, sole_user

# --- The whole run --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Settings, team, data, model, and then epoch after epoch; returns the exit code."""
    settings = commands.train(argv)
    with joined(settings.DEVICE) as team, contextlib.ExitStack() as lock:
        team.on_rank0(lambda: claim_folders(settings, lock))
        begun = find_checkpoint(settings, team)
        device = team.device(settings.DEVICE)
        check_settings(settings, begun, team)  # what doesn't fit is said before photos are encoded
        shards_to_train(settings)  # and before any are downloaded
        given_tokenizer(settings, begun)
        paths = team.on_rank0(lambda: prepare_dataset.prepare(settings))
        data = load_data(settings, paths, device, team, begun)
        run = Run(settings, team, device, data, begun)
        take_place(run, data)
        report = Report(run, data, show_demo if settings.demo else None)
        with report, StopSignal(team) as stop:
            while run.progress.epoch < run.epochs:
                started = time.monotonic()
                ended = train_epoch(run, data, report.ledger(), stop)
                found = stop.unless_asked(lambda: validate(run, data)) if ended else None
                if found:
                    run.reranker = team.on_rank0(lambda: data.reranker) if settings.RERANK else None
                    run.end_epoch(*found, learning_rate(run, data))
                run.progress.seconds += time.monotonic() - started
                if not found:
                    run.save_training({})
                    return report.stopped()
                scores, written = found
                report.epoch(run.save(scores), written)
                release_memory()
            return report.finished()


def take_place(run: Run, data: Data) -> None:
    """Begin at the place in the epoch where a resumed run was, if its order is the same."""
    run.progress = progress = run.team.on_rank0(lambda: keep_apart(run))
    settings = run.settings
    if progress.batch and progress.order not in ("", order_of(run, data)):
        print(
            "resumed   with another order of photos (their list, captions, the batch size, seed, "
            f"processes or stage have changed): epoch {progress.epoch + 1} begins anew"
        )
        progress.batch, progress.loss_sum, progress.loss_count = 0, 0.0, 0
    texts = [(name, data.texts[name]) for name in sorted(data.val.names)]
    judged = order_name(data.tasks, texts, settings.SCORED_IMAGES, settings.NO_REPEAT_NGRAM)
    by = order_name(data.tasks, texts)  # which is all that the loss depends on
    # Older versions noted the photos and texts alone.
    if progress.judged not in ("", judged, by) and progress.epoch < run.epochs:
        measures = [*MEASURES]
        if progress.by == by:
            measures.remove("val_loss")
            other = "SCORED_IMAGES or NO_REPEAT_NGRAM: earlier scores are not compared"
        else:
            other = (
                "validation photos or texts: earlier epochs are not compared "
                "(was the split changed, photos now to validate may have been trained on)"
            )
        print(f"resumed   with other {other}")
        run.compare_from_here(measures)
    progress.judged, progress.by = judged, by


def order_of(run: Run, data: Data) -> str:
    """Names the order of the epoch's photos, and what its sums are of."""
    order = data.train.order(run.settings.BATCH_SIZE, run.settings.SEED, run.team)
    return order + "-self-critical" * run.self_critical


# --- One epoch ------------------------------------------------------------------------------


def train_epoch(run: Run, data: Data, ledger: Ledger, stop: StopSignal) -> bool:
    """The rest of the epoch under way; returns whether it came to its end.

    It breaks off, after a whole update, when any process of the team is asked to stop.
    """
    run.progress.order = order_of(run, data)
    # Without dropout in the self-critical stage: the gradient is of the model that searched.
    run.model.train(not run.self_critical)
    for group in batch_groups(run, data):
        ledger.note(update(run, data, group, stop.asked))
        run.progress.batch += len(group)
        if ledger.stopping:
            break
    ledger.settle()
    return not ledger.stopping


def update(
    run: Run, data: Data, group: Sequence[tuple[Batch, Tensor]], stop: bool = False
) -> Update:
    """One optimizer step on the batches of a group, unless loss or gradient are not finite.

    The gradient is that of the mean over the whole group and over all processes of a team, so
    that accumulation changes nothing but the RAM it takes, and their number nothing but time.
    """
    rate = learning_rate(run, data)
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = rate
    names = [name for batch, _ in group for name in batch.names]
    asked = answers_weight(run, data, group)
    totals = torch.zeros(5, device=run.device)
    for number, (batch, features) in enumerate(group, start=1):
        last = number == len(group)  # with which the gradients of a team are averaged
        with contextlib.nullcontext() if last else run.shared.no_sync():
            loss, figure, count, weight = run.shared(step_loss, run, data, batch, features, asked)
            loss.backward()
        totals[0] += figure
        totals[1] += count
        totals[4] += weight
    totals[2] += stop  # to assign a number would wait for a GPU
    totals[3] += len(names)
    totals = run.team.all_reduce(totals)
    figure, count, *_, weight = totals
    figure *= count / weight.clamp(min=1e-9)  # nats a token, whatever answers weigh, even 0
    scale = run.team.size / count.clamp(min=1)
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.GRADIENT_CLIP)
    bad = (~torch.isfinite(norm + figure)).float()
    fused = run.optimizer.defaults.get("fused") and run.device.type != "mps"  # PyTorch #186360
    if fused:
        run.optimizer.found_inf = bad  # where this is 1 it does nothing, and no GPU is waited for
    if fused or not bad:
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.update_ema(bad)
    run.progress.step += 1
    figures = torch.stack([*totals[:4], norm, bad])
    return Update(run.progress.step, len(group), names, figures, rate)


def learning_rate(run: Run, data: Data) -> float:
    """The learning rate of the next update.

    Linear warm-up, a cosine from LEARNING_RATE to MIN_LEARNING_RATE at the end of NUM_EPOCHS, and
    in the self-critical stage a line from SCST_LEARNING_RATE to MIN_LEARNING_RATE.
    """
    settings, progress = run.settings, run.progress
    per_epoch = run.updates_per_epoch(data.train)
    # By the place and not by the updates done, which another batch size had other numbers of.
    within = math.ceil(progress.batch / settings.GRADIENT_ACCUMULATION_STEPS)
    step = per_epoch * progress.epoch + within
    updates, critical = per_epoch * settings.NUM_EPOCHS, per_epoch * critical_epochs(settings)
    warmup = max(1, min(settings.WARMUP_STEPS, updates // 10))
    if run.self_critical:
        peak, share = settings.SCST_LEARNING_RATE, max(0.0, 1 - (step - updates) / critical)
    elif step < warmup:
        return settings.LEARNING_RATE * (step + 1) / warmup
    else:
        done = min(1.0, (step - warmup) / max(1, updates - warmup))
        peak, share = settings.LEARNING_RATE, 0.5 * (1 + math.cos(math.pi * done))
    floor = min(peak, settings.MIN_LEARNING_RATE)
    return floor + (peak - floor) * share


def batch_groups(run: Run, data: Data) -> Iterator[list[tuple[Batch, Tensor]]]:
    """What is left of the epoch under way, as the batches of each update."""
    settings, progress = run.settings, run.progress
    batches = data.train.batches(
        settings.BATCH_SIZE, settings.SEED, progress.epoch, progress.batch, run.team
    )
    pairs = with_features(run.device, data.train, batches, progress.epoch)
    while group := list(itertools.islice(pairs, settings.GRADIENT_ACCUMULATION_STEPS)):
        yield group


def with_features(
    device: torch.device,
    rows: Rows,
    batches: Iterable[Batch],
    epoch: int | None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches and their photos' features, read ahead, on the device."""

    def load(batch: Batch) -> tuple[Batch, Tensor]:
        batch, features = rows.load(batch, epoch)
        if cuda:  # so that no step waits for them to arrive
            batch = batch.pin()
            features = features if features.is_cuda else features.pin_memory()
        return batch, features

    cuda, streamed = device.type == "cuda", isinstance(rows, StreamedRows)  # which may encode
    # MPS crashes where two threads use it (PyTorch #197805).
    ahead = map if streamed and device.type == "mps" else prefetch
    for batch, features in ahead(load, batches):
        yield batch.to(device), features.to(device, non_blocking=cuda)


# --- The loss -------------------------------------------------------------------------------


def answers_weight(run: Run, data: Data, group: Sequence[tuple[Batch, Tensor]]) -> float:
    """What a token of an answer weighs in an update: beside a caption's token, or in the
    self-critical stage so that an answer's mean token counts beside a caption searched."""
    weight, beams = run.settings.QUESTION_WEIGHT, run.settings.SCST_BEAM_SIZE
    if not run.self_critical or "questions" not in data.tasks:
        return weight
    known = sum(name in data.critic.references for batch, _ in group for name in batch.names)
    tokens = sum(batch.asked.sum() for batch, _ in group)  # read once, as a GPU is waited for
    counts = torch.tensor([beams * known, tokens], dtype=torch.float32)
    captions, tokens = run.team.all_reduce(counts).clamp(min=1).tolist()
    return weight * captions / tokens


def step_loss(
    run: Run, data: Data, batch: Batch, features: Tensor, asked: float
) -> tuple[Tensor, Tensor | float, int, Tensor | int]:
    """What an update's gradient is of: the loss summed over a batch, in which an answer's token
    weighs `asked`.

    Returns:
        The loss, the figure to show, what that is summed over, and what these weigh in it: nats and
        tokens, or in the self-critical stage CIDEr-D and captions.
    """
    features = drop_patches(features, run.settings.PATCH_DROPOUT)
    if run.self_critical:
        loss, rewards, count = self_critical_loss(run, data, batch, features, asked)
        return loss, rewards, count, count
    if not batch.names:
        return no_loss(run.model), 0.0, 0, 0
    scales = None
    if len(data.tasks) > 1 and asked != 1:
        scales = torch.where(batch.asked, asked, 1.0)
    with autocast(run.device, run.dtype):
        loss = run.model.loss(features.float(), batch, run.settings.LABEL_SMOOTHING, scales)
    count = len(batch.targets)
    return loss, loss.detach(), count, count if scales is None else scales.sum()


def self_critical_loss(
    run: Run, data: Data, batch: Batch, features: Tensor, asked: float
) -> tuple[Tensor, float, int]:
    """The policy gradient's loss on the model's own beams, their summed rewards, and their number.

    Where there are questions, the answers' cross-entropy is added, or answering would be forgotten:
    in one pass with the beams, as they share the photos' memory.
    """
    with autocast(run.device, run.dtype):
        found, rewards, gains = data.critic.search(run.model, batch.names, features)
    texts = [data.train.groups[name] for name in batch.names]
    answers = [[ids for ids in group if ANSWER_ID in ids] for group in texts]
    rows = [beams + own for beams, own in zip(found, answers, strict=True)]
    taught = make_batch(batch.names, rows)
    if not len(taught.targets):
        return no_loss(run.model), 0.0, 0
    # An advantage times -log p has the policy's gradient; the beams' stand in their own order.
    scales = torch.full([len(taught.targets)], asked)
    scales[~taught.asked] = torch.tensor(gains)
    taught, scales = taught.to(run.device), scales.to(run.device)
    with autocast(run.device, run.dtype):  # anew: weights as the search cast them take no gradient
        loss = run.model.loss(features.float(), taught, scales=scales)
    return loss, sum(rewards), len(rewards)


def drop_patches(features: Tensor, share: float) -> Tensor:
    """Leave out a random share of each photo's vectors, but never the first, which may be CLS.

    Features are (images, patches, width). Each photo then looks different each time, so that it is
    not learned by heart, and the memory takes that much less time (docs/results.md).
    """
    if not share or not len(features):  # a process of a team may have no photo
        return features
    images, patches, _ = features.shape
    kept = round((patches - 1) * (1 - share))
    order = torch.rand(images, patches - 1, device=features.device).argsort(1)[:, :kept]
    places = torch.cat([order.new_zeros(images, 1), order.sort(1).values + 1], dim=1)
    return features[torch.arange(images, device=features.device).unsqueeze(1), places]


def no_loss(model: CaptionModel) -> Tensor:
    """A loss of 0 with a gradient for each weight, as the other processes wait for all of them."""
    return 0 * sum(parameter.sum() for parameter in model.parameters())


# --- Validation -----------------------------------------------------------------------------


@torch.no_grad()
def validate(run: Run, data: Data) -> tuple[dict[str, float], list[Written]]:
    """What the averaged weights are worth: scores by `MEASURES`, and what was written for them.

    Captions and answers are greedy, about the first SCORED_IMAGES (at least SAMPLE_IMAGES)
    validation photos.
    """
    settings, names = run.settings, data.splits["val"]
    run.average.eval()
    scores = {"val_loss": validation_loss(run, data)}
    if not math.isfinite(scores["val_loss"]):
        raise UserError(
            f"the validation loss is {scores['val_loss']}: lower --learning_rate or use "
            f"--precision fp32, and resume from {run.output / 'last.pt'}"
        )
    count = max(settings.SCORED_IMAGES, settings.SAMPLE_IMAGES)
    captions = prompts_about(data.texts, names, "captions")[:count]
    questions = prompts_about(data.texts, names[:count], "questions")
    plain = GenerationOptions()
    captioned = write(run, data, captions, replace(plain, no_repeat_ngram=settings.NO_REPEAT_NGRAM))
    answered = write(run, data, questions, plain)
    scored = {each.name: each.said for each in captioned[: settings.SCORED_IMAGES]}
    if len(scored) > 1:  # CIDEr tells photos apart
        found, _ = score(scored, references_of(data.texts, scored))
        scores |= {"val_cider": found["CIDEr-D"], "val_bleu4": found["BLEU-4"]}
    if answered and settings.SCORED_IMAGES:
        right = [vqa_accuracy(said, text.answers or [text.target]) for _, text, said in answered]
        scores["val_accuracy"] = 100 * sum(right) / len(right)
    # NumPy's numbers, and tensors, are none that a checkpoint may hold.
    scores = {name: float(figure) for name, figure in scores.items() if math.isfinite(figure)}
    return scores, captioned + answered


def validation_loss(run: Run, data: Data) -> float:
    """Cross-entropy per token on the validation photos, without label smoothing, in nats."""
    batches = data.val.batches(run.settings.BATCH_SIZE, seed=0, epoch=0, team=run.team)
    batches = (batch for batch in batches if batch.names)
    totals = torch.zeros(2, device=run.device)
    for batch, features in with_features(run.device, data.val, batches, None):
        with autocast(run.device, run.dtype):
            totals[0] += run.average.loss(features.float(), batch)
        totals[1] += len(batch.targets)
    summed, tokens = run.team.all_reduce(totals).tolist()
    return summed / tokens


def write(
    run: Run, data: Data, prompts: Sequence[Prompt], options: GenerationOptions
) -> list[Written]:
    """What the averaged weights say about photos, a share in each process of the team."""
    own = run.team.share(prompts)
    model, tokenizer = run.average, run.tokenizer
    found = generate_cached(model, tokenizer, data.val.features, own, options, dtype=run.dtype)
    said = run.team.gather([run.tokenizer.decode(each.tokens) for each in found])
    return [Written(*prompt, text) for prompt, text in zip(prompts, said, strict=True)]


# --- Beginning and stopping -----------------------------------------------------------------


def show_demo(checkpoint: Path, data: Data) -> None:
    from demo.report import report

    report(checkpoint, data.paths)


def claim_folders(settings: SimpleNamespace, lock: contextlib.ExitStack) -> None:
    """Draw the demo's pictures if need be; keep OUTPUT_DIR until `lock` is released."""
    if settings.demo:
        from demo.scenes import build_dataset
        from demo.settings import OUTPUT, SCENES

        with refused("the demo's pictures can't be drawn: copy this project to a folder of yours"):
            OUTPUT.mkdir(exist_ok=True)
        build_dataset(OUTPUT, **SCENES)
    lock.enter_context(sole_user(output_dir(settings)))


if __name__ == "__main__":
    run_script(main)
