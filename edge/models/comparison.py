"""Two models on the same parts: how often their verdicts differ, how their scores go together. Pure."""

from __future__ import annotations

import collections
import math

import numpy as np
import numpy.typing as npt

from edge.results import Result
from edge.verdict import Reason
from edgeflame.releases.messages import Disagreement

SCORES_KEPT = 10_000
"""Pairs for the correlation: the newest."""
_Z95 = 1.959963984540054

FAULTS = frozenset({Reason.RUNTIME_FAILED.value, Reason.SCORE_NOT_FINITE.value, Reason.NOT_SCORED.value})
"""Reasons of ``unknown`` that are the model's own doing and not the image's."""


def is_fault(result: Result) -> bool:
    """Whether the model itself failed on a part."""
    return bool(FAULTS.intersection(result.reasons))


_OF_THE_SCORE = frozenset({Reason.ABOVE_THRESHOLD.value, Reason.REVIEW_BAND.value})


def is_scored(result: Result) -> bool:
    """Whether a verdict is the model's, and not that of a bad image, a missed deadline or a failure."""
    return result.score is not None and _OF_THE_SCORE.issuperset(result.reasons)


class Comparison:
    """Adds up parts that two models judged: the present one, and the other."""

    def __init__(self) -> None:
        self.verdicts: collections.Counter[tuple[str, str]] = collections.Counter()
        """``(present, other)``."""
        self.num_faults = 0
        self.slowdown: float | None = None
        self._ratios: collections.deque[tuple[float, float]] = collections.deque(maxlen=SCORES_KEPT)

    def add(self, present: Result, other: Result) -> float | None:
        """Take a part.

        Returns:
            How far the two are apart, ``|log(score / threshold) difference|``, larger by 1000 where the verdicts
            differ; None if the part does not count: the verdict was not the present model's, or the other failed.
        """
        if not is_scored(present) or present.score is None:
            return None
        if is_fault(other):
            self.num_faults += 1
            return None
        self.verdicts[present.verdict, other.verdict] += 1
        distance = 0.0
        if other.score is not None:
            ours, theirs = present.score / present.threshold, other.score / other.threshold
            self._ratios.append((ours, theirs))
            distance = abs(math.log(max(ours, 1e-9) / max(theirs, 1e-9)))
        return distance + (1000.0 if present.verdict != other.verdict else 0.0)

    @property
    def parts(self) -> int:
        return self.verdicts.total()

    def disagreement(self, *, skipped: int = 0) -> Disagreement:
        """The sum so far."""
        parts = self.parts
        differing = sum(count for (ours, theirs), count in self.verdicts.items() if ours != theirs)
        return Disagreement(
            parts=parts,
            differing=differing,
            newly_failed=self.verdicts["pass", "fail"],
            newly_passed=self.verdicts["fail", "pass"],
            share=differing / parts if parts else None,
            upper=wilson_upper(differing, parts) if parts else None,
            correlation=rank_correlation(np.array(self._ratios, dtype=np.float64).reshape(-1, 2)),
            skipped=skipped,
            faults=self.num_faults,
            slowdown=self.slowdown,
        )


def wilson_upper(count: int, total: int) -> float:
    """Upper end of Wilson's 95% interval of a share (Wilson 1927)."""
    share, z2 = count / total, _Z95 * _Z95
    centre = share + z2 / (2 * total)
    spread = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return min(1.0, (centre + spread) / (1 + z2 / total))


def rank_correlation(pairs: npt.NDArray[np.float64]) -> float | None:
    """Spearman's coefficient of ``[N, 2]``, ties with their mean rank; None below three pairs or without spread."""
    if len(pairs) < 3:
        return None
    ranks = np.stack([_ranks(pairs[:, 0]), _ranks(pairs[:, 1])])
    spread = ranks.std(axis=1)
    if not spread.all():
        return None
    return float(np.clip(np.asarray(np.corrcoef(ranks))[0, 1], -1.0, 1.0))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = np.asarray(last - (counts - 1) / 2.0)
    return np.asarray(mean_rank[inverse], dtype=np.float64)
