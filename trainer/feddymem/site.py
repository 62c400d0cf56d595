"""A site that learns by FedDyMem: its frozen backbone, its patches, and what it does with a memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch

from edgeflame.console import EventLog, Progress, no_progress
from edgeflame.errors import FederationError
from edgeflame.learning import Learning
from edgeflame.memory_bank import MemoryBank, empty_bank, read_bank
from edgeflame.package import WeightsOrigin
from trainer.embedding import Embeddings
from trainer.feddymem.fitting import held_out_scores, memory_statistics, sent_memory
from trainer.feddymem.learning import SiteMemory, first_memory, metric_of, train_memory
from trainer.feddymem.patches import Patches, sample_patches
from trainer.imageset import ImageSet
from trainer.model import build_model
from trainer.site_statistics import SiteStatistics
from trainer.suspects import Suspect
from trainer.threshold import set_threshold

log = EventLog("feddymem")


def initial_bank(learning: Learning) -> MemoryBank:
    """The empty memory every run starts from; the same at every site with the same backbone weights.

    Raises:
        MissingDependencyError: no weights can be had here.
    """
    model, weights = build_model(learning)
    return empty_bank(model.backbone.num_channels, space_of(learning, weights))


def space_of(learning: Learning, weights: WeightsOrigin) -> str:
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
        self.space = space_of(learning, self.weights)
        self._learning = learning
        self._images = images
        self._device = device
        self._embeddings = Embeddings(self.network, images, device=device)
        self._patches: Patches | None = None

    def read_fleet(self, path: Path) -> MemoryBank:
        """The fleet's memory, if it is of this site's embeddings.

        Raises:
            DataError, NumericalError, StorageError: the file is no memory.
            FederationError: it is of other embeddings.
        """
        fleet = read_bank(path)
        if fleet.space != self.space or fleet.num_channels != self.network.num_channels:
            msg = (
                f"the fleet's memory is of the embeddings {fleet.space[:12]}, this site's backbone gives "
                f"{self.space[:12]}: all sites of a fleet need the same backbone weights (here: {self.weights.source})"
            )
            raise FederationError(msg)
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
        whitening = metric_of(patches, fleet, self._learning)
        if memory is None:
            memory = first_memory(patches, whitening, self._learning, seed=self._learning.seed)
        return train_memory(memory, patches, fleet, whitening, self._learning, seed=seed, progress=progress)

    def reduced(self, memory: SiteMemory, fleet: MemoryBank | None) -> MemoryBank:
        """What may be sent of a memory.

        Raises:
            DataError: nothing of it is above the privacy floor.
        """
        patches = self._sample()
        whitening = metric_of(patches, fleet, self._learning)
        return sent_memory(memory, patches, whitening, self._learning, space=self.space)

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
        whitening = metric_of(patches, fleet, learning)
        if memory is None:
            memory = first_memory(patches, whitening, learning, seed=learning.seed)
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

    def _sample(self, progress: Progress = no_progress) -> Patches:
        if self._patches is None:
            self._patches = sample_patches(
                self._embeddings,
                max_patches=self._learning.memory.max_patches,
                seed=self._learning.seed,
                device=self._device,
                progress=progress,
            )
        return self._patches
