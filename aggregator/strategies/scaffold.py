"""SCAFFOLD's server (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1; FLAME paper Eq. 11-12).

Both model and control variate move by the mean change of the round's sites, the variate only as far as they are a
share of all N: ``x+ = x + mean(y_i - x)`` and ``c+ = c + |S|/N mean(c_i+ - c_i)``. The mean is weighted by samples,
as everywhere here (the paper's is not), so the model moves towards the optimum of the pooled data; with all sites in
every round ``c`` is then the weighted mean of the ``c_i``. The server's step size is 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.learning import CONTROL_PREFIX
from edgeflame.tensors import F64


class Scaffold:
    """The average of models, and of what the control variates changed by."""

    def __init__(self, inputs: RoundInputs) -> None:
        self._share = len(inputs.contributions) / max(inputs.num_members, 1)

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        change = np.zeros_like(base)
        for contribution, values in updates:
            change += contribution.weight * (values - base)
        result: F64 = base + (self._share if name.startswith(CONTROL_PREFIX) else 1.0) * change
        return result
