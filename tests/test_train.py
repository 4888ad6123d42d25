"""Whole runs of the real scripts on small data: training, resuming, captioning, scoring."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import commands
import corpus
import inference
import prepare_dataset
import train
from checkpoint import load_checkpoint
from corpus import Data, load_data
from dataset import make_batch
from distributed import ALONE, Team
from generation import Hypothesis, generate
from inference import load_captioner
from report import Ledger, Report
from run import Run
from self_critical import Critic, advantages
from shards import StreamedRows
from tests.conftest import (
    REPO,
    Waits,
    build_encoder,
    run,
    small_flags,
    write_photos,
    write_questions,
)
from tests.forked import Forked
from tokenizer import ANSWER_ID, END_ID, SPECIAL_TOKENS, START_ID
from utils import UserError, sole_user


def best(data: Path, suffix: str) -> Path:
    return max(data.glob(f"captioner_epoch_*{suffix}"), key=lambda path: path.stat().st_mtime)


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = load_checkpoint(first), load_checkpoint(second)
    pairs = [(one.model.state_dict(), two.model.state_dict())]
    pairs.append((one.training["weights"], two.training["weights"]))
    for ours, theirs in pairs:
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def test_a_run_leaves_what_it_promises(trained, encoder_dir):
    for suffix in (".pt", ".safetensors"):
        assert re.fullmatch(r"captioner_epoch_\d+_val_loss_\d+\.\d{4}", best(trained, suffix).stem)
    assert {
        "last.pt",
        "captioner_best_cider.safetensors",
        "vocab.json",
        "merges.txt",
        "splits.json",
        "training_curves.png",
        "samples.png",
    } <= {path.name for path in trained.iterdir()}
    state = load_checkpoint(trained / "last.pt").training
    assert state["progress"]["epoch"] == 2 and state["optimizer"]["state"]
    assert not list(trained.rglob("*.tmp"))
    weights = load_file(best(trained, ".safetensors"))
    assert not any("tower" in name or "encoder" in name for name in weights)


def test_a_program_trains_on_a_thread_of_its_own(tmp_path, trained, encoder_dir):
    flags = [*small_flags(trained, encoder_dir), "--output_dir", str(tmp_path), "--epochs", "1"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.main, flags).result() == 0


def test_a_machine_without_a_compiler_is_told_so(tmp_path, trained, encoder_dir):
    flags = [*small_flags(trained, encoder_dir), "--output_dir", tmp_path, "--compile", "true"]
    result = run("train.py", *flags, CXX=str(tmp_path / "none"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"error: torch.compile fails \(.*needs g\+\+, or leave out", result.stderr)


def test_the_encoder_is_untouched_by_training(tmp_path, trained, encoder_dir):
    again = build_encoder("vit", tmp_path / "same_seed")
    before, after = (load_file(d / "model.safetensors") for d in (again, encoder_dir))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("critical", [False, True])
def test_accumulation_changes_memory_only(tmp_path, encoder_dir, capsys, critical):
    """Two batches in one update move the weights as their union does."""
    data = write_questions(write_photos(tmp_path / "data", 24))
    asked = json.loads((data / "questions.json").read_text())
    few = {name: asked[name] for name in sorted(asked)[::3]}  # batches have some, or none
    (data / "questions.json").write_text(json.dumps(few))
    flags = [*small_flags(data, encoder_dir), "--dropout", "0", "--tasks", "captions,questions"]
    flags += ["--epochs", "0", "--scst_epochs", "1"] * critical
    weights = []
    for sizes in ((8,), (3, 5), (2, 2, 4)):
        state, found = start(*flags)
        rows, group, first = found.train, [], 0
        for size in sizes:
            names = rows.names[first : first + size]
            batch = make_batch(names, rows.captions[first : first + size])
            group.append(rows.load(batch, None))
            first += size
        done = train.update(state, found, group)
        loss = (done.figures[0] / done.figures[1]).item()
        moved = [p.detach().clone() for p in state.model.parameters()]
        weights.append([loss, done.figures[4].item(), *moved])
    state.settings.GRADIENT_ACCUMULATION_STEPS = 3
    assert len([*train.batch_groups(state, found)]) == state.updates_per_epoch(rows) == 2
    for other in weights[1:]:
        assert other[:2] == pytest.approx(weights[0][:2], rel=1e-4)
        for one, two in zip(weights[0][2:], other[2:], strict=True):
            torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)


def start(*flags: object) -> tuple[Run, Data]:
    """A run that is ready for its first step, and its data."""
    settings, device = commands.train([str(flag) for flag in flags]), torch.device("cpu")
    begun = train.find_checkpoint(settings, ALONE)
    data = load_data(settings, prepare_dataset.prepare(settings), device, ALONE, begun)
    return Run(settings, ALONE, device, data, begun), data


def start_state(tmp_path: Path, encoder_dir: Path, *more: object) -> tuple[Run, Data]:
    data = write_photos(tmp_path / "data", 24)
    return start(*small_flags(data, encoder_dir), *more)


@pytest.mark.fault
def test_a_split_written_for_another_run_meanwhile_changes_nothing(
    tmp_path, encoder_dir, monkeypatch
):
    """As of one with other tasks, which prepares the same data while this one reads captions."""
    load = corpus.load_texts

    def written_after(paths, tasks, **how):
        splits = json.loads(paths.splits.read_text())
        paths.splits.write_text(json.dumps(splits | {"train": splits["train"][:2]}))
        return load(paths, tasks, **how)

    monkeypatch.setattr(corpus, "load_texts", written_after)
    assert len(start_state(tmp_path, encoder_dir)[1].train) > 2


def first_batches(state: Run, data: Data, count: int):
    state.model.train()
    groups = itertools.islice(train.batch_groups(state, data), count)
    return [pair for group in groups for pair in group]


def ledger_of(state: Run) -> Ledger:
    return Ledger(state, 6, SimpleNamespace(log=lambda *_: None))


def snapshot(state: Run) -> list[torch.Tensor]:
    """Copies of the weights, their average, and all that the optimizer remembers of them."""
    moments = [value for kept in state.optimizer.state.values() for value in kept.values()]
    tensors = [*state.model.parameters(), *state.average.parameters(), *moments]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.fault(count=2)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path, encoder_dir, capsys):
    state, data = start_state(tmp_path, encoder_dir, "--max_bad_steps", 2)
    good, (batch, features), second = first_batches(state, data, 3)
    ledger = ledger_of(state)
    ledger.note(train.update(state, data, [good]))
    before, loss_sum = snapshot(state), state.progress.loss_sum
    features[0, 0, 0] = math.nan
    ledger.note(train.update(state, data, [(batch, features)]))
    assert all(torch.equal(*pair) for pair in zip(before, snapshot(state), strict=True))
    assert state.progress.loss_sum == loss_sum and state.progress.bad_steps == 1
    said = capsys.readouterr().out
    assert "step 2" in said and all(name in said for name in batch.names)
    ledger.note(train.update(state, data, [second]))
    assert state.progress.bad_steps == 0
    assert not all(torch.equal(*pair) for pair in zip(before, snapshot(state), strict=True))
    ledger.note(train.update(state, data, [(batch, features)]))
    with pytest.raises(UserError, match="2 steps in a row"):
        ledger.note(train.update(state, data, [(batch, features)]))


class Mps(str):
    """The CPU, which says that it is Apple's GPU."""

    type = "mps"


@pytest.mark.parametrize("kind", ["a Mac's", torch.optim.AdamW, torch.optim.Adafactor])
def test_a_step_that_is_not_finite_is_left_out_where_the_optimizer_does_not_look(
    tmp_path, encoder_dir, kind
):
    state, data = start_state(tmp_path, encoder_dir)
    (pair,) = first_batches(state, data, 1)
    if kind == "a Mac's":
        state.device = Mps("cpu")
    else:
        state.optimizer = kind(state.model.parameters())
    before = snapshot(state)
    train.update(state, data, [pair])
    assert not all(torch.equal(*each) for each in zip(before, snapshot(state), strict=True))
    before = snapshot(state)
    pair[1][0, 0, 0] = math.nan
    train.update(state, data, [pair])
    assert all(torch.equal(*each) for each in zip(before, snapshot(state), strict=True))


def test_batches_for_a_mac_are_waited_for(tmp_path, encoder_dir, monkeypatch):
    state, data = start_state(tmp_path, encoder_dir)
    state.device, move, how = Mps("cpu"), torch.Tensor.to, []

    def spy(tensor: torch.Tensor, *to: object, **options: object) -> torch.Tensor:
        how.append((options.get("non_blocking"), threading.current_thread()))
        return move(tensor, *to, **options)

    monkeypatch.setattr("torch.Tensor.to", spy)
    first_batches(state, data, 1)
    assert {*how} == {(False, threading.main_thread())}


def test_photos_of_a_stream_are_encoded_on_a_macs_only_thread():
    rows, on = object.__new__(StreamedRows), []
    rows.load = lambda batch, _: (on.append(threading.current_thread()), (batch, torch.ones(1)))[1]
    batches = [make_batch(["a"], [[[1, 2, 3]]])] * 3
    assert len([*train.with_features(Mps("cpu"), rows, batches, 0)]) == 3
    assert {*on} == {threading.main_thread()}


class OneOfTwo(Team):
    """A process of a team whose other one has five photos in each update."""

    def all_reduce(self, figures: torch.Tensor) -> torch.Tensor:
        return figures + torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0])


def test_photos_of_all_processes_are_counted(tmp_path, encoder_dir):
    """Shares of a batch may be unlike: the leader's own says nothing of the others'."""
    state, data = start_state(tmp_path, encoder_dir)
    [(batch, features)] = first_batches(state, data, 1)
    state.team, ledger = OneOfTwo(), ledger_of(state)
    ledger.note(train.update(state, data, [(batch, features)]))
    assert ledger.photos == len(batch.names) + 5


def test_of_a_team_one_process_tracks_and_pushes(tmp_path, encoder_dir, monkeypatch, capsys):
    flags = "--wandb_project", "mine", "--hf_repo_id", "me/captioner"
    state, data = start_state(tmp_path, encoder_dir, *flags)
    told: list[str] = []
    other = SimpleNamespace(run_id="", close=lambda: None)
    monkeypatch.setattr("report.Tracker", lambda *_, project, **__: told.append(project) or other)
    monkeypatch.setattr("report.HubPusher", lambda name, **_: told.append(name) or other)
    for rank in (0, 1):
        state.team = Team(rank, 2)
        Report(state, data, None)
    assert told == ["mine", "me/captioner", "", ""]
    state.team = ALONE
    with pytest.raises(RuntimeError), Report(state, data, None) as said:
        raise RuntimeError
    assert "to go on" not in capsys.readouterr().out  # as nothing is saved
    state.settings.arguments = ["--resume_checkpoint_path", str(state.output / "last.pt")]
    assert said._resuming().count("last.pt") == 1  # gone on with again and again


def test_accounts_kept_one_step_late_are_the_same(tmp_path, encoder_dir):
    """On a GPU the figures of a step are read while the next one runs."""
    sums = []
    for late in (0, 1):
        state, data = start_state(tmp_path / str(late), encoder_dir)
        ledger = ledger_of(state)
        ledger.late, state.progress.step = late, 18
        pairs = first_batches(state, data, 3)
        for pair in pairs:
            ledger.note(train.update(state, data, [pair]))
        assert len(ledger.waiting) == late
        ledger.settle()
        assert ledger.photos == sum(len(batch.names) for batch, _ in pairs)
        assert 0 < ledger.counted < state.progress.loss_count  # since the rate of step 20
        sums.append((state.progress.loss_sum, state.progress.loss_count))
        state.end_epoch({}, [], 0.0)
        assert state.progress.loss_sum == state.progress.loss_count == 0  # the next one's
    assert sums[0] == sums[1]


class OnGpu(torch.Tensor):
    """A tensor of the CPU's, which says that it is a GPU's."""

    is_cuda = True


def test_a_gpus_figures_are_on_their_way_before_the_next_step_begins(
    tmp_path, encoder_dir, monkeypatch
):
    state, data = start_state(tmp_path, encoder_dir)
    ledger, told = ledger_of(state), []

    def record_event() -> SimpleNamespace:
        step = state.progress.step
        told.append(f"copied {step}")
        return SimpleNamespace(synchronize=lambda: told.append(f"waited for {step}"))

    monkeypatch.setattr("torch.cuda.current_stream", lambda _: stream)
    stream = SimpleNamespace(record_event=record_event)
    ledger.late = 1
    for pair in first_batches(state, data, 2):
        with Waits() as waits:
            update = train.update(state, data, [pair])
        assert not waits.found
        update.figures = update.figures.as_subclass(OnGpu)
        ledger.note(update)
    ledger.settle()
    assert told == ["copied 1", "copied 2", "waited for 1", "waited for 2"]


def test_the_average_follows_the_weights(tmp_path, encoder_dir):
    state, data = start_state(tmp_path, encoder_dir, "--ema_decay", 0.15)
    expected = [weight.detach().clone() for weight in state.average.parameters()]
    for step, pair in enumerate(first_batches(state, data, 3)):
        train.update(state, data, [pair])
        decay = min(0.15, (1 + step) / (10 + step))
        weights = [weight.detach() for weight in state.model.parameters()]
        expected = [
            decay * old + (1 - decay) * new for old, new in zip(expected, weights, strict=True)
        ]
    for ours, theirs in zip(state.average.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)


def test_without_an_average_the_weights_themselves_are_saved(tmp_path, encoder_dir):
    state, data = start_state(tmp_path, encoder_dir, "--ema_decay", 0, "--dropout", 0.5)
    for pair in first_batches(state, data, 2):
        train.update(state, data, [pair])
    assert state.checkpoint({}).model is state.model
    assert state.checkpoint({}).generation.rerank == 0  # without what it takes
    assert train.validate(state, data) == train.validate(state, data)  # without dropout
    state.settings.SCORED_IMAGES, state.settings.SAMPLE_IMAGES = 0, 2
    scores, written = train.validate(state, data)
    assert [*scores] == ["val_loss"] and len(written) == 2


@pytest.mark.parametrize("tasks", ["captions", "captions,questions"])
def test_the_self_critical_gradient_is_the_plain_policy_gradient(tmp_path, encoder_dir, tasks):
    flags = ["--epochs", 0, "--scst_epochs", 1, "--scst_beam_size", 3, "--question_weight", 4]
    photos = write_questions(write_photos(tmp_path / "data", 24))
    state, data = start(*small_flags(photos, encoder_dir), *flags, "--tasks", tasks)
    ((batch, features),) = first_batches(state, data, 1)
    state.model.eval()
    weight = train.answers_weight(state, data, [(batch, features)])
    loss, summed, count = train.self_critical_loss(state, data, batch, features, weight)
    gradients = torch.autograd.grad(loss, list(state.model.parameters()))

    plain, total, captions = 0.0, 0.0, 0
    found = generate(state.model, features.float(), data.critic.options)
    for row, group in enumerate(found):
        reward = data.critic.rewards(batch.names[row], group)
        for k, caption in enumerate(group):
            total, captions = total + reward[k], captions + 1
            others = reward[:k] + reward[k + 1 :]
            advantage = reward[k] - sum(others) / max(1, len(others)) if others else 0.0
            ids = [START_ID, *caption.tokens] + [END_ID] * caption.ended
            alone = make_batch([batch.names[row]], [[ids]])
            likely = -state.model.loss(features[row : row + 1].float(), alone)
            plain = plain - advantage / 100 * likely
    if "questions" in tasks:
        rows = [[ids for ids in data.train.groups[n] if ANSWER_ID in ids] for n in batch.names]
        asked = make_batch(batch.names, rows)
        answers = state.model.loss(features.float(), asked)
        plain = plain + 4 * captions / len(asked.targets) * answers
    assert (summed, count) == (pytest.approx(total), captions)
    expected = torch.autograd.grad(plain, list(state.model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_patches_are_left_out_at_random_and_never_the_first():
    features = torch.arange(2 * 9.0).view(2, 9, 1).expand(-1, -1, 3)
    torch.manual_seed(0)
    first, other = (train.drop_patches(features, 0.5) for _ in range(2))
    assert first.shape == (2, 5, 3) and not torch.equal(first, other)
    for kept, given in zip(first, features, strict=True):
        assert torch.equal(kept[0], given[0]) and set(kept[:, 0].tolist()) <= set(
            given[:, 0].tolist()
        )
        assert (kept[1:, 0] > kept[:-1, 0]).all()  # once each, in order
    assert train.drop_patches(features, 0) is features
    assert train.drop_patches(features[:, :1], 0.5).shape == (2, 1, 3)  # one vector a photo
    assert train.drop_patches(torch.empty(0), 0.5).shape == (0,)


def test_self_critical_training_raises_its_reward(tmp_path, encoder_dir):
    """Of captions of some skill, those that are rewarded become likelier."""
    state, data = start_state(tmp_path, encoder_dir, "--epochs", 16, "--scst_epochs", 8)
    means = []
    while state.progress.epoch < 24:
        train.train_epoch(state, data, ledger_of(state), SimpleNamespace(asked=False))
        means.append(state.progress.loss_sum / state.progress.loss_count)
        state.end_epoch({}, [], 0.0)
    assert means[16] > 30 and means[-1] > means[16] + 5


def test_the_critic_knows_a_human_caption_and_its_end(tmp_path, encoder_dir, monkeypatch):
    state, data = start_state(tmp_path, encoder_dir, "--epochs", 0, "--scst_epochs", 1)
    name = data.train.names[0]
    human, other = state.tokenizer.encode([data.texts[name][0].target, "on"])
    hypotheses = [
        Hypothesis(ids, 0.0, 0.0, ended)
        for ids, ended in ((human, True), (human, False), (other, True))
    ]
    whole, cut, poor = data.critic.rewards(name, hypotheses)
    assert whole > cut > poor
    # A decoder that has learned nothing doesn't know when to end.
    found, *_ = data.critic.search(state.model, [name], data.cache.read([(name, 0)]))
    captions = [
        state.tokenizer.encode([t.target])[0] for n in data.train.names for t in data.texts[n]
    ]
    assert max(map(len, found[0])) == 2 + max(map(len, captions)) < 20
    searched: list[torch.Tensor] = []
    beams = [[hypotheses[0]]]
    monkeypatch.setattr("self_critical.generate", lambda _, x, __: searched.append(x) or beams)
    pair = torch.arange(2.0).view(2, 1, 1)
    found, *_ = data.critic.search(state.model, ["asked.png", name], pair)
    assert searched[0].tolist() == [[[1.0]]] and not found[0]  # of a photo without captions
    assert advantages([3.0, 1.0, 2.0]) == [1.5, -1.5, 0.0]
    assert advantages([7.0]) == [0.0]
    with pytest.raises(UserError, match="is 0 for every caption here .* --scst_epochs 0"):
        Critic(data.tokenizer, {"a.png": ["a dog"], "b.png": ["a dog"]}, beam_size=2, longest=9)
    with pytest.raises(UserError, match="no photo to train on has a caption.* --scst_epochs 0"):
        Critic(data.tokenizer, {}, beam_size=2, longest=9)


def start_and_stop(flags: list[str], when: str, *signals: int) -> subprocess.CompletedProcess:
    """Start a training and send it signals when a line that holds `when` appears."""
    with Forked("train.py", *flags) as process:
        assert any(when in line for line in process.stdout)
        for number in signals:
            process.send_signal(number)
        said = process.communicate(120)
        return subprocess.CompletedProcess(flags, process.returncode, *said)


@pytest.mark.parametrize("epochs", [(6, 0), (2, 4)], ids=["cross-entropy", "self-critical"])
def test_resume_equals_uninterrupted(tmp_path, encoder_dir, epochs):
    whole = write_photos(tmp_path / "whole", 24)
    flags = ["--epochs", str(epochs[0]), "--scst_epochs", str(epochs[1]), "--dropout", "0.1"]
    assert run("train.py", *small_flags(whole, encoder_dir), *flags).returncode == 0

    cut = write_photos(tmp_path / "cut", 24)
    arguments = [*small_flags(cut, encoder_dir), *flags]
    # A closed terminal tells of itself, and so does its shell.
    signals = [signal.SIGHUP] * 2 if epochs[1] else [signal.SIGTERM]
    stopped = start_and_stop(arguments, "epoch 2/6", *signals)
    assert stopped.returncode == 130, stopped.stderr
    assert re.search(r"go on with: \S*python train.py", stopped.stdout)
    progress = load_checkpoint(cut / "last.pt").training["progress"]
    assert 2 <= progress["epoch"] < 6
    resumed = run("train.py", *arguments, "--resume_checkpoint_path", cut / "last.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed   after" in resumed.stdout and "resumed   with" not in resumed.stdout
    assert_same_weights(whole / "last.pt", cut / "last.pt")
    one, two = (load_checkpoint(d / "last.pt").training for d in (whole, cut))
    assert one["progress"]["step"] == two["progress"]["step"]
    history = one["progress"]["history"]
    assert history == two["progress"]["history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert ["train_loss" in entry for entry in history] == [n < epochs[0] for n in range(6)]
    assert ["train_beam_cider" in entry for entry in history] == [n >= epochs[0] for n in range(6)]
    assert all(len(entry["samples"]) == 4 for entry in history)

    # A control: another course of chance gives other weights, so that the equality says something.
    control = write_photos(tmp_path / "control", 24)
    arguments = [*small_flags(control, encoder_dir), *flags, "--seed", "1"]
    assert run("train.py", *arguments).returncode == 0
    with pytest.raises(AssertionError):
        assert_same_weights(whole / "last.pt", control / "last.pt")


@pytest.mark.fault
def test_stopped_while_it_validates_a_run_keeps_the_epoch(
    tmp_path, encoder_dir, monkeypatch, capsys
):
    """It validates again when it goes on: at once, as no batch of the epoch is left."""
    whole, cut = (write_photos(tmp_path / name, 24) for name in ("whole", "cut"))
    flags = ("--epochs", 3, "--dropout", 0.1)
    arguments = [*small_flags(cut, encoder_dir), *map(str, flags)]
    assert run("train.py", *small_flags(whole, encoder_dir), *flags).returncode == 0
    validate, calls = train.validate, itertools.count(1)

    def stopped(*given):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on validating")
        return validate(*given)

    monkeypatch.setattr(train, "validate", stopped)
    assert train.main(arguments) == 130
    assert "stopped; go on with: " in capsys.readouterr().out
    progress = load_checkpoint(cut / "last.pt").training["progress"]
    assert progress["epoch"] == 1 and progress["batch"] == progress["step"] / 2 > 0
    resumed = run("train.py", *arguments, "--resume_checkpoint_path", cut / "last.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 3/3" in resumed.stdout
    assert_same_weights(whole / "last.pt", cut / "last.pt")
    one, two = (load_checkpoint(d / "last.pt").training["progress"] for d in (whole, cut))
    assert one["history"] == two["history"] and one["step"] == two["step"]


@pytest.mark.fault
def test_two_trainings_in_one_folder(tmp_path, encoder_dir):
    data = write_photos(tmp_path / "data", 24)
    with sole_user(data):
        second = run("train.py", *small_flags(data, encoder_dir))
    assert second.returncode == 1
    assert f"another run is writing to {data}" in second.stderr and "--output_dir" in second.stderr
    assert not list(data.glob("*.pt")) and not list(data.glob("*.safetensors"))
    assert run("train.py", *small_flags(data, encoder_dir), "--epochs", 1).returncode == 0


@pytest.mark.fault(count=4)
def test_resuming_from_the_wrong_file(tmp_path, trained, encoder_dir):
    flags = small_flags(trained, encoder_dir)
    output = ["--output_dir", tmp_path / "out"]

    def resume(path, *more):
        return run("train.py", *flags, *output, "--resume_checkpoint_path", path, *more)

    missing = resume(tmp_path / "absent.pt", "--epochs", "1")
    assert missing.returncode == 0 and "training from scratch" in missing.stdout
    for_use = resume(best(trained, ".safetensors"))
    assert for_use.returncode == 1 and "for use only" in for_use.stderr
    other = resume(trained / "last.pt", "--decoder_layers", "3")
    assert other.returncode == 1 and "(DECODER_LAYERS 2 there, 3 here)" in other.stderr
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((trained / "last.pt").read_bytes()[:-2000])
    broken = resume(damaged)
    assert broken.returncode == 1 and "damaged.pt is damaged" in broken.stderr
    done = resume(trained / "last.pt")
    assert done.returncode == 0 and "nothing" in done.stdout
    assert "Traceback" not in for_use.stderr + other.stderr + broken.stderr


def test_inference_needs_no_config(tmp_path, trained):
    """From another folder, without config.py: the checkpoint tells all."""
    lonely = tmp_path / "project"
    lonely.mkdir()
    for path in REPO.glob("*.py"):
        if path.name != "config.py":
            (lonely / path.name).write_text(path.read_text())
    photo, checkpoint = trained / "images" / "000.png", best(trained, ".safetensors")
    result = run(
        lonely / "inference.py", "--image_path", photo, "--checkpoint", checkpoint, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    caption = result.stdout.strip()
    assert caption and "<" not in caption and "\n" not in caption
    pt = run("inference.py", photo, "--checkpoint", best(trained, ".pt"))
    assert pt.stdout.strip() == caption


def test_a_checkpoint_wants_its_own_encoder(tmp_path, trained):
    checkpoint = trained / "captioner_best_cider.safetensors"
    other = build_encoder("siglip", tmp_path / "other")
    with pytest.raises(UserError, match="not the one"):
        load_captioner(checkpoint, encoder=str(other))
    moved = build_encoder("vit", tmp_path / "moved")
    assert load_captioner(checkpoint, encoder=str(moved)).encoder.width == 32


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "none"])
def test_a_checkpoint_that_is_not_there_is_named(trained, name):
    photo = str(trained / "images" / "000.png")
    with pytest.raises(UserError, match=f"no checkpoint {name}"):
        inference.main(["--image_path", photo, "--checkpoint", name])


MISTAKES = {
    "empty captions": ("captions.json", "{}", [], "holds no captions"),
    "no encoder": (None, None, ["--encoder_model_name", "nobody/nothing"], "nobody/nothing"),
    "heads": (None, None, ["--decoder_heads", "5"], "DECODER_HEADS"),
    "a gap in the vocabulary": ("vocab.json", "GAP", ["--vocab_file", "vocab.json"], "ids are not"),
    "words alone": ("vocab.json", "WORDS", ["--vocab_file", "vocab.json"], "of the 256 bytes"),
    "a folder in the prefix": (None, None, ["--checkpoint_prefix", "a/b"], "CHECKPOINT_PREFIX"),
    "a folder to resume": (None, None, ["--resume_checkpoint_path", "."], "last.pt"),
    "no split file": (None, None, ["--split", "karpathy"], "--split ratio"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_a_message(photos, encoder_dir, name):
    file, content, more, message = MISTAKES[name]
    if file == "vocab.json":
        words = dict.fromkeys([*SPECIAL_TOKENS, "a", "b"])
        table = {word: number for number, word in enumerate(words)}
        content = json.dumps(table | ({"b": 9} if content == "GAP" else {}))
        (photos / "merges.txt").write_text("#version: 0.2\n")
        more = ["--vocab_file", photos / file, "--merges_file", photos / "merges.txt"]
    if file:
        (photos / file).write_text(content)
    result = run("train.py", *small_flags(photos, encoder_dir), *more)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_training_can_begin_with_a_checkpoint(tmp_path, trained, encoder_dir):
    data = write_photos(tmp_path / trained.name)
    checkpoint = load_checkpoint(best(trained, ".safetensors"))
    flags = [*small_flags(data, encoder_dir), "--start_checkpoint", best(trained, ".pt")]
    own = ["--learning_rate", 1e-12, "--dropout", 0.3]  # with which it may be trained further
    result = run("train.py", *flags, "--epochs", 1, *own)
    assert result.returncode == 0, result.stderr
    assert "beginning with the decoder and tokenizer of" in result.stdout
    assert "another split" not in result.stdout and "will be poor" not in result.stdout
    ours = load_checkpoint(best(data, ".safetensors"))
    assert ours.scores["val_loss"] == pytest.approx(checkpoint.scores["val_loss"], abs=1e-4)
    assert ours.tokenizer.to_json() == checkpoint.tokenizer.to_json()
    assert ours.model.config.dropout == 0.3
    more = ["--resume_checkpoint_path", data / "last.pt", "--epochs", 2]
    resumed = run("train.py", *flags[:-2], *more)
    assert resumed.returncode == 0 and "DROPOUT 0.1 (was 0.3)" in resumed.stdout
    began = load_checkpoint(data / "last.pt").settings["START_CHECKPOINT"]
    assert began == best(trained, ".pt").name
    other = ["--decoder_layers", 1, "--output_dir", tmp_path / "other", "--feature_views", 2]
    other = run("train.py", *flags, *other)
    assert other.returncode == 1 and "(DECODER_LAYERS 2 there, 1 here)" in other.stderr
    assert "to make" not in other.stdout  # said before photos are encoded
    other = ["--encoder_layers=-2", "--encoder_image_size=48", "--output_dir", tmp_path / "other"]
    other = run("train.py", *flags, *other)
    assert other.returncode == 1 and "encoder layers [-1] there, [-2] here" in other.stderr
    assert "encoder image_size None there, 48 here" in other.stderr
    assert "encoder preprocessing.size.height 32 there, 48 here" in other.stderr
    assert len([*(data / "features").iterdir()]) == 1  # said before photos were encoded anew
    other = run("train.py", *flags, "--epochs", 0, "--train_split_ratio", 0.5)
    assert "learned from another split of these photos (TRAIN_SPLIT_RATIO = 0.7)" in other.stdout
    missing = run("train.py", *flags, "--start_checkpoint", "nowhere.safetensors")
    assert missing.returncode == 1 and "Traceback" not in missing.stderr


def test_a_new_training_keeps_the_files_of_the_one_before(tmp_path, trained, encoder_dir):
    data = write_photos(tmp_path / "data")
    flags = small_flags(data, encoder_dir)
    names = ["last.pt", "captioner_best_cider.safetensors"]
    for name in names:
        (data / name).write_bytes((trained / name).read_bytes())
    kept = {name: (data / name).read_bytes() for name in names}
    result = run("train.py", *flags, "--seed", 1)
    assert result.returncode == 0 and "earlier training's files are kept" in result.stdout
    for name in names:
        before = (data / f"previous_1_{name}").read_bytes()
        assert before == kept[name] != (data / name).read_bytes()


def test_several_captions_of_each_picture(trained):
    command = [
        "inference.py",
        "--checkpoint",
        trained / "captioner_best_cider.safetensors",
        "--json",
        "--beam_size",
        4,
    ]
    single = trained / "images" / "000.png"
    one = run(*command, "--image_path", single, "--n_best", 3)
    assert one.returncode == 0, one.stderr
    *lines, last = one.stdout.splitlines()
    best = json.loads(last)["000.png"]
    assert lines == best and 1 < len(best) <= 3 and len(set(best)) == len(best)
    plain = run(*command, "--image_path", single)
    assert json.loads(plain.stdout.splitlines()[-1]) == {"000.png": best[0]}
    many = run(*command, "--image_path", single, "--n_best", 9)
    assert many.returncode == 1 and "add --beam_size 9" in many.stderr
    many = run(*command, "--image_path", single, "--n_best", 9, "--groups", 2, "--beam_size", 2)
    assert "add --beam_size 10" in many.stderr  # a multiple of the groups


def test_a_score_may_be_a_number_of_numpy_or_torch_and_counts_if_it_is_one(
    tmp_path, encoder_dir, monkeypatch
):
    state, data = start_state(tmp_path, encoder_dir)
    found = {"CIDEr-D": np.float64(3.5), "BLEU-4": math.nan}
    monkeypatch.setattr("train.score", lambda *_: (found, {}))
    monkeypatch.setattr("train.validation_loss", lambda *_: torch.tensor(2.0))
    scores, written = train.validate(state, data)
    assert scores == {"val_loss": 2.0, "val_cider": 3.5}
    state.end_epoch(scores, written, 0.1)
    state.save(scores)
    last = load_checkpoint(state.output / "last.pt")
    assert last.training["progress"]["history"] == state.progress.history


def test_a_resumed_run_takes_the_rate_and_decay_that_are_set(tmp_path, encoder_dir, capsys):
    data = write_photos(tmp_path / "data")
    flags = small_flags(data, encoder_dir)
    first = run("train.py", *flags, "--epochs", 1)
    assert first.returncode == 0, first.stderr
    more = ["--epochs", 3, "--learning_rate", 1e-4, "--weight_decay", 0.5]
    rates = []
    for resume in ("none", data / "last.pt"):
        arguments = [*flags, *more, "--resume_checkpoint_path", resume]
        state, found = start(*arguments)
        state.progress.epoch, state.progress.batch = 1, 3
        rates.append(train.learning_rate(state, found))
        assert [g["weight_decay"] for g in state.optimizer.param_groups] == [0.5, 0.0]
    assert rates[0] == rates[1]
    told = [line for line in capsys.readouterr().out.splitlines() if "with NUM_EPOCHS" in line]
    assert len(told) == 1 and told[0].startswith("resumed   with NUM_EPOCHS 3 (was 1), ")
    assert "LEARNING_RATE 0.0001 (was " in told[0] and "WEIGHT_DECAY 0.5 (was " in told[0]


def test_a_stage_keeps_its_rates_when_the_batches_change(tmp_path, encoder_dir):
    stages = ["--epochs", 3, "--scst_epochs", 2, "--scst_learning_rate", 1e-4]
    flags, ends = small_flags(write_photos(tmp_path / "data", 24), encoder_dir), []
    for size in (2, 4, 8):
        state, found = start(*flags, *stages, "--batch_size", size)
        state.progress.step = 7  # updates that were done, of whatever size
        rates = []
        for state.progress.epoch in range(5):
            rates.append(train.learning_rate(state, found))
        state.progress.epoch, state.progress.batch = 2, found.train.count(size)
        ends.append([*rates[-2:], train.learning_rate(state, found)])
        assert min(rates[1:3]) > rates[3] == 1e-4 > rates[4] > ends[-1][-1]
    assert ends[1] == pytest.approx(ends[0]) and ends[2] == pytest.approx(ends[0])
    # A rate below MIN_LEARNING_RATE, as for careful fine-tuning, never rises to it.
    state.progress.epoch, state.settings.LEARNING_RATE = 1, 1e-7
    assert train.learning_rate(state, found) == pytest.approx(1e-7)


def test_half_a_tokenizer_is_refused_and_left_alone(tmp_path, encoder_dir):
    data = write_photos(tmp_path / "data")
    vocab = tmp_path / "mine.json"
    vocab.write_text("{}")
    result = run("train.py", *small_flags(data, encoder_dir), "--vocab_file", vocab)
    assert result.returncode == 1 and "give both or neither" in result.stderr
    assert vocab.read_text() == "{}"
