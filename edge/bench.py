"""How long a scoring graph takes on this machine, and how much of that is its backbone.

Whatever is compared runs in one process, turn by turn, so that other work on the machine slows all alike.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from edge.runtimes import Device
from edge.runtimes.interface import INPUT
from edge.runtimes.onnx_runtime import open_session

GRAPH, BACKBONE = "graph", "backbone"
WARM_UP_CALLS = 3
MIN_CALLS = 20


class Latency(msgspec.Struct, frozen=True, kw_only=True):
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
    """None: as many as there are cores."""
    model_bytes: int
    peak_memory_bytes: int
    """Of this process, with everything that was loaded."""
    latencies: tuple[Latency, ...]

    def ratio(self, batch: int) -> tuple[float, float] | None:
        """Whole graph over backbone: of the medians and of the minima; None where the backbone was not measured."""
        found = {one.what: one for one in self.latencies if one.batch == batch}
        if not found.keys() >= {GRAPH, BACKBONE}:
            return None
        whole, part = found[GRAPH], found[BACKBONE]
        return whole.p50_ms / part.p50_ms, whole.min_ms / part.min_ms


def measure(
    model_onnx: bytes,
    *,
    backbone_onnx: bytes | None,
    input_size: tuple[int, int],
    batches: Sequence[int],
    seconds: float,
    device: Device = "auto",
    num_threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> BenchReport:
    """Time a graph, and its backbone alone if that is given, on noise.

    Args:
        model_onnx: a scoring graph.
        backbone_onnx: the same with the embeddings for an output.
        input_size: height and width.
        batches: sizes to time.
        seconds: about how long for each size.
        device: see :func:`edge.runtimes.open_runtime`.
        num_threads: of the CPU.
        progress: told each size before its turn.

    Raises:
        PackageError, RuntimeUnavailableError, MissingDependencyError: see :func:`edge.runtimes.open_runtime`.
    """
    models = {GRAPH: model_onnx} if backbone_onnx is None else {GRAPH: model_onnx, BACKBONE: backbone_onnx}
    sessions = {name: open_session(model, device=device, num_threads=num_threads) for name, model in models.items()}
    images = np.random.default_rng(0).integers(0, 256, (max(batches), *input_size, 3), dtype=np.uint8)
    latencies: list[Latency] = []
    for batch in batches:
        progress(batch)
        given = {INPUT: images[:batch]}
        calls = {name: partial(session.run, None, given) for name, session in sessions.items()}
        latencies += [_summary(name, batch, took) for name, took in take_turns(calls, seconds=seconds).items()]
    return BenchReport(
        provider=str(sessions[GRAPH].get_providers()[0]),
        num_threads=num_threads,
        model_bytes=len(model_onnx),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        latencies=tuple(latencies),
    )


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Call each in turn until the time is over, at least ``MIN_CALLS`` times; seconds of every call, by name."""
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = clock() + seconds
    turns = 0
    while turns < MIN_CALLS or clock() < end:
        for name, call in calls.items():
            start = clock()
            call()
            took[name].append(clock() - start)
        turns += 1
    return took


def _summary(what: str, batch: int, took_s: Sequence[float]) -> Latency:
    ms = 1000 * np.asarray(took_s)
    p50, p95, p99 = (float(value) for value in np.percentile(ms, (50, 95, 99)))
    return Latency(
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
