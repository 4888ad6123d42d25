"""Checkpoints are self-contained, verified, and refuse what isn't theirs."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoint import (
    FORMAT,
    Checkpoint,
    digest,
    load_checkpoint,
    name_again,
    save_for_training,
    save_for_use,
)
from decoder import DecoderConfig
from encoder import FrozenEncoder
from model import CaptionModel
from options import GenerationOptions
from tests.conftest import run
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


@pytest.mark.fault(count=2)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_are_no_numbers_are_refused(checkpoint, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    checkpoint.model.project.weight.data[0, 0] = float("nan")
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    with pytest.raises(UserError, match=rf"c{suffix} holds weights that are not finite"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_loaded_stays_when_another_file_is_copied_over_it(checkpoint, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    loaded = load_checkpoint(path)
    with path.open("r+b") as file:  # as cp does, whereas a file that is moved there is another one
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.model.project.weight, checkpoint.model.project.weight)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_saved_comes_back(checkpoint, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    loaded = load_checkpoint(path)
    assert not loaded.model.training  # without dropout
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


def test_a_digest_is_what_it_was_and_tells_names_and_shapes_apart():
    numbers = torch.arange(6.0)
    held = {"b": numbers.view(2, 3), "a": [1, None, "x", (True, 2.5)]}
    assert digest(held).startswith("7fa53f91d4ebfbf5")  # or all files from before are "damaged"
    others = [{"b": numbers.view(3, 2), "a": held["a"]}, {"b": held["b"], "c": held["a"]}]
    assert len({*map(digest, [held, *others])}) == 3


@pytest.mark.parametrize("value", [np.float64(1.5), {1, 2}, Path("x")])
def test_what_could_not_be_loaded_again_is_not_saved(checkpoint, tmp_path, value):
    checkpoint.training["mine"] = value
    with pytest.raises(TypeError, match="would be saved, but not be loaded"):
        save_for_training(tmp_path / "c.pt", checkpoint)
    assert not [*tmp_path.iterdir()]


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
    with pytest.raises(UserError, match="damaged, holds more than data or is not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="no checkpoint .*: name a .safetensors or .pt"):
        load_checkpoint(tmp_path)
    for name in ("captioner_epoch_2", "older"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    os.utime(tmp_path / "older.safetensors", (1, 1))
    (tmp_path / "gone.safetensors").symlink_to("absent")
    for named in (tmp_path, tmp_path / "captioner_best_cider.safetensors"):
        with pytest.raises(UserError, match="the newest there is .*/captioner_epoch_2.safetensors"):
            load_checkpoint(named)


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_of_others_that_may_not_be_read_is_not_called_damaged(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    path.touch(mode=0)
    # Root may read it all the same, unless it gives that up (CAP_DAC_OVERRIDE and _READ_SEARCH).
    code = (
        "import ctypes, sys\n"
        "drop = getattr(ctypes.CDLL(None), 'capset', lambda *_: 0)  # Linux alone\n"
        "drop((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())\n"
        "from checkpoint import load_checkpoint\n"
        "from utils import run_script\n"
        "run_script(lambda: load_checkpoint(sys.argv[1]))"
    )
    result = run("-c", code, path)
    assert result.returncode == 1 and result.stderr == f"error: {path}: Permission denied\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_that_was_not_fetched_or_has_another_suffix(checkpoint, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(UserError, match="run git lfs pull"):
        load_checkpoint(path)
    (save_for_use if suffix == ".safetensors" else save_for_training)(path, checkpoint)
    path = path.rename(tmp_path / "c.bin")  # as a mail program may call it
    assert load_checkpoint(path).description() == checkpoint.description()


def test_a_decoder_that_was_changed_is_named_by_its_weights(checkpoint, tmp_path, monkeypatch):
    save_for_use(tmp_path / "c.safetensors", checkpoint)
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
    with pytest.raises(UserError, match=r"of another decoder.py .*\"feature_norm.bias\"") as error:
        load_checkpoint(tmp_path / "c.safetensors")
    assert "\n" not in str(error.value)


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


def test_checkpoints_of_older_and_newer_versions(checkpoint, tmp_path):
    path, describe = tmp_path / "c.safetensors", checkpoint.description
    checkpoint.description = lambda: {k: v for k, v in describe().items() if k != "tasks"}
    save_for_use(path, checkpoint)
    assert load_checkpoint(path).tasks == ("captions",)
    checkpoint.settings = {"DATA_DIR": "/home/me/photos"}
    assert checkpoint.for_others().settings == {"DATA_DIR": "photos"}
    forge(path, checkpoint, "format", FORMAT + 1)
    with pytest.raises(UserError, match="written by a newer version"):
        load_checkpoint(path)


def test_a_disk_that_knows_no_links_keeps_a_copy(checkpoint, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    written = save_for_training(tmp_path / "a.pt", checkpoint)
    (tmp_path / "last.pt").touch()
    name_again(tmp_path / "last.pt", tmp_path / "a.pt")
    assert (tmp_path / "last.pt").samefile(tmp_path / "a.pt")
    monkeypatch.setattr("os.link", refuse)
    assert name_again(tmp_path / "last.pt", tmp_path / "a.pt") == written
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


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


def change(description: dict, place: str, value: object) -> None:
    *way, last = place.split(".")
    for name in way:
        description = description[name]
    description[last] = value


def forge(path: Path, checkpoint: Checkpoint, place: str, value: object) -> None:
    """A checkpoint with a right checksum in which somebody put something else."""
    description, weights = checkpoint.description(), dict(checkpoint.model.state_dict())
    if place == "vocab" or place == "merges":
        inner = json.loads(description["tokenizer"])
        change(inner, f"model.{place}", value)
        description["tokenizer"] = json.dumps(inner)
    elif place == "weights":
        weights = {name: value(tensor) for name, tensor in weights.items()}
    else:
        change(description, place, value)
    text = json.dumps(description)
    save_file(weights, path, {"captioner": text, "digest": digest([text, weights])})


SPECIAL = {"<pad>": 0, "<start>": 1, "<end>": 2, "<answer>": 3}
ODD = [
    ("decoder.width", 2**20),
    ("decoder.width", 0),
    ("decoder.width", 16.0),
    ("decoder.heads", 0),
    ("decoder.heads", -2),
    ("decoder.heads", 3),
    ("decoder.heads", "2"),
    ("decoder.layers", 10**6),
    ("decoder.layers", -1),
    ("decoder.vocab_size", 10**12),
    ("decoder.max_length", 10**15),
    ("decoder.dropout", "no"),
    ("decoder.dropout", 7),
    ("decoder.more", 1),
    ("decoder", []),
    ("weights", torch.Tensor.double),
    ("weights", torch.Tensor.half),
    ("weights", torch.Tensor.int),
    ("feature_width", 9),
    ("feature_width", -8),
    ("feature_width", None),
    ("merges", [["zz", "qq"]]),
    ("merges", [[1, 2, 3]]),
    ("merges", [["<answer>", "<answer>"]]),  # longer than all tokens, of which the library panics
    ("vocab", SPECIAL),
    ("vocab", {"a": "b"}),
    ("tokenizer", "[" * 100_000),
    ("tokenizer", {}),
    ("tasks", [["captions"]]),
    ("tasks", 5),
    ("encoder", "google/vit"),
    ("encoder", {}),
    ("encoder.name", ["x"]),
    ("generation.beam_size", 100_000),
    ("generation.beam_size", 2.5),
    ("generation.no_repeat_ngram", "3"),
    ("generation.temperature", float("nan")),
    ("generation.beam_size", [1]),
    ("settings", "none"),
    ("scores", [1]),
    ("format", None),
]


@pytest.mark.fault
@pytest.mark.parametrize(
    "place, value", ODD, ids=[f"{place}-{i}" for i, (place, _) in enumerate(ODD)]
)
def test_odd_headers_are_refused_in_one_line(checkpoint, tmp_path, place, value):
    path = tmp_path / "c.safetensors"
    forge(path, checkpoint, place, value)
    with pytest.raises(
        UserError, match="c.safetensors is not a checkpoint of this project"
    ) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize("what", ["layers", "tables", "width", "name"])
def test_an_odd_encoder_is_refused(trained, tmp_path, what):
    checkpoint = load_checkpoint(trained / "captioner_best_cider.safetensors")
    identity = checkpoint.encoder
    width = checkpoint.model.feature_width + (what == "width")
    identity |= {"layers": [-1] * 100_000} if what == "layers" else {}
    identity |= {"layers": [{}]} if what == "tables" else {}
    identity |= {"name": "/nowhere"} if what == "name" else {}
    with pytest.raises(UserError, match="ENCODER_LAYERS|not the one|can't be loaded") as error:
        FrozenEncoder.load_as_trained(identity, width)
    assert len(str(error.value)) < 500


LOADS = """
import re, sys
from checkpoint import load_checkpoint
from utils import UserError
try:
    load_checkpoint(sys.argv[1])
except UserError as error:
    print(error)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.fault
@pytest.mark.parametrize("bomb", ["strides", "deflated", "references", "circle", "deep"])
def test_no_pt_takes_more_than_it_holds(tmp_path, bomb, request):
    path = tmp_path / "c.pt"
    value = torch.zeros(1).expand(2**31)
    if bomb in ("references", "circle", "deep"):
        value = []
        for _ in range(60 if bomb == "references" else 2000):
            value = [value, value] if bomb == "references" else [value]
    if bomb == "circle":
        value = []
        value.append(value)
    request.addfinalizer(functools.partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(10**5)
    # Python's own pickler: that in C goes only so deep from Python 3.12 on.
    pure = SimpleNamespace(Pickler=pickle._Pickler, __name__="pickle")
    torch.save({"captioner": "{}", "digest": "", "training": value}, path, pickle_module=pure)
    if bomb == "deflated":
        torch.save(
            {
                "captioner": "{}",
                "digest": "",
                "training": torch.zeros(3 * 10**8, dtype=torch.uint8),
            },
            path,
        )
        with (
            zipfile.ZipFile(path) as whole,
            zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for name in whole.namelist():
                packed.writestr(name, whole.read(name))
        path = tmp_path / "d.pt"
    result = run("-c", LOADS, path)
    said, peak = result.stdout.splitlines()
    assert f"{path.name} is damaged, " in said and "checksum" not in said
    assert int(peak) < 1_000_000


FULL_DISK = """
import resource, sys
from pathlib import Path
from checkpoint import load_checkpoint, save_for_training, save_for_use
from utils import UserError
path = Path(sys.argv[1])
checkpoint = load_checkpoint(path)
checkpoint.training = {"step": 2}
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
    result = run("-c", FULL_DISK, path)
    assert result.stdout.startswith(f"no room left to write {path}"), result
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
