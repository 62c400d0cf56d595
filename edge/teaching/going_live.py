"""Going live with a model that was learnt, and going back: what must fit before, and what is kept over restarts."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import final

import msgspec

from edge.camera_worker import CameraWorker
from edge.cameras import Cameras
from edge.control import DaemonControl
from edge.teaching.look import with_threshold
from edge.teaching.record import MODELS_KEPT, LiveModel, TeachingRecord, TeachingStore
from edgeflame.errors import ConfigError, DataError, StorageError, UsageError
from edgeflame.package import read_package
from edgeflame.state import atomic_copy
from fitting.scores import read_scores


@final
class GoingLive:
    """Puts models that were learnt on the cameras.

    Args:
        store: the records.
        cameras: the daemon's.
        control: switches products.
    """

    def __init__(self, store: TeachingStore, cameras: Cameras, control: DaemonControl) -> None:
        self._store = store
        self._cameras = cameras
        self._control = control

    def require_fits(self, record: TeachingRecord, frame: tuple[int, int] | None) -> None:
        """Refuse a model that the camera would not use as it was learnt.

        Args:
            record: the product's.
            frame: width and height of what the camera gives now; None: nothing yet.

        Raises:
            DataError: the camera's pictures have another size than those that were learnt from.
            ConfigError: the configuration has a threshold or a region that would take the place of those learnt.
        """
        if frame is not None and record.frame is not None and frame != record.frame:
            raise DataError(other_size(record, frame))
        settings = self._cameras.settings(record.camera)
        if settings.verdict.threshold is not None:
            raise ConfigError(
                "verdict.threshold is set, a raw distance of another model, and would hold for this one: take it out "
                "of the configuration"
            )
        if settings.roi.crop is not None:
            raise ConfigError(
                f"roi.crop of camera {record.camera} would take the place of the region that was taught: take it out "
                "of the configuration"
            )

    def package_as_chosen(self, record: TeachingRecord, name: str) -> Path:
        """Write the model learnt, with the threshold that was chosen, as ``name`` in the product's folder."""
        assert record.learnt is not None
        folder = self._store.path(record.product)
        source, target = folder / record.learnt.file, folder / name
        if record.learnt.chosen is None:
            atomic_copy(source, target)
            return target
        scores = read_scores(source.with_suffix(".json"))
        if scores is None:
            raise DataError(f"{source.with_suffix('.json')}: the scores are gone; learn again")
        with_threshold(source, target, scores, record.learnt.chosen)
        return target

    def go_live(self, record: TeachingRecord, worker: CameraWorker) -> None:
        """Inspect with the model learnt from the next part on, also after a restart.

        Raises:
            EdgeFlameError: it cannot be used or kept here; the camera goes on as before.
        """
        number = 1 + max((int(Path(one.file).stem) for one in record.live), default=0)
        file = self.package_as_chosen(record, f"models/{number}.edgeflame")
        judged = worker.inspector.product
        try:
            sha256 = read_package(file).sha256
            self._control.use_taught(record.camera, record.product, file)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        live = LiveModel(file=f"models/{number}.edgeflame", model=sha256[:12], since=dt.datetime.now(dt.timezone.utc))
        models, before = (live, *record.live), record.before if judged == record.product else judged
        try:
            self._store.change(
                record.product,
                lambda one: msgspec.structs.replace(one, live=models[: 1 + MODELS_KEPT], before=before, problem=None),
            )
        except StorageError:
            # Not kept over a restart, so it must not run now.
            self._use(record, record.live, judged)
            raise
        for old in models[1 + MODELS_KEPT :]:
            (self._store.path(record.product) / old.file).unlink(missing_ok=True)

    def go_back(self, record: TeachingRecord) -> None:
        """Go back to the model before, or to the product that the camera inspected before.

        Raises:
            UsageError: there is nothing to go back from.
            EdgeFlameError: nothing earlier can be opened; the camera goes on as before.
        """
        if not record.live:
            raise UsageError(f"{record.product} has not gone live; there is nothing to go back from")
        earlier = record.live[1:]
        self._use(record, earlier, record.before or "")
        self._store.change(record.product, lambda one: msgspec.structs.replace(one, live=earlier))
        (self._store.path(record.product) / record.live[0].file).unlink(missing_ok=True)

    def _use(self, record: TeachingRecord, live: tuple[LiveModel, ...], before: str) -> None:
        """Have the camera inspect with the newest of these models, or the product before if there are none."""
        if live:
            self._control.use_taught(record.camera, record.product, self._store.path(record.product) / live[0].file)
        else:
            self._control.forget_taught(record.product, before)


def other_size(record: TeachingRecord, frame: tuple[int, int] | None) -> str:
    """That the camera gives pictures of another size than was collected, in words."""
    given = "?" if frame is None else f"{frame[0]}x{frame[1]}"
    kept = "?" if record.frame is None else f"{record.frame[0]}x{record.frame[1]}"
    return (
        f"camera {record.camera} gives {given} pixels now, and the photographs have {kept}: set the camera back, or "
        "begin another product"
    )
