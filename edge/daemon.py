"""One run of the inspection: cameras on their threads, all that happens to results, and how it is stopped.

The main thread waits for the cameras' threads and for signals. Drift and self-tests watch over the cameras beside the
verdicts, for as long as the run lasts.
"""

from __future__ import annotations

import contextlib
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
from edge.control import SNAPSHOTS_FOLDER, DaemonControl
from edge.delivery.pipeline import OutboxWriter, Pipeline, open_pipeline
from edge.delivery.sinks import LockedSinks, RejectsSink, Sink, of_camera, of_production
from edge.drift.watcher import DriftModel, DriftWatcher
from edge.golden_parts import GoldenTester
from edge.inspector import Inspector
from edge.models.released import ReleasedModels
from edge.result import Inspected, Result
from edge.sources.arrivals import Disposal
from edge.status import LineState, PartCounts, Summary, Tally
from edge.systemd import ForcedExit, Signals, SystemdNotifier, Watchdog
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, require_extra
from edgeflame.log import EventLog

if TYPE_CHECKING:
    from edge.config.outputs import ModbusConfig, WebConfig
    from edge.delivery.plc import PlcSink


DRIFT_FOLDER = "drift"
GOLDEN_FOLDER = "golden"


@contextlib.contextmanager
def open_monitoring(
    plan: Plan, workers: Sequence[CameraWorker], control: DaemonControl, state: Path | None
) -> Iterator[None]:
    """Watch drift (with a state folder) and test golden parts until the block is left.

    Args:
        plan: of the cameras.
        workers: the cameras.
        control: is given both.
        state: the daemon's folder.

    Raises:
        ConfigError: golden parts are configured and not there.
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
    """Of the model that a part was judged by; None if another judges by now."""
    inspector = worker.inspector
    if not isinstance(inspector, Inspector) or inspector.model_id != model:
        return None
    judges_all = not (view.roi or view.ignore or view.ignore_image)
    return DriftModel.of(inspector.package, scores_as_fitted=judges_all and inspector.precision != "int8")


log = EventLog("inspect")

_POLL_S = 0.2
"""How often the main thread looks whether it is to stop; a camera that ends wakes it at once."""

LINE_STOP_S = 2.0
"""How long a stop waits for the parts in hand; a model or a driver that takes longer hangs."""


@final
class CameraThreads:
    """Each camera on a thread of its own, until all have ended or are to.

    Args:
        workers: which.
        outlet: takes every verdict.
        tally: counts it.
        limit: of parts.
    """

    def __init__(self, workers: Sequence[CameraWorker], outlet: Sink, tally: Tally, limit: int | None) -> None:
        self._outlet, self._tally, self._limit = outlet, tally, limit
        self._halt = threading.Event()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._run_worker, args=(worker, len(workers) == 1), name=f"edgeflame-{worker.name}", daemon=True
            )
            for worker in workers
        ]

    def run(
        self, signals: Signals, watchdog: Watchdog, *, reload: Callable[[], object], on_stop: Callable[[], None]
    ) -> None:
        """Run them, and wait.

        Args:
            signals: end it, or have the configuration read again.
            watchdog: shown that the main thread moves.
            reload: reads the configuration again.
            on_stop: called when a signal says stop.

        Raises:
            EdgeFlameError: a camera's error. One that can only be its own waits until the others have ended.
        """
        for thread in self._threads:
            thread.start()
        running, failures = len(self._threads), []
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
                    threading.Thread(
                        target=_reload, args=(watchdog, reload), name="edgeflame-reload", daemon=True
                    ).start()
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
            raise failures[0]

    def _join(self) -> None:
        until = time.monotonic() + LINE_STOP_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                log.error("camera_does_not_stop", thread=thread.name, waited_s=LINE_STOP_S)

    def _run_worker(self, worker: CameraWorker, is_alone: bool) -> None:
        try:
            worker.run(self._accept, self._halt, is_alone=is_alone)
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the main thread raises it
            self._done.put(exc)
        else:
            self._done.put(None)

    def _accept(self, inspected: Inspected) -> None:
        self._outlet.accept(inspected)
        if not inspected.result.golden and self._tally.add(inspected.result) == self._limit:
            self._halt.set()


def _reload(watchdog: Watchdog, reload: Callable[[], object]) -> None:
    """On a thread of its own: reading models takes seconds, in which a stop must be heard."""
    # Whatever was wrong is in the log.
    with watchdog.reloading(), contextlib.suppress(EdgeFlameError):
        reload()


MARKS_FOLDER = "marks"

_RECALLED = 10_000
"""Results looked at when the daemon starts; more than it remembers parts of each camera by."""

STOP_GRACE_S = 2.0
"""A stop takes at most so much longer than results may still be delivered (``retry.flush_s``), whatever hangs."""


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

    The part in hand when the stop comes still gets its verdict.

    Args:
        cameras: with their workers.
        sinks: see every result; with ``state`` only once it is on the disk.
        overrides: what is changed by command, and kept.
        reread: gives the plan anew from the configuration, for a reload.
        state: folder for the outbox; without it results go to the sinks alone.
        pictures: keeps pictures of rejected parts; gets every result, and makes room when the disk is full.
        limit: of parts.
        signals: end the run, or have the configuration read again.
        models: released ones, where the line takes them; the cameras were opened by it then.

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
        # Called off last of all: what hangs may be anything below.
        forced_exit = stack.enter_context(ForcedExit())
        # First: the part is already on its way to the ejector.
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
            # Answers nobody until the pipeline stands; whoever asks so early asks again.
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
            if config.web is not None:
                outlets += _page(stack, config.web, state, pipeline, control, plcs, models)
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
    """Remind cameras whose parts have numbers of what came before this start."""
    numbered = [worker for worker in workers if worker.has_sequence]
    if numbered:
        past = [msgspec.json.decode(body, type=Result) for _, body in reversed(pipeline.outbox.latest(_RECALLED))]
        for worker in numbered:
            worker.restore(past)


def _plcs(stack: contextlib.ExitStack, plan: Plan) -> dict[str, PlcSink]:
    """By the camera whose verdicts they write."""
    plcs: dict[str, PlcSink] = {}
    for camera in plan.cameras:
        if camera.modbus is not None:
            plc = _plc(camera.modbus)
            stack.callback(plc.close)
            plcs[camera.name] = plc
    return plcs


def _start_flush(pipeline: Pipeline, plcs: Mapping[str, PlcSink]) -> None:
    """Every result is on the disk: all that wait for somebody outside do so at the same time."""
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
) -> list[Sink]:
    """Serve the operator's page until the stack unwinds; returns the sinks that feed it."""
    with require_extra("web", "[web] needs more than is installed here"):
        from edge.web.feedback import FeedbackStore
        from edge.web.history import PartHistory
        from edge.web.metrics import HostMetrics, LineMetrics, RolloutMetrics
        from edge.web.page import OperatorPage
        from edge.web.server import operator_token, serve_page

    past = (msgspec.json.decode(body, type=Result) for _, body in reversed(pipeline.outbox.latest(10_000)))
    history = PartHistory(config, past)
    metrics = LineMetrics(control.statuses, deliverers=pipeline.deliverers)
    expires = pipeline.mqtt.certificate_expires if pipeline.mqtt is not None else None
    metrics.registry.register(HostMetrics(state, plcs, certificate_expires=expires))
    if models is not None:
        metrics.registry.register(RolloutMetrics(models.metrics))
    page = OperatorPage(
        config,
        control,
        history=history,
        metrics=metrics,
        feedback=FeedbackStore(state / MARKS_FOLDER, max_marks=config.max_marks),
        deliverers=pipeline.deliverers,
        token=operator_token(state),
    )
    stack.enter_context(serve_page(page, config))
    return [of_production(history), of_production(metrics)]
