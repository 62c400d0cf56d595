"""Dealing parts to sites. Pure; a part is never split, and every part goes to exactly one site."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from aggregator.simulation.config import Partition
from edgeflame.errors import ConfigError


def deal(
    groups: Mapping[str, str], sites: Sequence[str], partition: Partition, rng: np.random.Generator
) -> dict[str, list[str]]:
    """Which parts each site has.

    Args:
        groups: the category of every part.
        sites: who gets them.
        partition: by which rule.
        rng: of all that is drawn.

    Returns:
        For every site its parts, sorted.

    Raises:
        ConfigError: there are too few parts.
    """
    names = sorted(groups)
    quotas = _quotas(len(names), len(sites), partition, rng)
    shuffled = [names[index] for index in rng.permutation(len(names))]
    if partition.category_beta is None:
        edges = np.cumsum([0, *quotas])
        hands = [shuffled[start:stop] for start, stop in itertools.pairwise(edges)]
    else:
        hands = _by_category(shuffled, groups, quotas, partition.category_beta, rng)
    return {site: sorted(hand) for site, hand in zip(sites, hands, strict=True)}


def _quotas(num_groups: int, num_sites: int, partition: Partition, rng: np.random.Generator) -> list[int]:
    """How many parts each site gets: the minimum, and of the rest its share (even, or drawn)."""
    rest = num_groups - num_sites * partition.min_groups
    if rest < 0:
        msg = (
            f"{num_sites} sites of at least {partition.min_groups} parts need {num_sites * partition.min_groups}, "
            f"there are {num_groups} to train on; take fewer sites, more parts, or a lower partition.min_groups"
        )
        raise ConfigError(msg)
    if partition.beta == "even":
        shares = np.full(num_sites, 1 / num_sites)
    else:
        shares = rng.dirichlet(np.full(num_sites, partition.beta))
    extra = np.floor(shares * rest).astype(int)
    # What rounding down left over goes to those who lost most by it.
    by_loss = np.argsort(-(shares * rest - extra), kind="stable")
    extra[by_loss[: rest - int(extra.sum())]] += 1
    return [int(partition.min_groups + one) for one in extra]


def _by_category(
    shuffled: Sequence[str], groups: Mapping[str, str], quotas: Sequence[int], beta: float, rng: np.random.Generator
) -> list[list[str]]:
    """Each site draws its own mixture q ~ Dir(beta p), p the categories' shares, and its parts by q (Hsu et al. 2019).

    A category that is used up is drawn no more: q is renormalised over the rest, in which a site's q may be zero to
    rounding; then it takes what is most plentiful.
    """
    categories = sorted(set(groups.values()))
    left = {category: [name for name in shuffled if groups[name] == category] for category in categories}
    prior = np.array([len(left[category]) for category in categories]) / len(shuffled)
    hands = []
    for quota in quotas:
        mixture = rng.dirichlet(beta * prior)
        hand = []
        for _ in range(quota):
            stock = np.array([len(left[category]) for category in categories])
            weights = np.where(stock > 0, mixture, 0.0)
            if weights.sum() > 0:
                chosen = int(rng.choice(len(categories), p=weights / weights.sum()))
            else:
                chosen = int(np.argmax(stock))
            hand.append(left[categories[chosen]].pop())
        hands.append(hand)
    return hands
