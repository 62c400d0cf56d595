"""The page of ``edgeflame fit --report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.pages.charts import histogram_chart
from cli.pages.page import draw_example, render_page, write_page
from edgeflame.layout import GOOD

if TYPE_CHECKING:
    from edgeflame.package import Manifest
    from trainer.fit import FittedModel


NUM_SHOWN = 24


def write_fit(folder: Path, *, fitted: FittedModel, manifest: Manifest, package_file: Path, data: Path) -> Path:
    """Write ``index.html`` into a folder that is there.

    Raises:
        DataError: a training image cannot be read again.
        StorageError: it cannot be written.
    """
    threshold = manifest.threshold
    # What had to be left out is shown in any case, and that is what scores highest.
    suspects = fitted.site.suspects[: max(NUM_SHOWN, sum(one.left_out for one in fitted.site.suspects))]
    page = render_page(
        "fit.html.j2",
        manifest=manifest,
        threshold=threshold,
        package_file=package_file,
        data=data,
        num_unreadable=len(fitted.report.unreadable),
        histogram=histogram_chart({GOOD: fitted.site.held_out_scores}, threshold.value),
        examples=[
            {
                "example": draw_example(
                    one.record, one.anomaly_map, manifest.learning.input, threshold=threshold.value
                ),
                "ratio": one.score / threshold.value,
                "left_out": one.left_out,
            }
            for one in suspects
        ],
    )
    return write_page(folder / "index.html", page)
