"""prepare_dataset.py against real servers, real kills, damaged and hostile archives."""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import os
import random
import re
import resource
import signal
import stat
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import commands
import config
import download
import prepare_dataset
from archive import JoinedFiles
from captions_file import read_captions
from captions_search import find_tables
from dataset import load_captions, load_splits
from prepare_dataset import extract, prepare
from settings import Parser, load_settings
from tests.conftest import run
from tests.download_server import DownloadServer, Remote, serving
from tests.forked import Forked
from texts import NOTHING
from utils import UserError, atomic_write, size_text, sole_user

ROOT = Path(prepare_dataset.__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"
RNG = random.Random(0)
PHOTOS = {f"{number}.jpg": RNG.randbytes(6000 + number) for number in range(60)}
CAPTIONS = {name: [f"A photo of {name} .", "Another , with a comma ."] for name in PHOTOS}
TABLE = "image,caption\n" + "".join(
    f'{name},"{caption}"\n' for name, captions in CAPTIONS.items() for caption in captions
)


def make_zip(entries: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ZIP = make_zip({"captions.txt": TABLE, **{f"Images/{n}": b for n, b in PHOTOS.items()}})
THIRDS = [ZIP[: len(ZIP) // 3], ZIP[len(ZIP) // 3 : -5000], ZIP[-5000:]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRY_PAUSE", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[DownloadServer]:
    with serving() as server:
        server.files = {"flickr8k.zip": Remote(ZIP)}
        yield server


def settings_for(folder: Path, *flags: object) -> SimpleNamespace:
    argv = ["--dataset", "flickr8k", "--data_dir", folder, "--split", "ratio"]
    argv += ["--train_split_ratio", 0.7, *flags]
    parser = Parser("")
    commands.add_sources(parser)
    return load_settings(config, [str(text) for text in argv], parser)


def prepare_from(server: DownloadServer, folder: Path, *flags: object) -> None:
    names = [name for name in server.files if name != "caption_datasets.zip"]
    sources = {"flickr8k": [server.url(name) for name in names]}
    karpathy = server.url("caption_datasets.zip")
    with mock.patch.multiple(prepare_dataset, SOURCES=sources, KARPATHY_URL=karpathy):
        prepare(settings_for(folder, *flags))


def partial_in(folder: Path) -> Path:
    [partial] = (folder / "temp_download").glob("flickr8k.zip.*.partial")
    return partial


def assert_complete(folder: Path) -> None:
    assert {p.name: p.read_bytes() for p in (folder / "images").iterdir()} == PHOTOS
    assert load_captions(folder / "captions.json") == CAPTIONS
    splits = load_splits(folder / "splits.json")
    assert sorted(sum(splits.values(), [])) == sorted(PHOTOS)
    assert not (folder / "temp_download").exists()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}


# --- Captions tables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,caption\na.jpg,A dog .\na.jpg,A cat .\n", {"a.jpg": ["A dog .", "A cat ."]}),
        ("a.jpg,No header\nb.JPG,Two", {"a.jpg": ["No header"], "b.JPG": ["Two"]}),
        ("\ufeffimage,caption\r\n\r\na.jpg,A dog .\r\n\r\n", {"a.jpg": ["A dog ."]}),
        ("image,caption\na.jpg,A , b , c .", {"a.jpg": ["A , b , c ."]}),
        ('image,caption\na.jpg,"A , ""b"" , c ."', {"a.jpg": ['A , "b" , c .']}),
        ('"image","caption"\n"a.jpg","A dog ."', {"a.jpg": ["A dog ."]}),
        ('image,caption\na.jpg,A 12" board , "new"', {"a.jpg": ['A 12" board , "new"']}),
        ('image,caption\na.jpg,"Go" says the "boss"', {"a.jpg": ['"Go" says the "boss"']}),
        ("image_name,comment_number,comment\na.jpg,0,A , b", {"a.jpg": ["A , b"]}),
        ("image_name| comment_number| comment\na.jpg| 0| A | b, c", {"a.jpg": ["A | b, c"]}),
        ("a.jpg|0|A dog|\na.jpg|1|B", {"a.jpg": ["A dog|", "B"]}),
        ("a.jpg#0\tA , dog\na.jpg#1\tB", {"a.jpg": ["A , dog", "B"]}),
        ("a.jpg#0,A dog\na.jpg#1,B", {"a.jpg": ["A dog", "B"]}),
        ("image,caption\na.jpg,R&D &quot;A &amp; B&#39;s&quot;", {"a.jpg": ['R&D "A & B\'s"']}),
        ("image,caption\na.jpg,2 dogs", {"a.jpg": ["2 dogs"]}),
        ("Image Name,Caption\na.jpg,A dog\n,\n ,\n", {"a.jpg": ["A dog"]}),
        ("sep=;\nimage-name;caption;;\na.jpg;A dog;;\n;;;\n", {"a.jpg": ["A dog"]}),
        ("a.jpg#0 2 dogs , one red\na.jpg#1 B", {"a.jpg": ["2 dogs , one red", "B"]}),
        ("a.jpg#zhm#0\tEins\na.jpg#zhb#1\tZwei", {"a.jpg": ["Eins", "Zwei"]}),
        (
            "captioning,caption,id\nhttp://localhost:8080/data/local-files/?d=x/a.jpg,A dog,1",
            {"x/a.jpg": ["A dog"]},  # as Label Studio names it
        ),
        (
            "id,link,caption\n1,https://x.org/0.jpg,A dog\n2,https://x.org/1.jpg,Two",
            {"https://x.org/0.jpg": ["A dog"], "https://x.org/1.jpg": ["Two"]},  # ids count rows
        ),
        ('raw,filename\n"[""A \\ud83d\\ude00"", ""B""]",a.jpg', {"a.jpg": ["A \U0001f600", "B"]}),
        ('image,caption\na.jpg,"[\'A, b\', ""It\'s""]"', {"a.jpg": ["A, b", "It's"]}),
        (
            "image,caption\na.jpg,[sic] 'A'\nb.jpg,['A' 'B']",
            {"a.jpg": ["[sic] 'A'"], "b.jpg": ["A", "B"]},
        ),
        (
            "image_name| comment_number| comment\n2199200615.jpg| 3| A dog .\n"
            "2199200615.jpg| 4   A dog runs across the grass .\n",
            {"2199200615.jpg": ["A dog .", "A dog runs across the grass ."]},
        ),
    ],
)
def test_tables_in_the_wild(tmp_path: Path, text: str, expected: dict[str, list[str]]) -> None:
    (tmp_path / "captions.txt").write_bytes(text.encode())
    assert read_captions(tmp_path / "captions.txt").texts == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("image,caption\na.jpg,A\njust words\n", 3),
        ("image,caption\n\na.jpg,\n", 3),
        ("image,caption\na.jpg\n", 2),
        ('image,caption\na.jpg,""\n', 2),
        ('image,caption\na.jpg,"not closed\nb.jpg,B"\n', 2),
        ("file,text\na,A\n", 1),
        ("image_name|comment_number|comment\na.jpg|0|A\na.jpg| 4   A dog .\n", 3),
        ("image_name|comment_number|comment\na.jpg|zero|A\n", 2),
        ("image,caption\n../a.jpg,A\n", 2),
    ],
)
def test_unreadable_row_is_named(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "results.csv").write_bytes(text.encode())
    with pytest.raises(UserError, match=rf"results\.csv, line {line}: "):
        read_captions(tmp_path / "results.csv")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"image,caption\n", b"a.jpg,\xb9\xb7\xb9\xb7\n"])
def test_table_without_rows_or_not_utf8(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.txt"):
        read_captions(tmp_path / "captions.txt")


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))
ENTITY = re.compile(r"&#?\w+;")


def read(text: str) -> str:
    """What is meant by a text from the web: its whole HTML signs are read, and no others."""
    return ENTITY.sub(lambda found: html.unescape(found[0]), text).strip()


CAPTION_TEXT = ANY_TEXT.filter(
    lambda text: any(sign.isalnum() for sign in read(text)) and read(text) not in NOTHING
)
NAME = st.from_regex(r"[a-zA-Z0-9_]{1,12}\.(jpg|png|JPEG)", fullmatch=True)


def test_a_table_beside_the_photos_is_one(tmp_path):
    (tmp_path / "captions.csv").write_text("a.jpg,a dog\n")
    assert find_tables(tmp_path, tmp_path) == [tmp_path / "captions.csv"]


@settings(max_examples=200, deadline=None)
@example([("0.jpg", "0"), ("0.jpg", "R&notes &amp and &copy2")], ",", False, 0, False, "\n")
@example([("0.jpg", "0\0"), ("0.jpg", "0\ue000")], ",", False, 0, False, "\n")
@example([("0.jpg", "R&amp;B &#39;n&#39; &quot;soul&quot;")], ",", False, 0, False, "\n")
@given(
    rows=st.lists(st.tuples(NAME, CAPTION_TEXT), min_size=1),
    delimiter=st.sampled_from(",|\t"),
    numbered=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    bom=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_table_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    numbered: bool,
    quoting: int,
    bom: bool,
    newline: str,
) -> None:
    buffer, zero = io.StringIO(newline=""), "\ue000"  # Python 3.10's writer takes no zero
    writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=newline)
    header = ["image_name", "comment_number", "comment"] if numbered else ["image", "caption"]
    expected: dict[str, list[str]] = {}
    writer.writerow(header)
    for name, caption in rows:
        middle = [len(expected.get(name, []))] if numbered else []
        writer.writerow([name, *middle, caption.replace("\0", zero)])
        caption = caption.replace(zero, "\0")
        # A caption in a pair of quotes of its own is read without them, once.
        expected.setdefault(name, []).append(read(caption))
    path = tmp_path_factory.getbasetemp() / "round_trip.txt"
    text = buffer.getvalue().replace(zero, "\0")
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    assert read_captions(path).texts == expected


@pytest.mark.fault(count=200)
@settings(max_examples=200, deadline=None)
@given(
    st.binary()
    | st.text("ab.jpg,|\"\t\n\r0#'/ ").map(str.encode)
    | st.text("ab.jpg,|\"\t\n\r0#'/ ").map(lambda text: f"image,caption\na.jpg,{text}".encode())
)
@example(b'"\r"0')  # a number at the end of a column's name of two lines
def test_any_table_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        captions = read_captions(path).texts
    except UserError as error:
        assert str(path) in str(error)
    else:
        table = path.with_suffix(".json")
        table.write_text(json.dumps(captions))
        assert load_captions(table) == captions


# --- Download -------------------------------------------------------------------------------


def test_parts_are_downloaded_and_joined(server: DownloadServer, tmp_path: Path) -> None:
    server.files = {f"part{n}": Remote(third) for n, third in enumerate(THIRDS)}
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


def test_joined_files_read_as_one(tmp_path: Path) -> None:
    pieces = [b"abc", b"", b"defgh", b"i"]
    paths = [tmp_path / str(number) for number in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(piece)
    whole = b"".join(pieces)
    with JoinedFiles(paths) as raw, io.BufferedReader(raw, 2) as file:
        for start in range(len(whole) + 2):
            file.seek(start)
            assert file.read() == whole[start:]
        file.seek(-2, os.SEEK_END)
        assert file.read(1) == b"h" and file.tell() == 8


@pytest.mark.fault
@pytest.mark.parametrize("length", ["told", "chunked"])
@pytest.mark.parametrize(
    "validators",
    [
        {"etag": '"one"'},
        {"etag": None, "modified": "Mon, 05 Jan 2026 00:00:00 GMT"},
        {"etag": 'W/"weak"', "modified": "Mon, 05 Jan 2026 00:00:00 GMT"},
    ],
)
def test_cut_bodies_are_continued(
    server: DownloadServer, tmp_path: Path, length: str, validators: dict[str, str]
) -> None:
    server.files["flickr8k.zip"] = Remote(
        ZIP, length=length, cuts=[70_000, 0, 70_000, 70_000], **validators
    )
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)
    asked = server.ranges_asked("flickr8k.zip")
    starts = [int(text.strip("bytes=-")) for text in asked[1:]]
    assert asked[0] is None and starts == sorted(starts) and 0 < starts[0] < starts[-1]
    # A weak ETag is no ground for putting two halves together.
    strong = '"one"' if validators["etag"] == '"one"' else validators["modified"]
    assert set(server.conditions) == {strong}


@pytest.mark.fault
@pytest.mark.parametrize(
    "answers",
    [
        {"heads": "refused"},
        {"heads": "untold", "etag": None},
        {"heads": "refused", "statuses": [503] * 3},
    ],
)
def test_where_head_tells_nothing_a_cut_body_is_continued(
    server: DownloadServer, tmp_path: Path, answers: dict[str, object], capsys
) -> None:
    server.files["flickr8k.zip"] = Remote(ZIP, cuts=[10, 100_000, 100_000], **answers)
    prepare_from(server, tmp_path)
    assert "flickr8k.zip: " in capsys.readouterr().err  # the bar, without the version
    assert_complete(tmp_path)
    assert server.ranges_asked("flickr8k.zip")[-1] not in (None, "bytes=0-")


def test_without_validator_the_size_decides(server: DownloadServer, tmp_path: Path) -> None:
    server.files["flickr8k.zip"] = Remote(ZIP, etag=None, cuts=[100_000])
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)
    assert server.ranges_asked("flickr8k.zip")[1] is not None


@pytest.mark.fault
def test_without_length_a_short_body_is_refused_then_replaced(
    server: DownloadServer, tmp_path: Path
) -> None:
    server.files["flickr8k.zip"] = Remote(ZIP, length="untold", cuts=[100_000])
    with pytest.raises(UserError, match="not a whole zip file.*run the same command again"):
        prepare_from(server, tmp_path)
    assert not (tmp_path / "images").exists()
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


FAULTS = ["200 to a Range", "changed", "416", "changed, same size", "206 of another file", "503"]


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS)
def test_second_answer_is_odd(server: DownloadServer, tmp_path: Path, fault: str) -> None:
    other = make_zip({"captions.txt": TABLE, "Images/0.jpg": RNG.randbytes(len(ZIP))})
    if fault in ("changed, same size", "206 of another file"):
        other = RNG.randbytes(len(ZIP))
    server.files["flickr8k.zip"] = Remote(other, etag='"old"', cuts=[150_000, *[0] * 5])
    if fault in ("200 to a Range", "503"):
        server.files["flickr8k.zip"].body = ZIP
    with pytest.raises(UserError, match="run the same command again"):
        prepare_from(server, tmp_path)
    assert 0 < partial_in(tmp_path).stat().st_size <= 150_000
    now = server.files["flickr8k.zip"] = Remote(ZIP, etag='"new"')
    if fault in ("200 to a Range", "503"):
        now.etag, now.ranges = '"old"', fault == "503"
        now.statuses = [503, 429] if fault == "503" else []
    now.always_416, now.heeds_if_range = fault == "416", fault != "206 of another file"
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


@pytest.mark.fault
def test_a_part_of_another_version_is_not_gone_on_with(
    server: DownloadServer, tmp_path: Path
) -> None:
    folder = tmp_path / "temp_download"
    folder.mkdir()
    for name in ("flickr8k.zip.partial", "flickr8k.zip.000000.partial"):
        (folder / name).write_bytes(b"x" * 1000)
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)
    assert server.ranges_asked("flickr8k.zip") == [None]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("remote", "message"),
    [
        (Remote(b"<p>Log in", content_type="text/html", ranges=False), "web page"),
        (Remote(b"\n <HTML><p>Log in", ranges=False), "web page"),
        (Remote(ZIP, statuses=[403]), "status 403"),
        (Remote(ZIP, statuses=[500] * 5), "status 500"),
        (Remote(ZIP, claims=10**16), "disk.*free.*are needed"),
        (Remote(b""), "not a whole zip"),
    ],
)
def test_refusals_say_why_and_lose_nothing(
    server: DownloadServer, tmp_path: Path, remote: Remote, message: str
) -> None:
    server.files["flickr8k.zip"] = Remote(ZIP, cuts=[100_000, *[0] * 5])
    with pytest.raises(UserError):
        prepare_from(server, tmp_path)
    before = (partial := partial_in(tmp_path)).read_bytes()
    remote.etag = '"other"'
    server.files["flickr8k.zip"] = remote
    with pytest.raises(UserError, match=message):
        prepare_from(server, tmp_path)
    assert not (tmp_path / "captions.json").exists()
    if "not a whole" not in message:
        assert partial.read_bytes() == before
    server.files["flickr8k.zip"] = Remote(ZIP)
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


@pytest.mark.fault
def test_nobody_answers(tmp_path: Path) -> None:
    with serving() as server:
        server.files = {"flickr8k.zip": Remote(ZIP)}
    with pytest.raises(UserError, match=r"ConnectionError\): run the same command again"):
        prepare_from(server, tmp_path)


@pytest.mark.fault
def test_swapped_parts_are_refused_and_fetched_anew(server: DownloadServer, tmp_path: Path) -> None:
    server.files = {f"part{n}": Remote(THIRDS[(1, 0, 2)[n]]) for n in range(3)}
    with pytest.raises(UserError, match="out of order.*removed"):
        prepare_from(server, tmp_path)
    assert not (tmp_path / "captions.json").exists()
    server.files = {f"part{n}": Remote(third) for n, third in enumerate(THIRDS)}
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


def test_amount_and_place_are_said_first(
    server: DownloadServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_from(server, tmp_path)
    said = capsys.readouterr().out
    assert size_text(len(ZIP)) in said and str(tmp_path / "temp_download") in said


# --- Archives -------------------------------------------------------------------------------


def write_archive(folder: Path, content: bytes) -> Path:
    path = folder / "given.zip"
    path.write_bytes(content)
    return path


def test_given_archive_is_used_and_left_alone(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "data" / "temp_download"):
        folder.mkdir(parents=True, exist_ok=True)
        archive = write_archive(folder, ZIP)
        before = snapshot(folder)
        prepare(settings_for(tmp_path / "data", "--archive", archive))
        assert archive.read_bytes() == ZIP
        assert before.items() <= snapshot(folder).items()
        (tmp_path / "data" / "images" / "3.jpg").unlink()


def test_photos_and_captions_in_a_zip_each(tmp_path: Path) -> None:
    """As the makers of Flickr8k gave them out: not parts of one zip."""
    photos = {f"Flicker8k_Dataset/{name}": photo for name, photo in PHOTOS.items()}
    tokens = "".join(f"{name}#0\tA dog runs .\n" for name in PHOTOS)
    paths = [tmp_path / "Flickr8k_Dataset.zip", tmp_path / "Flickr8k_text.zip"]
    paths[0].write_bytes(make_zip(photos))
    paths[1].write_bytes(make_zip({"Flickr8k.token.txt": tokens}))
    with pytest.raises(UserError, match="a zip each, not parts of one: unpack"):
        prepare(settings_for(tmp_path / "data", "--archive", *paths))
    with pytest.raises(UserError, match="holds no captions"):
        prepare(settings_for(tmp_path / "data", "--archive", paths[0]))
    with zipfile.ZipFile(paths[1]) as archive:
        archive.extractall(tmp_path / "data" / "Flickr8k_text")
    prepare(settings_for(tmp_path / "data", "--archive", paths[0]))
    captions = json.loads((tmp_path / "data" / "captions.json").read_text())
    assert captions == {name: ["A dog runs ."] for name in PHOTOS}


def test_given_parts(tmp_path: Path) -> None:
    paths = [tmp_path / f"part{n}" for n in range(3)]
    for path, third in zip(paths, THIRDS, strict=True):
        path.write_bytes(third)
    with pytest.raises(UserError, match="out of order"):
        prepare(settings_for(tmp_path / "data", "--archive", paths[1], paths[0], paths[2]))
    prepare(settings_for(tmp_path / "data", "--archive", *paths))
    assert_complete(tmp_path / "data")
    assert [path.read_bytes() for path in paths] == THIRDS


def link_entry() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("Images/link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.fault
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("../evil.jpg", b"x")], "leads out"),
        ([("Images/../../evil.txt", b"x")], "leads out"),
        ([("..\\evil.jpg", b"x")], "leads out"),
        ([("/tmp/evil.jpg", b"x")], "leads out"),
        ([("C:\\evil.jpg", b"x")], "leads out"),
        ([(link_entry(), b"/etc/passwd")], "is a link"),
        ([("Images/a.jpg", b"x"), ("./Images/a.jpg", b"y")], "twice"),
        ([("Images/a.jpg", b"x"), ("Images/A.JPG", b"y")], "twice"),
        ([("Images/bomb.jpg", bytes(300 * 2**20))], "no collection of photos"),
        ([(f"Images/{n}.jpg", bytes(2**20)) for n in range(4)], "no collection of photos"),
        ([("Images/" + "n" * 300 + ".jpg", b"x")], "too long a name"),
    ],
)
def test_hostile_archive_is_refused_untouched(
    tmp_path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], message: str
) -> None:
    archive = tmp_path / "given.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("captions.txt", TABLE)
        for name, content in entries:
            file.writestr(name, content, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=message):
        prepare(settings_for(tmp_path / "data", "--archive", archive))
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"given.zip", ".prepare.lock"}


def test_only_photos_and_the_table_are_taken(tmp_path: Path) -> None:
    extra = {
        "__MACOSX/Images/._0.jpg": b"x",
        "Images/.hidden.jpg": b"x",
        "Images/.thumbnails/0.jpg": b"x",
        ".trash/captions.txt": "x",
        "readme.txt": b"x",
        "run.py": b"x",
        "Deep/er/CAPTIONS.TXT": TABLE,
    }
    archive = make_zip({**extra, **{f"Images/{n}": b for n, b in PHOTOS.items()}})
    prepare(settings_for(tmp_path / "data", "--archive", write_archive(tmp_path, archive)))
    assert_complete(tmp_path / "data")
    names = {path.name for path in (tmp_path / "data").iterdir()} - {".prepare.lock"}
    assert names == {"images", "captions.txt", "captions.json", "splits.json", "prepared.json"}


def test_names_in_a_zip_that_a_mac_packed_are_read_as_unicode(tmp_path: Path) -> None:
    """They are, though its entries don't say so, and Python takes them for those of DOS."""
    photos = {f"Größe {n}": photo for n, photo in PHOTOS.items()}
    table = TABLE.replace("\n", "\nGröße ").removesuffix("Größe ")
    archive = bytearray(make_zip({"captions.csv": table, **photos}, zipfile.ZIP_STORED))
    for signature, offset in ((b"PK\x01\x02", 9), (b"PK\x03\x04", 7)):
        for found in re.finditer(re.escape(signature), bytes(archive)):
            archive[found.start() + offset] &= ~8
    (tmp_path / "mac.zip").write_bytes(archive)
    prepare(settings_for(tmp_path / "d", "--archive", tmp_path / "mac.zip"))
    assert {path.name for path in (tmp_path / "d" / "images").iterdir()} == {*photos}
    assert {*load_captions(tmp_path / "d" / "captions.json")} == {*photos}


def test_another_archive_than_a_zip_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "photos.tar.gz").write_bytes(b"\x1f\x8b" + bytes(99))
    with pytest.raises(UserError, match="is not a whole zip file .*: unpack others into DATA_DIR"):
        prepare(settings_for(tmp_path / "d", "--archive", tmp_path / "photos.tar.gz"))


@pytest.mark.fault
def test_declared_size_is_checked_against_the_content(tmp_path: Path) -> None:
    name, content = "liar.jpg", RNG.randbytes(1000)
    archive = bytearray(make_zip({"captions.txt": "liar.jpg,A", name: content}, zipfile.ZIP_STORED))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        place = archive.rindex(signature) + offset
        assert archive[place : place + 4] == (1000).to_bytes(4, "little")
        archive[place : place + 4] = (10).to_bytes(4, "little")
    with pytest.raises(UserError, match="is not a whole zip file"):
        prepare(settings_for(tmp_path / "d", "--archive", write_archive(tmp_path, bytes(archive))))
    assert not (tmp_path / "d" / "images" / name).exists()


@pytest.mark.parametrize("entries", [{"captions.txt": TABLE}, {"Images/0.jpg": PHOTOS["0.jpg"]}])
def test_archive_without_photos_or_captions(tmp_path: Path, entries: dict[str, bytes]) -> None:
    archive = write_archive(tmp_path, make_zip(entries))
    with pytest.raises(UserError, match="holds no"):
        prepare(settings_for(tmp_path / "data", "--archive", archive))
    with pytest.raises(UserError, match="no such file"):
        prepare(settings_for(tmp_path / "data", "--archive", tmp_path / "none.zip"))


SMALL = make_zip({"captions.txt": "0.jpg,A", "Images/0.jpg": PHOTOS["0.jpg"][:300]})


@pytest.mark.fault(count=150)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    end=st.integers(1, len(SMALL)) | st.just(len(SMALL)),
)
def test_altered_archive_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], end: int
) -> None:
    base = tmp_path_factory.mktemp("altered")
    content = bytearray(SMALL)
    for place, value in edits:
        content[place] = value
    archive = write_archive(base, bytes(content[:end]))
    paths = prepare_dataset.data_paths(SimpleNamespace(DATA_DIR=base / "data"))
    try:
        extract([archive], paths, "flickr8k", downloaded=False)
        photos = json.loads((base / "data" / "prepared.json").read_text())["photos"]
    except UserError:
        photos = {}
    written = {path.parent for path in base.rglob("*") if path.is_file()}
    assert written <= {base, base / "data", base / "data" / "images"}
    for name, size in photos.items():
        assert (base / "data" / "images" / name).read_bytes() == PHOTOS["0.jpg"][:size]


# --- Complete, partial, one's own -----------------------------------------------------------


def test_complete_data_set_is_left_alone(server: DownloadServer, tmp_path: Path) -> None:
    prepare_from(server, tmp_path)
    edited = {name: ["My own words ."] for name in list(PHOTOS)[:40]}
    (tmp_path / "captions.json").write_text(json.dumps(edited))
    (tmp_path / "images" / "mine.jpg").write_bytes(b"an extra photo")
    prepare_from(server, tmp_path)
    before, requests = snapshot(tmp_path), len(server.seen)
    prepare_from(server, tmp_path)
    assert snapshot(tmp_path) == before and len(server.seen) == requests == 2
    assert load_captions(tmp_path / "captions.json") == edited
    (tmp_path / "captions.json").unlink()
    prepare_from(server, tmp_path)
    assert load_captions(tmp_path / "captions.json") == CAPTIONS and len(server.seen) == requests


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["missing", "short", "empty", "folder"])
def test_partial_data_set_is_mended(server: DownloadServer, tmp_path: Path, damage: str) -> None:
    prepare_from(server, tmp_path)
    photo = tmp_path / "images" / "7.jpg"
    untouched = snapshot(tmp_path / "images")
    del untouched[str(photo)]
    if damage == "missing":
        photo.unlink()
    elif damage == "folder":
        (tmp_path / "images").rename(tmp_path / "elsewhere")
    else:
        photo.write_bytes(PHOTOS["7.jpg"][:100] if damage == "short" else b"")
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)
    if damage != "folder":
        assert untouched.items() <= snapshot(tmp_path / "images").items()


def test_another_data_set_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, ZIP)
    prepare(settings_for(tmp_path / "data", "--archive", archive))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="holds flickr8k, not flickr30k.*--data_dir"):
        prepare(settings_for(tmp_path / "data", "--dataset", "flickr30k", "--archive", archive))
    assert snapshot(tmp_path) == before


def test_own_photos_are_never_overwritten(server: DownloadServer, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in PHOTOS:
        (images / name).write_bytes(b"mine")
    before = snapshot(images)
    with pytest.raises(UserError, match=r"captions\.json is missing"):
        prepare_from(server, tmp_path)
    (tmp_path / "captions.csv").write_text(TABLE)
    prepare_from(server, tmp_path)
    assert snapshot(images) == before and server.seen == []


def test_custom(tmp_path: Path) -> None:
    def custom(*flags: str) -> None:
        prepare(settings_for(tmp_path, "--dataset", "custom", *flags))

    with pytest.raises(UserError, match="put your photos there"):
        custom()
    (tmp_path / "images").mkdir()
    for name, content in PHOTOS.items():
        (tmp_path / "images" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.json is missing"):
        custom()
    (tmp_path / "results.csv").write_text(TABLE)
    custom()
    assert_complete(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS | {"gone.jpg": ["A"]}))
    custom("--max_bad_images", "1")
    with pytest.raises(UserError, match="gone.jpg"):
        custom("--max_bad_images", "0")
    with pytest.raises(UserError, match="--split ratio.*--karpathy_file"):
        custom("--split", "karpathy")


@pytest.mark.parametrize("flag", ["--dataset", "--split"])
def test_unknown_choice(tmp_path: Path, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag[2:].upper()} is 'coco'"):
        prepare(settings_for(tmp_path, flag, "coco"))


# --- Splits ---------------------------------------------------------------------------------


def karpathy_json() -> str:
    names = list(PHOTOS)
    split = dict.fromkeys(names, "train") | dict.fromkeys(names[:5], "restval")
    split |= dict.fromkeys(names[40:50], "val") | dict.fromkeys(names[50:], "test")
    return json.dumps({"images": [{"filename": n, "split": s} for n, s in split.items()]})


def test_karpathy_split_is_downloaded_once(server: DownloadServer, tmp_path: Path) -> None:
    names = list(PHOTOS)
    files = {f"dataset_flickr{k}.json": karpathy_json() for k in ("8k", "30k")}
    with pytest.raises(UserError, match=r"status 404.*--split ratio.*--karpathy_file"):
        prepare_from(server, tmp_path, "--split", "karpathy")
    server.files["caption_datasets.zip"] = Remote(make_zip(files))
    prepare_from(server, tmp_path, "--split", "karpathy")
    assert_complete(tmp_path)
    requests = len(server.seen)
    assert len(server.ranges_asked("flickr8k.zip")) == 1
    prepare_from(server, tmp_path, "--split", "karpathy")
    assert len(server.seen) == requests
    table = json.loads((tmp_path / "splits.json").read_text())
    assert (table["method"], table["source"]) == ("karpathy", "dataset_flickr8k.json")
    assert table["val"] == names[40:50] and table["test"] == names[50:]
    assert sorted(table["train"]) == sorted(names[:40])
    prepare_from(server, tmp_path, "--split", "ratio")
    assert json.loads((tmp_path / "splits.json").read_text())["method"] == "ratio"


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"no zip", make_zip({"other.json": "{}"})])
def test_unusable_karpathy_zip(server: DownloadServer, tmp_path: Path, content: bytes) -> None:
    server.files["caption_datasets.zip"] = Remote(content)
    with pytest.raises(UserError, match="--split ratio"):
        prepare_from(server, tmp_path, "--split", "karpathy")
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


def test_karpathy_file_given(server: DownloadServer, tmp_path: Path) -> None:
    flags = ("--split", "karpathy", "--karpathy_file", tmp_path / "my.json")
    with pytest.raises(UserError, match=r"my\.json is not there.*--split ratio"):
        prepare_from(server, tmp_path / "data", *flags)
    (tmp_path / "my.json").write_text(karpathy_json())
    prepare_from(server, tmp_path / "data", *flags)
    assert load_splits(tmp_path / "data" / "splits.json")["val"] == list(PHOTOS)[40:50]


def test_karpathy_file_beside_the_photos(server: DownloadServer, tmp_path: Path) -> None:
    (tmp_path / "dataset_flickr8k_trainval.json").write_text(karpathy_json())
    prepare_from(server, tmp_path, "--split", "karpathy")
    assert load_splits(tmp_path / "splits.json")["val"] == list(PHOTOS)[40:50]
    assert not any("caption_datasets" in str(request) for request in server.seen)


# --- Killed, and out of room ----------------------------------------------------------------

PROGRAM = """
import json, sys, types
import prepare_dataset
from utils import run_script
values, prepare_dataset.SOURCES = json.loads(sys.argv[1])
run_script(lambda: prepare_dataset.prepare(types.SimpleNamespace(**values)) and 0)
"""


def start(settings: SimpleNamespace, *urls: str, **options: Any) -> Forked:
    """The preparation in a process of its own, with `urls` as where Flickr8k is to be had."""
    return Forked("-c", PROGRAM, json.dumps([vars(settings), {"flickr8k": urls}]), **options)


def kill_when(process: Forked, reached: Iterator[bool]) -> None:
    with process:
        while not next(reached):
            assert process.returncode is None, process.communicate()
            time.sleep(0.0005)
    assert process.returncode == -signal.SIGKILL


def test_a_note_of_what_is_there_that_can_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    """As another user's: who deletes it has all downloaded and unpacked again."""
    paths = SimpleNamespace(data_dir=tmp_path)
    prepare_dataset.write_marker(paths, "flickr8k", {})

    def refused(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, refused)
    with pytest.raises(PermissionError):
        prepare_dataset.read_marker(paths)
    monkeypatch.undo()
    (tmp_path / "prepared.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged: delete it"):
        prepare_dataset.read_marker(paths)


@pytest.mark.fault(count=3)
def test_killed_in_every_phase(server: DownloadServer, tmp_path: Path) -> None:
    photos = {f"{n}.jpg": RNG.randbytes(400) for n in range(2000)}
    table = "".join(f"{name},A photo\n" for name in photos)
    content = make_zip({"captions.txt": table, **photos}, zipfile.ZIP_STORED)
    remote = server.files["flickr8k.zip"] = Remote(content, pause=0.005)
    folder, images = tmp_path / "temp_download", tmp_path / "images"

    def downloaded(size: int) -> Iterator[bool]:
        while True:
            yield any(partial.stat().st_size > size for partial in folder.glob("*.partial"))

    def unpacked(count: int) -> Iterator[bool]:
        while True:
            yield images.exists() and len(os.listdir(images)) > count

    program = settings_for(tmp_path), server.url("flickr8k.zip")
    kill_when(start(*program), downloaded(len(content) // 2))
    assert partial_in(tmp_path).exists()
    remote.pause = 0
    for count in (1, 1000):
        kill_when(start(*program), unpacked(count))
        assert not (tmp_path / "captions.json").exists()
        assert json.loads((tmp_path / "prepared.json").read_text())["photos"] == {}
        there = {path.name: path for path in images.glob("*.jpg")}
        assert 0 < len(there) < len(photos)
        assert all(path.read_bytes() == photos[name] for name, path in there.items())
    before = snapshot(images)
    prepare_from(server, tmp_path)
    after = {path.name: path.read_bytes() for path in images.iterdir()}
    assert after == photos
    # What was whole already has not been written again.
    before = {name: of for name, of in before.items() if not name.endswith(".tmp")}
    assert before.items() <= snapshot(images).items()
    asked = server.ranges_asked("flickr8k.zip")
    assert len(asked) == 2 and int(asked[1].strip("bytes=-")) > len(content) // 2
    assert not (tmp_path / "temp_download").exists()


def test_lists_that_stay_in_an_archive_are_named(tmp_path: Path, capsys) -> None:
    others = {"questions.json": "{}", "x/captions_de.csv": TABLE, "__MACOSX/._captions.csv": "x"}
    photos = {f"Images/{name}": content for name, content in PHOTOS.items()}
    archive = write_archive(tmp_path, make_zip({"captions.txt": TABLE, **others, **photos}))
    prepare(settings_for(tmp_path / "data", "--archive", archive))
    said = f"left in {archive}, whose table counts: questions.json, x/captions_de.csv\n"
    assert said in capsys.readouterr().out


@pytest.mark.fault(count=3)
@pytest.mark.parametrize("pause", [0, 0.05, 0.1])
def test_two_at_once_make_one_data_set(tmp_path: Path, pause: float) -> None:
    photos = {f"{n}.jpg": RNG.randbytes(3000 + n) for n in range(600)}
    table = "".join(f"{name},A photo\n" for name in photos)
    archive = write_archive(tmp_path, make_zip({"captions.txt": table, **photos}))
    processes = []
    for _ in range(3):
        processes.append(start(settings_for(tmp_path / "data", "--archive", archive)))
        time.sleep(pause)
    for process in processes:
        with process:
            said = process.communicate(120)
            assert process.returncode == 0, said
    there = {path.name: path.read_bytes() for path in (tmp_path / "data" / "images").iterdir()}
    assert there == photos
    assert not list(tmp_path.rglob("*.tmp"))


def test_who_comes_second_waits_and_finds_all_done(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, ZIP)
    with sole_user(tmp_path / "data"), prepare_dataset.sole_preparer(tmp_path / "data"):
        second = start(settings_for(tmp_path / "data", "--archive", archive))
        assert "waiting for another process to prepare" in second.stdout.readline()
        assert not (tmp_path / "data" / "images").exists()
        time.sleep(0.5)
        assert second.returncode is None and not (tmp_path / "data" / "images").exists()
    # The lock of OUTPUT_DIR, which training holds, is another: preparation goes on beside it.
    with sole_user(tmp_path / "data"), second:
        second.communicate(60)
        assert second.returncode == 0
    assert_complete(tmp_path / "data")


@pytest.mark.parametrize("keep", [sole_user, prepare_dataset.sole_preparer])
def test_a_dead_writers_file_is_removed_and_a_living_ones_is_not(tmp_path: Path, keep) -> None:
    (tmp_path / ".left.json.x.tmp").touch()
    with atomic_write(tmp_path / "captions.json") as temporary:
        temporary.write_text("{}")
        with keep(tmp_path):
            assert [path.name for path in tmp_path.glob(".*.tmp")] == [temporary.name]
    assert (tmp_path / "captions.json").read_text() == "{}"


def test_an_archive_with_captions_json_and_odd_names(tmp_path: Path) -> None:
    names = ["12:30.jpg", "a.jpg"]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    texts = [{"image_id": n, "caption": name} for n, name in enumerate(names)]
    table = json.dumps({"images": images, "annotations": texts})
    photos = {f"Images/{n}": b for n, b in zip(names, PHOTOS.values(), strict=False)}
    archive = write_archive(tmp_path, make_zip({"set/captions.json": table, **photos}))
    for _ in range(2):
        paths = prepare(settings_for(tmp_path / "data", "--archive", archive))
        assert load_captions(paths.captions) == {name: [name] for name in names}
    assert (tmp_path / "data" / "captions.json").read_text() == table
    # Some disks take no such name: what can't be written is named.
    taken = tmp_path / "other" / "images" / "12:30.jpg"
    taken.mkdir(parents=True)
    with pytest.raises(UserError, match=f"{taken} can't be written"):
        prepare(settings_for(tmp_path / "other", "--archive", archive))


@pytest.mark.parametrize(
    ("photos", "names"),
    [
        ({"cats/1.jpg": b"a cat", "dogs/1.jpg": b"a dog"}, ["cats/1.jpg", "dogs/1.jpg"]),
        ({"train/1.jpg": b"a cat", "val/2.jpg": b"a dog"}, ["1.jpg", "2.jpg"]),
    ],
)
def test_folders_of_an_archive_stay(tmp_path: Path, photos: dict[str, bytes], names: list[str]):
    table = "".join(f"{name},A photo\n" for name in names)
    archive = make_zip({"captions.csv": table, **{f"set/{n}": b for n, b in photos.items()}})
    archive = write_archive(tmp_path, archive)
    for _ in range(2):
        paths = prepare(settings_for(tmp_path / "data", "--archive", archive))
        assert {name: (paths.images / name).read_bytes() for name in photos} == photos
        assert load_captions(paths.captions).keys() == photos.keys()


KARPATHY = [{"filename": n, "split": "train", "sentences": [{"raw": "A photo"}]} for n in "ab"]


@pytest.mark.parametrize(
    "texts",
    [
        {"train/0.txt": "A photo", "train/1.jpg.txt": "A photo", "__MACOSX/set/train/._0.txt": "x"},
        {"labels/0.txt": "A photo", "labels/1.txt": "A photo"},
        {"labels.csv": "image,caption\n0.jpg,A photo\n1.jpg,A photo\n", "readme.txt": "x"},
        {
            "train/metadata.csv": "file_name,text\n0.jpg,A photo\n1.jpg,A photo\n",
            "val/metadata.csv": "",
        },
        {
            "dataset_x.json": json.dumps(
                {"images": [i | {"filename": f"{n}.jpg"} for n, i in enumerate(KARPATHY)]}
            )
        },
    ],
)
def test_an_archive_keeps_its_folders_where_no_table_of_a_usual_name_is_in_it(
    tmp_path: Path, texts: dict[str, str]
) -> None:
    texts = {
        n if n[0] == "_" else f"set/{n}": t or "file_name,text\n2.jpg,A photo\n"
        for n, t in texts.items()
    }
    photos = {f"set/{'val' if n == 2 else 'train'}/{n}.jpg": PHOTOS[f"{n}.jpg"] for n in range(3)}
    archive = write_archive(tmp_path, make_zip(texts | photos))
    flags = ("--archive", archive, "--max_bad_images", 3)
    for _ in range(2):
        found = load_captions(prepare(settings_for(tmp_path / "data", *flags)).captions)
        assert found["train/0.jpg"] == found["train/1.jpg"] == ["A photo"]
        names = {str(n.relative_to(tmp_path / "data/images")) for n in tmp_path.rglob("*.jpg")}
        assert names == {"train/0.jpg", "train/1.jpg", "val/2.jpg"}
        (tmp_path / "data/images/train/0.jpg").unlink()  # and is restored where it was
    marked = json.loads((tmp_path / "data/prepared.json").read_text())["photos"]
    assert set(marked) == names  # what people write into texts is theirs


def test_an_archive_with_backslashes_as_windows_makes_them(tmp_path: Path) -> None:
    texts = {f"set\\{Path(name).stem}.txt": "A photo" for name in PHOTOS}
    photos = {f"set\\{name}": photo for name, photo in PHOTOS.items()}
    archive = write_archive(tmp_path, make_zip(texts | photos))
    found = load_captions(prepare(settings_for(tmp_path / "data", "--archive", archive)).captions)
    assert found == dict.fromkeys(PHOTOS, ["A photo"])


@pytest.mark.fault
@pytest.mark.parametrize("limit", [100_000, 6030])
def test_no_room_to_write(server: DownloadServer, tmp_path: Path, limit: int) -> None:
    # The first limit stops the download, the second (the zip being there) the unpacking.
    if limit < 100_000:
        (tmp_path / "temp_download").mkdir()
        (tmp_path / "temp_download" / "flickr8k.zip").write_bytes(ZIP)
    limits = {resource.RLIMIT_FSIZE: limit}
    with start(settings_for(tmp_path), server.url("flickr8k.zip"), limits=limits) as process:
        _, error = process.communicate(60)
        assert process.returncode == 1 and "no room left to write" in error
    assert str(tmp_path) in error and "Traceback" not in error
    prepare_from(server, tmp_path)
    assert_complete(tmp_path)


def test_command_line(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, ZIP)
    command = [ROOT / "prepare_dataset.py", "--dataset", "flickr8k", "--data_dir", "my data"]
    command += ["--split", "ratio", "--train_split_ratio", "0.7"]
    told = run(*command, "--archive", archive.name, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert_complete(tmp_path / "my data")
    following = f"{ROOT}/train.py --dataset flickr8k --data_dir 'my data' --split ratio"
    assert following in told.stdout
    assert f"photos    {len(PHOTOS)}" in told.stdout and "--follow_links" not in told.stdout
    told = run(*command, "--follow_links", cwd=tmp_path)
    assert told.stdout.endswith("--train_split_ratio 0.7 --follow_links\n"), told.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real Flickr8k photos are not here")
def test_real_flickr8k(tmp_path: Path) -> None:
    archive = SHARED / "flickr8k_trainval.zip"
    split = SHARED / "dataset_flickr8k_trainval.json"
    flags = ("--split", "karpathy", "--karpathy_file", split)
    paths = prepare(settings_for(tmp_path, *flags, "--archive", archive))
    splits = load_splits(paths.splits)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [6000, 1000, 0]
    assert sum(map(len, load_captions(paths.captions).values())) == 35_000
    digest = hashlib.sha256((paths.images / splits["val"][0]).read_bytes()).hexdigest()
    with zipfile.ZipFile(archive) as file:
        original = file.read(f"Images/{splits['val'][0]}")
    assert digest == hashlib.sha256(original).hexdigest()
    before = snapshot(tmp_path)
    prepare(settings_for(tmp_path, *flags))
    assert snapshot(tmp_path) == before
