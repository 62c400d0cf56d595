"""What a simulation is: the fleet, its data and how they are dealt to the sites, cameras, figures, engine."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from aggregator.config import AggregateConfig
from boards.board import MIN_IMAGE_SIZE
from boards.textures import TEXTURES
from edgeflame.errors import ConfigError
from edgeflame.methods import SOLO_METHODS, Learning

MAX_SIMULATED_SITES = 10_000


def _require(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{rule}, not {value}")


class FolderData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="folder"):
    """Photographs in the MVTec layout; what shows the same part stays at one site."""

    path: str
    """The folder."""
    groups: str | None = None
    """CSV file that says which photographs show the same part; by default one that lies in the folder."""
    max_train_groups: int | None = None
    """Take only so many parts to train on, drawn by the simulation's seed."""
    max_test_groups: int | None = None
    """Take only so many parts of each kind (good, and each defect) to test on, drawn by the simulation's seed."""

    def __post_init__(self) -> None:
        for name in ("max_train_groups", "max_test_groups"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name} must be >= 1", value)


class BoardsData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="boards"):
    """Generated furniture boards; the numbers of parts are of each texture."""

    textures: tuple[str, ...] = ("warm_white_grid",)
    """Names of `edgeflame demo-data --texture`."""
    train_parts: int = 40
    """Good ones."""
    test_good_parts: int = 10
    """Good ones to test on."""
    test_defective_parts: int = 20
    """Defective ones to test on."""
    photos: int = 2
    """Photographs of each part."""
    image_size: int = 128
    """Side of the photographs, pixels."""
    seed: int = 0
    """Which parts."""

    def __post_init__(self) -> None:
        _require(
            bool(self.textures)
            and len(set(self.textures)) == len(self.textures)
            and set(self.textures) <= set(TEXTURES),
            f"data.textures: some of {', '.join(TEXTURES)}, each once",
            list(self.textures),
        )
        _require(self.train_parts >= 1, "data.train_parts must be >= 1", self.train_parts)
        _require(self.test_good_parts >= 1, "data.test_good_parts must be >= 1", self.test_good_parts)
        _require(self.test_defective_parts >= 1, "data.test_defective_parts must be >= 1", self.test_defective_parts)
        _require(self.photos >= 1, "data.photos must be >= 1", self.photos)
        _require(self.image_size >= MIN_IMAGE_SIZE, f"data.image_size must be >= {MIN_IMAGE_SIZE}", self.image_size)


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which parts a site has."""

    beta: float | Literal["even"] = 0.5
    """Of the Dirichlet distribution of the sites' numbers of parts: small is unequal; ``even``: equal numbers."""
    category_beta: float | None = None
    """Of the Dirichlet distribution of textures within a site (Hsu et al. 2019, arXiv 1909.06335); None: as they
    come."""
    min_groups: int = 4
    """Every site has so many parts at least; the statistics need 4 photographs of 2 parts."""

    def __post_init__(self) -> None:
        _require(self.beta == "even" or self.beta > 0, "partition.beta: even or > 0", self.beta)
        _require(
            self.category_beta is None or self.category_beta > 0, "partition.category_beta must be > 0",
            self.category_beta,
        )  # fmt: skip
        _require(self.min_groups >= 1, "partition.min_groups must be >= 1", self.min_groups)


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is measured. The last round's model always is."""

    every: int = 1
    """Rounds after which the global model is measured, from round 0, the initial model, on; 0: the last only."""
    sites: bool = True
    """In the end measure every site's model, with statistics of its own images alone."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "evaluation.every must be >= 0", self.every)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where sites do their work. It changes when a run is over, not what comes of it."""

    kind: Literal["local", "ray"] = "local"
    """Processes of this machine, or a Ray cluster."""
    workers: int = 0
    """Processes (``local``; 0: none but this one) or tasks at a time (``ray``; 0: as many as there are CPUs)."""
    threads: int = 1
    """Of the numerical libraries, per process. Another number may change the last bits of a model."""
    address: str | None = None
    """``ray``: of a running cluster (``auto``, ``ray://HOST:10001``); None starts one on this machine. The nodes need
    EdgeFlame and torch, and the output folder and the data under the same paths."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.workers <= MAX_SIMULATED_SITES, f"engine.workers must be 0..{MAX_SIMULATED_SITES}", self.workers
        )
        _require(self.threads >= 1, "engine.threads must be >= 1", self.threads)
        _require(self.kind == "ray" or self.address is None, "engine.address is for ray only", self.address)


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``edgeflame simulate --config F``."""

    data: FolderData | BoardsData
    sites: int = 5
    """How many."""
    seed: int = 0
    """Of the partition, the cameras and the choice of parts."""
    cameras: Literal["common", "own"] = "common"
    """``own``: every site photographs with a camera of its own, fixed by the seed."""
    partition: Partition = Partition()
    alone: str | None = None
    """A method that needs no fleet (``none``, ``fade``, ``solo``): instead of taking part in rounds every site learns
    alone, for as many epochs as it would in the fleet, and is measured."""
    fleet: AggregateConfig = AggregateConfig()
    """As for ``edgeflame aggregate --config F``; the section ``[fleet]``, with ``[fleet.learning]`` inside."""
    evaluation: Evaluation = Evaluation()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        _require(1 <= self.sites <= MAX_SIMULATED_SITES, f"sites must be 1..{MAX_SIMULATED_SITES}", self.sites)
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
        """In sorted order."""
        width = len(str(self.sites - 1))
        return tuple(f"site-{number:0{width}}" for number in range(self.sites))

    def aggregation(self) -> AggregateConfig:
        """The fleet's run: all the sites and no others, and no deadlines, for nobody is slow."""
        return msgspec.structs.replace(self.fleet, min_sites=self.sites, expected_sites=self.site_names)

    def learning_alone(self) -> Learning:
        """What a site learns that learns alone, and as long as in the fleet."""
        assert self.alone is not None
        learning = self.fleet.learning
        training = msgspec.structs.replace(learning.training, epochs=self.fleet.rounds * learning.training.epochs)
        return msgspec.structs.replace(learning, method=self.alone, training=training)

    def decisive(self) -> dict[str, Any]:
        """What decides the result, as plain data: all but the engine."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        del plain["engine"]
        return plain
