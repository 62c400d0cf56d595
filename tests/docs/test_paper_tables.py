"""The paper's experiments as data: every run can be run, at both scales, and a table says what it does not show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator.simulation.config import SimulationConfig
from edgeflame.config import load_config
from tests.support.paths import REPOSITORY

ACCURACY = REPOSITORY / "benchmarks" / "accuracy"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package of the benchmarks."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ACCURACY))
    import paper.experiments
    import paper.report

    yield paper
    for name in [name for name in sys.modules if name.partition(".")[0] == "paper"]:
        del sys.modules[name]


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_run_is_a_simulation_that_can_be_configured(paper: Any, scale: str) -> None:
    recipes = paper.experiments.Recipes(paper.experiments.SCALES[scale], Path("/tiles"))
    found = paper.experiments.experiments(recipes)
    assert set(found) >= {"table1", "table2", "table3", "table4", "table5", "fig9", "fig10", "fig11", "fig12", "fig14"}
    configs = {}
    for experiment in found.values():
        for run in experiment.runs():
            configs[run.key] = load_config(None, SimulationConfig, run.simulation)
        assert len({(cell.row, cell.column) for cell in experiment.cells}) == len(experiment.cells)
    epochs = {config.fleet.learning.training.epochs for config in configs.values() if config.alone is None}
    # The paper's preset reaches through [fleet] to the learning inside it.
    assert (10 in epochs) if scale == "paper" else (1 in epochs)
    assert {config.seed for config in configs.values()} == {0, 1, 2}


def write_run(root: Path, run: Any, auroc: float) -> None:
    folder = root / run.key
    folder.mkdir(parents=True, exist_ok=True)
    one = {"figures": {"image_AUROC": auroc, "pixel_AUROC": 0.9}, "classes": {}}
    (folder / "metrics.json").write_bytes(msgspec.json.encode({"rounds": [], "sites": {"all": one}}))
    (folder / "ledger.json").write_bytes(b'{"rounds": []}')


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ((0.10, 0.11, 0.12), "better than `none`: `fade` (+11.00 ± 2.48)"),
        ((0.10, -0.11, 0.02), "not told from (so it does not beat) `none`: `fade`"),
        ((-0.10, -0.11, -0.12), "worse than `none`: `fade` (-11.00 ± 2.48)"),
    ],
)
def test_a_table_says_in_words_what_is_not_better(paper: Any, gains: Any, words: str, tmp_path: Path) -> None:
    recipes = paper.experiments.Recipes(paper.experiments.SMALL, None)
    make = {name: recipes.boards("warm_wood", name, sites=1) for name in ("none", "fade")}
    cells = tuple(
        paper.experiments.Cell(row="hww", column=name, run=run, paper="1.0/2.0") for name, run in make.items()
    )
    experiment = paper.experiments.Experiment(title="T", cells=cells, baselines=("none",), plot="sweep")
    for seed, gain in enumerate(gains):
        write_run(tmp_path, make["none"](seed), 0.5)
        write_run(tmp_path, make["fade"](seed), 0.5 + gain)
    text = paper.report.table(experiment, tmp_path, "command")
    assert words in text
    assert "| hww | 50.0 ± 0.0 / 90.0 ± 0.0<br>paper 1.0/2.0 |" in text
    picture = paper.report.plot(experiment, "t", tmp_path, tmp_path)
    assert picture.stat().st_size > 1000


def test_a_run_without_results_is_not_over(paper: Any, tmp_path: Path) -> None:
    recipes = paper.experiments.Recipes(paper.experiments.SMALL, None)
    assert paper.runs.outcome(recipes.boards("warm_wood", "none", sites=1)(0), tmp_path) is None
