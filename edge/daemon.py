"""One run of the inspection daemon (the *line*): puts its parts together, runs the cameras, and stops them.

Each camera worker runs on a thread of its own; the main thread waits for these threads and for signals. Drift watching
and self-tests with golden parts run beside the cameras for as long as the run lasts. With a state folder, results pass
through the outbox (:mod:`edge.delivery`); without one they go to the sinks directly.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec

from edge.camera_worker import CameraWorker
from edge.cameras import Cameras, Overrides, Plan
from edge.commands.server import CommandServer
from edge.config.inspection import RoiConfig
from edge.config.outputs import WebConfig
from edge.control import SNAPSHOTS_FOLDER, DaemonControl
from edge.delivery.outbox import OUTBOX_FILE
from edge.delivery.pipeline import OutboxWriter, Pipeline, open_pipeline
from edge.delivery.sinks import LockedSinks, RejectsSink, Sink, of_camera, of_production
from edge.drift.watcher import DriftModel, DriftWatcher
from edge.golden_parts import GoldenTester
from edge.inspector import Inspector
from edge.memory import trimming
from edge.models.released import ReleasedModels
from edge.result import Inspected
from edge.sources.arrivals import Disposal
from edge.status import LineState, PartCounts, Summary, Tally
from edge.systemd import ForcedExit, Signals, SystemdNotifier, Watchdog
from edge.teaching.teacher import LineTeacher
from edgeflame.background import BackgroundThread
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, require_extra
from edgeflame.log import EventLog
from edgeflame.marks import MarkStore

if TYPE_CHECKING:
    from edge.config.outputs import ModbusConfig
    from edge.delivery.plc import PlcSink


DRIFT_FOLDER = "drift"
GOLDEN_FOLDER = "golden"


@contextlib.contextmanager
def open_monitoring(
    plan: Plan, workers: Sequence[CameraWorker], control: DaemonControl, state: Path | None
) -> Iterator[None]:
    """Watch drift (with a state folder) and test golden parts until the block is left.

    Args:
        plan: the plan that the cameras were opened from.
        workers: all camera workers.
        control: gets the drift watchers and the self-testers.
        state: the state folder; None: drift is not watched, and self-tests are not kept.

    Raises:
        ConfigError: photographs of golden parts are configured and not there.
    """
    drift: dict[str, DriftWatcher] = {}
    golden: dict[str, GoldenTester] = {}
    settings = {camera.name: camera.settings for camera in plan.cameras}
    with contextlib.ExitStack() as stack:
        for worker in workers:
            config = settings[worker.name]
            tester = GoldenTester(
                worker,
                config.self_test,
                folder=state / GOLDEN_FOLDER if state is not None else None,
                on_change=control.changed,
            )
            golden[worker.name] = stack.enter_context(tester)
            if state is None or not config.drift.enabled:
                continue
            watcher = DriftWatcher(
                worker.name,
                config.drift,
                worker.inspector.model_id,
                partial(_model_of, worker, config.roi),
                folder=state / DRIFT_FOLDER,
                on_change=control.changed,
            )
            drift[worker.name] = stack.enter_context(watcher)
            worker.add_listener(watcher)
            stack.callback(worker.remove_listener, watcher)

        control.golden, control.drift_watchers = golden, drift
        yield


def _model_of(worker: CameraWorker, view: RoiConfig, model: str) -> DriftModel | None:
    """What drift needs of the model with this id; None if the camera uses another model by now."""
    inspector = worker.inspector
    if not isinstance(inspector, Inspector) or inspector.model_id != model:
        return None
    judges_all = not (view.roi or view.ignore or view.ignore_image)
    return DriftModel.of(inspector.package, scores_as_fitted=judges_all and inspector.precision != "int8")


log = EventLog("inspect")

_POLL_S = 0.2
"""How often the main thread checks for signals, seconds; a camera that ends wakes it at once."""

LINE_STOP_S = 2.0
"""How long a stop waits for the parts being inspected, seconds; a model or a driver that takes longer hangs."""


@final
class CameraThreads:
    """Runs each camera worker on a thread of its own, until all have ended or a stop is requested.

    Args:
        workers: all camera workers.
        outlet: gets every result.
        tally: counts the results of the production.
        limit: number of parts after which the run ends; None: no limit.
    """

    def __init__(self, workers: Sequence[CameraWorker], outlet: Sink, tally: Tally, limit: int | None) -> None:
        self._outlet, self._tally, self._limit = outlet, tally, limit
        self._halt = threading.Event()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [BackgroundThread(worker.name, partial(self._run_worker, worker)) for worker in workers]

    def run(
        self, signals: Signals, watchdog: Watchdog, *, reload: Callable[[], object], on_stop: Callable[[], None]
    ) -> None:
        """Start the threads and wait for their end.

        Args:
            signals: end the run, or have the configuration read again.
            watchdog: gets the main thread's heartbeats.
            reload: reads the configuration again; called on a thread of its own.
            on_stop: called when a signal requests a stop.

        Raises:
            EdgeFlameError: the gravest error of a camera, the first of several such. A ``DataError`` concerns one
                camera alone and is raised only after the others have ended; any other error stops them all.
        """
        for thread in self._threads:
            thread.start()
        running = len(self._threads)
        failures: list[BaseException] = []
        try:
            while running:
                watchdog.heartbeat()
                with contextlib.suppress(queue.Empty):
                    failure = self._done.get(timeout=_POLL_S)
                    running -= 1
                    if failure is not None:
                        failures.append(failure)
                        if not isinstance(failure, DataError):
                            # Not this camera's alone: a disk, a defect.
                            self._halt.set()
                        elif running:
                            log.error("camera_ended", reason=str(failure))
                if signals.reload.is_set():
                    signals.reload.clear()
                    BackgroundThread("reload", lambda _: _reload(watchdog, reload)).start()
                if signals.stop.is_set():
                    on_stop()
                    break
        finally:
            self._halt.set()
            self._join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (failure := self._done.get_nowait()) is not None:
                    failures.append(failure)
        if failures:
            gravest = max(failures, key=_gravity)
            for failure in failures:
                if failure is not gravest:
                    log.error("camera_failed", reason=str(failure) or repr(failure))
            raise gravest

    def _join(self) -> None:
        until = time.monotonic() + LINE_STOP_S
        for thread in self._threads:
            if not thread.close(until - time.monotonic()):
                log.error("camera_does_not_stop", thread=thread.name, waited_s=LINE_STOP_S)

    def _run_worker(self, worker: CameraWorker, _: threading.Event) -> None:
        try:
            worker.run(self._accept, self._halt)
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the main thread raises it
            self._done.put(exc)
        else:
            self._done.put(None)

    def _accept(self, inspected: Inspected) -> None:
        self._outlet.accept(inspected)
        if not inspected.result.golden and self._tally.add(inspected.result) == self._limit:
            self._halt.set()


def _gravity(failure: BaseException) -> int:
    """How much an error says of the daemon: that of one camera's source least, one that nobody expected most."""
    if isinstance(failure, DataError):
        return 0
    return 1 if isinstance(failure, EdgeFlameError) else 2


def _reload(watchdog: Watchdog, reload: Callable[[], object]) -> None:
    """On a thread of its own: loading models takes seconds, during which the main thread must handle a stop."""
    # A refused reload has been logged already.
    with watchdog.reloading(), contextlib.suppress(EdgeFlameError):
        reload()


MARKS_FOLDER = "marks"

_RECALLED = 10_000
"""Number of past results read when the daemon starts, to continue the parts' numbers."""

STOP_GRACE_S = 2.0
"""Time beyond ``retry.flush_s`` after which a stop that hangs ends the process, seconds."""


def run_inspection(
    cameras: Cameras,
    sinks: Sequence[Sink],
    *,
    overrides: Overrides,
    reread: Callable[[], Plan],
    state: Path | None = None,
    pictures: RejectsSink | None = None,
    limit: int | None = None,
    signals: Signals,
    models: ReleasedModels | None = None,
) -> Summary:
    """Inspect until all sources end, ``limit`` parts are done, or a signal says stop.

    A part that is being inspected when the stop comes still gets its verdict.

    Args:
        cameras: opened, not yet running.
        sinks: get every result; with ``state`` only once it is on the disk.
        overrides: thresholds and products set by command, kept over restarts.
        reread: reads the configuration again and returns its plan, for a reload.
        state: the state folder, with the outbox; None: results go to the sinks alone.
        pictures: keeps pictures of rejected parts; gets every result, and makes room when the disk is full.
        limit: number of parts after which the run ends; None: no limit.
        signals: end the run, or have the configuration read again.
        models: the released models, if the line takes them; then it has opened the cameras.

    Raises:
        ConfigError: something is configured that needs a state folder.
        EdgeFlameError: a source cannot be read, or a result cannot be kept.
    """
    config, workers = cameras.plan.config, cameras.workers
    if state is None and (config.mqtt or config.webhook or config.web):
        raise ConfigError(
            "[mqtt], [webhook] and [web] need --state DIR, where results are kept until they are delivered"
        )
    pipeline: Pipeline | None = None
    tally = Tally()
    with contextlib.ExitStack() as stack:
        # Entered first, so that it is called off last: anything below may hang.
        forced_exit = stack.enter_context(ForcedExit())
        stack.enter_context(trimming())
        # PLCs come first: the part is already on its way to the ejector.
        plcs = _plcs(stack, cameras.plan)
        outlets: list[Sink] = [*(of_camera(plc, camera) for camera, plc in plcs.items()), *sinks]
        if pictures is not None:
            outlets.append(of_production(pictures))
            cameras.on_section_change("images", pictures.reconfigure)
        control = DaemonControl(
            cameras,
            overrides=overrides,
            snapshots=state / SNAPSHOTS_FOLDER if state is not None else None,
            reread=reread if models is None else lambda: models.with_decisions(reread()),
        )
        if state is None:
            stack.enter_context(open_monitoring(cameras.plan, workers, control, None))
            outlet: Sink = LockedSinks([*outlets, Disposal()])
        else:
            boot = uuid.uuid4().hex
            # Before the pipeline is open replies are discarded; the client sends its command again.
            commands = CommandServer(
                control, lambda data: pipeline.publish_reply(data) if pipeline is not None else None
            )
            pipeline = stack.enter_context(
                open_pipeline(
                    state,
                    config,
                    LineState.of(control.statuses(), boot=boot),
                    make_room=pictures.discard_oldest if pictures is not None else lambda: False,
                    on_command=commands.receive,
                )
            )
            _restore(pipeline, workers)
            stack.enter_context(commands)
            if (mqtt := pipeline.mqtt) is not None:
                control.on_change(lambda: mqtt.set_state(LineState.of(control.statuses(), boot=boot)))
            stack.enter_context(open_monitoring(cameras.plan, workers, control, state))
            has_torch = importlib.util.find_spec("torch") is not None
            marks = MarkStore(state / MARKS_FOLDER, max_marks=(config.web or WebConfig()).max_marks)
            teacher = stack.enter_context(LineTeacher(state, cameras, control, config.teaching, marks, torch=has_torch))
            control.teacher = teacher
            if config.web is not None:
                outlets += _page(stack, config.web, state, pipeline, control, plcs, models, pictures, teacher, marks)
            stack.callback(_start_flush, pipeline, plcs)
            outlet = stack.enter_context(OutboxWriter(pipeline.outbox, [*outlets, Disposal()]))
        if models is not None:
            stack.enter_context(models.running(cameras, on_change=control.changed))
            control.models = models
        busy: dict[str, Callable[[], float]] = {f"camera {worker.name}": partial(_busy_s, worker) for worker in workers}
        if isinstance(outlet, OutboxWriter):
            busy["outbox"] = partial(_busy_s, outlet)
        with Watchdog(SystemdNotifier(), busy_s=busy, status=partial(_status, control, tally)) as watchdog:
            runner = CameraThreads(workers, outlet, tally, limit)
            runner.run(
                signals,
                watchdog,
                reload=control.reload,
                on_stop=lambda: forced_exit.arm(config.retry.flush_s + STOP_GRACE_S),
            )
    if signals.stop.is_set():
        log.info("stopped_by_signal", parts=tally.parts)
    dropped = sum((worker.dropped for worker in workers[1:]), start=workers[0].dropped)
    counts = [worker.status().counts for worker in workers]
    return msgspec.structs.replace(
        tally.summary(dropped=dropped),
        counts=PartCounts(**{name: sum(getattr(one, name) for one in counts) for name in PartCounts.__struct_fields__}),
        evidence_lost=pictures.num_lost if pictures is not None else 0,
        undelivered=pipeline.undelivered if pipeline is not None else {},
    )


def _busy_s(part: CameraWorker | OutboxWriter) -> float:
    return part.busy_s


def _status(control: DaemonControl, tally: Tally) -> str:
    statuses = control.statuses()
    troubles = [f"{status.camera}: {status.trouble}" for status in statuses if status.trouble is not None]
    return "; ".join((f"{len(statuses)} cameras, {tally.parts} parts", *troubles))


def _restore(pipeline: Pipeline, workers: Sequence[CameraWorker]) -> None:
    """Continue the numbers of parts from the results kept before this start."""
    numbered = [worker for worker in workers if worker.has_sequence]
    if numbered:
        past = [result for _, result in reversed(pipeline.outbox.latest(_RECALLED))]
        for worker in numbered:
            worker.restore(past)


def _plcs(stack: contextlib.ExitStack, plan: Plan) -> dict[str, PlcSink]:
    """A PLC sink for each camera with ``[modbus]``, by the camera's name; the stack closes them."""
    plcs: dict[str, PlcSink] = {}
    for camera in plan.cameras:
        if camera.modbus is not None:
            plc = _plc(camera.modbus)
            stack.callback(plc.close)
            plcs[camera.name] = plc
    return plcs


def _start_flush(pipeline: Pipeline, plcs: Mapping[str, PlcSink]) -> None:
    """All destinations and PLCs flush at the same time; every result is on the disk by now."""
    pipeline.start_flush()
    for plc in plcs.values():
        plc.start_flush()


def _plc(config: ModbusConfig) -> PlcSink:
    with require_extra("plc", "[modbus] needs pymodbus"):
        from edge.delivery.plc import PlcSink
    return PlcSink(config)


def _page(
    stack: contextlib.ExitStack,
    config: WebConfig,
    state: Path,
    pipeline: Pipeline,
    control: DaemonControl,
    plcs: Mapping[str, PlcSink],
    models: ReleasedModels | None,
    pictures: RejectsSink | None,
    teacher: LineTeacher,
    store: MarkStore,
) -> list[Sink]:
    """Serve the operator's page until the stack unwinds; returns the sinks that feed it."""
    with require_extra("web", "[web] needs more than is installed here"):
        from edge.web.history import PartHistory
        from edge.web.marks import PartMarks
        from edge.web.metrics import HostMetrics, LineMetrics, RolloutMetrics
        from edge.web.page import OperatorPage
        from edge.web.rejects import PastRejects
        from edge.web.server import operator_token, serve_page

    past = (result for _, result in reversed(pipeline.outbox.latest(10_000)))
    history = PartHistory(config, past)
    metrics = LineMetrics(control.statuses, deliverers=pipeline.deliverers)
    expires = pipeline.mqtt.certificate_expires if pipeline.mqtt is not None else None
    metrics.registry.register(HostMetrics(state, plcs, certificate_expires=expires))
    if models is not None:
        metrics.registry.register(RolloutMetrics(models.metrics))
    marks = PartMarks(store, history, control.statuses)
    control.marker = marks
    page = OperatorPage(
        config,
        control,
        history=history,
        metrics=metrics,
        marks=marks,
        rejects=PastRejects(state / OUTBOX_FILE, pictures),
        teacher=teacher,
        deliverers=pipeline.deliverers,
        token=operator_token(state),
    )
    stack.enter_context(serve_page(page, config))
    return [of_production(history), of_production(metrics)]
