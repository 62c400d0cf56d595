"""The page's routes and its server: uvicorn on a thread of its own, for as long as a ``with`` block runs.

Reading needs no token; requests that change something do.

GET  /                        the page
GET  /api/line                what runs here (:class:`edge.web.page.LineInfo`)
GET  /api/view                the view now (:class:`edge.web.page.PageView`), with ?camera=NAME of that camera
GET  /api/events              the view as server-sent events, whenever it changes
GET  /parts/{key}/plain.jpg   picture of a remembered part; heat.jpg with its heat map
GET  /api/rejects             earlier rejects, with ?since=...&part=... (:class:`edge.web.rejects.RejectQuery`)
GET  /api/rejects/{number}.jpg  the picture of one
GET  /api/marks               the marks (:class:`edge.web.marks.MarksView`), with ?was=...&kind=...&camera=...&part=...
GET  /api/marks/{name}.jpg    the picture of one, with the outline of what was marked
POST /api/parts/{key}/mark    :class:`edge.web.marks.MarkBody`, with X-EdgeFlame-Token: <token>, or with
                              Authorization: Bearer <token>
POST /api/marks/{name}        :class:`edge.web.marks.ChangeBody`: correct, undo, delete; with the same token
GET, POST /api/teaching       what is taught, and orders about it (:mod:`edge.web.teaching`)
POST /api/cameras/{name}/do   :class:`edge.web.page.PageRequest`, with the same token
GET  /metrics                 Prometheus
GET  /healthz                 200: the process serves
GET  /readiness               200 if parts come and are inspected, else 503 with the reason
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from edge.config.outputs import WebConfig
from edge.web.guard import Guard
from edge.web.marks import ChangeBody, MarkBody, MarkQuery
from edge.web.metrics import CONTENT_TYPE
from edge.web.page import OperatorPage, PageRequest, http_status_of
from edge.web.rejects import RejectQuery
from edge.web.responses import HEADERS, SIDE, json_answer, order_of, part_key, problem, query_of
from edge.web.teaching import teaching_routes
from edgeflame.background import BackgroundThread
from edgeflame.errors import DataError, EdgeFlameError, LinkError, StorageError, UsageError
from edgeflame.listener import BoundedListener
from edgeflame.log import EventLog
from edgeflame.marks import Mark
from edgeflame.state import atomic_write, storage_errors

STATIC = Path(__file__).parent / "static"
ASSETS = (
    "page.css",
    "tabs.css",
    "teach.css",
    "page.js",
    "parts.js",
    "rejects.js",
    "teach.js",
    "look.js",
    "upkeep.js",
    "marks.js",
    "icon.svg",
)

_EVENT_INTERVAL_S = 0.25
"""Least time between two events, seconds; parts may come every ten milliseconds."""


def build_app(page: OperatorPage) -> Starlette:
    """The routes of a page."""

    async def index(_request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    async def asset(request: Request) -> Response:
        # Routed only for the files that exist.
        return FileResponse(STATIC / request.url.path.removeprefix("/"), headers=HEADERS)

    async def line(_request: Request) -> Response:
        return json_answer(await asyncio.to_thread(page.line_info))

    async def view(request: Request) -> Response:
        return json_answer(await asyncio.to_thread(page.view, request.query_params.get("camera")))

    async def events(request: Request) -> Response:
        camera = request.query_params.get("camera")
        return StreamingResponse(_events(page, camera), media_type="text/event-stream", headers=HEADERS)

    async def picture(request: Request) -> Response:
        kind, side = request.path_params["kind"], request.query_params.get("side", "960")
        key = part_key(request)
        if kind not in ("plain", "heat") or not SIDE.fullmatch(side):
            return problem(404, "plain.jpg or heat.jpg, with ?side=10..9999")
        data = None
        if key is not None:
            data = await asyncio.to_thread(page.history.picture, key, with_heat=kind == "heat", side=int(side))
        if data is None:
            return problem(404, "this part's picture is no longer kept")
        # A key names one part for as long as the daemon runs, but not over its restart.
        return Response(data, media_type="image/jpeg", headers=HEADERS)

    async def rejects(request: Request) -> Response:
        if page.rejects is None:
            return problem(404, "this line keeps no results")
        try:
            query = query_of(request, RejectQuery, what="rejects")
            return json_answer(await asyncio.to_thread(page.rejects.find, query))
        except EdgeFlameError as exc:
            return problem(http_status_of(exc), str(exc))

    async def reject_picture(request: Request) -> Response:
        key, side = part_key(request), request.query_params.get("side", "1024")
        data = None
        if page.rejects is not None and key is not None and SIDE.fullmatch(side):
            data = await asyncio.to_thread(page.rejects.picture, key, side=int(side))
        if data is None:
            return problem(404, "this part's picture is no longer kept")
        return Response(data, media_type="image/jpeg", headers=HEADERS)

    async def marks(request: Request) -> Response:
        try:
            query = query_of(request, MarkQuery, what="marks")
            return json_answer(await asyncio.to_thread(page.marks.view, query))
        except EdgeFlameError as exc:
            return problem(http_status_of(exc), str(exc))

    async def mark_picture(request: Request) -> Response:
        name, side = request.path_params["name"], request.query_params.get("side", "960")
        data = None
        if SIDE.fullmatch(side):
            with contextlib.suppress(StorageError):
                data = await asyncio.to_thread(page.marks.picture, name, side=int(side))
        if data is None:
            return problem(404, "there is no such mark")
        return Response(data, media_type="image/jpeg", headers=HEADERS)

    async def change_mark(request: Request) -> Response:
        said = await order_of(page, request, ChangeBody, expected='{"action": ...}')
        if isinstance(said, Response):
            return said
        return await _marked(page.marks.change, request.path_params["name"], said)

    async def mark(request: Request) -> Response:
        said = await order_of(page, request, MarkBody, expected='{"was": "good"} or {"was": "bad"}')
        if isinstance(said, Response):
            return said
        key = part_key(request)
        if key is None or page.history.part(key) is None:
            return problem(404, "this part is no longer kept")
        return await _marked(page.marks.mark, key, said)

    async def do(request: Request) -> Response:
        order = await order_of(page, request, PageRequest, expected='{"action": ...}')
        if isinstance(order, Response):
            return order
        try:
            return json_answer(await page.actions.run(request.path_params["camera"], order))
        except EdgeFlameError as exc:
            return problem(http_status_of(exc), str(exc))

    async def metrics(_request: Request) -> Response:
        text = await asyncio.to_thread(page.metrics.text)
        return Response(text, headers={**HEADERS, "Content-Type": CONTENT_TYPE})

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=HEADERS)

    async def readiness(_request: Request) -> Response:
        problem = (await asyncio.to_thread(page.view)).health.problem
        return PlainTextResponse(f"{problem or 'ready'}\n", status_code=503 if problem else 200, headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", index),
            *(Route(f"/{name}", asset) for name in ASSETS),
            Route("/api/line", line),
            Route("/api/view", view),
            Route("/api/events", events),
            Route("/parts/{key}/{kind}.jpg", picture),
            Route("/api/rejects", rejects),
            Route("/api/rejects/{key}.jpg", reject_picture),
            Route("/api/marks", marks),
            Route("/api/marks/{name}.jpg", mark_picture),
            Route("/api/marks/{name}", change_mark, methods=["POST"]),
            *teaching_routes(page),
            Route("/api/parts/{key}/mark", mark, methods=["POST"]),
            Route("/api/cameras/{camera}/do", do, methods=["POST"]),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readiness", readiness),
        ]
    )


async def _events(page: OperatorPage, camera: str | None) -> AsyncIterator[bytes]:
    seen: tuple[int, int] | None = None
    quiet = 0.0
    while not page.closing.is_set():
        version = page.version
        # Also every few seconds without a change: ages and queues change without parts.
        if version != seen or quiet >= 2.0:
            seen, quiet = version, 0.0
            view = await asyncio.to_thread(page.view, camera)
            yield b"data: " + msgspec.json.encode(view) + b"\n\n"
        await asyncio.sleep(_EVENT_INTERVAL_S)
        quiet += _EVENT_INTERVAL_S


async def _marked(change: Callable[..., Mark | None], which: int | str, said: MarkBody | ChangeBody) -> Response:
    """Change marks, and answer with what holds now."""
    try:
        return json_answer(await asyncio.to_thread(change, which, said))
    except UsageError as exc:
        return problem(400, str(exc))
    except DataError as exc:
        return problem(409, str(exc))
    except EdgeFlameError as exc:
        return problem(507, str(exc))


log = EventLog("web")

TOKEN_VARIABLE = "EDGEFLAME_OPERATOR_TOKEN"  # noqa: S105 - the name of a variable
TOKEN_FILE = "operator-token"  # noqa: S105 - the name of a file

_STOP_TIMEOUT_S = 3.0


def operator_token(state: Path) -> str:
    """The operators' token: from the environment, or generated once and kept in the state folder.

    Raises:
        StorageError: its file can be neither read nor written, or holds no token: it is empty or damaged.
        UsageError: the one of the environment is blank, or cannot be sent in a request.
    """
    if given := os.environ.get(TOKEN_VARIABLE):
        if (token := _as_token(given.encode(errors="surrogateescape"))) is None:
            raise UsageError(f"{TOKEN_VARIABLE} is set but holds no token; unset it, or put one in")
        return token
    path = state / TOKEN_FILE
    with storage_errors(path, "read the operator's token"):
        try:
            kept = path.read_bytes()
        except FileNotFoundError:
            kept = f"{secrets.token_urlsafe(12)}\n".encode()
            # Whole or not at all: half a token on a full disk would be a guessable one from the next start on.
            atomic_write(path, kept, mode=0o600)
            log.info("operator_token_made", file=str(path))
    if (token := _as_token(kept)) is None:
        raise StorageError(f"{path}: empty or damaged: delete it, and the next start makes another")
    return token


def _as_token(data: bytes) -> str | None:
    """The token that a file or variable holds; None where there is none that a request could carry."""
    try:
        token = data.decode().strip()
    except UnicodeDecodeError:
        return None
    return token if token and token.isprintable() else None


@contextlib.contextmanager
def serve_page(page: OperatorPage, config: WebConfig) -> Iterator[str]:
    """Serve the page while the block runs; yields its address.

    Raises:
        LinkError: the address cannot be listened on.
    """
    listener = listen(config)
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(build_app(page), config, listener),
            http="h11",
            ws="none",
            # uvicorn's own logs are off; a line for every request would be too many.
            log_config=None,
            access_log=False,
            # A connection is known by the address that it came from, whatever a proxy says.
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    # The daemon handles signals; uvicorn takes them only on the main thread, which this is not.
    thread = BackgroundThread("web", lambda _: asyncio.run(_serve(server, listener)), join_s=_STOP_TIMEOUT_S)
    thread.start()
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("page_served", address=address)
    try:
        yield address
    finally:
        page.closing.set()
        server.should_exit = True
        thread.close()
        listener.close()


async def _serve(server: uvicorn.Server, listener: BoundedListener) -> None:
    async def close_idle() -> None:
        while True:
            await asyncio.sleep(1.0)
            listener.close_idle()

    closing = asyncio.create_task(close_idle())
    try:
        await server.serve(sockets=[listener])
    finally:
        closing.cancel()


def listen(config: WebConfig) -> BoundedListener:
    """A listening socket on the page's address.

    Raises:
        LinkError: the address cannot be listened on.
    """
    try:
        return BoundedListener.bound_to(config.host, config.port)
    except OSError as exc:
        raise LinkError(f"web.listen: cannot listen on {config.listen} ({exc.strerror or exc})") from exc
