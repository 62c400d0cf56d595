"""One run of the inspection: cameras, their lines, and all that happens to results; and how it is stopped."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge.cameras import Cameras
from edge.commands.desk import Desk
from edge.control import SNAPSHOTS_FOLDER, Control
from edge.delivery.mqtt import line_state
from edge.delivery.pipeline import Pipeline, open_pipeline
from edge.delivery.writer import Writer
from edge.line import Line
from edge.models.field import FieldModels
from edge.overrides import Overrides
from edge.parts.counts import PartCounts
from edge.plan import Plan
from edge.rejects import RejectsSink
from edge.results import Result
from edge.runner import Runner
from edge.service import Heart, Notifier
from edge.signals import LastResort, Signals
from edge.sinks import InTurn, OfCamera, Production, Sink
from edge.sources.watch.disposal import Disposal
from edge.summary import Summary, Tally
from edge.upkeep import open_upkeep
from edgeflame.console import EventLog
from edgeflame.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from edge.plc.config import ModbusConfig
    from edge.plc.sink import PlcSink
    from edge.web.config import WebConfig

log = EventLog("inspect")

MARKS_FOLDER = "marks"

_RECALLED = 10_000
"""Results looked at when the daemon starts; more than it remembers parts of each camera by."""

STOP_GRACE_S = 2.0
"""A stop takes at most so much longer than results may still be delivered (``delivery.flush_s``), whatever hangs."""


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
    models: FieldModels | None = None,
) -> Summary:
    """Inspect until all sources end, ``limit`` parts are done, or a signal says stop.

    The part in hand when the stop comes still gets its verdict.

    Args:
        cameras: with their lines.
        sinks: see every result; with ``state`` only once it is on the disk.
        overrides: what is changed by command, and kept.
        reread: gives the plan anew from the configuration, for a reload.
        state: folder for the outbox; without it results go to the sinks alone.
        pictures: pictures of rejected parts; also told every result, and asked for room when the disk is full.
        limit: of parts.
        signals: end the run, or have the configuration read again.
        models: released ones, where the line takes them; the cameras were opened by it then.

    Raises:
        ConfigError: something is configured that needs a state folder.
        EdgeFlameError: a source cannot be read, or a result cannot be kept.
    """
    config, lines = cameras.plan.config, cameras.lines
    if state is None and (config.mqtt or config.webhook or config.web):
        msg = "[mqtt], [webhook] and [web] need --state DIR, where results are kept until they are delivered"
        raise ConfigError(msg)
    pipeline: Pipeline | None = None
    tally = Tally()
    with contextlib.ExitStack() as stack:
        # Called off last of all: what hangs may be anything below.
        last_resort = stack.enter_context(LastResort())
        # First: the part is already on its way to the ejector.
        plcs = _plcs(stack, cameras.plan)
        outlets: list[Sink] = [*(OfCamera(camera, plc) for camera, plc in plcs.items()), *sinks]
        if pictures is not None:
            outlets.append(Production(pictures))
            cameras.on_section("rejects", pictures.reconfigure)
        control = Control(
            lines,
            products=lambda: cameras.products,
            load=cameras.load,
            overrides=overrides,
            folder=state / SNAPSHOTS_FOLDER if state is not None else None,
        )
        control.register("reload", lambda: cameras.reload(reread() if models is None else models.overlay(reread())))
        if state is None:
            stack.enter_context(open_upkeep(cameras.plan, lines, control, None))
            outlet: Sink = InTurn([*outlets, Disposal()])
        else:
            boot = uuid.uuid4().hex
            # Answers nobody until the pipeline stands; whoever asks so early asks again.
            desk = Desk(control, lambda data: pipeline.answer(data) if pipeline is not None else None)
            pipeline = stack.enter_context(
                open_pipeline(
                    state,
                    config,
                    line_state(control.statuses(), boot=boot),
                    make_room=pictures.discard_oldest if pictures is not None else lambda: False,
                    take=desk.take,
                )
            )
            _recall(pipeline, lines)
            stack.enter_context(desk)
            if (mqtt := pipeline.mqtt) is not None:
                control.on_change(lambda: mqtt.announce(line_state(control.statuses(), boot=boot)))
            stack.enter_context(open_upkeep(cameras.plan, lines, control, state))
            if config.web is not None:
                outlets += _page(stack, config.web, state, pipeline, control, plcs, models)
            stack.callback(_begin_end, pipeline, plcs)
            outlet = stack.enter_context(Writer(pipeline.outbox, [*outlets, Disposal()]))
        if models is not None:
            stack.enter_context(models.running(cameras, control))
        busy: dict[str, Callable[[], float]] = {f"camera {line.name}": partial(_busy_s, line) for line in lines}
        if isinstance(outlet, Writer):
            busy["outbox"] = partial(_busy_s, outlet)
        with Heart(Notifier(), busy_s=busy, status=partial(_status, control, tally)) as heart:
            runner = Runner(lines, outlet, tally, limit)
            runner.run(
                signals,
                heart,
                reload=control.reload,
                on_stop=lambda: last_resort.begin(config.delivery.flush_s + STOP_GRACE_S),
            )
    if signals.stop.is_set():
        log.info("stopped_by_signal", parts=tally.parts)
    dropped = sum((line.dropped for line in lines[1:]), start=lines[0].dropped)
    counts = [line.status().counts for line in lines]
    return msgspec.structs.replace(
        tally.summary(dropped=dropped),
        counts=PartCounts(**{name: sum(getattr(one, name) for one in counts) for name in PartCounts.__struct_fields__}),
        evidence_lost=pictures.num_lost if pictures is not None else 0,
        undelivered=pipeline.undelivered if pipeline is not None else {},
    )


def _busy_s(part: Line | Writer) -> float:
    return part.busy_s


def _status(control: Control, tally: Tally) -> str:
    statuses = control.statuses()
    troubles = [f"{status.camera}: {status.problem}" for status in statuses if status.problem is not None]
    troubles += [f"{status.camera}: paused" for status in statuses if status.paused]
    return "; ".join((f"{len(statuses)} cameras, {tally.parts} parts", *troubles))


def _recall(pipeline: Pipeline, lines: Sequence[Line]) -> None:
    """Remind lines whose parts have numbers of what came before this start."""
    numbered = [line for line in lines if line.has_identity]
    if numbered:
        past = [msgspec.json.decode(body, type=Result) for _, body in reversed(pipeline.outbox.newest(_RECALLED))]
        for line in numbered:
            line.recall(past)


def _plcs(stack: contextlib.ExitStack, plan: Plan) -> dict[str, PlcSink]:
    """By the camera whose verdicts they are told."""
    plcs: dict[str, PlcSink] = {}
    for camera in plan.cameras:
        if camera.modbus is not None:
            plc = _plc(camera.modbus)
            stack.callback(plc.close)
            plcs[camera.name] = plc
    return plcs


def _begin_end(pipeline: Pipeline, plcs: Mapping[str, PlcSink]) -> None:
    """Every result is on the disk: all that wait for somebody outside do so at the same time."""
    pipeline.begin_flush()
    for plc in plcs.values():
        plc.finish()


def _plc(config: ModbusConfig) -> PlcSink:
    try:
        from edge.plc.sink import PlcSink
    except ImportError as exc:
        msg = f"[modbus] needs the extra 'plc': pip install 'edgeflame[plc]' ({exc.name} is missing)"
        raise MissingDependencyError(msg) from exc
    return PlcSink(config)


def _page(
    stack: contextlib.ExitStack,
    config: WebConfig,
    state: Path,
    pipeline: Pipeline,
    control: Control,
    plcs: Mapping[str, PlcSink],
    models: FieldModels | None,
) -> list[Sink]:
    """Serve the operator's page until the stack unwinds; returns the sinks that feed it."""
    try:
        from edge.web.board import Board
        from edge.web.marks import MarkStore
        from edge.web.metrics import LineMetrics
        from edge.web.models import ModelFigures
        from edge.web.server import operator_token, serve
        from edge.web.station import Station
        from edge.web.surroundings import Surroundings
    except ImportError as exc:
        msg = f"[web] needs the extra 'web': pip install 'edgeflame[web]' ({exc.name} is missing)"
        raise MissingDependencyError(msg) from exc

    past = (msgspec.json.decode(body, type=Result) for _, body in reversed(pipeline.outbox.newest(10_000)))
    board = Board(config, past)
    metrics = LineMetrics(control.statuses, deliverers=pipeline.deliverers)
    expires = pipeline.mqtt.certificate_expires if pipeline.mqtt is not None else None
    metrics.registry.register(Surroundings(state, plcs, certificate_expires=expires))
    if models is not None:
        metrics.registry.register(ModelFigures(models.figures))
    station = Station(
        config,
        control,
        board=board,
        metrics=metrics,
        marks=MarkStore(state / MARKS_FOLDER, max_marks=config.max_marks),
        deliverers=pipeline.deliverers,
        token=operator_token(state),
    )
    stack.enter_context(serve(station, config))
    return [Production(board), Production(metrics)]
