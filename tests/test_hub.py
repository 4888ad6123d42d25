"""hub.py through the real Hub client, against a local server; no network, no mocks."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hub
from tests.hub_server import HANG, HubServer, Repo

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_CanaryCanaryCanaryCanary0123456789"
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused
CARD = "---\nlicense: other\n---\n# A card\n"

# What the subprocesses start with: the client reads its environment when it is imported.
PRELUDE = f"""
import json, sys, time
from pathlib import Path
from hub import HubPusher, download_checkpoint
from utils import UserError

CARD = {CARD!r}
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
pusher.push(path, CARD, "Epoch 1", {"width": 512})
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
    assert json.loads(commit.added["config.json"]) == {"width": 512}
    assert commit.added["README.md"] == CARD.encode()
    assert result["left"] == []
    assert result["printed"] == [f"Hub: pushed, see {server.url}/me/captioner/commit/{commit.oid}"]
    assert result["stderr"] == ""


def test_newer_push_replaces_the_one_that_waits(server, tmp_path):
    server.faults["me/captioner"] = [("commit", HANG)]
    code = """
pusher = HubPusher("me/captioner", report=lines.append, stall_timeout=1.5)
started = time.monotonic()
for name in ("one", "two", "three"):
    pusher.push(checkpoint(name), CARD, name, "{}")
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
for name in FAULTS:
    lines, marks = [], []
    pusher = HubPusher("me/" + name, report=lines.append, stall_timeout=1)
    started = time.monotonic()
    pusher.push(checkpoint(name + "1"), CARD, "first", "{}")
    took = time.monotonic() - started
    wait_for(lambda: lines)
    failed_after = time.monotonic() - started
    if name == "forbidden":
        pusher.retry()
        wait_for(lambda: pusher._thread is None)
    pusher.push(checkpoint(name + "2"), CARD, "second", "{}")
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
        ("unauthorized", "doesn't accept the login (401): run hf auth login"),
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
pusher.push(checkpoint("first"), CARD, "first", "{{}}")
wait_for(lambda: lines)
with HubServer({TOKEN!r}, port={port}) as server:
    pusher.push(checkpoint("second"), CARD, "second", "{{}}")
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
pusher.push(checkpoint("only"), CARD, "only", "{}")
wait_for(lambda: lines)
result["arrived"] = pusher.close()
"""
    assert run(tmp_path, server.url, code, HF_TOKEN=TOKEN)["arrived"] is True
    assert len(server.repos["me/captioner"].commits) == 1


@pytest.mark.fault
def test_close_gives_up_in_time_and_says_how_to_go_on(server, tmp_path):
    server.faults["me/captioner"] = [("commit", HANG)] * 9
    code = """
pusher = HubPusher("me/captioner", report=lines.append, stall_timeout=30)
pusher.push(checkpoint("last"), CARD, "last", "{}")
started = time.monotonic()
result["arrived"] = pusher.close(timeout=1)
result["seconds"] = time.monotonic() - started
"""
    result = run(tmp_path, server.url, code, HF_TOKEN=TOKEN)
    assert result["arrived"] is False
    assert 0.9 < result["seconds"] < 3
    path = tmp_path / "last.safetensors"
    (line,) = result["lines"]
    assert line.endswith(f"to send it: hf upload me/captioner {path} model.safetensors")
    assert not list(tmp_path.glob(".*.tmp"))


def test_without_a_login_one_line_and_no_request(server, tmp_path):
    code = """
pusher = HubPusher("me/captioner")
pusher.push(checkpoint("best"), CARD, "Epoch 1", {})
pusher.push(checkpoint("better"), CARD, "Epoch 2", {})
result["arrived"] = pusher.close()
HubPusher("").push(checkpoint("best"), CARD, "Epoch 1", {})
"""
    result = run(tmp_path, server.url, code)
    (line,) = result["printed"]
    assert "hf auth login" in line
    assert server.requests == []


def test_impossible_repository_name_is_refused_at_once():
    with pytest.raises(hub.UserError, match="HF_REPO_ID is 'a/b/c'"):
        hub.HubPusher("a/b/c")


# --- Download -------------------------------------------------------------------------------


def test_download_by_revision_and_from_the_cache(server, tmp_path):
    repo = server.repos["me/captioner"] = Repo()
    repo.tags["v1"] = repo.commit("one", {"model.safetensors": b"old"}).oid
    repo.commit("two", {"model.safetensors": b"new"})
    code = """
result["newest"] = download_checkpoint("me/captioner").read_text()
result["v1"] = download_checkpoint("me/captioner", "v1").read_text()
"""
    result = run(tmp_path, server.url, code)
    assert (result["newest"], result["v1"]) == ("new", "old")

    code = """
result["cached"] = download_checkpoint("me/captioner").read_text()
try:
    download_checkpoint("me/other")
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
    server.repos["me/broken"] = Repo()
    server.faults["me/broken"] = [("resolve", 503)]
    server.faults["me/expired"] = [("resolve", 401)] * 2
    cases = {
        "nobody/nothing": (None, "no such Hub repository"),
        "me/empty": (None, "holds no model.safetensors"),
        "me/empty ": ("v9", "no such revision"),
        "me/gated": (None, "gives access on request"),
        "me/broken": (None, "can't be reached"),
        "me/expired": (None, "doesn't accept the login (401)"),
        "./runs/best.safetensors": (None, "neither a file here nor the name of a Hub repository"),
    }
    code = f"""
for key, (revision, says) in {cases!r}.items():
    started = time.monotonic()
    try:
        download_checkpoint(key.strip(), revision)
    except UserError as error:
        result[key] = (str(error), time.monotonic() - started)
"""
    result = run(tmp_path, server.url, code)
    for key, (_, says) in cases.items():
        message, seconds = result[key]
        assert says in message and key.strip() in message
        assert seconds < 5


# --- Card -----------------------------------------------------------------------------------


def card(**changes) -> str:
    arguments = {
        "repo_id": "me/captioner",
        "encoder": "google/vit-base-patch16-224-in21k",
        "encoder_revision": "b4569560a39a0f1af58e3ddaf17facf20ab919b0",
        "dataset": "Flickr8k",
        "split": "val",
        "scorer": "pycocoevalcap 1.2",
        "scores": {"CIDEr": 35.25, "BLEU-4": 15.5},
        "command": "python train.py --dataset flickr8k --hf_repo_id me/captioner",
        "samples": {"1.jpg": "a {dog} runs: fast", "2.jpg": "two men talk"},
    }
    return hub.model_card(**arguments | changes)


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


def test_card_invents_nothing(tmp_path):
    read = ModelCard(card(scores={}, samples={}))
    assert not read.data.eval_results
    assert "Not measured yet." in read.text
    with pytest.raises(ValueError, match="not finite"):
        card(scores={"CIDEr": math.nan})


def test_card_names_a_local_encoder_without_its_path(tmp_path):
    encoder = tmp_path / "tiny_vit"
    encoder.mkdir()
    text = card(encoder=str(encoder), encoder_revision=None)
    assert ModelCard(text).data.base_model is None
    assert "`tiny_vit`" in text
    assert str(tmp_path) not in text


def test_card_holds_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token-0123")
    text = card(command=f"HF_TOKEN=an-unusual-token-0123 python train.py --x {TOKEN}")
    assert "unusual" not in text and "Canary" not in text
    assert "HF_TOKEN=hf_*** python train.py --x hf_***" in text
