"""What a package holds beside the model: reference images and the drift reference.

The drift reference describes the site's good parts and their pictures; a line's drift is measured against it. The
reference images are good images in the package against whose scores every runtime is checked.
"""

from __future__ import annotations

import numpy as np

from edgeflame.drift_reference import (
    MAX_REFERENCE_IMAGES,
    AlignmentTemplate,
    DriftReference,
    image_streams,
    make_drift_reference,
)
from edgeflame.images import ImageU8
from edgeflame.log import EventLog
from edgeflame.package import evenly_spaced
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
