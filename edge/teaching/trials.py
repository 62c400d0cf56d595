"""Trials of a model that was learnt: beside the present one, without effect, or alone, with its verdicts marked.

A trial ends with the daemon: after a restart the camera inspects as before it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from edge.camera_worker import CameraWorker
from edge.cameras import Cameras
from edge.inspector import Inspector, InspectorProtocol
from edge.models.rollout import single_threaded
from edge.models.shadow import Shadow, ShadowModel
from edge.teaching.collector import Collector
from edge.teaching.no_model import NoModel
from edge.teaching.orders import TrialStatus
from edgeflame.errors import RuntimeUnavailableError, UsageError
from edgeflame.log import EventLog
from edgeflame.package import read_package

log = EventLog("teaching")


@dataclass(frozen=True, kw_only=True)
class _Trial:
    camera: str
    shadow: Shadow | None = None
    """Beside the present model."""
    before: InspectorProtocol | None = None
    """What inspected before, where the model is tried alone."""


@final
class Trials:
    """The trials of a daemon, one a camera; used by one thread at a time.

    Args:
        cameras: the daemon's.
        collectors: hand a shadow run its parts, by camera.
    """

    def __init__(self, cameras: Cameras, collectors: Mapping[str, Collector]) -> None:
        self._cameras = cameras
        self._collectors = collectors
        self._workers = {worker.name: worker for worker in cameras.workers}
        self._trials: dict[str, _Trial] = {}
        self._lock = threading.Lock()

    def begin(self, product: str, camera: str, file: Path, *, alone: bool, folder: Path) -> None:
        """Try a package.

        Args:
            product: the product's name.
            camera: on which it is tried.
            file: the package.
            alone: whether in place of the present model.
            folder: for pictures of parts on which the two differ.

        Raises:
            UsageError: another product is being tried on the camera, or there is no model to be beside.
            EdgeFlameError: the package cannot be used here; the camera goes on as before.
        """
        with self._lock:
            self._end(product)
            other = next((name for name, one in self._trials.items() if one.camera == camera), None)
            if other is not None:
                raise UsageError(f"{other} is being tried on camera {camera}; end that first")
            worker = self._workers[camera]
            if alone:
                self._trials[product] = self._begin_alone(worker, product, file)
            elif isinstance(worker.inspector, NoModel):
                raise UsageError(f"camera {camera} has no model yet that it could be tried beside; try it alone")
            else:
                self._trials[product] = self._begin_beside(worker, product, file, folder)
        log.info("trial_begun", product=product, camera=camera, alone=alone)

    def end(self, product: str) -> bool:
        """End a product's trial; returns whether there was one."""
        with self._lock:
            return self._end(product)

    def status(self, product: str) -> TrialStatus | None:
        """How a trial goes; None if there is none."""
        with self._lock:
            trial = self._trials.get(product)
        if trial is None:
            return None
        if trial.shadow is None:
            is_on = self._workers[trial.camera].inspector.is_trial
            return TrialStatus(alone=True, problem=None if is_on else "another product was switched to meanwhile")
        progress = trial.shadow.progress()
        return TrialStatus(alone=False, found=progress.disagreement, problem=progress.problem)

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            for product in list(self._trials):
                try:
                    self._end(product)
                except RuntimeUnavailableError as exc:
                    log.error("trial_not_ended", product=product, reason=str(exc))

    def _begin_alone(self, worker: CameraWorker, product: str, file: Path) -> _Trial:
        opened = self._cameras.open_package(worker.name, product, file)
        assert isinstance(opened, Inspector)
        # No frame is lost between the two.
        return _Trial(camera=worker.name, before=worker.replace_inspector(opened.on_trial()))

    def _begin_beside(self, worker: CameraWorker, product: str, file: Path, folder: Path) -> _Trial:
        def opened() -> ShadowModel:
            package = read_package(file)
            settings = self._cameras.settings(worker.name)
            inspector = Inspector(package, single_threaded(package), settings, camera=worker.name, product=product)
            return ShadowModel(inspectors={worker.name: inspector})

        shadow = Shadow(opened, folder=folder)
        self._collectors[worker.name].others = shadow.offer
        return _Trial(camera=worker.name, shadow=shadow)

    def _end(self, product: str) -> bool:
        trial = self._trials.get(product)
        if trial is None:
            return False
        worker = self._workers[trial.camera]
        if trial.shadow is not None:
            self._collectors[trial.camera].others = None
            trial.shadow.close()
        elif worker.inspector.is_trial and trial.before is not None:
            # Its configuration may have been read again meanwhile.
            before = trial.before
            again = before.reconfigured(self._cameras.settings(trial.camera))
            was_set = before.threshold != again.threshold
            worker.replace_inspector(again, threshold=before.threshold if was_set else None)
        del self._trials[product]
        log.info("trial_ended", product=product, camera=trial.camera)
        return True
