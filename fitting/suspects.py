"""Training images that look least normal: training sets are never clean.

Every image is scored by statistics that did not see its part (the cross-fit that sets the threshold), so a defect that
all photographs of a part show does not hide itself. What scores highest is shown to people; the worst share can be
left out of statistics and threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeflame.dataset import ImageRecord

NUM_SUSPECTS = 48
"""Kept with their maps, to be shown."""


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
