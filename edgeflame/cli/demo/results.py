"""What the demo found, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeflame.cli.demo.plan import CONDITIONS

if TYPE_CHECKING:
    from rich.table import Table


class Inspected(msgspec.Struct, frozen=True):
    """One line of `edgeflame inspect --json`, as far as the demo reads it."""

    part_id: str
    verdict: str
    score: float | None
    latency_ms: float
    label: str | None = None

    @property
    def is_right(self) -> bool:
        return self.verdict == ("pass" if self.label == "good" else "fail")


class SiteResult(msgspec.Struct, frozen=True, kw_only=True):
    """One site's figures."""

    site: str
    num_train_images: int
    metrics: dict[str, dict[str, Any]]
    """Condition to what `edgeflame evaluate --json` printed."""
    threshold: float
    promise: str
    inspected: list[Inspected]

    def count(self, *, right: bool) -> int:
        return sum(part.is_right is right for part in self.inspected)

    @property
    def num_missed(self) -> int:
        """Defective parts that were passed."""
        return sum(part.label != "good" and part.verdict == "pass" for part in self.inspected)

    @property
    def num_false_rejects(self) -> int:
        """Good parts that were not passed."""
        return sum(part.label == "good" and part.verdict != "pass" for part in self.inspected)

    def latency_ms(self, quantile: float) -> float:
        ordered = sorted(part.latency_ms for part in self.inspected)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else float("nan")


def read_inspected(path: Path) -> list[Inspected]:
    """The lines `edgeflame inspect --json` wrote."""
    return [msgspec.json.decode(line, type=Inspected) for line in path.read_bytes().splitlines() if line.strip()]


def results_table(results: Sequence[SiteResult]) -> Table:
    """The table at the end of the demo."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="Image / pixel AUROC on each site's own test parts, and its line")
    table.add_column("site")
    for text in CONDITIONS.values():
        table.add_column(text, justify="right")
    for heading in ("threshold", "inspected", "right", "missed", "false rejects", "latency p50 / p95"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.site,
            *(_aurocs(result.metrics[condition]) for condition in CONDITIONS),
            f"{result.threshold:.2f}",
            str(len(result.inspected)),
            str(result.count(right=True)),
            f"[{'red' if result.num_missed else 'green'}]{result.num_missed}",
            f"[{'yellow' if result.num_false_rejects else 'green'}]{result.num_false_rejects}",
            f"{result.latency_ms(0.5):.1f} / {result.latency_ms(0.95):.1f} ms",
        )
    return table


def _aurocs(metrics: dict[str, Any]) -> str:
    pixel = metrics["pixel_AUROC"]
    return f"{metrics['image_AUROC']:.3f} / {'–' if pixel is None else f'{pixel:.3f}'}"
