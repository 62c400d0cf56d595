"""What an operator may ask of a camera from the page; every request carries the token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from edge.control import Control, Snapshot
from edge.golden.report import GoldenReport
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, RuntimeUnavailableError, UsageError

log = EventLog("web")

MAX_ORDERS = 8
"""At once."""

Action = Literal[
    "pause", "resume", "snapshot", "golden", "acknowledge", "drift-clear", "drift-relearn", "product", "rollback"
]


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /api/cameras/{camera}/do``."""

    action: Action
    expected: Literal["good", "bad"] | None = None
    """Of ``golden``: the next part is a golden one; left out, the photographs are tested."""
    product: str | None = None
    """Of ``product``."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    ok: bool
    message: str
    """For people."""


class Actions:
    """Runs orders on threads of their own: one may wait a minute for a part, and neither page nor stop may wait for it.

    Args:
        control: of the cameras.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._slots = threading.BoundedSemaphore(MAX_ORDERS)

    async def run(self, camera: str, order: Order) -> Done:
        """Carry out an order.

        Raises:
            EdgeFlameError: what was wrong with it, or went wrong.
        """
        if camera not in [status.camera for status in self._control.statuses()]:
            msg = f"there is no camera {camera!r}"
            raise UsageError(msg)
        if not self._slots.acquire(blocking=False):
            msg = f"{MAX_ORDERS} orders are being carried out; wait for one of them"
            raise UsageError(msg)
        log.info("operator_order", camera=camera, action=order.action)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Done] = loop.create_future()

        def work() -> None:
            try:
                done = self._carry_out(camera, order)
            except EdgeFlameError as exc:
                _tell(loop, answer, exc)
            except Exception as exc:  # noqa: BLE001 - a thread's outermost frame
                log.error("order_failed", camera=camera, action=order.action, reason=repr(exc))
                _tell(loop, answer, RuntimeUnavailableError(f"the order failed: {exc!r}"))
            else:
                _tell(loop, answer, done)
            finally:
                self._slots.release()

        threading.Thread(target=work, name="edgeflame-order", daemon=True).start()
        return await answer

    def _carry_out(self, camera: str, order: Order) -> Done:
        simple: dict[str, tuple[Callable[[], object], str]] = {
            "pause": (lambda: self._control.pause(camera), "Paused."),
            "resume": (lambda: self._control.resume(camera), "Goes on."),
            "acknowledge": (lambda: self._control.acknowledge(camera), "Noted that the self-test failed."),
            "drift-clear": (lambda: self._control.drift(camera, "clear"), "Cleared. Watching begins again."),
            "drift-relearn": (lambda: self._control.drift(camera, "relearn"), "The next parts are learnt."),
        }
        if order.action in simple:
            call, said = simple[order.action]
            call()
            return Done(ok=True, message=said)
        if order.action == "snapshot":
            taken: Snapshot = self._control.snapshot(camera)
            told = f"Kept as {taken.file}." if taken.file is not None else "The next part had no picture."
            return Done(ok=taken.file is not None, message=told)
        if order.action == "product":
            if order.product is None:
                msg = "say which product"
                raise UsageError(msg)
            self._control.switch_product(camera, order.product)
            return Done(ok=True, message=f"Judges {order.product} from the next part on.")
        if order.action == "rollback":
            product = next(status.product for status in self._control.statuses() if status.camera == camera)
            self._control.rollback(product)
            return Done(ok=True, message=f"{product}: back to the model before.")
        report = self._control.golden(camera, order.expected)
        assert isinstance(report, GoldenReport)
        verdict = "Self-test passed" if report.passed else "Self-test FAILED"
        return Done(ok=report.passed, message=f"{verdict}: {report.message}.")


def _tell(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Done], value: Done | EdgeFlameError) -> None:
    def tell() -> None:
        if answer.cancelled():
            return
        if isinstance(value, Done):
            answer.set_result(value)
        else:
            answer.set_exception(value)

    # The server may have stopped meanwhile; then nobody waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(tell)


def status_of(error: EdgeFlameError) -> int:
    """HTTP's word for an error: the request, or what it met."""
    return 400 if isinstance(error, UsageError) else 409
