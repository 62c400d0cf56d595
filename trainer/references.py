"""Scores of reference images by the trained network itself, against which every runtime is held."""

from __future__ import annotations

import numpy as np
import torch

from edgeflame.console import EventLog
from edgeflame.images import ImageU8
from edgeflame.references import Reference, evenly_spaced, make_references
from edgeflame.statistics import smooth_maps
from edgeflame.statistics_codec import PackageStatistics
from trainer.backbone import EmbeddingNetwork
from trainer.embedding import embed
from trainer.imageset import ImageSet, rgb_tensor

log = EventLog("references")


def choose_references(images: ImageSet, count: int) -> ImageU8:
    """``count`` images spread over the set, ``[R, height, width, 3]``; fewer if there are fewer, R = 0 for none."""
    if count == 0:
        log.warning("no_reference_images", consequence="what runs this package cannot be checked against its training")
        return np.zeros((0, images.preprocessing.height, images.preprocessing.width, 3), dtype=np.uint8)
    return images.batch(evenly_spaced(len(images), count))


def score_references(
    network: EmbeddingNetwork, statistics: PackageStatistics, images: ImageU8, *, smoothing_sigma: float
) -> tuple[Reference, ...]:
    """The images and what PyTorch and float64 distances make of them: no exporter and no runtime is involved.

    Args:
        network: on the CPU, in evaluation mode.
        statistics: as the package stores them.
        images: ``[R, height, width, 3]`` uint8 BGR.
        smoothing_sigma: of the map, in cells.
    """
    if not len(images):
        return ()
    embeddings = np.concatenate([embed(network, rgb_tensor(one[None], torch.device("cpu"))) for one in images])
    distances = statistics.distances(embeddings.astype(np.float64))
    return make_references(images, smooth_maps(distances.reshape(-1, *statistics.grid), smoothing_sigma))
