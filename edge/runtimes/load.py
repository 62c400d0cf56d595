"""What runs a package on the line: what was asked for or, for ``auto``, the fastest of those that pass the parity gate.

What was asked for is what runs, or it is an error. The parity gate: a graph may judge only if it scores the package's
reference images as the trained model did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast, get_args

import msgspec
import numpy as np

from edge.runtimes.interface import Device, Runtime
from edge.runtimes.onnx_runtime import available_devices
from edge.runtimes.tensorrt import open_engine_runtime
from edgeflame.errors import DataError, EdgeFlameError, NegativeAnswerError, PackageError, UsageError
from edgeflame.log import EventLog
from edgeflame.package import Package
from edgeflame.tensorrt import TENSORRT_KINDS


def open_runtime(model_onnx: bytes, *, device: Device = "auto", num_threads: int | None = None) -> Runtime:
    """Load a scoring graph.

    Args:
        model_onnx: the model; its bytes need not be trusted.
        device: ``auto`` takes CUDA where the installed runtime offers and manages it, the CPU otherwise.
        num_threads: of the CPU for one image; None for as many as there are cores.

    Raises:
        PackageError: the bytes are not a scoring graph this runtime can load.
        RuntimeUnavailableError: the device asked for cannot be had.
        MissingDependencyError: no runtime is installed.
    """
    from edge.runtimes.onnx_runtime import open_onnx_runtime

    return open_onnx_runtime(model_onnx, device=device, num_threads=num_threads)


Precision = Literal["fp32", "fp16", "int8"]

TOLERANCES: dict[str, float] = {"fp32": 0.005, "fp16": 0.02, "int8": 0.15}
"""Largest relative difference from the reference. Measured on CPUs: 1e-5 in float32, 2e-3 in float16, 0.12
in int8; the room in float32 is for GPUs whose convolutions use TF32. A wrong colour order or normalisation is far
outside."""


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a runtime's scores compare with the reference."""

    precision: str
    provider: str
    tolerance: float
    num_images: int
    worst: float | None
    """Largest relative difference of a score, or of a map's maximum or mean; None if one is not finite."""
    flipped: tuple[int, ...]
    """Reference images whose verdict at the package's threshold is another."""

    @property
    def passed(self) -> bool:
        return self.worst is not None and self.worst <= self.tolerance and not self.flipped


def compare_with_references(runtime: Runtime, package: Package) -> ParityReport:
    """Score the reference images one by one, as the line does, and compare.

    Raises:
        PackageError: a reference image cannot be decoded, or the graph names a precision that does not exist.
        RuntimeUnavailableError: the runtime fails.
    """
    precision = runtime.precision
    if precision not in get_args(Precision):
        raise PackageError(f"the graph says its precision is {precision!r}; known are {', '.join(get_args(Precision))}")
    threshold = package.manifest.threshold.value
    worst, flipped = 0.0, []
    for index, reference in enumerate(package.references):
        try:
            image = reference.image(package.manifest.learning.input)
        except DataError as exc:
            raise PackageError(str(exc)) from exc
        scores, maps = runtime.score(image[None])
        expected = reference.expected
        pairs = (
            (float(scores[0]), expected.score),
            (float(maps[0].max()), expected.map_max),
            (float(maps[0].mean(dtype="float64")), expected.map_mean),
        )
        for got, wanted in pairs:
            # The sum is NaN or infinite if any difference is, where a maximum could overlook it.
            difference = abs(got - wanted) / max(abs(wanted), 1e-12)
            worst = max(worst, difference) if math.isfinite(difference + worst) else math.inf
        if (pairs[0][0] > threshold) != (expected.score > threshold):
            flipped.append(index)
    return ParityReport(
        precision=precision,
        provider=runtime.provider,
        tolerance=TOLERANCES[precision],
        num_images=len(package.references),
        worst=worst if math.isfinite(worst) else None,
        flipped=tuple(flipped),
    )


def require_parity(runtime: Runtime, package: Package) -> ParityReport:
    """:func:`compare_with_references`, where a failure is an error.

    Raises:
        NegativeAnswerError: the scores differ by more than the tolerance, or a verdict flips.
        PackageError: see there.
        RuntimeUnavailableError: see there.
    """
    report = compare_with_references(runtime, package)
    if not report.passed:
        found = "a score that is not finite" if report.worst is None else f"a difference of {report.worst:.2%}"
        flips = f", and {len(report.flipped)} verdicts flip" if report.flipped else ""
        raise NegativeAnswerError(
            f"the graph on {report.provider} does not score the package's {report.num_images} reference images as the "
            f"trained model did: {found}{flips}; {report.precision} allows {report.tolerance:.2%}"
        )
    return report


log = EventLog("runtime")

LineDevice = Literal["auto", "cpu", "cuda", "ort-tensorrt", "rtx", "tensorrt"]
"""ONNX Runtime's devices, and an engine for ``rtx`` GPUs or, by ``tensorrt``, for Jetson and data-centre ones."""
LINE_DEVICES: tuple[LineDevice, ...] = get_args(LineDevice)

WARM_UP_RUNS, TIMED_RUNS = 3, 15


class RuntimeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that might run the package, and how it did."""

    device: str
    median_ms: float | None = None
    """For one image; None where it was refused, or had no rival."""
    worst_difference: float | None = None
    """From the reference scores, relative; None where the package holds no reference images."""
    refused: str | None = None


def open_for_line(
    package: Package, *, device: LineDevice, engines: Path | None = None, num_threads: int | None = None
) -> tuple[Runtime, tuple[RuntimeCandidate, ...]]:
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
    names: list[LineDevice] = [*available_devices(), *(TENSORRT_KINDS if engines is not None else ())]
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


def choose(package: Package, openers: dict[str, Callable[[], Runtime]]) -> tuple[Runtime, tuple[RuntimeCandidate, ...]]:
    """Open each, hold it to the reference images, time those that pass; the fastest, and all, fastest first.

    Raises:
        EdgeFlameError: none can be opened and passes; the last one's error.
    """
    passed: dict[str, tuple[Runtime, float | None]] = {}
    refused: list[RuntimeCandidate] = []
    last: EdgeFlameError | None = None
    for name, opener in openers.items():
        try:
            runtime = opener()
            worst = require_parity(runtime, package).worst if package.references else None
        except EdgeFlameError as exc:
            last = exc
            refused.append(RuntimeCandidate(device=name, refused=str(exc)))
            continue
        passed[name] = (runtime, worst)
    if not passed:
        assert last is not None, "there is always a CPU to try"
        raise last
    timed = {name: _median_ms(runtime) if len(passed) > 1 else None for name, (runtime, _) in passed.items()}
    order = sorted(passed, key=lambda name: timed[name] or 0.0)
    kept = [RuntimeCandidate(device=name, median_ms=timed[name], worst_difference=passed[name][1]) for name in order]
    return passed[order[0]][0], (*kept, *refused)


def _opener(
    package: Package, device: LineDevice, engines: Path | None, num_threads: int | None
) -> Callable[[], Runtime]:
    if device not in TENSORRT_KINDS:
        return lambda: open_runtime(package.model_onnx, device=cast(Device, device), num_threads=num_threads)
    if engines is None:
        raise UsageError(
            f"--device {device} runs an engine: say where it is with --engines DIR (see edgeflame export --trt)"
        )
    return lambda: open_engine_runtime(package, engines, device)


def _median_ms(runtime: Runtime) -> float:
    image = np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8)
    took = []
    for _ in range(WARM_UP_RUNS + TIMED_RUNS):
        start = time.perf_counter()
        runtime.score(image)
        took.append(1000 * (time.perf_counter() - start))
    return round(float(np.median(took[WARM_UP_RUNS:])), 3)
