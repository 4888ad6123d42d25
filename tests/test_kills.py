"""A training killed with SIGKILL at many points goes on, and ends as if nothing had happened."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from checkpoint import load_checkpoint, save_for_training
from tests.conftest import run, small_flags, write_photos

# Two epochs of each stage of three updates, with accumulation, two views and dropout,
# of patches as well.
FLAGS = [
    "--epochs",
    2,
    "--scst_epochs",
    2,
    "--gradient_accumulation_steps",
    2,
    "--feature_views",
    2,
    "--dropout",
    0.1,
    "--patch_dropout",
    0.5,
    "--scst_beam_size",
    3,
    "--feature_batch_size",
    8,
]
KILLS = [
    ("features", 1),
    ("features", 3),
    ("update", 1),
    ("update", 3),
    ("update", 4),
    ("update", 7),
    ("update", 11),
    ("validation", 2),
    ("validation", 3),
    ("save", 1),
    ("save", 4),
    ("rename", 1),
    ("rename", 5),
    ("rename", 8),
]


@dataclass
class Runs:
    """A data set whose features are made, the flags, and how an uninterrupted run went."""

    data: Path
    flags: list[str]
    whole: Path
    said: str


def epochs_said(text: str) -> list[str]:
    """The lines of the epochs, less how long they took."""
    lines = re.findall(r"^epoch \d+/\d+: .*$", text, re.MULTILINE)
    return [re.sub(r", [\d.]+ min$", "", line) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoder_dir) -> Runs:
    folder = tmp_path_factory.mktemp("kills")
    data = write_photos(folder / "data", 32)
    flags = [*small_flags(data, encoder_dir), *map(str, FLAGS)]
    result = run("train.py", *flags, "--output_dir", folder / "whole")
    assert result.returncode == 0, result.stderr
    assert len(epochs_said(result.stdout)) == 4
    return Runs(data, flags, folder / "whole", result.stdout)


def assert_equal(ours: object, theirs: object, where: str) -> None:
    """The same, to the bit, however nested."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{place}]")
    else:
        assert ours == theirs, where


def state(path: Path) -> dict:
    """All that a checkpoint holds, less what names the folder or the job or measures time."""
    checkpoint = load_checkpoint(path)
    progress = dict(checkpoint.training["progress"])
    for name in ("seconds", "written", "job"):
        progress.pop(name)
    return {
        "average": checkpoint.model.state_dict(),
        "scores": checkpoint.scores,
        "training": checkpoint.training | {"progress": progress},
    }


@pytest.mark.fault
@pytest.mark.parametrize(("where", "count"), KILLS)
def test_a_killed_run_goes_on_to_the_same_end(runs, tmp_path, where, count):
    output = tmp_path / "out"
    flags = [*runs.flags, "--output_dir", output]
    if where == "features":
        flags += ["--features_dir", tmp_path / "features"]
    killed = run("tests/killed_run.py", where, count, *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for path in [*output.glob("*.pt"), *output.glob("*.safetensors")]:
        load_checkpoint(path)  # whole under its name, or not there
    saved, best = output / "last.pt", "captioner_best_cider.safetensors"
    done = load_checkpoint(saved).training["progress"]["epoch"] if saved.exists() else 0
    assert done - len(epochs_said(killed.stdout)) in (0, 1)  # saved first, said then
    resumed = run("train.py", *flags, "--resume_checkpoint_path", saved)
    assert resumed.returncode == 0, resumed.stderr
    if where == "features":
        assert f"{8 * count} there already" in resumed.stdout
    assert ("training from scratch" in resumed.stdout) == (not done)
    assert epochs_said(resumed.stdout) == epochs_said(runs.said)[done:]
    assert_equal(state(saved), state(runs.whole / "last.pt"), "last.pt")
    ours, theirs = (load_checkpoint(d / best).model.state_dict() for d in (output, runs.whole))
    assert_equal(ours, theirs, best)
    assert not [*output.glob(".*.tmp"), *output.glob("next_*"), *output.glob("previous_*best*")]
    names = {path.name for path in runs.whole.iterdir()}
    assert names <= {path.name for path in output.iterdir()}


def test_without_its_random_state_a_run_would_end_otherwise(runs, tmp_path):
    """The control: equality above says something."""
    output = tmp_path / "out"
    output.mkdir()
    killed = run("tests/killed_run.py", "update", 4, *runs.flags, "--output_dir", output)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = load_checkpoint(output / "last.pt")
    checkpoint.training["random"]["cpu"] = torch.Generator().manual_seed(99).get_state()
    save_for_training(output / "last.pt", checkpoint)
    resumed = run(
        "train.py",
        *runs.flags,
        "--output_dir",
        output,
        "--resume_checkpoint_path",
        output / "last.pt",
    )
    assert resumed.returncode == 0, resumed.stderr
    with pytest.raises(AssertionError, match="average"):
        assert_equal(state(output / "last.pt"), state(runs.whole / "last.pt"), "last.pt")
