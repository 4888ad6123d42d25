"""torchrun: as many processes as you like train the same model, and one that dies costs little."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint import load_checkpoint
from tests.conftest import REPO, run, small_flags, write_photos, write_questions
from tests.forked import Forked
from tests.test_kills import assert_equal, epochs_said, state

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
# 17 photos in batches of 4: the last one is a single photo, so most processes have none of it.
FLAGS = [
    "--epochs",
    2,
    "--scst_epochs",
    1,
    "--scst_beam_size",
    3,
    "--scst_learning_rate",
    3e-3,
    "--dropout",
    0,
    "--tasks",
    "captions,questions",
    "--question_weight",  # what is shown is of all processes' tokens, as they weigh
    4,
    "--gradient_accumulation_steps",
    2,
    "--feature_batch_size",
    2,
]


def torchrun(processes: int, *command: object, forks: bool = True) -> subprocess.CompletedProcess:
    """Run a script by torchrun, whose processes are its forks or, as a user's, start anew."""
    how = ["--run-path", "--start-method=fork"] if forks else []
    return run(*TORCHRUN, *how, f"--nproc_per_node={processes}", *command)


def figures(text: str) -> list[list[float]]:
    """Each epoch's losses and scores."""
    return [[float(part) for part in re.findall(r"\d+\.\d+", line)] for line in epochs_said(text)]


def cached(data: Path) -> dict[str, list]:
    """The photos whose features each shard holds."""
    shards = data.glob("features/*/shard_*.json")
    return {
        path.stem: [item[0] for item in json.loads(path.read_text())["items"]] for path in shards
    }


@dataclass
class Runs:
    """Trainings of one data set by 4, 2 and 1 processes, and the feature shards after each."""

    data: Path
    flags: list[str]
    said: dict[int, str]
    shards: dict[int, dict[str, list]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoder_dir) -> Runs:
    folder = tmp_path_factory.mktemp("team")
    data = write_questions(write_photos(folder / "data", 26))
    questions = json.loads((data / "questions.json").read_text())
    for name in list(questions)[::3]:  # so that shares differ in what they hold
        del questions[name]
    (data / "questions.json").write_text(json.dumps(questions))
    found = Runs(data, [*small_flags(data, encoder_dir), *map(str, FLAGS)], {}, {})
    for size in (4, 2, 1):
        command = ["train.py", *found.flags, "--output_dir", folder / f"{size}"]
        result = torchrun(size, *command) if size > 1 else run(*command)
        assert result.returncode == 0, result.stderr
        found.said[size], found.shards[size] = result.stdout, cached(data)
        for path in data.glob("features/*/shard_*_1.*"):  # what the process of rank 1 has made
            path.unlink()
    return found


def test_any_number_of_processes_trains_the_same_model(runs):
    alone = figures(runs.said[1])
    assert len(alone) == 3
    for size in (2, 4):
        assert f"{size} processes, cpu" in runs.said[size]
        for ours, theirs in zip(figures(runs.said[size]), alone, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-4)


def test_each_photo_is_encoded_once_and_what_is_lost_again(runs):
    first, second = runs.shards[4], runs.shards[2]
    assert len(first) == 4  # one of each process
    (name,) = [name for name in first if name.endswith("_1")]
    lost = first.pop(name)
    kept = sum(first.values(), [])
    assert len({*lost, *kept}) == len(lost) + len(kept) == 22
    assert first.items() <= second.items()
    again = [photo for name in second.keys() - first.keys() for photo in second[name]]
    assert sorted(again) == sorted(lost)


def test_a_process_that_dies_is_replaced_and_the_end_is_the_same(runs, tmp_path):
    flags = [*runs.flags, "--dropout", "0.1"]
    whole = torchrun(2, "train.py", *flags, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "cut").mkdir()
    other = tmp_path / "whole" / "last.pt"
    (tmp_path / "cut" / "last.pt").write_bytes(other.read_bytes())  # of another job: not resumed
    command = ["tests/killed_run.py", "update", 5, *flags, "--output_dir", tmp_path / "cut"]
    cut = torchrun(2, "--max-restarts=1", *command, forks=False)
    assert cut.returncode == 0, cut.stderr
    # Once, unless torchrun, which names the dead process, has ended the other one before it spoke.
    assert cut.stderr.count("another process of this training has ended") <= 1
    assert "exitcode: -9" in cut.stderr
    assert cut.stdout.count("epoch 1/3") == 1 and "resumed   after 1 epochs" in cut.stdout
    ends = [state(tmp_path / name / "last.pt") for name in ("whole", "cut")]
    assert len(ends[0]["training"]["other_random"]) == 1
    assert_equal(*ends, "last.pt")
    dropped = figures(whole.stdout)[0]
    assert dropped != pytest.approx(figures(runs.said[2])[0], abs=2e-4)  # chance plays a part


def test_what_each_process_finds_in_its_own_share_is_said_by_one(tmp_path, encoder_dir):
    data = write_photos(tmp_path / "data")
    for path in (data / "images").iterdir():
        path.write_bytes(b"no photo")
    result = torchrun(2, "train.py", *small_flags(data, encoder_dir), "--max_bad_images", 2)
    assert result.returncode != 0
    assert result.stderr.count("more than MAX_BAD_IMAGES = 2") == 1, result.stderr


def test_what_the_others_say_to_nobody_may_be_in_any_script(tmp_path):
    """In a locale without UTF-8, as on clusters, files have no other encoding by default either."""
    program = tmp_path / "says.py"
    program.write_text(
        "import commands, distributed\ncommands.begin(lambda: print('\\u72d7'))\n"
        "with distributed.joined('cpu'):\n    print('\\u72d7')\n"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = run(*TORCHRUN, "--nproc_per_node=2", program, PYTHONPATH=str(REPO), **plain)
    assert result.returncode == 0, result.stderr


def test_sigterm_stops_all_and_another_number_goes_on(runs, tmp_path):
    command = ["--nproc_per_node=2", "train.py", *runs.flags, "--output_dir", tmp_path]
    with Forked(*TORCHRUN, *command) as process:
        assert any(line.startswith("epoch 1/3") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(120)
        assert process.returncode != 0
    assert errors.count("stopping after this step") == 1
    assert re.search(r"go on with: \S*torchrun --nproc_per_node=2 train.py", said)
    training = load_checkpoint(tmp_path / "last.pt").training
    assert training["progress"]["epoch"] == 1 or training["progress"]["batch"] > 0
    resumed = run(*command[1:], "--resume_checkpoint_path", tmp_path / "last.pt")
    assert resumed.returncode == 0, resumed.stderr
    assert "with 1 processes (was 2)" in resumed.stdout
    last = figures(resumed.stdout)[-1]
    assert last == pytest.approx(figures(runs.said[1])[-1], abs=2e-4)


def test_machines_that_were_told_other_settings_are_found_out(runs, tmp_path):
    (tmp_path / "uneven.py").write_text(
        "import os, sys\nsys.path.insert(0, os.getcwd())\nimport train\n"
        "from utils import run_script\n"
        "run_script(lambda: train.main([*sys.argv[1:], '--seed', os.environ['RANK']]))\n"
    )
    flags = [*runs.flags, "--output_dir", tmp_path / "out"]
    result = torchrun(2, tmp_path / "uneven.py", *flags, forks=False)
    assert result.returncode != 0
    assert result.stderr.count("error: SEED is 1 in one process and 0 in the first one") == 1
    assert not list((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--decoder_heads", 5], "error: DECODER_EMBED_DIM"),
        (["--batch_size", 0], "error: BATCH_SIZE is 0"),
        (["--bogus", 1], "error: unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_said_once(runs, tmp_path, more, says):
    more = [*more, "--output_dir", tmp_path]
    result = torchrun(2, "train.py", *runs.flags, *more, forks=False)
    assert result.returncode != 0
    assert result.stderr.count(says) == 1
    assert 'train.py", line' not in result.stderr  # no traceback of ours
