"""The bound on a rejection rate: exact where that is known, and its coverage where parts were photographed often."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta, binom

from fitting.threshold import exceedance_probability, parts_needed, tightest_rate, upper_confidence_bound

F64 = npt.NDArray[np.float64]


@pytest.mark.parametrize(("num_parts", "num_rejected"), [(1, 0), (7, 3), (122, 2), (122, 0), (5000, 40), (9, 9)])
def test_for_single_photographs_it_is_the_exact_binomial_bound(num_parts: int, num_rejected: int) -> None:
    shares = np.repeat([1.0, 0.0], [num_rejected, num_parts - num_rejected])
    for rate in (0.001, 0.01, 0.05, 0.4):
        assert exceedance_probability(shares, rate) == pytest.approx(
            binom.cdf(num_rejected, num_parts, rate), rel=1e-9, abs=1e-300
        )
    bound = upper_confidence_bound(shares, 0.95)
    expected = 1.0 if num_rejected == num_parts else beta.ppf(0.95, num_rejected + 1, num_parts - num_rejected)
    assert bound == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 20, 122, 700])
def test_the_inversion_gives_the_frequencies_of_drawn_weights(num_parts: int) -> None:
    rng = np.random.default_rng(num_parts)
    shares = rng.choice([0, 0, 0, 1 / 6, 0.5, 1], num_parts)
    shares[0] = 1 / 3
    weights = rng.exponential(size=(20000, num_parts + 1))
    means = (weights[:, 0] + weights[:, 1:] @ shares) / weights.sum(axis=1)
    for quantile in (0.05, 0.5, 0.95):
        rate = float(np.quantile(means, quantile))
        assert exceedance_probability(shares, rate) == pytest.approx(1 - quantile, abs=0.012)


def test_doubt_falls_with_the_rate_and_rises_with_every_share() -> None:
    shares = np.array([0, 0, 0.2, 0, 0.5, 0, 0, 0, 0, 0, 0, 1 / 3])
    doubts = [exceedance_probability(shares, rate) for rate in (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)]
    assert doubts == sorted(doubts, reverse=True)
    for index in range(len(shares)):
        worse = shares.copy()
        worse[index] = min(1.0, worse[index] + 0.1)
        assert exceedance_probability(worse, 0.2) >= exceedance_probability(shares, 0.2)


def test_promises_and_the_parts_they_take() -> None:
    assert parts_needed(0.01, 0.95) == 299
    assert tightest_rate(122, 0.95) == pytest.approx(0.0243, abs=5e-5)
    assert upper_confidence_bound(np.zeros(122), 0.95) == pytest.approx(tightest_rate(122, 0.95), abs=1e-9)
    # Photographs that agree bring nothing; photographs that do not, something.
    spread, together = np.repeat([1 / 6, 0.0], [12, 110]), np.repeat([1.0, 0.0], [2, 120])
    assert upper_confidence_bound(spread, 0.95) < upper_confidence_bound(together, 0.95)


def two_values(rng: np.random.Generator, size: tuple[int, int]) -> F64:
    """Mean 0.05: rarely one photograph of six."""
    return np.where(rng.random(size) < 0.3, 1 / 6, 0.0)


def three_values(rng: np.random.Generator, size: tuple[int, int]) -> F64:
    """Mean 0.05: mostly nothing, at times one of six, once in a while all."""
    return rng.choice([0.0, 1 / 6, 1.0], size, p=[0.85, 0.12, 0.03])


def whole_parts(rng: np.random.Generator, size: tuple[int, int]) -> F64:
    """Mean 0.05: all photographs of a part agree."""
    return (rng.random(size) < 0.05).astype(np.float64)


def beta_binomial(rng: np.random.Generator, size: tuple[int, int]) -> F64:
    """Mean 0.05: each part has a rate of its own, most near none."""
    return rng.binomial(6, rng.beta(0.1, 1.9, size)) / 6


def always_half(rng: np.random.Generator, size: tuple[int, int]) -> F64:
    """Mean 0.05, and no part far from it: the photographs of a part share it evenly."""
    return rng.choice([0.0, 0.1], size)


@pytest.mark.parametrize("draw", [two_values, three_values, whole_parts, beta_binomial, always_half])
@pytest.mark.parametrize("num_parts", [10, 60, 122])
def test_the_true_rate_lies_below_the_bound_as_often_as_stated(draw: object, num_parts: int) -> None:
    """At least 95% of repetitions, to within three standard errors of 1500 of them (0.017)."""
    assert callable(draw)
    shares = draw(np.random.default_rng(num_parts), (1500, num_parts))
    # The bound is at least 0.05 where there is still that much doubt at 0.05. Equal multisets have equal doubts.
    doubts: dict[tuple[float, ...], float] = {}
    covered = 0
    for one in np.sort(shares, axis=1).round(9):
        key = tuple(one)
        if key not in doubts:
            doubts[key] = exceedance_probability(one, 0.05)
        covered += doubts[key] > 0.05
    assert covered / len(shares) >= 0.95 - 0.017
