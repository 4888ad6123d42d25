"""A local web server for download tests, whose answers can be spoilt in the ways of real ones."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Remote:
    """A file on the server, and what goes wrong when it is asked for."""

    body: bytes
    etag: str | None = '"one"'
    modified: str | None = None
    length: str = "told"  # or "chunked", or "untold": the connection's end is the body's end
    ranges: bool = True  # False: every request gets the whole file
    always_416: bool = False  # to a Range request
    heeds_if_range: bool = True  # False: goes on with the new file where the old one broke off
    content_type: str = "application/octet-stream"
    heads: str = "told"  # or "refused", or "untold": HEAD says nothing of the size
    claims: int | None = None  # size in the answer to HEAD
    cuts: list[int] = field(default_factory=list)  # bytes after which one answer each breaks off
    statuses: list[int] = field(default_factory=list)  # statuses of one answer each
    pause: float = 0.0  # seconds between two pieces of the body


class DownloadServer(ThreadingHTTPServer):
    """Serves `files`; `seen` lists the requests as (method, name, Range or None)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Remote] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.conditions: list[str | None] = []  # If-Range of the Range requests

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def ranges_asked(self, name: str) -> list[str | None]:
        return [asked for method, file, asked in self.seen if (method, file) == ("GET", name)]


@contextlib.contextmanager
def serving() -> Iterator[DownloadServer]:
    """Run a server on a free port until the block ends."""
    with DownloadServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DownloadServer

    def do_HEAD(self) -> None:
        remote = self._find()
        if remote and remote.heads == "refused":
            self._head(405, remote, {})
        elif remote:
            size = len(remote.body) if remote.claims is None else remote.claims
            told = remote.length == remote.heads == "told"
            self._head(200, remote, {"Content-Length": size} if told else {})

    def do_GET(self) -> None:
        remote = self._find()
        if remote is None:
            return
        if remote.statuses:
            self._head(remote.statuses.pop(0), remote, {"Content-Length": 0})
            return
        status, begin, headers = self._place(remote)
        body = remote.body[begin:] if status != 416 else b""
        cut = remote.cuts.pop(0) if remote.cuts else None
        chunked = remote.length == "chunked"
        if remote.length == "told":
            headers["Content-Length"] = len(body)
        elif chunked:
            headers["Transfer-Encoding"] = "chunked"
        self._head(status, remote, headers)
        for piece in _pieces(body[:cut], 16384):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            time.sleep(remote.pause)
        if chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")

    def _place(self, remote: Remote) -> tuple[int, int, dict[str, object]]:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        size = len(remote.body)
        if not asked or not remote.ranges:
            return 200, 0, {}
        if remote.always_416 or int(asked[1]) >= size:
            return 416, 0, {"Content-Range": f"bytes */{size}"}
        condition = self.headers.get("If-Range")
        self.server.conditions.append(condition)
        if remote.heeds_if_range and condition not in (None, remote.etag, remote.modified):
            return 200, 0, {}
        return 206, int(asked[1]), {"Content-Range": f"bytes {asked[1]}-{size - 1}/{size}"}

    def _find(self) -> Remote | None:
        name = self.path.strip("/")
        self.server.seen.append((self.command, name, self.headers.get("Range")))
        if name not in self.server.files:
            self.send_error(404)
        return self.server.files.get(name)

    def _head(self, status: int, remote: Remote, headers: dict[str, object]) -> None:
        self.close_connection = True
        self.send_response(status)
        given = {"ETag": remote.etag, "Last-Modified": remote.modified, "Connection": "close"}
        for key, value in {**given, "Content-Type": remote.content_type, **headers}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))
