"""Benchmark of a scoring graph on this machine, and of its backbone alone.

What is compared runs in one process, in turns, so that other load on the machine slows all alike. Each turn begins with
a pause, because a runtime's threads spin for a while after a call and would take the next one's cores; then comes one
call that is not counted, to fill the caches, and several that are.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from edge.runtimes.interface import Runtime
from edge.runtimes.load import RuntimeCandidate
from edgeflame.onnx_session import Device, open_session
from edgeflame.scoring_graph import INPUT

GRAPH, BACKBONE = "graph", "backbone"
WARM_UP_CALLS = 3
CALLS_A_TURN = 5
MIN_CALLS = 20
PAUSE_S = 0.02


class BenchLatency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds a call, over all calls."""

    what: str
    batch: int
    num_calls: int
    min_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    images_per_s: float
    """At the median."""


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies by batch size, and memory."""

    provider: str
    num_threads: int | None
    """CPU threads; null: as many as there are cores."""
    model_bytes: int
    peak_memory_bytes: int
    """Largest resident memory of this process, with everything that was loaded."""
    latencies: tuple[BenchLatency, ...]
    candidates: tuple[RuntimeCandidate, ...] = ()
    """The runtimes that ``auto`` chose from, fastest first."""

    def ratio(self, batch: int) -> tuple[float, float] | None:
        """Time of the whole graph over that of the backbone: medians and minima; None if the backbone was not timed."""
        found = {one.what: one for one in self.latencies if one.batch == batch}
        if not found.keys() >= {GRAPH, BACKBONE}:
            return None
        whole, part = found[GRAPH], found[BACKBONE]
        return whole.p50_ms / part.p50_ms, whole.min_ms / part.min_ms


def run_bench(
    runtime: Runtime,
    *,
    model_bytes: int,
    backbone_onnx: bytes | None,
    batches: Sequence[int],
    seconds: float,
    device: Device = "auto",
    num_threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> BenchReport:
    """Time a graph, and its backbone alone if that is given, on images of noise.

    Args:
        runtime: the scoring graph's.
        model_bytes: size of the graph's file, for the report.
        backbone_onnx: the graph up to the backbone's feature maps, for ONNX Runtime; None: it is not timed.
        batches: batch sizes.
        seconds: about how long each size is timed.
        device: for the backbone, see :func:`edge.runtimes.load.open_runtime`.
        num_threads: CPU threads, for the backbone and the report.
        progress: called with each batch size before it is timed.

    Raises:
        PackageError, RuntimeUnavailableError, MissingDependencyError: see :func:`edge.runtimes.load.open_runtime`.
    """
    images = np.random.default_rng(0).integers(0, 256, (max(batches), *runtime.input_size, 3), dtype=np.uint8)
    backbone = None if backbone_onnx is None else open_session(backbone_onnx, device=device, num_threads=num_threads)
    latencies: list[BenchLatency] = []
    for batch in batches:
        progress(batch)
        calls: dict[str, Callable[[], object]] = {GRAPH: partial(runtime.score, images[:batch])}
        if backbone is not None:
            calls[BACKBONE] = partial(backbone.run, None, {INPUT: images[:batch]})
        latencies += [_summary(name, batch, took) for name, took in take_turns(calls, seconds=seconds).items()]
    return BenchReport(
        provider=runtime.provider,
        num_threads=num_threads,
        model_bytes=model_bytes,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        latencies=tuple(latencies),
    )


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """Call each in turn for ``seconds``, at least ``MIN_CALLS`` times; returns the seconds of every call, by name."""
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = clock() + seconds
    num_calls = 0
    while num_calls < MIN_CALLS or clock() < end:
        for name, call in calls.items():
            pause(PAUSE_S)
            call()
            for _ in range(CALLS_A_TURN):
                start = clock()
                call()
                took[name].append(clock() - start)
        num_calls += CALLS_A_TURN
    return took


def _summary(what: str, batch: int, took_s: Sequence[float]) -> BenchLatency:
    ms = 1000 * np.asarray(took_s)
    p50, p95, p99 = (float(value) for value in np.percentile(ms, (50, 95, 99)))
    return BenchLatency(
        what=what,
        batch=batch,
        num_calls=len(ms),
        min_ms=float(ms.min()),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(ms.max()),
        images_per_s=1000 * batch / p50,
    )
