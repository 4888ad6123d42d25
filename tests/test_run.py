"""The state of a training: which epoch was best, and whose files are whose."""

from __future__ import annotations

import functools
import json
import math
import operator
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import commands
import config
import train
from checkpoint import load_checkpoint, save_for_training, save_for_use, stored_digest
from distributed import ALONE, Team
from model import CaptionModel
from run import (
    Progress,
    Run,
    find_checkpoint,
    random_state,
    say_other_settings,
    set_aside,
    set_random_state,
)
from tests.conftest import run, small_flags, write_photos
from utils import UserError

BEST = "captioner_best_cider.safetensors"


def state_of(history: list[dict], output: Path) -> Run:
    """A run of which nothing is there but its history."""
    state = object.__new__(Run)
    state.settings, state.output = SimpleNamespace(CHECKPOINT_PREFIX="captioner"), output
    state.progress = Progress(history=history)
    return state


def test_the_best_epoch_follows_from_the_history(tmp_path):
    history = [
        {"epoch": 1, "val_loss": 2.0, "val_cider": 30.0},
        {"epoch": 2, "val_loss": 2.1, "val_cider": 40.0},
        {"epoch": 3, "val_loss": 1.9, "val_cider": 40.0},
        {"epoch": 4, "val_loss": 2.0, "val_cider": 40.0},
    ]
    state = state_of(history, tmp_path)
    assert state.best() == (tmp_path / BEST, history[2])  # whose loss is less than the second's
    assert [entry["epoch"] for entry in state.bests("val_loss")] == [1, 3]
    assert state.bests("val_accuracy") == []
    state.progress.since = {"val_cider": 2}
    assert state.bests("val_cider") == [history[2]]
    state.progress.since = {"val_cider": 3}
    assert state.bests("val_cider") == [history[3]]


def test_where_a_score_is_nought_throughout_the_loss_chooses(tmp_path):
    history = [{"epoch": e, "val_loss": 3.0 - e, "val_cider": 0.0} for e in (1, 2)]
    state = state_of(history, tmp_path)
    assert state.bests("val_cider") == history  # so the file of the best CIDEr is the second's
    path, entry = state.best()
    assert (path.name, entry) == ("captioner_epoch_2_val_loss_1.0000.safetensors", history[1])


def test_what_was_set_aside_before_is_kept(tmp_path):
    for number in "12":
        (tmp_path / "last.pt").write_text(number)
        set_aside([tmp_path / "last.pt", tmp_path / "none.pt"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"previous_{number}_last.pt": number for number in "12"
    }


@pytest.fixture(scope="module")
def six(tmp_path_factory, encoder_dir) -> tuple[Path, list]:
    """A data set on which six epochs were trained, all checkpoints kept; and its flags."""
    data = write_photos(tmp_path_factory.mktemp("run") / "data", 24)
    flags = [*small_flags(data, encoder_dir), "--keep_checkpoints", 0, "--sample_images", 1]
    result = run("train.py", *flags, "--epochs", 6)
    assert result.returncode == 0, result.stderr
    return data, flags


def digests(folder: Path) -> dict[str, str]:
    return {path.name: stored_digest(path) for path in folder.iterdir() if path.suffix[1:] in KINDS}


KINDS = ("pt", "safetensors")


@pytest.mark.fault(count=2)
def test_going_on_from_an_earlier_epoch_keeps_what_came_after(six, tmp_path):
    data, flags = six
    output = tmp_path / "out"
    shutil.copytree(data, output, ignore=shutil.ignore_patterns("images", "features"))
    before = digests(output)
    early = min(output.glob("captioner_epoch_*.pt"), key=lambda path: path.name)
    more = ["--output_dir", output, "--epochs", 2, "--learning_rate", 1e-5]
    resumed = run("train.py", *flags, *more, "--resume_checkpoint_path", early)
    assert resumed.returncode == 0, resumed.stderr
    after = digests(output)
    assert set(before.values()) <= set(after.values())  # under other names where need be
    assert after["previous_1_last.pt"] == before["last.pt"] != after["last.pt"]
    assert Path(resumed.stdout.split()[-1]).is_file()


def test_resumed_again_and_again_no_more_checkpoints_stay_than_asked_for(six, tmp_path):
    """Where the last epoch was the best, `last.pt` is its checkpoint and can't tell of it."""
    data, flags = six
    output = tmp_path / "out"
    for epochs in (1, 2, 3):
        more = ["--output_dir", output, "--keep_checkpoints", 1, "--epochs", epochs]
        resumed = run("train.py", *flags, *more, "--resume_checkpoint_path", output / "last.pt")
        assert resumed.returncode == 0, resumed.stderr
        assert "the best so far" not in resumed.stdout
    kept = {path.stem for path in output.glob("captioner_epoch_*")}
    assert len(kept) == 1 and "epoch_3" in kept.pop()


@pytest.mark.fault
def test_going_on_in_another_trainings_folder_keeps_its_files(six, trained, tmp_path):
    data, flags = six
    output = tmp_path / "out"
    shutil.copytree(trained, output, ignore=shutil.ignore_patterns("images", "features"))
    before = digests(output)
    more = ["--output_dir", output, "--epochs", 7, "--resume_checkpoint_path", data / "last.pt"]
    resumed = run("train.py", *flags, *more)
    assert resumed.returncode == 0, resumed.stderr
    assert set(before.values()) <= set(digests(output).values())
    assert "an earlier training's files are kept" in resumed.stdout


def test_going_on_in_an_empty_folder_names_files_that_are_there(six, tmp_path):
    data, flags = six
    output = tmp_path / "out"
    more = ["--output_dir", output, "--epochs", 7, "--resume_checkpoint_path", data / "last.pt"]
    resumed = run("train.py", *flags, *more)
    assert resumed.returncode == 0, resumed.stderr
    named = [word for word in resumed.stdout.split() if word.endswith(".safetensors")]
    assert named and all(Path(name).is_file() for name in named)
    # Or a worse epoch would be called the best, and nobody knew why.
    assert "captioner_best_cider.safetensors, the best so far in CIDEr-D" in resumed.stdout
    assert "the best so far in cross-entropy" in resumed.stdout
    since = load_checkpoint(output / "last.pt").training["progress"]["since"]
    assert since["val_loss"] == since["val_cider"] == 6


def test_scoring_other_photos_leaves_the_losses_comparable(six, tmp_path):
    data, flags = six
    output = tmp_path / "out"
    more = ["--output_dir", output, "--epochs", 7, "--resume_checkpoint_path", output / "last.pt"]
    shutil.copytree(data, output, ignore=shutil.ignore_patterns("images", "features"))
    resumed = run("train.py", *flags, *more, "--scored_images", 1, "--learning_rate", 1e-12)
    assert "other SCORED_IMAGES or NO_REPEAT_NGRAM: earlier scores are not" in resumed.stdout
    since = load_checkpoint(output / "last.pt").training["progress"]["since"]
    assert "val_loss" not in since and since["val_cider"] == 6, resumed.stderr


@pytest.mark.fault
def test_a_place_in_another_order_of_photos_is_given_up(six, tmp_path):
    """Half-way through an epoch, another batch size would repeat some photos and miss others."""
    data, flags = six
    output = tmp_path / "out"
    more = ["--output_dir", output, "--epochs", 2]
    killed = run("tests/killed_run.py", "update", 100, *flags, *more)  # never: it ends before
    assert killed.returncode == 0
    checkpoint = load_checkpoint(output / "last.pt")
    checkpoint.training["progress"] |= {"epoch": 1, "batch": 2}
    save_for_training(output / "last.pt", checkpoint)
    resume = ["--resume_checkpoint_path", output / "last.pt"]
    other = run("train.py", *flags, *more, *resume, "--batch_size", 3)
    assert other.returncode == 0 and "epoch 2 begins anew" in other.stdout, other.stderr


@pytest.mark.fault
def test_sums_of_two_stages_are_not_mixed(six, tmp_path):
    data, flags = six
    output = tmp_path / "out"
    more = ["--output_dir", output, "--scst_epochs", 1]
    killed = run("tests/killed_run.py", "update", 100, *flags, *more, "--epochs", 1)
    assert killed.returncode == 0, killed.stderr
    checkpoint = load_checkpoint(output / "last.pt")
    checkpoint.training["progress"] |= {"epoch": 1, "batch": 2, "loss_sum": 1e4, "loss_count": 9}
    save_for_training(output / "last.pt", checkpoint)
    resume = ["--resume_checkpoint_path", output / "last.pt"]
    other = run("train.py", *flags, *more, *resume, "--epochs", 2)
    assert other.returncode == 0 and "epoch 2 begins anew" in other.stdout, other.stderr
    history = load_checkpoint(output / "last.pt").training["progress"]["history"]
    assert history[-2]["train_loss"] < 20


@pytest.mark.fault
def test_the_files_of_the_best_losses_may_be_gone(six, tmp_path):
    data, flags = six
    checkpoint = load_checkpoint(data / "last.pt")
    for entry in checkpoint.training["progress"]["history"]:
        entry["val_cider"] = 5.0
        assert len(entry["samples"]) == 1  # as was asked for, though more are scored
    shutil.copy(data / BEST, tmp_path)
    save_for_training(tmp_path / "last.pt", checkpoint)
    more = ["--output_dir", tmp_path, "--epochs", 6]
    again = run("train.py", *flags, *more, "--resume_checkpoint_path", tmp_path / "last.pt")
    assert again.returncode == 0, again.stderr
    assert "nothing to train" in again.stdout and "best val loss" not in again.stdout
    assert "only 12 updates" not in again.stdout
    assert again.stdout.split()[-1] == str(tmp_path / BEST)


def test_figures_of_other_validation_photos_are_not_compared(six, tmp_path):
    data, flags = six
    shutil.copy(data / "last.pt", tmp_path / "last.pt")
    resume = ["--resume_checkpoint_path", tmp_path / "last.pt", "--epochs", 7]
    more = ["--output_dir", tmp_path / "out", *resume]
    other = run("train.py", *flags, *more, "--max_images", 12)
    assert other.returncode == 0 and "earlier epochs are not compared" in other.stdout, other.stderr
    assert "photos now to validate may have been trained on" in other.stdout
    training = load_checkpoint(tmp_path / "out" / "last.pt").training
    assert set(training["progress"]["since"].values()) == {6}
    shutil.copy(data / BEST, tmp_path)
    fewer = run("train.py", *flags, "--output_dir", tmp_path, *resume, "--scored_images", 3)
    assert fewer.returncode == 0 and "earlier scores are not compared" in fewer.stdout
    assert "of 3 photos hardly tell which epoch is best\n" in fewer.stdout  # as was asked for
    kept = tmp_path / f"previous_1_{BEST}"  # which may be better than the best from here
    assert stored_digest(kept) == stored_digest(data / BEST) != stored_digest(tmp_path / BEST)


@pytest.mark.fault(count=2)
def test_what_older_versions_noted_of_a_run_loses_no_best(six, tmp_path):
    data, flags = six
    shutil.copytree(data, folder := tmp_path / "out")
    checkpoint = load_checkpoint(folder / "last.pt")
    progress = checkpoint.training["progress"]
    progress["judged"] = progress.pop("by")
    save_for_training(folder / "last.pt", checkpoint)
    go_on = ["--resume_checkpoint_path", folder / "last.pt", "--epochs", 7]
    result = run("train.py", *flags, "--output_dir", folder, *go_on)
    assert result.returncode == 0 and "not compared" not in result.stdout, result.stderr
    assert load_checkpoint(folder / "last.pt").training["progress"]["since"] == {}


@pytest.mark.fault
def test_beginning_with_weights_that_are_no_numbers_is_refused(six, tmp_path):
    data, flags = six
    checkpoint = load_checkpoint(data / BEST)
    checkpoint.model.project.weight.data[0, 0] = math.nan
    save_for_use(tmp_path / "nan.safetensors", checkpoint)
    more = ["--output_dir", tmp_path / "out", "--start_checkpoint", tmp_path / "nan.safetensors"]
    result = run("train.py", *flags, *more)
    assert result.returncode == 1 and "nan.safetensors holds weights" in result.stderr


BIG, NAN = 10**30, math.nan
# Training states that no run wrote, each by the place that is changed and what stands there.
ODD_STATES: list[tuple[str, object]] = [
    *((part, value) for part in "weights optimizer progress random".split() for value in (3, [])),
    *((f"progress {count}", value) for count in ("epoch", "batch") for value in (-1, NAN, BIG)),
    *((f"progress {sum_}", value) for sum_ in ("loss_sum", "seconds") for value in ("x", NAN)),
    ("progress order", 3),
    ("progress written", {"../last.pt": "x"}),
    ("progress since", {"val_loss": "x"}),
    ("progress history 0", {}),
    ("progress history 0 val_loss", NAN),
    ("progress history 0 val_cider", "x"),
    ("progress history 0 epoch", "x"),
    ("progress history 0 samples", {"/etc/passwd": "x"}),
    ("progress history 0 samples", {"000.png": 3}),
    ("weights extra", torch.zeros(1)),
    ("weights project.bias", torch.zeros(3)),
    ("weights project.bias", torch.full([32], NAN)),
    ("optimizer state", 3),
    ("optimizer state 0 exp_avg", torch.zeros(3)),
    ("optimizer state 0 exp_avg_sq", torch.zeros(3)),
    ("optimizer state 0 step", torch.tensor(NAN)),
    ("optimizer state 1", {}),
    ("random cpu", torch.zeros(3)),
    ("other_random", [1]),
]


@pytest.mark.fault
@pytest.mark.parametrize(("place", "value"), ODD_STATES, ids=lambda each: str(each)[:30])
def test_a_state_that_no_run_wrote_is_refused_in_a_line(six, tmp_path, place, value):
    data, flags = six
    checkpoint = load_checkpoint(data / "last.pt")
    *parts, last = (int(key) if key.isdigit() else key for key in place.split())
    functools.reduce(operator.getitem, parts, checkpoint.training)[last] = value
    save_for_training(tmp_path / "last.pt", checkpoint)
    more = ["--output_dir", tmp_path, "--resume_checkpoint_path", tmp_path / "last.pt"]
    settings = commands.train([*map(str, [*flags, *more])])
    says = r"last\.pt holds (no state of a training.*--start_checkpoint .*last\.pt|weights)"
    with pytest.raises(UserError, match=says):
        find_checkpoint(settings, ALONE)


def test_a_new_setting_that_is_a_text_is_told_on_resuming(capsys):
    before, now = vars(config) | {"SCHEDULE": "cosine"}, vars(config) | {"SCHEDULE": "constant"}
    more = {"DATA_DIR": "/elsewhere", "DEVICE": "cpu", "WANDB_PROJECT": "other"}
    say_other_settings(SimpleNamespace(**now | more), before)
    assert capsys.readouterr().out == "resumed   with SCHEDULE constant (was cosine)\n"


def sgd(model, settings):
    return torch.optim.SGD(model.parameters(), momentum=0.9, fused=True)


@pytest.mark.parametrize("changed", ["optimizer", "frozen"])
def test_a_training_with_another_optimizer_or_frozen_weights_goes_on(
    six, tmp_path, monkeypatch, changed
):
    data, flags = six
    if changed == "optimizer":
        monkeypatch.setattr("run.make_optimizer", sgd)
    else:
        made = CaptionModel.__init__

        def frozen(self, *sizes):
            made(self, *sizes)
            self.project.requires_grad_(False)

        monkeypatch.setattr(CaptionModel, "__init__", frozen)
    flags = [*map(str, flags), "--output_dir", str(tmp_path)]
    start = ["--start_checkpoint", str(data / BEST)]
    assert train.main([*flags, "--num_epochs", "1", "--scst_epochs", "0", *start]) == 0
    last = ["--resume_checkpoint_path", str(tmp_path / "last.pt")]
    assert train.main([*flags, "--num_epochs", "2", "--scst_epochs", "0", *last]) == 0
    before, after = (load_checkpoint(path) for path in (data / BEST, tmp_path / "last.pt"))
    same = torch.equal(before.model.project.weight, after.model.project.weight)
    assert len(after.training["progress"]["history"]) == 2 and same == (changed == "frozen")


def test_chance_on_a_mac_is_kept_and_goes_on(monkeypatch):
    kept, device = torch.arange(3, dtype=torch.uint8), torch.device("mps")
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: kept)
    restored = []
    monkeypatch.setattr("torch.mps.set_rng_state", restored.append)
    run_there = SimpleNamespace(team=ALONE, device=device)
    set_random_state(run_there, {"random": random_state(device)})
    assert restored == [kept]


def test_each_process_of_a_team_has_its_own_chance():
    drawn = set()
    for rank in range(3):
        here = SimpleNamespace(team=Team(rank, 3), device=torch.device("cpu"))
        here.settings, here.progress = SimpleNamespace(SEED=0), Progress()
        torch.manual_seed(0)
        set_random_state(here, None)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 3


def test_a_job_that_nobody_named_is_not_an_earlier_one(monkeypatch):
    """torchrun calls such jobs "none"; an earlier one's last.pt is not this one's."""
    import distributed

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mine = distributed._job()
    assert mine == distributed._job() != "none"
    monkeypatch.setattr(distributed.os, "getppid", lambda: 1)
    assert distributed._job() != mine
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert distributed._job() == "mine"


@pytest.mark.parametrize(("validate", "scored"), [(1, 4), (2, 1)])
def test_one_photo_has_no_scores_and_the_loss_chooses(tmp_path, encoder_dir, validate, scored):
    data = write_photos(tmp_path / "data", 8)
    names = sorted(path.name for path in (data / "images").iterdir())
    split = {
        "images": [
            {"filename": n, "split": "val" if n in names[:validate] else "train"} for n in names
        ]
    }
    (data / "split.json").write_text(json.dumps(split))
    flags = [*small_flags(data, encoder_dir), "--split", "karpathy", "--scored_images", scored]
    result = run("train.py", *flags, "--karpathy_file", data / "split.json")
    assert result.returncode == 0, result.stderr
    assert "CIDEr compares photos" in result.stdout
    assert "CIDEr 0.0" not in result.stdout and not (data / BEST).exists()
    assert "_val_loss_" in result.stdout.split()[-1]


def test_captions_that_are_cut_or_have_no_word_are_counted(photos, encoder_dir):
    captions = json.loads((photos / "captions.json").read_text())
    captions["000.png"].append(" . . ")
    (photos / "captions.json").write_text(json.dumps(captions))
    flags = [*small_flags(photos, encoder_dir), "--max_caption_length", 5, "--epochs", 1]
    result = run("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "of '000.png' has no word" in result.stdout
    assert "texts, to MAX_CAPTION_LENGTH = 5 tokens; --max_caption_length" in result.stdout
