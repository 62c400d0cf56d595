"""The page of ``edgeflame evaluate --report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.output import THIS_PACKAGE, promise_rows, reconcile
from cli.pages.charts import class_styles, histogram_chart, precision_recall_chart, roc_chart
from cli.pages.page import Example, draw_example, render_page, write_page
from edgeflame.layout import GOOD

if TYPE_CHECKING:
    from edgeflame.package import Package
    from fitting.evaluation import EvaluationReport, ScoredImages


NUM_WORST = 8
"""Misses and false rejects shown."""


def write_evaluation(
    folder: Path, *, package: Package, package_file: Path, data: Path, report: EvaluationReport, scored: ScoredImages
) -> Path:
    """Write ``index.html`` into a folder that is there.

    Raises:
        DataError: a test image cannot be read again.
        StorageError: it cannot be written.
    """
    import msgspec

    manifest = package.manifest
    good = scored.scores_of(GOOD)
    by_class = {name: scored.scores_of(name) for name in report.per_class}
    with_curves = len(good) > 0 and bool(by_class)
    by_label = {GOOD: good, **by_class} if len(good) else by_class
    threshold = report.threshold
    kinds = class_styles(list(by_class)) if len(by_class) > 1 else {}
    page = render_page(
        "evaluation.html.j2",
        manifest=manifest,
        threshold=manifest.threshold,
        both=reconcile(manifest.threshold, report.good_rejected_interval),
        report=report,
        fields=msgspec.structs.asdict,
        package_file=package_file,
        sha256=package.sha256,
        data=data,
        extremes=_extremes(report),
        rows=_rows(package, scored),
        missing_intervals=[
            *((f"{kind}, {name}", why) for kind, one in report.per_class.items() for name, why in _missing(one)),
            *_missing(report),
        ],
        histogram=histogram_chart(by_label, threshold),
        curves=[
            *((style, name.replace("_", " ")) for name, style in kinds.items()),
            ("all", "all defects"),
            ("accent", "at the threshold"),
        ],
        roc=roc_chart(good, by_class, threshold) if with_curves else "",
        precision_recall=precision_recall_chart(good, by_class, threshold) if with_curves else "",
        misses=_worst(package, scored, defective=True),
        rejects=_worst(package, scored, defective=False),
        masks=_masks(package, report, scored),
    )
    return write_page(folder / "index.html", page)


def _extremes(report: EvaluationReport) -> tuple[str, str] | None:
    """The kinds of defect that are caught most and least often; None where they do not differ."""
    share = {name: one.caught / one.num_images for name, one in report.per_class.items()}
    if len(set(share.values())) < 2:
        return None
    return max(share, key=lambda name: share[name]), min(share, key=lambda name: share[name])


def _rows(package: Package, scored: ScoredImages) -> list[dict[str, Any]]:
    threshold = package.manifest.threshold
    if not threshold.others:
        return []
    good, defective = scored.scores_of(GOOD), scored.defective_scores
    return [
        {
            "name": name,
            "note": note,
            "value": value,
            "mine": note == THIS_PACKAGE,
            "good": None if value is None else int((good > value).sum()),
            "caught": None if value is None else int((defective > value).sum()),
        }
        for value, name, note in promise_rows(threshold)
    ]


def _missing(one: Any) -> list[tuple[str, str]]:
    """Figures that are defined but have no interval; that one is not defined shows in the table."""
    return [(name, why) for name, why in one.without_interval.items() if getattr(one, name) is not None]


def _worst(package: Package, scored: ScoredImages, *, defective: bool) -> list[Example]:
    """The lowest scores of the defective that pass, or the highest of the good that are rejected; one of each part.

    If no good one is rejected, those nearest to it.
    """
    above = scored.scores > package.manifest.threshold.value
    good = np.array([record.is_good for record in scored.records])
    wrong = ~good & ~above if defective else good & above
    if not defective and not wrong.any():
        wrong = good
    order = np.argsort(scored.scores if defective else -scored.scores, kind="stable")
    chosen: dict[str, int] = {}
    for index in order[wrong[order]]:
        chosen.setdefault(scored.records[index].group, int(index))
    return [_example(package, scored, index) for index in list(chosen.values())[:NUM_WORST]]


def _masks(
    package: Package, report: EvaluationReport, scored: ScoredImages
) -> dict[str, list[tuple[Example, Example]]]:
    """By kind: examples with the mask at the verdict's threshold and at the best one for pixels."""
    best = report.pixel_F1Max_threshold
    if best is None:
        return {}
    masks: dict[str, list[tuple[Example, Example]]] = {}
    for name in report.per_class:
        own = [i for i, record in enumerate(scored.records) if record.label == name and record.mask is not None]
        own.sort(key=lambda index: -scored.scores[index])
        for index in _spaced(own, 3):
            masks.setdefault(name, []).append(
                (_example(package, scored, index, report.threshold), _example(package, scored, index, best))
            )
    return masks


def _spaced(items: Sequence[int], count: int) -> list[int]:
    steps = {round(step) for step in np.linspace(0, len(items) - 1, count)} if items else set()
    return [items[step] for step in sorted(steps)]


def _example(package: Package, scored: ScoredImages, index: int, pixel_threshold: float | None = None) -> Example:
    manifest = package.manifest
    return draw_example(
        scored.records[index],
        scored.maps[index],
        manifest.learning.input,
        threshold=manifest.threshold.value,
        pixel_threshold=pixel_threshold,
    )
