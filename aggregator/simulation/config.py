"""The configuration of a simulation: fleet, data and their partition, cameras, measurements, engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aggregator.config import MAX_SITES, AggregateConfig
from boards.board import MIN_IMAGE_SIZE
from boards.textures import TEXTURES
from edgeflame.bounds import Count, NotEmpty, Positive, Seed
from edgeflame.errors import ConfigError
from edgeflame.images import MAX_INPUT_SIDE
from edgeflame.methods import METHODS, SOLO_METHODS, Learning
from edgeflame.mqtt.messages import MAX_ROUNDS


def _require(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{rule}, not {value}")


class FolderData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="folder"):
    """Photographs in the MVTec layout; what shows the same part stays at one site."""

    path: NotEmpty
    """The folder."""
    groups: NotEmpty | None = None
    """CSV file that says which photographs show the same part; by default one that lies in the folder."""
    max_train_groups: Count | None = None
    """The most parts to train on, drawn by the simulation's seed; all if left out."""
    max_test_groups: Count | None = None
    """The most parts of each kind (good, and each defect) to test on, drawn by the simulation's seed; all if left
    out."""


class BoardsData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="boards"):
    """Generated furniture boards; the numbers of parts are of each texture."""

    textures: tuple[str, ...] = ("warm_white_grid",)
    """Names of `edgeflame demo-data --texture`."""
    train_parts: Count = 40
    """Good parts to train on."""
    test_good_parts: Count = 10
    """Good parts to test on."""
    test_defective_parts: Count = 20
    """Defective parts to test on."""
    photos: Count = 2
    """Photographs of each part."""
    image_size: Annotated[int, Meta(ge=MIN_IMAGE_SIZE, le=MAX_INPUT_SIDE)] = 128
    """Side of the photographs, pixels."""
    seed: Seed = 0
    """Seed of the generated parts."""

    def __post_init__(self) -> None:
        _require(
            bool(self.textures)
            and len(set(self.textures)) == len(self.textures)
            and set(self.textures) <= set(TEXTURES),
            f"data.textures: some of {', '.join(TEXTURES)}, each once",
            list(self.textures),
        )


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the parts are dealt to the sites."""

    beta: Literal["even"] | Positive = 0.5
    """Concentration of the Dirichlet distribution that the sites' numbers of parts are drawn from: the smaller, the
    more unequal. ``even``: equal numbers."""
    category_beta: Positive | None = None
    """Concentration of the Dirichlet distribution of textures within a site (Hsu et al. 2019, arXiv 1909.06335); if
    left out, textures are dealt at random."""
    min_groups: Count = 4
    """Fewest parts of a site; the statistics need 4 photographs of 2 parts."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is measured. The last round's model always is."""

    every: Annotated[int, Meta(ge=0, le=MAX_ROUNDS)] = 1
    """The global model is measured after every so many rounds, from round 0, the initial model, on; 0: after the last
    round only."""
    sites: bool = True
    """Whether every site's model is measured at the end, with statistics of its own images alone."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where sites do their work. It changes how long a run takes, not its result."""

    kind: Literal["local", "ray"] = "local"
    """Processes of this machine, or a Ray cluster."""
    workers: Annotated[int, Meta(ge=0, le=MAX_SITES)] = 0
    """Processes (``local``; 0: none but this one) or tasks at a time (``ray``; 0: as many as there are CPUs)."""
    threads: Count = 1
    """Threads of the numerical libraries in each process. Another number may change the last bits of a model."""
    address: NotEmpty | None = None
    """With ``ray``: the address of a running cluster (``auto``, ``ray://HOST:10001``); if left out, one is started on
    this machine. The nodes need EdgeFlame and torch, and the output folder and the data under the same paths."""

    def __post_init__(self) -> None:
        _require(self.kind == "ray" or self.address is None, "engine.address is for ray only", self.address)


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``edgeflame simulate --config F``."""

    data: FolderData | BoardsData
    sites: Annotated[int, Meta(ge=1, le=MAX_SITES)] = 5
    """Number of sites."""
    seed: Seed = 0
    """Seed of the partition, the cameras and the choice of parts."""
    cameras: Literal["common", "own"] = "common"
    """``own``: every site photographs with a camera of its own, fixed by the seed."""
    partition: Partition = Partition()
    marked: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    """With `method = "feedback"`: the share of the defective parts of each kind that are marked bad, all at one site,
    and are measured nowhere. The first kind is marked at the first site, and so on in turn."""
    alone: str | None = None
    """A method that needs no fleet (``none``, ``fade``, ``solo``): instead of taking part in rounds every site learns
    alone, for as many epochs as it would in the fleet, and is measured."""
    fleet: AggregateConfig = AggregateConfig()
    """As for ``edgeflame aggregate --config F``; the learning is in ``[fleet.learning]``."""
    evaluation: Evaluation = Evaluation()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        _require(
            not self.fleet.expected_sites, "fleet.expected_sites follows from sites; leave it out",
            list(self.fleet.expected_sites),
        )  # fmt: skip
        _require(
            self.alone is None or self.alone in SOLO_METHODS, f"alone: one of {', '.join(SOLO_METHODS)}", self.alone
        )
        by_texture = isinstance(self.data, BoardsData) and len(self.data.textures) > 1
        _require(
            self.partition.category_beta is None or by_texture,
            "partition.category_beta needs boards of several textures",
            self.partition.category_beta,
        )

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites' names in sorted order."""
        width = len(str(self.sites - 1))
        return tuple(f"site-{number:0{width}}" for number in range(self.sites))

    @property
    def has_marks(self) -> bool:
        """Whether sites mark parts: their method learns from marks."""
        return METHODS[self.fleet.learning.method].exchange == "head"

    def aggregate_config(self) -> AggregateConfig:
        """The configuration of the fleet's run, with all the simulated sites and no others."""
        return msgspec.structs.replace(self.fleet, min_available_sites=self.sites, expected_sites=self.site_names)

    def solo_learning(self) -> Learning:
        """The learning of a site that learns alone, for as many epochs as it would train in the fleet."""
        assert self.alone is not None
        learning = self.fleet.learning
        training = msgspec.structs.replace(learning.training, epochs=self.fleet.rounds * learning.training.epochs)
        return msgspec.structs.replace(learning, method=self.alone, training=training)

    def without_engine(self) -> dict[str, Any]:
        """The configuration without the engine, which does not change the result, as plain data."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        del plain["engine"]
        return plain
