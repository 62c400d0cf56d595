"""Strategies that average: FedAvg, FedNova and SCAFFOLD's server.

:class:`FedAvg` is the average weighted by sample counts (FLAME Eq. 7), accumulated in float64 in site order.

:class:`FedNova` (Wang et al. 2020, arXiv 2007.07481) averages changes per step taken, so that a site that takes more
steps does not count for more. With ``a_i`` the gradients' worth of site i's local steps
(:func:`edgeflame.methods.accumulated_steps`; its number of steps where there is no momentum) and
``G_i = (w - w_i) / a_i`` its normalised change,

    w+ = w - (sum_i p_i a_i) (sum_i p_i G_i)

The learning rate is in ``w - w_i`` already. Eq. 8 of the FLAME paper multiplies each ``G_i`` by tau_i once more,
which undoes the normalisation. Running statistics of batch norms are no sums of gradients, and extrapolating them
could turn a variance negative: they are averaged.

:class:`Scaffold` (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1; FLAME paper Eq. 11-12) moves both model and
control variate by the mean change of the round's sites, the variate only as far as they are a share of all N:
``x+ = x + mean(y_i - x)`` and ``c+ = c + |S|/N mean(c_i+ - c_i)``. The mean is weighted by samples, as everywhere here
(the paper's is not), so the model moves towards the optimum of the pooled data; with all sites in every round ``c`` is
then the weighted mean of the ``c_i``. The server's step size is 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.methods import CONTROL_PREFIX, accumulated_steps
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


RUNNING_STATISTICS = (".running_mean", ".running_var")
"""Endings of the names of batch norms' statistics."""


class FedNova:
    """Normalised averaging."""

    def __init__(self, inputs: RoundInputs) -> None:
        momentum = inputs.config.learning.training.momentum
        steps = {c.site: accumulated_steps(c.num_steps, momentum) for c in inputs.contributions}
        effective = sum(c.weight * steps[c.site] for c in inputs.contributions)
        self._factors = {c.site: effective * c.weight / steps[c.site] for c in inputs.contributions}

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        is_average = name.endswith(RUNNING_STATISTICS)
        change = np.zeros_like(base)
        for contribution, values in updates:
            factor = contribution.weight if is_average else self._factors[contribution.site]
            change += factor * (values - base)
        result: F64 = base + change
        return result


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
