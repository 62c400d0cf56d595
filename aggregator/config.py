"""What a run is: rounds, sites, quorum, deadlines, checks, and the learning its sites are to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from aggregator.exchanges import EXCHANGES, Exchange
from aggregator.strategies import AUTO, STRATEGIES, resolve_strategy
from aggregator.strategies.interface import Rule
from edgeflame.bounds import BASIC, Count, NumBytes, Positive, Seconds, Seed, Share
from edgeflame.errors import ConfigError, UsageError
from edgeflame.methods import FEDERATED_METHODS, MAX_RANK, METHODS, Learning
from edgeflame.mqtt.messages import MAX_ROUNDS, Codec
from edgeflame.mqtt.topics import check_name
from edgeflame.transfer.compression import FALLBACKS, has_zstd

MAX_SITES = 10_000
"""Sites of a fleet that are known at once. Whoever may connect may make up names; memory use must stay bounded."""

RoundCount = Annotated[int, Meta(ge=1, le=MAX_ROUNDS)]
"""A number of rounds."""
StrategyName = Annotated[
    str,
    Meta(
        pattern=f"^({'|'.join((AUTO, *STRATEGIES))})$",
        description=f"one of {', '.join((AUTO, *STRATEGIES))}",
    ),
]
"""A key of ``STRATEGIES``, or ``auto``."""


class Convergence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the rounds end before their planned number. They do not, unless a bound is given; of two, both must hold."""

    model_change: Positive | None = None
    """The global model moved by less than this in a round, relative to its norm."""
    metric_change: Positive | None = None
    """``metric`` changed by less than this from the round before, relative to its value there."""
    metric: str = "loss"
    """A figure that sites report with their updates; its average over the sites is weighted by their samples."""
    patience: RoundCount = 2
    """The bound must hold in this many rounds in a row."""
    min_rounds: RoundCount = 1
    """The run does not end before this many rounds."""


_STORED_NAMES = {"min_available_sites": "min_sites", "fraction_train": "sampling", "compression": "update_codec"}
"""Keys that journals and simulations' records hold under the names that they had in version 0.1."""


class AggregateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_STORED_NAMES):
    """The keys of ``edgeflame aggregate --config F``; the learning in the section ``[learning]``."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {old: new for new, old in _STORED_NAMES.items()}

    rounds: Annotated[RoundCount, BASIC] = 2
    """Rounds of training."""
    min_available_sites: Annotated[int, Meta(ge=1, le=MAX_SITES), BASIC] = 2
    """The run begins when this many sites are ready."""
    expected_sites: Annotated[tuple[str, ...], BASIC] = ()
    """If given, only these sites may take part, and the run begins when all of them are ready."""
    quorum: Annotated[Share, BASIC] = 0.6
    """Share of the asked sites whose updates a round needs; rounded up, at least one."""
    deadline_s: Annotated[Seconds, BASIC] = 300.0
    """A site that makes no progress for this many seconds is left out of the round. Not a limit on a round's length."""
    straggler_factor: Annotated[float, Meta(ge=1, le=1e6)] = 10.0
    """The limit on a round's length, once enough sites are done: so many times as long as these took, or as
    ``deadline_s`` where that is longer. A site that is not done by then is left out, though it makes progress."""
    fraction_train: Share = 1.0
    """Share of the sites asked to train in each round; rounded up."""
    seed: Seed = 0
    """Seed of the choice of sites in each round."""
    strategy: StrategyName = AUTO
    """How updates become the next global model; ``auto`` is the learning method's own rule."""
    trim: Annotated[float, Meta(ge=0, lt=0.5)] = 0.2
    """Used by ``trimmed_mean``: share of the round's values that is left out at either end of each coordinate; rounded
    up. As many sites may send bad updates."""
    clip_norm: Literal["median"] | Positive = "median"
    """Used by ``norm_clipping``: the longest change that counts in full, in units of the base model's norm; ``median``
    is the median of the round's changes."""
    compression: Annotated[Codec, BASIC] = "raw"
    """The form in which sites send updates: ``raw``; ``float16`` differences to the base model, half the bytes;
    ``zstd``, compressed without loss; ``float16_zstd``. The ledger says how large a form's error was."""
    max_relative_change: Positive = 10.0
    """The farthest that an update may be from the base model, in units of the base model's norm. An update beyond it
    comes from a training that diverged and is refused."""
    max_samples: Count = 10_000_000
    """The most images that an update may claim; one that claims more is refused, for it would outweigh all others."""
    max_model_bytes: NumBytes = 4 << 30
    """Largest initial model, and largest statistics of a site, in bytes; updates are as large as the model."""
    statistics: Literal["site", "federated", "prior"] = "site"
    """``site``: each site's package has statistics of its own images; ``federated``: of all sites' images, pooled
    after the last round without moving an image; ``prior``: of its own, shrunk towards the other sites'
    as far as its held-out parts become likelier by it. Thresholds are each site's own in all three."""
    statistics_form: Literal["low_rank", "moments"] = "low_rank"
    """What sites send of statistics that they share: an approximation whose error the ledger states, or all of it
    (48 MB a site by default), which pools exactly."""
    statistics_rank: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 48
    """Used by ``low_rank``: eigenpairs per position that are sent and handed out (16 MB a site by default). More than a
    package uses (``learning.scoring.max_rank``), because what each site cuts off is lost to all."""
    convergence: Convergence = Convergence()
    learning: Learning = Learning(method="flame")

    def __post_init__(self) -> None:
        method = self.learning.method
        rules = (
            (
                method in FEDERATED_METHODS,
                f"learning.method must be one that federates ({', '.join(FEDERATED_METHODS)})",
                method,
            ),
            (
                self.compression not in FALLBACKS or has_zstd(),
                "compression needs the package zstandard here (pip install 'edgeflame[zstd]'); float16 and raw do not",
                self.compression,
            ),
            (
                self.compression == "raw" or self.exchange.compressible,
                'compression must be "raw" for memories, which are small already',
                self.compression,
            ),
            (
                self.statistics == "site" or self.learning.training.batch_norm != "local",
                'shared statistics need one embedding space: training.batch_norm must be "frozen" or "average"',
                self.learning.training.batch_norm,
            ),
            (
                self.statistics == "site" or self.exchange.has_statistics_phase,
                'statistics must be "site" for a method that pools a memory already',
                self.statistics,
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
        if self.strategy != AUTO and sent not in STRATEGIES[self.strategy].exchanges:
            fitting = ", ".join((AUTO, *(name for name, rule in STRATEGIES.items() if sent in rule.exchanges)))
            taken = " or ".join(STRATEGIES[self.strategy].exchanges)
            raise ConfigError(
                f"strategy {self.strategy} aggregates {taken}, but the sites of "
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
        """What sites send, and how it is checked and aggregated."""
        return EXCHANGES[METHODS[self.learning.method].exchange]

    def replies_needed(self, num_asked: int) -> int:
        """How many updates a round needs that asks ``num_asked`` sites."""
        # The product of a share and a count may miss an integer by rounding; 0.6 * 5 must be 3.
        return max(1, math.ceil(self.quorum * num_asked - 1e-9))

    def sample_size(self, num_sites: int) -> int:
        """How many of ``num_sites`` sites are asked in a round."""
        return max(1, math.ceil(self.fraction_train * num_sites - 1e-9))
