"""Opens the runtime of a package: the requested one or, for ``auto``, the fastest that passes the parity gate.

If the requested device cannot be used, that is an error; there is no fallback. The parity gate: a graph may be used
only if it scores the package's reference images as the trained model did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast, get_args

import msgspec
import numpy as np

from edge.runtimes.interface import Runtime
from edge.runtimes.tensorrt import open_engine_runtime
from edgeflame.errors import DataError, EdgeFlameError, NegativeAnswerError, PackageError, UsageError
from edgeflame.log import EventLog
from edgeflame.onnx_session import Device, available_devices
from edgeflame.package import Package, root_mean_square
from edgeflame.tensorrt import TENSORRT_KINDS


def open_runtime(model_onnx: bytes, *, device: Device = "auto", num_threads: int | None = None) -> Runtime:
    """Load a scoring graph.

    Args:
        model_onnx: the ONNX model; it need not be trusted.
        device: ``auto`` uses CUDA if the installed ONNX Runtime has it and it works, otherwise the CPU.
        num_threads: CPU threads for one image; None: as many as there are cores to use.

    Raises:
        PackageError: the bytes are not a scoring graph that this runtime can load.
        RuntimeUnavailableError: the requested device cannot be used.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    from edge.runtimes.onnx_runtime import open_onnx_runtime

    return open_onnx_runtime(model_onnx, device=device, num_threads=num_threads)


Precision = Literal["fp32", "fp16", "int8"]

TOLERANCES: dict[str, float] = {"fp32": 0.005, "fp16": 0.02, "int8": 0.15}
"""Largest relative difference from the reference. Measured on CPUs: 1e-5 in float32, 2e-3 in float16, 0.12
in int8; the room in float32 is for GPUs whose convolutions use TF32. A wrong colour order or normalisation is far
outside."""


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """Comparison of a runtime's scores with those of the package's reference images."""

    precision: str
    provider: str
    tolerance: float
    num_images: int
    worst: float | None
    """Largest relative difference of a score, of a map's maximum or mean, or of the mean or mean square of the map
    before smoothing; None if one is not finite."""
    flipped: tuple[int, ...]
    """Indices of reference images whose verdict at the package's threshold differs."""

    @property
    def passed(self) -> bool:
        return self.worst is not None and self.worst <= self.tolerance and not self.flipped


def compare_with_references(runtime: Runtime, package: Package) -> ParityReport:
    """Score the package's reference images one by one, as in the inspection, and compare.

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
        scores, maps, unsmoothed = runtime.score(image[None])
        expected = reference.expected
        pairs = [
            (float(scores[0]), expected.score),
            (float(maps[0].max()), expected.map_max),
            (float(maps[0].mean(dtype="float64")), expected.map_mean),
        ]
        if unsmoothed is not None and expected.unsmoothed_mean is not None and expected.unsmoothed_rms is not None:
            pairs.append((float(unsmoothed[0].mean(dtype="float64")), expected.unsmoothed_mean))
            pairs.append((root_mean_square(unsmoothed[0]), expected.unsmoothed_rms))
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
    """As :func:`compare_with_references`, but raises if the comparison fails.

    Raises:
        NegativeAnswerError: the scores differ by more than the tolerance, or a verdict flips.
        PackageError: as there.
        RuntimeUnavailableError: as there.
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
"""Devices of ONNX Runtime, and TensorRT engines: ``rtx`` on RTX GPUs, ``tensorrt`` on Jetson and data-centre GPUs."""
LINE_DEVICES: tuple[LineDevice, ...] = get_args(LineDevice)

WARM_UP_RUNS, TIMED_RUNS = 3, 15


class RuntimeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime that ``auto`` has tried."""

    device: str
    median_ms: float | None = None
    """Median time for one image; None if it was refused, or was the only one."""
    worst_difference: float | None = None
    """Largest relative difference from the reference scores; None if the package holds no reference images."""
    refused: str | None = None
    """Why it cannot be used; None if it can."""


def open_for_line(
    package: Package, *, device: LineDevice, engines: Path | None = None, num_threads: int | None = None
) -> tuple[Runtime, tuple[RuntimeCandidate, ...]]:
    """Open the runtime of a package; returns it and, for ``auto``, the candidates (else none).

    Args:
        package: the package.
        device: the requested device.
        engines: folder written by ``edgeflame export --trt``; without it, ``auto`` tries no engines.
        num_threads: CPU threads for one image; None: as many as there are cores to use.

    Raises:
        UsageError: an engine is requested without a folder.
        NegativeAnswerError: for ``auto``: no runtime scores the reference images right.
        PackageError, RuntimeUnavailableError, MissingDependencyError: the requested device cannot be used.
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
    """Open each runtime, compare it with the reference images, and time those that pass.

    Args:
        package: the package.
        openers: open the runtimes, by device.

    Returns:
        The fastest, and all candidates, fastest first and refused ones last.

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
