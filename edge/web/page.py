"""The model behind the operator's page: its views, made from history, cameras and destinations, and its actions.

Operators can pause, test or switch a camera from the page; every such request carries the token.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import msgspec
from starlette.requests import Request

from edge.config.outputs import WebConfig
from edge.control import DaemonControl
from edge.delivery.pipeline import Deliverer
from edge.status import CameraStatus
from edge.teaching.orders import ProductTeaching, TeachingOrder
from edge.teaching.teacher import LineTeacher
from edge.web.history import HistoryView, PartHistory, ShownPart
from edge.web.marks import PartMarks
from edge.web.metrics import LineMetrics
from edge.web.rejects import PastRejects
from edgeflame.background import BackgroundThread
from edgeflame.errors import EdgeFlameError, RuntimeUnavailableError, UsageError
from edgeflame.log import EventLog

log = EventLog("web")

MAX_ORDERS = 8
"""Most requests carried out at once."""

T = TypeVar("T")

Action = Literal[
    "pause",
    "resume",
    "snapshot",
    "golden",
    "acknowledge",
    "drift-clear",
    "drift-relearn",
    "product",
    "rollback",
    "allow-older",
]


class PageRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /api/cameras/{camera}/do``."""

    action: Action
    expected: Literal["good", "bad"] | None = None
    """For ``golden``: the kind of the golden part that comes next; if left out, the photographs are tested."""
    product: str | None = None
    """For ``product``: its name."""


class PageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a :class:`PageRequest`."""

    ok: bool
    message: str
    """For people."""


class OperatorActions:
    """Runs operators' requests on threads of their own: one may wait a minute for a part, and blocks neither the page
    nor a stop.

    Args:
        control: executes them.
    """

    def __init__(self, control: DaemonControl) -> None:
        self._control = control
        self._slots = threading.BoundedSemaphore(MAX_ORDERS)

    async def run(self, camera: str, order: PageRequest) -> PageAnswer:
        """Carry out a request.

        Raises:
            EdgeFlameError: the request is wrong, or failed.
        """
        if camera not in [status.camera for status in self._control.statuses()]:
            raise UsageError(f"there is no camera {camera!r}")
        log.info("operator_order", camera=camera, action=order.action)
        return await self._on_a_thread(order.action, lambda: self._execute(camera, order))

    async def teach(self, order: TeachingOrder) -> ProductTeaching:
        """Carry out an order about a product that is taught.

        Raises:
            EdgeFlameError: the order is wrong, or failed.
        """
        return await self._on_a_thread(order.action, lambda: self._control.teach(order))

    async def _on_a_thread(self, action: str, execute: Callable[[], T]) -> T:
        if not self._slots.acquire(blocking=False):
            raise UsageError(f"{MAX_ORDERS} orders are being carried out; wait for one of them")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                done = execute()
            except EdgeFlameError as exc:
                _resolve(loop, answer, exc)
            except Exception as exc:  # noqa: BLE001 - a thread's outermost frame
                log.error("order_failed", action=action, reason=repr(exc))
                _resolve(loop, answer, RuntimeUnavailableError(f"the order failed: {exc!r}"))
            else:
                _resolve(loop, answer, done)
            finally:
                self._slots.release()

        BackgroundThread("order", lambda _: work()).start()
        return await answer

    def _execute(self, camera: str, order: PageRequest) -> PageAnswer:
        simple: dict[str, tuple[Callable[[], object], str]] = {
            "pause": (lambda: self._control.pause(camera), "Paused."),
            "resume": (lambda: self._control.resume(camera), "Goes on."),
            "acknowledge": (lambda: self._control.acknowledge(camera), "Noted that the self-test failed."),
            "drift-clear": (lambda: self._control.handle_drift(camera, "clear"), "Cleared. Watching begins again."),
            "drift-relearn": (lambda: self._control.handle_drift(camera, "relearn"), "The next parts are learnt."),
        }
        if order.action in simple:
            call, message = simple[order.action]
            call()
            return PageAnswer(ok=True, message=message)
        if order.action == "snapshot":
            taken = self._control.snapshot(camera)
            message = f"Kept as {taken.file}." if taken.file is not None else "The next part had no picture."
            return PageAnswer(ok=taken.file is not None, message=message)
        if order.action == "product":
            if order.product is None:
                raise UsageError("say which product")
            self._control.switch_product(camera, order.product)
            return PageAnswer(ok=True, message=f"Judges {order.product} from the next part on.")
        if order.action == "rollback":
            product = next(status.product for status in self._control.statuses() if status.camera == camera)
            self._control.roll_back(product)
            return PageAnswer(ok=True, message=f"{product}: back to the model before.")
        if order.action == "allow-older":
            product = next(status.product for status in self._control.statuses() if status.camera == camera)
            self._control.switch_model(product, allow_older=True)
            return PageAnswer(ok=True, message=f"{product}: the older model is taken up.")
        report = self._control.test_golden_parts(camera, order.expected)
        verdict = "Self-test passed" if report.passed else "Self-test FAILED"
        return PageAnswer(ok=report.passed, message=f"{verdict}: {report.message}.")


def _resolve(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[T], value: T | EdgeFlameError) -> None:
    def resolve() -> None:
        if answer.cancelled():
            return
        if isinstance(value, EdgeFlameError):
            answer.set_exception(value)
        else:
            answer.set_result(value)

    # The server may have stopped meanwhile, and its loop be closed.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(resolve)


def http_status_of(error: EdgeFlameError) -> int:
    """HTTP status of an error: 400 for a wrong request, 409 for one that failed."""
    return 400 if isinstance(error, UsageError) else 409


class LineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/line``: what runs here. The fields outside ``cameras`` repeat those of the first camera."""

    product: str
    model: str
    threshold: float
    source: str
    provider: str
    cameras: tuple[CameraStatus, ...]
    products: tuple[str, ...]
    """Names of the products that a camera can be switched to."""


class DeliveryHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A destination's health."""

    name: str
    waiting: int
    """Results still to be delivered."""
    lost: int
    """Results that had to be deleted before they were delivered."""
    error: str | None
    """Why the last attempt failed; null if it did not."""


class LineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Health of cameras and destinations."""

    problem: str | None
    """Why the line is not ready; null if it is."""
    dropped: dict[str, int]
    """Number of frames of all cameras dropped without inspection, by reason."""
    cameras: tuple[CameraStatus, ...]
    deliveries: tuple[DeliveryHealth, ...]


class CameraLight(msgspec.Struct, frozen=True, kw_only=True):
    """One camera's verdict light."""

    camera: str
    latest: ShownPart | None
    problem: str | None
    """Why the camera is not ready; null if it is."""


class PageView(msgspec.Struct, frozen=True, kw_only=True):
    """``/api/view``: the full view of one camera, the lights of all, and the health."""

    camera: str
    """Name of the camera that is viewed."""
    view: HistoryView
    lights: tuple[CameraLight, ...]
    health: LineHealth
    teaching: int = 0
    """Rises with every change of what ``/api/teaching`` shows."""


TOKEN_HEADER = "X-EdgeFlame-Token"  # noqa: S105 - the name of a header


def given_token(request: Request) -> str:
    """The token of a request: in a header of its own, since ``Authorization`` is the proxy's where one stands before
    the page and asks for a name and a password; or as ``Authorization: Bearer``. Empty if there is none.
    """
    if (own := request.headers.get(TOKEN_HEADER)) is not None:
        return own
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class OperatorPage:
    """What the page's routes need of a running inspection.

    Args:
        config: section ``[web]``.
        control: the daemon's.
        history: recent parts.
        metrics: the Prometheus metrics.
        marks: marks parts, and keeps the marks.
        rejects: finds earlier rejects; None: none are kept.
        teacher: shows what is taught; None: nothing can be.
        deliverers: one for each destination.
        token: required of requests that change something.

    Raises:
        UsageError: the token is empty: a request without one would carry it.
    """

    def __init__(
        self,
        config: WebConfig,
        control: DaemonControl,
        *,
        history: PartHistory,
        metrics: LineMetrics,
        marks: PartMarks,
        deliverers: Sequence[Deliverer],
        token: str,
        rejects: PastRejects | None = None,
        teacher: LineTeacher | None = None,
    ) -> None:
        if not token:
            raise UsageError("the page needs a token: an empty one would let everybody change everything")
        self.history = history
        self.metrics = metrics
        self.marks = marks
        self.rejects = rejects
        self.teacher = teacher
        self.closing = threading.Event()
        """Set before the server stops, so that open event streams end."""
        self._config = config
        self._deliverers = deliverers
        self._control = control
        self.actions = OperatorActions(control)
        self._token = token

    @property
    def version(self) -> tuple[int, int]:
        """Changes with everything that is to be shown: parts, and what is taught."""
        return self.history.version, 0 if self.teacher is None else self.teacher.version

    def line_info(self) -> LineInfo:
        """What runs here, for ``/api/line``."""
        statuses = self._control.statuses()
        first = statuses[0]
        return LineInfo(
            product=first.product,
            model=first.model,
            threshold=first.threshold,
            source=first.source,
            provider=first.provider,
            cameras=statuses,
            products=tuple(self._control.describe().products),
        )

    def view(self, camera: str | None = None) -> PageView:
        """The view now, of the named camera, or of the first one if that is None or does not exist."""
        deliveries = []
        for deliverer in self._deliverers:
            destination = deliverer.status()
            deliveries.append(
                DeliveryHealth(
                    name=deliverer.name, waiting=destination.waiting, lost=destination.lost, error=deliverer.last_error
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
        health = LineHealth(
            problem="; ".join(problems) or None,
            dropped=dict(dropped),
            cameras=statuses,
            deliveries=tuple(deliveries),
        )
        names = [status.camera for status in statuses]
        chosen = camera if camera in names else names[0]
        assert chosen is not None
        return PageView(
            camera=chosen, view=self.history.view(chosen), lights=lights, health=health, teaching=self.version[1]
        )

    def may_change(self, request: Request) -> bool:
        """Whether a request carries the token."""
        return hmac.compare_digest(given_token(request).encode(), self._token.encode())

    def _light(self, status: CameraStatus) -> CameraLight:
        latest, age_s = self.history.latest(status.camera)
        problem = status.why_not_ready(last_part_s=age_s, stale_after_s=self._config.stale_after_s)
        return CameraLight(camera=status.camera, latest=latest, problem=problem)
