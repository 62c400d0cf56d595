"""How large the demo is and where it writes (two sizes, one shape); its results, as data, a table and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeflame.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table


CONDITIONS = {"alone": "alone", "together": "together"}
"""What each site's model is compared under: what it makes of its own boards, and with what the fleet gives it."""

TABLE_WIDTH = 100
"""Columns of a terminal that the table fits in."""

CHANCE = 1.645
"""A difference of wrong verdicts of fewer standard deviations (5%, one-sided) may be chance."""


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Sizes, counts and paths of one demo run."""

    out: Path
    texture: str
    seed: int
    num_sites: int
    rounds: int = 1
    epochs: int = 0
    """Of training in each round. None: no training has beaten the pre-trained backbone (docs/experiments.md)."""
    statistics: str = "prior"
    """What the sites share after the rounds: a value of the aggregator's ``statistics``."""
    train_parts: int = 5
    """Good boards that each site has to learn from: as few as a site has that begins."""
    good_parts: int
    defective_parts: int
    stream_parts: int
    photos: int = 2
    image_size: int = 256
    """Side of the photographs, pixels."""
    input_size: int
    """Side of what the model sees, pixels."""
    defect_rate: float = 0.3

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(f"site-{index + 1}" for index in range(self.num_sites))

    def data(self, site: str) -> Path:
        return self.out / "data" / site

    def package(self, site: str) -> Path:
        return self.out / "models" / f"{site}.edgeflame"

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def report(self) -> Path:
        return self.out / "report.html"


def make_demo_plan(*, out: Path, texture: str, seed: int, num_sites: int, quick: bool) -> DemoPlan:
    """The full demo, or one with a third of the boards to judge, seen more coarsely.

    Raises:
        UsageError: there is no such texture.
    """
    from boards.textures import TEXTURES

    if texture not in TEXTURES:
        raise UsageError(f"no texture {texture!r}; there are {', '.join(TEXTURES)}")
    return DemoPlan(
        out=out,
        texture=texture,
        seed=seed,
        num_sites=num_sites,
        good_parts=8 if quick else 16,
        defective_parts=10 if quick else 30,
        stream_parts=20 if quick else 50,
        input_size=192 if quick else 256,
    )


class InspectedPart(msgspec.Struct, frozen=True):
    """One line of `edgeflame inspect --json`, as far as the demo reads it."""

    part_id: str
    verdict: str
    score: float | None
    latency_ms: float
    label: str | None = None

    @property
    def is_right(self) -> bool:
        return self.verdict == ("pass" if self.label == "good" else "fail")


class DemoSiteResult(msgspec.Struct, frozen=True, kw_only=True):
    """One site's figures."""

    site: str
    num_train_images: int
    num_train_parts: int
    metrics: dict[str, dict[str, Any]]
    """Condition to what `edgeflame evaluate --json` printed."""
    threshold: float
    promise: str
    inspected: list[InspectedPart]

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


def read_inspected(path: Path) -> list[InspectedPart]:
    """The lines `edgeflame inspect --json` wrote."""
    return [msgspec.json.decode(line, type=InspectedPart) for line in path.read_bytes().splitlines() if line.strip()]


@dataclass(frozen=True, kw_only=True)
class ConditionTotal:
    """All sites under one condition: the mean of their AUROC, the sums of their photographs."""

    auroc: float
    caught: int
    num_defective: int
    rejected: int
    num_good: int

    @property
    def num_wrong(self) -> int:
        """Verdicts at the default threshold that are wrong."""
        return self.num_defective - self.caught + self.rejected


def total_of(results: Sequence[DemoSiteResult], condition: str) -> ConditionTotal:
    """The sum over the sites."""
    found = [result.metrics[condition] for result in results]
    return ConditionTotal(
        auroc=sum(metrics["image_AUROC"] for metrics in found) / len(found),
        caught=sum(metrics["defective_caught"] for metrics in found),
        num_defective=sum(metrics["num_defective"] for metrics in found),
        rejected=sum(metrics["good_rejected"] for metrics in found),
        num_good=sum(metrics["num_good"] for metrics in found),
    )


def what_joining_brought(results: Sequence[DemoSiteResult]) -> str:
    """One sentence: what the sites gained by joining, that they gained nothing, or lost."""
    alone, together = (total_of(results, condition) for condition in CONDITIONS)
    figures = (
        f"{together.caught} of {together.num_defective} defective photographs caught instead of {alone.caught}, "
        f"{together.rejected} of {together.num_good} good ones rejected instead of {alone.rejected}, "
        f"mean image AUROC {together.auroc:.3f} instead of {alone.auroc:.3f}"
    )
    fewer_wrong, better = alone.num_wrong - together.num_wrong, together.auroc - alone.auroc
    if fewer_wrong == 0 and abs(better) < 0.0005:
        return f"Joining brought nothing here: {figures}."
    if fewer_wrong <= 0 and better <= 0:
        return f"Joining brought nothing here, and cost something: {figures}."
    if fewer_wrong < 0 or better < 0:
        return f"Joining brought nothing clear here, some figures rose and some fell: {figures}."
    # As if verdicts changed independently of each other: two photographs of one board do not quite.
    is_clear = fewer_wrong > CHANCE * max(1.0, (alone.num_wrong + together.num_wrong) ** 0.5)
    rest = "" if is_clear else "; a difference this small may be chance"
    return f"Joining brought: {figures}{rest}."


def results_table(results: Sequence[DemoSiteResult]) -> Table:
    """The table at the end of the demo, at most ``TABLE_WIDTH`` wide."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("\n\nsite", no_wrap=True)
    table.add_column("boards\nto learn\nfrom", justify="right", no_wrap=True)
    for heading in ("\nAUROC", "defects\ncaught", "good\nrejected"):
        for text in CONDITIONS.values():
            table.add_column(f"{heading}\n{text}", justify="right", no_wrap=True)
    table.add_column("on the line\njudged\nrightly", justify="right", no_wrap=True)
    for result in results:
        missed, rejected = result.num_missed, result.num_false_rejects
        colour = "red" if missed else "yellow" if rejected else "green"
        right = f"[{colour}]{result.count(right=True)}[/] of {len(result.inspected)}"
        table.add_row(result.site, str(result.num_train_parts), *_condition_cells([result]), right)
    if len(results) > 1:
        table.add_section()
        boards, inspected = sum(one.num_train_parts for one in results), sum(len(one.inspected) for one in results)
        judged_rightly = f"{sum(one.count(right=True) for one in results)} of {inspected}"
        table.add_row("all", str(boards), *_condition_cells(results), judged_rightly, style="bold")
    return table


def _condition_cells(results: Sequence[DemoSiteResult]) -> list[str]:
    totals = [total_of(results, condition) for condition in CONDITIONS]
    return [
        *(f"{one.auroc:.3f}" for one in totals),
        *(f"{one.caught} of {one.num_defective}" for one in totals),
        *(f"{one.rejected} of {one.num_good}" for one in totals),
    ]
