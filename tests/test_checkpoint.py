"""Checkpoints are self-contained, verified, and refuse what isn't theirs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import Checkpoint, load_checkpoint, save_for_training, save_for_use
from decoder import DecoderConfig
from generation import GenerationOptions
from model import CaptionModel
from tests.conftest import REPO
from tokenizer import CaptionTokenizer
from utils import UserError


@pytest.fixture
def checkpoint() -> Checkpoint:
    tokenizer = CaptionTokenizer.train(["a red square", "a blue square"] * 3, 300)
    torch.manual_seed(0)
    config = DecoderConfig(len(tokenizer), width=16, layers=1, heads=2, ff_dim=32, max_length=9)
    model = CaptionModel(8, config)
    optimizer = torch.optim.AdamW(model.parameters())
    model.memory(torch.randn(1, 4, 8))[0][0].sum().backward()
    optimizer.step()
    return Checkpoint(
        model,
        tokenizer,
        {"name": "tiny"},
        GenerationOptions(beam_size=4),
        ("captions",),
        {"SEED": 0},
        {"val_loss": 1.5},
        {"optimizer": optimizer.state_dict(), "step": 1},
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_saved_comes_back(checkpoint, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    loaded = load_checkpoint(path)
    assert loaded.description() == checkpoint.description()
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert loaded.tokenizer.encode(["a red square"]) == checkpoint.tokenizer.encode(
        ["a red square"]
    )
    assert not any("encoder" in name for name in loaded.model.state_dict())
    if suffix == ".pt":
        exp = loaded.training["optimizer"]["state"][0]["exp_avg"]
        assert torch.equal(exp, checkpoint.training["optimizer"]["state"][0]["exp_avg"])
    else:
        assert loaded.training is None


@pytest.mark.fault(count=60)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_no_changed_value_goes_unnoticed(checkpoint, tmp_path, suffix):
    """Flip one bit in many places: the file is refused, or its content is what it was."""
    path = tmp_path / f"c{suffix}"
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    whole = path.read_bytes()
    weights = checkpoint.model.state_dict()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert path.name in str(error)
            refused += 1
        else:
            assert loaded.description() == checkpoint.description()
            assert all(torch.equal(loaded.model.state_dict()[n], t) for n, t in weights.items())
    assert refused > 40


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff" * 100])
def test_what_is_no_checkpoint_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.fault(count=3)
def test_others_weights_and_cut_files_are_refused(checkpoint, tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a captioner"):
        load_checkpoint(path)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "c.pt")
    save_for_training(tmp_path / "c.pt", checkpoint)
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:-900])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "c.pt")


class Payload:
    """Pickles to a call: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(count=2)
def test_nothing_in_a_pt_is_executed(tmp_path):
    path, mark = tmp_path / "c.pt", tmp_path / "executed"
    torch.save({"captioner": Payload(mark)}, path)
    with pytest.raises(UserError, match="more than data"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.mark.fault
def test_wrong_shapes_are_refused_before_memory_is_taken(checkpoint, tmp_path):
    description = checkpoint.description()
    description["decoder"]["width"] = 2**20
    from checkpoint import digest

    text, weights = json.dumps(description), dict(checkpoint.model.state_dict())
    path = tmp_path / "c.safetensors"
    save_file(weights, path, {"captioner": text, "digest": digest([text, weights])})
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(path)


FULL_DISK = """
import resource, sys
sys.path.insert(0, {repo!r})
from pathlib import Path
from checkpoint import load_checkpoint, save_for_training, save_for_use
from utils import UserError
path = Path({path!r})
checkpoint = load_checkpoint(path)
checkpoint.training = {{"step": 2}}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    (save_for_use if path.suffix == ".safetensors" else save_for_training)(path, checkpoint)
except UserError as error:
    print(error)
"""


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_file_whole(checkpoint, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    before = path.read_bytes()
    assert len(before) > 4096 and resource.RLIMIT_FSIZE is not None
    code = FULL_DISK.format(repo=str(REPO), path=str(path))
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert path.name in result.stdout, result.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
