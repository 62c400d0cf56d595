"""The table of verdicts: its figures, what is laid out to learn from, and that it says what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from boards.dataset import DatasetSpec, write_dataset
from cli import cli
from edgeflame.dataset import open_dataset
from tests.support.paths import REPOSITORY

ACCURACY = REPOSITORY / "benchmarks" / "accuracy"
RESULTS = ACCURACY / "results"


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ACCURACY))
    import decisions

    yield decisions
    del sys.modules["decisions"]


def test_figures_of_scores(decisions: Any) -> None:
    good = [float(score) for score in range(21)]
    found = decisions.verdicts(good, [18.5, 19.5, 30.0, 40.0], 25.0)
    assert (found["good_rejected"], found["defective_caught"]) == (0, 2)
    assert found["threshold_at_5_percent"] == 19.0  # one of 21 is above
    assert found["defective_caught_at_5_percent"] == 3
    assert found["ratio"] == 2 / 3
    assert found["image_AUROC"] == (19 + 20 + 21 + 21) / (4 * 21)
    assert decisions.verdicts([1.0, 2.0], [0.0], 1.5)["ratio"] is None


def test_verdicts_are_those_of_fit_and_evaluate(decisions: Any, tmp_path: Path) -> None:
    spec = DatasetSpec(
        texture="warm_wood", num_train_parts=8, num_test_good_parts=5, num_test_defective_parts=10, num_photos=1
    )
    write_dataset(tmp_path / "boards", spec)
    found = decisions.measure(tmp_path / "boards", "--size", "64")
    package = str(tmp_path / "boards.edgeflame")
    told = CliRunner().invoke(cli, ["evaluate", "--model", package, "--data", str(tmp_path / "boards"), "--json"])
    report = json.loads(told.stdout)
    names = ("threshold", "num_good", "num_defective", "good_rejected", "defective_caught")
    assert {name: found[name] for name in names} == {name: report[name] for name in names}
    assert found["image_AUROC"] == pytest.approx(report["image_AUROC"])


@pytest.mark.parametrize("with_groups", [True, False])
def test_what_is_learnt_from_is_what_was_drawn(decisions: Any, tmp_path: Path, with_groups: bool) -> None:
    spec = DatasetSpec(
        texture="warm_wood",
        num_train_parts=6,
        num_test_good_parts=1,
        num_test_defective_parts=2,
        num_photos=2,
        image_size=64,
    )
    write_dataset(tmp_path / "all", spec)
    drawn = decisions._some_parts(tmp_path / "all", 3, seed=1)
    other = decisions._some_parts(tmp_path / "all", 3, seed=2)
    decisions.lay_out(drawn, tmp_path / "drawn", with_groups=with_groups)
    found = open_dataset(tmp_path / "drawn")
    assert found.groups_known is with_groups
    assert len({record.group for record in found.train}) == (3 if with_groups else 6)
    for ours, theirs in ((found.train, drawn.train), (found.test, drawn.test)):
        assert [record.name for record in ours] == [record.name for record in theirs]
        assert [record.path.read_bytes() for record in ours] == [record.path.read_bytes() for record in theirs]
    assert [record.name for record in drawn.test] == [record.name for record in other.test]
    assert [record.name for record in drawn.train] != [record.name for record in other.train]


def test_the_table_says_what_was_measured(decisions: Any, tmp_path: Path) -> None:
    files = sorted(RESULTS.glob("decisions-*.json"))
    assert files
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
        assert all(file.name == f"decisions-{one['code']}.json" for one in json.loads(file.read_text()))
    decisions.write_page(tmp_path, decisions.rows(tmp_path, tmp_path))
    assert (tmp_path / "decisions.md").read_text() == (RESULTS / "decisions.md").read_text()
