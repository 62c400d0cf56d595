"""Training images that look least normal: training sets are never clean.

Every image is scored by statistics that did not see its part (the cross-fit that sets the threshold), so a defect that
all photographs of a part show does not hide itself. What scores highest is shown to people; the worst share can be
left out of statistics and threshold. A part that moves the threshold by itself is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeflame.dataset import ImageRecord
from edgeflame.methods import Calibration
from edgeflame.statistics.shared import ScoreDeviation
from fitting.threshold import GoodScores, rule_threshold

NUM_SUSPECTS = 48
"""Kept with their maps, to be shown."""

LARGE_STEP = 0.2
"""A part is named without which the threshold would be lower by more than this share of it."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A training image that looks unlike the others.

    Attributes:
        record: the image.
        score: raw, by statistics that did not see its part.
        anomaly_map: ``[h, w]``, the map to show of the same, :func:`edgeflame.statistics.maps.shown_maps`.
        left_out: whether it was left out of statistics and threshold.
    """

    record: ImageRecord
    score: float
    anomaly_map: npt.NDArray[np.float32]
    left_out: bool


class HighestMaps:
    """The maps of the highest scores seen so far, within bounded memory."""

    def __init__(self, count: int = NUM_SUSPECTS) -> None:
        self._count = count
        self._kept: list[tuple[float, int, npt.NDArray[np.float32]]] = []

    def add(self, indices: Sequence[int], scores: npt.NDArray[np.floating], maps: npt.NDArray[np.float32]) -> None:
        """A batch of image indices, scores ``[N]`` and maps ``[N, h, w]``."""
        self._kept += [
            (float(score), index, one.copy()) for index, score, one in zip(indices, scores, maps, strict=True)
        ]
        self._kept.sort(key=lambda entry: (-entry[0], entry[1]))
        del self._kept[self._count :]

    def by_index(self) -> dict[int, npt.NDArray[np.float32]]:
        """Image index to map, the highest score first."""
        return {index: one for _, index, one in self._kept}


def worst_indices(scores: npt.NDArray[np.floating], share: float) -> list[int]:
    """Indices of the worst share of ``scores [N]``, the highest first; ties by index.

    Of any share above 0 at least one: who asks for some to be left out should not get none.
    """
    count = max(1, round(share * len(scores))) if share > 0 else 0
    return [int(index) for index in np.argsort(-scores, kind="stable")[:count]]


@dataclass(frozen=True, kw_only=True)
class InfluentialPart:
    """A good part that moves the threshold by itself.

    Attributes:
        images: indices of its photographs, the highest score first.
        without: what the threshold would be without it, lower by more than ``LARGE_STEP``.
    """

    images: tuple[int, ...]
    without: float


def influential_parts(
    scores: npt.NDArray[np.floating],
    groups: Sequence[str],
    calibration: Calibration,
    others: ScoreDeviation | None = None,
) -> tuple[InfluentialPart, ...]:
    """The parts of which any one, left out, would lower the threshold by more than ``LARGE_STEP``; the highest first.

    The scores are those at hand: nothing is fitted again without the part.

    Args:
        scores: ``[N]`` scores of good images that the statistics have not seen.
        groups: the part that each image shows.
        calibration: the rule of the threshold, as in :func:`fitting.threshold.set_threshold`.
        others: how much scores vary at other sites, as there.

    Raises:
        DataError: no scores.
        NumericalError: a score is not finite.
    """
    others = others if calibration.mode == "expected" else None
    part_of, good = np.asarray(groups), GoodScores(scores, groups, calibration.unit, others)
    names = np.unique(part_of)
    bar = (1.0 - LARGE_STEP) * rule_threshold(good, calibration)
    shares = good.shares(float(np.nextafter(bar, -np.inf)))
    found = []
    # A threshold below the bar is the likelier, the more above it goes: where one part is not enough, no later one is.
    for position in np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)]:
        its = part_of == names[position]
        if its.all():
            break
        rest = GoodScores(good.scores[~its], part_of[~its].tolist(), calibration.unit, others)
        without = rule_threshold(rest, calibration)
        if without >= bar:
            break
        images = sorted(np.flatnonzero(its).tolist(), key=lambda index: -good.scores[index])
        found.append(InfluentialPart(images=tuple(images), without=without))
    return tuple(sorted(found, key=lambda one: -good.scores[one.images[0]]))
