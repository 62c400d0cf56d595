"""How surely a rejection rate lies below a bound, when a few parts were photographed several times each.

Part g of m shows the share ``z_g`` of its photographs above a threshold: 0 or 1 where it was photographed once,
anything between otherwise. The photographs of a part may depend on each other in any way; the parts are independent.
Wanted is an upper confidence bound of the mean share, which is the rate at which photographs of the product are
rejected. Gaffke's bound [Gaffke 2005; Learned-Miller and Thomas, arXiv 1905.06208] is a quantile of::

    D_0 · 1 + D_1 · z_1 + … + D_m · z_m,        (D_0, …, D_m) uniform on the simplex

a Bayesian bootstrap over the parts with one more part that is rejected whole. For shares of 0 and 1 it *is* the exact
binomial bound of Clopper and Pearson; for shares between it is tighter. Its coverage is proven for 0 and 1 alone; for
the rest it is a conjecture without a known counterexample, which the test suite holds against hard distributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_ACCURACY = 1e-9
"""Of the probabilities computed by numerical inversion."""


def doubt(shares: Sequence[float] | F64, rate: float) -> float:
    """The probability, in the sense above, that the mean share is higher than ``rate``.

    A rate is an upper bound with confidence ``1 - doubt``. Never falls when a share rises; falls with the rate.

    Args:
        shares: one a part, each 0..1.
        rate: 0..1, both excluded.
    """
    from scipy.stats import beta

    values, counts = np.unique(np.asarray(shares, dtype=np.float64), return_counts=True)
    if set(values) <= {0.0, 1.0}:
        rejected = int(counts[values == 1.0].sum())
        if rejected == len(shares):
            return 1.0
        return float(beta.sf(rate, rejected + 1, len(shares) - rejected))
    # D is a vector of exponential variables over their sum, so the sum above exceeds the rate where
    # sum over g of E_g (z_g - rate) + E_0 (1 - rate) is positive.
    return _positive(np.append(values - rate, 1.0 - rate), np.append(counts, 1))


def upper_bound(shares: Sequence[float] | F64, confidence: float) -> float:
    """The lowest rate of which :func:`doubt` is ``1 - confidence``."""
    from scipy.optimize import brentq

    if min(shares) >= 1.0:
        return 1.0
    edge = 1e-12
    return float(brentq(lambda rate: doubt(shares, rate) - (1.0 - confidence), edge, 1.0 - edge, xtol=1e-10))


def two_sided(shares: Sequence[float] | F64, confidence: float) -> tuple[float, float]:
    """A lower and an upper bound of the mean share; each may fail in half of the cases left over."""
    shares = np.asarray(shares, dtype=np.float64)
    one_sided = 1.0 - (1.0 - confidence) / 2.0
    return 1.0 - upper_bound(1.0 - shares, one_sided), upper_bound(shares, one_sided)


def tightest_promise(num_parts: int, confidence: float) -> float:
    """The lowest rate that ``num_parts`` parts without a single rejection can promise: 1 - (1 - y)^(1/m)."""
    return float(-math.expm1(math.log1p(-confidence) / num_parts))


def parts_needed(rate: float, confidence: float) -> int:
    """How many good parts a promise takes: 299 for 1% with 95% confidence."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


def _positive(weights: F64, counts: npt.NDArray[np.int64]) -> float:
    """P(sum of weights_j · Gamma(counts_j) > 0), by inverting the characteristic function.

    The midpoint rule with step ``2π/T`` errs by less than the probability that the sum lies beyond ``±T`` (Davies
    1980, "The distribution of a linear combination of chi-squared random variables").
    """
    mean, deviation = float(weights @ counts), math.sqrt(float(weights**2 @ counts))
    period = abs(mean) + 12.0 * deviation + 30.0 * float(np.abs(weights).max())
    step = 2.0 * math.pi / period
    total, start, block = 0.0, 0, 4096
    while True:
        index = np.arange(start, start + block) + 0.5
        angles = np.outer(index * step, weights)
        size = np.exp(-0.5 * (np.log1p(angles**2) @ counts)) / (math.pi * index)
        total += float((size * np.sin(np.arctan(angles) @ counts)).sum())
        start += block
        # What is left is less than the sum of sizes that fall at least as 1/index².
        if size[-1] * start < _ACCURACY or start >= 1 << 20:
            return min(1.0, max(0.0, 0.5 + total))
