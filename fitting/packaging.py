"""From a fitted model to a package: the graph, reference images and the drift reference.

The drift reference describes the site's good parts and their pictures; a line's drift is measured against it. The
reference images are good images in the package against whose scores every runtime is checked: those of the network
itself where it was fitted, with distances in float64. What puts the scoring graph together is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeflame.drift_reference import (
    MAX_REFERENCE_IMAGES,
    AlignmentTemplate,
    DriftReference,
    image_streams,
    make_drift_reference,
)
from edgeflame.frame_sizes import FrameSizes
from edgeflame.images import ImageU8
from edgeflame.log import EventLog
from edgeflame.methods import Learning
from edgeflame.package import (
    Manifest,
    ReferenceImage,
    WeightsOrigin,
    evenly_spaced,
    make_references,
    new_manifest,
    write_package,
)
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import smooth_maps
from edgeflame.statistics.head import DefectHead
from fitting.embeddings import Embedder
from fitting.imageset import ImageSet
from fitting.site_statistics import SiteStatistics


def site_drift_reference(site: SiteStatistics, references: ImageU8 | None) -> DriftReference:
    """The streams of a site's good images, as statistics that had not seen them scored them.

    Args:
        site: its scores, the means of its maps, and its images.
        references: the package's reference images ``[R, height, width, 3]``: what positions are compared with, here as
            on the line. Without them (None, R = 0) nothing is known of positions.
    """
    images = site.images
    template = AlignmentTemplate(references) if references is not None and len(references) else None
    chosen = evenly_spaced(len(images), MAX_REFERENCE_IMAGES)
    return make_drift_reference(
        {"score": site.held_out_scores, "embedding": site.held_out_means},
        [image_streams(images.batch([index])[0], template) for index in chosen],
        num_parts=len(set(images.groups)),
        num_images=len(images),
    )


log = EventLog("references")


def choose_references(images: ImageSet, count: int) -> ImageU8:
    """``count`` images spread over the set, ``[R, height, width, 3]``; fewer if there are fewer, R = 0 for none."""
    if count == 0:
        log.warning("no_reference_images", consequence="what runs this package cannot be checked against its training")
        return np.zeros((0, images.preprocessing.height, images.preprocessing.width, 3), dtype=np.uint8)
    return images.batch(evenly_spaced(len(images), count))


def score_references(
    embedder: Embedder,
    statistics: PackageStatistics,
    images: ImageU8,
    *,
    smoothing_sigma: float,
    head: DefectHead | None = None,
) -> tuple[ReferenceImage, ...]:
    """Reference images with the score maps of float64 distances; the exported graph is not involved.

    Args:
        embedder: what the statistics were fitted with.
        statistics: as the package stores them.
        images: ``[R, height, width, 3]`` uint8 BGR.
        smoothing_sigma: of the map, in cells.
        head: of marked defects, if there is one.
    """
    if not len(images):
        return ()
    embeddings = np.concatenate([embedder.embed(one[None]) for one in images])
    embeddings = embeddings.astype(np.float64)
    unsmoothed = statistics.distances(embeddings).reshape(-1, *statistics.grid)
    if head is not None:
        unsmoothed = unsmoothed * np.exp(head.log_factors(embeddings))[:, None, None]
    return make_references(images, smooth_maps(unsmoothed, smoothing_sigma), unsmoothed)


class GraphFunction(Protocol):
    """Makes the scoring graph of a network, which it knows, and its statistics."""

    def __call__(
        self,
        statistics: PackageStatistics,
        *,
        smoothing_sigma: float,
        metadata: Mapping[str, str],
        head: DefectHead | None = None,
    ) -> bytes: ...


def save_package(
    path: Path,
    *,
    embedder: Embedder,
    site_statistics: SiteStatistics,
    learning: Learning,
    weights: WeightsOrigin,
    provenance: dict[str, Any],
    make_graph: GraphFunction,
    product: str,
    site: str | None,
    references: ImageU8 | None = None,
) -> Manifest:
    """Put the scoring graph together and write the package, whole or not at all.

    Args:
        path: of the package.
        embedder: what the statistics were fitted with.
        site_statistics: statistics and threshold, and the head of marked defects, if there is one.
        learning: how it was learnt.
        weights: where the backbone's weights came from.
        provenance: how the learning went.
        make_graph: puts the scoring graph together.
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
    graph = make_graph(
        site_statistics.statistics,
        smoothing_sigma=learning.scoring.smoothing_sigma,
        metadata={
            "edgeflame_version": manifest.edgeflame_version,
            "product": product,
            "method": learning.method,
            "backbone": learning.backbone.name,
            "weights_sha256": weights.sha256,
        },
        head=site_statistics.head,
    )
    condition = site_drift_reference(site_statistics, references)
    smoothing = learning.scoring.smoothing_sigma
    statistics, head = site_statistics.statistics, site_statistics.head
    write_package(
        path,
        manifest=manifest,
        model_onnx=graph,
        statistics=statistics,
        head=head,
        references=()
        if references is None
        else score_references(embedder, statistics, references, smoothing_sigma=smoothing, head=head),
        condition=condition,
        fitted=site_statistics.images.report.digests.values(),
    )
    return manifest
