"""The demo's results: the table fits, the sentence says what the figures say, and a pause looks like no end."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cli.demo.plan import (
    TABLE_WIDTH,
    DemoSiteResult,
    InspectedPart,
    make_demo_plan,
    results_table,
    what_joining_brought,
)
from cli.demo.report import ReportContents, Sample, write_demo_report
from cli.output import TimeLeft, in_minutes


def metrics(auroc: float, caught: int, rejected: int) -> dict[str, Any]:
    return {
        "image_AUROC": auroc, "pixel_AUROC": 0.97, "defective_caught": caught, "num_defective": 60,
        "good_rejected": rejected, "num_good": 32,
    }  # fmt: skip


def result(site: str, alone: tuple[float, int, int], together: tuple[float, int, int]) -> DemoSiteResult:
    parts = [InspectedPart(part_id=str(i), verdict="pass", score=1.0, latency_ms=5, label="good") for i in range(50)]
    return DemoSiteResult(
        site=site,
        num_train_images=10,
        num_train_parts=5,
        metrics={"alone": metrics(*alone), "together": metrics(*together)},
        threshold=2.0,
        promise="about 5% of good photographs rejected",
        inspected=[*parts[:-1], InspectedPart(part_id="x", verdict="pass", score=3, latency_ms=5, label="stain")],
    )


def test_the_table_fits_a_terminal_and_no_cell_is_wrapped() -> None:
    results = [result(f"site-{number}", (0.98765, 51, 12), (0.99, 60, 10)) for number in range(1, 9)]
    console = Console(width=TABLE_WIDTH, record=True, file=io.StringIO())
    console.print(results_table(results))
    lines = console.export_text().rstrip().splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert "…" not in "".join(lines)
    sites = [line for line in lines if re.match(r" *site-\d ", line)]
    assert len(sites) == 8, "one line a site"
    assert re.search(r"site-1 +5 +0\.988 +0\.990 +51 of 60 +60 of 60 +12 of 32 +10 of 32 +49 of 50", sites[0])
    assert re.search(r"all +40 +0\.988 +0\.990 +408 of 480 +480 of 480 +96 of 256 +80 of 256 +392 of 400", lines[-1])


@pytest.mark.parametrize(
    ("together", "begins", "ends"),
    [
        ((0.95, 58, 1), "Joining brought: 58 of 60", "0.900."),
        ((0.91, 51, 2), "Joining brought: 51 of 60", "a difference this small may be chance."),
        ((0.90, 50, 2), "Joining brought nothing here: ", "0.900."),
        ((0.89, 50, 3), "Joining brought nothing here, and cost something: ", "0.900."),
        ((0.95, 40, 2), "Joining brought nothing clear here", "0.900."),
    ],
)
def test_one_sentence_says_what_joining_brought(together: tuple[float, int, int], begins: str, ends: str) -> None:
    said = what_joining_brought([result("site-1", (0.90, 50, 2), together)])
    assert said.startswith(begins)
    assert said.endswith(ends)
    assert said.count(". ") == 0


def test_a_defect_at_the_limit_of_what_can_be_seen_is_not_called_a_miss(tmp_path: Path) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    samples = [
        Sample(label=label, severity=severity, photo=picture, heat_map=picture, ratio=0.7)
        for label, severity in (("stain", 0.0), ("stain", 0.5), ("good", 0.0))
    ]
    plan = make_demo_plan(out=tmp_path, texture="warm_wood", seed=0, num_sites=2, quick=True)
    results = [result("site-1", (0.9, 50, 2), (0.95, 58, 1)), result("site-2", (0.9, 50, 2), (0.95, 58, 1))]
    part = {"site": "site-1", "sha256": "a" * 64, "num_samples": 10, "weight": 1.0}
    ledger = {"rounds": [{"round": 1, "contributed": [part]}], "statistics": {"contributed": [part]}}
    page = write_demo_report(ReportContents(plan=plan, results=results, samples=samples, ledger=ledger, stages=[]))
    captions = re.findall(r"0\.70 × threshold · ([^<]*)<", page.read_text())
    assert captions == ["pass, missed", "pass, hardly visible", "pass"]
    assert "<b>Joining brought: 116 of 120" in page.read_text()


def test_time_left_is_not_said_before_it_is_known_and_grows_while_nothing_moves() -> None:
    left = TimeLeft()
    assert left.seconds(0, 0, 0.0) is None
    assert left.seconds(0, 9, 10.0) is None
    assert left.seconds(0, 9, 40.0) is None
    assert left.seconds(8, 9, 42.0) == pytest.approx(4.0)
    assert left.seconds(8, 9, 202.0) == pytest.approx(24.0), "it stands still, and will not be over in a moment"
    assert left.seconds(9, 9, 203.0) is None
    # Another stage, and one that begins in the middle.
    assert left.seconds(50, 100, 300.0) is None
    assert left.seconds(75, 100, 350.0) == pytest.approx(50.0)
    assert [in_minutes(seconds) for seconds in (0.3, 42, 100, 3599)] == ["5 s", "40 s", "2 min", "60 min"]
