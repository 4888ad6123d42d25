"""Settings: config.py, then a preset, then flags; wrong ones end the run with a message."""

from __future__ import annotations

import os
import types

import pytest
import torch

from tests.conftest import REPO, run
from utils import Bar, UserError, atomic_write, choose_device, choose_dtype, load_settings


@pytest.fixture
def config(tmp_path) -> types.ModuleType:
    source = (
        "COUNT = 5  # how many\nRATE = 0.5  # how fast: 50 %\nON = False  # whether\n"
        'DATA_DIR = "../data"  # where\nNAME = None  # who\nlower = 3\n'
    )
    (tmp_path / "project").mkdir()
    path = tmp_path / "project" / "conf.py"
    path.write_text(source)
    module = types.ModuleType("conf")
    module.__file__ = str(path)
    exec(source, vars(module))
    return module


def test_flags_win_over_preset_and_preset_over_config(config):
    settings = load_settings(
        config, ["--count", "7"], "d", preset=lambda _: {"COUNT": 6, "RATE": 0.25}
    )
    assert (settings.COUNT, settings.RATE, settings.ON, settings.NAME) == (7, 0.25, False, None)
    assert config.COUNT == 5
    assert not hasattr(settings, "lower")


def test_values_are_typed_by_the_default(config):
    settings = load_settings(config, ["--on", "true", "--name", "none", "--rate", "1e-3"], "d")
    assert (settings.ON, settings.NAME, settings.RATE) == (True, None, 1e-3)


def test_configured_paths_stand_by_the_config_and_flags_by_the_user(config, tmp_path):
    assert load_settings(config, [], "d").DATA_DIR == str(tmp_path / "data")
    assert load_settings(config, ["--data_dir", "../x"], "d").DATA_DIR == "../x"


@pytest.mark.parametrize(
    "flags", [["--coumt", "5"], ["--count", "many"], ["--on", "perhaps"], ["--cou", "5"], ["stray"]]
)
def test_wrong_flags_are_refused(config, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(config, flags, "d")
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_devices_and_precisions_are_checked():
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert choose_dtype("fp32", torch.device("cpu")) is torch.float32
    with pytest.raises(UserError, match="DEVICE"):
        choose_device("tpu")
    with pytest.raises(UserError, match="PRECISION"):
        choose_dtype("fp64", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="auto"):
            choose_device("cuda")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]
    assert path.stat().st_mode & 0o044 or os.umask(os.umask(0)) & 0o044
    (tmp_path / "plain").touch()
    with pytest.raises(OSError), atomic_write(tmp_path / "plain" / "file") as temporary:
        temporary.write_text("x")


MISTAKES = {
    "unknown flag": (["train.py", "--epoch", "5"], 2, "--epoch"),
    "no such picture": (
        ["inference.py", "--image_path", "no.jpg", "--checkpoint", "no.pt"],
        1,
        "no such picture",
    ),
    "not a picture": (
        ["inference.py", "--image_path", "config.py", "--checkpoint", "no.pt"],
        1,
        "config.py is not a readable picture",
    ),
    "unknown data set": (["train.py", "--dataset", "coco"], 1, "coco"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_gets_a_message_and_no_traceback(name):
    command, code, message = MISTAKES[name]
    result = run(*command, cwd=REPO)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bar_turns_into_lines_where_output_is_no_terminal(capsys, monkeypatch):
    with Bar(10, "features", "photo", done=4) as bar:
        bar.step(2, "fast")
        assert capsys.readouterr().out == ""  # not so soon
        monkeypatch.setattr(Bar, "PAUSE", -1.0)
        bar.started -= 120  # two minutes for three, so
        bar.step(1)
        bar.step(3, "fast")
    captured = capsys.readouterr()
    assert captured.out == "  features  70%  2.0 min left\n  features 100%  fast, 0.0 min left\n"
    assert captured.err == ""
