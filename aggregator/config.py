"""What a run is: rounds, sites, quorum, deadlines, checks, and the learning its sites are to do."""

from __future__ import annotations

import math

import msgspec

from aggregator.strategies import STRATEGIES
from edgeflame.errors import ConfigError, UsageError
from edgeflame.learning import FEDERATED_METHODS, Learning
from edgeflame.messages import MAX_ROUNDS
from edgeflame.topics import check_name


class AggregateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``edgeflame aggregate --config F``; the learning in the section ``[learning]``."""

    rounds: int = 2
    min_sites: int = 2
    """The run begins when so many sites are ready."""
    expected_sites: tuple[str, ...] = ()
    """If given, only these may take part, and the run begins when all are ready."""
    quorum: float = 0.6
    """Share of the asked sites whose updates a round needs; rounded up, at least one."""
    deadline_s: float = 300.0
    """A site that makes no progress for so long is left out of the round, seconds. Not a limit on the total."""
    sampling: float = 1.0
    """Share of the sites asked in each round; rounded up."""
    seed: int = 0
    """Of the sampling."""
    strategy: str = "fedavg"
    """How updates become the next global model."""
    max_relative_change: float = 10.0
    """An update may be so far from the base model, in units of the base model's norm; a diverged one is not."""
    max_samples: int = 10_000_000
    """No site has more images than this; an update that says so is refused, for it would outweigh all others."""
    max_model_bytes: int = 4 << 30
    """Of the initial model; updates are as large as it is."""
    learning: Learning = Learning(method="flame")

    def __post_init__(self) -> None:
        rules = (
            (1 <= self.rounds <= MAX_ROUNDS, f"rounds must be 1..{MAX_ROUNDS}", self.rounds),
            (1 <= self.min_sites <= 10_000, "min_sites must be 1..10000", self.min_sites),
            (0 < self.quorum <= 1, "quorum must be in (0, 1]", self.quorum),
            (0 < self.deadline_s < math.inf, "deadline_s must be > 0", self.deadline_s),
            (0 < self.sampling <= 1, "sampling must be in (0, 1]", self.sampling),
            (self.max_relative_change > 0, "max_relative_change must be > 0", self.max_relative_change),
            (self.max_samples >= 1, "max_samples must be >= 1", self.max_samples),
            (self.max_model_bytes >= 1, "max_model_bytes must be >= 1", self.max_model_bytes),
            (self.strategy in STRATEGIES, f"strategy: one of {', '.join(STRATEGIES)}", self.strategy),
            (
                self.learning.method in FEDERATED_METHODS,
                f"learning.method must be one that federates ({', '.join(FEDERATED_METHODS)})",
                self.learning.method,
            ),
        )
        for holds, rule, value in rules:
            if not holds:
                msg = f"{rule}, not {value}"
                raise ConfigError(msg)
        try:
            for name in self.expected_sites:
                check_name("site", name)
        except UsageError as exc:
            msg = f"expected_sites: {exc}"
            raise ConfigError(msg) from exc

    def replies_needed(self, num_asked: int) -> int:
        """The quorum of a round with so many asked sites."""
        # The product of a share and a count may miss an integer by rounding; 0.6 * 5 must be 3.
        return max(1, math.ceil(self.quorum * num_asked - 1e-9))

    def sample_size(self, num_sites: int) -> int:
        """How many of so many sites are asked in a round."""
        return max(1, math.ceil(self.sampling * num_sites - 1e-9))
