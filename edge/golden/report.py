"""What a self-test found, and how a line stands with it."""

from __future__ import annotations

import datetime as dt
from typing import Literal

import msgspec

from edge.results import Result

Expected = Literal["good", "bad"]
VERDICT_OF = {"good": "pass", "bad": "fail"}


class GoldenCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One golden part."""

    part: str
    """The file, or the part's id."""
    expected: str
    """``pass`` or ``fail``."""
    verdict: str
    ratio: float | None
    """Score over threshold."""
    reasons: tuple[str, ...] = ()
    """Of the verdict."""

    @property
    def is_right(self) -> bool:
        return self.verdict == self.expected


class GoldenReport(msgspec.Struct, frozen=True, kw_only=True):
    """One self-test."""

    camera: str
    product: str
    model: str
    kind: Literal["photographs", "part"]
    """``part``: a golden part before the camera, which tests lamp and lens as well."""
    at: dt.datetime
    """UTC."""
    passed: bool
    message: str
    """For people, without a full stop."""
    checks: tuple[GoldenCheck, ...]


class GoldenStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a camera stands."""

    last: GoldenReport | None = None
    acknowledged: bool = False
    """A person has seen that the last one failed."""

    @property
    def word(self) -> str | None:
        """``passed``, ``failed`` or ``acknowledged``; None before the first test."""
        if self.last is None:
            return None
        return "passed" if self.last.passed else "acknowledged" if self.acknowledged else "failed"

    @property
    def is_failing(self) -> bool:
        """Whether the last test failed and nobody has taken note."""
        return self.last is not None and not self.last.passed and not self.acknowledged


def check_of(result: Result, part: str, expected: Expected) -> GoldenCheck:
    """One golden part's result against what it should be; ``unknown`` is never right."""
    return GoldenCheck(
        part=part,
        expected=VERDICT_OF[expected],
        verdict=result.verdict,
        ratio=None if result.score is None else round(result.score / result.threshold, 4),
        reasons=result.reasons,
    )


def message_of(checks: tuple[GoldenCheck, ...]) -> str:
    """What came out, with the parts that were judged wrongly."""
    wrong = [one for one in checks if not one.is_right]
    if not wrong:
        return f"{len(checks)} golden part{'s' if len(checks) > 1 else ''} judged rightly"
    told = ", ".join(
        f"{one.part} should {one.expected} and came out {one.verdict}"
        + (f" at {one.ratio:.2f} of the threshold" if one.ratio is not None else "")
        for one in wrong[:3]
    )
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{len(wrong)} of {len(checks)} golden parts judged wrongly: {told}{more}"
