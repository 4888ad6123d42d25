"""Tracking by Weights & Biases, offline: what is written is read back; failures stop nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import tracking
from checkpoint import digest, load_checkpoint
from tests.conftest import REPO, best_entry, best_file, run, small_flags, write_photos
from tests.wandb_file import history, records, run_of

# A training of 4 updates an epoch; every 20th is shown.
FLAGS = ["--wandb_project", "test", "--epochs", "5"]


def nobody(home: Path) -> dict[str, str]:
    """An environment without anybody's login."""
    return {"WANDB_API_KEY": "", "HOME": str(home), "NETRC": str(home / "none")}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, encoder_dir):
    """The data folder of a run of 5 epochs that was resumed for 5 more, and what both said."""
    home = tmp_path_factory.mktemp("tracked")
    data = write_photos(home / "data", 24)
    flags = [*small_flags(data, encoder_dir), *FLAGS]
    first = run("train.py", *flags, **nobody(home))
    assert first.returncode == 0, first.stderr
    halfway = load_checkpoint(data / "last.pt")
    second = run(
        "train.py",
        *flags,
        "--epochs",
        10,
        "--resume_checkpoint_path",
        data / "last.pt",
        **nobody(home),
    )
    assert second.returncode == 0, second.stderr
    return data, halfway, first.stdout, second.stdout


def sessions(data: Path) -> list[Path]:
    return sorted(data.glob("wandb/offline-run-*/run-*.wandb"))


def test_figures_and_settings_of_a_run(tracked, encoder_dir):
    data, *_ = tracked
    rows = history(sessions(data)[0])
    by_step = {row["_step"]: row for row in rows}
    assert by_step[20]["train/loss"] > 0 and by_step[20]["train/tokens_per_s"] > 0
    progress = load_checkpoint(data / "last.pt").training["progress"]
    epochs = {row["epoch"]: row for row in rows if "epoch" in row}
    assert list(epochs) == [1, 2, 3, 4, 5]
    for entry in progress["history"][:5]:
        row = epochs[entry["epoch"]]
        assert row["val/loss"] == pytest.approx(entry["val_loss"])
        assert row["val/cider"] == pytest.approx(entry["val_cider"])
        assert row["val/bleu4"] == pytest.approx(entry["val_bleu4"])
        assert 0 < row["train/learning_rate"] == pytest.approx(entry["train_learning_rate"])
    _, config = run_of(sessions(data)[0])
    assert config["BATCH_SIZE"] == 4 and config["LEARNING_RATE"] == 3e-3
    assert config["WANDB_PROJECT"] == "test"
    assert config["DATA_DIR"] == data.name  # and nothing of where it lies
    assert config["ENCODER_MODEL_NAME"] == encoder_dir.name


def test_a_resumed_run_keeps_its_id_and_its_steps_go_on(tracked):
    data, halfway, *_ = tracked
    one, two = sessions(data)
    assert run_of(one)[0] == run_of(two)[0] == halfway.training["progress"]["wandb_id"]
    steps = [[row["_step"] for row in history(file)] for file in (one, two)]
    assert steps[0] == sorted(steps[0]) and max(steps[0]) == 20
    assert steps[1] == sorted(steps[1]) and min(steps[1]) > 20 and max(steps[1]) == 40
    # An epoch is there once, whichever session it was in.
    epochs = [row["epoch"] for file in (one, two) for row in history(file) if "epoch" in row]
    assert epochs == list(range(1, 11))


def test_the_table_of_captions_grows_with_each_epoch_and_through_a_resume(tracked):
    data, *_ = tracked
    tables = [
        (file.parent / "files" / row["val/captions.path"])
        for file in sessions(data)
        for row in history(file)
        if "val/captions.path" in row
    ]
    assert len(tables) == 10
    progress = load_checkpoint(data / "last.pt").training["progress"]
    for epoch, path in enumerate(tables, 1):
        rows = json.loads(path.read_text())["data"]
        assert {row[0] for row in rows} == set(range(1, epoch + 1))
        written = {(row[0], row[2]): row[3] for row in rows}
        samples = progress["history"][epoch - 1]["samples"]
        assert {name: written[epoch, name] for name in samples} == samples
    for artifact in (r.artifact for file in sessions(data) for r in records(file)):
        if artifact.type == "run_table":
            files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
            photos = [Image.open(file) for name, file in files.items() if name.endswith(".jpg")]
            assert len(photos) == 4 and {photo.size for photo in photos} == {(48, 40)}


def test_the_best_checkpoint_is_an_artifact(tracked, tmp_path, encoder_dir):
    data, *_ = tracked
    for file in sessions(data):
        artifacts = [r.artifact for r in records(file) if r.HasField("artifact")]
        (model,) = [artifact for artifact in artifacts if artifact.type == "model"]
        assert "best" in model.aliases
        (entry,) = model.manifest.contents
    assert entry.path == best_file(data).name  # of the last session
    sent = tmp_path / entry.path
    sent.write_bytes(Path(entry.local_path).read_bytes())
    assert digest(load_checkpoint(sent).tensors()) == digest(
        load_checkpoint(best_file(data)).tensors()
    )
    folders = [str(encoder_dir.parent), str(data.parent)]
    assert not [x for x in folders if x.encode() in sent.read_bytes()]
    assert not list(data.glob(".artifact-*"))
    history = load_checkpoint(data / "last.pt").training["progress"]["history"]
    assert json.loads(model.metadata)["CIDEr-D"] == best_entry(history)["val_cider"]


def test_the_command_that_it_names_finds_both_sessions(tracked, tmp_path):
    data, *said = tracked
    command = re.search(r"wandb login && \S*(wandb sync .*)", said[-1])[1]
    arguments = command.removeprefix("wandb ")
    shown = subprocess.run(
        f"{sys.executable} -m wandb {arguments} --dry-run",
        shell=True,
        cwd=REPO,
        env=os.environ | nobody(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert all(file.name in shown.stderr + shown.stdout for file in sessions(data))
    assert "Would sync 2 run" in shown.stderr + shown.stdout


# Train, but kill the tracker's process at the first validation.
KILL_THE_TRACKER = """
import os, signal, subprocess, sys, time
import train
from utils import run_script
validate = train.validate
def and_kill(run, data):
    if run.progress.epoch == 1:
        listed = subprocess.run(["pgrep", "-f", f"wandb-core.*--pid {os.getpid()}$"],
                                capture_output=True, text=True).stdout.split()
        assert listed, "no tracker to kill"
        for process in map(int, listed):
            os.kill(process, 9)
        time.sleep(0.5)
    return validate(run, data)
train.validate = and_kill
run_script(lambda: train.main(sys.argv[1:]))
"""


def test_a_tracker_that_dies_changes_nothing(tracked, tmp_path, encoder_dir):
    _, halfway, *_ = tracked
    data = write_photos(tmp_path / "data", 24)
    flags = [*small_flags(data, encoder_dir), *FLAGS]
    result = run("-c", KILL_THE_TRACKER, *flags, **nobody(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.count("tracking: stopped") == 1
    assert "wandb sync" in result.stdout
    weights = load_checkpoint(data / "last.pt").model.state_dict()
    # Those of the run whose tracker lived, and of a run without one.
    untracked = write_photos(tmp_path / "untracked", 24)
    flags = [*small_flags(untracked, encoder_dir), *FLAGS, "--wandb_project", ""]
    assert run("train.py", *flags).returncode == 0
    for other in (halfway, load_checkpoint(untracked / "last.pt")):
        for name, tensor in other.model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name


def test_a_server_that_can_not_be_reached(tmp_path, monkeypatch):
    for name, value in nobody(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 2)
    said: list[str] = []
    started = time.monotonic()
    # Resumed, whose id the attempt to reach the server must not keep.
    tracker = tracking.Tracker(tmp_path, project="p", run_id="x1", config={}, report=said.append)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert time.monotonic() - started < 80  # of 90 that the library would wait
    assert "can't be reached" in said[0] and "offline" in said[0] and tracker.run_id == "x1"
    assert "wandb sync" in said[-1]
    rows: list[dict] = []
    while not rows and time.monotonic() - started < 120:  # its process writes when it gets to it
        time.sleep(0.05)
        rows = [row for session in sessions(tmp_path) for row in history(session)]
    assert rows[0]["loss"] == 1.0


def test_a_resumed_run_that_was_deleted_there_is_begun_anew(tmp_path, monkeypatch):
    import wandb

    def init(**options):
        if options["id"]:
            raise wandb.errors.CommError("HTTP 409: run me/p/x1 was previously created and deleted")
        return SimpleNamespace(id="x2", url="", settings=SimpleNamespace(mode=options["mode"]))

    for name, made in {"init": init, "login": lambda **_: True, "teardown": lambda: None}.items():
        monkeypatch.setattr(wandb, name, made)
    said: list[str] = []
    tracker = tracking.Tracker(tmp_path, project="p", run_id="x1", report=said.append)
    assert tracker.run_id == "x2" and "x1 was deleted there" in said[0] and "is sent" in said[1]


# The library reads its environment once a process.
ONE_VALUE = """
import sys
from pathlib import Path
from tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), project="p", config={})
tracker.log({"loss": 1.0}, 1)
tracker.close()
"""


def test_no_tracking_where_it_is_disabled_as_for_other_trainers(tmp_path):
    result = run("-c", ONE_VALUE, tmp_path, WANDB_DISABLED="true", WANDB_API_KEY="0" * 40)
    assert result.stdout.splitlines() == ["tracking: off (WANDB_DISABLED)"], result.stderr
    assert not sessions(tmp_path)


@pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
def test_a_mode_that_the_user_has_chosen(tmp_path, mode):
    # Logged in, so that only the mode keeps the run here.
    login = nobody(tmp_path) | {"WANDB_API_KEY": "0" * 40}
    result = run("-c", ONE_VALUE, tmp_path, WANDB_MODE=mode, **login)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    said = [line for line in result.stdout.splitlines() if line.startswith("tracking:")]
    if mode == "disabled":
        assert said == ["tracking: off (WANDB_MODE=disabled)"] and not sessions(tmp_path)
        return
    assert "offline" in said[0] and "wandb sync" in said[1] and len(said) == 2
    assert history(sessions(tmp_path)[0])[0]["loss"] == 1.0


def test_a_mode_that_there_is_not_is_said_with_those_that_there_are(tmp_path):
    result = run("-c", ONE_VALUE, tmp_path, **nobody(tmp_path) | {"WANDB_MODE": "ofline"})
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if line.startswith("tracking:")]
    assert len(said) == 1 and "'offline'" in said[0] and "ofline" in said[0]


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    tracker = tracking.Tracker(tmp_path / "file", project="p", config={}, report=said.append)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    (warning,) = said
    assert "tracking: stopped" in warning and "training goes on" in warning
