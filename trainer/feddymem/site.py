"""A site that learns by FedDyMem: its frozen backbone, its patches and its memory.

From a trained memory follow what leaves the site (averages above the privacy floor), what a package scores with (the
site's own averages beside the fleet's), and the threshold, by cross-fitting.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeflame.errors import FederationError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning
from edgeflame.statistics.memory import MemoryBank, MemoryStatistics, empty_bank, read_bank, write_bank
from edgeflame.tensors import F32
from fitting.crossfit import (
    HeldOutScores,
    HeldOutScoring,
    PooledStatistics,
    ProgressCounter,
    make_folds,
    require_enough,
)
from fitting.embeddings import Embeddings
from fitting.imageset import ImageSet
from fitting.prior import FleetPrior
from fitting.site_statistics import SiteStatistics, describe_influential, find_influential, find_suspects
from fitting.threshold import set_threshold
from trainer.agent.tasks import TaskResult, TrainTask
from trainer.embedding import TorchEmbedder, network_embeddings
from trainer.feddymem.learning import (
    PatchSample,
    SiteMemory,
    assign_patches,
    fit_metric,
    initial_memory,
    restore_memory,
    sample_patches,
    train_memory,
)
from trainer.feddymem.metric import Whitening, aligned_tensor, combined_transform, comparable, nearest_index
from trainer.feddymem.reduce import NO_FLOOR, PrivacyFloor, ReducedMemory, entry_contents, reduce_memory
from trainer.feddymem.spread import PRIOR_PATCHES, measured_of_fleet, measured_spreads, nearest_prototypes
from trainer.model import build_model, embedding_space_id, load_private, save_private

log = EventLog("feddymem")

SPREAD_RIDGE = 0.5
"""Added to every spread, in units of the mean one, before distances are divided by it: where hardly anything varies
(a plain background), noise would else count as much as a defect does elsewhere."""


def shareable_memory(
    memory: SiteMemory,
    patches: PatchSample,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    *,
    space: str,
) -> MemoryBank:
    """What leaves the site: at most ``memory.prototypes`` averages, each above the privacy floor, and how much its
    patches differ from the fleet's.

    Raises:
        DataError: nothing is above the floor.
    """
    floor = PrivacyFloor(patches=learning.memory.min_group, images=learning.memory.min_images)
    reduced = _reduce_site_memory(memory, patches, whitening, learning, space=space, floor=floor)
    bank = reduced.bank
    if bank.places is None or bank.spreads is None:
        return bank
    # Of all patches that went into each, of which the floor makes sure that they are many.
    spreads = measured_spreads(
        patches, bank.prototypes, bank.places, reduced.prototype_of, whitening, memory.generator, prior=bank.spreads
    )
    measured = None
    if learning.memory.measure_spreads:
        known = empty_bank(bank.num_channels, space) if fleet is None else fleet
        measured = measured_of_fleet(patches, known, whitening, memory.generator, floor)
    return replace(bank, spreads=spreads, measured=measured)


def memory_statistics(
    memory: SiteMemory,
    patches: PatchSample,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    *,
    grid: tuple[int, int],
) -> MemoryStatistics:
    """The site's own averages, which stay in its package and need reach no floor, beside the fleet's."""
    own = _reduce_site_memory(memory, patches, whitening, learning, space="0" * 64, floor=NO_FLOOR).bank
    shared = fleet if fleet is not None and len(fleet) else None
    prototypes, places, spreads = (
        None if mine is None else mine if theirs is None else np.concatenate([mine, theirs])
        for mine, theirs in (
            (own.prototypes, None if shared is None else shared.prototypes),
            (own.places, None if shared is None else shared.places),
            (own.spreads, None if shared is None else shared.spreads),
        )
    )
    assert prototypes is not None
    if places is not None and spreads is not None:
        nearest = nearest_prototypes(patches, prototypes, places, whitening, memory.generator)
        worth = np.full(len(prototypes), PRIOR_PATCHES, dtype=np.float32)
        # What a site sends is of another memory's prototypes, should it be given in the fleet's place.
        if shared is not None and shared.measured is not None and len(shared.measured) == len(shared):
            spreads = _with_spreads_of_fleet(own, shared, whitening, memory, spreads)
            worth[len(own) :] += shared.measured[:, 0]
        spreads = measured_spreads(
            patches, prototypes, places, nearest, whitening, memory.generator, prior=spreads, prior_patches=worth
        )
        spreads = ((spreads + SPREAD_RIDGE) / (1 + SPREAD_RIDGE)).astype(np.float32)
    return MemoryStatistics(
        grid=grid,
        count=patches.num_images,
        prototypes=prototypes,
        transform=combined_transform(whitening, memory.generator),
        centre=whitening.centre.cpu().numpy(),
        num_global=0 if shared is None else len(shared),
        places=places,
        spreads=spreads,
        position_weight=0.0 if places is None else learning.memory.position_weight,
    )


def _with_spreads_of_fleet(
    own: MemoryBank, fleet: MemoryBank, whitening: Whitening, memory: SiteMemory, spreads: F32
) -> F32:
    """``spreads`` of own and the fleet's prototypes, the own ones' replaced by what was measured of the nearest."""
    assert own.places is not None
    assert fleet.places is not None
    assert fleet.measured is not None
    values, at, known, known_at = (
        aligned_tensor(one).to(whitening.matrix.device)
        for one in (own.prototypes, own.places, fleet.prototypes, fleet.places)
    )
    generator = memory.generator
    of = nearest_index(comparable(whitening, generator, values, at), comparable(whitening, generator, known, known_at))
    nearest, mine, theirs = of.cpu().numpy(), spreads[: len(own)], spreads[len(own) :]
    return np.concatenate([np.where(fleet.measured[nearest, 0] > 0, theirs[nearest], mine), theirs])


def held_out_scores(
    memory: SiteMemory,
    patches: PatchSample,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    embeddings: Embeddings,
    *,
    progress: Progress = no_progress,
) -> HeldOutScores:
    """Scores of all images by memories from which their fold's patches are left out.

    The site's own averages are made again of the other folds' patches. Generator, entries' places and, in a
    federation, the fleet's prototypes did see all images; that makes the scores a little low.

    Raises:
        DataError: too few images or parts.
        NumericalError: an embedding is not finite.
    """
    groups = embeddings.images.groups
    require_enough(len(groups), len(set(groups)))
    folds = make_folds(groups, learning.calibration.folds, learning.seed)
    without = (
        memory_statistics(memory, patches.without(fold), fleet, whitening, learning, grid=embeddings.grid)
        for fold in folds
    )
    counter, scoring = ProgressCounter(progress, total=len(groups)), HeldOutScoring(len(groups), learning.scoring)
    for fold, statistics in zip(folds, without, strict=True):
        for indices, batch in embeddings.batches(fold):
            scoring.add(indices, batch, statistics)
            counter.add(len(indices), "scoring held-out parts")
    return scoring.result()


def _reduce_site_memory(
    memory: SiteMemory,
    patches: PatchSample,
    whitening: Whitening,
    learning: Learning,
    *,
    space: str,
    floor: PrivacyFloor,
) -> ReducedMemory:
    contents = entry_contents(patches, assign_patches(patches, memory, whitening))
    return reduce_memory(
        contents,
        whitening,
        memory.generator,
        size=learning.memory.prototypes,
        temperature=learning.memory.temperature,
        floor=floor,
        count=patches.num_images,
        space=space,
    )


class MemoryLearner:
    """Learns a memory beside a frozen backbone and exchanges averages of it; implements
    :class:`trainer.exchange.LocalLearner`.

    The embeddings of the images it was last given are computed once, for all rounds.

    Args:
        learning: the configuration.
        device: to learn on.

    Raises:
        MissingDependencyError: no weights can be had here.
    """

    trains = True

    def __init__(self, learning: Learning, device: torch.device) -> None:
        model, self.weights = build_model(learning)
        self.network = model.backbone.to(device)
        self.space = embedding_space_id(learning, self.weights)
        self.learning = learning
        self._device = device
        self._embedded: tuple[ImageSet, Embeddings, PatchSample] | None = None

    def write_initial(self, path: Path) -> None:
        """Write the empty memory that every run starts from."""
        write_bank(path, empty_bank(self.network.num_channels, self.space))

    def train_round(self, task: TrainTask, images: ImageSet, *, progress: Progress) -> TaskResult:
        """Train from the fleet's memory and write what this site shares; generator and entries stay at the site."""
        fleet = self._load_fleet_memory(Path(task.base))
        before = restore_memory(load_private(task.private), self.network.num_channels, self._device)
        memory, metrics = self._train(before, fleet, images, seed=task.seed, progress=progress)
        _, patches = self.embed(images)
        whitening = fit_metric(patches, memory, fleet, self.learning)
        bank = shareable_memory(memory, patches, fleet, whitening, self.learning, space=self.space)
        write_bank(Path(task.out), bank)
        if task.private_out is not None:
            save_private(Path(task.private_out), memory.tensors())
        figures = {
            "num_prototypes": float(len(bank)),
            "min_effective_patches": float(bank.effective_patches.min()),
            "min_effective_images": float(bank.effective_images.min()),
        }
        return TaskResult(num_samples=len(images), metrics={**metrics, **figures})

    def train_alone(
        self, images: ImageSet, *, seed: int, progress: Progress = no_progress
    ) -> tuple[MemoryModel, dict[str, Any]]:
        """A memory of these images alone, and the metrics of its training."""
        memory, metrics = self._train(None, None, images, seed=seed, progress=progress)
        return MemoryModel(self, memory, None), metrics

    def load(self, path: Path, private: Path | None) -> MemoryModel:
        """The fleet's memory, beside the site's own."""
        memory = restore_memory(load_private(private), self.network.num_channels, self._device)
        return MemoryModel(self, memory, self._load_fleet_memory(path))

    def embed(self, images: ImageSet, progress: Progress = no_progress) -> tuple[Embeddings, PatchSample]:
        """The embeddings of a site's images, and the sample of their patches."""
        if self._embedded is None or self._embedded[0] is not images:
            embeddings = network_embeddings(self.network, images)
            patches = sample_patches(
                embeddings,
                max_patches=self.learning.memory.max_patches,
                seed=self.learning.seed,
                device=self._device,
                progress=progress,
            )
            self._embedded = (images, embeddings, patches)
        return self._embedded[1:]

    def _load_fleet_memory(self, path: Path) -> MemoryBank:
        """The fleet's memory, if it is of this site's embeddings.

        Raises:
            DataError, NumericalError, StorageError: the file is no memory.
            FederationError: it is of other embeddings.
        """
        fleet = read_bank(path)
        if fleet.space != self.space or fleet.num_channels != self.network.num_channels:
            raise FederationError(
                f"the fleet's memory is of the embeddings {fleet.space[:12]}, this site's backbone gives "
                f"{self.space[:12]}: all sites of a fleet need the same backbone weights (here: {self.weights.source})"
            )
        return fleet

    def _train(
        self,
        memory: SiteMemory | None,
        fleet: MemoryBank | None,
        images: ImageSet,
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[SiteMemory, dict[str, float]]:
        """Train for some epochs from ``memory``, or from the beginning; errors as :func:`train_memory`."""
        _, patches = self.embed(images, progress)
        if memory is None:
            memory = initial_memory(patches, size=self.learning.memory.entries, seed=self.learning.seed)
        whitening = fit_metric(patches, memory, fleet, self.learning)
        return train_memory(memory, patches, fleet, whitening, self.learning, seed=seed, progress=progress)


class MemoryModel:
    """A site's memory and its fleet's; implements :class:`trainer.exchange.TrainedModel`.

    Args:
        learner: the learner it came from.
        memory: the site's own; None makes one, untrained, when statistics are fitted.
        fleet: the fleet's; None if there is none.
    """

    def __init__(self, learner: MemoryLearner, memory: SiteMemory | None, fleet: MemoryBank | None) -> None:
        self.network = learner.network
        self.embedder = TorchEmbedder(learner.network)
        self.weights = learner.weights
        self._learner = learner
        self._memory = memory
        self._fleet = fleet

    def fit_statistics(
        self,
        images: ImageSet,
        *,
        groups_known: bool,
        pooled: PooledStatistics | FleetPrior | None = None,
        progress: Progress = no_progress,
    ) -> SiteStatistics:
        """Statistics and threshold.

        Raises:
            DataError: too few images or parts.
            NumericalError: an embedding is not finite, or nothing varies between the patches.
        """
        assert pooled is None, "sites that exchange memories share no Gaussian statistics"
        learning, fleet = self._learner.learning, self._fleet
        embeddings, patches = self._learner.embed(images, progress)
        memory = self._memory or initial_memory(patches, size=learning.memory.entries, seed=learning.seed)
        whitening = fit_metric(patches, memory, fleet, learning)
        statistics = memory_statistics(memory, patches, fleet, whitening, learning, grid=self.network.grid)
        held_out = held_out_scores(memory, patches, fleet, whitening, learning, embeddings, progress=progress)
        scores = held_out.scores
        threshold = set_threshold(scores, images.groups, learning.calibration, groups_known=groups_known)
        influential = find_influential(images, scores, learning, threshold)
        log.info(
            "memory",
            prototypes=statistics.num_prototypes,
            of_the_fleet=statistics.num_global,
            threshold=threshold.value,
            promised_false_reject_rate=round(threshold.false_reject_rate, 4),
        )
        return SiteStatistics(
            statistics=statistics,
            threshold=threshold,
            images=images,
            held_out_scores=scores,
            held_out_means=held_out.means,
            suspects=find_suspects(images, held_out),
            influential=influential,
            details={
                "num_prototypes": statistics.num_prototypes,
                "num_global_prototypes": statistics.num_global,
                "num_patches": len(patches.values),
                "num_forward_passes": embeddings.num_forward,
                "held_out_score_median": float(sorted(scores)[len(scores) // 2]),
                "held_out_score_max": float(scores.max()),
                "influential_parts": describe_influential(images, influential),
            },
        )
