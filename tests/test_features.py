"""The feature cache gives exactly what the encoder gives, and is rebuilt as little as needed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps

import features
from corpus import views_to_show
from dataset import CaptionRows, Text, make_batch
from encoder import FrozenEncoder, open_image
from features import build_features, encode, prefetch, view_of
from tests.conftest import build_encoder, paint, write_photos
from utils import Bar, UserError


@pytest.fixture
def setting(tmp_path, encoder_dir, monkeypatch):
    data = write_photos(tmp_path / "data", 10)
    encoder = FrozenEncoder.load(str(encoder_dir))
    items = [(f"{i:03d}.png", view) for view in (0, 1, 2) for i in range(10)]
    said: list[str] = []
    monkeypatch.setattr(features, "print", said.append, raising=False)

    def build(wanted=items, encoder=encoder, **options):
        said.clear()
        options = {"batch_size": 4} | options
        return build_features(encoder, data / "images", wanted, data / "f", **options)

    return data / "images", encoder, items, build, said


def fresh(encoder, image_dir, item):
    image = view_of(open_image(image_dir / item[0]), *item)
    return encoder(encoder.preprocess([image]))[0].half()


def assert_fresh(cache, encoder, image_dir, items):
    for item, row in zip(items, cache.read(items), strict=True):
        torch.testing.assert_close(row, fresh(encoder, image_dir, item), atol=2e-3, rtol=1e-2)


def test_cached_equals_uncached(setting):
    image_dir, encoder, items, build, _ = setting
    cache, bad = build()
    assert bad == [] and cache.shape == (17, 32)
    assert_fresh(cache, encoder, image_dir, items[::-1])


def test_resident_features_equal_cached_ones(setting):
    """What lies in a GPU's memory there, here in the CPU's."""
    *_, items, build, _ = setting
    cache, _ = build()
    resident = features.ResidentFeatures(cache, torch.device("cpu"))
    wanted = [items[7], items[29], items[0], items[7]]
    assert torch.equal(resident.read(wanted), cache.read(wanted))
    assert features.resident_or_cached(cache, torch.device("cpu")) is cache


def test_a_second_run_encodes_nothing(setting):
    *_, build, said = setting
    build()
    assert "30 to make" in said[0]
    build()
    assert said == []


@pytest.mark.fault
def test_only_the_photo_that_changed_is_encoded_again(setting):
    image_dir, encoder, items, build, said = setting
    paint("red", "left", 3).save(image_dir / "003.png", "BMP")
    build()
    paint("blue", "right", 99).save(image_dir / "003.png", "BMP")  # of the same size
    os.utime(image_dir / "004.png")  # touched, yet the same
    cache, _ = build()
    assert "3 to make, 27 there already" in said[0]
    assert_fresh(cache, encoder, image_dir, items)
    build()
    assert said == []  # the newest of a photo's packs counts


def test_photos_of_the_same_names_in_two_folders_are_each_encoded_once(setting):
    """As the whole photos and their crops, by turns."""
    image_dir, encoder, items, build, said = setting
    build()
    whole, other = image_dir.rename(image_dir.with_name("whole")), image_dir.with_name("other")
    other.mkdir()
    for file in whole.iterdir():
        Image.open(file).rotate(180).save(other / file.name)
    for folder, made in ((other, True), (whole, False), (other, False)):
        image_dir.symlink_to(folder)
        assert_fresh(build()[0], encoder, image_dir, items)
        assert bool(said) == made
        image_dir.unlink()
    image_dir.symlink_to(whole)
    cache, _ = build(items[:5])
    assert [*cache.entries] == items[:5]  # a GPU need hold no others
    assert len([*cache.folder.glob("shard_*.bin")]) == 2


@pytest.mark.fault
def test_a_photo_replaced_while_it_is_encoded_is_encoded_again(setting, monkeypatch):
    image_dir, encoder, items, build, said = setting
    opened = encoder.open

    def replaced_after(file):
        image = opened(file)
        if file.name == "003.png":
            paint("blue", "right", 99).save(file, "BMP")
        return image

    monkeypatch.setattr(encoder, "open", replaced_after)
    build(items[:10])
    monkeypatch.undo()
    monkeypatch.setattr(features, "print", said.append, raising=False)
    cache, _ = build(items[:10])
    assert_fresh(cache, encoder, image_dir, items[:10])
    assert "1 to make" in said[0]


def test_another_encoder_layer_or_preprocessing_is_another_cache(setting, tmp_path, encoder_dir):
    image_dir, encoder, items, build, said = setting
    build()
    deeper = FrozenEncoder.load(str(encoder_dir), layers=(-2,))
    cache, _ = build(encoder=deeper)
    assert "layers" in said[0] and "30 to make" in said[1]
    assert_fresh(cache, deeper, image_dir, items)
    other = FrozenEncoder.load(str(build_encoder("siglip", tmp_path / "other")))
    cache, _ = build(encoder=other)
    assert any("weights" in line for line in said)
    assert_fresh(cache, other, image_dir, items)
    changed = FrozenEncoder.load(str(encoder_dir))
    changed.processor.image_mean = [0.1, 0.2, 0.3]
    cache, _ = build(encoder=changed)
    assert any("preprocessing" in line for line in said)
    assert_fresh(cache, changed, image_dir, items)
    build(dtype=torch.bfloat16)
    assert any("(dtype differ)" in line for line in said)


@pytest.mark.fault
def test_an_interrupted_build_goes_on(setting, monkeypatch):
    image_dir, encoder, items, build, said = setting
    monkeypatch.setattr(features, "PACK_BYTES", 1)  # a pack a batch
    passes = []
    forward = type(encoder).forward

    def dies_at_the_fourth(self, inputs):
        passes.append(1)
        if len(passes) == 7:  # two try the encoder, and one is for the size
            raise KeyboardInterrupt
        return forward(self, inputs)

    monkeypatch.setattr(type(encoder), "forward", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        build()
    cache, _ = build()
    assert "18 to make, 12 there already" in said[0]
    assert_fresh(cache, encoder, image_dir, items)


@pytest.mark.fault(count=3)
def test_a_damaged_pack_is_never_read_as_features(setting):
    image_dir, encoder, items, build, said = setting
    cache, _ = build()
    pack = next(cache.folder.glob("*.bin"))
    whole = pack.read_bytes()
    pack.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    cache, _ = build()
    with pytest.raises(UserError, match="shard_00000.bin are damaged"):
        cache.read(items)
    pack.unlink()  # what the message tells to do
    cache, _ = build()
    assert_fresh(cache, encoder, image_dir, items)
    pack = next(cache.folder.glob("*.bin"))
    pack.write_bytes(whole[:-10])
    cache, _ = build()
    assert "not whole" in said[0]
    assert_fresh(cache, encoder, image_dir, items)


def test_a_new_pack_takes_no_others_place(tmp_path):
    """Of those there some may be gone: a message told to delete one."""
    (tmp_path / "shard_00001.bin").touch()
    part = [("a.png", 0, 1, 2, "digest")], torch.zeros(1, 1, 2).half()
    assert features.add_pack(tmp_path, [part])["a.png", 0].pack.name == "shard_00002.bin"


@pytest.mark.fault(count=8)
def test_more_packs_than_a_process_may_have_files_open(tmp_path):
    entries = {}
    for number in range(300):
        parts = [([(f"{number}.png", 0)], torch.full((1, 1, 2), float(number)))]
        pack = tmp_path / f"shard_{number:05d}.bin"
        table = features.write_pack(pack, ((names, x.half()) for names, x in parts), {})
        entries |= features._entries(pack, table)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # as macOS has it
    try:
        found = features.FeatureCache(tmp_path, entries).read(list(entries))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found[:, 0, 0].tolist() == list(range(300))


def test_damaged_tables_are_made_anew(setting):
    image_dir, encoder, items, build, said = setting
    cache, _ = build()
    index, identity = (next(cache.folder.glob(name)) for name in ("shard_*.json", "identity.json"))
    whole, twin = index.read_bytes(), cache.folder.with_name("other")
    for damage in (b"", b"{", b"[]", b"[" * 100_000, b"\xff", whole.replace(b"17", b'"x"')):
        index.write_bytes(damage)
        cache, _ = build()
        assert "not whole, or damaged" in said[0] and "30 to make" in said[1] and len(said) == 2
        index = next(cache.folder.glob("shard_*.json"))
    shutil.copytree(cache.folder, twin)
    for damage in ("{", "[]"):
        identity.write_text(damage)
        (twin / "identity.json").write_text(damage)
        cache, _ = build()
        assert "identity.json is damaged" in said[0] and "of another kind" in said[1]
        assert len(said) == 2 and "weights" in identity.read_text()
    assert_fresh(cache, encoder, image_dir, items)


@pytest.mark.fault(count=2)
def test_a_table_that_can_not_be_read_is_not_taken_for_damaged(setting, monkeypatch):
    """As another user's, or where a disk fails: it may stand for hours of encoding."""
    *_, items, build, _ = setting
    folder = build(items[:10])[0].folder
    (index,), read = folder.glob("shard_*.json"), Path.read_bytes

    def refused(path):
        if path == index:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError):
        build(items[:10])
    monkeypatch.undo()
    assert index.exists()
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises(UserError, match="choose another --features_dir"):
        build(items)


def test_an_encoder_whose_folder_is_renamed_finds_its_features(setting, encoder_dir, tmp_path):
    *_, build, said = setting
    cache, _ = build()
    moved = shutil.copytree(encoder_dir, tmp_path / "renamed")
    again, _ = build(encoder=FrozenEncoder.load(str(moved)))
    assert again.folder == cache.folder and not said
    shutil.copytree(cache.folder, cache.folder.with_name("a copy"))  # as somebody keeps one
    assert build()[0].folder == cache.folder and not said


def test_an_encoder_that_does_something_else_with_its_weights_is_another(
    setting, encoder_dir, tmp_path
):
    """As where its activation is corrected in config.json; what older versions kept, which noted
    none, is used as it is."""
    image_dir, encoder, items, build, said = setting
    cache, _ = build()
    file = shutil.copytree(encoder_dir, tmp_path / "other") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "relu"}))
    changed = FrozenEncoder.load(str(file.parent))
    assert_fresh(build(encoder=changed)[0], changed, image_dir, items)
    assert "(activation differ)" in said[0]
    trained = encoder.identity()
    with pytest.raises(UserError, match="not the one .* [(]its activation differ[)]"):
        FrozenEncoder.load_as_trained(trained, encoder.width, str(file.parent))
    del trained["activation"]
    FrozenEncoder.load_as_trained(trained, encoder.width, str(file.parent))
    noted = json.loads((cache.folder / "identity.json").read_text())
    del noted["activation"]
    (cache.folder / "identity.json").write_text(json.dumps(noted))
    counts = json.dumps(features.decisive(noted), sort_keys=True).encode()
    key = hashlib.sha256(counts).hexdigest()[:12]
    older = cache.folder.rename(cache.folder.with_name(f"older-{key}"))
    assert build()[0].folder == older and not said


def test_renumbered_frames_of_one_size_and_time_are_told_apart(setting):
    image_dir, encoder, _, build, _ = setting
    frames = [(f"{number}.bmp", 0) for number in range(4)]
    for number in range(1, 5):
        Image.open(image_dir / f"{number:03d}.png").save(image_dir / f"{number}.bmp")
        os.utime(image_dir / f"{number}.bmp", (1, 1))
    build([(f"{number}.bmp", 0) for number in range(1, 5)])
    for number in range(4):
        os.rename(image_dir / f"{number + 1}.bmp", image_dir / f"{number}.bmp")
    assert_fresh(build(frames)[0], encoder, image_dir, frames)


@pytest.mark.fault(count=2)
def test_names_that_no_file_can_have_are_left_out(setting):
    *_, build, said = setting
    odd = ["half \ud83d.png", "zero \0.png"]
    cache, bad = build([("001.png", 0), *((name, 0) for name in odd)], max_bad=2)
    assert bad == sorted(odd) and ("001.png", 0) in cache.entries


@pytest.mark.fault(count=2)
def test_a_photo_that_is_gone_is_left_out_or_too_many(setting):
    image_dir, encoder, items, build, said = setting
    build()
    (image_dir / "002.png").unlink()
    (image_dir / "005.png").unlink()
    with pytest.raises(UserError, match="(?s)2 photos can't be read.*002.png: No such file"):
        build(max_bad=1)
    cache, bad = build(max_bad=2)
    assert bad == ["002.png", "005.png"]
    with pytest.raises(UserError, match="none of the 1 photos"):
        build([("005.png", 0)], max_bad=2)


@pytest.mark.fault
def test_features_that_are_no_numbers_in_half_precision_are_refused(setting):
    """They are kept in it whatever --precision is, and captions are of such numbers too."""
    _, encoder, _, build, _ = setting
    photo = encoder.preprocess([Image.new("RGB", (8, 8))])
    for value in (float("nan"), 1e5):
        for parameter in encoder.parameters():
            parameter.data.fill_(value)
        with pytest.raises(UserError, match="not finite in half precision .*: take other --enc"):
            build()
        with pytest.raises(UserError, match="not finite in half precision"):  # as captioning does
            encode(encoder, [photo], torch.float32)


@pytest.mark.fault
def test_unreadable_photos_are_named_and_counted(setting):
    image_dir, encoder, items, build, said = setting
    (image_dir / "002.png").write_bytes(b"<html>gone</html>")
    with pytest.raises(UserError, match="002.png"):
        build(max_bad=0)
    cache, bad = build(max_bad=1)
    assert bad == ["002.png"] and "002.png" in said[-1]
    assert_fresh(cache, encoder, image_dir, [item for item in items if item[0] != "002.png"])
    assert ("002.png", 0) not in cache.entries


def test_views_are_what_they_say():
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    assert view_of(image, "a", 0) is image
    assert view_of(image, "a", 1).tobytes() == ImageOps.mirror(image).tobytes()
    crop = view_of(image, "a", 2)
    assert 36 <= crop.width <= 60 and 24 <= crop.height <= 40
    assert crop.tobytes() == view_of(image, "a", 2).tobytes()
    sizes = {view_of(image, name, 2).size for name in "abcdefgh"}
    assert len(sizes) > 3
    ramp = Image.linear_gradient("L").rotate(90)
    views = [view_of(ramp, "a", view) for view in range(8)]
    assert len({view.size for view in views[2:]}) == 6
    rising = [view.getpixel((0, 0)) < view.getpixel((view.width - 1, 0)) for view in views]
    assert rising == [True, False] * 4


def test_an_epoch_shows_all_views():
    names = [f"img_{number:04}.jpg" for number in range(100)]
    read = SimpleNamespace(read=lambda items: [view for _, view in items])
    rows = CaptionRows({name: [[1, 2]] for name in names}, read, dict.fromkeys(names, range(2)))
    batch = make_batch(names, rows.captions)
    assert not any(rows.load(batch, None)[1])  # the photos as they are
    for epoch in range(2):
        assert 30 < sum(rows.load(batch, epoch)[1]) < 70
    turned = zip(rows.load(batch, 0)[1], rows.load(batch, 1)[1], strict=True)
    assert all(sum(views) == 1 for views in turned)


def test_of_who_tells_left_from_right_no_mirror_image_is_shown():
    said = {
        "a": [Text("a dog"), Text("a dog on the left")],
        "b": [Text("yes", "is the cat Right of the dog?")],
        "c": [Text("左边有一只狗")],
        "d": [Text("a bright leftover")],
    }
    assert views_to_show(said, said, 4) == dict.fromkeys("abc", range(0, 4, 2)) | {"d": range(4)}
    assert views_to_show(said, said, 1) == dict.fromkeys(said, range(1))


def test_prefetch_keeps_order_and_bounds_and_passes_errors_on():
    started = []

    def load(i):
        started.append(i)
        if i == 7:
            raise ValueError("seven")
        return i * i

    results = prefetch(load, range(7), threads=3, ahead=2)
    assert next(results) == 0
    time.sleep(0.1)
    assert max(started) <= 3
    assert list(results) == [1, 4, 9, 16, 25, 36]
    with pytest.raises(ValueError, match="seven"):
        list(prefetch(load, range(9)))


def test_their_size_is_said_beforehand_and_then_how_long_it_takes(setting, monkeypatch, capsys):
    *_, build, said = setting

    class Slow(Bar):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.started -= 600  # as if the first batch of 4 of 30 took ten minutes
            self.spoken -= 600

    monkeypatch.setattr(features, "Bar", Slow)
    cache, _ = build()
    size = 30 * 17 * 32 * 2
    assert said[0].endswith(f"{size / 1000:.1f} kB more")
    assert sum(file.stat().st_size for file in cache.folder.glob("*.bin")) == size
    assert not said[1:] and "  features  13%  65.0 min left\n" in capsys.readouterr().out


def test_no_room_is_said_before_anything_is_encoded(setting, monkeypatch):
    image_dir, encoder, _, build, _ = setting
    usage = SimpleNamespace(free=30 * 17 * 32 * 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"32\.6 kB free, but 32\.6 kB are needed.*--features_dir"):
        build()
    with pytest.raises(UserError, match="are needed"):  # of one disk, together
        features.require_room([(image_dir, usage.free // 2 + 1)] * 2)
    monkeypatch.undo()
    assert build()[0].shape == (17, 32)
