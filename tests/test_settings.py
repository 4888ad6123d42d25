"""Settings: config.py, then a preset, then flags; wrong ones end the run with a message."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import commands
from device import choose_device, choose_dtype
from run import on_record
from settings import Parser, load_settings
from tests.conftest import REPO, run
from utils import (
    Bar,
    Output,
    UserError,
    atomic_write,
    bounded_memory,
    refused,
    run_script,
    shown,
    sole_user,
)


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
        config, ["--count", "7"], Parser("d"), preset=lambda _: {"COUNT": 6, "RATE": 0.25}
    )
    assert (settings.COUNT, settings.RATE, settings.ON, settings.NAME) == (7, 0.25, False, None)
    assert config.COUNT == 5
    assert not hasattr(settings, "lower")


def test_a_tuple_is_no_flag(config, capsys):
    config.BETAS = (0.9, 0.98)
    assert load_settings(config, [], Parser("d")).BETAS == (0.9, 0.98)
    with pytest.raises(SystemExit):  # it was ("0", ".", "9", ...)
        load_settings(config, ["--betas", "0.9,0.95"], Parser("d"))
    assert "--betas" in capsys.readouterr().err


def test_values_are_typed_by_the_default(config):
    settings = load_settings(
        config, ["--on", "true", "--name", "none", "--rate", "1e-3"], Parser("d")
    )
    assert (settings.ON, settings.NAME, settings.RATE) == (True, None, 1e-3)


def test_configured_paths_stand_by_the_config_and_flags_by_the_user(config, tmp_path):
    assert load_settings(config, [], Parser("d")).DATA_DIR == str(tmp_path / "data")
    assert load_settings(config, ["--data_dir", "../x"], Parser("d")).DATA_DIR == "../x"
    standing = {"preset": lambda _: {"DATA_DIR": "../y"}}  # in the configuration as well
    assert load_settings(config, [], Parser("d"), **standing).DATA_DIR == str(tmp_path / "y")
    config.ENCODER_MODEL_NAME = "towers/clip"  # a folder beside config.py, or else of the Hub
    assert load_settings(config, [], Parser("d")).ENCODER_MODEL_NAME == "towers/clip"
    (folder := tmp_path / "project" / "towers" / "clip").mkdir(parents=True)
    assert load_settings(config, [], Parser("d")).ENCODER_MODEL_NAME == str(folder)
    with pytest.raises(UserError, match="DATA_DIR is empty"):  # and not the folder one is in
        load_settings(config, ["--data_dir", ""], Parser("d"))


@pytest.mark.parametrize(
    "flags", [["--coumt", "5"], ["--count", "many"], ["--on", "perhaps"], ["--cou", "5"], ["stray"]]
)
def test_wrong_flags_are_refused(config, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(config, flags, Parser("d"))
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Runs the command line of train.py with a line of config.py replaced, or one put before it."""

    def run_it(line: str, *flags: str, instead: bool = True):
        name, source = line.split()[0], (REPO / "config.py").read_text()
        found = re.search(rf"^{name} = .*\n", source, re.M) if instead else None
        source = source.replace(found[0], f"{line}\n") if found else f"{line}\n{source}"
        (tmp_path / "config.py").write_text(source, encoding="cp1252")  # as on Windows
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "config", raising=False)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return commands.train(flags)

    return run_it


@pytest.mark.parametrize(
    "line, says",
    {
        'BATCH_SIZE = "64"': "BATCH_SIZE is '64': it must be a whole number",
        "BATCH_SIZE = 64.0": "BATCH_SIZE is 64.0: it must be a whole number",
        "BATCH_SIZE = None": "BATCH_SIZE is None: it must be a whole number",
        "BATCH_SIZE = 64,": "it must be a whole number",
        'LEARNING_RATE = "1e-3"': "LEARNING_RATE is '1e-3': it must be a number",
        'COMPILE = "False"': "COMPILE is 'False': it must be True or False",
        "COMPILE = false": "config.py, line 6[0-9], can't be run .NameError: name 'false'",
        "BATCH_SIZE = = 4": "config.py, line 5[0-9], can't be run .SyntaxError",
        "ENCODER_LAYERS = (-1, -4)": r"ENCODER_LAYERS is \(-1, -4\): it must be a text",
        'TRAIN_SHARDS = ["a.tar"]': "TRAIN_SHARDS is .*: it must be a text",
        "DEVICE = None": "DEVICE is None: it must be a text",
    }.items(),
)
def test_what_people_write_into_the_configuration_is_checked(edited, line, says):
    with pytest.raises(UserError, match=says):
        edited(line)


def test_a_setting_that_was_renamed_or_removed_is_said_at_once(edited):
    with pytest.raises(UserError, match="config.py lacks BATCH_SIZE"):
        edited("BATCH_SIZE = 32; BACH_SIZE = BATCH_SIZE; del BATCH_SIZE")
    with pytest.raises(UserError, match="config.py lacks NUM_EPOCHS: compare it"):
        edited("NUM_EPOCHS = 20; EPOCHS = NUM_EPOCHS; del NUM_EPOCHS")


def test_a_configuration_may_be_written_in_other_ways(edited, tmp_path):
    assert edited("BATCH_SIZE = 64").BATCH_SIZE == 64  # without a comment
    assert edited("MINE = 64", instead=False).MINE == 64
    mine = "# -*- coding: cp1252 -*-\nMINE = 'café'"
    assert edited(mine, instead=False).MINE == "café"
    record = on_record(edited("import os as T; SEEN = {T}", instead=False))
    assert json.loads(json.dumps(record)) == record and not {"T", "SEEN"} & record.keys()
    assert edited("DROPOUT = 0", "--dropout", "0.5").DROPOUT == 0.5
    assert edited("HF_REPO_ID = None").HF_REPO_ID is None
    path = 'OUTPUT_DIR = __import__("pathlib").Path("out")'
    assert edited(path).OUTPUT_DIR == str(tmp_path / "out")
    start = 'START_CHECKPOINT = "mine/captioner"'
    assert edited(start, "--start_checkpoint", "none").START_CHECKPOINT is None


def test_devices_and_precisions_are_checked():
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert choose_dtype("fp32", torch.device("cpu")) is torch.float32
    with pytest.raises(UserError, match="DEVICE"):
        choose_device("tpu")
    with pytest.raises(UserError, match="PRECISION"):
        choose_dtype("fp64", torch.device("cpu"))
    for name in ("cpu:x", "cpu:-1", "cpu:", "cpu:7", "cuda:999", "", "cpu:9999999999"):
        with pytest.raises(UserError, match=f"DEVICE is '{name}'"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="auto"):
            choose_device("cuda")


def test_a_gpu_whose_driver_is_too_old_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # NVML counts it all the same
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto").type != "cuda"
    with pytest.raises(UserError, match="--device auto"):
        choose_device("cuda")


def test_of_several_gpus_the_one_that_is_meant_tells_its_precision(monkeypatch):
    chosen = []
    at = chosen.append
    monkeypatch.setattr("torch.cuda.device", lambda x: contextlib.nullcontext(at(x.index)))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: chosen[-1] == 0)
    found = [choose_dtype("auto", torch.device("cuda", number)) for number in (0, 1)]
    assert found == [torch.bfloat16, torch.float32]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, synced = tmp_path / "sub" / "file", []
    monkeypatch.setattr("os.fsync", synced.append)
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    assert len(synced) == 1  # or a machine that stops may leave an empty file
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with path.open() as reader:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert (reader.read(), path.read_text()) == ("old", "new")  # each of them whole
    assert os.listdir(path.parent) == ["file"]
    assert path.stat().st_mode & 0o044 or os.umask(os.umask(0)) & 0o044
    for full in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(UserError, match="no room left to write .*/file"), atomic_write(path):
            raise OSError(full, os.strerror(full))
    (tmp_path / "plain").touch()
    with (
        pytest.raises(UserError, match="can.t be written"),
        atomic_write(tmp_path / "plain" / "file") as temporary,
    ):
        temporary.write_text("x")


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else bounds memory")
def test_memory_is_bounded_for_a_while_alone():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(2**26):
        assert bytes(2**25)  # whatever is in use already
        with pytest.raises(MemoryError):
            bytes(2**30)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.fault
def test_a_disk_that_knows_no_modes_takes_files(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.chmod", refuse)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.fault(count=3)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    with pytest.raises(UserError, match="is no file"), atomic_write(path) as temporary:
        temporary.write_text("x")
    assert path.exists() and not path.is_file()


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("there", "absent"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "there").write_text("old")
    for name in ("there", "absent"):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text("new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"


@pytest.mark.fault
def test_a_signals_handler_speaks_in_the_midst_of_another_line(tmp_path):
    """As Ctrl-C does while a bar is drawn: Python's own stream refuses that."""

    class Interrupted(io.FileIO):
        def write(self, data):
            if handlers:
                handlers.pop()()
            return super().write(data)

    with Interrupted(tmp_path / "said", "w") as raw:
        said = Output(io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True), "\n")
        handlers = [lambda: said.write("stopping\n")]
        print("a bar", file=said)
    assert sorted((tmp_path / "said").read_text().split("\n")) == ["", "a bar", "stopping"]


@pytest.mark.fault
def test_what_a_living_process_writes_stays_and_what_a_dead_one_left_goes(tmp_path):
    code = (
        "import sys, time; from utils import atomic_write\n"
        "with atomic_write(sys.argv[1]) as path: print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    writer = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE)
    writer.stdout.readline()
    (tmp_path / ".old.abc.tmp").touch()  # as earlier versions named them
    with sole_user(tmp_path):
        assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    writer.kill()
    writer.wait()
    with sole_user(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("waits, flag", [(True, "--features_dir"), (False, "--output_dir")])
def test_a_folder_where_nobody_may_write_names_the_flag_for_another(tmp_path, waits, flag):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"can't be written .*: choose another {flag}"):
        with sole_user(tmp_path / "file" / "within", wait=waits):
            pass


@pytest.mark.fault
def test_a_disk_that_knows_no_locks_is_used_without(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with sole_user(tmp_path), atomic_write(tmp_path / "file") as path:
        path.write_text("written")
    assert (tmp_path / "file").read_text() == "written"


SAYS = """
import os, sys
from pathlib import Path
from utils import run_script
def main():
    assert os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2  # C code would write into it
    os.unlink(sys.argv[1])
    for line in range(20000):
        print("line", line, flush=True)
    Path(sys.argv[1]).touch()
run_script(main)
"""


@pytest.mark.fault(count=4)
@pytest.mark.parametrize("fault", ["reader left", "full", "closed", "all closed"])
def test_output_that_nobody_can_read_costs_no_result(tmp_path, fault):
    more = {
        "reader left": "| (read line; echo $line); exit ${PIPESTATUS[0]}",
        "full": "> /dev/full",
        "closed": ">&-",
        "all closed": "<&- >&- 2>&-",
    }
    command = shlex.join([sys.executable, "-c", SAYS, str(tmp_path / "done")])
    result = subprocess.run(
        ["bash", "-c", f"{command} {more[fault]}"], cwd=REPO, text=True, capture_output=True
    )
    assert (tmp_path / "done").exists(), result.stderr
    assert result.returncode == 1
    said = "what is said can't be written: No space left on device\n" if fault == "full" else ""
    assert result.stderr == said
    assert result.stdout == ("line 0\n" if fault == "reader left" else "")


def test_what_people_read_steers_no_terminal_and_forges_no_line():
    code = (
        "from utils import UserError, run_script\n"
        "name = 'a\x1b[2J\u202e\\udcff\\nerror: b'\n"
        "import sys\n"
        "def main():\n"
        " print(name)\n"
        " for said in ('\\r 50 %\\r', 'b\\rok\x1b[31m'):\n"
        "  print(said, end='', file=sys.stderr)\n"
        " raise UserError(name)\n"
        "run_script(main)"
    )
    result = run("-c", code)
    assert result.stdout == "a\\x1b[2J\\u202e\\udcff\nerror: b\n"  # a line of print's is a line
    bar, named = "\n 50 %\n", "b\\rok\\x1b[31m"  # a bar's own returns, as lines are read here
    assert result.stderr == f"{bar}{named}error: a\\x1b[2J\\u202e\\udcff\n  error: b\n"
    assert shown("größer 犬 👩‍👧 a\tb\n") == "größer 犬 👩‍👧 a\\tb\\n"


MISTAKES = {
    "unknown flag": (["train.py", "--epoch", "5"], 2, "--epoch"),
    "not a picture": (
        ["inference.py", "--image_path", "config.py", "--checkpoint", "no.pt"],
        1,
        "config.py is not a readable picture",
    ),
    "a device's number": (["train.py", "--device", "cpu:x"], 1, "DEVICE is 'cpu:x'"),
    "no batch": (
        ["evaluate.py", "--checkpoint", "no.pt", "--batch_size", "0"],
        1,
        "batch_size is 0",
    ),
    "unknown data set": (["train.py", "--dataset", "coco"], 1, "coco"),
}


WRONG = [
    ("evaluate", "--batch_size", "-1"),
    ("evaluate", "--feature_batch_size", "0"),
    ("evaluate", "--length_penalty", "1e9"),
    ("inference", "--no_repeat_ngram", "-3"),
    ("inference", "--beam_size", "100000"),
    ("inference", "--seed", str(2**70)),
    ("inference", "--temperature", "nan"),
    ("inference", "--n_best", "0"),
    ("inference", "--batch_size", "0"),
    ("tools.app", "--max_megabytes", "nan"),
    ("tools.app", "--port", "70000"),
    ("tools.benchmark", "--repeats", "0"),
    ("prepare_dataset", "--max_bad_images", "-1"),
]


@pytest.mark.parametrize("script, flag, value", WRONG)
def test_each_script_knows_the_ranges_of_its_flags(script, flag, value):
    module = importlib.import_module(script)
    needed = ["--checkpoint", "no.pt"] if script in ("evaluate", "inference", "tools.app") else []
    needed += ["--image_path", "no.jpg"] if script == "inference" else []
    with pytest.raises(UserError, match=rf"(?i){flag[2:]} is .*: it must be "):
        getattr(commands, script.partition(".")[2], module.main)([*needed, flag, value])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_gets_a_message_and_no_traceback(name):
    command, code, message = MISTAKES[name]
    result = run(*command, cwd=REPO)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "error, says",
    [
        ("MPS backend out of memory (MPS allocated: 5.5 GB)", "out of memory (MPS"),
        ("CUDA error: no kernel image is available for execution", "use --device cpu"),
    ],
)
def test_what_a_gpu_lacks_is_said_without_a_traceback(error, says):
    program = f"import utils\ndef main(): raise RuntimeError({error!r})\nutils.run_script(main)"
    result = run("-c", program)
    assert result.returncode == 1 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory (os error 12)"),
        RuntimeError("unable to mmap 9 bytes from file <c.safetensors>: Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_sound_file_is_not_called_damaged_where_memory_is_short(error, capfd):
    def load():
        with refused("c.safetensors is damaged"):
            raise error

    with pytest.raises(SystemExit, match="1"):
        run_script(load)
    assert capfd.readouterr().err.startswith("error: out of memory (")


def test_windows_is_told_what_to_install():
    without = "import sys, runpy; sys.modules['fcntl'] = None; sys.argv = ['train.py', '--help']"
    program = f"{without}; runpy.run_path('train.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr.count("\n")) == (1, 1) and "WSL" in result.stderr


def test_a_bar_turns_into_lines_where_output_is_no_terminal(capsys, monkeypatch):
    with Bar(10, "features", "photo", done=4) as bar:
        bar.step(2, "fast")
        assert capsys.readouterr().out == ""  # not so soon
        bar.started -= 120  # two minutes for three, so
        bar.spoken -= 120
        bar.step(1)
        bar.step(1)  # nor so soon again
        monkeypatch.setattr(Bar, "PAUSE", -1.0)
        bar.step(2, "fast")
    captured = capsys.readouterr()
    assert captured.out == "  features  70%  2.0 min left\n  features 100%  fast, 0.0 min left\n"
    assert captured.err == ""


@pytest.mark.parametrize("value", ["-1,-4", "-2.5", "-1e-3", "-.5"])
def test_negative_numbers_and_lists_of_them_are_values(value):
    parser = Parser("d")
    parser.add_argument_group("more").add_argument("--layers")
    assert parser.parse_args(["--layers", value]).layers == value
