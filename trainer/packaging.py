"""From a fitted model to a package file. The exporter is handed in: the trainer knows no export format.

The package holds reference images with the scores of the trained network itself (PyTorch, and distances in float64),
against which every runtime is checked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from edgeflame.frame_sizes import FrameSizes
from edgeflame.images import ImageU8, Preprocessing
from edgeflame.methods import Learning
from edgeflame.package import Manifest, ReferenceImage, WeightsOrigin, make_references, new_manifest, write_package
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import smooth_maps
from fitting.packaging import site_drift_reference
from fitting.site_statistics import SiteStatistics
from trainer.backbone import EmbeddingNetwork
from trainer.device import rgb_tensor
from trainer.embedding import embed


def score_references(
    network: EmbeddingNetwork, statistics: PackageStatistics, images: ImageU8, *, smoothing_sigma: float
) -> tuple[ReferenceImage, ...]:
    """Reference images with the score maps of PyTorch and of float64 distances; no exporter or runtime is involved.

    Args:
        network: on the CPU, in evaluation mode.
        statistics: as the package stores them.
        images: ``[R, height, width, 3]`` uint8 BGR.
        smoothing_sigma: of the map, in cells.
    """
    if not len(images):
        return ()
    embeddings = np.concatenate([embed(network, rgb_tensor(one[None], torch.device("cpu"))) for one in images])
    unsmoothed = statistics.distances(embeddings.astype(np.float64)).reshape(-1, *statistics.grid)
    return make_references(images, smooth_maps(unsmoothed, smoothing_sigma), unsmoothed)


class Exporter(Protocol):
    """Makes the scoring graph of a network and its statistics."""

    def __call__(
        self,
        network: nn.Module,
        statistics: PackageStatistics,
        *,
        preprocessing: Preprocessing,
        smoothing_sigma: float,
        metadata: Mapping[str, str],
    ) -> bytes: ...


def save_package(
    path: Path,
    *,
    network: EmbeddingNetwork,
    site_statistics: SiteStatistics,
    learning: Learning,
    weights: WeightsOrigin,
    provenance: dict[str, Any],
    exporter: Exporter,
    product: str,
    site: str | None,
    references: ImageU8 | None = None,
) -> Manifest:
    """Export the scoring graph and write the package, whole or not at all.

    Args:
        path: of the package.
        network: the embedding network, on the CPU.
        site_statistics: statistics and threshold.
        learning: how it was learnt.
        weights: where the backbone's weights came from.
        provenance: how the learning went.
        exporter: makes the graph.
        product: the kind of part.
        site: where it was fitted, if that has a name.
        references: good images ``[R, height, width, 3]`` that go into the package; None for none.

    Raises:
        StorageError: the package cannot be written.
    """
    manifest = new_manifest(
        product=product,
        site=site,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        learning=learning,
        weights=weights,
        statistics=site_statistics.statistics,
        threshold=site_statistics.threshold,
        provenance=provenance,
        frames=FrameSizes.of(site_statistics.images.report.sizes),
    )
    graph = exporter(
        network,
        site_statistics.statistics,
        preprocessing=learning.input,
        smoothing_sigma=learning.scoring.smoothing_sigma,
        metadata={
            "edgeflame_version": manifest.edgeflame_version,
            "product": product,
            "method": learning.method,
            "backbone": learning.backbone.name,
            "weights_sha256": weights.sha256,
        },
    )
    condition = site_drift_reference(site_statistics, references)
    smoothing = learning.scoring.smoothing_sigma
    statistics = site_statistics.statistics
    write_package(
        path,
        manifest=manifest,
        model_onnx=graph,
        statistics=statistics,
        references=()
        if references is None
        else score_references(network, statistics, references, smoothing_sigma=smoothing),
        condition=condition,
        fitted=site_statistics.images.report.digests.values(),
    )
    return manifest
