"""The page's routes. Reading needs no token; whatever changes something does.

GET  /                        the page
GET  /api/line                what runs here
GET  /api/view                what is to be seen now (:class:`edge.web.station.Page`), with ?camera=NAME of that one
GET  /api/events              the same as server-sent events, whenever it changes
GET  /parts/{key}/plain.jpg   a remembered part, or with its heat map: heat.jpg
POST /api/parts/{key}/mark    {"was": "good" | "bad"}, with Authorization: Bearer <token>
POST /api/cameras/{name}/do   :class:`edge.web.actions.Order`, with the same
GET  /metrics                 Prometheus
GET  /healthz                 200: the process serves
GET  /readiness               200 if parts come and are judged, else 503 with the reason
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from edge.web.actions import Order, status_of
from edge.web.marks import Truth
from edge.web.metrics import CONTENT_TYPE
from edge.web.station import Station
from edgeflame.errors import DataError, EdgeFlameError

STATIC = Path(__file__).parent / "static"

_EVENT_INTERVAL_S = 0.25
"""A part may come every ten milliseconds; nobody reads faster than this."""

_MAX_BODY_BYTES = 10_000

_HEADERS = {
    # Everything comes from here, and nothing else may frame it or run in it.
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _MarkBody(msgspec.Struct, forbid_unknown_fields=True):
    was: Truth


def build_app(station: Station) -> Starlette:
    """The routes of a station."""

    async def index(_request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=_HEADERS)

    async def asset(request: Request) -> Response:
        # Routed for the files that are there and no other path.
        return FileResponse(STATIC / request.url.path.removeprefix("/"), headers=_HEADERS)

    async def line(_request: Request) -> Response:
        return _json(await asyncio.to_thread(station.running))

    async def view(request: Request) -> Response:
        return _json(await asyncio.to_thread(station.page, request.query_params.get("camera")))

    async def events(request: Request) -> Response:
        camera = request.query_params.get("camera")
        return StreamingResponse(_events(station, camera), media_type="text/event-stream", headers=_HEADERS)

    async def picture(request: Request) -> Response:
        kind, side = request.path_params["kind"], request.query_params.get("side", "960")
        if kind not in ("plain", "heat") or not re.fullmatch(r"[1-9][0-9]{1,3}", side, re.ASCII):
            return _problem(404, "plain.jpg or heat.jpg, with ?side=10..9999")
        data = await asyncio.to_thread(
            station.board.picture, int(request.path_params["key"]), with_heat=kind == "heat", side=int(side)
        )
        if data is None:
            return _problem(404, "this part's picture is no longer kept")
        # A key names one part for as long as the daemon runs, but not over its restart.
        return Response(data, media_type="image/jpeg", headers=_HEADERS)

    async def mark(request: Request) -> Response:
        if not station.may_change(request):
            return _not_taken(request)
        if (body := await _body(request)) is None:
            return _problem(413, "too long")
        try:
            was = msgspec.json.decode(body, type=_MarkBody).was
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            return _problem(400, f'expected {{"was": "good"}} or {{"was": "bad"}} ({exc})')
        part = station.board.part(int(request.path_params["key"]))
        if part is None:
            return _problem(404, "this part is no longer kept")
        try:
            kept = await asyncio.to_thread(station.marks.add, part, was)
        except DataError as exc:
            return _problem(409, str(exc))
        except EdgeFlameError as exc:
            return _problem(507, str(exc))
        return _json(kept)

    async def do(request: Request) -> Response:
        if not station.may_change(request):
            return _not_taken(request)
        if (body := await _body(request)) is None:
            return _problem(413, "too long")
        try:
            order = msgspec.json.decode(body, type=Order)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            return _problem(400, f'expected {{"action": ...}} ({exc})')
        try:
            return _json(await station.actions.run(request.path_params["camera"], order))
        except EdgeFlameError as exc:
            return _problem(status_of(exc), str(exc))

    async def metrics(_request: Request) -> Response:
        text = await asyncio.to_thread(station.metrics.text)
        return Response(text, headers={**_HEADERS, "Content-Type": CONTENT_TYPE})

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=_HEADERS)

    async def readiness(_request: Request) -> Response:
        problem = (await asyncio.to_thread(station.page)).health.problem
        return PlainTextResponse(f"{problem or 'ready'}\n", status_code=503 if problem else 200, headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/page.css", asset),
            Route("/page.js", asset),
            Route("/parts.js", asset),
            Route("/upkeep.js", asset),
            Route("/icon.svg", asset),
            Route("/api/line", line),
            Route("/api/view", view),
            Route("/api/events", events),
            Route("/parts/{key:int}/{kind}.jpg", picture),
            Route("/api/parts/{key:int}/mark", mark, methods=["POST"]),
            Route("/api/cameras/{camera}/do", do, methods=["POST"]),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readiness", readiness),
        ]
    )


async def _events(station: Station, camera: str | None) -> AsyncIterator[bytes]:
    seen: int | None = None
    quiet = 0.0
    while not station.closing.is_set():
        version = station.board.version
        # Every few seconds without news as well: ages and queues change without parts.
        if version != seen or quiet >= 2.0:
            seen, quiet = version, 0.0
            page = await asyncio.to_thread(station.page, camera)
            yield b"data: " + msgspec.json.encode(page) + b"\n\n"
        await asyncio.sleep(_EVENT_INTERVAL_S)
        quiet += _EVENT_INTERVAL_S


async def _body(request: Request) -> bytes | None:
    """A request's body; None if it is too long."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            return None
    return body


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=_HEADERS)


def _not_taken(request: Request) -> Response:
    given = request.headers.get("authorization", "").removeprefix("Bearer").strip()
    return _problem(401, "that is not the operator's token" if given else "this needs the operator's token")


def _problem(status: int, text: str) -> Response:
    return Response(msgspec.json.encode({"error": text}), status, _HEADERS, "application/json")
