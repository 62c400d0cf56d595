"""FedAvg: the average weighted by sample counts (FLAME Eq. 7), accumulated in float64 in site order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.tensors import F64


class FedAvg:
    """The weighted average; also the rule of methods that differ from it at the sites alone."""

    def __init__(self, inputs: RoundInputs) -> None:
        del inputs

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        del name
        total = np.zeros_like(base)
        for contribution, values in updates:
            total += contribution.weight * values
        return total
