"""What a run came to: counts, latency, and right and wrong where the truth is known."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from edge.parts.counts import PartCounts
from edge.results import Result

LATENCY_WINDOW = 100_000
"""Quantiles are of the last so many parts, so that a run of years takes no more memory than one of days."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Capture to verdict, in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts against the labels of the parts that have one."""

    right: int
    wrong: int
    false_rejects: int
    """Good parts that failed."""
    missed: int
    """Defective parts that passed."""
    undecided: int
    """``unknown`` verdicts."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    parts: int
    passed: int
    failed: int
    unknown: int
    reasons: dict[str, int]
    """How often each reason was given, of failed and unknown parts."""
    dropped: dict[str, int]
    """Frames never looked at, by reason."""
    duration_s: float
    latency_ms: Latency | None
    truth: Truth | None
    evidence_lost: int = 0
    """Pictures of rejected parts that could not be stored, or had to make room for results."""
    undelivered: dict[str, int] = {}
    """Results kept for the next start, by destination."""
    counts: PartCounts = msgspec.field(default_factory=PartCounts)
    """What became of announced and numbered parts."""


class Tally:
    """Adds up results, of any number of threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._verdicts: collections.Counter[str] = collections.Counter()
        self._reasons: collections.Counter[str] = collections.Counter()
        self._truth: collections.Counter[str] = collections.Counter()
        self._latencies: collections.deque[float] = collections.deque(maxlen=LATENCY_WINDOW)

    @property
    def parts(self) -> int:
        return self._verdicts.total()

    def add(self, result: Result) -> int:
        """Count a result; how many there are now."""
        with self._lock:
            self._add(result)
            return self.parts

    def _add(self, result: Result) -> None:
        self._verdicts[result.verdict] += 1
        self._reasons.update(result.reasons)
        self._latencies.append(result.latency_ms)
        if result.label is None:
            return
        if result.is_right is None:
            self._truth["undecided"] += 1
        elif result.is_right:
            self._truth["right"] += 1
        else:
            self._truth["missed" if result.verdict == "pass" else "false_rejects"] += 1

    def summary(self, *, dropped: Mapping[str, int]) -> Summary:
        """The sum so far."""
        truth = self._truth
        return Summary(
            parts=self.parts,
            passed=self._verdicts["pass"],
            failed=self._verdicts["fail"],
            unknown=self._verdicts["unknown"],
            reasons=dict(self._reasons),
            dropped=dict(dropped),
            duration_s=round(self._clock() - self._started, 3),
            latency_ms=_latency(self._latencies),
            truth=Truth(
                right=truth["right"],
                wrong=truth["missed"] + truth["false_rejects"],
                false_rejects=truth["false_rejects"],
                missed=truth["missed"],
                undecided=truth["undecided"],
            )
            if truth
            else None,
        )


def _latency(latencies_ms: collections.deque[float]) -> Latency | None:
    if not latencies_ms:
        return None
    p50, p95, p99, largest = (round(float(value), 3) for value in np.percentile(latencies_ms, [50, 95, 99, 100]))
    return Latency(p50=p50, p95=p95, p99=p99, max=largest)
