"""What a site's good parts and their pictures are like: the reference that a line's drift is measured against."""

from __future__ import annotations

from edgeflame.condition import MAX_IMAGES, ConditionReference, Template, condition_reference, image_condition
from edgeflame.images import ImageU8
from edgeflame.references import evenly_spaced
from trainer.site_statistics import SiteStatistics


def site_condition(site: SiteStatistics, references: ImageU8 | None) -> ConditionReference:
    """The streams of a site's good images, as statistics that had not seen them scored them.

    Args:
        site: scores, maps' means, and images.
        references: the package's reference images ``[R, height, width, 3]``: what positions are compared with, here as
            on the line. Without them (None, R = 0) nothing is known of positions.
    """
    images = site.images
    template = Template(references) if references is not None and len(references) else None
    chosen = evenly_spaced(len(images), MAX_IMAGES)
    return condition_reference(
        {"score": site.held_out_scores, "embedding": site.held_out_means},
        [image_condition(images.batch([index])[0], template) for index in chosen],
        num_parts=len(set(images.groups)),
        num_images=len(images),
    )
