"""How large the demo is and where it writes (two sizes, one shape); and its results, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeflame.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table


CONDITIONS = {
    "none": "without training",
    "alone": "trained alone",
    "federated": "trained together",
}
"""What each site's model is compared under: the pre-trained backbone, FADE alone, FLAME with the others."""


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Sizes, counts and paths of one demo run."""

    out: Path
    texture: str
    seed: int
    num_sites: int
    rounds: int
    epochs: int
    train_parts: int
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
    """The full demo, or one of a third of the boards, seen more coarsely.

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
        rounds=2,
        epochs=1 if quick else 2,
        train_parts=20 if quick else 48,
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


def results_table(results: Sequence[DemoSiteResult]) -> Table:
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
