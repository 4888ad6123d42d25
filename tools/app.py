"""A page in the browser: give it photos, read their captions, see where each word looked.

    pip install -r requirements-app.txt
    python -m tools.app --checkpoint captioner_best_cider.safetensors

`POST /caption` and `GET /health` serve programs: docs/service.md says how, and how to put a
password before it. Only this machine can open it, unless --host says otherwise. Photos are kept
nowhere.
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.app)

import asyncio
import contextlib
import io
import ipaddress
import math
import os
import random
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from demo import scenes
from encoder import ImageError
from inference import Captioner, Explained, captioner_of
from utils import UserError, refused, run_script

PAGE = Path(__file__).with_name("app.html")
# What may be asked for: the kind of number, the least and the most.
LIMITS: dict[str, tuple[type, float, float]] = {
    "beam_size": (int, 1, 10),
    "others": (int, 0, 9),
    "temperature": (float, 0.1, 5),
    "top_p": (float, 0.05, 1),
    "seed": (int, 0, 2**32 - 1),
}
SAMPLES = 4  # drawings to try
WAITING = 16  # photos at once, the one that is being captioned included
ROOM = 8  # all that wait have together at most so many times the largest photo's bytes
CONNECTIONS = 200  # more, and the one that has not sent what it is to for longest is closed
# Within which a request's head and its body must come, and its answer must have been taken.
HEAD_SECONDS, BODY_SECONDS, ANSWER_SECONDS = 10.0, 120.0, 600.0
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


# --- Requests -------------------------------------------------------------------------------


class Service:
    """What the routes share: the captioner, whose turn it is, and the room for those that wait."""

    def __init__(self, captioner: Captioner, max_megabytes: float):
        self.captioner, self.max_megabytes = captioner, max_megabytes
        self.turn = asyncio.Lock()  # one photo at a time: each has the whole machine
        self.places = asyncio.Semaphore(WAITING)
        self.room = int(ROOM * max_megabytes * 1e6)  # bytes of photos that may still come

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE)

    async def health(self, _: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "tasks": self.captioner.tasks,
                "beam_size": self.captioner.options.beam_size,
                "max_megabytes": self.max_megabytes,
                "samples": SAMPLES,
            }
        )

    async def sample(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number not in map(str, range(SAMPLES)):
            raise HTTPException(404, f"There are only {SAMPLES} samples.")
        dice, file = random.Random(int(number)), io.BytesIO()
        scene = scenes.invent(dice, scenes.distinct)
        scenes.paint(scene, scenes.arrange(scene, dice), dice, shrink=2).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    async def caption(self, request: Request) -> Response:
        async with self.received(request) as photo:
            kind = request.headers.get("content-type", "").lower()
            packed = request.headers.get("content-encoding", "identity") != "identity"
            if packed or kind.startswith(("multipart/", "application/json")):
                text = "Send the photo alone as the body, not in a form or JSON, nor compressed."
                raise HTTPException(400, text)
            task = write, self.captioner, photo, request.query_params
            async with self.turn:
                if await request.is_disconnected():
                    raise ClientDisconnect
                return JSONResponse(await to_thread.run_sync(*task, abandon_on_cancel=True))

    @contextlib.asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request, which takes up room until the block ends."""
        body, refusal = bytearray(), None
        busy = HTTPException(503, "Too many are waiting: try again later.", {"Retry-After": "5"})
        try:
            async for part in request.stream():
                if len(body) + len(part) > self.max_megabytes * 1e6:
                    refusal = HTTPException(413, f"It is larger than {self.max_megabytes:g} MB.")
                elif len(part) > self.room:
                    refusal = refusal or busy
                if refusal is None:
                    self.room -= len(part)
                    body += part
                else:  # read but not kept: a browser listens only after it has sent all
                    self.room += len(body)
                    body.clear()
            if refusal or self.places.locked():
                raise refusal or busy
            async with self.places:
                yield body
        finally:
            self.room += len(body)


def build_app(captioner: Captioner, host: str, max_megabytes: float) -> Starlette:
    """The server; `host` is the name that it is opened by, beside localhost and addresses."""
    service = Service(captioner, max_megabytes)
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/health", service.health),
            Route("/samples/{number}", service.sample),
            Route("/caption", service.caption, methods=["POST"]),
        ],
        middleware=[Middleware(guarded, host=host)],
        exception_handlers={
            HTTPException: lambda _, error: problem(error.status_code, error.detail, error.headers),
            UserError: lambda _, error: problem(400, str(error)),
            ClientDisconnect: lambda *_: Response(status_code=400),  # to nobody
            Exception: lambda *_: problem(500, "Something went wrong; the terminal says more."),
        },
    )
    app.router.redirect_slashes = False  # to an address that only a proxy before it knows
    return app


def problem(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


def guarded(app: ASGIApp, host: str) -> ASGIApp:
    """An application that serves what `refuse` has nothing against."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        refusal = refuse(request.method, request.headers, host)
        try:
            await (problem(403, refusal) if refusal else app)(scope, receive, send)
        except asyncio.CancelledError:  # the server ends
            await problem(503, "The server is ending.")(scope, receive, send)

    return serve


def refuse(method: str, headers: Mapping[str, str], host: str) -> str | None:
    """Why a request is not served, or None.

    A foreign site whose name has been pointed at this machine is known by that name (an address
    can't be pointed elsewhere), and what a foreign page sends by its origin or by what the
    browser says of it. A link to the page may stand anywhere.
    """
    asked = headers.get("host", "localhost")  # HTTP/1.0 wants none: no browser's, a proxy's check
    try:
        name = urlsplit(f"//{asked}").hostname or ""
        origin = headers.get("origin")
        foreign = method != "GET" and origin is not None and urlsplit(origin).netloc != asked
    except ValueError:
        return "The address is not valid."
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if name not in ("localhost", host.lower()):
            return "This page is not served under that name: open it by its address or by --host's."
    if site := headers.get("sec-fetch-site"):  # right also where a proxy asks by another name
        link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        foreign = site not in ("none", "same-origin") and not link
    if foreign:
        return "Requests from other pages are not served."
    return None


def read_options(query: QueryParams) -> dict[str, Any]:
    """The options that were given, within their limits, and whether to `sample` and draw `maps`."""
    options: dict[str, Any] = {"sample": False, "maps": False}
    if len(query.multi_items()) > len(query):
        raise UserError("An option is given twice: ask each question in a request of its own.")
    for name in query.keys() - LIMITS.keys() - {"question"}:
        said = query[name].lower()
        if name not in options or said not in ("true", "false"):
            raise UserError(f"{name}={query[name]} is no option.")
        options[name] = said == "true"
    for name in LIMITS.keys() & query.keys():
        kind, least, most = LIMITS[name]
        try:
            options[name] = kind(query[name])
        except ValueError:
            options[name] = math.nan  # within no limits
        if not least <= options[name] <= most:
            number = "whole number" if kind is int else "number"
            raise UserError(f"{name} must be a {number} from {least} to {most}.")
    for name in () if options["sample"] else ("temperature", "top_p", "seed"):
        if name in options:
            raise UserError(f"{name} changes nothing without sample=true.")
    return options


def write(captioner: Captioner, photo: bytearray, query: QueryParams) -> dict[str, Any]:
    """What is written about a photo, as JSON can hold it."""
    options, question = read_options(query) | {"groups": 1}, query.get("question")
    wanted, maps = options.pop("others", 0), options["maps"]
    if wanted and options["sample"]:
        options["beam_size"] = wanted + 1
    try:
        image = captioner.encoder.open(io.BytesIO(photo))
    except ImageError:
        raise UserError(
            "That file can't be read as a picture: it may be damaged, too large, or of another "
            "kind. Try a JPEG or a PNG."
        ) from None
    grid, found = captioner.explain(image, question, **options)
    more = found[1:]
    if wanted and not options["sample"]:
        # One beam a group, so that none is a variant of another; one more, as one may be the best.
        diverse = {"beam_size": wanted + 1, "groups": wanted + 1}
        _, more = captioner.explain(image, question, **options | diverse)
    others = {each.text: each for each in more if each.text != found[0].text}
    where = {"rows": grid.rows, "columns": grid.columns, "area": grid.area} if maps else {}
    return where | {
        "answers" if question else "captions": [as_plain(each, maps) for each in found],
        "others": [as_plain(each, maps) for each in others.values()][:wanted],
    }


def as_plain(found: Explained, maps: bool) -> dict[str, Any]:
    """A caption; with its words' maps, each from 0 to 255, in reading order."""
    written = found.hypothesis
    plain = {
        "text": found.text,
        "score": round(written.score, 4),
        "confidence": round(math.exp(written.log_probability / len(written.ids)), 4),
    }
    if maps:
        plain["words"] = [
            {
                "word": shown.word,
                "map": (255 * shown.weights / shown.weights.max()).round().int().flatten().tolist(),
            }
            for shown in found.words
        ]
    return plain


# --- Connections ----------------------------------------------------------------------------


class Connection(H11Protocol):
    """A connection that ends where a client doesn't send or read in time."""

    stage: object = None  # what the client does now, as h11 calls it,
    since: float = 0.0  # and from when on
    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._enter(h11.IDLE)
        there = [each for each in self.connections if not each.transport.is_closing()]
        if len(there) > CONNECTIONS:
            unsent = [each for each in there if each.stage in (h11.IDLE, h11.SEND_BODY)]
            min(unsent, key=lambda each: each.since).transport.abort()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not self.stage:
            self._enter(self.conn.their_state)

    def _enter(self, stage: object) -> None:
        if self.late:
            self.late.cancel()
        self.stage, self.since = stage, self.loop.time()
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: BODY_SECONDS}.get(stage, ANSWER_SECONDS)
        self.late = self.loop.call_later(seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.late.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer is on its way already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [*HEADERS.items(), ("Connection", "close"), ("Content-Length", "0")]
            for event in (h11.Response(status_code=400, headers=headers), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


class Server(uvicorn.Server):
    """A server that ends without waiting for what is asked of it."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self.server_state.tasks:
            task.cancel()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with refused(f"can't listen on {host}, port {port}: give others with --host and --port"):
        return socket.create_server((host, port), family=family)


def main(argv: Sequence[str] | None = None) -> None:
    args = commands.app(argv)
    with listen(args.host, args.port) as door:
        app = build_app(captioner_of(args), args.host, args.max_megabytes)
        options = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="error",  # not of each request that asks for another protocol as well
            access_log=False,
            server_header=False,
            headers=list(HEADERS.items()),
            backlog=32,  # at once, before those beyond CONNECTIONS end: macOS opens only 256 files
            timeout_graceful_shutdown=1,
        )
        name = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{name}:{door.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        try:
            Server(options).run(sockets=[door])
        except KeyboardInterrupt:
            print("\nended", flush=True)
            # What is being computed can't be interrupted, and Python would wait for its thread.
            os._exit(0)


if __name__ == "__main__":
    run_script(main)
