"""Command lines: read before anything heavy is loaded; presets; what Ctrl-C finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import commands
import config
import train
from corpus import check_splits, first_photos
from tests.conftest import REPO, run, small_flags, write_photos
from utils import UserError, pip, program

SCRIPTS = ["train", "evaluate", "inference", "prepare_dataset"]
TOOLS = ["tools.app", "tools.export", "tools.benchmark", "demo.pretrain_encoder"]

# A process that would notice if PyTorch were loaded: it would break off.
LIGHT = """
import runpy, sys
for heavy in ("torch", "transformers", "numpy"):
    sys.modules[heavy] = None
name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = name
if "." in name:
    runpy.run_module(name, run_name="__main__")
else:
    runpy.run_path(f"{name}.py", run_name="__main__")
"""


def light(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIGHT, *args]
    return subprocess.run(command, cwd=REPO, text=True, capture_output=True)


@pytest.mark.parametrize("script", SCRIPTS + TOOLS)
def test_help_and_mistakes_are_answered_without_pytorch(script):
    found = light(script, "--help")
    assert found.returncode == 0 and "usage:" in found.stdout and not found.stderr
    wrong = light(script, "--nothing_of_the_sort", "1")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    if script == "train":
        out_of_range = light(script, "--num_epochs", "-3")
        assert out_of_range.returncode == 1
        assert out_of_range.stderr.startswith("error: NUM_EPOCHS is -3: it must be")


FAILS = "import utils; utils.run_script({}.popitem)"


@pytest.mark.parametrize("flags", [["inference.py", "--help"], ["-c", FAILS]])
def test_python_colours_nothing_that_goes_through_our_output(flags):
    """From 3.13 on it colours tracebacks on a terminal, from 3.14 on `--help` too."""
    command = [sys.executable, *flags]
    env = os.environ | {"FORCE_COLOR": "1", "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True)
    assert "usage:" in result.stdout or "KeyError" in result.stderr
    assert "x1b" not in result.stdout + result.stderr


def test_a_bar_starts_no_process_that_outlives_a_kill():
    """Which it does where processes are not forked, and it would speak of leaked semaphores."""
    code = (
        "import multiprocessing, utils; multiprocessing.set_start_method('spawn'); "
        "from multiprocessing.resource_tracker import _resource_tracker as tracker; "
        "utils.guard_output(); utils.Bar(1, 'a', 'b').step(1); assert tracker._pid is None"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_a_user_without_a_home_can_draw_curves(tmp_path, home):
    """As in a container that runs under a number: no HOME, or one that can't be written to, and no
    name in the list of users. A notebook names its own way of drawing to all programs, which may
    lack it."""
    code = "import pwd; pwd.getpwuid = {}.__getitem__; import commands; commands.begin(lambda: 0)"
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "MPLCONFIGDIR")}
    env |= {"PYTHONPATH": str(REPO), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    env |= {"HOME": home} if home else {}
    code += "; import matplotlib.figure; print(matplotlib.get_configdir())"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(tmp_path)), found.stderr


NOTES = [
    (
        "inference a.jpg --checkpoint x --temperature 2 --seed=1",
        "--temperature, --seed",
        "--sample",
    ),
    ("inference a.jpg --checkpoint x --sample --temperature 2", "", ""),
    ("inference a.jpg --checkpoint README.md --revision main", "--revision", "on a file"),
    ("inference a.jpg --checkpoint x --existing append", "--existing", "--write"),
    ("inference a.jpg --checkpoint x --question q --rerank 0.1", "--rerank", "on questions"),
    ("inference a.jpg --checkpoint x --attention b.png --prefix p", "--prefix", "--attention"),
    ("evaluate --checkpoint x --questions_file q.json", "--questions_file", "without questions"),
    ("evaluate --checkpoint x --task questions --questions_file q.json", "", ""),
    ("evaluate --checkpoint x --beam_size 1 --rerank 1", "--rerank", "with --beam_size 1"),
    ("evaluate --checkpoint x --beam_size 2 --rerank 1", "", ""),
    ("evaluate --checkpoint x --diversity 1 --groups 2 --beam_size 2", "", ""),
    ("tools.export --checkpoint x --encoder e", "--encoder", "--with-encoder"),
    ("train --questions_file q.json", "--questions_file", "without questions"),
    ("train --tasks captions,questions --questions_file q.json --seed 1", "", ""),
    ("train --tasks questions --question_weight 2", "--question_weight", "without both tasks"),
    ("train --tasks questions --scst_epochs 2", "--scst_epochs", "without captions"),
    ("train --tasks questions --rerank 0.1 --beam_size 3", "--beam_size, --rerank", "captions"),
    ("train --train_shards a.tar --rerank 0.1", "--rerank", "with --train_shards"),
    ("train --vocab_size 9 --vocab_file v --merges_file m", "--vocab_size", "--vocab_file"),
    ("train --split ratio --karpathy_file k.json", "--karpathy_file", "with --split ratio"),
    ("train --val_shards a.tar --captions_file c.json", "--captions_file", "with --val_shards"),
    ("train --demo --preset small", "--preset", "--demo"),
    ("train --scst_epochs 0 --scst_beam_size 3", "--scst_beam_size", "--scst_epochs 0"),
    (
        "train --resume_checkpoint_path=README.md --start_checkpoint x",
        "--start_checkpoint",
        "on resuming",
    ),
    ("train --start_checkpoint x --vocab_size 99", "--vocab_size", "a checkpoint brings its"),
    ("train --resume_checkpoint_path README.md --vocab_file v", "--vocab_file", "a checkpoint"),
    ("train --vocab_size 99 --resume_checkpoint_path missing.pt", "", ""),
    ("prepare_dataset --train_split_ratio 0.5", "--train_split_ratio", "--split ratio"),
]


@pytest.mark.parametrize(("line", "idle", "how"), NOTES)
def test_a_flag_that_changes_nothing_is_said_once(line, idle, how, monkeypatch, capsys):
    script, *flags = line.split()
    monkeypatch.chdir(REPO)
    settings = getattr(commands, script.removeprefix("tools."))(flags)
    commands.say_without_effect(settings, flags)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(idle) and idle in said and how in said
    monkeypatch.setenv("RANK", "1")  # another process of the same training
    commands.say_without_effect(settings, flags)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data_dir", "--captions_file", "--train_shards"])
def test_the_demo_takes_no_other_data(flag, tmp_path):
    with pytest.raises(UserError, match=f"a data set of its own: leave out {flag}"):
        commands.train(["--demo", flag, str(tmp_path / "mine")])
    assert commands.train(["--demo", "--epochs", "1"]).demo


def test_the_demo_is_not_of_the_data_that_the_configuration_names(tmp_path, monkeypatch):
    for name in ("IMAGE_DIR", "CAPTIONS_FILE", "VOCAB_FILE", "START_CHECKPOINT", "OUTPUT_DIR"):
        monkeypatch.setattr(config, name, str(tmp_path))
    monkeypatch.setattr(config, "TRAIN_SHARDS", "0.tar")
    assert str(tmp_path) not in vars(commands.train(["--demo"])).values()


def test_commands_that_are_printed_can_be_run_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data", 24)
    flags = ["--dataset", "custom", "--split", "ratio", "--data_dir", data]
    told = run(REPO / "prepare_dataset.py", *flags, cwd=tmp_path).stdout
    following = told.splitlines()[-1].removeprefix("next ")
    for line in (following, pip("requirements.txt"), program("torchrun")):
        assert subprocess.run(f"{line} --help", shell=True, capture_output=True).returncode == 0


def test_what_is_mistyped_is_said_before_anything_is_downloaded(tmp_path):
    for flag in ("--tasks=caption", "--precision=fp16", "--encoder_layers=a"):
        with pytest.raises(UserError, match=f"{flag[2:].split('=')[0].upper()} is"):
            train.main(["--dataset", "flickr8k", "--data_dir", str(tmp_path / "new"), flag])
    for flag in ("--karpathy_file", "--vqa_questions", "--vqa_annotations"):
        with pytest.raises(UserError, match="no.json is not there: "):
            flags = ["--dataset", "flickr8k", "--data_dir", str(tmp_path / "new")]
            train.main([*flags, flag, str(tmp_path / "no.json")])
    with pytest.raises(UserError, match="no.json and .*no.txt are no BPE files"):
        vocab = ["--vocab_file", str(tmp_path / "no.json")]
        train.main([*flags, *vocab, "--merges_file", str(tmp_path / "no.txt")])
    assert not (tmp_path / "new" / "temp_download").exists()


ADDRESS = "https://me:hunter2@host/x?key=hunter2"


@pytest.mark.fault
@pytest.mark.parametrize(
    "line, says",
    [
        ("inference a.jpg --checkpoint", "an address: give a file"),
        ("evaluate --checkpoint a.pt --report", "an address: give a file"),
        ("train --start_checkpoint", "an address: give a file"),
        ("prepare_dataset --archive a.zip", "an address: give a file"),
        ("train --epochs", "invalid int value"),
    ],
)
def test_an_address_in_place_of_a_file_is_refused_without_its_secret(line, says):
    script, *flags = line.split()
    said = light(script, *flags, ADDRESS)
    assert said.returncode in (1, 2) and says in said.stderr, said.stderr
    assert "hunter2" not in said.stdout + said.stderr and "https://***@host/x?***" in said.stderr


def test_ctrl_c_while_libraries_load_ends_quietly(tmp_path):
    pressed = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    (tmp_path / "torch.py").write_text(pressed)
    result = subprocess.run(
        [sys.executable, "train.py"],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=15,
        # What runs in the background may have been told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_ctrl_c_while_libraries_load_spares_a_notebook(tmp_path):
    """PyTorch that is half imported ends the process once it is imported anew."""
    code = (
        "import commands, os, signal, sys, utils\n"
        "sys.modules['IPython'] = sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "commands.begin(int)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('loaded')\n"
        "utils.run_script(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    )
    result = run("-c", code)
    assert (result.returncode, result.stdout) == (130, "loaded\n"), result.stderr
    assert result.stderr == "\ninterrupted\n"


def test_a_preset_gives_way_to_flags_and_is_known_whole():
    settings = commands.train(["--preset", "small", "--num_epochs", "3"])
    wanted = config.presets["small"] | {"NUM_EPOCHS": 3}
    assert {name: getattr(settings, name) for name in wanted} == wanted
    with pytest.raises(SystemExit):
        commands.train(["--preset", "huge"])


def edit_config(monkeypatch, folder, line):
    """Have a `config.py` that ends with a line more, as somebody edits theirs."""
    text = Path(config.__file__).read_text(encoding="utf-8")
    (folder / "config.py").write_text(f"{text}\n{line}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_an_edit_counts_while_a_notebook_lasts(monkeypatch, tmp_path):
    for count in (7, 11111):
        edit_config(monkeypatch, tmp_path, f"BATCH_SIZE = {count}")
        assert commands.train([]).BATCH_SIZE == count


@pytest.mark.parametrize("presets", [None, {"small": None}, {"small": {"DATA_DIR": 5}}])
def test_presets_of_another_kind_are_refused(monkeypatch, tmp_path, presets):
    edit_config(monkeypatch, tmp_path, f"presets = {presets}")
    with pytest.raises(UserError, match="config.py: presets must be|DATA_DIR is 5: it must be"):
        commands.train(["--preset", "small"])


def test_a_preset_with_a_slip_is_refused(monkeypatch, tmp_path):
    edit_config(monkeypatch, tmp_path, 'presets["small"] = {"DECODER_WIDTH": 1}')
    with pytest.raises(UserError, match="DECODER_WIDTH"):
        commands.train(["--preset", "small"])


def test_a_setting_that_somebody_added_is_a_flag_and_may_stand_in_a_preset(monkeypatch, tmp_path):
    edit_config(monkeypatch, tmp_path, 'KV_HEADS = 2  # new\npresets["small"] = {"KV_HEADS": 1}')
    assert commands.train(["--preset", "small"]).KV_HEADS == 1
    assert commands.train(["--preset", "small", "--kv_heads", "4"]).KV_HEADS == 4


def test_the_first_photos_are_of_each_split_its_share():
    splits = {"train": list("abcdefghijklmnop"), "val": list("qr"), "test": list("st")}
    few = first_photos(splits, 5)
    assert {split: len(names) for split, names in few.items()} == {"train": 4, "val": 1, "test": 1}
    assert {split: sorted(names) for split, names in first_photos(splits, 1000).items()} == splits
    classes = [f"{kind}{i}.jpg" for kind in "abcd" for i in range(100)]  # a list that is sorted
    some, more = (first_photos({"train": classes}, most)["train"] for most in (20, 30))
    assert {name[0] for name in some} == {*"abcd"} and {*some} < {*more}
    with pytest.raises(UserError, match="chosen leaves no photo for val: more photos, another"):
        check_splits(splits | {"val": []}, "what was chosen")


@pytest.mark.parametrize(
    ("least", "batch", "steps", "more"), [(3, 2, 4, ", or lower --batch_size"), (64, 1, 7, "")]
)
def test_a_first_try_trains_on_few_and_says_that_it_is_little(
    photos, encoder_dir, least, batch, steps, more
):
    flags = ["--max_images", 10, "--epochs", 1, "--min_steps", least]
    result = run("train.py", *small_flags(photos, encoder_dir), *flags)
    assert result.returncode == 0, result.stderr
    assert "data      7 photos with 14 captions to train on, 3 to validate" in result.stdout
    said = f"{batch} photos, so that an epoch has {steps} steps (MIN_STEPS asks for {least})\n"
    assert f"batch     {said}" in result.stdout
    assert f"only {steps} updates: what it writes will be poor" in result.stdout
    assert f"raise --num_epochs{more}\n" in result.stdout
    assert "of 3 photos hardly tell which epoch is best (a lower --train_split" in result.stdout


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "x"}, "x")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, found):
    code = "import commands, os; commands.begin(int); print(os.environ['OMP_WAIT_POLICY'])"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=env | given, text=True, capture_output=True
    )
    assert result.stdout.strip() == found, result.stderr


@pytest.mark.parametrize("flags", ["--help", "--checkpoint"])
def test_a_notebook_that_runs_a_script_is_as_it_was(flags):
    code = (
        "import runpy, signal, sys\n"
        f"sys.argv, before = ['inference.py', {flags!r}], (sys.stdout, sys.stderr)\n"
        "try: runpy.run_path('inference.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert (sys.stdout, sys.stderr) == before\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    assert run("-c", code).returncode == 0


@pytest.mark.parametrize("here", ["9.5.0", "missing", ""])
def test_a_library_of_another_version_is_named_with_what_mends_it(here):
    code = f"""
import runpy, sys
from importlib import metadata
pinned = metadata.version
def version(name):
    if name in ("pillow", "tqdm") and {here!r} == "missing":
        raise metadata.PackageNotFoundError(name)
    return {here!r} if name == "pillow" and {here!r} else pinned(name)
metadata.version, sys.modules["PIL"] = version, None
runpy.run_path("inference.py", run_name="__main__")
"""
    command = [sys.executable, "-c", code, "photo.jpg", "--checkpoint", "x.pt"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 1 and ("Traceback" in result.stderr) == (not here)
    if here:  # else nothing differs: a bug of ours, told in full
        (said,) = result.stderr.splitlines()
        wrong = "(missing: pillow, tqdm): " if here == "missing" else f"(pillow is {here}, not 12"
        assert wrong in said and pip("requirements.txt") in said


def test_an_older_python_is_told_which_to_use():
    code = """
import runpy, sys
sys.version_info = (3, 9)
runpy.run_path("train.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "too old: run bash 01_setup.sh, and then .venv/bin/python" in result.stderr
