"""The map that is shown and measured by pixel, made of the map before smoothing.

The score is the maximum of the smoothed map, since one odd cell is no defect. But smoothing spreads a defect over
several times its size. So what is shown is the map before smoothing, brought to the scale of the score: what lies
above the picture's own level, its highest cell at the score. The picture's mean stands for its level, since light and
texture raise all of a picture's distances together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEVEL = 0.5
"""Share of the picture's mean distance that counts as its level.

0 leaves out what tells a bright picture from a defect, 1 what tells a picture that is odd all over from a good one. In
between it hardly matters; docs/methods.md has the figures."""


def shown_maps(
    unsmoothed: npt.NDArray[np.floating],
    scores: npt.NDArray[np.floating],
    judged: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float32]:
    """Maps for the eye and for pixel thresholds, on the scale of the scores.

    A map's maximum is its score exactly, so that something lies above the threshold if and only if the part fails.

    Args:
        unsmoothed: ``[N, h, w]`` raw distances before smoothing.
        scores: ``[N]``, the maxima of the smoothed maps.
        judged: ``[h, w]``, true for cells that count; None if all do.

    Returns:
        ``[N, h, w]`` >= 0, 0 in cells that do not count. A score that is not finite makes all of its map NaN.
    """
    counts: npt.NDArray[np.bool_] = np.ones(unsmoothed.shape[1:], dtype=bool) if judged is None else judged
    with np.errstate(invalid="ignore"):
        level = LEVEL * unsmoothed.mean(axis=(1, 2), keepdims=True, where=counts)
        excess = np.where(counts, np.maximum(unsmoothed - level, 0.0), 0.0)
        highest = excess.max(axis=(1, 2), keepdims=True)
        # The highest cell is 1 before it is multiplied: it is the score to the last bit.
        relative = excess / np.where(highest > 0, highest, 1.0)
        shown: npt.NDArray[np.float32] = (relative * scores[:, None, None]).astype(np.float32)
    shown[~np.isfinite(scores)] = np.nan
    return shown
