"""Aggregation: the next global model from a round's accepted updates, by the configured strategy.

Sites are taken in sorted order, so the result is bit-identical whatever the order in which the updates arrived. A
round's ledger entry states the weight of each update by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from aggregator.config import AggregateConfig
from aggregator.events import Round
from aggregator.strategies.interface import Contribution, RoundInputs


def update_weights(entry: Round, *, equal: bool = False) -> dict[str, float]:
    """The weight of each accepted update, its share of the round's samples (or ``equal``); they sum to 1."""
    if equal:
        return {site: 1 / len(entry.accepted) for site in sorted(entry.accepted)}
    total = sum(update.num_samples for update in entry.accepted.values())
    return {site: update.num_samples / total for site, update in sorted(entry.accepted.items())}


def round_contributions(entry: Round, config: AggregateConfig, path_of: Callable[[str], Path]) -> list[Contribution]:
    """The accepted updates of a round as a strategy gets them; ``path_of`` gives a blob's path by its SHA-256."""
    accepted = entry.accepted
    return [
        Contribution(
            site=site,
            path=path_of(accepted[site].decoded or accepted[site].sha256),
            weight=weight,
            num_samples=accepted[site].num_samples,
            num_steps=accepted[site].num_steps,
            relative_change=accepted[site].relative_change,
        )
        for site, weight in update_weights(entry, equal=config.rule.equal_votes).items()
    ]


def aggregate_updates(
    config: AggregateConfig, base: Path, contributions: Iterable[Contribution], out: Path, *, num_members: int
) -> None:
    """Write the next global model by the configuration's rule, in canonical form.

    The result depends on the set of contributions alone: sites are taken in sorted order, whatever the order here.

    Args:
        config: of the run.
        base: the round's base model.
        contributions: the accepted updates.
        out: where to write.
        num_members: sites of the run.

    Raises:
        DataError, StorageError: a blob on disk is not what was checked, or the disk fails.
    """
    ordered = tuple(sorted(contributions, key=lambda contribution: contribution.site))
    inputs = RoundInputs(config=config, contributions=ordered, num_members=num_members)
    config.rule.build(inputs).aggregate(base, ordered, out)
