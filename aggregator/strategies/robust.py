"""Rules that bound what a few bad sites can do, whatever they send: every site counts the same.

The weight of an average is a share of samples, and a number of samples is a site's own claim; so none of these uses it.
A site's honest peculiarity (another camera, another product mix) is damped as an attack is: that is the price.

:class:`Median` and :class:`TrimmedMean` are coordinate-wise (Yin et al. 2018, arXiv 1803.01498, Definitions 1 and 2):
each value lies among the honest sites' as long as these are the majority, or fewer than ``trim`` of all are bad.
:class:`NormClipping` (Sun et al. 2019, arXiv 1911.07963, section 4) shortens the changes that are longer than a bound,
here the median of the round's lengths unless it is given; a bad site then moves the model by one site's share, in a
direction of its choice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.tensors import F64


class Median:
    """The median of each coordinate; of an even number of sites, the mean of the middle two."""

    def __init__(self, inputs: RoundInputs) -> None:
        del inputs

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        del name, base
        result: F64 = np.median(_stack_updates(updates), axis=0, overwrite_input=True)
        return result


class TrimmedMean:
    """The mean of each coordinate without its lowest and highest values."""

    def __init__(self, inputs: RoundInputs) -> None:
        num_sites = len(inputs.contributions)
        # Rounded up, for a share is meant to be survived; one value, or the middle two, must remain. The product of a
        # share and a count may miss an integer by rounding; 0.2 * 5 must be 1.
        self._cut = min(math.ceil(inputs.config.trim * num_sites - 1e-9), (num_sites - 1) // 2)

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        del name, base
        values = _stack_updates(updates)
        values.sort(axis=0)
        result: F64 = values[self._cut : len(values) - self._cut].mean(axis=0)
        return result


class NormClipping:
    """The mean of changes, each shortened to a bound."""

    def __init__(self, inputs: RoundInputs) -> None:
        lengths = {c.site: c.relative_change for c in inputs.contributions}
        given = inputs.config.clip_norm
        bound = statistics.median(lengths.values()) if given == "median" else given
        self._factors = {site: min(1.0, bound / length) if length else 1.0 for site, length in lengths.items()}

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        del name
        change = np.zeros_like(base)
        for contribution, values in updates:
            change += self._factors[contribution.site] * (values - base)
        result: F64 = base + change / len(self._factors)
        return result


def _stack_updates(updates: Iterable[tuple[Contribution, F64]]) -> F64:
    """``[sites, elements]``."""
    return np.stack([values for _, values in updates])
