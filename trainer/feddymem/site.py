"""A site that learns by FedDyMem: its frozen backbone, its patches, and what it does with a memory.

From a trained memory follow what leaves the site (averages above the privacy floor), what a package scores with (the
site's own averages beside the fleet's), and the threshold, by cross-fitting.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import torch

from edgeflame.errors import FederationError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning
from edgeflame.package import WeightsOrigin
from edgeflame.statistics.memory import MemoryBank, MemoryStatistics, empty_bank, read_bank
from edgeflame.tensors import F32, F64
from fitting.crossfit import image_scores, make_folds, require_enough, score_maps
from fitting.imageset import ImageSet
from fitting.packaging import SiteStatistics
from fitting.suspects import HighestMaps, Suspect
from fitting.threshold import set_threshold
from trainer.embedding import Embeddings
from trainer.feddymem.learning import (
    PatchSample,
    SiteMemory,
    Whitening,
    assign_patches,
    combined_transform,
    fit_metric,
    initial_memory,
    sample_patches,
    train_memory,
)
from trainer.feddymem.reduce import NO_FLOOR, PrivacyFloor, entry_contents, reduce_memory
from trainer.model import build_model

log = EventLog("feddymem")


def shareable_memory(
    memory: SiteMemory, patches: PatchSample, whitening: Whitening, learning: Learning, *, space: str
) -> MemoryBank:
    """What leaves the site: at most ``memory.prototypes`` averages, each above the privacy floor.

    Raises:
        DataError: nothing is above the floor.
    """
    floor = PrivacyFloor(patches=learning.memory.min_group, images=learning.memory.min_images)
    return _reduce_site_memory(memory, patches, whitening, learning, space=space, floor=floor)


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
    own = _reduce_site_memory(memory, patches, whitening, learning, space="0" * 64, floor=NO_FLOOR).prototypes
    shared = np.zeros((0, own.shape[1]), dtype=np.float32) if fleet is None else fleet.prototypes
    return MemoryStatistics(
        grid=grid,
        count=patches.num_images,
        prototypes=np.concatenate([own, shared]),
        transform=combined_transform(whitening, memory.generator),
        centre=whitening.centre.cpu().numpy(),
        num_global=len(shared),
    )


def held_out_scores(
    memory: SiteMemory,
    patches: PatchSample,
    fleet: MemoryBank | None,
    whitening: Whitening,
    learning: Learning,
    embeddings: Embeddings,
    *,
    progress: Progress = no_progress,
) -> tuple[F64, F64, dict[int, F32]]:
    """Scores ``[N]`` of all images by memories from which their fold's patches are left out.

    Beside them the means ``[N]`` of their maps, and the maps of the highest.

    The site's own averages are made again of the other folds' patches. Generator, entries' places and, in a
    federation, the fleet's prototypes did see all images; that makes the scores a little low.

    Raises:
        DataError: too few images or parts.
        NumericalError: an embedding is not finite.
    """
    groups = embeddings.images.groups
    require_enough(len(groups), len(set(groups)))
    scores, means, highest, done = np.zeros(len(groups)), np.zeros(len(groups)), HighestMaps(), 0
    for fold in make_folds(groups, learning.calibration.folds, learning.seed):
        others = patches.without(fold)
        statistics = memory_statistics(memory, others, fleet, whitening, learning, grid=embeddings.network.grid)
        for indices, batch in embeddings.batches(fold):
            maps = score_maps(statistics, batch, learning.scoring)
            scores[indices], means[indices] = image_scores(maps), maps.mean(axis=(1, 2), dtype=np.float64)
            highest.add(indices, scores[indices], maps)
            done += len(indices)
            progress(done, len(groups), "scoring held-out parts")
    return scores, means, highest.by_index()


def _reduce_site_memory(
    memory: SiteMemory,
    patches: PatchSample,
    whitening: Whitening,
    learning: Learning,
    *,
    space: str,
    floor: PrivacyFloor,
) -> MemoryBank:
    entry_of = assign_patches(patches, memory.entries, whitening, memory.generator)
    contents = entry_contents(patches.values, patches.image_of, entry_of, patches.num_images)
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


def initial_bank(learning: Learning) -> MemoryBank:
    """The empty memory every run starts from; the same at every site with the same backbone weights.

    Raises:
        MissingDependencyError: no weights can be had here.
    """
    model, weights = build_model(learning)
    return empty_bank(model.backbone.num_channels, embedding_space_id(learning, weights))


def embedding_space_id(learning: Learning, weights: WeightsOrigin) -> str:
    """SHA-256 of what decides on the embeddings: the weights, and how they are used."""
    # Where the weights were found is no matter, what they are is.
    backbone = msgspec.structs.replace(learning.backbone, weights="")
    return hashlib.sha256(msgspec.json.encode([weights.sha256, backbone, learning.input])).hexdigest()


class MemoryLearner:
    """Learns from one site's images; their embeddings are computed once, for all rounds.

    Args:
        learning: the configuration.
        images: the site's good images.
        device: to learn on.

    Raises:
        MissingDependencyError: no weights can be had here.
    """

    def __init__(self, learning: Learning, images: ImageSet, *, device: torch.device) -> None:
        model, self.weights = build_model(learning)
        self.network = model.backbone.to(device)
        self.space = embedding_space_id(learning, self.weights)
        self._learning = learning
        self._images = images
        self._device = device
        self._embeddings = Embeddings(self.network, images, device=device)
        self._patches: PatchSample | None = None

    def read_fleet(self, path: Path) -> MemoryBank:
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

    def train(
        self,
        memory: SiteMemory | None,
        fleet: MemoryBank | None,
        *,
        seed: int,
        progress: Progress = no_progress,
    ) -> tuple[SiteMemory, dict[str, float]]:
        """Train for some epochs from ``memory``, or from the beginning; errors as :func:`train_memory`."""
        patches = self._sample(progress)
        whitening = fit_metric(patches, fleet, self._learning)
        if memory is None:
            memory = initial_memory(patches, whitening, self._learning, seed=self._learning.seed)
        return train_memory(memory, patches, fleet, whitening, self._learning, seed=seed, progress=progress)

    def reduced(self, memory: SiteMemory, fleet: MemoryBank | None) -> MemoryBank:
        """What may be sent of a memory.

        Raises:
            DataError: nothing of it is above the privacy floor.
        """
        patches = self._sample()
        whitening = fit_metric(patches, fleet, self._learning)
        return shareable_memory(memory, patches, whitening, self._learning, space=self.space)

    def fit(
        self,
        memory: SiteMemory | None,
        fleet: MemoryBank | None,
        *,
        groups_known: bool,
        progress: Progress = no_progress,
    ) -> SiteStatistics:
        """Statistics and threshold; a site without a memory of its own makes one, untrained.

        Raises:
            DataError: too few images or parts.
            NumericalError: an embedding is not finite, or nothing varies between the patches.
        """
        patches, learning = self._sample(progress), self._learning
        whitening = fit_metric(patches, fleet, learning)
        if memory is None:
            memory = initial_memory(patches, whitening, learning, seed=learning.seed)
        statistics = memory_statistics(memory, patches, fleet, whitening, learning, grid=self.network.grid)
        scores, means, maps = held_out_scores(
            memory, patches, fleet, whitening, learning, self._embeddings, progress=progress
        )
        threshold = set_threshold(scores, self._images.groups, learning.calibration, groups_known=groups_known)
        log.info(
            "memory",
            prototypes=statistics.num_prototypes,
            of_the_fleet=statistics.num_global,
            threshold=threshold.value,
            promised_false_reject_rate=round(threshold.false_reject_rate, 4),
        )
        details = {
            "num_prototypes": statistics.num_prototypes,
            "num_global_prototypes": statistics.num_global,
            "num_patches": len(patches.values),
            "num_forward_passes": self._embeddings.num_forward,
            "held_out_score_median": float(sorted(scores)[len(scores) // 2]),
            "held_out_score_max": float(scores.max()),
        }
        records = self._images.records
        return SiteStatistics(
            statistics=statistics,
            threshold=threshold,
            images=self._images,
            held_out_scores=scores,
            held_out_means=means,
            suspects=tuple(
                Suspect(record=records[index], score=float(scores[index]), anomaly_map=one, left_out=False)
                for index, one in maps.items()
            ),
            details=details,
        )

    def _sample(self, progress: Progress = no_progress) -> PatchSample:
        if self._patches is None:
            self._patches = sample_patches(
                self._embeddings,
                max_patches=self._learning.memory.max_patches,
                seed=self._learning.seed,
                device=self._device,
                progress=progress,
            )
        return self._patches
