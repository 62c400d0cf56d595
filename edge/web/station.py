"""What the routes know of a running inspection, put together from board, cameras and destinations."""

from __future__ import annotations

import collections
import hmac
import threading
from collections.abc import Sequence

import msgspec
from starlette.requests import Request

from edge.control import Control
from edge.delivery import Deliverer
from edge.status import CameraStatus
from edge.web.actions import Actions
from edge.web.board import Board, Shown, View
from edge.web.config import WebConfig
from edge.web.marks import MarkStore
from edge.web.metrics import LineMetrics


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/line``: what runs here. Of several cameras, the first stands outside of the list as well."""

    product: str
    model: str
    threshold: float
    source: str
    provider: str
    cameras: tuple[CameraStatus, ...]
    products: tuple[str, ...]
    """Between which a camera may be switched."""


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


class Light(msgspec.Struct, frozen=True, kw_only=True):
    """One camera's verdict light."""

    camera: str
    latest: Shown | None
    problem: str | None
    """Why it is not ready."""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/view``: of one camera much, of all a little."""

    camera: str
    """Whose view this is."""
    view: View
    lights: tuple[Light, ...]
    health: Health


class Station:
    """The routes' view of a running inspection.

    Args:
        config: of the page.
        control: of the cameras.
        board: what is shown.
        metrics: what is counted.
        marks: where opinions are kept.
        deliverers: of the destinations.
        token: what a request that changes something must carry.
    """

    def __init__(
        self,
        config: WebConfig,
        control: Control,
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
        self._control = control
        self.actions = Actions(control)
        self._token = token

    def running(self) -> Running:
        """What runs."""
        statuses = self._control.statuses()
        first = statuses[0]
        return Running(
            product=first.product,
            model=first.model,
            threshold=first.threshold,
            source=first.source,
            provider=first.provider,
            cameras=statuses,
            products=tuple(self._control.describe().products),
        )

    def page(self, camera: str | None = None) -> Page:
        """What is to be seen now, of the first camera unless another is named (and there)."""
        deliveries = []
        for deliverer in self._deliverers:
            standing = deliverer.standing()
            deliveries.append(
                DeliveryHealth(
                    name=deliverer.name, waiting=standing.waiting, lost=standing.lost, error=deliverer.last_error
                )
            )
        statuses = self._control.statuses()
        dropped: collections.Counter[str] = collections.Counter()
        for status in statuses:
            dropped.update(status.dropped)
        lights = tuple(self._light(status) for status in statuses)
        problems = [
            light.problem if len(lights) == 1 else f"{light.camera}: {light.problem}"
            for light in lights
            if light.problem is not None
        ]
        health = Health(
            problem="; ".join(problems) or None,
            dropped=dict(dropped),
            cameras=statuses,
            deliveries=tuple(deliveries),
        )
        names = [status.camera for status in statuses]
        chosen = camera if camera in names else names[0]
        assert chosen is not None
        return Page(camera=chosen, view=self.board.view(chosen), lights=lights, health=health)

    def may_change(self, request: Request) -> bool:
        """Whether a request carries the token."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _light(self, status: CameraStatus) -> Light:
        latest, age_s = self.board.latest(status.camera)
        problem = None if status.ended else self._problem_of(status, age_s)
        return Light(camera=status.camera, latest=latest, problem=problem)

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
