"""The demo's report: one HTML file with its pictures inside, and a picture of the heat maps beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.demo.plan import CONDITIONS, DemoPlan, DemoSiteResult, InspectedPart
from cli.pages.page import render_page, write_page
from edgeflame.dataset import GOOD

if TYPE_CHECKING:
    from edgeflame.images import ImageU8


CHART_WIDTH = 720


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
    version: str
    finished: str


def write_demo_report(contents: ReportContents) -> Path:
    """Write ``report.html`` and ``heat-maps.png``.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        StorageError: the folder cannot be written.
    """
    page = render_page(
        "cli.demo",
        "report.html.j2",
        contents=contents,
        plan=contents.plan,
        results=contents.results,
        conditions=CONDITIONS,
        samples_by_label=_by_label(contents.samples),
        contributions=_contributions(contents.ledger),
        auroc=_auroc_chart(contents.results),
        strips=[_strip_chart(result) for result in contents.results],
        total=sum(len(result.inspected) for result in contents.results),
        missed=sum(result.num_missed for result in contents.results),
        false_rejects=sum(result.num_false_rejects for result in contents.results),
        mean_auroc=_mean(contents.results, "federated"),
        mean_auroc_none=_mean(contents.results, "none"),
        chart_width=CHART_WIDTH,
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
    return [{"round": entry["round"], **update} for entry in ledger["rounds"] for update in entry["contributed"]]


def _mean(results: Sequence[DemoSiteResult], condition: str) -> float:
    return float(sum(result.metrics[condition]["image_AUROC"] for result in results) / len(results))


def _auroc_chart(results: Sequence[DemoSiteResult]) -> dict[str, Any]:
    """Dots on a line from the worst figure (rounded down) to 1, one row a site and kind."""
    values = [
        result.metrics[c][kind] for result in results for c in CONDITIONS for kind in ("image_AUROC", "pixel_AUROC")
    ]
    low = min(0.9, math.floor(min(value for value in values if value is not None) * 20) / 20)
    x = _scale(low, 1.0, 150, CHART_WIDTH - 30)
    rows: list[dict[str, Any]] = []
    for result in results:
        for kind, name in (("image_AUROC", "image"), ("pixel_AUROC", "pixel")):
            dots = [
                # A little apart, or equal figures would hide each other.
                {"condition": condition, "x": x(value), "dy": 7 * (index - 1), "value": value}
                for index, condition in enumerate(CONDITIONS)
                if (value := result.metrics[condition][kind]) is not None
            ]
            rows.append({"site": result.site, "kind": name, "y": 38 + 36 * len(rows), "dots": dots})
    step = 0.05 if 1 - low <= 0.3 else 0.1
    ticks = [low + step * index for index in range(round((1 - low) / step) + 1)]
    return {"rows": rows, "ticks": [(x(tick), f"{tick:.2f}") for tick in ticks], "height": 38 + 36 * len(rows)}


def _strip_chart(result: DemoSiteResult) -> dict[str, Any]:
    """Every inspected part of one line: its order across, its score over the threshold upwards (log scale)."""
    ratios = [part.score / result.threshold for part in result.inspected if part.score]
    low, high = min(0.4, *ratios) * 0.95, max(2.0, *ratios) * 1.05
    height = 170
    y = _scale(math.log(high), math.log(low), 10, height - 10)
    x = _scale(0, max(1, len(result.inspected) - 1), 50, CHART_WIDTH - 20)
    dots = [
        {
            "x": x(index),
            "y": y(math.log(part.score / result.threshold)) if part.score else height - 10,
            "kind": _kind(part),
            "title": f"{part.part_id}: {(part.label or '').replace('_', ' ')}, {part.verdict}"
            + (f", score {part.score:.1f}" if part.score else ""),
        }
        for index, part in enumerate(result.inspected)
    ]
    marks = [ratio for ratio in (0.5, 1, 2, 4, 8, 16) if low < ratio < high]
    return {
        "result": result,
        "dots": dots,
        "height": height,
        "threshold_y": y(0.0),
        "marks": [(y(math.log(ratio)), f"{ratio:g}×") for ratio in marks],
    }


def _kind(part: InspectedPart) -> str:
    truth = "good" if part.label == "good" else "defective"
    return f"{truth} {'right' if part.is_right else 'wrong'}"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)
