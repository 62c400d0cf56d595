"""The control of a running daemon: every operation that commands, the operator's page and signals can call.

Self-tests, drift watchers and released models exist by configuration and are set while the daemon is put together; a
method that needs one that is missing raises :class:`UsageError`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, final

import msgspec

from edge.camera_worker import CameraWorker
from edge.cameras import Cameras, Overrides, Plan, ReloadReport
from edge.drift.watcher import DriftWatcher
from edge.golden_parts import GoldenTester
from edge.overlay import draw_overlay
from edge.result import Result
from edge.status import CameraStatus, GoldenReport, GoldenStatus
from edge.teaching.no_model import NO_PRODUCT
from edge.teaching.orders import ProductTeaching, TeachingOrder, TeachingStatus
from edgeflame.errors import DataError, EdgeFlameError, UsageError
from edgeflame.images import write_image
from edgeflame.log import EventLog
from edgeflame.marks import Mark, TrueLabel
from edgeflame.mqtt.release_messages import ProductModels
from edgeflame.state import storage_errors

log = EventLog("control")

SNAPSHOTS_FOLDER = "snapshots"
"""Name in the state folder."""
SNAPSHOT_TIMEOUT_S = 10.0
"""How long a snapshot waits for a part, seconds."""


class ModelSwitcher(Protocol):
    """The part of :class:`edge.models.released.ReleasedModels` that people control."""

    def roll_back(self, name: str, *, to_file: bool) -> ProductModels:
        """Go back to the model before, or to the configuration's file.

        Raises:
            UsageError: there is no such product, or nothing to go back to.
            EdgeFlameError: nothing earlier can be opened.
        """
        ...

    def promote(self, name: str) -> ProductModels:
        """Switch to the candidate that waits for a person's decision.

        Raises:
            UsageError: there is no such product, or no candidate waits.
        """
        ...

    def allow_older(self, name: str) -> ProductModels:
        """Take the release that was refused because its number is lower than one seen before.

        Raises:
            UsageError: there is no such product, or no such release.
        """
        ...

    def status_of(self, name: str) -> ProductModels | None:
        """A product's models; None if the fleet has no such product."""
        ...


class Marker(Protocol):
    """The part of :class:`edge.web.marks.PartMarks` that commands use."""

    def mark_part(self, camera: str | None, part_id: str, was: TrueLabel, *, kind: str | None, by: str) -> Mark:
        """Mark the last part of a name.

        Raises:
            UsageError: no such part is remembered, or several cameras have seen it.
            EdgeFlameError: the mark cannot be kept; nothing has changed.
        """
        ...


class ProductTeacher(Protocol):
    """The part of :class:`edge.teaching.teacher.LineTeacher` that people control."""

    def run(self, order: TeachingOrder) -> ProductTeaching:
        """Carry out an order about a product that is taught at this line.

        Raises:
            EdgeFlameError: the order makes no sense, or failed.
        """
        ...

    def status(self) -> TeachingStatus:
        """How all products that are taught stand."""
        ...


class LineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """The status of a daemon."""

    cameras: tuple[CameraStatus, ...]
    products: dict[str, str]
    """Package files by name."""


class CameraSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a camera, taken on request."""

    result: Result
    file: str | None
    """File of its picture with the heat map; None if there is no image, or no folder for snapshots."""


@final
class DaemonControl:
    """Every operation on a running daemon; thread-safe. ``camera`` may be None if there is only one.

    Args:
        cameras: the daemon's.
        overrides: keeps thresholds and products set by command over restarts.
        snapshots: folder for pictures of snapshots; None: none are kept.
        reread: reads the configuration again and returns its plan; None: it cannot be read again.
    """

    def __init__(
        self,
        cameras: Cameras,
        *,
        overrides: Overrides,
        snapshots: Path | None = None,
        reread: Callable[[], Plan] | None = None,
    ) -> None:
        self._cameras = cameras
        self._workers = {worker.name: worker for worker in cameras.workers}
        self._overrides = overrides
        self._snapshots = snapshots
        self._reread = reread
        self.golden: Mapping[str, GoldenTester] = {}
        """Self-testers by camera; set while the daemon is put together, as are the next two."""
        self.drift_watchers: Mapping[str, DriftWatcher] = {}
        """By camera; empty where drift is not watched."""
        self.models: ModelSwitcher | None = None
        """The released models; None without ``[models]``."""
        self.marker: Marker | None = None
        """Keeps marks; None without ``[web]``."""
        self.teacher: ProductTeacher | None = None
        """Teaches products; None without a state folder."""
        self._listeners: tuple[Callable[[], None], ...] = ()
        # One change at a time: two at once could leave a mixture.
        self._lock = threading.RLock()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change; it must not block."""
        self._listeners = (*self._listeners, listener)

    def changed(self) -> None:
        """Call the listeners: a status has changed."""
        for listener in self._listeners:
            listener()

    def describe(self) -> LineDescription:
        """The status of the daemon."""
        return LineDescription(
            cameras=self.statuses(), products={name: str(file) for name, file in self._cameras.products.items()}
        )

    def statuses(self) -> tuple[CameraStatus, ...]:
        """The status of each camera."""
        return tuple(self._status(worker) for worker in self._workers.values())

    def pause(self, camera: str | None = None) -> LineDescription:
        """Stop inspecting the parts of a camera, or of all (None).

        Raises:
            UsageError: there is no such camera; so in every method.
        """
        for worker in self._some(camera):
            worker.pause()
            log.warning("paused", camera=worker.name)
        return self._changed()

    def resume(self, camera: str | None = None) -> LineDescription:
        """Resume the inspection of a camera, or of all (None)."""
        for worker in self._some(camera):
            worker.resume()
            log.info("resumed", camera=worker.name)
        return self._changed()

    def set_threshold(self, camera: str | None, value: float | None) -> LineDescription:
        """Set the threshold of the model that a camera uses now; kept over restarts.

        Args:
            camera: the camera's name.
            value: raw distance; None: that of the configuration, or the package's own.

        Raises:
            UsageError: the value is not a positive finite number.
            StorageError: it cannot be written to the disk; nothing is changed then.
        """
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"a threshold is a positive number, not {value}")
        with self._lock:
            worker = self._one(camera)
            model, before = worker.inspector.model_id, worker.inspector.threshold
            kept = self._overrides.get(worker.name).thresholds.get(model)
            # Written first: a threshold in use must not be lost by a restart.
            self._overrides.set_threshold(worker.name, model, value)
            try:
                worker.set_threshold(value)
            except EdgeFlameError:
                self._overrides.set_threshold(worker.name, model, kept)
                raise
            log.warning("threshold_set", camera=worker.name, before=before, now=worker.inspector.threshold)
            return self._changed()

    def switch_product(self, camera: str | None, product: str) -> LineDescription:
        """Inspect another product from the next part on; kept over restarts.

        Raises:
            UsageError: there is no such product.
            StorageError: it cannot be written to the disk; nothing is changed then.
            EdgeFlameError: the product's package cannot be used here; the camera goes on as before.
        """
        with self._lock:
            worker = self._one(camera)
            products = self._cameras.products
            if product not in products and (product != NO_PRODUCT or self._cameras.plan.products):
                raise UsageError(f"no product {product!r}; there are {', '.join(products)}")
            inspector = self._cameras.open_inspector(worker.name, product)
            kept = self._overrides.get(worker.name)
            self._overrides.set_product(worker.name, product or None)
            try:
                before = worker.replace_inspector(inspector, threshold=kept.thresholds.get(inspector.model_id))
            except EdgeFlameError:
                self._overrides.set_product(worker.name, kept.product)
                raise
            log.warning(
                "product_switched",
                camera=worker.name,
                before=before.product,
                now=inspector.product,
                model=inspector.model_id,
            )
            return self._changed()

    def use_taught(self, camera: str, product: str, file: Path) -> None:
        """Inspect a product that was taught at this line with a package, on a camera and wherever it is inspected.

        Raises:
            EdgeFlameError: the package cannot be used here, or the switch cannot be kept; all cameras go on as before.
        """
        with self._lock:
            before = self._cameras.products.get(product)
            users = any(worker.inspector.product == product for worker in self._workers.values())
            try:
                if users and before is not None:
                    self._cameras.use_package(product, file, {})
                self._cameras.set_taught(product, file)
                if self._one(camera).inspector.product != product or self._one(camera).inspector.is_trial:
                    self.switch_product(camera, product)
            except EdgeFlameError:
                self._cameras.set_taught(product, before)
                if users and before is not None:
                    self._cameras.use_package(product, before, {})
                raise
            self.changed()

    def forget_taught(self, product: str, instead: str) -> None:
        """Inspect another product wherever this one, taught at this line, is inspected, and forget it.

        Args:
            product: the product.
            instead: name of the other; empty: none.

        Raises:
            EdgeFlameError: the other cannot be used; nothing is changed on the camera concerned then.
        """
        with self._lock:
            for worker in self._workers.values():
                if worker.inspector.product == product:
                    self.switch_product(worker.name, instead)
            self._cameras.set_taught(product, None)
            self.changed()

    def teach(self, order: TeachingOrder) -> ProductTeaching:
        """Carry out an order about a product that is taught at this line."""
        if self.teacher is None:
            raise _not_set_up("teaching (--state DIR)")
        return self.teacher.run(order)

    def snapshot(self, camera: str | None = None, *, timeout_s: float = SNAPSHOT_TIMEOUT_S) -> CameraSnapshot:
        """The next part of a camera: its result, and its picture with the heat map in a file.

        Raises:
            DataError: no part came in time, or the camera is paused.
            StorageError: the picture cannot be written.
        """
        worker = self._one(camera)
        if worker.is_paused:
            raise DataError(f"camera {worker.name} is paused: resume it first")
        inspected = worker.snapshot(timeout_s)
        if inspected is None:
            raise DataError(f"camera {worker.name}: no part came within {timeout_s:g} s")
        result = inspected.result
        if inspected.image is None or self._snapshots is None:
            return CameraSnapshot(result=result, file=None)
        picture = inspected.image
        if inspected.anomaly_map is not None:
            picture = draw_overlay(picture, inspected.anomaly_map, result.threshold, shown=inspected.shown_map)
        file = self._snapshots / f"{result.captured:%Y%m%dT%H%M%S%f}Z-{worker.name}-{result.part_file_name}.png"
        with storage_errors(self._snapshots, "keep snapshots"):
            self._snapshots.mkdir(parents=True, exist_ok=True)
        write_image(file, picture)
        return CameraSnapshot(result=result, file=str(file))

    def test_golden_parts(
        self, camera: str | None = None, expected: Literal["good", "bad"] | None = None
    ) -> GoldenReport:
        """Test a camera with the photographs of its golden parts, or with the next part, which is good or bad.

        Raises:
            UsageError: the daemon is not set up for it; so in the methods below.
            EdgeFlameError: the test cannot be made; see :meth:`GoldenTester.test`.
        """
        return self._tester(camera, "golden").test(expected)

    def acknowledge(self, camera: str | None = None) -> GoldenStatus:
        """Acknowledge a camera's failed self-test: it no longer makes the camera not ready."""
        return self._tester(camera, "acknowledge").acknowledge()

    def handle_drift(self, camera: str | None, action: Literal["clear", "relearn"]) -> CameraStatus:
        """Settle a camera's drift alarm.

        Args:
            camera: the camera's name.
            action: ``clear``: the cause was removed; ``relearn``: the present state is right, and becomes the
                reference.
        """
        worker = self._one(camera)
        watcher = self.drift_watchers.get(worker.name)
        if watcher is None:
            raise UsageError(f"camera {worker.name}: drift is not watched ([drift] enabled, and --state DIR)")
        if action == "clear":
            watcher.clear()
        else:
            watcher.relearn()
        return self._status(worker)

    def mark(self, camera: str | None, part_id: str, was: TrueLabel, *, kind: str | None = None, by: str = "") -> Mark:
        """Keep what a part that was inspected a short while ago really was; errors as :meth:`Marker.mark_part`."""
        if self.marker is None:
            raise UsageError("this daemon keeps no marks: they need [web], which remembers the last parts")
        return self.marker.mark_part(camera, part_id, was, kind=kind, by=by)

    def roll_back(self, product: str, *, to_file: bool = False) -> ProductModels:
        """Go back to the model before, or to the configuration's file, on every camera with this product."""
        if self.models is None:
            raise _not_set_up("rollback")
        return self.models.roll_back(product, to_file=to_file)

    def switch_model(self, product: str, *, allow_older: bool = False) -> ProductModels:
        """Switch to the released model that has passed its shadow run and waits for a person's decision.

        With ``allow_older`` take up the one that was refused because its number is lower than one seen before.
        """
        if self.models is None:
            raise _not_set_up("switch_model")
        return self.models.allow_older(product) if allow_older else self.models.promote(product)

    def reload(self) -> ReloadReport:
        """Read the configuration again and change what can be changed.

        Raises:
            EdgeFlameError: the configuration is wrong, or a package cannot be used; nothing is changed then.
        """
        if self._reread is None:
            raise _not_set_up("reload")
        with self._lock:
            try:
                report = self._cameras.reload(self._reread())
            except EdgeFlameError as exc:
                log.error("reload_refused", reason=str(exc))
                raise
            log.warning("reloaded", changed=",".join(report.changed), needs_restart=",".join(report.needs_restart))
            self.changed()
            return report

    def _tester(self, camera: str | None, what: str) -> GoldenTester:
        tester = self.golden.get(self._one(camera).name)
        if tester is None:
            raise _not_set_up(what)
        return tester

    def _some(self, camera: str | None) -> Sequence[CameraWorker]:
        return list(self._workers.values()) if camera is None else [self._one(camera)]

    def _one(self, camera: str | None) -> CameraWorker:
        if camera is None and len(self._workers) == 1:
            return next(iter(self._workers.values()))
        worker = None if camera is None else self._workers.get(camera)
        if worker is None:
            what = "say which camera" if camera is None else f"no camera {camera!r}"
            raise UsageError(f"{what}; there are {', '.join(self._workers)}")
        return worker

    def _changed(self) -> LineDescription:
        self.changed()
        return self.describe()

    def _status(self, worker: CameraWorker) -> CameraStatus:
        status = worker.status()
        watcher, tester = self.drift_watchers.get(worker.name), self.golden.get(worker.name)
        problem = None if tester is None else tester.problem()
        if not status.model:
            problem = "no product has been taught yet"
        return msgspec.structs.replace(
            status,
            drift=None if watcher is None else watcher.status(),
            golden=None if tester is None else tester.status(),
            not_ready=() if problem is None else (problem,),
            models=None if self.models is None else self.models.status_of(status.product),
        )


def _not_set_up(what: str) -> UsageError:
    return UsageError(f"this daemon is not set up for {what}")
