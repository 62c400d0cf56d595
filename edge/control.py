"""Everything a person or a program may ask of a running daemon, wherever the asking comes from.

Commands over the broker, the operator's page and signals all come through here. What other parts of the daemon can do
(a golden-part test, a roll-back) they register.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, final

import msgspec

from edge.camera_worker import CameraWorker
from edge.cameras import Overrides
from edge.inspector import InspectorProtocol
from edge.overlay import draw_overlay
from edge.result import Result
from edge.status import CameraStatus
from edgeflame.errors import DataError, EdgeFlameError, UsageError
from edgeflame.images import write_image
from edgeflame.log import EventLog
from edgeflame.state import storage_errors

log = EventLog("control")

SNAPSHOTS_FOLDER = "snapshots"
SNAPSHOT_TIMEOUT_S = 10.0

Registered = Literal["golden", "acknowledge", "drift", "rollback", "switch_model", "reload"]


class LineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon is doing."""

    cameras: tuple[CameraStatus, ...]
    products: dict[str, str]
    """Package files by name."""


class CameraSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The next part of a camera."""

    result: Result
    file: str | None
    """Its picture with the heat map; None where the camera gave none, or there is no folder to keep it in."""


@final
class DaemonControl:
    """The daemon's cameras under one hand; safe for any thread.

    Args:
        lines: the cameras, in order.
        products: package files by the product's name, as they are now.
        load: makes the judge of a camera (first) for a product (second).
        overrides: keeps what outlives a restart.
        folder: for snapshots; None: there is none.
    """

    def __init__(
        self,
        lines: Sequence[CameraWorker],
        *,
        products: Callable[[], Mapping[str, Path]],
        load: Callable[[str, str], InspectorProtocol],
        overrides: Overrides,
        folder: Path | None = None,
    ) -> None:
        self._lines = {line.name: line for line in lines}
        self._products = products
        self._load = load
        self._overrides = overrides
        self._folder = folder
        self._handlers: dict[Registered, Callable[..., msgspec.Struct]] = {}
        self._listeners: tuple[Callable[[], None], ...] = ()
        self._annotators: tuple[Callable[[CameraStatus], CameraStatus], ...] = ()
        # One change at a time: two that meet would leave neither's wish.
        self._lock = threading.RLock()

    def register(self, name: Registered, handler: Callable[..., msgspec.Struct]) -> None:
        """Let another part of the daemon answer a request."""
        self._handlers[name] = handler

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change; it must not wait."""
        self._listeners = (*self._listeners, listener)

    def annotate(self, annotator: Callable[[CameraStatus], CameraStatus]) -> None:
        """Let another part of the daemon add what it knows to each camera's status."""
        self._annotators = (*self._annotators, annotator)

    def changed(self) -> None:
        """Something about a status is another than before: tell those who want to know."""
        for listener in self._listeners:
            listener()

    def describe(self) -> LineDescription:
        """What the daemon is doing."""
        return LineDescription(
            cameras=self.statuses(), products={name: str(file) for name, file in self._products().items()}
        )

    def statuses(self) -> tuple[CameraStatus, ...]:
        """What each camera is doing."""
        return tuple(self._annotated(line.status()) for line in self._lines.values())

    def pause(self, camera: str | None = None) -> LineDescription:
        """Judge no more parts of a camera, or of all.

        Raises:
            UsageError: there is no such camera; here and in every method.
        """
        for line in self._some(camera):
            line.pause()
            log.warning("paused", camera=line.name)
        return self._changed()

    def resume(self, camera: str | None = None) -> LineDescription:
        """Go on with a camera, or all."""
        for line in self._some(camera):
            line.resume()
            log.info("resumed", camera=line.name)
        return self._changed()

    def set_threshold(self, camera: str | None, value: float | None) -> LineDescription:
        """Another threshold for the model a camera uses now, kept over restarts.

        Args:
            camera: which.
            value: raw distance; None: that of the configuration, or the package's own.

        Raises:
            UsageError: that is no threshold.
            StorageError: it cannot be kept; nothing is changed then.
        """
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"a threshold is a positive number, not {value}")
        with self._lock:
            line = self._one(camera)
            model, before = line.judge.model_id, line.judge.threshold
            kept = self._overrides.of(line.name).thresholds.get(model)
            # Kept first: a threshold that a restart would take back in silence is worse than none.
            self._overrides.set_threshold(line.name, model, value)
            try:
                line.set_threshold(value)
            except EdgeFlameError:
                self._overrides.set_threshold(line.name, model, kept)
                raise
            log.warning("threshold_set", camera=line.name, before=before, now=line.judge.threshold)
            return self._changed()

    def switch_product(self, camera: str | None, product: str) -> LineDescription:
        """Judge another product from the next part on; kept over restarts.

        Raises:
            UsageError: there is no such product.
            StorageError: it cannot be kept; nothing is changed then.
            EdgeFlameError: its package may not judge here; the camera goes on as before.
        """
        with self._lock:
            line = self._one(camera)
            products = self._products()
            if product not in products:
                raise UsageError(f"no product {product!r}; there are {', '.join(products)}")
            judge = self._load(line.name, product)
            kept = self._overrides.of(line.name)
            self._overrides.set_product(line.name, product)
            try:
                before = line.use(judge, threshold=kept.thresholds.get(judge.model_id))
            except EdgeFlameError:
                self._overrides.set_product(line.name, kept.product)
                raise
            log.warning(
                "product_switched", camera=line.name, before=before.product, now=judge.product, model=judge.model_id
            )
            return self._changed()

    def snapshot(self, camera: str | None = None, *, timeout_s: float = SNAPSHOT_TIMEOUT_S) -> CameraSnapshot:
        """The next part of a camera: its result, and its picture with the heat map in a file.

        Raises:
            DataError: none came in time, or the camera is paused.
            StorageError: the picture cannot be kept.
        """
        line = self._one(camera)
        if line.is_paused:
            raise DataError(f"camera {line.name} is paused: resume it first")
        inspected = line.snapshot(timeout_s)
        if inspected is None:
            raise DataError(f"camera {line.name}: no part came within {timeout_s:g} s")
        result = inspected.result
        if inspected.image is None or self._folder is None:
            return CameraSnapshot(result=result, file=None)
        picture = inspected.image
        if inspected.anomaly_map is not None:
            picture = draw_overlay(picture, inspected.anomaly_map, result.threshold)
        part = re.sub(r"[^A-Za-z0-9_.]+", "_", result.part_id)[-60:]
        file = self._folder / f"{result.captured:%Y%m%dT%H%M%S%f}Z-{line.name}-{part}.png"
        with storage_errors(self._folder, "keep snapshots"):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_image(file, picture)
        return CameraSnapshot(result=result, file=str(file))

    def golden(self, camera: str | None = None, expected: Literal["good", "bad"] | None = None) -> msgspec.Struct:
        """Test a camera with the photographs of its golden parts, or with the next part, which is good or bad.

        Raises:
            UsageError: nothing here can do that; so with the next ones.
            EdgeFlameError: what the one who can do it says.
        """
        return self._registered("golden")(self._one(camera).name, expected)

    def acknowledge(self, camera: str | None = None) -> msgspec.Struct:
        """A person takes note that a camera's self-test failed; it is no longer a reason not to be ready."""
        return self._registered("acknowledge")(self._one(camera).name)

    def drift(self, camera: str | None, action: Literal["clear", "relearn"]) -> msgspec.Struct:
        """What was done about a camera's drift: the cause was removed, or the line as it is now is right."""
        return self._registered("drift")(self._one(camera).name, action)

    def rollback(self, product: str, *, to_file: bool = False) -> msgspec.Struct:
        """Go back to the model before, or to the configuration's file, on every camera with this product."""
        return self._registered("rollback")(product, to_file)

    def switch_model(self, product: str) -> msgspec.Struct:
        """Switch to the released model that has passed its shadow run and waits for this word."""
        return self._registered("switch_model")(product)

    def reload(self) -> msgspec.Struct:
        """Read the configuration again and change what can be changed; nothing, where it is wrong."""
        handler = self._registered("reload")
        with self._lock:
            try:
                done = handler()
            except EdgeFlameError as exc:
                log.error("reload_refused", reason=str(exc))
                raise
            log.warning("reloaded", **{name: ",".join(getattr(done, name)) for name in done.__struct_fields__})
            self._changed()
            return done

    def _registered(self, name: Registered) -> Callable[..., msgspec.Struct]:
        handler = self._handlers.get(name)
        if handler is None:
            raise UsageError(f"this daemon is not set up for {name}")
        return handler

    def _some(self, camera: str | None) -> Sequence[CameraWorker]:
        return list(self._lines.values()) if camera is None else [self._one(camera)]

    def _one(self, camera: str | None) -> CameraWorker:
        if camera is None and len(self._lines) == 1:
            return next(iter(self._lines.values()))
        line = None if camera is None else self._lines.get(camera)
        if line is None:
            said = "say which camera" if camera is None else f"no camera {camera!r}"
            raise UsageError(f"{said}; there are {', '.join(self._lines)}")
        return line

    def _changed(self) -> LineDescription:
        self.changed()
        return self.describe()

    def _annotated(self, status: CameraStatus) -> CameraStatus:
        for annotator in self._annotators:
            status = annotator(status)
        return status
