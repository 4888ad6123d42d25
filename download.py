"""Resumable downloads: a file is whole, or goes on where it stopped, or is refused.

`huggingface_hub`'s own `http_get` was looked at: it does not notice a file that was changed
between two runs, a 206 that begins elsewhere, or a web page in place of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests
from tqdm import tqdm

from utils import UserError, require_room, size_text, write_error

ATTEMPTS = 5  # requests in a row that bring nothing new before the download is given up
RETRY_PAUSE = 1.0  # seconds before the second attempt; doubled each time
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of a body
UNPACKED = {"Accept-Encoding": "identity"}  # headers: the file as it is, whose bytes count
CHUNK = 64 * 2**10  # bytes; at most this much is lost when a connection breaks


def download(urls: Sequence[str], folder: Path, unpack_to: Path, unpacked: int = 0) -> list[Path]:
    """Download files into `folder`, going on where an earlier run stopped; return their paths.

    Says beforehand how much there is to download. The disks must have room for it, and for as
    much again in `unpack_to`, less the `unpacked` bytes that are there already.
    """
    targets = [folder / url.rsplit("/", 1)[1] for url in urls]
    heads = [
        {} if target.exists() else _head(url) for url, target in zip(urls, targets, strict=True)
    ]
    files = [*zip(urls, targets, heads, strict=True)]
    here = sum(_size(target) or _size(_partial(target, head)) for _, target, head in files)
    sizes = [_size(target) or _length(head) for _, target, head in files]
    total = sum(size or 0 for size in sizes)
    left = max(0, total - here)
    amount = f"{size_text(left)} of {size_text(total)}"
    if None in sizes:
        amount = "an amount that the server does not tell"
    print(f"{', '.join(target.name for target in targets)}: {amount} to download")
    print(f"  to {folder}, then to unpack to {unpack_to}", flush=True)
    require_room([(folder, left), (unpack_to, max(0, total - unpacked))])
    for url, target, head in files:
        _download_one(url, target, head)
    return targets


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _head(url: str) -> Mapping[str, str]:
    """What the server says of a file; if nothing, its answer to who wants the file says why."""
    how = {"headers": UNPACKED, "allow_redirects": True, "stream": True, "timeout": TIMEOUT}
    said: Mapping[str, str] = {}
    for ask in (requests.head, requests.get):  # some servers refuse the first, or say nothing then
        if not (_validator(said) or _length(said)):
            with contextlib.suppress(requests.RequestException), ask(url, **how) as response:
                said = response.headers if response.ok else {}
    return said


def _length(headers: Mapping[str, str]) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _validator(headers: Mapping[str, str]) -> str | None:
    """What is another once the file has changed."""
    etag = headers.get("ETag", "")
    # A weak ETag may stay while bytes change, and must not be sent in If-Range.
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def _partial(target: Path, head: Mapping[str, str]) -> Path:
    """Where a file is kept until it is whole, one of another version under another name."""
    version = hashlib.sha256(repr((_validator(head), _length(head))).encode()).hexdigest()[:6]
    return target.with_name(f"{target.name}.{version}.partial")


def _download_one(url: str, target: Path, head: Mapping[str, str]) -> None:
    partial = _partial(target, head)
    furthest, failures = _size(partial), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not target.exists():
            head = head or _head(url)  # which may have failed as well
            partial = _partial(target, head)
            try:
                if (reason := _fetch(url, partial, head)) == "":
                    with open(partial, "rb+") as file:
                        os.fsync(file.fileno())
                    os.replace(partial, target)
                    return
            except requests.RequestException as error:
                # Only the kind of error: its text may hold a signed address.
                reason = type(error).__name__
            reached = _size(partial)
            failures = 0 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures == ATTEMPTS:
                raise UserError(
                    f"{url} can't be downloaded ({reason}): run the same command again, it goes "
                    f"on after the {size_text(reached)} that are in {target.parent}"
                )
            time.sleep(RETRY_PAUSE * 2 ** max(0, failures - 1))
    except OSError as error:
        raise write_error(error, partial) from error


def _fetch(url: str, partial: Path, head: Mapping[str, str]) -> str:
    """Ask once for what `partial` lacks; return "" once it is whole, or else what was wrong."""
    have, total, validator = _size(partial), _length(head), _validator(head)
    if have and have == total:
        return ""
    goes_on = have and (validator or total)
    # A header that is None is not sent.
    rest = {"Range": f"bytes={have}-", "If-Range": validator} if goes_on else {}
    with requests.get(url, headers=UNPACKED | rest, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (206, 416):
            said = response.headers.get("Content-Range", "")
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", said)
            begin, whole = map(int, place.groups()) if place else (-1, None)
            versions = {validator, _validator(response.headers)} - {None}
            if begin != have or total not in (None, whole) or len(versions) > 1:
                partial.unlink(missing_ok=True)
                return "the file has changed in between"
            total = whole
        elif response.status_code == 429 or response.status_code >= 500:
            return f"status {response.status_code}"
        elif response.status_code == 200:
            total = _length(response.headers)
        else:
            raise UserError(f"{url} answers with status {response.status_code}")
        return _receive(response, url, partial, total)


def _receive(response: requests.Response, url: str, partial: Path, total: int | None) -> str:
    chunks = response.iter_content(CHUNK)
    first = next(chunks, b"")
    page = first[:512].lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if page or response.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(
            f"{url} answers with a web page in place of the file (a log-in page, or a proxy's?): "
            "open it in a browser"
        )
    pause = 0.1 if sys.stderr.isatty() else 30  # a log file wants few lines
    bar = tqdm(desc=Path(url).name, total=total, unit="B", unit_scale=True, mininterval=pause)
    with open(partial, "wb" if response.status_code == 200 else "ab") as file, bar:
        bar.update(file.tell())
        for chunk in itertools.chain([first], chunks):
            file.write(chunk)
            bar.update(len(chunk))
    size = partial.stat().st_size
    # Without a size, the end of the body is all there is to go by; the zip's own checks follow.
    return "" if total in (None, size) else f"ended after {size} of {total} bytes"
