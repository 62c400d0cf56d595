"""The page's routes. Reading needs no token; whatever changes something does.

GET  /                        the page
GET  /api/line                what runs here
GET  /api/view                what is to be seen now (:class:`edge.web.board.View` and the line's health)
GET  /api/events              the same as server-sent events, whenever it changes
GET  /parts/{key}/plain.jpg   a remembered part, or with its heat map: heat.jpg
POST /api/parts/{key}/mark    {"was": "good" | "bad"}, with Authorization: Bearer <token>
GET  /metrics                 Prometheus
GET  /healthz                 200: the process serves
GET  /readiness               200 if parts come and are judged, else 503 with the reason
"""

from __future__ import annotations

import asyncio
import collections
import hmac
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from edge.delivery import Deliverer
from edge.status import CameraStatus
from edge.web.board import Board, View
from edge.web.config import WebConfig
from edge.web.marks import MarkStore, Truth
from edge.web.metrics import CONTENT_TYPE, LineMetrics
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


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/line``: what runs here. Of several cameras, the first stands outside of the list as well."""

    product: str
    model: str
    threshold: float
    source: str
    provider: str
    cameras: tuple[CameraStatus, ...]


class DeliveryHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A destination's health."""

    name: str
    waiting: int
    lost: int
    error: str | None


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Of camera and destinations."""

    problem: str | None
    """Why the line is not ready; None if it is."""
    dropped: dict[str, int]
    """Frames never looked at, of all cameras, by reason."""
    cameras: tuple[CameraStatus, ...]
    deliveries: tuple[DeliveryHealth, ...]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/view``."""

    view: View
    health: Health


class _MarkBody(msgspec.Struct, forbid_unknown_fields=True):
    was: Truth


class Station:
    """The routes' view of a running inspection.

    Args:
        config: of the page.
        statuses: of the cameras.
        board: what is shown.
        metrics: what is counted.
        marks: where opinions are kept.
        deliverers: of the destinations.
        token: what a request that changes something must carry.
    """

    def __init__(
        self,
        config: WebConfig,
        statuses: Callable[[], Sequence[CameraStatus]],
        *,
        board: Board,
        metrics: LineMetrics,
        marks: MarkStore,
        deliverers: Sequence[Deliverer],
        token: str,
    ) -> None:
        self.board = board
        self.metrics = metrics
        self.marks = marks
        self.closing = threading.Event()
        """Set before the server stops, so that open event streams end."""
        self._config = config
        self._deliverers = deliverers
        self._statuses = statuses
        self._token = token

    def running(self) -> Running:
        """What runs."""
        statuses = tuple(self._statuses())
        first = statuses[0]
        return Running(
            product=first.product,
            model=first.model,
            threshold=first.threshold,
            source=first.source,
            provider=first.provider,
            cameras=statuses,
        )

    def page(self) -> Page:
        """What is to be seen now."""
        view = self.board.view()
        deliveries = []
        for deliverer in self._deliverers:
            standing = deliverer.standing()
            deliveries.append(
                DeliveryHealth(
                    name=deliverer.name, waiting=standing.waiting, lost=standing.lost, error=deliverer.last_error
                )
            )
        statuses = tuple(self._statuses())
        dropped: collections.Counter[str] = collections.Counter()
        for status in statuses:
            dropped.update(status.dropped)
        health = Health(
            problem=self._problem(view, statuses),
            dropped=dict(dropped),
            cameras=statuses,
            deliveries=tuple(deliveries),
        )
        return Page(view=view, health=health)

    def may_change(self, request: Request) -> bool:
        """Whether a request carries the token."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _problem(self, view: View, statuses: Sequence[CameraStatus]) -> str | None:
        problems = [
            problem if len(statuses) == 1 else f"{status.camera}: {problem}"
            for status in statuses
            if not status.ended and (problem := self._problem_of(status, view.last_parts_s.get(status.camera)))
        ]
        return "; ".join(problems) or None

    def _problem_of(self, status: CameraStatus, last_part_s: float | None) -> str | None:
        if status.paused:
            return "paused"
        if status.not_ready:
            return "; ".join(status.not_ready)
        if status.problem is not None:
            return status.problem
        if last_part_s is None:
            return "no part has been judged since the start"
        if last_part_s > self._config.stale_after_s:
            return f"no part for {last_part_s:.0f} s"
        return None


def build_app(station: Station) -> Starlette:
    """The routes of a station."""

    async def index(_request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=_HEADERS)

    async def asset(request: Request) -> Response:
        # Routed for the files that are there and no other path.
        return FileResponse(STATIC / request.url.path.removeprefix("/"), headers=_HEADERS)

    async def line(_request: Request) -> Response:
        return _json(await asyncio.to_thread(station.running))

    async def view(_request: Request) -> Response:
        return _json(await asyncio.to_thread(station.page))

    async def events(_request: Request) -> Response:
        return StreamingResponse(_events(station), media_type="text/event-stream", headers=_HEADERS)

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
            return _problem(401, "this needs the operator's token")
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _MAX_BODY_BYTES:
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
            Route("/icon.svg", asset),
            Route("/api/line", line),
            Route("/api/view", view),
            Route("/api/events", events),
            Route("/parts/{key:int}/{kind}.jpg", picture),
            Route("/api/parts/{key:int}/mark", mark, methods=["POST"]),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readiness", readiness),
        ]
    )


async def _events(station: Station) -> AsyncIterator[bytes]:
    seen: int | None = None
    quiet = 0.0
    while not station.closing.is_set():
        version = station.board.version
        # Every few seconds without news as well: ages and queues change without parts.
        if version != seen or quiet >= 2.0:
            seen, quiet = version, 0.0
            page = await asyncio.to_thread(station.page)
            yield b"data: " + msgspec.json.encode(page) + b"\n\n"
        await asyncio.sleep(_EVENT_INTERVAL_S)
        quiet += _EVENT_INTERVAL_S


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=_HEADERS)


def _problem(status: int, text: str) -> Response:
    return Response(msgspec.json.encode({"error": text}), status, _HEADERS, "application/json")
