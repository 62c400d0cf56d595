"""One run of the inspection: source, inspector, and all that happens to results; and how it is stopped."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from edge.capture import Capture
from edge.config import InspectConfig
from edge.delivery.pipeline import Pipeline, open_pipeline
from edge.delivery.writer import Writer
from edge.inspector import Inspector
from edge.rejects import RejectsSink
from edge.results import Result
from edge.sinks import Sink
from edge.sources import Source
from edge.summary import Summary, Tally
from edgeflame.console import EventLog
from edgeflame.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from edge.plc.config import ModbusConfig
    from edge.web.config import WebConfig

log = EventLog("inspect")

MARKS_FOLDER = "marks"


def run_inspection(
    source: Source,
    inspector: Inspector,
    sinks: Sequence[Sink],
    *,
    config: InspectConfig,
    state: Path | None = None,
    pictures: RejectsSink | None = None,
    limit: int | None = None,
    stop: threading.Event,
) -> Summary:
    """Inspect until the source ends, ``limit`` parts are done, or ``stop`` is set.

    The part in hand when the stop comes still gets its verdict.

    Args:
        source: of the parts.
        inspector: judges them.
        sinks: see every result; with ``state`` only once it is on the disk.
        config: of everything.
        state: folder for the outbox; without it results go to the sinks alone.
        pictures: pictures of rejected parts; also told every result, and asked for room when the disk is full.
        limit: of parts.
        stop: ends the run.

    Raises:
        ConfigError: something is configured that needs a state folder.
        EdgeFlameError: the source cannot be opened, or a result cannot be kept.
    """
    if state is None and (config.mqtt or config.webhook or config.web):
        msg = "[mqtt], [webhook] and [web] need --state DIR, where results are kept until they are delivered"
        raise ConfigError(msg)
    outlets = [*sinks, pictures] if pictures is not None else [*sinks]
    plc = _plc(config.modbus) if config.modbus is not None else None
    if plc is not None:
        # First: the part is already on its way to the ejector.
        outlets = [plc, *outlets]
    capture = Capture(source, config.capture, stop)
    pipeline: Pipeline | None = None
    inspector.warm_up()
    tally = Tally()
    with contextlib.ExitStack() as stack:
        if plc is not None:
            stack.callback(plc.close)
        if state is not None:
            make_room = pictures.discard_oldest if pictures is not None else lambda: False
            pipeline = stack.enter_context(
                open_pipeline(state, config, inspector, source=source.name, make_room=make_room)
            )
            if config.web is not None:
                outlets += _page(stack, config.web, state, pipeline, inspector, capture, source.name)
            outlets = [stack.enter_context(Writer(pipeline.outbox, outlets))]
        with capture as frames:
            for captured in frames:
                inspected = inspector.inspect(captured)
                tally.add(inspected.result)
                for outlet in outlets:
                    outlet.accept(inspected)
                if tally.parts == limit:
                    break
    if stop.is_set():
        log.info("stopped_by_signal", parts=tally.parts)
    return msgspec.structs.replace(
        tally.summary(dropped=capture.dropped),
        evidence_lost=pictures.num_lost if pictures is not None else 0,
        undelivered=pipeline.undelivered if pipeline is not None else {},
    )


def _plc(config: ModbusConfig) -> Sink:
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
    inspector: Inspector,
    capture: Capture,
    source: str,
) -> list[Sink]:
    """Serve the operator's page until the stack unwinds; returns the sinks that feed it."""
    try:
        from edge.web.app import Line, Station
        from edge.web.board import Board
        from edge.web.marks import MarkStore
        from edge.web.metrics import LineMetrics
        from edge.web.server import operator_token, serve
    except ImportError as exc:
        msg = f"[web] needs the extra 'web': pip install 'edgeflame[web]' ({exc.name} is missing)"
        raise MissingDependencyError(msg) from exc

    past = (msgspec.json.decode(body, type=Result) for _, body in reversed(pipeline.outbox.newest(10_000)))
    board = Board(config, past)
    metrics = LineMetrics(inspector, dropped=lambda: capture.dropped, deliverers=pipeline.deliverers)
    line = Line(
        product=inspector.product,
        model=inspector.model_id,
        threshold=inspector.threshold,
        source=source,
        provider=inspector.provider,
    )
    station = Station(
        config,
        line,
        board=board,
        metrics=metrics,
        marks=MarkStore(state / MARKS_FOLDER),
        deliverers=pipeline.deliverers,
        dropped=lambda: capture.dropped,
        token=operator_token(state),
    )
    stack.enter_context(serve(station, config))
    return [board, metrics]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal interrupts at once."""
    stop = threading.Event()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if stop.is_set():
            raise KeyboardInterrupt
        # Nothing else: the handler may run in the middle of a write to the terminal.
        stop.set()

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
