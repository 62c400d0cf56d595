"""FedNova (Wang et al. 2020, arXiv 2007.07481): changes averaged per step taken, so that no site counts for its haste.

With ``a_i`` the gradients' worth of site i's local steps (:func:`edgeflame.learning.accumulated_steps`; its number of
steps where there is no momentum) and ``G_i = (w - w_i) / a_i`` its normalised change,

    w+ = w - (sum_i p_i a_i) (sum_i p_i G_i)

The learning rate is in ``w - w_i`` already. Eq. 8 of the FLAME paper multiplies each ``G_i`` by tau_i once more,
which undoes the normalisation. Running statistics of batch norms are no sums of gradients, and extrapolating them
could turn a variance negative: they are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.learning import accumulated_steps
from edgeflame.tensors import F64

RUNNING = (".running_mean", ".running_var")
"""Endings of the names of batch norms' statistics."""


class FedNova:
    """Normalised averaging."""

    def __init__(self, inputs: RoundInputs) -> None:
        momentum = inputs.config.learning.training.momentum
        steps = {c.site: accumulated_steps(c.num_steps, momentum) for c in inputs.contributions}
        effective = sum(c.weight * steps[c.site] for c in inputs.contributions)
        self._factors = {c.site: effective * c.weight / steps[c.site] for c in inputs.contributions}

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        is_average = name.endswith(RUNNING)
        change = np.zeros_like(base)
        for contribution, values in updates:
            factor = contribution.weight if is_average else self._factors[contribution.site]
            change += factor * (values - base)
        result: F64 = base + change
        return result
