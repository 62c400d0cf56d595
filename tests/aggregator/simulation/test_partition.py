"""Dealing parts to sites."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aggregator.simulation.config import Partition
from aggregator.simulation.data import partition_parts
from edgeflame.errors import ConfigError

SITES = [f"s{number}" for number in range(10)]


def groups(per_category: int = 100, categories: str = "abcde") -> dict[str, str]:
    return {f"{category}{number:03}": category for category in categories for number in range(per_category)}


def dealt(seed: int = 0, **partition: Any) -> dict[str, list[str]]:
    return partition_parts(groups(), SITES, Partition(**partition), np.random.default_rng(seed))


@pytest.mark.parametrize("category_beta", [None, 0.1, 100.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0, "even"])
def test_every_part_goes_to_one_site_and_every_site_has_the_least(beta: Any, category_beta: float | None) -> None:
    hands = dealt(beta=beta, category_beta=category_beta, min_groups=7)
    assert sorted(part for hand in hands.values() for part in hand) == sorted(groups())
    assert min(len(hand) for hand in hands.values()) >= 7
    assert hands == dealt(beta=beta, category_beta=category_beta, min_groups=7)
    assert hands != dealt(seed=1, beta=beta, category_beta=category_beta, min_groups=7)


def spread_of_sizes(beta: Any) -> float:
    sizes = [[len(hand) for hand in dealt(seed=seed, beta=beta, min_groups=1).values()] for seed in range(20)]
    return float(np.std(sizes, axis=1).mean())


def test_the_smaller_beta_the_more_unequal() -> None:
    assert spread_of_sizes("even") == 0
    # The standard deviation of a symmetric Dirichlet's shares is sqrt((K-1) / (K^2 (K beta + 1))).
    for beta in (0.5, 5.0):
        expected = 490 * np.sqrt(9 / (100 * (10 * beta + 1)))
        assert spread_of_sizes(beta) == pytest.approx(expected, rel=0.2)
    assert spread_of_sizes(0.1) > spread_of_sizes(0.5) > spread_of_sizes(5.0)


def test_category_skew() -> None:
    def largest_share(category_beta: float | None) -> float:
        hands = dealt(beta="even", category_beta=category_beta)
        return float(np.mean([max(sum(p[0] == c for p in hand) for c in "abcde") / 50 for hand in hands.values()]))

    assert largest_share(0.1) > 0.8
    assert largest_share(1000.0) < 0.4
    assert largest_share(None) < 0.4


def test_too_few_parts() -> None:
    with pytest.raises(ConfigError, match="10 sites of at least 51 parts need 510, there are 500"):
        dealt(min_groups=51)
