"""``edgeflame marks``: to the MVTec layout and back, and what is told when there is nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from cli.marks import command
from edgeflame.dataset import open_dataset
from edgeflame.errors import UsageError
from edgeflame.images import read_image, read_mask
from edgeflame.mark_shapes import Polygon, paint
from edgeflame.marks import MarkStore

BOX = Polygon(points=((4, 4), (20, 4), (20, 15), (4, 15)))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def picture(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def a_line(state: Path) -> MarkStore:
    store = MarkStore(state / "marks")
    store.add("a", picture(1), "bad", kind="deep dent", where=[BOX], part="7")
    store.add("b", picture(2), "bad", by="Kim")
    store.add("c", picture(3), "good", product="tile")
    return store


def test_marks_go_to_the_mvtec_layout_and_back_without_loss(tmp_path: Path) -> None:
    a_line(tmp_path / "state")
    told = run("export", tmp_path / "state", tmp_path / "out")
    assert told.exit_code == 0, told.output
    assert "1 good, 2 bad" in told.output
    dataset = open_dataset(tmp_path / "out")
    assert {(record.name, record.group) for record in dataset.test} == {
        ("test/deep dent/a.png", "7"),
        ("test/bad/b.png", "b"),
        ("test/good/c.png", "c"),
    }
    mask = read_mask(tmp_path / "out" / "ground_truth" / "deep dent" / "a_mask.png")
    assert (mask == paint([BOX], height=32, width=40)).all()
    told = run("import", tmp_path / "other", tmp_path / "out", "--product", "tile", "--by", "qa")
    assert told.exit_code == 0, told.output
    assert "3 added, 0 were there already" in told.output
    marks = {mark.name.partition("-")[0]: mark for mark in MarkStore(tmp_path / "other").marks()}
    assert (marks["a"].kind, marks["a"].group, marks["b"].kind, marks["c"].was) == ("deep dent", "7", None, "good")
    assert (paint(marks["a"].where, height=32, width=40) == mask).all()
    assert (read_image(tmp_path / "other" / marks["a"].file) == picture(1)).all()
    assert marks["a"].whole_frame
    assert marks["a"].by == "qa"
    assert "0 added, 3 were there already" in run("import", tmp_path / "other", tmp_path / "out").output


def test_lists_tell_what_was_asked_for(tmp_path: Path) -> None:
    a_line(tmp_path)
    told = run("list", tmp_path, "--was", "bad")
    assert "2 marks: 0 good, 2 bad" in told.output
    assert "deep dent" in told.output
    (one,) = json.loads(run("list", tmp_path / "marks", "--product", "tile", "--json").output)
    assert (one["was"], one["file"]) == ("good", "good/c.png")


def test_what_cannot_be_done_is_told_and_changes_nothing(tmp_path: Path) -> None:
    assert isinstance(run("list", tmp_path).exception, UsageError)
    a_line(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert isinstance(run("export", tmp_path, tmp_path / "out").exception, UsageError)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "new" / "good").mkdir(parents=True)
    (tmp_path / "new" / "good" / "x.png").write_bytes(b"no picture")
    told = run("import", tmp_path, tmp_path / "new")
    assert "0 added, 0 were there already, 1 could not be read" in told.output
    assert len(MarkStore(tmp_path / "marks").marks()) == 3
