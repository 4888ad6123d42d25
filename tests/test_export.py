"""The export: what onnxruntime writes with the file alone is what PyTorch writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoint import load_checkpoint
from encoder import FrozenEncoder, _nameless
from generation import generate
from inference import load_captioner
from options import GenerationOptions
from tests.conftest import (
    REPO,
    best_file,
    build_encoder,
    run,
    run_without,
    small_flags,
    train_small,
    write_photos,
)
from tests.hub_server import HubServer, Repo
from tests.test_inference import odd_pictures
from tools import export as tools_export
from utils import UserError, lock, pip

SAID = """
assert not {"torch", "transformers", "onnx"} & sys.modules.keys()
print(json.dumps([captions, tokens.tolist()]))
"""


def test_without_the_extra_it_says_what_to_install():
    result = run_without("onnxruntime", "tools.export", "--checkpoint", "x.pt")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        f"error: the export needs onnxruntime: run {pip('requirements-export.txt')}"
    ]


@pytest.fixture(scope="module")
def export():
    """The module, where its extra is installed."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    from tools import onnx_graph

    return onnx_graph


@pytest.fixture(scope="module")
def exported(export, trained, tmp_path_factory):
    """The ONNX file of a trained checkpoint, with that of its encoder beside it."""
    path = tmp_path_factory.mktemp("exported") / "captioner.onnx"
    checkpoint = trained / "captioner_best_cider.safetensors"
    command = ["-m", "tools.export", "--checkpoint", checkpoint, "--out", path, "--with-encoder"]
    result = run(*command)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    logits, features = result.stdout.splitlines()
    assert float(re.search(r"logits within (\S+) of", logits)[1]) < 1e-4, logits
    assert float(re.search(r"features within (\S+) of", features)[1]) < 1e-4, features
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["captioner.encoder.onnx", "captioner.onnx"]
    return path


@pytest.fixture(scope="module")
def checkpoint(trained):
    return load_checkpoint(trained / "captioner_best_cider.safetensors")


def random_features(model, photos: int, patches: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(photos)
    return torch.randn(photos, patches, model.feature_width, generator=dice)


@pytest.mark.parametrize("photos", [1, 4, 7])
def test_onnxruntime_alone_goes_from_pixels_to_captions(
    exported, trained, checkpoint, tmp_path, photos
):
    """The lines of the docs are run as they stand, in a process without PyTorch."""
    encoder = FrozenEncoder.load_as_trained(checkpoint.encoder, checkpoint.model.feature_width)
    names = sorted((trained / "images").iterdir())[:photos]
    inputs = encoder.preprocess([encoder.open(name) for name in names])
    features = encoder(inputs)
    np.save(tmp_path / "pixels.npy", inputs["pixel_values"].numpy())
    for name in ("captioner.onnx", "captioner.encoder.onnx"):
        (tmp_path / name).symlink_to(exported.with_name(name))
    (code,) = re.findall(r"```python\n([^`]*InferenceSession[^`]*)```", documented())
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{SAID}"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    captions, tokens = json.loads(result.stdout.splitlines()[-1])
    found = [group[0] for group in generate(checkpoint.model, features, GenerationOptions())]
    assert captions == [checkpoint.tokenizer.decode(each.tokens) for each in found]
    for row, each in zip(tokens, found, strict=True):
        assert row[1 : len(each.tokens) + 1] == each.tokens
        if each.ended:
            assert row[len(each.tokens) + 1] == 2


def documented() -> str:
    return (REPO / "docs" / "using.md").read_text()


def session_of(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_many_tokens_at_once_are_as_one_by_one(export, exported, checkpoint):
    """So a question's prefix passes in one step, after which single tokens follow."""
    session = session_of(exported)
    features = random_features(checkpoint.model, 3, 9).numpy()
    tokens, logits = export.greedy(session, features, 8)
    places = np.broadcast_to(np.arange(8), tokens.shape)
    past = {
        x.name: np.zeros((3, x.shape[1], 0, x.shape[3]), np.float32)
        for x in session.get_inputs()
        if x.name.startswith("past.")
    }
    for start, stop in ((0, 5), (5, 8)):
        part = slice(start, stop)
        here = {"features": features, "tokens": tokens[:, part], "positions": places[:, part]}
        scores, *present = session.run(None, here | past)
        past, features = dict(zip(past, present, strict=True)), features[:, :0]
        np.testing.assert_allclose(scores, logits[:, stop - 1], atol=1e-4)
    assert past["past.0.keys"].shape[2] == 8 and past["past.1.memory_values"].shape[2] == 9


def test_the_metadata_is_enough_and_says_nothing_of_the_machine(exported, checkpoint):
    from tokenizers import Tokenizer

    about = session_of(exported).get_modelmeta().custom_metadata_map
    text = "a red square"
    ids = Tokenizer.from_str(about["tokenizer"]).encode(text, add_special_tokens=False).ids
    assert [ids] == checkpoint.tokenizer.encode([text])
    encoder = Path(checkpoint.encoder["name"])
    assert json.loads(about["encoder"]) == checkpoint.encoder | {"name": encoder.name}
    assert json.loads(about["special_ids"]) == {"pad": 0, "start": 1, "end": 2, "answer": 3}
    assert json.loads(about["max_length"]) == checkpoint.model.config.max_length
    content = exported.read_bytes() + exported.with_name("captioner.encoder.onnx").read_bytes()
    folders = str(REPO).encode(), str(encoder.parent).encode()
    for trace in (b"stack_trace", b"export.py", b"decoder.py", *folders):
        assert trace not in content


def test_every_weight_stands_once(exported, checkpoint):
    import onnx

    sizes = [np.prod(x.dims) for x in onnx.load(exported).graph.initializer]
    weights = sum(p.numel() for p in checkpoint.model.parameters())
    assert weights <= sum(sizes) < weights + 100


def test_onnxruntime_quantizes_it(export, exported, checkpoint, tmp_path):
    """Of a Gemm it turns the weight round, in place: the embedding's, which is read as it is."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(exported, tmp_path / "small.onnx")
    features = random_features(checkpoint.model, 3, 9).numpy()
    found = [export.greedy(session_of(x), features, 1) for x in (exported, tmp_path / "small.onnx")]
    np.testing.assert_allclose(found[1][1], found[0][1], atol=0.1)


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_what_differs_from_pytorch_is_not_written(
    export, exported, checkpoint, tmp_path, monkeypatch, wrong
):
    import onnx

    path = tmp_path / "captioner.onnx"
    path.write_bytes(b"the one before")
    monkeypatch.setattr(export, "to_onnx", lambda _: onnx.load(exported))  # made once is enough
    monkeypatch.setattr(export, "LIMIT", wrong)
    with pytest.raises(UserError, match="was not written"):
        export.export(checkpoint, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"the one before"


def test_the_check_sees_any_wrong_weight(export, exported, trained):
    other = load_checkpoint(trained / "captioner_best_cider.safetensors").model
    assert export.largest_difference(exported, other) < 1e-4
    decoder = other.decoder
    with torch.no_grad():
        for weight in (
            other.project.weight,
            decoder.blocks[-1].cross_kv.weight[:32],
            decoder.blocks[0].self_qkv.weight[:32],
            decoder.position_embedding.weight[-2],
        ):
            change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight += change
            assert export.largest_difference(exported, other) > 1e-3
            weight -= change
        assert export.largest_difference(exported, other) < 1e-4
        decoder.norm.bias[0] = float("nan")
    assert not export.largest_difference(exported, other) <= 1e-3


@pytest.mark.fault(count=2)
def test_a_damaged_checkpoint_is_refused(export, trained, tmp_path):
    whole = (trained / "captioner_best_cider.safetensors").read_bytes()
    damaged, out = tmp_path / "damaged.safetensors", tmp_path / "captioner.onnx"
    for content in (whole[:-100], whole[:-50] + bytes([whole[-50] ^ 16]) + whole[-49:]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            tools_export.main(["--checkpoint", str(damaged), "--out", str(out)])
    assert not out.exists()


def test_mistakes_are_said_before_any_work(export, trained, tmp_path, monkeypatch):
    checkpoint = str(trained / "captioner_best_cider.safetensors")
    with pytest.raises(UserError, match="is no file"):
        tools_export.main(["--checkpoint", checkpoint, "--out", str(tmp_path)])
    with pytest.raises(UserError, match="must end in .onnx"):
        tools_export.main(["--checkpoint", checkpoint, "--out", str(tmp_path / "photo.jpg")])
    with pytest.raises(UserError, match="no checkpoint"):
        tools_export.main(["--checkpoint", str(tmp_path / "absent.pt")])
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(UserError, match="at most 2 GB"):
        tools_export.main(["--checkpoint", checkpoint, "--out", str(tmp_path / "c.onnx")])
    monkeypatch.setattr(export, "LARGEST", 500_000)  # more than this decoder takes
    monkeypatch.setattr(FrozenEncoder, "load_as_trained", lambda *_: torch.nn.Linear(400, 400))
    flags = ["--checkpoint", checkpoint, "--with-encoder", "--out", str(tmp_path / "c.onnx")]
    with pytest.raises(UserError, match="the encoder takes 641.6 kB"):
        tools_export.main(flags)
    assert not list(tmp_path.iterdir())


# --- For transformers -----------------------------------------------------------------------

# What people without this project write, in a process that can't import it.
ELSEWHERE = """
import json, sys, tempfile
import numpy as np
import transformers
from PIL import Image
folder, encoder, questions, *photos = sys.argv[1:]
options = {"encoder": encoder} if encoder else {}
model = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, **options
)
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
opened = [Image.open(name) for name in photos]
for images, text in ((opened, "why?"), (opened[:1], ["a?", "b?"])):
    try:
        processor(images=images, text=text)
        raise AssertionError
    except ValueError as error:
        assert "give one for each" in str(error)
plain = processor(images=opened)
assert (processor(images=np.asarray(opened[0]))["pixel_values"] == plain["pixel_values"][:1]).all()
captioner = transformers.pipeline(
    "image-text-to-text", folder, trust_remote_code=True, model_kwargs=options
)
found, asks = [], []
for asked in json.loads(questions):
    inputs = processor(images=opened, text=[asked] * len(photos) if asked else None)
    ids = model.generate(**inputs, num_beams=1)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    greedily = {"num_beams": 1}
    (piped,) = captioner(
        photos[0], text=asked, return_full_text=False, generate_kwargs=greedily
    )
    asks.append((inputs, ids))
    found.append([[text.strip() for text in texts], piped["generated_text"].strip()])
with tempfile.TemporaryDirectory() as saved:  # the encoder's weights included
    model.save_pretrained(saved)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        saved, trust_remote_code=True, attn_implementation="sdpa"
    )
assert all((model.generate(**inputs, num_beams=1) == ids).all() for inputs, ids in asks)
try:
    model.generate(input_ids=ids)
    raise AssertionError
except ValueError as error:
    assert "no photo: give pixel_values" in str(error)
assert not {"model", "decoder", "checkpoint", "encoder"} & sys.modules.keys()
print(json.dumps(found))
"""


def elsewhere(folder, tmp_path, questions, photos, encoder="") -> list[tuple[list[str], str]]:
    """What plain `transformers` writes, greedily, and the first as its pipeline writes it.

    Of each question in turn; "" asks for a caption.
    """
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, folder, encoder, json.dumps(questions), *photos],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr and "newly initialized" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(joint, tmp_path_factory):
    """What the export makes for `transformers`, encoder included."""
    path = tmp_path_factory.mktemp("for_transformers") / "captioner"
    checkpoint = joint / "captioner_best_cider.safetensors"
    command = ["--checkpoint", checkpoint, "--format", "transformers", "--out", path]
    result = run("-m", "tools.export", *command)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert float(re.search(r"logits within (\S+) of ours", result.stdout)[1]) < 1e-4
    again = run("-m", "tools.export", *command)
    assert again.returncode == 1 and "is there already" in again.stderr
    inside = run("-m", "tools.export", *command[:-1], path / "config.json" / "inside")
    assert inside.returncode == 1 and "choose another folder" in inside.stderr, inside.stderr
    encoder = load_checkpoint(checkpoint).encoder["name"]
    for file in path.iterdir():
        assert os.path.dirname(encoder).encode() not in file.read_bytes(), file.name
    return path


def test_plain_transformers_writes_what_we_write(folder, joint, tmp_path):
    photos = [str(path) for path in sorted((joint / "images").iterdir())[:5]]
    captioner = load_captioner(joint / "captioner_best_cider.safetensors", precision="fp32")
    question = "What color is the square ?."
    other, long = "on the left or on the right?", "is the square on the left? " * 9
    ours = [captioner.caption(photos, beam_size=1)]
    ours += [captioner.answer(photos, [asked] * 5) for asked in (question, other, long)]
    assert all(len(set(texts)) > 1 for texts in ours[:2])
    theirs = elsewhere(folder, tmp_path, ["", question, other, long], photos)
    assert theirs == [[texts, texts[0]] for texts in ours]


def test_a_folder_that_was_not_compared_is_not_left(joint, tmp_path, monkeypatch):
    from tools import export

    def refuse(*_):
        # All that a kill would leave, which nobody takes for done.
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["unfinished"]
        raise PermissionError(errno.EACCES, "Permission denied", "/.cache")

    monkeypatch.setattr(export, "logits_difference", refuse)
    flags = ["--checkpoint", str(joint / "captioner_best_cider.safetensors"), "--out"]
    with pytest.raises(PermissionError):
        export.main([*flags, str(tmp_path / "mine"), "--format", "transformers"])
    assert not (tmp_path / "mine").exists()


def test_a_folder_is_one_exports_alone(joint, tmp_path):
    """Of two at once the second is refused, and takes nothing of the first's away."""
    out = tmp_path / "mine"
    flags = ["--checkpoint", joint / "captioner_best_cider.safetensors", "--out", out]
    command = ["-m", "tools.export", *flags, "--format", "transformers"]
    (out / "unfinished").mkdir(parents=True)  # all that a kill would leave: it is begun anew
    (out / "unfinished" / "old.safetensors").touch()
    place = os.open(out, os.O_RDONLY)
    assert lock(place)
    second = run(*command)
    assert second.returncode == 1 and "another run is writing to it" in second.stderr
    assert [path.name for path in out.rglob("*")] == ["unfinished", "old.safetensors"]
    os.close(place)
    assert run(*command).returncode == 0
    assert (out / "config.json").is_file() and not {"unfinished", "old.safetensors"} & {
        *os.listdir(out)
    }


def test_a_pipeline_that_was_saved_is_whole(folder, joint, tmp_path):
    """Of a processor of one's own it writes no file: the configuration names the class."""
    task, photo = "image-text-to-text", str(joint / "images" / "000.png")
    first = transformers.pipeline(task, str(folder), trust_remote_code=True)
    first.save_pretrained(tmp_path / "saved")
    again = transformers.pipeline(task, str(tmp_path / "saved"), trust_remote_code=True)
    assert again(photo, text="") == first(photo, text="")


def test_the_length_is_as_asked(folder, joint):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[Image.open(joint / "images" / "000.png")])
    never = {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor(2), -1e9)]}
    whole = transformers.GenerationConfig
    for asked, length in (
        ({}, 20),
        ({"max_length": 6}, 6),
        ({"max_new_tokens": 6}, 7),
        ({"generation_config": whole(max_length=6)}, 6),
        ({"generation_config": whole(max_new_tokens=6)}, 7),
        ({"generation_config": whole(max_length=6), "max_new_tokens": 8}, 9),
        ({"max_new_tokens": 1000}, 20),
    ):
        ids = model.generate(**inputs, **never, **asked, num_beams=1)
        assert ids.shape[1] == length, asked


def test_a_length_that_nobody_asked_for_cuts_nothing(folder, joint, monkeypatch):
    """Before 5.0 a `GenerationConfig` says 20 where it was told nothing."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[Image.open(joint / "images" / "000.png")])
    never = {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor(2), -1e9)]}
    monkeypatch.setattr("transformers.GenerationConfig", lambda: SimpleNamespace(max_length=6))
    model.generation_config.max_length = 6
    for asked, length in (({}, 20), ({"max_length": 6}, 6)):
        assert model.generate(**inputs, **never, **asked, num_beams=1).shape[1] == length


def test_pictures_are_seen_there_as_here(folder, joint, tmp_path):
    encoder = load_checkpoint(joint / "captioner_best_cider.safetensors").load_encoder()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for path in odd_pictures(tmp_path):
        ours = encoder.preprocess([encoder.open(path)])["pixel_values"]
        with Image.open(path) as image:
            assert torch.equal(processor(images=image)["pixel_values"], ours), path.name


def test_an_answer_may_repeat_its_question_and_a_caption_not_itself(folder, joint):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    photo = Image.open(joint / "images" / "000.png")
    question = "on the left or on the left"
    inputs = processor(images=[photo] * 2, text=["", question])
    start = inputs["input_ids"].shape[1]
    wanted = processor.tokenizer(question, add_special_tokens=False).input_ids + [2]

    def write(ids, scores):  # the question, if nothing forbids it
        scores[:, wanted[min(ids.shape[1] - start, len(wanted) - 1)]] += 1000
        return scores

    how = {"logits_processor": [write], "num_beams": 1}
    for more, free in (({}, [False, True]), ({"no_repeat_ngram_size": 3}, [False, False])):
        ids = model.generate(**inputs, **how, **more)[:, start:]
        assert [row[: len(wanted)] == wanted for row in ids.tolist()] == free
    ids = model.generate(**inputs, **how, no_repeat_ngram_size=0)[:, start:]
    assert ids.tolist() == [wanted] * 2


@pytest.mark.parametrize(
    ("text", "given", "beams"),
    [
        ("", {}, 3),
        ("is there a square?", {}, 1),
        ("is there a square?", {"num_beams": 2}, 2),
        (
            "is there a square?",
            {"generation_config": transformers.GenerationConfig(num_beams=2)},
            2,
        ),
    ],
)
def test_questions_are_answered_greedily_there_as_here(folder, joint, text, given, beams):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model.generation_config.num_beams = 3
    inputs = processor(images=[Image.open(joint / "images" / "000.png")], text=[text])
    rows = []
    look = lambda ids, scores: rows.append(len(ids)) or scores  # noqa: E731
    model.generate(**inputs, logits_processor=[look], **given)
    assert {*rows} == {beams}


@pytest.mark.parametrize(("learned", "text"), [("captions", "is it red?"), ("questions", "")])
def test_what_it_never_learned_is_refused_there_as_here(folder, joint, learned, text):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    photo = Image.open(joint / "images" / "000.png")
    model.config.trained["tasks"] = [learned]
    usual = processor(images=[photo], text=["is it red?" if learned == "questions" else ""])
    model.generate(**usual, num_beams=1)
    with pytest.raises(ValueError, match=f"trained for {learned} only"):
        model.generate(**processor(images=[photo], text=[text]))


def test_beams_are_reranked_there_as_here(folder, joint):
    """By what is expected of each, captions and not answers, however many are asked for."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    checkpoint = load_checkpoint(joint / "captioner_best_cider.safetensors")
    photos = [Image.open(path) for path in sorted((joint / "images").iterdir())[:2]]
    asked = processor(images=photos, text=[None, "What color is the square?"])
    with torch.no_grad():
        features = model.features(asked["pixel_values"])

    def beams(rerank: float, count: int):
        model.config.rerank = rerank
        how = {"num_beams": 5, "num_return_sequences": count, "output_scores": True}
        found = model.generate(**asked, **how, return_dict_in_generate=True)
        texts = [ids[asked["input_ids"].shape[1] :] for ids in found.sequences.tolist()]
        texts = [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in texts]
        return texts, found.sequences_scores

    texts, scores = beams(0.0, 5)
    expected = checkpoint.reranker.expected(features[:1], [texts[:5]])[0]
    assert len({round(each) for each in expected}) > 1
    raised = scores[:5] + 100 * torch.tensor(expected)
    again, ranked = beams(100.0, 5)
    order = raised.argsort(descending=True).tolist()
    assert again[:5] == [texts[i] for i in order] != texts[:5]
    torch.testing.assert_close(ranked[:5], raised[order], rtol=1e-3, atol=1e-2)
    assert again[5:] == texts[5:] and torch.equal(ranked[5:], scores[5:])
    assert beams(100.0, 1)[0] == [again[0], again[5]]
    for impossible in ({"num_beams": 5, "num_return_sequences": 6}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=r"num_beams|max_new_tokens"):
            model.generate(**asked, **impossible)
    with pytest.raises(ValueError, match="static caches are not supported"):
        model.generate(**asked, cache_implementation="static")
    with pytest.raises(ValueError, match="leaves no room"):
        long = torch.full((1, model.config.max_position_embeddings), 9)
        model.generate(long, processor(images=photos[:1])["pixel_values"])


def test_another_encoder_than_it_was_trained_with_is_said(joint, tmp_path):
    checkpoint, out = joint / "captioner_best_cider.safetensors", tmp_path / "captioner"
    flags = ["--checkpoint", checkpoint, "--format", "transformers", "--without-encoder"]
    right = run("-m", "tools.export", *flags, "--out", out)
    assert right.returncode == 0 and "another encoder" not in right.stderr, right.stderr
    folder = load_checkpoint(checkpoint).encoder["name"]
    # The command that is shown works: it names the folder, which is published nowhere.
    assert f'model_kwargs={{"encoder": {folder!r}}}' in right.stdout
    wrong = transformers.ViTModel.from_pretrained(folder)
    wrong.layernorm.weight.data[0] += 1
    wrong.save_pretrained(tmp_path / "other")
    code = (
        "import sys, transformers\n"
        "transformers.AutoModelForImageTextToText.from_pretrained("
        "sys.argv[1], trust_remote_code=True, encoder=sys.argv[2])"
    )
    for encoder, count in ((folder, 0), (tmp_path / "other", 1)):
        said = run("-c", code, out, encoder)
        assert said.returncode == 0
        assert said.stderr.count("is another encoder than") == count, said.stderr


def test_the_encoder_is_asked_for_as_the_captioner_is(joint, tmp_path):
    """With its token, and kept where that is kept: one that is gated was refused."""
    checkpoint, token = joint / "captioner_best_cider.safetensors", "hf_" + 34 * "a"
    flags = ["--checkpoint", checkpoint, "--format", "transformers", "--without-encoder"]
    assert run("-m", "tools.export", *flags, "--out", tmp_path / "captioner").returncode == 0
    config = json.loads((tmp_path / "captioner" / "config.json").read_text())
    config["tower"] |= {"name": "me/encoder", "revision": "main"}
    (tmp_path / "captioner" / "config.json").write_text(json.dumps(config))
    places = {
        "me/captioner": tmp_path / "captioner",
        "me/encoder": Path(load_checkpoint(checkpoint).encoder["name"]),
    }
    code = (
        "import sys, transformers\n"
        "transformers.AutoModelForImageTextToText.from_pretrained("
        "'me/captioner', trust_remote_code=True, token=sys.argv[1], cache_dir=sys.argv[2])"
    )
    with HubServer(token) as server:
        for name, place in places.items():
            server.repos[name] = Repo(gated=True)
            server.repos[name].commit("all", {x.name: x.read_bytes() for x in place.iterdir()})
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        loaded = subprocess.run(
            [sys.executable, "-I", "-c", code, token, tmp_path / "kept"],
            env=os.environ | hub,
            text=True,
            capture_output=True,
        )
    assert loaded.returncode == 0, loaded.stderr
    assert {path.name for path in (tmp_path / "kept").glob("models--*")} == {
        "models--me--captioner",
        "models--me--encoder",
    }
    assert not (tmp_path / "home" / "hub").exists()


def test_an_offloaded_embedding_gives_the_same_logits(folder, joint):
    """accelerate's offloading: weights are there only while their own module is called."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    asked = processor(images=Image.open(joint / "images" / "000.png"))
    right, embedding = model(**asked).logits, model.decoder.token_embedding
    weight = embedding.weight

    def place(there: torch.nn.Parameter) -> None:
        embedding.weight = there

    nowhere = torch.nn.Parameter(weight.to("meta"))
    embedding.register_forward_pre_hook(lambda *_: place(weight))
    embedding.register_forward_hook(lambda *_: place(nowhere))
    place(nowhere)
    assert torch.equal(model(**asked).logits, right)


@pytest.mark.parametrize("name", ["past_key_values", "cache", None])
def test_the_cache_is_heeded_whatever_a_version_calls_it(folder, joint, name, monkeypatch):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    photo = processor(images=Image.open(joint / "images" / "000.png"))["pixel_values"]
    memory, tokens = model.memory(model.features(photo)), torch.tensor([[1, 9, 8, 7]])
    code = sys.modules[type(model).__module__]
    monkeypatch.setattr(code, "CausalLMOutputWithPast", SimpleNamespace)  # it has one of the names
    cache = {name: transformers.DynamicCache()} if name else {"use_cache": True}
    for token in tokens.T:  # 5.0 leaves it to us, 5.24 renamed it
        step = model(input_ids=token[None], memory=memory, **cache)
        cache = cache if name else {"past_key_values": step.past_key_values}
    whole = model(input_ids=tokens, memory=memory)
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1])


def test_labels_give_a_loss_to_train_further_by(folder, joint):
    """As the library's Trainer asks for it: its batches are parts of what it steps by."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    photo = processor(images=[Image.open(joint / "images" / "000.png")] * 2)["pixel_values"]
    ids = torch.tensor([[1, 9, 8, 2], [1, 7, 2, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": photo}
    given["labels"] = ids.masked_fill(ids == 0, -100)
    whole = model(**given)
    counts = ids[:, 1:] > 0
    right = torch.nn.functional.cross_entropy(whole.logits[:, :-1][counts], ids[:, 1:][counts])
    torch.testing.assert_close(whole.loss, right)
    torch.testing.assert_close(model(**given, num_items_in_batch=10).loss, right / 2)
    whole.loss.backward()
    assert model.decoder.token_embedding.weight.grad.any()


def test_threads_get_their_own_photos_features_of_old_versions_too(folder, tmp_path, monkeypatch):
    """Those wrapped the layers in each call, so that two at once took each other's."""
    shutil.copytree(folder, tmp_path / "captioner_of_old")
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "captioner_of_old", trust_remote_code=True
    )
    inside, most = [], []

    def enter(*_: object) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)

    model.tower.register_forward_pre_hook(enter)
    model.tower.register_forward_hook(lambda *_: inside.pop() and None)
    size = model.tower.config.image_size
    with ThreadPoolExecutor(3) as threads, torch.no_grad():
        list(threads.map(model.features, torch.rand(3, 1, 3, size, size)))
    assert most == [1, 1, 1]


def test_weights_that_another_version_names_otherwise_are_no_random_ones(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "captioner")
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("tower.layers.", "tower.blocks."): weights[name] for name in weights}
    save_file(weights, tmp_path / "captioner" / "model.safetensors", {"format": "pt"})
    says = f"weights are missing.* run pip install transformers=={transformers.__version__}"
    with pytest.raises(ValueError, match=says):
        transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / "captioner", trust_remote_code=True
        )
    tower = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in "ab"})
    renamed = torch.nn.ModuleDict({"d": tower["a"], "c": tower["b"]})
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True
    )
    code = sys.modules[type(loaded).__module__]
    assert code.fingerprint(renamed) == _nameless(tower) != _nameless(tower["a"])


def test_an_encoder_that_takes_more_than_pixels_is_refused(tmp_path):
    data, encoder = write_photos(tmp_path / "data"), build_encoder("siglip2", tmp_path / "encoder")
    flags = [*small_flags(data, encoder), "--epochs", 2, "--hf_repo_id", "me/captioner"]
    trained = run("train.py", *flags)
    assert trained.returncode == 0, trained.stderr
    says = "the encoder takes more than pixels (pixel_attention_mask, spatial_shapes)"
    assert trained.stdout.count(f"Hub: nothing is pushed: {says}") == 1, trained.stdout
    flags = ["--checkpoint", best_file(data), "--format", "transformers"]
    result = run("-m", "tools.export", *flags, "--out", tmp_path / "out")
    assert result.returncode == 1 and says in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["VisionEncoderDecoderModel", "ViTModel", "GPT2LMHeadModel"])
def test_classes_of_the_library_refuse_it(folder, kind):
    with pytest.raises((ValueError, KeyError, AttributeError)):
        getattr(transformers, kind).from_pretrained(folder)


@pytest.mark.parametrize(("family", "layers"), [("vit", "cls,-2"), ("resnet", "-1")])
def test_an_encoder_that_sees_larger_pictures_does_so_elsewhere(export, tmp_path, family, layers):
    data, tower = write_photos(tmp_path / "data"), build_encoder(family, tmp_path / "encoder")
    train_small(data, tower, "--encoder_image_size", 48, "--encoder_layers", layers)
    checkpoint = data / "captioner_best_cider.safetensors"
    photos = [str(path) for path in sorted((data / "images").iterdir())[:3]]
    captioner = load_captioner(checkpoint, precision="fp32")
    assert captioner.encoder.side == 48
    ours = captioner.caption(photos, beam_size=1)
    flags = ["--checkpoint", checkpoint, "--with-encoder", "--out", tmp_path / "c.onnx"]
    result = run("-m", "tools.export", *flags)
    assert float(re.search(r"features within (\S+) of", result.stdout)[1]) < 1e-4, result
    for part, encoder in (("--with-encoder", ""), ("--without-encoder", str(tower))):
        flags = ["--checkpoint", checkpoint, "--format", "transformers", part]
        result = run("-m", "tools.export", *flags, "--out", tmp_path / part)
        assert result.returncode == 0, result.stderr
        said = elsewhere(tmp_path / part, tmp_path, [""], photos, encoder)
        assert said == [[ours, ours[0]]]
