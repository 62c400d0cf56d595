"""How accepted updates become the next global model, block by block.

A strategy sees one block of one tensor at a time, from every site in sorted order, and knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from edgeflame.tensors import F64


class Strategy(Protocol):
    """A server rule."""

    def combine(self, base: F64, updates: Iterable[tuple[float, F64]]) -> F64:
        """The new values of a block.

        Args:
            base: ``[elements]``, the round's base model.
            updates: for each site, in sorted site order, its weight (they sum to 1) and its ``[elements]``. An
                iterator that reads as it goes: a rule that takes one at a time holds one at a time.
        """
        ...


class FedAvg:
    """The average weighted by sample counts (FLAME Eq. 7), accumulated in float64 in site order."""

    def combine(self, base: F64, updates: Iterable[tuple[float, F64]]) -> F64:
        total = np.zeros_like(base)
        for weight, values in updates:
            total += weight * values
        return total


STRATEGIES: dict[str, Strategy] = {"fedavg": FedAvg()}
"""By the name a configuration uses."""
