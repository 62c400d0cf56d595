"""The demo's report: one HTML file with its pictures inside, and a picture of the heat maps beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.demo.plan import CONDITIONS, DemoPlan, DemoSiteResult, total_of, what_joining_brought
from cli.pages.charts import WIDE, Axis, Chart
from cli.pages.page import render_page, write_page
from edgeflame.layout import GOOD

if TYPE_CHECKING:
    from edgeflame.images import ImageU8


STYLES = {"alone": "c1", "together": "c0"}
"""Colours of the conditions."""

HARDLY_VISIBLE = 0.1
"""Severity below which a defect that was passed is not called a miss: at 0 it is at the limit of what can be seen."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A test photograph with its heat map.

    Attributes:
        label: the defect's name, or ``good``.
        severity: 0 (faint) to 1 (glaring).
        photo: ``[H, W, 3]`` BGR, as the camera gave it.
        heat_map: ``[H, W, 3]`` BGR, with the heat map and the true outline drawn over it.
        ratio: score divided by the threshold.
    """

    label: str
    severity: float
    photo: ImageU8
    heat_map: ImageU8
    ratio: float


@dataclass(frozen=True, kw_only=True)
class ReportContents:
    """All that the report shows."""

    plan: DemoPlan
    results: Sequence[DemoSiteResult]
    samples: Sequence[Sample]
    ledger: dict[str, Any]
    stages: Sequence[tuple[str, float]]
    """What was done and how many seconds it took."""


def write_demo_report(contents: ReportContents) -> Path:
    """Write ``report.html`` and ``heat-maps.png``.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        StorageError: the folder cannot be written.
    """
    results = contents.results
    page = render_page(
        "demo.html.j2",
        contents=contents,
        plan=contents.plan,
        results=results,
        conditions=CONDITIONS,
        samples_by_label=_by_label(contents.samples),
        contributions=_contributions(contents.ledger),
        auroc=_auroc_chart(results),
        auroc_key=[(style, CONDITIONS[name]) for name, style in STYLES.items()],
        strips=[(result, _strip_chart(result)) for result in results],
        total=sum(len(result.inspected) for result in results),
        missed=sum(result.num_missed for result in results),
        false_rejects=sum(result.num_false_rejects for result in results),
        totals={condition: total_of(results, condition) for condition in CONDITIONS},
        sentence=what_joining_brought(results),
        hardly_visible=HARDLY_VISIBLE,
    )
    write_page(contents.plan.report, page)
    _write_heat_maps(contents)
    return contents.plan.report


def _write_heat_maps(contents: ReportContents) -> None:
    import numpy as np

    from edgeflame.images import write_image

    columns = []
    for samples in _by_label(contents.samples).values():
        glaring = samples[0]
        columns.append(np.vstack([_framed(glaring.photo), _framed(glaring.heat_map)]))
    if columns:
        write_image(contents.plan.out / "heat-maps.png", np.hstack(columns))


def _framed(image: ImageU8) -> ImageU8:
    import cv2
    import numpy as np

    resized = cv2.resize(image, (240, 240), interpolation=cv2.INTER_AREA)
    return np.pad(resized, ((4, 4), (4, 4), (0, 0)), constant_values=255).astype(np.uint8)


def _by_label(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    grouped: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.label == GOOD, sample.label, -sample.severity)):
        grouped.setdefault(sample.label, []).append(sample)
    return grouped


def _contributions(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"what": f"round {entry['round']}", **update} for entry in ledger["rounds"] for update in entry["contributed"]
    ]
    shared = ledger["statistics"]
    return rows + [{"what": "statistics", **part} for part in (shared["contributed"] if shared else ())]


def _auroc_chart(results: Sequence[DemoSiteResult]) -> str:
    """Dots on a line from the worst figure (rounded down) to 1, one row a site and kind of figure."""
    kinds = {"image_AUROC": "image", "pixel_AUROC": "pixel"}
    rows = [(result, kind) for kind in kinds for result in results]
    values = [result.metrics[c][kind] for result, kind in rows for c in CONDITIONS]
    low = min(0.9, math.floor(min(value for value in values if value is not None) * 20) / 20)
    step = 0.05 if 1 - low <= 0.3 else 0.1
    steps = [low + step * index for index in range(round((1 - low) / step) + 1)]
    chart = Chart(
        "AUROC by site and condition",
        Axis(low=low - 0.004, high=1.004, ticks=[(tick, f"{tick:.2f}") for tick in steps]),
        Axis(
            low=len(rows) - 0.5,
            high=-0.5,
            ticks=[(row, f"{result.site} · {kinds[kind]}") for row, (result, kind) in enumerate(rows)],
        ),
        width=WIDE,
        height=36 * len(rows) + 40,
    )
    for row, (result, kind) in enumerate(rows):
        for index, (condition, style) in enumerate(STYLES.items()):
            value = result.metrics[condition][kind]
            if value is not None:
                # A little apart, or equal figures would hide each other.
                title = f"{CONDITIONS[condition]}: {value:.3f}"
                chart.dots([(value, row + 0.3 * (index - 0.5), title)], style, radius=5)
    return chart.svg()


def _strip_chart(result: DemoSiteResult) -> str:
    """Every inspected part of one line: its order across, its score over the threshold upwards (log scale)."""
    ratios = [part.score / result.threshold for part in result.inspected if part.score]
    low, high = min(0.4, *ratios) * 0.95, max(2.0, *ratios) * 1.05
    marks = [(mark, f"{mark:g}×") for mark in (0.5, 1, 2, 4, 8, 16) if low < mark < high]
    chart = Chart(
        f"Scores of {result.site}",
        Axis(low=-0.7, high=len(result.inspected) - 0.3, ticks=()),
        Axis(low=low, high=high, ticks=marks, log=True),
        width=WIDE,
        height=180,
    )
    chart.rule("limit", y=1.0)
    for index, part in enumerate(result.inspected):
        title = f"{part.part_id}: {(part.label or '').replace('_', ' ')}, {part.verdict}"
        title += f", score {part.score:.1f}" if part.score else ""
        style = ("good" if part.label == GOOD else "bad") + ("" if part.is_right else " wrong")
        chart.dots([(index, part.score / result.threshold if part.score else low, title)], style, radius=5)
    return chart.svg()
