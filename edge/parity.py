"""The parity gate: a graph may judge only if it scores the package's reference images as the trained model did."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from edge.runtimes import Runtime
from edgeflame.errors import DataError, NegativeAnswerError, PackageError
from edgeflame.package import Package

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
        msg = f"the graph says its precision is {precision!r}; known are {', '.join(get_args(Precision))}"
        raise PackageError(msg)
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
        msg = (
            f"the graph on {report.provider} does not score the package's {report.num_images} reference images as the "
            f"trained model did: {found}{flips}; {report.precision} allows {report.tolerance:.2%}"
        )
        raise NegativeAnswerError(msg)
    return report
