"""What runs a package on the line: what was asked for or, for ``auto``, the fastest of those that score it right."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast, get_args

import msgspec
import numpy as np

from edge.parity import require_parity
from edge.runtimes import Device, Runtime, open_runtime
from edge.runtimes.engine import open_engine
from edge.runtimes.onnx_runtime import available_devices
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, UsageError
from edgeflame.package import Package
from edgeflame.trt_library import KINDS

log = EventLog("runtime")

LineDevice = Literal["auto", "cpu", "cuda", "ort-tensorrt", "rtx", "tensorrt"]
"""ONNX Runtime's devices, and an engine for ``rtx`` GPUs or, by ``tensorrt``, for Jetson and data-centre ones."""
LINE_DEVICES: tuple[LineDevice, ...] = get_args(LineDevice)

WARM_UP_RUNS, TIMED_RUNS = 3, 15


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that might run the package, and how it did."""

    device: str
    median_ms: float | None = None
    """For one image; None where it was refused, or had no rival."""
    worst_difference: float | None = None
    """From the reference scores, relative; None where the package holds no reference images."""
    refused: str | None = None


def open_for_line(
    package: Package, *, device: LineDevice, engines: Path | None = None, num_threads: int | None = None
) -> tuple[Runtime, tuple[Candidate, ...]]:
    """The runtime for a package, and for ``auto`` what it was chosen from (else nothing).

    Args:
        package: whose graph or engine.
        device: what is asked for.
        engines: folder of `edgeflame export --trt`; without it, engines are no candidates.
        num_threads: of the CPU for one image; None for as many as there are cores.

    Raises:
        UsageError: an engine is asked for without a folder.
        NegativeAnswerError: for ``auto``: nothing scores the reference images right.
        PackageError, RuntimeUnavailableError, MissingDependencyError: what was asked for cannot be had.
    """
    if device != "auto":
        return _opener(package, device, engines, num_threads)(), ()
    names: list[LineDevice] = [*available_devices(), *(KINDS if engines is not None else ())]
    openers: dict[str, Callable[[], Runtime]] = {name: _opener(package, name, engines, num_threads) for name in names}
    runtime, candidates = choose(package, openers)
    for candidate in candidates:
        if candidate.refused is not None:
            log.info("runtime_refused", device=candidate.device, reason=candidate.refused)
    passed = [candidate for candidate in candidates if candidate.refused is None]
    log.info(
        "runtime_chosen",
        device=passed[0].device,
        reason="the fastest that scores the reference images right" if passed[1:] else "the only one that can be had",
        **{f"{candidate.device}_ms": candidate.median_ms for candidate in passed if candidate.median_ms is not None},
    )
    return runtime, candidates


def choose(package: Package, openers: dict[str, Callable[[], Runtime]]) -> tuple[Runtime, tuple[Candidate, ...]]:
    """Open each, hold it to the reference images, time those that pass; the fastest, and all, fastest first.

    Raises:
        EdgeFlameError: none can be opened and passes; the last one's error.
    """
    passed: dict[str, tuple[Runtime, float | None]] = {}
    refused: list[Candidate] = []
    last: EdgeFlameError | None = None
    for name, opener in openers.items():
        try:
            runtime = opener()
            worst = require_parity(runtime, package).worst if package.references else None
        except EdgeFlameError as exc:
            last = exc
            refused.append(Candidate(device=name, refused=str(exc)))
            continue
        passed[name] = (runtime, worst)
    if not passed:
        assert last is not None, "there is always a CPU to try"
        raise last
    timed = {name: _median_ms(runtime) if len(passed) > 1 else None for name, (runtime, _) in passed.items()}
    order = sorted(passed, key=lambda name: timed[name] or 0.0)
    kept = [Candidate(device=name, median_ms=timed[name], worst_difference=passed[name][1]) for name in order]
    return passed[order[0]][0], (*kept, *refused)


def _opener(
    package: Package, device: LineDevice, engines: Path | None, num_threads: int | None
) -> Callable[[], Runtime]:
    if device not in KINDS:
        return lambda: open_runtime(package.model_onnx, device=cast(Device, device), num_threads=num_threads)
    if engines is None:
        msg = f"--device {device} runs an engine: say where it is with --engines DIR (see edgeflame export --trt)"
        raise UsageError(msg)
    return lambda: open_engine(package, engines, device)


def _median_ms(runtime: Runtime) -> float:
    image = np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8)
    took = []
    for _ in range(WARM_UP_RUNS + TIMED_RUNS):
        start = time.perf_counter()
        runtime.score(image)
        took.append(1000 * (time.perf_counter() - start))
    return round(float(np.median(took[WARM_UP_RUNS:])), 3)
