"""WebDataset shards: every photo once, wherever it is read from, however often it breaks off."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import json
import lzma
import os
import re
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commands
import prepare_dataset
import shards
from corpus import shards_to_train
from dataset import Batch, data_paths, load_captions
from distributed import Team
from encoder import FrozenEncoder
from prepare_dataset import unpack_shards
from run import on_record
from shards import Stock, StreamedRows, take_stock
from tars import ATTEMPTS, Sample, expand_shards, shard_name
from tests.conftest import COLOURS, paint, run, run_without, small_flags
from tests.download_server import DownloadServer, Remote, serving
from tests.test_distributed import figures, torchrun
from tests.test_kills import assert_equal, state
from tokenizer import CaptionTokenizer
from utils import UserError


def photo(number: int) -> bytes:
    colour, place = list(COLOURS)[number % 3], ("left", "right")[number // 3 % 2]
    file = io.BytesIO()
    paint(colour, place, number).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    colour, place = list(COLOURS)[number % 3], ("left", "right")[number // 3 % 2]
    longer = " that is not very large" * (number % 4 == 0)
    return f"a {colour} square{longer} on the {place}"


def pack(files: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar of these files, in order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def shard_of(numbers: Sequence[int]) -> bytes:
    """As img2dataset lays it out: photo, caption, and a JSON about them."""
    files = []
    for number in numbers:
        key = f"{number:09d}"
        about = json.dumps({"caption": caption(number), "url": "https://example.com"})
        files += [
            (f"{key}.png", photo(number)),
            (f"{key}.txt", caption(number).encode()),
            (f"{key}.json", about.encode()),
        ]
    return pack(files)


def write_shards(folder: Path, sizes: Sequence[int]) -> str:
    """Shards of so many photos each, as a pattern in braces."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for shard, size in enumerate(sizes):
        (folder / f"{shard:05d}.tar").write_bytes(shard_of(range(start, start + size)))
        start += size
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def encoder(encoder_dir) -> FrozenEncoder:
    return FrozenEncoder.load(str(encoder_dir))


@pytest.fixture
def server(monkeypatch) -> Iterator[DownloadServer]:
    monkeypatch.setattr("tars.RETRY_PAUSE", 0.01)
    with serving() as running:
        yield running


# --- One shard ------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[Sample], Counter[str], dict[str, str]]:
    """A shard's samples, how many were passed over for what, and which can't be read."""
    passed, bad = Counter(), {}
    return list(shards.read_shard(str(path), passed, bad)), passed, bad


def read_shard(url: str) -> Iterator[Sample]:
    return shards.read_shard(url, Counter(), {})


@pytest.mark.fault(count=9)
def test_what_counts_as_a_photo_with_a_caption(tmp_path):
    """Every name in a tar is a photo with captions, or counted with the reason why it is none."""
    half, deep = '"half \\ud83d of an emoji"', "[" * 100_000
    files = [
        ("in/a.jpg", b"A"),
        ("in/._a.txt", b"of a Mac"),
        ("in/a.txt", b" two \n lines "),
        ("b.jpg", b"B"),
        ("b.json", json.dumps({"captions": ["one", "another"]}).encode()),
        ("c.png", b"C"),
        ("c.json", b'{"text": "written"}'),
        ("no_photo.txt", b"words"),
        ("no_words.jpg", b"D"),
        ("empty.jpg", b"E"),
        ("empty.txt", b" "),
        ("binary.jpg", b"F"),
        ("binary.txt", b"\xff\xfe"),
        ("null.jpg", b"F"),
        ("null.json", b'{"caption": null}'),
        ("odd.jpg", b"G"),
        ("odd.json", b'{"caption": 7}'),
        ("list.jpg", b"G"),
        ("list.json", b"[]"),
        ("broken.jpg", b"H"),
        ("broken.json", b"{"),
        ("deep.jpg", b"H"),
        ("deep.json", deep.encode()),
        ("large.jpg", bytes(2**26 + 1)),
        ("large.txt", b"of what it is"),
        ("in/a.webp", b"I"),
        ("in/a.txt", b"the same name again"),
        ("twice.jpg", b"J"),
        ("twice.jpg", b"not this one"),
        ("twice.txt", b"the first"),
        ("latin.TIF", b"K"),
        ("latin.txt", "un café".encode("latin-1")),
        ("wide.avif", b"L"),
        ("wide.txt", "ein Käfer".encode("utf-16")),
        ("json.jfif", b"M"),
        ("json.txt", b"\n"),
        ("json.json", f'{{"id": 1{"0" * 5000}, "caption": {half}}}'.encode()),
        ("\udce9t\udce9.JPEG", b"N"),  # as tarfile gives bytes that aren't UTF-8
        ("\udce9t\udce9.txt", b"with\0 a zero"),
        ("._in.jpg", b"of a Mac"),
        ("signs.jpg", b"O"),
        ("signs.txt", b"..."),
        ("null.jpg", b"P"),
        ("null.txt", b"!"),
        ("null.json", b'{"captions": [null, "one", "?"]}'),
        ("pandas.jpg", b"Q"),
        ("pandas.txt", b"nan"),
        ("made.jpg", b"R"),
        ("made.json", b'{"seed": 1, "title": "No", "prompt": "a dog, 4k"}'),
        ("asks.jpg", b"S"),
        ("asks.json", b'{"prompt": "What is red?", "response": "A dog"}'),
        ("z.WEBP", b"Z"),
        ("z.TXT", b"the &quot;last&quot;"),
    ]
    path = tmp_path / "odd.tar"
    path.write_bytes(pack(files))
    found, passed, bad = read(path)
    assert [tuple(sample) for sample in found] == [
        ("in/a", "jpg", b"A", ["two lines"]),
        ("b", "jpg", b"B", ["one", "another"]),
        ("c", "png", b"C", ["written"]),
        ("twice", "jpg", b"J", ["the first"]),
        ("latin", "tif", b"K", ["un café"]),
        ("wide", "avif", b"L", ["ein Käfer"]),
        ("json", "jfif", b"M", ["half ? of an emoji"]),
        ("été", "jpeg", b"N", ["with a zero"]),
        ("null", "jpg", b"P", ["one"]),
        ("made", "jpg", b"R", ["a dog, 4k"]),
        ("z", "webp", b"Z", ['the "last"']),
    ]
    assert passed == {"without a photo": 1, "without a caption": 7, "with another's name": 1}
    assert list(bad) == ["odd", "list", "broken", "deep", "large"]
    assert "odd.tar: large can't be read: its .jpg is larger than 67.1 MB" in bad["large"]


texts = st.text(st.characters(codec=None), max_size=20)  # half characters and zeros among them
captions_in_json = st.recursive(
    texts | st.none() | st.integers(-(10**400), 10**400) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="./\0"), min_size=1)
            | st.just("\udcff\udc80"),
            st.binary(max_size=40) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
            captions_in_json | st.fixed_dictionaries({"caption": captions_in_json}),
        ),
        max_size=6,
    )
)
def test_no_text_costs_a_shard(tmp_path, samples):
    files = [
        file
        for number, (name, text, table) in enumerate(samples)
        for file in (
            (f"{number}{name}.jpg", b"photo"),
            (f"{number}{name}.txt", text),
            (f"{number}{name}.json", json.dumps(table).encode()),
        )
    ]
    (tmp_path / "0.tar").write_bytes(pack(files))
    found, passed, bad = read(tmp_path / "0.tar")
    assert len(found) + passed.total() + len(bad) == len(samples)
    for sample in found:
        json.dumps(sample.captions, ensure_ascii=False).encode()
        assert all(text == " ".join(text.split()) and "\0" not in text for text in sample.captions)


def test_names_that_are_too_long_are_counted(tmp_path):
    files = [("a.jpg", b"photo"), ("a.txt", b"a dog")]
    longer = [(f"{'b' * 5000}.{end}", content) for end, content in (("jpg", b"x"), ("txt", b"a"))]
    (tmp_path / "0.tar").write_bytes(pack([*files, *longer]))
    found, passed, bad = read(tmp_path / "0.tar")
    assert len(found) == 1 and passed == {"with too long a name": 1} and not bad


UNPACKS = "can't be read to its end (it unpacks to more than 100 times its size)"


@pytest.mark.fault(count=5)
@pytest.mark.parametrize(
    "kind, said",
    [
        ("sparse", UNPACKS),
        ("sparse, many", UNPACKS),
        ("gzipped", UNPACKS),
        ("gzipped, many", UNPACKS),
        ("header", "can't be read to its end (it has a header of 1.2 GB)"),
    ],
)
def test_a_bomb_is_refused_before_it_is_in_memory(tmp_path, kind, said):
    path, many = tmp_path / "0.tar", "many" in kind
    size, count = (60_000_000, 10) if many else (1_200_000_000, 1)
    if "sparse" in kind:
        path.write_bytes(b"".join(sparse_file(size) for _ in range(count)) + bytes(10240))
    else:
        with tarfile.open(path, "w:gz", compresslevel=1) as tar:
            for number in range(count):
                info = tarfile.TarInfo(f"{number}.jpg")
                info.size, info.type = size, b"x" if kind == "header" else b"0"
                tar.addfile(info, Zeros(size))
    code = (
        "import resource, sys, shards\n"
        "from collections import Counter\nfrom utils import UserError\n"
        "bad = {}\n"
        "try:\n"
        "    print(len(list(shards.read_shard(sys.argv[1], Counter(), bad))), bad)\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    result = run("-c", code, path)
    assert result.returncode == 0 and said in result.stdout, result.stdout + result.stderr
    assert int(result.stdout.split()[-1]) < 1_000_000  # units of 1,024 bytes


def test_large_files_of_other_kinds_cost_nothing(tmp_path):
    files = [("0.mp4", bytes(2**27)), ("0.jpg", b"A"), ("0.txt", b"a film")]
    (tmp_path / "0.tar").write_bytes(pack(files))
    assert len(read(tmp_path / "0.tar")[0]) == 1


class Zeros(io.RawIOBase):
    """So many zeros."""

    def __init__(self, count: int):
        self.left = count

    def read(self, size: int) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


def sparse_file(size: int) -> bytes:
    """A photo of so many bytes in a tar, of which GNU's format stores none."""
    info = tarfile.TarInfo("0.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % size + b"%011o\0" % 0  # one block of no bytes, at the end
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


DAMAGES = ["in a photo", "between files", "in a header", "a broken header", "joined"]
DAMAGES += ["joined parts", "no tar", "empty", "away"]
PACKED = {"plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
with contextlib.suppress(ModuleNotFoundError):  # from Python 3.14 on
    PACKED["zst"] = importlib.import_module("compression.zstd").compress


@pytest.mark.fault
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pack", PACKED)
def test_a_shard_that_is_not_whole_is_refused(tmp_path, damage, pack):
    whole, path = shard_of(range(3)), tmp_path / "00000.tar"
    header = _after_files(whole, 3)
    cut = {
        "in a photo": whole[:1000],
        "between files": whole[:header],
        "in a header": whole[: header + 100],
        "a broken header": whole[:header] + b"?" + whole[header + 1 :],
        "joined": whole * 2,
        "joined parts": whole,
        "no tar": b"<html>" * 400,
        "empty": b"",
    }
    if damage != "away":
        path.write_bytes(PACKED[pack](cut[damage]) * (1 + (damage == "joined parts")))
    why = ".*it is no tar" * (damage == "no tar")
    with pytest.raises(UserError, match="00000.tar can't be read" + why):
        list(read_shard(str(path)))


@pytest.mark.fault
def test_a_command_whose_tar_is_cut_off_is_refused_and_a_packed_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tars.RETRY_PAUSE", 0.01)
    whole = shard_of(range(3))
    (tmp_path / "0.tar").write_bytes(whole[: _after_files(whole, 6)])
    with pytest.raises(UserError, match="no end mark"):
        list(read_shard(f"pipe:cat {tmp_path}/0.tar"))
    parts = gzip.compress(whole[:700]) + gzip.compress(whole[700:])  # as some packers do
    for packed in (parts, *(pack(whole) for pack in PACKED.values())):
        (tmp_path / "0.packed").write_bytes(packed)
        for url in (f"pipe:cat {tmp_path}/0.packed", f"{tmp_path}/0.packed"):
            assert [s.photo for s in read_shard(url)] == [photo(n) for n in range(3)]


def _after_files(tar: bytes, count: int) -> int:
    """Where the first `count` files of a tar end."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        info = opened.getmembers()[count - 1]
    return info.offset_data + -(-info.size // 512) * 512


@pytest.mark.fault(count=5)
@pytest.mark.parametrize("length", ["told", "untold"])
def test_a_server_that_breaks_off_costs_nothing(server, length):
    body = shard_of(range(40))
    # After a whole photo, between a photo and its caption, within a header, anywhere, at once.
    cuts = [
        _after_files(body, 30),
        _after_files(body, 31),
        _after_files(body, 61) + 100,
        len(body) // 2,
        100,
    ]
    server.files["00000.tar"] = Remote(body, length=length, cuts=list(cuts))
    found = list(read_shard(server.url("00000.tar")))
    assert [s.key for s in found] == [f"{number:09d}" for number in range(40)]
    assert [s.photo for s in found] == [photo(number) for number in range(40)]
    assert len(server.ranges_asked("00000.tar")) == len(cuts) + 1


@pytest.mark.fault(count=2)
def test_a_server_that_never_gives_it_is_named(server):
    server.files["00000.tar"] = Remote(shard_of(range(4)), cuts=[3000] * 20)
    for name in ("00000.tar", "missing.tar"):
        with pytest.raises(UserError, match=rf"{name} can't be read to its end"):
            list(read_shard(server.url(name)))
    assert len(server.ranges_asked("00000.tar")) <= ATTEMPTS + 1


# --- Taking stock ---------------------------------------------------------------------------


def layout(stock: Stock) -> list[tuple[int, int, int]]:
    """Photos, captions and bytes of features of each shard with photos."""
    return [(shard.photos, shard.captions, shard.bytes) for shard in stock.shards]


def write_as_before(table: Path) -> None:
    """Bring a table into the form that earlier versions gave it, and leave a manifest beside it."""
    content = json.loads(table.read_text())
    keys, captions, checksums = zip(*content.pop("items"), strict=True)
    del content["bytes"]
    content |= {"keys": keys, "captions": captions, "checksums": checksums}
    table.write_text(json.dumps(content))
    (table.parent / "manifest.json").write_text('{"shards": []}')


@pytest.mark.fault(count=7)
def test_stock_is_taken_once_and_again_of_what_changed(tmp_path, encoder, capsys, monkeypatch):
    rooms: list[tuple[Path, int]] = []
    monkeypatch.setattr("shards.require_room", lambda needs, flag: rooms.extend(needs))
    urls = expand_shards(write_shards(tmp_path / "tars", [5, 3, 4]))

    def taken() -> tuple[Stock, str]:
        stock = take_stock(encoder, urls, tmp_path / "f", batch_size=2)
        return stock, capsys.readouterr().out

    each = 17 * 32 * 2  # vectors, width, bytes of a number
    first, said = taken()
    assert layout(first) == [(n, n, n * each) for n in (5, 3, 4)] and "3 of 3 to read" in said
    assert [size for _, size in rooms] == [2 * 5 * each]  # what the others take, if like the first
    again, said = taken()
    assert again.shards == first.shards
    assert said == "shards: 12 samples, 12 of use, 0 passed over\n"
    Path(urls[1]).write_bytes(shard_of(range(50, 56)))
    first, said = taken()
    assert layout(first) == [(n, n, n * each) for n in (5, 6, 4)] and "1 of 3 to read" in said
    assert len([*first.first_texts()]) == 15
    monkeypatch.setattr(shards, "TEXTS", 7)
    assert len([*first.first_texts()]) == 7
    tables = [shard.table for shard in first.shards]
    write_as_before(tables[0])
    again, said = taken()
    assert again.shards == first.shards and "to read" not in said
    rows = [first.features.read([(first.name((0, row)), 0)]) for row in range(5)]
    assert all(
        torch.equal(again.features.read([(again.name((0, i)), 0)]), rows[i]) for i in range(5)
    )
    tables[0].with_suffix(".bin").unlink()  # as a message may have said
    tables[2].unlink()  # as if the run had been killed before it was written
    again, said = taken()
    assert again.shards == first.shards and "2 of 3 to read" in said
    tables[0].with_suffix(".bin").write_bytes(b"half")
    again, said = taken()
    assert again.shards == first.shards and "1 of 3 to read" in said
    for damage in ("{", "[]", '{"name": 1}'):
        tables[0].write_text(damage)
        with pytest.raises(UserError, match="00000-.*json is gone or damaged"):
            list(Stock(first.shards).first_texts())
        again, said = taken()
        assert again.shards == first.shards and "1 of 3 to read" in said


def test_a_table_that_can_not_be_read_now_is_not_made_anew(tmp_path, encoder, monkeypatch):
    """As where too many files are open, or another user's: it may stand for hours of encoding."""
    urls = expand_shards(write_shards(tmp_path / "tars", [3]))
    (shard,) = take_stock(encoder, urls, tmp_path / "f").shards
    before = shard.table.stat().st_mtime_ns

    def refused(path, **_):
        raise OSError(24, "Too many open files", str(path))

    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, refused)
    with pytest.raises(OSError):
        take_stock(encoder, urls, tmp_path / "f")
    assert shard.table.stat().st_mtime_ns == before


@pytest.mark.fault
def test_photos_that_cannot_be_read_are_left_out_or_too_many(tmp_path, encoder, capsys):
    files = []
    for number in range(6):
        content = b"no photo" if number in (1, 4) else photo(number)
        files += [(f"{number}.png", content), (f"{number}.txt", caption(number).encode())]
    path = tmp_path / "00000.tar"
    path.write_bytes(pack(files))
    with pytest.raises(UserError, match=r"MAX_BAD_IMAGES = 1:\n.*00000.tar: 1 is not a readable"):
        take_stock(encoder, [str(path)], tmp_path / "f", max_bad=1)
    stock = take_stock(encoder, [str(path)], tmp_path / "f", max_bad=2)
    said = capsys.readouterr().out
    assert len(stock) == 4 and "00000.tar: 4 is not" in said
    assert "6 samples, 4 of use, 2 passed over (2 that can't be read)" in said
    with pytest.raises(UserError, match="2 photos can't be read, more than MAX_BAD_IMAGES = 1"):
        take_stock(encoder, [str(path)], tmp_path / "f", max_bad=1)  # also of those known
    assert [item[0] for item in stock.table(0)["items"]] == ["0", "2", "3", "5"]
    stream = take_stock(encoder, [str(path)], tmp_path / "g", keep_features=False, max_bad=2)
    tokenizer = CaptionTokenizer.train(stream.first_texts(), 300)
    rows = StreamedRows(stream, tokenizer, 30, 10)
    (batch,) = rows.batches(8, 0, 0)
    lost, features = rows.load(batch)
    carrying = {int(row) for row in lost.places // lost.tokens.shape[1]}
    bad = {row for row, name in enumerate(batch.names) if name[-1] in "14"}
    assert carrying == set(range(6)) - bad and len(bad) == 2 and len(features) == 6
    stream.max_bad = 1
    (batch,) = rows.batches(8, 0, 1)
    with pytest.raises(UserError, match="MAX_BAD_IMAGES = 1"):
        rows.load(batch)
    path.write_bytes(pack(files[:4]))
    (batch,) = rows.batches(8, 0, 2)
    with pytest.raises(UserError, match="00000.tar has changed .*, 4 photos are gone"):
        rows.load(batch)


@pytest.mark.fault
def test_damaged_features_are_named(tmp_path, encoder):
    urls = expand_shards(write_shards(tmp_path / "tars", [3]))
    stock = take_stock(encoder, urls, tmp_path / "f")
    binary = stock.shards[0].table.with_suffix(".bin")
    content = bytearray(binary.read_bytes())
    content[-1] ^= 1
    binary.write_bytes(content)
    rows = StreamedRows(stock, CaptionTokenizer.train(stock.first_texts(), 300), 30, 10)
    with pytest.raises(UserError, match=rf"{binary.name} are damaged"):
        for batch in rows.batches(2, 0, 0):
            rows.load(batch)


# --- Batches --------------------------------------------------------------------------------

SIZES = [9, 1, 30, 0, 17, 40, 6]


@pytest.fixture(scope="module")
def both(tmp_path_factory, encoder) -> tuple[StreamedRows, StreamedRows]:
    """The same shards, features kept, and photos streamed."""
    folder = tmp_path_factory.mktemp("stock")
    urls = expand_shards(write_shards(folder / "tars", SIZES))
    root = folder / "f"
    stream = take_stock(encoder, urls, root, keep_features=False)
    stock = take_stock(encoder, urls, root)
    tokenizer = CaptionTokenizer.train(stock.first_texts(), 400)
    return StreamedRows(stock, tokenizer, 40, 20), StreamedRows(stream, tokenizer, 40, 20)


def names(batches: Sequence[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.names]


@pytest.mark.parametrize("size, batch_size", [(1, 4), (2, 4), (3, 4), (3, 7), (5, 4), (4, 64)])
def test_a_team_meets_each_photo_once_in_equally_many_batches(both, size, batch_size):
    rows, _ = both
    for epoch in (0, 1):
        parts = [
            list(rows.batches(batch_size, 3, epoch, team=Team(rank, size))) for rank in range(size)
        ]
        assert {len(part) for part in parts} == {rows.count(batch_size)}
        met = Counter(name for part in parts for name in names(part))
        assert len(met) == sum(SIZES) and set(met.values()) == {1}


def test_the_order_is_the_seeds_and_drawn_from_a_bounded_pool(both):
    rows, _ = both
    first, same, other = (
        names(list(rows.batches(4, seed, epoch))) for seed, epoch in ((0, 0), (0, 0), (0, 1))
    )
    assert first == same != other and sorted(first) == sorted(other)
    order = list(rows._in_order(0, 0, 0, len(rows)))
    assert order != list(rows._in_order(0, 1, 0, len(rows)))
    assert sorted(order) != order != [rows.stock.place(name) for name in first]
    narrow = StreamedRows(rows.stock, rows.tokenizer, 40, 3)
    drawn = narrow._shuffled(iter(order), (0,))
    assert all(order.index(place) < n + 3 + 1 for n, place in zip(range(20), drawn, strict=False))


def test_each_photo_keeps_its_own_captions(tmp_path, encoder):
    texts = [[f"{of} {word}" for word in "xyz"[: n % 3 + 1]] for n, of in enumerate("abcdefg")]
    files = []
    for n, captions in enumerate(texts):
        about = json.dumps({"caption": captions}).encode()
        files += [(f"{n}.png", photo(n)), (f"{n}.json", about)]
    (tmp_path / "0.tar").write_bytes(pack(files))
    url = str(tmp_path / "0.tar")
    stream = take_stock(encoder, [url], tmp_path / "f", keep_features=False)
    tokenizer = CaptionTokenizer.train(stream.first_texts(), 300)
    for batch in StreamedRows(stream, tokenizer, 30, 9).batches(4, 0, 0):
        for name, ids, captions in zip(batch.names, batch.tokens, batch.segments, strict=True):
            read = [ids[captions == n].tolist() for n in range(int(captions.max()) + 1)]
            assert [*map(tokenizer.decode, read)] == texts[int(name[-1])]


def test_an_order_has_a_name_that_changes_with_it(both):
    rows, streamed = both
    name = rows.order(4, 0, Team())
    assert name == rows.order(4, 0, Team()) == streamed.order(4, 0, Team())
    other = StreamedRows(rows.stock, rows.tokenizer, 40, 21)
    others = [rows.order(5, 0, Team()), rows.order(4, 1, Team()), rows.order(4, 0, Team(0, 2))]
    fewer = StreamedRows(Stock(rows.stock.shards[1:]), rows.tokenizer, 40, 20)
    others += [other.order(4, 0, Team()), fewer.order(4, 0, Team())]
    assert len({name, *others}) == 6


@pytest.mark.parametrize("skip", [0, 1, 5, 13, 26])
def test_going_on_in_mid_epoch_meets_the_rest(both, skip, monkeypatch):
    opened: list[str] = []
    real = shards.read_shard
    monkeypatch.setattr(
        shards, "read_shard", lambda url, *more: (opened.append(url), real(url, *more))[1]
    )
    monkeypatch.setattr(shards, "POOL", 2)
    kept, streamed = both
    whole = list(kept.batches(4, 0, 2))
    for rows in both:
        loaded = [rows.load(batch) for batch in rows.batches(4, 0, 2, skip)]
        expected = [kept.load(batch) for batch in whole[skip:]]
        assert names([batch for batch, _ in loaded]) == names(whole[skip:])
        for (batch, features), (twin, wanted) in zip(loaded, expected, strict=True):
            assert torch.equal(batch.tokens, twin.tokens)
            torch.testing.assert_close(features, wanted, atol=2e-3, rtol=2e-3)
    needed = {name.rsplit("#", 1)[0] for name in names(whole[skip:])}
    assert set(opened) == needed  # shards that are behind are not read again
    assert not streamed.stock.waiting


# --- Whole runs -----------------------------------------------------------------------------


def flags_of(data: Path, encoder_dir: Path, pattern: str, *more: object) -> list[str]:
    return [
        *small_flags(data, encoder_dir),
        "--train_shards",
        pattern,
        "--dropout",
        0,
        "--split",
        "karpathy",
        "--scored_images",
        4,
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tars")
    return write_shards(folder / "train", [11, 6, 9, 8]), write_shards(folder / "val", [5, 3])


@pytest.mark.fault(count=2)
def test_kept_and_streamed_give_the_same_model_killed_or_not(tmp_path, encoder_dir, tars):
    pattern, val = tars
    said = {}
    for kind, more in {"kept": (), "streamed": ("--keep_shard_features", "false")}.items():
        flags = flags_of(
            tmp_path / "data",
            encoder_dir,
            pattern,
            "--val_shards",
            val,
            *more,
            "--output_dir",
            tmp_path / kind,
        )
        result = run("train.py", *flags)
        assert result.returncode == 0, result.stderr
        said[kind] = result.stdout
    assert "34 photos with 34 captions to train on, 8 to validate" in said["kept"]
    assert figures(said["kept"]) == [pytest.approx(f, abs=2e-3) for f in figures(said["streamed"])]
    for kind, more in (("kept", ()), ("streamed", ("--keep_shard_features", "false"))):
        flags = flags_of(tmp_path / "data", encoder_dir, pattern, "--val_shards", val, *more)
        dead = run("tests/killed_run.py", "update", 13, *flags, "--output_dir", tmp_path / "cut")
        assert dead.returncode == -9, dead.stderr
        last = tmp_path / "cut" / "last.pt"
        again = run(
            "train.py", *flags, "--output_dir", tmp_path / "cut", "--resume_checkpoint_path", last
        )
        assert again.returncode == 0, again.stderr
        assert_equal(state(tmp_path / kind / "last.pt"), state(last), kind)
        for path in (tmp_path / "cut").iterdir():
            path.unlink() if path.is_file() else None


@pytest.mark.parametrize("keep", ["true", "false"])
def test_processes_share_the_stock_and_the_epoch(tmp_path, encoder_dir, tars, keep):
    flags = flags_of(
        tmp_path / "data",
        encoder_dir,
        tars[0],
        "--val_shards",
        tars[1],
        "--keep_shard_features",
        keep,
    )
    shared = torchrun(2, "train.py", *flags)
    assert shared.returncode == 0, shared.stderr
    first, last = figures(shared.stdout)
    assert last[0] < first[0] - 0.1  # it learns
    tables = list(tmp_path.rglob("shards/*.json"))
    assert sorted(len(json.loads(path.read_text())["items"]) for path in tables) == [6, 8, 9, 11]
    assert len(list(tmp_path.rglob("shards/*.bin"))) == (4 if keep == "true" else 0)


@pytest.mark.fault
def test_a_run_that_is_killed_keeps_the_shards_it_was_done_with(tmp_path, encoder_dir, tars):
    pattern, val = tars
    flags = flags_of(tmp_path / "data", encoder_dir, pattern, "--val_shards", val, "--epochs", 1)
    dead = run("tests/killed_run.py", "shards", 2, *flags)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    again = run("train.py", *flags)
    assert again.returncode == 0, again.stderr
    assert "shards: 3 of 4 to read" in again.stdout
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.fault(count=4)
def test_a_run_says_what_it_passed_over_or_that_it_is_too_much(tmp_path, encoder_dir):
    for name in ("train", "val"):
        files = []
        for number in range(12):
            text = f"un carré {number} à gauche".encode("latin-1" if number % 2 else "utf-8")
            about = b"{" if number == 4 else b'{"caption": "half \\ud83d"}'
            files.append((f"{number}.jpg", b"no photo" if number == 5 else photo(number)))
            files += [(f"{number}.json", about)] if number in (4, 6) else []
            files += [(f"{number}.txt", text)] if number not in (4, 6, 7) else []
        (tmp_path / f"{name}.tar").write_bytes(pack(files))
    flags = flags_of(
        tmp_path / "data", encoder_dir, tmp_path / "train.tar", "--val_shards", tmp_path / "val.tar"
    )
    result = run("train.py", *flags, "--epochs", 1, "--max_bad_images", 2)
    assert result.returncode == 0, result.stderr
    said = "passed over (1 without a caption, 2 that can't be read)"
    assert f"shards: 12 samples, 9 of use, 3 {said}" in result.stdout
    assert (
        "10 photos with" in result.stdout or "9 photos with 9 captions to train on" in result.stdout
    )
    few = run("train.py", *flags, "--epochs", 1, "--max_bad_images", 1)
    assert few.returncode == 1 and "more than MAX_BAD_IMAGES = 1" in few.stderr
    assert "train.tar: 5 is not a readable picture" in few.stderr


@pytest.mark.fault
def test_a_damaged_shard_ends_the_run_with_its_name(tmp_path, encoder_dir, tars):
    pattern = write_shards(tmp_path / "train", [4, 6])
    path = tmp_path / "train" / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    flags = flags_of(tmp_path / "data", encoder_dir, pattern, "--val_shards", tars[1])
    cut = run("train.py", *flags, "--epochs", 1)
    assert cut.returncode == 1 and "00001.tar can't be read to its end" in cut.stderr
    assert "Traceback" not in cut.stderr
    path.write_bytes(whole)
    again = run("train.py", *flags, "--epochs", 1)
    assert again.returncode == 0 and "shards: 1 of 2 to read" in again.stdout, again.stderr


def test_shards_over_http_and_an_ordinary_data_set_to_validate_on(server, photos, encoder_dir):
    for shard in range(3):
        body = shard_of(range(shard * 8, shard * 8 + 8))
        server.files[f"{shard:05d}.tar"] = Remote(body, cuts=[4000])
    pattern = server.url("{00000..00002}.tar")
    flags = [*small_flags(photos, encoder_dir), "--train_shards", pattern, "--epochs", 1]
    result = run("train.py", *flags, "--scst_epochs", 3)
    assert result.returncode == 0, result.stderr
    assert "24 photos with 24 captions" in result.stdout
    assert "stages    cross-entropy only" in result.stdout and "epoch 1/1" in result.stdout


@pytest.mark.parametrize(
    "more, said",
    [
        (["--feature_views", "2"], "--feature_views 1 --tasks captions"),
        (["--train_shards", "https://host/0.tar?token=${NOT_SET}"], "TRAIN_SHARDS"),
        (["--train_shards", "cc3m/{00000..00331.tar"], "TRAIN_SHARDS"),
        (["--train_shards", "/nowhere/{0..3}.tar"], "4 of the 4 shards"),
        (["--train_shards", "cc3m/{00..99999999999}.tar"], "more than 1,000,000 shards"),
        (["--val_shards", "/nowhere/0.tar"], "holds a data set already"),
        (["--max_images", "10"], "--max_images 0"),
    ],
)
def test_mistakes_are_named(photos, encoder_dir, tars, more, said):
    result = run("train.py", *small_flags(photos, encoder_dir), "--train_shards", tars[0], *more)
    assert result.returncode == 1 and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_what_validates_is_not_learned_from(tmp_path):
    write_shards(tmp_path, [1, 1, 1])

    def named(train: str | None, val: str | None) -> list[str]:
        flags = {"train_shards": train, "val_shards": val}
        words = [f"--{k}={tmp_path}/{pattern}" for k, pattern in flags.items() if pattern]
        return [Path(url).name for url in shards_to_train(commands.train(words))]

    assert named("0000[01].tar", "00002.tar") == ["00000.tar", "00001.tar"]
    for train in ("*.tar", "{00000..00002}.tar", "00002.tar"):
        with pytest.raises(UserError, match=r"both name .*/00002.tar"):
            named(train, "00002.tar")
    words = [f"--{kind}_shards=https://host/0.tar?sig={kind}" for kind in ("train", "val")]
    with pytest.raises(UserError, match="both name"):
        shards_to_train(commands.train(words))
    with pytest.raises(UserError, match="name those to train on"):
        named(None, "00002.tar")


def test_tars_may_hold_photos_to_score_a_trained_model_on(tmp_path, capsys):
    flags = f"--data_dir {tmp_path}/data --split test --val_shards {write_shards(tmp_path, [3])}"
    assert prepare_dataset.main(flags.split()) == 0
    assert re.search(r"next .*evaluate.py .*--split val --data_dir", capsys.readouterr().out)
    assert prepare_dataset.main(flags.replace("--split test ", "").split()) == 0
    words = capsys.readouterr().out.partition("train.py ")[2].replace("TARS", f"{tmp_path}/t.tar")
    (tmp_path / "t.tar").touch()
    assert shards_to_train(commands.train(words.split())) == [f"{tmp_path}/t.tar"]


def test_tars_that_validate_are_not_unpacked_among_files_of_ones_own(tmp_path):
    pattern, own, photos = write_shards(tmp_path, [3]), tmp_path / "own.json", tmp_path / "photos"
    own.write_text('{"a.png": ["my own caption"]}')
    photos.mkdir()
    flags = ["--data_dir", f"{tmp_path}/data", "--val_shards", pattern, "--image_dir", f"{photos}"]
    flags += ["--captions_file", f"{own}"]
    for _ in range(2):  # the second time the tar is newer
        assert prepare_dataset.main(flags) == 0
        assert len(load_captions(tmp_path / "data" / "captions.json")) == 3
        os.utime(tmp_path / "00000.tar", (time.time() + 60,) * 2)
    assert "my own caption" in own.read_text() and not [*photos.iterdir()]


def test_tars_that_validate_are_unpacked_again_if_they_changed(tmp_path):
    paths = data_paths(commands.train(["--data_dir", str(tmp_path / "data")]))
    pattern, path = write_shards(tmp_path, [3]), tmp_path / "00000.tar"
    os.utime(path, (2**32,) * 2)
    unpack_shards(pattern, paths, 0)
    marker = paths.data_dir / "prepared.json"
    before = marker.stat().st_mtime_ns
    unpack_shards(pattern, paths, 0)
    assert marker.stat().st_mtime_ns == before  # once
    path.write_bytes(shard_of(range(3, 8)))
    os.utime(path, (time.time() + 60,) * 2)
    unpack_shards(pattern, paths, 0)
    assert [*load_captions(paths.captions).values()] == [[caption(n)] for n in range(3, 8)]
    path.unlink()
    unpack_shards(pattern, paths, 0)  # what is unpacked needs it no more


def test_tars_of_which_no_photo_validates_are_named(tmp_path):
    paths = data_paths(commands.train(["--data_dir", str(tmp_path / "data")]))
    (tmp_path / "0.tar").write_bytes(pack([("a.jpg", b"")]))
    with pytest.raises(UserError, match="the shards .*/0.tar hold no photo"):  # not TRAIN_SHARDS
        unpack_shards(str(tmp_path / "0.tar"), paths, 0)


def test_how_a_tar_is_packed_amiss_is_said(tmp_path, capsys):
    dotted = [("a.b.jpg", b""), ("a.b.txt", b"words")]
    apart = [("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"words"), ("b.txt", b"words")]
    said = []
    for files in (dotted, apart, [("a.jpg", b"")]):
        (tmp_path / "0.tar").write_bytes(pack(files))
        found, passed, bad = read(tmp_path / "0.tar")
        with pytest.raises(UserError, match="hold no photo .* with a caption, which is a .txt"):
            shards.say_samples(len(found), passed, len(bad))
        said.append(capsys.readouterr().out)
    assert "1 with a dot in the photo's name" in said[0] and "--sort=name" not in said[0]
    assert "2 without a caption, 2 without a photo" in said[1] and "--sort=name" in said[1]
    assert "1 without a caption" in said[2] and "--sort=name" not in said[2]


def test_a_command_that_fails_is_named_with_its_code(monkeypatch):
    monkeypatch.setattr("tars.RETRY_PAUSE", 0)
    with pytest.raises(UserError, match=r"to its end \(exit ended with code 7\)"):
        list(read_shard("pipe:exit 7"))


def test_why_an_address_brings_nothing_is_said_in_words_and_without_its_login(server):
    port = server.server_address[1]
    server.files["0.tar"] = Remote(b"", statuses=[403] * ATTEMPTS)
    for address, why in {
        f"127.0.0.1:{port}/0.tar": "has no such file, or doesn't accept the login",
        f"127.0.0.1:{port}/none.tar": "has no such file",
        "127.0.0.1:1/0.tar": "can't be reached",
    }.items():
        with pytest.raises(UserError, match=f"{why}.*correct its name") as error:
            list(read_shard(f"http://me:c0ffee@{address}"))
        assert "c0ffee" not in str(error.value)


def test_without_the_library_the_message_says_what_to_install(tmp_path, encoder_dir, tars):
    flags = flags_of(tmp_path / "data", encoder_dir, tars[0], "--val_shards", tars[1])
    result = run_without("webdataset", "train", *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"pip install -r requirements-shards.txt", result.stderr)
    assert os.path.exists("requirements-shards.txt")


def test_keys_in_addresses_are_not_kept(tmp_path, encoder, server, monkeypatch):
    """Neither on record, nor in tables, which are found again when the key is another one."""
    monkeypatch.setenv("WDS_TOKEN", "c0ffee-c0ffee")
    found = []
    for key in ("${TOKEN}", "c0ffee", "c0ffee&sig=c0ffee"):
        flags = ["--train_shards", f"https://me:c0ffee@host/0.tar?token={key}", "--data_dir", "d"]
        settings = commands.train(flags)
        assert "c0ffee" not in str(on_record(settings))
        (url,) = expand_shards(settings.TRAIN_SHARDS)
        assert "c0ffee" in url and "c0ffee" not in shard_name(url)
        (url,) = expand_shards(server.url(f"0.tar?token={key}"))
        server.files[url.split("/")[-1]] = Remote(shard_of(range(3)))
        found.append(take_stock(encoder, [url], tmp_path / "f").shards[0].name)
    assert found[0] == found[1] and len(server.seen) == 2  # the third one's address is another
    written = b"".join(path.read_bytes() for path in (tmp_path / "f").rglob("*.json"))
    assert written and b"c0ffee" not in written
