"""From a stream's value to its rank among good parts. Ranks have no units and no tails: one wild part is one part."""

from __future__ import annotations

import math

import numpy as np

from edgeflame.condition import NUM_QUANTILES, PART_STREAMS, StreamReference

RESOLUTION = {
    "brightness": 2.0,
    "contrast": 1.0,
    "colour": 1.5,
    "sharpness": 0.1,
    "noise": 0.1,
    "shift_x": 0.5,
    "shift_y": 0.5,
}
"""Differences of a picture below these matter to no model, however alike the reference's pictures were; in the units of
:mod:`edgeflame.condition`."""

RELATIVE_RESOLUTION = 0.02
"""The same for scores, as a share of their median: other runtimes and precisions differ by so much."""

_LEVELS = np.linspace(0, 1, NUM_QUANTILES)
_REFERENCE_DOUBT = 2.33
"""Standard errors of the reference's own middle that are allowed for: 99% of references are no further off."""


class Ranks:
    """Ranks among the values of one reference.

    Args:
        name: of the stream.
        reference: its distribution.
    """

    def __init__(self, name: str, reference: StreamReference) -> None:
        self._quantiles = np.asarray(reference.quantiles, dtype=np.float64)
        median = abs(reference.quantiles[NUM_QUANTILES // 2])
        self._step = RELATIVE_RESOLUTION * median if name in PART_STREAMS else RESOLUTION[name]
        self.doubt = _REFERENCE_DOUBT * math.sqrt(1 / (12 * reference.count))
        """How far the true middle may be from rank 1/2, for a reference is a sample itself."""

    def rank(self, value: float) -> float:
        """0..1; 1/2 for a value in the middle, and for any within the resolution of a reference without spread."""
        return (self._share_below(value - self._step) + self._share_below(value + self._step)) / 2

    def _share_below(self, value: float) -> float:
        # Among equal quantiles the middle one: np.interp would take either end.
        first, last = np.searchsorted(self._quantiles, value, "left"), np.searchsorted(self._quantiles, value, "right")
        if last > first:
            return float(_LEVELS[first] + _LEVELS[last - 1]) / 2
        return float(np.interp(value, self._quantiles, _LEVELS))
