"""Evidence that a stream of ranks has left its middle: a betting e-detector.

Theory of operation
-------------------
A part's value becomes its rank u in [0, 1] among the values of good parts. As long as nothing has changed, u is 1/2 on
average. Two hypotheses are bet against, part by part: "the mean of u is at most 1/2 + slack", and "at least 1/2 -
slack". A bet of the share L turns a stake of 1 into

    e = 1 + L (u - 1/2 - slack)            (the other one: 1 + L (1/2 - u - slack))

which is worth at most 1 on average as long as the hypothesis holds, whatever the distribution of u and however parts
depend on earlier ones, if only each part's mean given those before keeps to the slack. A new stake is laid at every
part, since the change may begin at any: M <- (M + 1) e. M less the number of parts is then a supermartingale, so the
mean number of parts until M first reaches C is at least C ("average run length", for all time and without correction
for looking after every part). Over several shares L the mean is taken, over K detectors each has to reach K C; both
keep the property.

    J. Shin, A. Ramdas, A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
    New England Journal of Statistics in Data Science, 2024 (Shiryaev-Roberts form)
    I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting", JRSS B, 2024

Parts on a line resemble their neighbours, so that their mean given those before does wander beyond the slack for a
while. Small stakes are immune to that: log M falls by L slack per part and wanders with the variance L^2 s^2 f, where
s^2 = 1/12 is that of a rank and f = 1 + 2 (r1 + r2 + ...) the variance inflation by autocorrelation, about the number
of parts in a row that are alike. An excursion of log M by x is then as improbable as exp(-x) or more so as long as

    L <= 2 slack / (s^2 (f - 1))

which is the largest share laid here (and never so large that one part may lose the whole stake). How this holds up,
and what it costs in delay, is measured in benchmarks/drift.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

NUM_SHARES = 4
"""Shares laid at once, each half the one before: small shifts call for small ones."""

_LARGEST_STAKE = 0.9
"""One part takes at most this share of what is at stake."""
_RANK_VARIANCE = 1 / 12
HIGHER, LOWER = 0, 1
"""Places of the two hypotheses' evidence."""


class Detector:
    """Evidence on S streams.

    Args:
        slack: ``[S]`` by how much each stream's mean rank may differ from 1/2: what is tolerated, and the reference's
            own uncertainty.
        tolerance: the part of it that is tolerated for good; bounds the stakes.
        alike: parts in a row that are alike, 1 where each is independent.
        ceiling: evidence is held at this: beyond it nothing is learnt, and after the change is over it takes the longer
            to fall.
    """

    def __init__(self, slack: F64, *, tolerance: float, alike: float, ceiling: float) -> None:
        self._slack = np.asarray(slack, dtype=np.float64)
        self._ceiling = ceiling
        largest = _LARGEST_STAKE / (0.5 + self._slack)
        if alike > 1:
            largest = np.minimum(largest, 2 * tolerance / (_RANK_VARIANCE * (alike - 1)))
        shares = largest[:, None] * 0.5 ** np.arange(NUM_SHARES)
        self._shares: F64 = shares[:, None, :]
        self.wealth: F64 = np.zeros((len(self._slack), 2, NUM_SHARES))
        """``[S, 2, NUM_SHARES]``, for higher and lower; may be set to what an earlier run left."""

    def update(self, ranks: F64) -> None:
        """Take one part's ``ranks [S]``, 0..1; NaN where a stream says nothing of it."""
        off = ranks - 0.5
        gains = np.stack([off - self._slack, -off - self._slack], axis=1)
        wealth = (self.wealth + 1) * (1 + self._shares * gains[:, :, None])
        told = np.isfinite(ranks)[:, None, None]
        self.wealth = np.where(told, np.minimum(wealth, self._ceiling), self.wealth)

    def evidence(self) -> F64:
        """Against "not higher" and "not lower", ``[S, 2]``.

        To be compared with the average run length times the number of hypotheses.
        """
        mean: F64 = self.wealth.mean(axis=2)
        return mean
