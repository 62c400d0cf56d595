"""What a server rule is: two kinds of strategy, and what they are told about a round.

A *block* strategy sees one block of one tensor at a time, from every site in sorted order, and knows nothing of
files: memory does not depend on the number of sites nor on the size of the model. A *file* strategy gets whole files,
for rules that need an update in one piece. Both are built anew for each round, so what they need to know of all
updates before the first block (norms, steps) they work out when they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgeflame.methods import ExchangeKind, Learning
from edgeflame.tensors import F64


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
        site: whose.
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
    """What a strategy may build on.

    Attributes:
        config: the run's.
        contributions: the round's accepted updates, in sorted site order.
        num_members: sites of the run, asked in this round or not.
    """

    config: StrategySettings
    contributions: tuple[Contribution, ...]
    num_members: int


class BlockStrategy(Protocol):
    """A rule that works block by block."""

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        """The new values of a block.

        Args:
            name: the tensor's.
            base: ``[elements]``, the round's base model.
            updates: for each site, in sorted site order, its ``[elements]``. An iterator that reads as it goes, once:
                a rule that takes one at a time holds one at a time.
        """
        ...


class FileStrategy(Protocol):
    """A rule that needs updates in one piece."""

    def merge_files(self, base: Path, contributions: tuple[Contribution, ...], out: Path) -> None:
        """Write the next global state to ``out``, in canonical form; the caller makes it durable.

        Args:
            base: the round's base.
            contributions: in sorted site order.
            out: a path to write to.

        Raises:
            DataError, StorageError: a file is not what was checked, or the disk fails.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """An entry of the registry.

    Attributes:
        build: makes the round's strategy.
        exchange: what it can aggregate; a learning method names what its sites send.
        needs_steps: updates that do not say their number of steps are refused.
        equal_votes: every site counts the same, whatever number of samples it claims.
        holds_all_sites: it needs a block of every site at once, and gets smaller ones the more sites there are.
    """

    build: Callable[[RoundInputs], BlockStrategy]
    exchange: ExchangeKind = "weights"
    needs_steps: bool = False
    equal_votes: bool = False
    holds_all_sites: bool = False


@dataclass(frozen=True, kw_only=True)
class FileRule:
    """As :class:`BlockRule`, of a strategy on whole files.

    Attributes:
        check: raises MissingDependencyError where the rule cannot work; called before a run begins.
    """

    build: Callable[[RoundInputs], FileStrategy]
    exchange: ExchangeKind = "weights"
    needs_steps: bool = False
    equal_votes: bool = False
    check: Callable[[], None] | None = None


Rule = BlockRule | FileRule
