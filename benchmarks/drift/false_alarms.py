"""False alarms over a year of parts, and parts until a shift is found, by simulation.

    python benchmarks/drift/false_alarms.py [--lines 100] [--parts 2000000] [--write]

Every line watches one stream of normal values (ranks make any other continuous distribution the same). The daemon's
own detector (edge.drift.monitor), set to one alarm in 2,000,000 parts, is compared with common alternatives.
`--write` puts the table into false_alarms.md beside this file.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import ndtr, ndtri

from edge.config.inspection import DriftConfig
from edge.drift.monitor import Detector
from edgeflame.tensors import F64

CHUNK = 2000
PARTS_PER_ALARM = 2_000_000
WINDOW = 200
"""Parts of a test that is made window by window."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """How parts follow one another."""

    name: str
    phi: float = 0.0
    """Correlation of a part with the one before (AR(1))."""
    lot: int = 0
    """Parts of a lot; its mean has the spread ``lot_spread``."""
    lot_spread: float = 0.0
    defects: float = 0.0
    """Share of parts with a score beyond all good ones."""
    reference: int = 0
    """Parts that the reference was learnt from; 0 for exact knowledge."""

    def chunks(self, rng: np.random.Generator, lines: int) -> Iterator[F64]:
        """``[lines, CHUNK]`` standard normal values, for ever."""
        state = rng.standard_normal(lines)
        lot_mean, left = np.zeros(lines), 0
        while True:
            values = rng.standard_normal((lines, CHUNK))
            if self.phi:
                for step in range(CHUNK):
                    state = self.phi * state + math.sqrt(1 - self.phi**2) * values[:, step]
                    values[:, step] = state
            if self.lot:
                for step in range(CHUNK):
                    if left == 0:
                        lot_mean, left = self.lot_spread * rng.standard_normal(lines), self.lot
                    values[:, step] += lot_mean
                    left -= 1
                values /= math.sqrt(1 + self.lot_spread**2)
            if self.defects:
                values[rng.random((lines, CHUNK)) < self.defects] = 10.0
            yield values


LINES = (
    Line(name="independent parts"),
    Line(name="AR(1), 0.5", phi=0.5),
    Line(name="AR(1), 0.9", phi=0.9),
    Line(name="lots of 200, spread 0.3", lot=200, lot_spread=0.3),
    Line(name="lots of 5000, spread 0.3", lot=5000, lot_spread=0.3),
    Line(name="3% defects", defects=0.03),
    Line(name="reference of 100 parts", reference=100),
    Line(name="reference of 1000 parts", reference=1000),
)
SHIFTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


class Watch(Protocol):
    """A way to detect drift."""

    def step(self, ranks: F64) -> npt.NDArray[np.bool_]:
        """Take one part of each line; returns which lines raise an alarm, and starts these anew."""
        ...


class Betting:
    """The daemon's own detector."""

    def __init__(self, lines: int, doubt: float, config: DriftConfig) -> None:
        self._bound = 2.0 * PARTS_PER_ALARM  # two hypotheses: higher, lower
        slack = np.full(lines, config.tolerance + doubt)
        self._detector = Detector(slack, tolerance=config.tolerance, alike=config.alike, ceiling=10 * self._bound)

    def step(self, ranks: F64) -> npt.NDArray[np.bool_]:
        self._detector.update(ranks)
        alarms: npt.NDArray[np.bool_] = self._detector.evidence().max(axis=1) >= self._bound
        self._detector.wealth[alarms] = 0
        return alarms


class Cusum:
    """Two-sided CUSUM of normal scores, its limit set by Siegmund's formula for independent parts in the middle."""

    def __init__(self, lines: int, doubt: float, allowance: float = 0.25) -> None:
        del doubt
        self._allowance = allowance
        self._limit = _cusum_limit(allowance, 2.0 * PARTS_PER_ALARM)
        self._sums = np.zeros((2, lines))

    def step(self, ranks: F64) -> npt.NDArray[np.bool_]:
        value = ndtri(np.clip(ranks, 1e-3, 1 - 1e-3))
        self._sums = np.maximum(self._sums + np.stack([value, -value]) - self._allowance, 0)
        alarms: npt.NDArray[np.bool_] = (self._sums >= self._limit).any(axis=0)
        self._sums[:, alarms] = 0
        return alarms


class Windows:
    """A Kolmogorov-Smirnov test of each window against the reference."""

    def __init__(self, lines: int, doubt: float, level: float) -> None:
        del doubt
        self._limit = float(stats.kstwo.isf(level, WINDOW))
        self._ranks = np.zeros((lines, WINDOW))
        self._filled = 0

    def step(self, ranks: F64) -> npt.NDArray[np.bool_]:
        self._ranks[:, self._filled] = ranks
        self._filled += 1
        if self._filled < WINDOW:
            return np.zeros(len(ranks), dtype=bool)
        self._filled = 0
        ordered = np.sort(self._ranks, axis=1)
        upper = np.arange(1, WINDOW + 1) / WINDOW - ordered
        lower = ordered - np.arange(WINDOW) / WINDOW
        alarms: npt.NDArray[np.bool_] = np.maximum(upper.max(axis=1), lower.max(axis=1)) >= self._limit
        return alarms


def _cusum_limit(allowance: float, run_length: float) -> float:
    def length(limit: float) -> float:
        b = 2 * allowance * (limit + 1.166)
        return (math.exp(b) - b - 1) / (2 * allowance**2)

    low, high = 0.0, 200.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) < run_length else (low, middle)
    return high


WATCHES: dict[str, Callable[[int, float], Watch]] = {
    f"betting, alike {alike:g}": lambda lines, doubt, alike=alike: Betting(
        lines, doubt, DriftConfig(alike=alike, parts_per_year=PARTS_PER_ALARM)
    )
    for alike in (1.0, 5.0, 20.0)
} | {
    "CUSUM, 0.25": Cusum,
    "KS, p < 0.001 a window": lambda lines, doubt: Windows(lines, doubt, 0.001),
    "KS, p corrected for the year": lambda lines, doubt: Windows(lines, doubt, WINDOW / PARTS_PER_ALARM),
}


def ranks_of(values: F64, reference: F64 | None) -> F64:
    """Ranks ``[lines, T]``, exact or among each line's own reference ``[lines, N]``, sorted."""
    if reference is None:
        return np.asarray(ndtr(values))
    below = np.stack([np.searchsorted(own, row) for own, row in zip(reference, values, strict=True)])
    return np.asarray((below + 0.5) / (reference.shape[1] + 1))


def watches_for(line: Line, lines: int) -> dict[str, Watch]:
    doubt = 2.33 / math.sqrt(12 * line.reference) if line.reference else 0.0
    return {name: make(lines, doubt) for name, make in WATCHES.items()}


def false_alarms(line: Line, lines: int, parts: int, seed: int) -> dict[str, float]:
    """False alarms per line and 2,000,000 parts, by watch."""
    rng = np.random.default_rng(seed)
    reference = np.sort(rng.standard_normal((lines, line.reference)), axis=1) if line.reference else None
    watches = watches_for(line, lines)
    counts = dict.fromkeys(watches, 0)
    seen = 0
    for values in line.chunks(rng, lines):
        for ranks in ranks_of(values, reference).T:
            for name, watch in watches.items():
                counts[name] += int(watch.step(ranks).sum())
        seen += CHUNK
        if seen >= parts:
            return {name: count / lines / seen * PARTS_PER_ALARM for name, count in counts.items()}
    raise AssertionError


def delays(shift: float, lines: int, seed: int, before: int = 4000, at_most: int = 20_000) -> dict[str, float]:
    """Median parts from the shift to the alarm, independent parts; infinite where most lines raised no alarm."""
    rng = np.random.default_rng(seed)
    watches = watches_for(LINES[0], lines)
    found = {name: np.full(lines, np.inf) for name in watches}
    for step in range(-before, at_most):
        ranks = np.asarray(ndtr(rng.standard_normal(lines) + (shift if step >= 0 else 0.0)))
        for name, watch in watches.items():
            alarms = watch.step(ranks)
            if step >= 0:
                found[name] = np.where(alarms & np.isinf(found[name]), step + 1, found[name])
        if step % 500 == 0 and all(np.isfinite(one).all() for one in found.values()):
            break
    return {name: float(np.median(one)) for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100)
    parser.add_argument("--parts", type=int, default=200_000, help="of each line; 2,000,000 are a year")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    years = options.lines * options.parts / PARTS_PER_ALARM
    conditions = (
        f"{options.lines} lines of {options.parts} parts each, {years:g} years of {PARTS_PER_ALARM} together, one "
        "stream; an alarm clears itself. "
        f"`python benchmarks/drift/false_alarms.py --lines {options.lines} --parts {options.parts} --write`"
    )
    out = [
        conditions,
        "",
        "## False alarms per year",
        "",
        "| line | " + " | ".join(WATCHES) + " |",
        "|---" * (len(WATCHES) + 1) + "|",
    ]
    for seed, line in enumerate(LINES):
        rates = false_alarms(line, options.lines, options.parts, seed)
        out.append(f"| {line.name} | " + " | ".join(f"{rates[name]:.3g}" for name in WATCHES) + " |")
        print(out[-1], f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    out += [
        "",
        "## Median parts until a lasting shift is found",
        "",
        "Shifts in standard deviations of the parts; independent parts, exact reference.",
        "",
        "| shift | " + " | ".join(WATCHES) + " |",
        "|---" * (len(WATCHES) + 1) + "|",
    ]
    for seed, shift in enumerate(SHIFTS):
        found = delays(shift, options.lines, 100 + seed)
        medians = [f"{found[name]:.0f}" if math.isfinite(found[name]) else "> 20000" for name in WATCHES]
        out.append(f"| {shift:g} | " + " | ".join(medians) + " |")
        print(out[-1], f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    text = "\n".join(out) + "\n"
    print(text)
    if options.write:
        Path(__file__).with_name("false_alarms.md").write_text(text)


if __name__ == "__main__":
    main()
