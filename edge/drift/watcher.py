"""The drift watcher of a camera: feeds its parts to the drift monitor on a thread of its own, and saves its state.

There is one file for each camera and model, ``DIR/drift/<camera>/<model>.json``; if a camera returns to an earlier
model, its monitor continues from there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from edge.config.inspection import DriftConfig
from edge.drift.monitor import DriftMonitor, SavedMonitor
from edge.frame import Captured
from edge.result import Inspected
from edge.status import DriftCondition, DriftStatus
from edgeflame.background import BackgroundThread
from edgeflame.drift_reference import PART_STREAMS, AlignmentTemplate, DriftReference, image_streams, part_streams
from edgeflame.errors import StorageError
from edgeflame.images import Preprocessing
from edgeflame.log import EventLog
from edgeflame.package import Package
from edgeflame.state import read_json, storage_errors, write_record

log = EventLog("drift")

MAX_WAITING = 8
"""Parts queued between the camera worker and this thread; further ones are skipped, which does drift no harm."""

SAVE_EVERY_S = 60.0
"""Longest time between two saves, seconds; a kill loses no more than this."""

MAX_MODELS = 20
"""Number of files kept for one camera; those of the models that ran longest ago are deleted."""

_CLOSE_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftModel:
    """What the drift watcher needs of the model in use."""

    model: str
    """First 12 digits of the package's SHA-256, which name the file."""
    preprocessing: Preprocessing
    """From the area that the model sees to its input."""
    reference: DriftReference | None
    template: AlignmentTemplate | None

    @classmethod
    def of(cls, package: Package, *, scores_as_fitted: bool) -> DriftModel:
        """Read it from a package.

        Args:
            package: the model's.
            scores_as_fitted: whether scores may be compared with those of the fit. Not if areas are ignored, nor in
                int8: then references of the parts' streams are learnt from the line's parts.
        """
        preprocessing = package.manifest.learning.input
        images = [reference.image(preprocessing) for reference in package.references]
        reference = package.condition
        if reference is not None and not scores_as_fitted:
            kept = {name: one for name, one in reference.streams.items() if name not in PART_STREAMS}
            reference = DriftReference(streams=kept)
        return cls(
            model=package.sha256[:12],
            preprocessing=preprocessing.without_roi(),
            reference=reference,
            template=AlignmentTemplate(images) if images else None,
        )


@final
class DriftWatcher:
    """Watches the drift of one camera; a context manager, which ends its thread and saves when it is left.

    Args:
        camera: the camera's name.
        config: section ``[drift]``.
        model: id of the model in use at the start.
        model_of: gives what is needed of a model by its id; None if it is not in use any more: nothing is watched.
        folder: for the files; None: nothing outlives the run.
        on_change: called when the camera's condition changes.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        camera: str,
        config: DriftConfig,
        model: str,
        model_of: Callable[[str], DriftModel | None],
        *,
        folder: Path | None,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._camera = camera
        self._config = config
        self._model_of = model_of
        self._folder = folder / camera if folder is not None else None
        self._on_change = on_change
        self._clock = clock
        self._queue: queue.Queue[Inspected | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._running: DriftModel | None = None
        self._monitor: DriftMonitor | None = None
        self._next_part = 0.0
        self._last_save = clock()
        self._switch_model(model)
        self._thread = BackgroundThread(f"drift-{camera}", self._run, wake=self._wake, join_s=_CLOSE_TIMEOUT_S)

    def __enter__(self) -> DriftWatcher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A thread that hangs, on a disk say, may hold the lock for ever; what it knew is lost since the last save.
        if self._thread.close():
            with self._lock:
                self._save()
        else:
            log.error("drift_not_saved", camera=self._camera, reason=f"its thread hangs for {_CLOSE_TIMEOUT_S:g} s")

    def on_part(self, captured: Captured, inspected: Inspected) -> None:
        """Queue one part, on the camera worker's thread; it is skipped if parts come too fast."""
        del captured
        now = self._clock()
        # Without a map there is no picture, or it is not the area that the model sees.
        if inspected.image is None or inspected.anomaly_map is None or inspected.result.golden or now < self._next_part:
            return
        try:
            self._queue.put_nowait(inspected)
        except queue.Full:
            return
        self._next_part = max(self._next_part, now - 1.0) + 1.0 / self._config.max_per_s

    def status(self) -> DriftStatus | None:
        """The drift status; None if the model is not known here."""
        with self._lock:
            return self._monitor.status() if self._monitor is not None else None

    def clear(self) -> None:
        """Clear alarms: their cause was removed."""
        self._change("drift_cleared", DriftMonitor.clear)

    def relearn(self) -> None:
        """Learn the references anew: the present state is right."""
        self._change("drift_relearns", DriftMonitor.relearn)

    def _change(self, event: str, change: Callable[[DriftMonitor], None]) -> None:
        with self._lock:
            if self._monitor is not None:
                log.warning(event, camera=self._camera, was=self._monitor.status().message)
                change(self._monitor)
                self._save()
        self._on_change()

    def _wake(self) -> None:
        # If the queue is full the thread does not wait for a part.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def _run(self, stop: threading.Event) -> None:
        while not (stop.is_set() and self._queue.empty()) and (inspected := self._queue.get()) is not None:
            try:
                self._observe(inspected)
            except Exception as exc:  # noqa: BLE001 - the thread's outermost frame: a part is left out, watching goes on
                log.error("drift_failed", camera=self._camera, part=inspected.result.part_id, reason=repr(exc))

    def _observe(self, inspected: Inspected) -> None:
        result, image = inspected.result, inspected.image
        assert image is not None
        with self._lock:
            self._switch_model(result.model)
            monitor, running = self._monitor, self._running
        if monitor is None or running is None:
            return
        # The picture is the area that the model saw; resized, it is the model's input.
        seen = running.preprocessing.apply(image)
        values = {
            **part_streams(result.score, inspected.anomaly_map),
            **image_streams(seen, running.template),
        }
        with self._lock:
            before = monitor.status().condition
            changes = monitor.observe(values, dt.datetime.now(dt.timezone.utc))
            after = monitor.status()
            if changes or self._clock() - self._last_save >= SAVE_EVERY_S:
                self._save()
        for change in changes:
            report = {DriftCondition.ALARM: log.error, DriftCondition.WARNING: log.warning}.get(change.after, log.info)
            report(
                "drift",
                camera=self._camera,
                stream=change.stream,
                direction=change.direction,
                before=change.before.value,
                now=change.after.value,
            )
        if after.condition is not before:
            log.warning("drift_condition", camera=self._camera, now=after.condition.value, reason=after.message)
            self._on_change()

    def _switch_model(self, model: str) -> None:
        """Change to the monitor of the model in use now, if it is another one."""
        if self._running is not None and self._running.model == model:
            return
        self._save()
        self._running = self._model_of(model)
        self._monitor = None
        if self._running is not None:
            self._monitor = DriftMonitor(self._config, self._running.reference, self._read(model))

    def _file(self, model: str) -> Path | None:
        return self._folder / f"{model}.json" if self._folder is not None else None

    def _read(self, model: str) -> SavedMonitor | None:
        file = self._file(model)
        if file is None:
            return None
        try:
            saved = read_json(file, SavedMonitor, advice="it is not used")
        except StorageError as exc:
            log.warning("drift_state_unreadable", file=str(file), reason=str(exc), consequence="begins anew")
            return None
        return saved if saved is not None and saved.format == SavedMonitor().format else None

    def _save(self) -> None:
        """Write the monitor's state, and delete old files; the caller holds the lock."""
        self._last_save = self._clock()
        if self._folder is None or self._monitor is None or self._running is None:
            return
        file = self._file(self._running.model)
        assert file is not None
        try:
            with storage_errors(self._folder, "keep what is known of drift"):
                self._folder.mkdir(parents=True, exist_ok=True)
            write_record(file, self._monitor.saved())
            with storage_errors(self._folder, "keep what is known of drift"):
                kept = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
                for old in kept[MAX_MODELS:]:
                    old.unlink(missing_ok=True)
        except StorageError as exc:
            # Drift is advice only: the inspection goes on without saving it.
            log.error("drift_not_saved", camera=self._camera, reason=str(exc))
