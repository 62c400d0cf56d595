"""The teacher: carries out orders about products that are taught at this line, and says how they stand.

Orders come over HTTP, MQTT and the command line. One at a time changes something, so that two people who teach at once
see each other's changes and do not mix them. Nothing here holds up a camera: pictures are taken by the collectors,
models learnt in a process of their own, and a model that is to go live is opened and checked before the camera is asked
to use it between two parts.
"""

from __future__ import annotations

import datetime as dt
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import final

import msgspec

from edge.camera_worker import CameraWorker
from edge.cameras import Cameras
from edge.config.outputs import TeachingConfig
from edge.control import DaemonControl
from edge.teaching.basis import BasisChooser, MarkCounter
from edge.teaching.collector import Collector, look_alike
from edge.teaching.going_live import GoingLive, other_size
from edge.teaching.learning import (
    MODEL_FILE,
    SCORES_FILE,
    LearningProcess,
    LearningResult,
    Outcome,
)
from edge.teaching.look import PictureKind, as_jpeg, photograph_jpeg
from edge.teaching.orders import ProductTeaching, TeachingOrder, TeachingStatus
from edge.teaching.record import FOLDER, LearntMarks, TaughtModel, TeachingRecord, TeachingStore, check_region
from edge.teaching.standing import STEPS, standing_of
from edge.teaching.trials import Trials
from edgeflame.cpus import usable_cpus
from edgeflame.errors import DataError, EdgeFlameError, UsageError
from edgeflame.log import EventLog
from edgeflame.marks import MarkStore
from edgeflame.mqtt.topics import check_name
from edgeflame.package import read_package
from edgeflame.state import atomic_copy, storage_errors
from fitting.scores import FitScores, read_scores

log = EventLog("teaching")

MIN_PARTS, MIN_PARTS_WITH_PRIOR = 10, 5
"""Good parts below which nothing is learnt: a threshold of fewer would be a guess."""
_INTERRUPTED = "learning was interrupted by the end of the daemon; the photographs are all there: learn again"
TAKE_TIMEOUT_S = 10.0

replace = msgspec.structs.replace


@final
class LineTeacher:
    """Everything about the products that are taught at a line; thread-safe, a context manager.

    Args:
        state: the state folder, locked by this process.
        cameras: the daemon's.
        control: switches products.
        config: section ``[teaching]``.
        marks: what people said parts really were.
        torch: whether PyTorch could make a base network.
    """

    def __init__(
        self,
        state: Path,
        cameras: Cameras,
        control: DaemonControl,
        config: TeachingConfig,
        marks: MarkStore,
        *,
        torch: bool = False,
    ) -> None:
        self._store = TeachingStore(state / FOLDER)
        self._cameras = cameras
        self._control = control
        self._basis = BasisChooser(self._store, cameras, marks, config.base, torch=torch)
        self._lock = threading.RLock()
        self._workers = {worker.name: worker for worker in cameras.workers}
        self._collectors = {
            name: Collector(name, self._store, lambda name=name: cameras.settings(name).image_quality)  # type: ignore[misc]
            for name in self._workers
        }
        self._trials = Trials(cameras, self._collectors)
        self._live = GoingLive(self._store, cameras, control)
        self._learner = LearningProcess(
            cores=config.cores or max(1, usable_cpus() // 2),
            max_memory_mib=config.max_memory_mib,
            on_done=self._learnt,
            on_progress=self._store.touched,
        )

    def __enter__(self) -> LineTeacher:
        for name, collector in self._collectors.items():
            collector.__enter__()
            self._workers[name].add_listener(collector)
        for record in self._store.records:
            if record.learning_since is not None:
                problem = (
                    "learning was interrupted by the end of the daemon; the photographs are all there: learn again"
                )
                self._store.change(
                    record.product,
                    lambda one, text=problem: replace(one, learning_since=None, problem=text),  # type: ignore[misc]
                )
            if record.collecting and record.camera in self._collectors:
                self._collectors[record.camera].begin(record.product)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._learner.close()
        self._trials.close()
        for name, collector in self._collectors.items():
            self._workers[name].remove_listener(collector)
            collector.__exit__(kind, value, traceback)

    @property
    def version(self) -> int:
        """Rises with every change."""
        return self._store.version

    def run(self, order: TeachingOrder) -> ProductTeaching:
        """Carry out an order; returns how the product stands then.

        Raises:
            EdgeFlameError: the order makes no sense, or failed; nothing is changed then.
        """
        if order.action != "status":
            log.info("teaching_order", action=order.action, product=order.product)
        if order.action == "take":
            # It waits for a part, and must not hold up another person's orders.
            self._take(order)
        elif order.action != "status":
            actions: Mapping[str, Callable[[TeachingOrder], None]] = {
                "new": self._begin,
                "region": self._set_region,
                "collect": self._collect,
                "stop": self._stop,
                "join": self._group,
                "part": self._group,
                "throw-out": self._sort_out,
                "take-back": self._sort_out,
                "learn": self._learn,
                "cancel": self._cancel,
                "threshold": self._choose,
                "try": self._try,
                "end-trial": self._end_trial,
                "live": self._go_live,
                "back": self._go_back,
                "discard": self._discard,
            }
            with self._lock:
                actions[order.action](order)
                self._store.touched()
            if order.action == "discard":
                return self._status(TeachingRecord(product=order.product, camera="", created=_now()), MarkCounter())
        return self._status(self._store.get(order.product), self._basis.marked())

    def status(self) -> TeachingStatus:
        """How all products stand."""
        frames = {name: frame for name in self._collectors if (frame := self._frame(name)) is not None}
        marked = self._basis.marked()
        return TeachingStatus(
            products=tuple(self._status(record, marked) for record in self._store.records),
            frames=frames,
            damaged=dict(self._store.damaged),
        )

    def scores(self, product: str) -> FitScores:
        """The scores of the model learnt last, to be looked at.

        Raises:
            DataError: nothing has been learnt.
        """
        record = self._store.get(product)
        scores = None if record.learnt is None else self._scores(record)
        if scores is None:
            raise DataError(f"{product}: nothing has been learnt yet")
        return scores

    def picture(self, product: str, kind: PictureKind, name: str, *, side: int) -> bytes | None:
        """A picture as JPEG; None if there is none."""
        record = self._store.get(product)
        return photograph_jpeg(record, self._store.path(product), kind, name, side=side)

    def frame(self, camera: str, *, side: int) -> bytes | None:
        """The last picture of a camera, whole, as JPEG; None before the first."""
        collector = self._collectors.get(camera)
        last = None if collector is None else collector.last
        if last is None or last.frame.image_bgr is None:
            return None
        return as_jpeg(last.frame.image_bgr, side)

    # Orders.

    def _begin(self, order: TeachingOrder) -> None:
        check_name("product", order.product)
        if order.product in self._cameras.plan.products:
            raise UsageError(
                f"{order.product} is a product of the configuration, whose package it names: choose another name here"
            )
        camera = order.camera
        if camera is None and len(self._workers) == 1:
            camera = next(iter(self._workers))
        if camera not in self._workers:
            raise UsageError(f"say which camera: {', '.join(self._workers)}")
        self._store.create(TeachingRecord(product=order.product, camera=camera, created=_now()))

    def _set_region(self, order: TeachingOrder) -> None:
        record = self._idle(order.product)
        if order.region is not None:
            check_region(order.region, self._frame(record.camera) or record.frame)
        self._store.change(order.product, lambda one: replace(one, region=order.region))

    def _collect(self, order: TeachingOrder) -> None:
        record = self._idle(order.product)
        collector = self._collector(record)
        other = collector.product
        if other not in (None, record.product):
            raise UsageError(f"camera {record.camera} collects for {other}; stop that first")
        frame = self._frame(record.camera)
        if None not in (frame, record.frame) and frame != record.frame:
            raise DataError(other_size(record, frame))
        self._store.change(record.product, lambda one: replace(one, collecting=True, problem=None))
        collector.begin(record.product)

    def _stop(self, order: TeachingOrder) -> None:
        record = self._store.get(order.product)
        collector = self._collectors.get(record.camera)
        if collector is not None and collector.product == record.product:
            collector.end()
        self._store.change(record.product, lambda one: replace(one, collecting=False))

    def _take(self, order: TeachingOrder) -> None:
        record = self._idle(order.product)
        if self._workers[record.camera].is_paused:
            raise DataError(f"camera {record.camera} is paused: resume it first")
        self._collector(record).take(record.product, same_part=order.same_part, timeout_s=TAKE_TIMEOUT_S)

    def _group(self, order: TeachingOrder) -> None:
        self._named(order)

        def grouped(one: TeachingRecord) -> TeachingRecord:
            named, next_part, changed = set(order.photographs), one.next_part, []
            for photograph in one.photographs:
                if photograph.name in named:
                    photograph = replace(photograph, part=next_part, part_known=True)  # noqa: PLW2901
                    next_part += order.action == "part"
                changed.append(photograph)
            return replace(one, photographs=tuple(changed), next_part=next_part + 1)

        self._store.change(order.product, grouped)

    def _sort_out(self, order: TeachingOrder) -> None:
        self._named(order)
        out = order.action == "throw-out"
        self._store.change(
            order.product,
            lambda one: replace(
                one,
                photographs=tuple(
                    replace(photograph, thrown_out=out) if photograph.name in order.photographs else photograph
                    for photograph in one.photographs
                ),
            ),
        )

    def _learn(self, order: TeachingOrder) -> None:
        record = self._idle(order.product)
        folder = self._store.path(record.product)
        basis = self._basis.choose(record, order, present=self._worker(record).inspector.product)
        least = MIN_PARTS if basis.prior is None else MIN_PARTS_WITH_PRIOR
        if record.num_parts < least:
            raise DataError(
                f"{record.num_parts} different good parts are collected ({len(record.good)} photographs), and at least "
                f"{least} are needed; {STEPS[0]} are better"
            )
        if look_alike(folder / "photographs", [one.name for one in record.good]):
            raise DataError(
                f"the {len(record.good)} photographs hardly differ: they seem to show one part again and again. Lay "
                "another part before the camera for each"
            )
        if record.region is not None:
            check_region(record.region, record.frame)
        self._stop(order)
        self._trials.end(record.product)
        self._store.change(record.product, lambda one: replace(one, learning_since=_now(), problem=None))
        try:
            self._learner.start(record, folder, basis)
        except EdgeFlameError:
            self._store.change(record.product, lambda one: replace(one, learning_since=None))
            raise

    def _cancel(self, order: TeachingOrder) -> None:
        if self._learner.product != self._store.get(order.product).product:
            raise UsageError(f"{order.product} is not being learnt")
        self._learner.cancel()

    def _choose(self, order: TeachingOrder) -> None:
        record = self._with_model(order.product)
        chosen = None
        if order.threshold is not None:
            scores = self.scores(record.product)
            nearest = min(scores.choices, key=lambda one: abs(one.value - (order.threshold or 0.0)))
            if abs(nearest.value - order.threshold) > 1e-6 * nearest.value:
                raise UsageError(
                    f"{order.threshold:g} is none of the thresholds that make a difference; the nearest is "
                    f"{nearest.value:g}"
                )
            chosen = nearest.value
        self._trials.end(record.product)
        self._store.change(
            record.product,
            lambda one: replace(one, learnt=None if one.learnt is None else replace(one.learnt, chosen=chosen)),
        )

    def _try(self, order: TeachingOrder) -> None:
        record = self._with_model(order.product)
        self._worker(record)
        self._live.require_fits(record, self._frame(record.camera))
        file = self._live.package_as_chosen(record, "learnt/trial.edgeflame")
        self._trials.begin(record.product, record.camera, file, alone=order.alone, folder=self._trial_folder(record))

    def _end_trial(self, order: TeachingOrder) -> None:
        if not self._trials.end(self._store.get(order.product).product):
            raise UsageError(f"{order.product} is not being tried")

    def _go_live(self, order: TeachingOrder) -> None:
        record = self._with_model(order.product)
        self._live.require_fits(record, self._frame(record.camera))
        self._trials.end(record.product)
        self._live.go_live(record, self._worker(record))

    def _go_back(self, order: TeachingOrder) -> None:
        record = self._store.get(order.product)
        self._trials.end(record.product)
        self._live.go_back(record)

    def _discard(self, order: TeachingOrder) -> None:
        record = self._store.get(order.product)
        if self._learner.product == record.product:
            raise UsageError(f"{record.product} is being learnt; cancel that first")
        users = [name for name, worker in self._workers.items() if worker.inspector.product == record.product]
        if record.live and users:
            raise UsageError(f"{record.product} is what camera {', '.join(users)} inspects; go back first")
        self._stop(order)
        self._trials.end(record.product)
        if record.live:
            self._control.forget_taught(record.product, "")
        self._store.discard(record.product)

    # What becomes of learning; on the learner's thread.

    def _learnt(self, product: str, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, EdgeFlameError):
                raise outcome
            self._take_over(product, outcome)
        except EdgeFlameError as exc:
            log.error("not_learnt", product=product, reason=str(exc))
            problem = str(exc)
            try:
                self._store.change(product, lambda one: replace(one, learning_since=None, problem=problem))
            except EdgeFlameError as more:
                log.error("teaching_not_kept", product=product, reason=str(more))
        else:
            log.info("learnt", product=product)

    def _take_over(self, product: str, made: LearningResult) -> None:
        package = read_package(made.folder / MODEL_FILE)
        if read_scores(made.folder / SCORES_FILE) is None:
            raise DataError("learning left no scores")
        folder = self._store.path(product)
        name = f"learnt/{package.sha256[:12]}.edgeflame"
        atomic_copy(made.folder / MODEL_FILE, folder / name)
        atomic_copy(made.folder / SCORES_FILE, (folder / name).with_suffix(".json"))
        manifest = package.manifest
        roi = manifest.learning.input.roi
        told = manifest.provenance.get("learnt_from_marks")
        learnt = TaughtModel(
            file=name,
            sha256=package.sha256,
            at=_now(),
            photographs=made.photographs,
            region=None if roi is None else (roi.x, roi.y, roi.width, roi.height),
            threshold=manifest.threshold.value,
            prior=made.prior,
            marks=None if told is None else msgspec.convert(told, LearntMarks),
        )
        self._store.change(product, lambda one: replace(one, learning_since=None, learnt=learnt, problem=None))
        kept = {Path(name).name, Path(name).with_suffix(".json").name}
        for path in (folder / "learnt").iterdir():
            if path.is_file() and path.name not in kept:
                path.unlink(missing_ok=True)

    # Helpers.

    def _idle(self, product: str) -> TeachingRecord:
        """A product's record; refused while it is being learnt."""
        record = self._store.get(product)
        if self._learner.product == product:
            raise UsageError(f"{product} is being learnt just now: wait for it, or cancel it")
        return record

    def _named(self, order: TeachingOrder) -> None:
        record = self._idle(order.product)
        unknown = set(order.photographs) - {one.name for one in record.photographs}
        if unknown or not order.photographs:
            said = f"no photograph {min(unknown)!r}" if unknown else "say which photographs"
            raise UsageError(f"{order.product}: {said[:120]}")

    def _with_model(self, product: str) -> TeachingRecord:
        record = self._idle(product)
        if record.learnt is None:
            raise UsageError(f"{product}: nothing has been learnt yet")
        return record

    def _worker(self, record: TeachingRecord) -> CameraWorker:
        worker = self._workers.get(record.camera)
        if worker is None:
            raise UsageError(f"{record.product} was begun on camera {record.camera}, which this line does not have")
        return worker

    def _collector(self, record: TeachingRecord) -> Collector:
        return self._collectors[self._worker(record).name]

    def _frame(self, camera: str) -> tuple[int, int] | None:
        collector = self._collectors.get(camera)
        last = None if collector is None else collector.last
        if last is None or last.frame.image_bgr is None:
            return None
        height, width = last.frame.image_bgr.shape[:2]
        return width, height

    def _scores(self, record: TeachingRecord) -> FitScores | None:
        assert record.learnt is not None
        return read_scores((self._store.path(record.product) / record.learnt.file).with_suffix(".json"))

    def _trial_folder(self, record: TeachingRecord) -> Path:
        folder = self._store.path(record.product) / "trial"
        with storage_errors(folder, "empty"):
            shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _status(self, record: TeachingRecord, marked: MarkCounter) -> ProductTeaching:
        worker, collector = self._workers.get(record.camera), self._collectors.get(record.camera)
        return standing_of(
            record,
            scores=None if record.learnt is None else self._scores(record),
            inspector=None if worker is None else worker.inspector,
            camera_frame=self._frame(record.camera),
            num_passed_over=0 if collector is None else collector.num_passed_over,
            learning=self._learner.progress(record.product),
            trial=self._trials.status(record.product),
            marked=marked.of(record.product),
            priors=self._basis.priors(record.product),
        )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)
