"""From a fitted model to a package file. The exporter is handed in: the trainer knows no export format."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from edgeflame.images import ImageU8, Preprocessing
from edgeflame.learning import Learning
from edgeflame.package import Manifest, WeightsOrigin, new_manifest, write_package
from edgeflame.statistics_codec import PackageStatistics
from trainer.backbone import EmbeddingNetwork
from trainer.condition import site_condition
from trainer.references import score_references
from trainer.site_statistics import SiteStatistics


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
    condition = site_condition(site_statistics, references)
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
    )
    return manifest
