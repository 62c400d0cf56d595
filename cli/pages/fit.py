"""The page of ``edgeflame fit --report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.output import influential_in_words
from cli.pages.charts import histogram_chart
from cli.pages.page import draw_example, render_page, write_page
from edgeflame.images import ImageU8, shrink
from edgeflame.layout import GOOD
from fitting.grouping import largest_groups

if TYPE_CHECKING:
    from edgeflame.package import Manifest
    from fitting.fit import FittedModel, Model
    from fitting.imageset import ImageSet


GROUP_PICTURE_SIDE = 128
"""Pixels; of the photographs that were taken for one part."""

NUM_OF_GROUP = 6
"""Photographs shown of each group."""

NUM_SHOWN = 24


def write_fit(folder: Path, *, fitted: FittedModel[Model], manifest: Manifest, package_file: Path, data: Path) -> Path:
    """Write ``index.html`` into a folder that is there.

    Raises:
        DataError: a training image cannot be read again.
        StorageError: it cannot be written.
    """
    threshold = manifest.threshold
    site = fitted.site
    without = {site.images.records[index].name: part.without for part in site.influential for index in part.images}
    # What had to be left out, and what moves the threshold, is shown in any case; that is what scores highest.
    suspects = [
        one
        for place, one in enumerate(site.suspects)
        if place < NUM_SHOWN or one.left_out or one.record.name in without
    ]
    page = render_page(
        "fit.html.j2",
        manifest=manifest,
        threshold=threshold,
        package_file=package_file,
        data=data,
        influential=influential_in_words(site.influential, site.images.records),
        num_unreadable=len(fitted.report.unreadable),
        groups=_draw_groups(site.images),
        histogram=histogram_chart({GOOD: site.held_out_scores}, threshold.value),
        examples=[
            {
                "example": draw_example(
                    one.record, one.anomaly_map, manifest.learning.input, threshold=threshold.value
                ),
                "ratio": one.score / threshold.value,
                "left_out": one.left_out,
                "without": without.get(one.record.name),
            }
            for one in suspects
        ],
    )
    return write_page(folder / "index.html", page)


def _draw_groups(images: ImageSet) -> list[list[tuple[ImageU8, str]]]:
    """Pictures and names of some photographs of the largest groups, the largest group first."""
    groups = []
    for indices in largest_groups(images.groups):
        few = indices[:NUM_OF_GROUP]
        pictures = (shrink(image, GROUP_PICTURE_SIDE) for image in images.batch(few))
        groups.append([(picture, images.records[index].name) for picture, index in zip(pictures, few, strict=True)])
    return groups
