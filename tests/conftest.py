"""Small real things that the tests share: encoders of each family, photos, a project run."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import load_checkpoint
from tests.forked import ENVIRONMENT, Forked, can_fork
from utils import sole_user

REPO = Path(__file__).resolve().parents[1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220)}


# --- Faults: tests marked `fault` are counted, and what they injected is said at the end -----


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(count=1): injects so many real faults")
    torch.set_num_threads(1)  # two processes run tests at a time


# The files that take longest come first, so that in the end no process waits for the other.
LONGEST = "prepare_dataset model kills shards app train faults export hub tracking distributed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [f"test_{name}.py" for name in LONGEST.split()]
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else 99)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    mark = item.get_closest_marker("fault")
    report.faults = mark.kwargs.get("count", 1) if mark else 0
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    def faults(outcome: str) -> int:
        reports = terminalreporter.getreports(outcome)
        return sum(r.faults for r in reports if getattr(r, "when", "") == "call")

    survived, injected = faults("passed"), faults("passed") + faults("failed")
    if injected:
        terminalreporter.write_line(f"faults injected: {injected}, survived: {survived}")


# --- What a GPU would be waited for ----------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes what is done within it that would wait for a GPU to have done all that it was told:
    a number read, places looked for by a mask, a number assigned (written by a copy) or a list."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, (first, *others) = func._schema.name, [*args, None]
        masks = [i for i in others[0] or () if i is not None] if "index" in name else []
        number = name == "aten::copy_" and first.dim() == 0
        if (
            name == "aten::_local_scalar_dense"
            or any(mask.dtype == torch.bool for mask in masks)
            or (number and first.data_ptr() != others[0].data_ptr())
        ):
            self.found.append(name)
        return func(*args, **kwargs or {})


# --- Encoders and photos --------------------------------------------------------------------


def vision_sizes(**more: object) -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    } | more


def text_sizes() -> dict:
    return {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
    }


def build_encoder(family: str, folder: Path) -> Path:
    """Save a tiny random encoder of a family, with its image processor, as the Hub has them."""
    tf = transformers
    torch.manual_seed(1)
    size = {"height": 32, "width": 32}
    processor = tf.ViTImageProcessorPil(size=size)
    if family == "vit":
        model = tf.ViTModel(tf.ViTConfig(**vision_sizes(hidden_dropout_prob=0.5)))
    elif family == "clip":
        config = tf.CLIPConfig(text_config=text_sizes(), vision_config=vision_sizes())
        model = tf.CLIPModel(config)
        processor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    elif family == "siglip":
        config = tf.SiglipConfig(text_config=text_sizes(), vision_config=vision_sizes())
        model = tf.SiglipModel(config)
        processor = tf.SiglipImageProcessorPil(size=size)
    elif family == "siglip2":
        vision = vision_sizes(num_patches=16)
        del vision["image_size"]
        model = tf.Siglip2Model(tf.Siglip2Config(text_config=text_sizes(), vision_config=vision))
        processor = tf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    elif family == "dinov2":
        model = tf.Dinov2Model(tf.Dinov2Config(**vision_sizes()))
        processor = tf.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=size)
    elif family == "dinov2_with_registers":
        model = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**vision_sizes()))
        processor = tf.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=size)
    elif family == "dinov3":
        model = tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**vision_sizes(num_register_tokens=4)))
    elif family == "swin":
        sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4}
        model = tf.SwinModel(tf.SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 4]))
    elif family in ("resnet", "convnext"):  # whose vectors are the places of maps
        sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
        if family == "resnet":
            sizes |= {"embedding_size": 8, "layer_type": "basic"}
        kind = "ResNet" if family == "resnet" else "ConvNext"
        model = getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**sizes))
    elif family == "blip":
        config = tf.BlipConfig(text_config=text_sizes(), vision_config=vision_sizes())
        model = tf.BlipForConditionalGeneration(config)
        processor = tf.BlipImageProcessorPil(size=size)
    elif family == "metaclip_2":
        config = tf.MetaClip2Config(text_config=text_sizes(), vision_config=vision_sizes())
        model = tf.MetaClip2Model(config)
        processor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family == "dinov3":  # whose own class can't be made here, as it needs torchvision
        file = folder / "preprocessor_config.json"
        file.write_text(file.read_text().replace('"ViTImage', '"DINOv3ViTImage'))
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, made by whichever process of this test session needs it first.

    Tests only read it.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each process has its own folder in that of the session
    folder, made = shared / name, shared / f"{name}.made"
    with sole_user(made, wait=True):
        if not (made / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            (made / "whole").touch()
    return folder


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "encoder", lambda folder: build_encoder("vit", folder))


def paint(colour: str, place: str, seed: int) -> Image.Image:
    """A grey picture with a coloured square on the left or on the right."""
    dice = random.Random(seed)
    image = Image.new("RGB", (48, 40), (dice.randrange(90, 140),) * 3)
    left = dice.randrange(2, 6) + (24 if place == "right" else 0)
    image.paste(COLOURS[colour], (left, 10, left + 16, 30))
    return image


def write_photos(folder: Path, count: int = 24) -> Path:
    """A data set of `count` painted pictures, two captions each, as a user would lay it out."""
    (folder / "images").mkdir(parents=True)
    captions = {}
    for i in range(count):
        colour, place = list(COLOURS)[i % 3], ("left", "right")[i // 3 % 2]
        name = f"{i:03d}.png"
        paint(colour, place, i).save(folder / "images" / name)
        captions[name] = [
            f"A {colour} square on the {place} .",
            f"On the {place} there is a square that is {colour}",
        ]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "data")


def small_flags(data: Path, encoder: Path) -> list[str]:
    """Flags of a run that takes seconds."""
    flags = {
        "dataset": "custom",
        "data_dir": data,
        "split": "ratio",
        "train_split_ratio": 0.7,
        "encoder_model_name": encoder,
        "encoder_layers": "-1",
        "decoder_embed_dim": 32,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "decoder_ff_dim": 64,
        "vocab_size": 400,
        "max_caption_length": 20,
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "min_learning_rate": 1e-5,
        "patch_dropout": 0,
        "precision": "fp32",
        "device": "cpu",
        "scst_epochs": 0,
        "wandb_project": "",
        "hf_repo_id": "",
    }
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def run(
    *command: object,
    cwd: Path = REPO,
    limits: Mapping[int, int] | None = None,
    pictures: bool = False,
    **env: str,
) -> subprocess.CompletedProcess:
    """Run a program as a user does, offline; returns its output as text.

    Args:
        command: a script of the project with its flags, or what follows `python` else.
        limits: of `resource.setrlimit`: {resource.RLIMIT_FSIZE: 4096} is a disk without room.
        pictures: whether what a training learned is really drawn, which takes longer than most
            trainings here.
        env: what stands in the environment, besides what stands there.
    """
    words = [*map(str, command)]
    if can_fork(words, env):
        with Forked(*words, cwd=cwd, limits=limits, pictures=pictures, **env) as process:
            said = process.communicate()
            return subprocess.CompletedProcess(process.args, process.returncode, *said)
    assert not limits, "only a fork has limits"
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | env,
        text=True,
        capture_output=True,
        timeout=600,
    )


def run_without(module: str, name: str, *flags: object) -> subprocess.CompletedProcess:
    """Run the module `name` of the project as where the library `module` is not installed."""
    code = (
        f"import runpy, sys; sys.modules[{module!r}] = None\n"
        f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    )
    return run("-c", code, *flags)


def train_small(data: Path, encoder: Path, *more: object) -> None:
    """A short training that leaves its checkpoints in the data folder."""
    result = run("train.py", *small_flags(data, encoder), *more, pictures=True)
    assert result.returncode == 0, result.stderr
    (data / "said.txt").write_text(result.stdout)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, encoder_dir: Path) -> Path:
    """A data folder in which a short training has left its checkpoints."""
    return made_once(
        tmp_path_factory, "trained", lambda data: train_small(write_photos(data), encoder_dir)
    )


def write_questions(data: Path) -> Path:
    """Two questions about each of the pictures of `write_photos`."""
    names = json.loads((data / "captions.json").read_text())
    table = {}
    for i, name in enumerate(names):
        colour, place = list(COLOURS)[i % 3], ("left", "right")[i // 3 % 2]
        table[name] = [
            {"question": "what color is the square?", "answer": colour, "type": "color"},
            {
                "question": "is the square on the left?",
                "type": "side",
                "answer": "yes" if place == "left" else "no",
            },
        ]
    (data / "questions.json").write_text(json.dumps(table))
    return data


@pytest.fixture(scope="session")
def joint(tmp_path_factory: pytest.TempPathFactory, encoder_dir: Path) -> Path:
    """A data folder in which a short training for both tasks has left its checkpoints."""
    more = "--tasks captions,questions --epochs 30 --scst_epochs 2 --dropout 0".split()

    def make(folder: Path) -> None:
        train_small(write_questions(write_photos(folder, 48)), encoder_dir, *more)

    return made_once(tmp_path_factory, "joint", make)


def best_entry(history: list[dict]) -> dict:
    """The epoch that a training names in the end: the best captions, if any scored, else loss."""
    best = max(history, key=lambda entry: entry["val_cider"])
    return best if best["val_cider"] > 0 else min(history, key=lambda entry: entry["val_loss"])


def best_file(data: Path) -> Path:
    """The checkpoint that a training names in the end."""
    best = best_entry(load_checkpoint(data / "last.pt").training["progress"]["history"])
    loss = f"captioner_epoch_{best['epoch']}_val_loss_{best['val_loss']:.4f}.safetensors"
    return data / ("captioner_best_cider.safetensors" if best["val_cider"] > 0 else loss)
