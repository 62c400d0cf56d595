"""Where the time of a frame goes on its way from the camera to the disk: the hops of a line that inspects a source.

The line is the daemon's own, with its outbox in a temporary folder, and without destinations: nobody is told of the
parts. What a destination takes comes after the verdict, on a thread of its own.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge.cameras import Cameras, Overrides, Plan, plan_cameras
from edge.config import InspectConfig
from edge.daemon import run_inspection
from edge.inspector import InspectorLoader
from edge.result import Hop, Inspected
from edge.systemd import handle_signals
from edgeflame.errors import DataError

WARM_UP_PARTS = 20
"""Parts at the start that are left out: caches and the camera's own start."""

WAYS: dict[Hop, str] = {
    Hop.RECEIVED: "out of the camera's process",
    Hop.QUEUED: "into the queue",
    Hop.TAKEN: "waiting in the queue",
    Hop.RESIZED: "cropped and resized",
    Hop.SCORED: "image health and score",
    Hop.VERDICT: "its turn, and the verdict",
    Hop.STORED: "on the disk",
}
"""What a frame does until it passes each hop."""


class HopTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from the hop before, or from the capture, to this one, over all parts."""

    hop: str
    what: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


class TraceReport(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the parts of one source."""

    source: str
    num_parts: int
    parts_per_s: float
    dropped: int
    hops: tuple[HopTimes, ...]
    """Those that the frames of this source pass, in their order."""
    verdict: HopTimes
    """From the capture to the verdict."""


class _Collector:
    """A sink that notes when each part passed its hops."""

    def __init__(self) -> None:
        self.times: list[dict[Hop | None, float]] = []

    def accept(self, inspected: Inspected) -> None:
        if inspected.captured_monotonic_s is not None and Hop.SCORED in inspected.passed:
            times: dict[Hop | None, float] = {None: inspected.captured_monotonic_s, Hop.STORED: time.monotonic()}
            times |= {hop: at_s for hop, at_s in inspected.passed.items()}  # noqa: C416 - another type of keys
            self.times.append(times)

    def close(self) -> None: ...


def run_trace(model: Path, source: str, loader: InspectorLoader, *, num_parts: int) -> TraceReport:
    """Inspect a source and time each hop.

    Args:
        model: the package.
        source: its address, as for ``edgeflame inspect --source``.
        loader: opens the package.
        num_parts: number of parts to time, beyond the first twenty.

    Raises:
        DataError: the source gave fewer than two parts that could be scored, beyond the first twenty.
        EdgeFlameError: as the inspection.
    """

    def plan() -> Plan:
        return plan_cameras(
            InspectConfig(), model=model, source=source, product_of=lambda file: loader.package(file).manifest.product
        )

    collector = _Collector()
    with tempfile.TemporaryDirectory(prefix="edgeflame-trace-") as folder, handle_signals() as signals:
        state = Path(folder)
        overrides = Overrides(state)
        cameras = Cameras(plan(), loader, overrides, state)
        summary = run_inspection(
            cameras,
            [collector],
            overrides=overrides,
            reread=plan,
            state=state,
            limit=WARM_UP_PARTS + num_parts,
            signals=signals,
        )
    name = cameras.workers[0].status().source
    return make_report(name, collector.times[WARM_UP_PARTS:], dropped=sum(summary.dropped.values()))


def make_report(source: str, times: Sequence[dict[Hop | None, float]], *, dropped: int) -> TraceReport:
    """Summarise the times of parts.

    Args:
        source: name of the source.
        times: of each part: seconds at each hop, and at ``None`` of the capture.
        dropped: frames that were dropped.

    Raises:
        DataError: fewer than two parts.
    """
    if len(times) < 2:
        raise DataError(f"{source}: {len(times)} parts were scored beyond the first {WARM_UP_PARTS}; two are needed")
    # The time of a file, which waits for us, begins when it leaves the queue.
    passed = [hop for hop in Hop if all(one.get(hop, -math.inf) >= one[None] for one in times)]
    before: list[Hop | None] = [None, *passed[:-1]]
    captured = [one[None] for one in times]
    return TraceReport(
        source=source,
        num_parts=len(times),
        parts_per_s=round((len(times) - 1) / max(max(captured) - min(captured), 1e-9), 1),
        dropped=dropped,
        hops=tuple(
            _hop_times(hop.value, WAYS[hop], [one[hop] - one[last] for one in times])
            for last, hop in zip(before, passed, strict=True)
        ),
        verdict=_hop_times("capture to verdict", "", [one[Hop.VERDICT] - one[None] for one in times]),
    )


def _hop_times(hop: str, what: str, seconds: Sequence[float]) -> HopTimes:
    p50, p90, p99, most = (round(1000 * float(value), 3) for value in np.quantile(seconds, (0.5, 0.9, 0.99, 1.0)))
    return HopTimes(hop=hop, what=what, p50_ms=p50, p90_ms=p90, p99_ms=p99, max_ms=most)
