"""How accepted updates become the next global model: one small module per rule, one line each in ``STRATEGIES``."""

from __future__ import annotations

from aggregator.strategies.averaging import FedAvg, FedNova, Scaffold
from aggregator.strategies.blocks import blockwise
from aggregator.strategies.interface import Rule
from aggregator.strategies.memory import KMeansMemory, require_scikit_learn
from aggregator.strategies.robust import Median, NormClipping, TrimmedMean
from edgeflame.methods import METHODS

AUTO = "auto"
"""The rule that belongs to the learning method."""

STRATEGIES: dict[str, Rule] = {
    "fedavg": Rule(build=blockwise(FedAvg)),
    "fednova": Rule(build=blockwise(FedNova), exchanges=("weights",), needs_steps=True),
    "scaffold": Rule(build=blockwise(Scaffold), exchanges=("controls",)),
    "median": Rule(build=blockwise(Median, holds_all_sites=True), equal_votes=True),
    "trimmed_mean": Rule(build=blockwise(TrimmedMean, holds_all_sites=True), equal_votes=True),
    "norm_clipping": Rule(build=blockwise(NormClipping), equal_votes=True),
    "kmeans": Rule(build=KMeansMemory, exchanges=("memory",), check=require_scikit_learn),
}
"""By the name a configuration uses."""


def resolve_strategy(strategy: str, method: str) -> str:
    """The rule's own name: ``strategy``, or what ``auto`` means for a federated method."""
    if strategy != AUTO:
        return strategy
    own = METHODS[method].strategy
    assert own is not None, f"{method} federates nothing"
    return own
