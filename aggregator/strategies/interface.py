"""What a server rule is, and what it knows of a round.

A strategy is built anew for each round, so what it needs to know of all updates before it combines them (norms, steps)
is worked out when it is built. Most rules combine models block by block (:mod:`aggregator.strategies.blocks`); one
that needs updates in one piece reads the files itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgeflame.methods import ExchangeKind, Learning


class StrategySettings(Protocol):
    """What a strategy reads of a run's configuration; see :class:`aggregator.config.AggregateConfig`."""

    @property
    def trim(self) -> float: ...

    @property
    def clip_norm(self) -> float | Literal["median"]: ...

    @property
    def learning(self) -> Learning: ...


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """An accepted update, as the journal knows it.

    Attributes:
        site: whose update it is.
        path: the verified blob.
        weight: its share of the round's samples, or the same for all where the rule says so; a round's sum to 1.
        num_samples: images it was trained on.
        num_steps: optimiser steps taken; 0 if the site did not say.
        relative_change: its distance to the base model over the base model's norm.
    """

    site: str
    path: Path
    weight: float
    num_samples: int = 1
    num_steps: int = 0
    relative_change: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoundInputs:
    """What a strategy knows of its round when it is built.

    Attributes:
        config: the run's configuration.
        contributions: the round's accepted updates, in sorted site order.
        num_members: sites of the run, asked in this round or not.
    """

    config: StrategySettings
    contributions: tuple[Contribution, ...]
    num_members: int


class Strategy(Protocol):
    """Makes one global model of a round's updates."""

    def aggregate(self, base: Path, contributions: tuple[Contribution, ...], out: Path) -> None:
        """Write the next global model to ``out``, in canonical form; the caller makes it durable.

        Args:
            base: the round's base.
            contributions: in sorted site order.
            out: a path to write to.

        Raises:
            DataError, StorageError: a file is not what was checked, or the disk fails.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An entry of the registry.

    Attributes:
        build: makes the round's strategy.
        exchanges: what it can aggregate; a learning method names what its sites send.
        needs_steps: updates that do not say their number of steps are refused.
        equal_votes: every site counts the same, whatever number of samples it claims.
        check: raises MissingDependencyError where the rule cannot work; called before a run begins.
    """

    build: Callable[[RoundInputs], Strategy]
    exchanges: tuple[ExchangeKind, ...] = ("weights", "head")
    needs_steps: bool = False
    equal_votes: bool = False
    check: Callable[[], None] | None = None
