"""A page in the browser: give it a photo, read its captions, see where each word looked.

    pip install -r requirements-app.txt
    python -m tools.app --checkpoint captioner_best_cider.safetensors

Only this machine can open it, unless --host says otherwise. Photos are kept nowhere.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: the page needs {error.name}: run pip install -r requirements-app.txt"
    ) from None

from encoder import ImageError
from inference import Captioner, Explained, add_captioner_flags, captioner_of
from utils import UserError, run_script, script_parser

PAGE = Path(__file__).with_name("app.html")
# What the page may ask for: the kind of number, the least and the most.
LIMITS: dict[str, tuple[type, float, float]] = {
    "beam_size": (int, 1, 10),
    "temperature": (float, 0.1, 5),
    "top_p": (float, 0.05, 1),
    "seed": (int, 0, 2**32 - 1),
}
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


def build_app(captioner: Captioner, host: str, max_megabytes: float) -> Starlette:
    """The page's server; `host` is the name that it is opened by, beside localhost and addresses.

    Routes: `/` is the page, `/about` what the checkpoint can do, and `/write` takes a picture as
    its body and, as its query, a question and the fields of `LIMITS`.
    """
    one_at_a_time = asyncio.Lock()

    async def page(_: Request) -> Response:
        return FileResponse(PAGE)

    async def about(_: Request) -> Response:
        return JSONResponse(
            {
                "tasks": captioner.tasks,
                "beam_size": min(captioner.options.beam_size, LIMITS["beam_size"][2]),
                "max_megabytes": max_megabytes,
            }
        )

    async def write(request: Request) -> Response:
        body = await read_body(request, int(max_megabytes * 1e6))
        if body is None:
            return problem(413, f"The file is larger than {max_megabytes:g} MB.")
        question = request.query_params.get("question")
        try:
            options = read_options(request.query_params)
            async with one_at_a_time:
                found = await run_in_threadpool(explain, captioner, body, question, options)
        except UserError as error:
            return problem(400, str(error))
        return JSONResponse(found)

    async def guarded(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        refusal = refuse(request.method, request.headers, host)
        response = problem(403, refusal) if refusal else await call_next(request)
        response.headers.update(HEADERS)
        return response

    async def failed(_: Request, __: Exception) -> Response:
        return problem(500, "Something went wrong here; the terminal says more.")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/about", about),
            Route("/write", write, methods=["POST"]),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guarded)],
        exception_handlers={Exception: failed},
    )


def problem(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


def refuse(method: str, headers: Mapping[str, str], host: str) -> str | None:
    """Why a request is not served, or None.

    A foreign site whose name has been pointed at this machine is known by that name (an address
    can't be pointed elsewhere), and a form on a foreign page by its origin.
    """
    asked = headers.get("host", "")
    try:
        name = urlsplit(f"//{asked}").hostname or ""
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != asked
    except ValueError:
        return "The address is not valid."
    if name not in ("localhost", host) and not _is_address(name):
        return "This page is not served under that name."
    if method != "GET" and foreign:
        return "Requests from other pages are not served."
    return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_body(request: Request, most: int) -> bytes | None:
    """The body, or None where it has more bytes than that."""
    body = bytearray()
    async for part in request.stream():
        # What is too much is read but not kept: a browser listens only after it has sent all.
        if len(body) <= most:
            body += part
    return bytes(body) if len(body) <= most else None


def read_options(query: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `GenerationOptions` from a query.

    Raises:
        UserError: no number, or outside of `LIMITS`.
    """
    options: dict[str, Any] = {"sample": query.get("sample") == "true", "groups": 1}
    for name in LIMITS.keys() & query.keys():
        kind, least, most = LIMITS[name]
        try:
            options[name] = kind(query[name])
        except ValueError:
            options[name] = float("nan")  # within no limits
        if not least <= options[name] <= most:
            raise UserError(f"{name} must be a number from {least:g} to {most:g}.")
    return options


def explain(
    captioner: Captioner, picture: bytes, question: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What is written about a picture, best first, as the page wants it.

    Raises:
        UserError: the picture can't be read, or the checkpoint can't do that.
    """
    if question is not None and not question.strip():
        raise UserError("The question is empty.")
    try:
        image = captioner.encoder.open(io.BytesIO(picture))
    except ImageError:
        raise UserError(
            "That file can't be read as a picture: it may be damaged, too large, or of another "
            "kind. Try a JPEG or a PNG."
        ) from None
    grid, found = captioner.explain(image, question, **options)
    return {
        "rows": grid.rows,
        "columns": grid.columns,
        "area": grid.area,
        "found": [as_plain(each) for each in found],
    }


def as_plain(each: Explained) -> dict[str, Any]:
    """A caption with its words' maps, each from 0 to 255, in reading order."""
    words = [
        {
            "word": shown.word,
            "map": (255 * shown.weights / shown.weights.max()).round().int().flatten().tolist(),
        }
        for shown in each.words
    ]
    return {"text": each.text, "score": each.hypothesis.score, "words": words}


def command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_captioner_flags(parser)
    add("--host", default="127.0.0.1", help="the address to listen on [%(default)s]")
    add("--port", type=int, default=8000, help="0: any free one [%(default)s]")
    add("--max_megabytes", type=float, default=20.0, help="largest picture [%(default)s]")
    return parser.parse_args(argv)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"can't listen on {host}, port {port} ({error}): give others with --host and --port"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    args = command_line(argv)
    with listen(args.host, args.port) as door:
        captioner = captioner_of(args)
        app = build_app(captioner, args.host, args.max_megabytes)
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        name = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{name}:{door.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        try:
            uvicorn.Server(options).run(sockets=[door])
        except KeyboardInterrupt:
            print("\nended")
    return 0


if __name__ == "__main__":
    run_script(main)
