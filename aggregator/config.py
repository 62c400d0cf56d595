"""What a run is: rounds, sites, quorum, deadlines, checks, and the learning its sites are to do."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from aggregator.exchanges import EXCHANGES, Exchange
from aggregator.strategies import AUTO, STRATEGIES, resolve_strategy
from aggregator.strategies.interface import Rule
from edgeflame.errors import ConfigError, UsageError
from edgeflame.methods import FEDERATED_METHODS, MAX_RANK, METHODS, Learning
from edgeflame.mqtt.messages import MAX_ROUNDS, Codec
from edgeflame.mqtt.topics import check_name
from edgeflame.transfer.compression import FALLBACKS, has_zstd


class Convergence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the rounds end before their planned number; never, unless a bound is given. With two, both must hold."""

    model_change: float | None = None
    """The global model moved by less than this in a round, relative to its norm."""
    metric_change: float | None = None
    """``metric`` changed by less than this from the round before, relative to its value there."""
    metric: str = "loss"
    """A figure that sites report with their updates; averaged by samples."""
    patience: int = 2
    """In so many rounds one after another."""
    min_rounds: int = 1
    """Not before so many rounds."""

    def __post_init__(self) -> None:
        bounds = {"model_change": self.model_change, "metric_change": self.metric_change}
        for name, value in bounds.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"convergence.{name} must be > 0, not {value}")
        for name, count in {"patience": self.patience, "min_rounds": self.min_rounds}.items():
            if not 1 <= count <= MAX_ROUNDS:
                raise ConfigError(f"convergence.{name} must be 1..{MAX_ROUNDS}, not {count}")


class AggregateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``edgeflame aggregate --config F``; the learning in the section ``[learning]``."""

    rounds: int = 2
    """Rounds of training."""
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
    strategy: str = AUTO
    """How updates become the next global model; ``auto`` is the learning method's own rule."""
    trim: float = 0.2
    """Of ``trimmed_mean``: share of the round's values that is left out at either end of each coordinate; rounded up.
    So many sites may be bad."""
    clip_norm: float | Literal["median"] = "median"
    """Of ``norm_clipping``: the longest change that counts in full, in units of the base model's norm; ``median`` is
    that of the round's changes."""
    update_codec: Codec = "raw"
    """In which form sites send updates: ``raw``; ``float16`` differences to the base model, half the bytes; ``zstd``,
    compressed without loss; ``float16_zstd``. What a form's error was, the ledger says."""
    max_relative_change: float = 10.0
    """An update may be so far from the base model, in units of the base model's norm; a diverged one is not."""
    max_samples: int = 10_000_000
    """No site has more images than this; an update that says so is refused, for it would outweigh all others."""
    max_model_bytes: int = 4 << 30
    """Of the initial model; updates are as large as it is. Also of a site's statistics."""
    statistics: Literal["site", "federated"] = "site"
    """``site``: each site's package has statistics of its own images; ``federated``: of all sites' images, pooled
    after the last round without moving an image. Thresholds are each site's own in either."""
    statistics_form: Literal["low_rank", "moments"] = "low_rank"
    """What sites send of ``federated`` statistics: an approximation whose error the ledger states, or all of it
    (48 MB a site by default), which pools exactly."""
    statistics_rank: int = 48
    """Of ``low_rank``: eigenpairs per position that are sent and handed out (16 MB a site by default). More than a
    package uses (``learning.scoring.max_rank``), because what each site cuts off is lost to all."""
    convergence: Convergence = Convergence()
    learning: Learning = Learning(method="flame")

    def __post_init__(self) -> None:
        rules = (
            (1 <= self.rounds <= MAX_ROUNDS, f"rounds must be 1..{MAX_ROUNDS}", self.rounds),
            (1 <= self.min_sites <= 10_000, "min_sites must be 1..10000", self.min_sites),
            (0 < self.quorum <= 1, "quorum must be in (0, 1]", self.quorum),
            (0 < self.deadline_s < math.inf, "deadline_s must be > 0", self.deadline_s),
            (0 < self.sampling <= 1, "sampling must be in (0, 1]", self.sampling),
            (self.max_relative_change > 0, "max_relative_change must be > 0", self.max_relative_change),
            (
                self.update_codec not in FALLBACKS or has_zstd(),
                "update_codec needs the package zstandard here (pip install 'edgeflame[zstd]'); float16 and raw do not",
                self.update_codec,
            ),
            (0 <= self.trim < 0.5, "trim must be in [0, 0.5)", self.trim),
            (
                self.clip_norm == "median" or 0 < self.clip_norm < math.inf,
                'clip_norm must be "median" or > 0',
                self.clip_norm,
            ),
            (self.max_samples >= 1, "max_samples must be >= 1", self.max_samples),
            (self.max_model_bytes >= 1, "max_model_bytes must be >= 1", self.max_model_bytes),
            (
                self.strategy in (AUTO, *STRATEGIES),
                f"strategy: one of {', '.join((AUTO, *STRATEGIES))}",
                self.strategy,
            ),
            (
                1 <= self.statistics_rank <= MAX_RANK,
                f"statistics_rank must be 1..{MAX_RANK}",
                self.statistics_rank,
            ),
            (
                self.statistics == "site" or self.learning.training.batch_norm != "local",
                'federated statistics need one embedding space: training.batch_norm must be "frozen" or "average"',
                self.learning.training.batch_norm,
            ),
            (
                self.update_codec == "raw" or self.exchange.compressible,
                'update_codec must be "raw" for memories, which are small already',
                self.update_codec,
            ),
            (
                self.statistics == "site" or self.exchange.has_statistics_phase,
                'statistics must be "site" for a method that pools a memory already',
                self.statistics,
            ),
            (
                self.learning.method in FEDERATED_METHODS,
                f"learning.method must be one that federates ({', '.join(FEDERATED_METHODS)})",
                self.learning.method,
            ),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")
        self._check_exchange()
        try:
            for name in self.expected_sites:
                check_name("site", name)
        except UsageError as exc:
            raise ConfigError(f"expected_sites: {exc}") from exc

    def _check_exchange(self) -> None:
        sent = METHODS[self.learning.method].exchange
        if self.strategy != AUTO and STRATEGIES[self.strategy].exchange != sent:
            fitting = ", ".join((AUTO, *(name for name, rule in STRATEGIES.items() if rule.exchange == sent)))
            raise ConfigError(
                f"strategy {self.strategy} aggregates {STRATEGIES[self.strategy].exchange}, but the sites of "
                f"method {self.learning.method} send {sent}; choose one of {fitting}"
            )

    @property
    def strategy_name(self) -> str:
        """The strategy's own name, also where ``auto`` is configured."""
        return resolve_strategy(self.strategy, self.learning.method)

    @property
    def rule(self) -> Rule:
        """The strategy."""
        return STRATEGIES[self.strategy_name]

    @property
    def exchange(self) -> Exchange:
        """What sites send."""
        return EXCHANGES[METHODS[self.learning.method].exchange]

    def replies_needed(self, num_asked: int) -> int:
        """The quorum of a round with so many asked sites."""
        # The product of a share and a count may miss an integer by rounding; 0.6 * 5 must be 3.
        return max(1, math.ceil(self.quorum * num_asked - 1e-9))

    def sample_size(self, num_sites: int) -> int:
        """How many of so many sites are asked in a round."""
        return max(1, math.ceil(self.sampling * num_sites - 1e-9))
