"""Resumable downloads: a file is whole, or goes on where it stopped, or is refused.

`huggingface_hub`'s own `http_get` was looked at: it does not notice a file that was changed
between two runs, a 206 that begins elsewhere, or a web page in place of the file.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from utils import UserError, require_room, size_text, write_error, write_file

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
    here = [_size_here(target) for target in targets]
    sizes = [
        target.stat().st_size if target.exists() else _size_there(url)
        for url, target in zip(urls, targets, strict=True)
    ]
    total = sum(size or 0 for size in sizes)
    left = max(0, total - sum(here))
    amount = f"{size_text(left)} of {size_text(total)}"
    if None in sizes:
        amount = "an amount that the server does not tell"
    print(f"{', '.join(target.name for target in targets)}: {amount} to download")
    print(f"  to {folder}, then to unpack to {unpack_to}", flush=True)
    require_room([(folder, left), (unpack_to, max(0, total - unpacked))])
    for url, target in zip(urls, targets, strict=True):
        _download_one(url, target)
    return targets


def _size_here(target: Path) -> int:
    files = (target, target.with_name(f"{target.name}.partial"))
    return next((file.stat().st_size for file in files if file.exists()), 0)


def _size_there(url: str) -> int | None:
    try:
        head = requests.head(url, headers=UNPACKED, allow_redirects=True, timeout=TIMEOUT)
    except requests.RequestException:
        return None  # the request for the file itself will say what is wrong
    return _length(head) if head.ok else None


def _length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _download_one(url: str, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    furthest, failures = _size_here(target), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not target.exists():
            try:
                if (reason := _fetch(url, partial)) == "":
                    with open(partial, "rb+") as file:
                        os.fsync(file.fileno())
                    os.replace(partial, target)
                    _state_path(partial).unlink()
                    return
            except requests.RequestException as error:
                # Only the kind of error: its text may hold a signed address.
                reason = type(error).__name__
            reached = partial.stat().st_size if partial.exists() else 0
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


def _fetch(url: str, partial: Path) -> str:
    """Ask once for what `partial` lacks; return "" once it is whole, or else what was wrong.

    Beside it `.json` holds what the server said of the file: a validator, by which a changed
    file is noticed, and the size.
    """
    state = _read_state(partial)
    have = partial.stat().st_size if state and partial.exists() else 0
    if have and have == state["total"]:
        return ""
    headers = UNPACKED
    if have and (state["validator"] or state["total"]):
        # A header that is None is not sent.
        headers = UNPACKED | {"Range": f"bytes={have}-", "If-Range": state["validator"] or None}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (206, 416):
            state["total"] = _continues(response, have, state)
            if state["total"] is None:
                _state_path(partial).unlink(
                    missing_ok=True
                )  # without it the next request is for all of it
                return "the file has changed in between"
        elif response.status_code == 429 or response.status_code >= 500:
            return f"status {response.status_code}"
        elif response.status_code != 200:
            raise UserError(f"{url} answers with status {response.status_code}")
        return _receive(response, url, partial, state)


def _receive(response: requests.Response, url: str, partial: Path, state: dict[str, Any]) -> str:
    chunks = response.iter_content(CHUNK)
    first = next(chunks, b"")
    page = first[:512].lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if page or response.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(
            f"{url} answers with a web page in place of the file (a log-in page, or a proxy's?): "
            "open it in a browser"
        )
    if response.status_code == 200:
        state = {"validator": _validator(response), "total": _length(response)}
        # Emptied first: the new validator must never stand beside the old file's bytes.
        partial.write_bytes(b"")
        write_file(_state_path(partial), json.dumps(state))
    total = state["total"]
    pause = 0.1 if sys.stderr.isatty() else 30  # a log file wants few lines
    bar = tqdm(desc=partial.stem, total=total, unit="B", unit_scale=True, mininterval=pause)
    with open(partial, "ab") as file, bar:
        bar.update(file.tell())
        for chunk in itertools.chain([first], chunks):
            file.write(chunk)
            bar.update(len(chunk))
    size = partial.stat().st_size
    # Without a size, the end of the body is all there is to go by; the zip's own checks follow.
    return "" if total in (None, size) else f"ended after {size} of {total} bytes"


def _continues(response: requests.Response, have: int, state: dict[str, Any]) -> int | None:
    """The whole size, if this answer goes on with the file that the bytes here are the start of."""
    said = response.headers.get("Content-Range", "")
    place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", said)
    if not have or not place:
        return None
    goes_on, total = int(place[1]) == have, int(place[2])
    validator = _validator(response)
    same_file = validator is None or state["validator"] in (None, validator)
    return total if goes_on and same_file and state["total"] in (None, total) else None


def _validator(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag", "")
    # A weak ETag may stay while bytes change, and must not be sent in If-Range.
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _state_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_state(partial: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_path(partial).read_text(encoding="utf-8"))
        return {"validator": state["validator"], "total": state["total"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return {}
