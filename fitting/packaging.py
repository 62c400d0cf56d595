"""What a site adds to a backbone: its statistics, its threshold, its reference images and its drift reference.

The drift reference describes the site's good parts and their pictures; a line's drift is measured against it. The
reference images are good images in the package against whose scores every runtime is checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.drift_reference import (
    MAX_REFERENCE_IMAGES,
    AlignmentTemplate,
    DriftReference,
    image_streams,
    make_drift_reference,
)
from edgeflame.images import ImageU8
from edgeflame.log import EventLog
from edgeflame.package import Threshold, evenly_spaced
from edgeflame.statistics.codec import PackageStatistics
from fitting.imageset import ImageSet
from fitting.suspects import Suspect


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What a site adds to a backbone.

    Attributes:
        statistics: of all its good images, as a package stores them.
        threshold: by cross-fitting over its parts.
        images: those it rests on: all that could be read, but for those left out.
        held_out_scores: ``[N]`` of these images, by statistics that did not see them.
        held_out_means: ``[N]`` means of the maps whose maxima these scores are.
        suspects: of all images those that look least normal, the worst first.
        details: for the package's provenance: rank, likelihoods, counts, seconds.
    """

    statistics: PackageStatistics
    threshold: Threshold
    images: ImageSet
    held_out_scores: npt.NDArray[np.float64]
    held_out_means: npt.NDArray[np.float64]
    suspects: tuple[Suspect, ...]
    details: dict[str, Any] = field(default_factory=dict)


def site_drift_reference(site: SiteStatistics, references: ImageU8 | None) -> DriftReference:
    """The streams of a site's good images, as statistics that had not seen them scored them.

    Args:
        site: scores, maps' means, and images.
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
