"""Full disks, dead services, short memory, hostile files, odd settings: nothing made is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import commands
import config
import prepare_dataset
from captions_file import SHOWN, read_captions
from captions_search import BOX
from checkpoint import Checkpoint, digest, load_checkpoint, stored_digest
from dataset import load_captions, load_questions
from encoder import FrozenEncoder
from metrics import tokenize
from photo_names import find_names, plain_name
from questions_file import PLACE, find_questions
from settings import RANGES, constants
from sidecar import Photo, Table
from tars import read_shard
from tests.conftest import build_encoder, run, small_flags, write_photos, write_questions
from tests.forked import Forked
from tests.hub_server import HubServer
from texts import unescaped
from utils import (
    UserError,
    first_line,
    last_part,
    read_json,
    redact,
    run_script,
    write_changed,
    write_file,
)

CANARIES = {"WANDB_API_KEY": "c0ffee" * 6 + "1234", "HF_TOKEN": "hf_" + "CanaryBird" * 3}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_message(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr


# --- Disk and memory ------------------------------------------------------------------------


@pytest.mark.fault
def test_no_room_for_features(tmp_path, encoder_dir):
    data = write_photos(tmp_path / "data")
    flags = [*small_flags(data, encoder_dir), "--epochs", 1]
    full = run("train.py", *flags, limits={resource.RLIMIT_FSIZE: 8192})
    assert_message(full, "no room left to write", str(data / "features"))
    assert not list(data.rglob("*.tmp")) and not list(data.glob("*.pt"))
    assert run("train.py", *flags).returncode == 0


@pytest.mark.fault
def test_data_that_nobody_may_write_beside(tmp_path, monkeypatch):
    data = write_photos(tmp_path / "data")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match="another --data_dir, and give --image_dir"):
        prepare_dataset.main(["--dataset=custom", "--split=ratio", f"--data_dir={data}"])


@pytest.mark.fault
def test_prepared_data_are_used_where_nobody_may_write(tmp_path, monkeypatch):
    flags = ["--dataset=custom", "--split=ratio", f"--data_dir={write_photos(tmp_path / 'data')}"]
    assert prepare_dataset.main(flags) == 0

    def refuse(*_, **__):  # also to remove what isn't there, as a mounted disk does
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("tempfile.mkstemp", "os.unlink", "pathlib.Path.unlink"):
        monkeypatch.setattr(name, refuse)
    assert prepare_dataset.main(flags) == 0


@pytest.mark.fault
def test_no_room_for_a_checkpoint(tmp_path, trained, encoder_dir):
    output = tmp_path / "out"
    output.mkdir()
    for file in trained.iterdir():
        if file.suffix in (".pt", ".safetensors"):
            shutil.copy(file, output)
    flags = [
        *small_flags(trained, encoder_dir),
        "--epochs",
        3,
        "--output_dir",
        output,
        "--resume_checkpoint_path",
        output / "last.pt",
    ]
    before = contents(output)
    full = run("train.py", *flags, limits={resource.RLIMIT_FSIZE: 50_000})
    assert_message(full, "no room left to write", str(output))
    assert full.stdout.splitlines()[-1].endswith(f"--resume_checkpoint_path {output / 'last.pt'}")
    assert contents(output) == before
    room = run("train.py", *flags)
    assert room.returncode == 0 and "epoch 3/3" in room.stdout


@pytest.mark.fault
def test_no_room_for_a_report(tmp_path, trained):
    full = run(
        "evaluate.py",
        "--checkpoint",
        trained / "captioner_best_cider.safetensors",
        "--data_dir",
        trained,
        "--report",
        tmp_path / "report.html",
        "--save_captions",
        tmp_path / "captions.json",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        limits={resource.RLIMIT_FSIZE: 2000},
    )
    assert_message(full, "no room left to write", "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["captions.json"]


@pytest.mark.fault
def test_disk_full_while_captions_are_written(tmp_path, trained):
    table = tmp_path / "captions.csv"
    flags = ["--checkpoint", trained / "captioner_best_cider.safetensors"]
    flags += ["--write", "csv", "--output", table]
    full = run("inference.py", trained / "images", *flags, limits={resource.RLIMIT_FSIZE: 400})
    assert_message(full, "no room left to write", str(table))
    assert run("inference.py", trained / "images", *flags).returncode == 0
    assert len(table.read_text().splitlines()) == 1 + len([*(trained / "images").iterdir()])


@pytest.mark.fault(count=2)
@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["fsync", "write", "read"])
def test_a_disk_that_fails_is_said_with_the_file(tmp_path, monkeypatch, capfd, where, fault):
    photos, file = [Photo(tmp_path / "a.jpg", "a.jpg")], tmp_path / "captions.csv"

    def fail(*_):  # as what is done with an open file does: without its name
        raise OSError(fault, os.strerror(fault))

    def main():
        if where == "fsync":
            write_file(file, "text")
        with contextlib.ExitStack() as files:
            Table(file, "skip", False, files).write([(photos[0], "", "a dog")])

    monkeypatch.setattr(*{"read": (Path, "read_bytes")}.get(where, (os, "fsync")), fail)
    with pytest.raises(SystemExit, match="1"):
        run_script(main)
    assert capfd.readouterr().err == f"error: {file}: {os.strerror(fault)}\n"
    with pytest.raises(SystemExit, match="1"):  # where nothing says which file it was
        run_script(fail)
    assert capfd.readouterr().err == f"error: a file that was read: {os.strerror(fault)}\n"


@pytest.mark.fault
def test_memory_too_short(tmp_path, trained, encoder_dir):
    data = Path(shutil.copytree(trained, tmp_path / "data"))
    flags = [*small_flags(data, encoder_dir), "--decoder_ff_dim", 2 * 10**9]
    before = contents(data)
    short = run("train.py", *flags, limits={resource.RLIMIT_AS: 20 * 2**30})
    assert_message(short, "out of memory", "smaller decoder")
    assert contents(data) == before


# --- Kills ----------------------------------------------------------------------------------

SAVES = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from checkpoint import load_checkpoint, save_for_training, save_for_use
path = Path(sys.argv[1])
checkpoint = load_checkpoint(path)
for kill in range(20):
    child = os.fork()
    if child == 0:
        while True:
            save_for_training(path, checkpoint)
            save_for_use(path.with_suffix(".safetensors"), checkpoint)
    time.sleep(0.01 + 0.0137 * kill)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    load_checkpoint(path)
    if path.with_suffix(".safetensors").exists():
        load_checkpoint(path.with_suffix(".safetensors"))
    print("whole", flush=True)
"""


@pytest.mark.fault(count=20)
def test_killed_again_and_again_while_saving(tmp_path, trained):
    path = Path(shutil.copy(trained / "last.pt", tmp_path))
    result = run("-c", SAVES, path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["whole"] * 20
    assert list(tmp_path.glob(".*.tmp")), "no kill hit a save: the loop is too slow to say anything"


@pytest.mark.fault
def test_no_process_is_left_of_a_killed_run(tmp_path, encoder_dir):
    data = write_photos(tmp_path / "data", 18)
    flags = [*small_flags(data, encoder_dir), "--wandb_project", "test", "--epochs", "100000"]
    with Forked("train.py", *flags, WANDB_MODE="offline") as process:
        assert any("epoch 2/" in line for line in process.stdout)  # and so the first one is saved
        children = [pid for pid, parent in processes().items() if parent == process.pid]
        assert children, "the tracker has no process of its own any more: nothing could be left"
        process.kill()
    deadline = time.monotonic() + 60
    while processes().keys() & children and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes().keys() & children
    load_checkpoint(data / "last.pt")


def processes() -> dict[int, int]:
    """The living processes, each with its parent."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(entry.parent.name)] = int(parent)
    return found


# --- Tracker and Hub ------------------------------------------------------------------------


class BrokenServer:
    """Answers each request with a status, or never ("hang")."""

    def __init__(self, fault: int | str):
        stopping = self.stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault == "hang":
                    stopping.wait()
                    return
                body = json.dumps({"errors": [{"message": "not today"}]}).encode()
                self.send_response(fault)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> BrokenServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self._server.shutdown()


DOWN = [401, 403, 503, "hang", "refused"]


@pytest.fixture(scope="module")
def down_runs(tmp_path_factory, encoder_dir) -> Iterator[dict]:
    """A training for each way in which tracker and Hub may fail, all at once: they mostly wait."""
    folder = tmp_path_factory.mktemp("down")
    data = write_photos(folder / "data", 18)
    flags = [*small_flags(data, encoder_dir), "--epochs", "2"]
    quiet = run("train.py", *flags, "--output_dir", folder / "off")
    assert quiet.returncode == 0, quiet.stderr

    def train_with(fault: int | str) -> tuple[subprocess.CompletedProcess, float]:
        with BrokenServer(fault if fault != "refused" else 503) as tracker, HubServer("x") as hub:
            # A Hub that never answers is in test_hub.py, with a shorter patience than train.py's.
            hub.faults = {"me/captioner": [("", 503 if fault == "hang" else fault)] * 100}
            nobody = "http://127.0.0.1:9"
            environment = CANARIES | {
                "WANDB_BASE_URL": nobody if fault == "refused" else tracker.url,
                "HF_ENDPOINT": nobody if fault == "refused" else hub.url,
                "HF_HUB_OFFLINE": "0",
                "HOME": str(folder / f"home {fault}"),
            }
            Path(environment["HOME"]).mkdir()
            started = time.monotonic()
            result = run(
                "train.py",
                *flags,
                "--output_dir",
                folder / str(fault),
                "--wandb_project",
                "test",
                "--hf_repo_id",
                "me/captioner",
                **environment,
            )
            return result, time.monotonic() - started

    with ThreadPoolExecutor(len(DOWN)) as pool:
        results = dict(zip(DOWN, pool.map(train_with, DOWN), strict=True))
    yield {"folder": folder, "results": results}


@pytest.mark.fault(count=2)
@pytest.mark.parametrize("fault", DOWN)
def test_services_that_are_down_change_nothing(down_runs, fault):
    result, seconds = down_runs["results"][fault]
    assert result.returncode == 0, result.stderr
    assert seconds < 240
    assert result.stdout.count("tracking: Weights & Biases can't be reached") == 1
    assert result.stdout.count("Hub: checkpoint not pushed") == 1
    assert "hf upload me/captioner" in result.stdout
    ours, theirs = (
        load_checkpoint(down_runs["folder"] / name / "last.pt") for name in ("off", str(fault))
    )
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, theirs.model.state_dict()[name]), name
    assert list((down_runs["folder"] / str(fault)).rglob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("fault", DOWN)
def test_secrets_are_written_nowhere(down_runs, fault):
    result, _ = down_runs["results"][fault]
    written = contents(down_runs["folder"] / str(fault))
    assert any(name.endswith(".wandb") for name in written) and "last.pt" in written
    written["stdout"], written["stderr"] = result.stdout.encode(), result.stderr.encode()
    for canary in CANARIES.values():
        assert not [name for name, content in written.items() if canary.encode() in content]


def test_secrets_that_errors_quote_are_hidden(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "c0ffee-c0ffee")
    monkeypatch.setenv("EMPTY_KEY", "")  # which stands between any two letters
    for text in (
        "no such key: c0ffee-c0ffee",
        "401: Authorization Basic YXBpOmMwZmZlZS1jMGZmZWU=",
        "Bearer c0ffee-c0ffee",
        "https://me:c0ffee-c0ffee@host/path",
        f"token hf_{'Ab1' * 10}",
        f"https://host/00001.tar?part=1&X-Amz-Signature={'Ab1' * 10}",
        "pipe:curl -u me:c0ffee https://host/{000..009}.tar",
        "pipe:KEY=c0ffee /bin/fetch x",
        "pipe:(KEY=c0ffee; fetch)",
        "pipe: curl -H 'X-Api-Key: c0ffee' host",
        shlex.join(["train.py", "--train_shards", "pipe:curl -H 'X-Api-Key: c0ffee' host"]),
        json.dumps({"TRAIN_SHARDS": "pipe:curl -u 'me:c0\"ffee' -H c0ffee"}),
        *(f"https://host/a.tar?{name}=c0ffee" for name in ("password", "auth", "code", "x")),
        "https://host/a#access_token=c0ffee",
        "https://me:hun@c0ffee@host/",
        "https:/me:c0ffee@host/x?c0ffee",  # as pathlib spells it
        "https://me:hun/c0ffee@host/",
        "(see https://me:c0ffee?x@host/a)",
    ):
        hidden = redact(text)
        assert "***" in hidden and not re.search("c0ffee|YXBp|Ab1|hun|ffee", hidden), hidden
        assert redact(hidden) == hidden
        assert not re.search("c0ffee|YXBp|Ab1|hun|ffee", first_line(OSError(text)))
    for plain in (
        "a plain message of bearers and basics",
        "s3://bucket/{0000..0009}.tar, or https://host:80/@me/a.tar.",
        "pipe:cat",
    ):
        assert redact(plain) == plain
    command = shlex.join(["train.py", "--train_shards", "pipe:get -u me:x y", "--epochs", "2"])
    assert redact(command) == "train.py --train_shards 'pipe:get ***' --epochs 2"
    for path, told in (("/home/me/a/", "a"), ("~/a::/b/c", "a::c"), ("a/b", "a/b")):
        assert last_part(path) == told


# --- Hostile files --------------------------------------------------------------------------


@pytest.mark.fault
def test_a_model_that_brings_code_is_refused(tmp_path):
    folder, mark = build_encoder("vit", tmp_path / "encoder"), tmp_path / "executed"
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    with pytest.raises(UserError, match="can't be loaded.*--encoder_model_name"):
        FrozenEncoder.load(str(folder))
    with pytest.raises(UserError, match=r"can't be loaded.*--encoder \("):
        FrozenEncoder.load_as_trained({"name": str(folder), "layers": [-1]}, 32)
    assert not mark.exists()


HEADERS = {
    "longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "longer than memory": (2**63).to_bytes(8, "little") + b"{}",
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "overlapping": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32",'
    b'"shape":[2],"data_offsets":[0,8]}}',
    "huge shape": b'{"a":{"dtype":"F32","shape":[99999999999999],"data_offsets":[0,8]}}',
}


@pytest.mark.fault
@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused(tmp_path, name):
    content = HEADERS[name]
    if content.startswith(b"{"):
        content = len(content).to_bytes(8, "little") + content + bytes(8)
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.safetensors is damaged"):
        load_checkpoint(path)


def base64_for_a_name(folder: Path) -> None:
    path = folder / "captions.jsonl"
    path.write_text(json.dumps({"image": "/9j/" + "Aa1" * 80_000, "caption": "a dog"}))
    with pytest.raises(SystemExit):
        run_script(lambda: read_captions(path) and None)


def slashes_in_a_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("/" * 200_000 + "a"))
    assert not [*read_shard(str(folder / "a.tar"), Counter(), {})]


MANY = 240_000
LONG = {
    "a word": lambda _: redact("a" * MANY),
    "an address": lambda _: redact("http://" + "." * MANY + "a"),
    "backslashes": lambda _: redact("'pipe:" + "\\a" * MANY),
    "escaped": lambda _: unescaped("&" + "amp;" * MANY),
    "marks": lambda _: unescaped("[/EN#1" * MANY),
    "ends": lambda _: unescaped("startseq " * MANY + " " * MANY + "endseq" * MANY),
    "digits": lambda _: BOX.match("1" * MANY),
    "photos": lambda _: SHOWN.findall("<img>" * MANY) + [PLACE.sub("", "<img>" * MANY)],
    "numbers of captions": lambda _: plain_name("#a" * MANY + "!"),
    "folders": lambda _: find_names(["a/" * MANY], ["a.jpg"]),
    "zeros": lambda _: find_names(["0" * MANY + "x"], ["a.jpg"]),
    "prices": lambda _: tokenize("$1" * (MANY // 20)),
    "base64": base64_for_a_name,
    "a tar": slashes_in_a_tar,
}


@pytest.mark.fault
@pytest.mark.parametrize("name", LONG)
def test_long_texts_take_no_longer_for_their_signs(tmp_path, capsys, name):
    def late(*_: object) -> None:
        raise TimeoutError(name)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)  # what takes its square takes minutes, or for ever
    try:
        LONG[name](tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert len(capsys.readouterr().err) < 2000


texts = st.text(st.characters(codec=None), max_size=6)  # half characters and zeros among them
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner),
    max_leaves=6,
)
odd_json = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"a.jpg": ["\\ud83d"]}']


@pytest.mark.fault(count=150)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_description_is_read_or_refused(trained, tmp_path_factory, data):
    """A checkpoint with a right checksum, whose description somebody made up in part."""
    with safe_open(trained / "captioner_best_cider.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["captioner"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    place = description
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    text = json.dumps(description)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file(weights, path, {"captioner": text, "digest": digest([text, weights])})
    try:
        assert isinstance(load_checkpoint(path), Checkpoint)
    except UserError as error:
        assert path.name in str(error)


names = st.text("ab/.\\ é\0:\ud83d", max_size=6)
entries = st.dictionaries(names, json_values | st.lists(texts, max_size=3))
asked = st.dictionaries(
    names,
    st.lists(
        st.dictionaries(
            st.sampled_from(["question", "answer", "answers", "type"]),
            json_values | texts,
        ),
        max_size=2,
    ),
)


@pytest.mark.fault(count=300)
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=40)
    | st.sampled_from(odd_json)
    | (json_values | entries | asked).map(json.dumps).map(str.encode)
)
def test_any_captions_and_questions_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    for load in (load_captions, load_questions):
        try:
            table = load(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        assert table
        for name, values in table.items():
            assert not os.path.isabs(name) and ".." not in name.split("/")
            texts = values if load is load_captions else [q.target for q in values]
            assert all(text.strip() and text.encode() for text in texts)


flags = st.tuples(
    st.sampled_from([f"--{name.lower()}" for name in constants(config)]),
    texts | st.integers(-10, 10).map(str) | st.floats().map(str),
)


@pytest.mark.fault(count=300)
@settings(max_examples=300, deadline=None)
@given(st.lists(flags, min_size=1, max_size=3))
def test_any_flags_are_understood_or_refused(given_flags):
    try:
        found = commands.train([f"{name}={value}" for name, value in given_flags])
    except UserError as error:
        assert re.match(r"[A-Z_]+ is ", str(error))
    except SystemExit as stop:
        assert stop.code == 2
    else:
        for name, (least, most) in RANGES.items():
            assert least <= getattr(found, name, least) <= most


WRONG_NUMBERS = {
    "--batch_size": "0",
    "--dropout": "1.5",
    "--ema_decay": "1",
    "--learning_rate": "nan",
    "--epochs": "-1",
    "--feature_views": "0",
    "--gradient_accumulation_steps": "0",
    "--checkpoint_prefix": "x" * 240,  # with what follows it, no name of a file
}


@pytest.mark.parametrize("flag", WRONG_NUMBERS)
def test_settings_out_of_range_are_refused(flag):
    with pytest.raises(UserError, match=rf"{flag[2:].upper()} is .*(must be|at most)"):
        commands.train([flag, WRONG_NUMBERS[flag]])


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    data = write_questions(write_photos(tmp_path / "data", 6))
    (data / "questions.json").rename(data / "asked.json")
    os.mkfifo(data / "vqa.csv")
    assert len(find_questions(data)) == 6
    os.mkfifo(data / "my_captions.csv")
    with pytest.raises(UserError, match="no file"):
        read_captions(data / "my_captions.csv")
    os.mkfifo(data / "last.pt")
    assert stored_digest(data / "last.pt") is None
    os.mkfifo(data / "splits.json")
    for use in (read_json, lambda path: write_changed(path, "{}")):
        with pytest.raises(UserError, match="no file"):
            use(data / "splits.json")
