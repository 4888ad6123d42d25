"""hub.py through the real Hub client, against a local server; no network, no mocks."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image

import hub
from checkpoint import load_checkpoint
from inference import load_captioner
from tests.conftest import best_entry, best_file, small_flags, write_photos
from tests.conftest import run as run_script
from tests.hub_server import HANG, HubServer, Repo
from tests.test_export import elsewhere
from tokenizer import CaptionTokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_CanaryCanaryCanaryCanary0123456789"
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused
CARD = "---\nlicense: other\n---\n# A card\n"

# What the subprocesses start with: the client reads its environment when it is imported.
PRELUDE = f"""
import json, sys, time
from pathlib import Path
import checkpoint, hub
from hub import HubPusher, locate_checkpoint
from utils import UserError

hub.link_for_others = checkpoint.link_or_copy  # here checkpoints are any bytes

FILES = {{"README.md": {CARD!r}, "config.json": "{{}}"}}
folder = Path(sys.argv[1])
lines = []
result = {{"lines": lines}}

def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)

def checkpoint(text):
    path = folder / (text + ".safetensors")
    path.write_bytes(text.encode() * 1000)
    return path
"""


def run(tmp_path: Path, url: str, code: str, **environment: str) -> dict:
    """Run `code` after PRELUDE in a process of its own; returns what it put into `result`."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }
    clean |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code + "\nprint(json.dumps(result))", str(tmp_path)],
        env=clean | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Canary" not in output
    result = json.loads(done.stdout.splitlines()[-1])
    result["printed"] = done.stdout.splitlines()[:-1]
    result["stderr"] = done.stderr
    return result


@pytest.fixture
def server():
    with HubServer(TOKEN) as server:
        yield server


# --- Push -----------------------------------------------------------------------------------


def test_push_is_one_commit_of_three_files(server, tmp_path):
    code = """
pusher = HubPusher("me/captioner")
path = checkpoint("best")
pusher.push(path, FILES, "Epoch 1")
path.unlink()
result["arrived"] = pusher.close()
result["left"] = [file.name for file in folder.glob("*") if file.is_file()]
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    assert result["arrived"] is True
    (commit,) = server.repos["me/captioner"].commits
    assert commit.message == "Epoch 1"
    assert commit.added.keys() == {"model.safetensors", "config.json", "README.md"}
    assert commit.added["model.safetensors"] == b"best" * 1000
    assert commit.added["config.json"] == b"{}"
    assert commit.added["README.md"] == CARD.encode()
    assert result["left"] == []
    assert result["printed"] == [f"Hub: pushed, see {server.url}/me/captioner/commit/{commit.oid}"]
    assert result["stderr"] == ""


def test_newer_push_replaces_the_one_that_waits(server, tmp_path):
    server.faults["me/captioner"] = [("commit", HANG)]
    code = """
import hub
hub.STALL_TIMEOUT = 1.5
pusher = HubPusher("me/captioner", report=lines.append)
started = time.monotonic()
for name in ("one", "two", "three"):
    pusher.push(checkpoint(name), FILES, name)
result["seconds"] = time.monotonic() - started
result["arrived"] = pusher.close()
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    assert result["seconds"] < 1
    assert result["arrived"] is True
    assert [commit.message for commit in server.repos["me/captioner"].commits] == ["three"]
    assert not list(tmp_path.glob(".*.tmp"))


FAULTS = {
    "unauthorized": [("commit", 401)],
    "forbidden": [("create", 403), ("create", 403)],
    "missing": [("commit", 404)],
    "down": [("commit", 503)],
    "large-file": [("objects/batch", 403)],
    "silent": [("commit", HANG)],
}


@pytest.fixture(scope="module")
def fault_runs(tmp_path_factory):
    """For each fault: push into it, wait for the warning, push again. One process for all."""
    code = """
import hub
hub.STALL_TIMEOUT = 1
for name in FAULTS:
    lines, marks = [], []
    pusher = HubPusher("me/" + name, report=lines.append)
    started = time.monotonic()
    pusher.push(checkpoint(name + "1"), FILES, "first")
    took = time.monotonic() - started
    wait_for(lambda: lines)
    failed_after = time.monotonic() - started
    if name == "forbidden":
        pusher.retry()
        wait_for(lambda: pusher._thread is None)
    pusher.push(checkpoint(name + "2"), FILES, "second")
    result[name] = {
        "took": took, "failed_after": failed_after, "arrived": pusher.close(), "lines": lines
    }
""".replace("FAULTS", repr(list(FAULTS)))
    folder = tmp_path_factory.mktemp("faults")
    with HubServer(TOKEN) as server:
        server.faults = {f"me/{name}": list(faults) for name, faults in FAULTS.items()}
        result = run(folder, server.url, code, HF_TOKEN=TOKEN)
        assert not any(server.faults.values()), "a fault was not met"
        yield result, server, folder


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unauthorized", "doesn't accept the login (401): unset HF_TOKEN and run "),
        ("forbidden", "may not do this (403)"),
        ("missing", "no such repository (404)"),
        ("down", "answered 503"),
        ("large-file", "may not do this (403)"),
        ("silent", "can't be reached (ReadTimeout)"),
    ],
)
def test_failed_push_warns_once_and_the_next_succeeds(fault_runs, name, says):
    result, server, folder = fault_runs
    seen = result[name]
    assert seen["took"] < 0.5
    assert seen["failed_after"] < 10
    warning, arrival = seen["lines"]
    assert says in warning
    assert arrival.startswith("Hub: pushed, see ")
    assert seen["arrived"] is True
    (commit,) = server.repos[f"me/{name}"].commits
    assert commit.message == "second"
    assert commit.added["model.safetensors"] == f"{name}2".encode() * 1000
    assert not list(folder.glob(".*.tmp"))
    assert result["stderr"] == ""


@pytest.mark.fault
def test_refused_connection_then_a_hub_that_is_back(tmp_path):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    code = f"""
from tests.hub_server import HubServer
pusher = HubPusher("me/captioner", report=lines.append)
pusher.push(checkpoint("first"), FILES, "first")
wait_for(lambda: lines)
with HubServer({TOKEN!r}, port={port}) as server:
    pusher.push(checkpoint("second"), FILES, "second")
    result["arrived"] = pusher.close()
    result["messages"] = [commit.message for commit in server.repos["me/captioner"].commits]
"""
    result = run(tmp_path, f"http://127.0.0.1:{port}", code, HF_TOKEN=TOKEN)
    assert "can't be reached (ConnectError)" in result["lines"][0]
    assert len(result["lines"]) == 2
    assert result["arrived"] is True
    assert result["messages"] == ["second"]


def test_close_tries_a_failed_push_again(server, tmp_path):
    server.faults["me/captioner"] = [("commit", 503)]
    code = """
pusher = HubPusher("me/captioner", report=lines.append)
pusher.push(checkpoint("only"), FILES, "only")
wait_for(lambda: lines)
result["arrived"] = pusher.close()
"""
    assert run(tmp_path, server.url, code, HF_TOKEN=TOKEN)["arrived"] is True
    assert len(server.repos["me/captioner"].commits) == 1


@pytest.mark.fault
def test_close_gives_up_in_time_and_says_how_to_go_on(server, tmp_path):
    server.faults["me/captioner"] = [("commit", HANG)] * 9
    code = """
pusher = HubPusher("me/captioner", report=lines.append)
pusher.push(checkpoint("last"), FILES, "last")
started = time.monotonic()
result["arrived"] = pusher.close(timeout=1)
result["seconds"] = time.monotonic() - started
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    assert result["arrived"] is False
    assert 0.9 < result["seconds"] < 3
    path = tmp_path / "last.safetensors"
    (line,) = result["lines"]
    program, *words = shlex.split(line.partition("to send it: ")[2])
    assert words == ["upload", "me/captioner", str(path), "model.safetensors"]
    assert (tmp_path / program).is_file()  # which need not be in PATH
    assert not list(tmp_path.glob(".*.tmp"))
    server.faults["me/other"] = [("commit", HANG)] * 9
    code = code.replace("me/captioner", "me/other")
    code = "hub.link_for_others = lambda path, other: other.write_bytes(b'public')\n" + code
    (line,) = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)["lines"]
    path = tmp_path / "to_send_last.safetensors"  # what was made of it, and not the checkpoint
    assert f"hf upload me/other {path} model.safetensors" in line
    assert path.read_bytes() == b"public" and not list(tmp_path.glob(".*.tmp"))


def test_close_says_that_it_waits(server, tmp_path):
    server.faults["me/captioner"] = [("commit", HANG)]
    code = """
import hub
hub.QUIET, hub.STALL_TIMEOUT = 0.3, 1.0
pusher = HubPusher("me/captioner", report=lines.append)
pusher.push(checkpoint("last"), FILES, "last")
result["arrived"] = pusher.close(timeout=20)
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    assert result["arrived"] is True
    assert result["lines"][0] == "Hub: waiting for the last push to arrive, 20 s at most"
    assert "not pushed" in result["lines"][1] and "Hub: pushed" in result["lines"][-1]


def test_without_a_login_one_line_and_no_request(server, tmp_path):
    code = """
pusher = HubPusher("me/captioner")
pusher.push(checkpoint("best"), FILES, "Epoch 1")
pusher.push(checkpoint("better"), FILES, "Epoch 2")
result["arrived"] = pusher.close()
HubPusher("").push(checkpoint("best"), FILES, "Epoch 1")
"""
    result = run(tmp_path, server.url, code)
    (line,) = result["printed"]
    assert "hf auth login" in line
    assert server.requests == []


READ_ONLY = {"auth": {"accessToken": {"role": "read"}}}


@pytest.mark.parametrize(
    ("repo_id", "account", "says"),
    [
        ("owner/captioner", {}, "--hf_repo_id"),
        ("team/captioner", {"orgs": [{"name": "team", "roleInOrg": "read"}]}, "--hf_repo_id"),
        ("me/captioner", READ_ONLY, "can only read: unset HF_TOKEN and run "),
        ("Team/captioner", {"orgs": [{"name": "team", "roleInOrg": "write"}]}, None),
    ],
    ids=["another's", "team that one reads", "reading token", "team that one writes to"],
)
def test_a_login_that_can_not_write_is_told_at_the_start(server, tmp_path, repo_id, account, says):
    server.account |= account
    code = f"""
pusher = HubPusher({repo_id!r}, report=lines.append)
result["at_start"] = list(lines)
pusher.push(checkpoint("best"), FILES, "Epoch 1")
pusher.close()
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    if says is None:
        assert result["at_start"] == [] and len(server.repos[repo_id].commits) == 1
        return
    (line,) = result["lines"]
    assert result["at_start"] == [line] and says in line and "nothing is pushed" in line
    # The client may ask other things of its own accord, but nothing is sent.
    assert all(request.startswith("GET ") for request in server.requests)


@pytest.mark.fault
def test_a_hub_that_does_not_tell_whose_login_it_is(server, tmp_path):
    """The start waits no longer than told, and the first push asks before it makes anything."""
    server.account["name"] = "somebody"
    server.faults["whoami"] = [("whoami", HANG)]
    code = """
import hub
hub.LOGIN_TIMEOUT = 1
started = time.monotonic()
pusher = HubPusher("owner/captioner", report=lines.append)
result["seconds"] = time.monotonic() - started
pusher.push(checkpoint("best"), FILES, "Epoch 1")
wait_for(lambda: lines)
result["arrived"] = pusher.close()
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    assert 0.9 < result["seconds"] < 3
    assert "somebody, who is logged in, can't write to owner/captioner" in result["lines"][0]
    assert result["arrived"] is False
    assert all(request.startswith("GET ") for request in server.requests)
    assert server.requests.count("GET /api/whoami-v2") >= 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_impossible_repository_name_is_refused_at_once():
    with pytest.raises(hub.UserError, match="HF_REPO_ID is 'a/b/c'"):
        hub.HubPusher("a/b/c")


# --- Download -------------------------------------------------------------------------------


def test_download_by_revision_and_from_the_cache(server, tmp_path):
    repo = server.repos["me/captioner"] = Repo()
    repo.tags["v1"] = repo.commit("one", {"model.safetensors": b"old"}).oid
    repo.commit("two", {"model.safetensors": b"new"})
    code = """
result["newest"] = locate_checkpoint("me/captioner").read_text()
result["v1"] = locate_checkpoint("me/captioner", "v1").read_text()
"""
    result = run(tmp_path, server.url, code)
    assert (result["newest"], result["v1"]) == ("new", "old")

    code = """
result["cached"] = locate_checkpoint("me/captioner").read_text()
try:
    locate_checkpoint("me/other")
except UserError as error:
    result["error"] = str(error)
"""
    for url, environment in ((NOBODY, {}), (server.url, {"HF_HUB_OFFLINE": "1"})):
        result = run(tmp_path, url, code, **environment)
        assert result["cached"] == "new"
        assert "the Hub can't be reached, and no copy was downloaded" in result["error"]
        assert result["stderr"] == ""


def test_what_can_not_be_downloaded_is_explained(server, tmp_path):
    server.repos["me/gated"] = Repo(gated=True)
    server.repos["me/empty"] = Repo()
    server.repos["me/empty"].commit("one", {"README.md": b"hello"})
    server.faults["me/expired"] = [("resolve", 401)] * 2
    cases = {
        "nobody/nothing": (None, "no such Hub repository"),
        "me/empty": (None, "holds no model.safetensors"),
        "me/empty ": ("v9", "no such revision"),
        "me/gated": (None, "gives access on request"),
        "me/expired": (None, "doesn't accept the login (401)"),
        "runs/best -1-": (None, "neither a file here nor the name of a Hub repository"),
    }
    code = f"""
for key, (revision, says) in {cases!r}.items():
    started = time.monotonic()
    try:
        locate_checkpoint(key.strip(), revision)
    except UserError as error:
        result[key] = (str(error), time.monotonic() - started)
"""
    result = run(tmp_path, server.url, code)
    for key, (_, says) in cases.items():
        message, seconds = result[key]
        assert says in message and key.strip() in message
        assert seconds < 5


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks4://127.0.0.1:9"])
def test_a_proxy_that_the_client_does_not_know(server, tmp_path, proxy):
    server.repos["me/captioner"] = Repo()
    server.repos["me/captioner"].commit("one", {"model.safetensors": b"weights"})
    fetch = 'result["cached"] = locate_checkpoint("me/captioner").read_text()'
    run(tmp_path, server.url, fetch)
    assert run(tmp_path, server.url, fetch, ALL_PROXY=proxy)["cached"] == "weights"
    code = """
try:
    locate_checkpoint("me/other")
except UserError as error:
    result["error"] = str(error)
pusher = HubPusher("me/captioner", report=lines.append)
pusher.push(checkpoint("best"), FILES, "Epoch 1")
pusher.close()
"""
    result = run(tmp_path, server.url, code, ALL_PROXY=proxy, HF_TOKEN=TOKEN)
    said = result["error"]
    assert said.startswith("checkpoint me/other: ") and "proxy" in said and "\n" not in said
    assert "not pushed" in result["lines"][0] and "proxy" in result["lines"][0]


# --- There and back -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, encoder_dir):
    """A training that pushed to a server: its data folder, its last commit, and the server."""
    folder = tmp_path_factory.mktemp("pushed")
    data = write_photos(folder / "data", 24)
    with HubServer(TOKEN) as server:
        result = run_script(
            "train.py",
            *small_flags(data, encoder_dir),
            "--hf_repo_id",
            "me/captioner",
            "--epochs",
            3,
            "--scst_epochs",
            1,
            HF_ENDPOINT=server.url,
            HF_TOKEN=TOKEN,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(folder / "hf"),
            HF_HUB_DISABLE_XET="1",
        )
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        yield data, server.repos["me/captioner"].commits[-1], server


def test_the_newest_on_the_hub_captions_as_the_best_does(pushed, encoder_dir, tmp_path):
    data, commit, server = pushed
    photos = [str(path) for path in sorted((data / "images").iterdir())[:4]]
    best = load_captioner(best_file(data), precision="fp32")
    there = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    code = "import sys; from inference import load_captioner\n"
    code += "captioner = load_captioner('me/captioner', precision='fp32', encoder=sys.argv[1])\n"
    code += "print(captioner.caption(sys.argv[2:]))"
    newest = run_script("-c", code, encoder_dir, *photos, **there, HF_HOME=str(tmp_path / "one"))
    assert newest.stdout.strip() == str(best.caption(photos)), newest.stderr
    # Something else is pushed; the commit still gives what it gave.
    server.repos["me/captioner"].commit("later", {"model.safetensors": b"nonsense"})
    flags = ["--checkpoint", "me/captioner", "--revision", commit.oid, "--precision", "fp32"]
    flags += ["--encoder", encoder_dir]
    command = run_script(
        "inference.py", photos[0], *flags, **there, HF_HOME=str(tmp_path / "other")
    )
    assert command.stdout.strip() == best.caption(photos[:1])[0], command.stderr
    hub = {**there, "HF_HOME": str(tmp_path / "other")}
    scored = run_script(ROOT / "evaluate.py", *flags, "--data_dir", data, cwd=tmp_path, **hub)
    assert (tmp_path / "me_captioner_data_val.html").is_file(), scored.stderr
    flags = ["--checkpoint", best_file(data), "--precision", "fp32"]
    own = run_script("evaluate.py", *flags, "--data_dir", data)
    values = [json.loads(each.stdout.splitlines()[-1])["CIDEr-D"] for each in (scored, own)]
    assert values[0] == pytest.approx(values[1])


def test_what_was_pushed_is_of_use_to_other_programs(pushed, encoder_dir, tmp_path, monkeypatch):
    data, commit, _ = pushed
    files = commit.files
    assert files.keys() == {
        "model.safetensors",
        "config.json",
        "README.md",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        "modeling_captioner.py",
        "pictures.py",
        "decoder.py",
        "rerank.py",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    # The card names what loads it without the question whether to run code.
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(*asked))
    (named,) = re.findall(rb"tokenizer.json` loads with `transformers.(\w+)", files["README.md"])
    theirs = getattr(transformers, named.decode()).from_pretrained(tmp_path)
    again = CaptionTokenizer.load(tmp_path / "vocab.json", tmp_path / "merges.txt")
    for text in ("A red square  on the LEFT .", "É, what else?", "on <the> left", "कुत्ता है।"):
        [ids] = checkpoint.tokenizer.encode([text])
        assert [theirs(text).input_ids] == again.encode([text]) == [ids]
        assert theirs.decode(ids).strip() == checkpoint.tokenizer.decode(ids)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    where = {"encoder": str(encoder_dir), "precision": "fp32"}
    captioner = load_captioner(tmp_path / "model.safetensors", **where)
    photo = Image.open(data / "images" / "000.png").convert("RGB")
    ours = captioner.encoder.preprocess([photo])["pixel_values"]
    assert torch.equal(processor(images=[photo], return_tensors="pt")["pixel_values"], ours)
    config = json.loads(files["config.json"])
    assert config["hidden_size"] == 32 and config["trained"]["scores"]
    for name, content in files.items():
        for folder in (data.parent, encoder_dir.parent):
            assert str(folder).encode() not in content, f"{name} tells of {folder}"
    assert checkpoint.settings["DATA_DIR"] == data.name
    assert checkpoint.encoder["name"] == encoder_dir.name
    photos = [str(path) for path in sorted((data / "images").iterdir())[:3]]
    ((written, _),) = elsewhere(tmp_path, tmp_path, [""], photos, str(encoder_dir))
    assert written == captioner.caption(photos, beam_size=1)

    read = ModelCard(files["README.md"].decode())
    entries = load_checkpoint(data / "last.pt").training["progress"]["history"]
    best = best_entry(entries)
    measured = {result.metric_name: result.metric_value for result in read.data.eval_results}
    assert measured["CIDEr-D"] == pytest.approx(best["val_cider"])
    assert measured["cross-entropy"] == pytest.approx(best["val_loss"])
    assert read.data.eval_results[0].dataset_split == "ratio val"
    assert read.data.language is None  # of one's own photos nobody knows it
    assert "metrics.py" in read.data.eval_results[0].metric_args["scorer"]
    for name, caption in best["samples"].items():
        assert f"- `{name}`: {caption}" in read.text
    assert (
        'load_captioner("me/captioner", encoder="FOLDER")' in read.text
        and "## Licence" in read.text
    )


# --- Card -----------------------------------------------------------------------------------


def card(**changes) -> str:
    arguments = {
        "name": "google/vit-base-patch16-224-in21k",
        "revision": "b4569560a39a0f1af58e3ddaf17facf20ab919b0",
        "start": None,
        "tasks": ["captions"],
        "dataset": "Flickr8k",
        "split": "val",
        "scorer": "pycocoevalcap 1.2",
        "scores": {"CIDEr": 35.25, "BLEU-4": 15.5},
        "scored": "Flickr8k",
        "command": "python train.py --dataset flickr8k --hf_repo_id me/captioner",
        "samples": {"1.jpg": "a {dog} runs: fast", "2.jpg": "two men talk"},
    }
    arguments |= changes
    checkpoint = SimpleNamespace(
        encoder={name: arguments.pop(name) for name in ("name", "revision")},
        scores=arguments.pop("scores"),
        tasks=arguments.pop("tasks"),
        settings={"START_CHECKPOINT": arguments.pop("start")},
    )
    return hub.model_card("me/captioner", checkpoint, **arguments)


def test_card_of_who_only_answers_asks():
    scores = {"cross-entropy": 2, "accuracy of answers": 3}
    said = card(question='is it "red"?', scores=scores, tasks=["questions"])
    assert "answers questions about photos" in said and "captioning" not in said
    assert ModelCard(said).data.pipeline_tag == "visual-question-answering"
    kinds = {result.task_type for result in ModelCard(said).data.eval_results}
    assert kinds == {"visual-question-answering"}
    for call in (
        r'text="is it \"red\"?"',
        "--checkpoint me/captioner --question 'is it \"red\"?'",
        r'.answer("photo.jpg", "is it \"red\"?")',
    ):
        assert call in said


def test_card_is_read_back_by_the_hubs_own_reader():
    read = ModelCard(card())
    results = {result.metric_name: result for result in read.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "CIDEr": 35.25,
        "BLEU-4": 15.5,
    }
    assert results["CIDEr"].dataset_split == "val"
    assert results["CIDEr"].metric_args == {"scorer": "pycocoevalcap 1.2"}
    assert read.data.base_model == "google/vit-base-patch16-224-in21k"
    assert read.data.pipeline_tag == "image-to-text"
    assert "trained from scratch on" in read.text
    assert "starting from" not in read.text and card(start="a/b").count("starting from `a/b`") == 2
    for text in (
        "| CIDEr | 35.25 |",
        "val split of Flickr8k",
        "pycocoevalcap 1.2",
        "revision `b4569560",
        "--hf_repo_id me/captioner",
        "- `1.jpg`: a {dog} runs: fast",
        "## Licence",
    ):
        assert text in read.text


def test_card_tells_the_data_that_were_scored_from_those_it_learned_from():
    read = ModelCard(card(dataset="cc3m", scored="Flickr8k"))
    assert {result.dataset_name for result in read.data.eval_results} == {"Flickr8k"}
    assert "On the val split of Flickr8k" in read.text and "captions of cc3m" in read.text


def test_card_shows_texts_from_outside_as_they_are():
    said = card(samples={"a`\n# b.jpg": "![x](http://a/b.png) <img src=x> `"})
    assert "\n- `a'\\n# b.jpg`: \\!\\[x\\](http://a/b.png) \\<img src=x\\> \\`\n" in said


def test_card_of_who_captions_and_answers_tells_both():
    said = card(tasks=["captions", "questions"], scores={"BLEU-4": 4e-11}, dataset="*my* photos")
    assert "that captions and answers questions about photos" in said and "| BLEU-4 | 0 |" in said
    assert said.count("captions and questions of \\*my\\* photos") == 2


def test_card_invents_nothing(tmp_path):
    read = ModelCard(card(scores={}, samples={}))
    assert not read.data.eval_results
    assert "Not measured yet." in read.text
    assert read.data.language is None and ModelCard(card(language="en")).data.language == "en"


def test_card_names_a_local_encoder_without_its_path(tmp_path):
    encoder = tmp_path / "tiny_vit"
    encoder.mkdir()
    text = card(name=str(encoder), revision=None)
    assert ModelCard(text).data.base_model is None
    assert "`tiny_vit`" in text
    assert str(tmp_path) not in text
    given = ['model_kwargs={"encoder": "FOLDER"}', "--encoder FOLDER", ', encoder="FOLDER")']
    assert all(each in text and each not in card() for each in given)


def test_card_holds_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token-0123")
    text = card(command=f"HF_TOKEN=an-unusual-token-0123 python train.py --x {TOKEN}")
    assert "unusual" not in text and "Canary" not in text
    assert "HF_TOKEN=hf_*** python train.py --x hf_***" in text
