"""The data set on disk: layout, groups, repeatability, and what the writer refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from boards.board import DEFECTS
from boards.camera import Camera
from boards.dataset import DatasetSpec, defect_severity, write_dataset
from edgeflame.dataset import open_dataset
from edgeflame.errors import DataError, StorageError

ARGUMENTS: dict[str, Any] = {
    "texture": "warm_wood",
    "num_train_parts": 3,
    "num_test_good_parts": 2,
    "num_test_defective_parts": 6,
    "num_photos": 2,
    "image_size": 64,
    "seed": 11,
    "camera": Camera.for_site(1, 11),
}
SPEC = DatasetSpec(**ARGUMENTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("boards") / "data"
    write_dataset(out, SPEC)
    return out


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def groups(root: Path) -> dict[str, str]:
    with (root / "groups.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["path", "group"]
    assert len({path for path, _ in rows[1:]}) == len(rows) - 1
    return {row[0]: row[1] for row in rows[1:]}


def test_layout(written: Path) -> None:
    files = set(tree(written))
    images = {name for name in files if name.startswith(("train/", "test/"))}
    masks = {name for name in files if name.startswith("ground_truth/")}
    assert files == images | masks | {"groups.csv", "dataset.json"}
    assert len([name for name in images if name.startswith("train/good/")]) == 6
    assert len([name for name in images if name.startswith("test/good/")]) == 4
    for defect, parts in zip(DEFECTS, (2, 1, 1, 1, 1), strict=True):
        stems = {Path(name).stem for name in images if name.startswith(f"test/{defect}/")}
        assert len(stems) == 2 * parts
        assert {f"ground_truth/{defect}/{stem}_mask.png" for stem in stems} == {
            name for name in masks if name.startswith(f"ground_truth/{defect}/")
        }
    assert not list(written.glob(".*"))


def test_images_and_masks_are_what_they_should_be(written: Path) -> None:
    for name in groups(written):
        image = cv2.imread(str(written / name), cv2.IMREAD_UNCHANGED)
        assert image is not None
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
    for path in (written / "ground_truth").rglob("*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}


def test_groups_name_every_photograph_and_no_part_is_in_train_and_test(written: Path) -> None:
    group_of = groups(written)
    assert set(group_of) == {name for name in tree(written) if name.startswith(("train/", "test/"))}
    members: dict[str, list[str]] = {}
    for name, group in group_of.items():
        members.setdefault(group, []).append(name)
    assert len(members) == 11
    for names in members.values():
        assert len(names) == 2
        assert len({name.rsplit("/", 1)[0] for name in names}) == 1
    train = {group for name, group in group_of.items() if name.startswith("train/")}
    test = {group for name, group in group_of.items() if name.startswith("test/")}
    assert train
    assert test
    assert not train & test


def test_photographs_of_a_part_resemble_each_other_more_than_other_parts(written: Path) -> None:
    def load(stem: str) -> np.ndarray:
        image = cv2.imread(str(written / "train/good" / f"{stem}.png"))
        assert image is not None
        # The grain alone: away from the edges, brightness taken out, placement blurred away.
        grain = cv2.GaussianBlur(image[10:-10, 10:-10], (0, 0), 2.0).astype(np.float64).mean(axis=2)
        return np.asarray(grain - grain.mean())

    def likeness(first: str, second: str) -> float:
        return float(np.corrcoef(load(first).ravel(), load(second).ravel())[0, 1])

    same = min(likeness(f"000{part}-0", f"000{part}-1") for part in range(3))
    other = max(likeness("0000-0", "0001-0"), likeness("0000-0", "0002-0"), likeness("0001-0", "0002-0"))
    assert same > 0.6 > other
    assert not np.array_equal(load("0000-0"), load("0000-1"))


def test_the_record_says_what_generated_the_files(written: Path) -> None:
    record = json.loads((written / "dataset.json").read_text(encoding="utf-8"))
    assert record["spec"]["texture"] == "warm_wood"
    assert record["spec"]["seed"] == 11
    assert record["spec"]["camera"]["gain"] == ARGUMENTS["camera"].gain
    assert set(record["files"]) == set(groups(written))
    for name, entry in record["files"].items():
        assert entry["group"] == groups(written)[name]
        assert entry["label"] == name.split("/")[1]
        assert ("severity" in entry) == (entry["label"] != "good")
    severities = [entry["severity"] for entry in record["files"].values() if "severity" in entry]
    assert min(severities) == 0
    assert max(severities) == 1


def test_the_project_reads_it(written: Path) -> None:
    data = open_dataset(written)
    assert data.groups_known
    assert len(data.train) == 6
    assert {record.group for record in data.train} == {f"train-good-000{part}" for part in range(3)}
    assert all((record.mask is None) == record.is_good for record in data.test)


def test_the_same_arguments_give_the_same_bytes_and_others_other_ones(written: Path, tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "again", SPEC)
    assert tree(tmp_path / "again") == tree(written)
    assert SPEC.num_parts == 11
    write_dataset(tmp_path / "other", DatasetSpec(**{**ARGUMENTS, "seed": 12}))
    pictures = {data for name, data in tree(written).items() if name.endswith(".png") and "_mask" not in name}
    assert not pictures & set(tree(tmp_path / "other").values())


def test_more_parts_leave_the_first_ones_as_they_were(written: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "more", DatasetSpec(**{**ARGUMENTS, "num_train_parts": 4, "num_photos": 3}))
    before, after = tree(written), tree(tmp_path / "more")
    assert all(after[name] == data for name, data in before.items() if name.startswith(("train", "test/good")))


def test_a_finished_data_set_is_left_as_it_is(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    calls: list[tuple[int, int]] = []
    is_new = write_dataset(written, SPEC, progress=lambda done, total: calls.append((done, total)))
    assert not is_new
    assert calls == [(22, 22)]
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_progress_counts_photographs(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_dataset(tmp_path, SPEC, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 22) for done in range(1, 23)]


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"new or empty folder, found 'holiday.jpg'"):
        write_dataset(tmp_path, SPEC)
    assert tree(tmp_path) == {"holiday.jpg": b"x"}


@pytest.mark.parametrize("change", [{"seed": 12}, {"num_train_parts": 4}, {"camera": Camera()}])
def test_a_data_set_of_other_arguments_is_refused(written: Path, change: dict[str, Any]) -> None:
    before = tree(written)
    with pytest.raises(DataError, match="made with other arguments"):
        write_dataset(written, DatasetSpec(**{**ARGUMENTS, **change}))
    assert tree(written) == before


@pytest.mark.parametrize("victim", ["train/good/0001-0.png", "groups.csv", "ground_truth/stain/0000-1_mask.png"])
@pytest.mark.parametrize("harm", ["alter", "remove"])
def test_a_harmed_data_set_is_refused(tmp_path: Path, victim: str, harm: str) -> None:
    write_dataset(tmp_path, SPEC)
    if harm == "alter":
        (tmp_path / victim).write_bytes((tmp_path / victim).read_bytes() + b"\0")
    else:
        (tmp_path / victim).unlink()
    with pytest.raises(DataError, match="missing or altered"):
        write_dataset(tmp_path, SPEC)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"spec": 3}'])
def test_a_foreign_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        write_dataset(tmp_path, SPEC)


def test_a_record_without_its_files_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, SPEC)
    record = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    del record["files"]
    (tmp_path / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DataError, match="altered since"):
        write_dataset(tmp_path, SPEC)


def test_an_interrupted_run_leaves_nothing_and_a_killed_one_is_made_good(written: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        write_dataset(out, SPEC, progress=interrupt)
    assert not out.exists()
    # As a killed process leaves it.
    (out / ".unfinished" / "train").mkdir(parents=True)
    (out / ".unfinished" / "train" / "half.png").write_bytes(b"x")
    write_dataset(out, SPEC)
    assert tree(out) == tree(written)


def test_a_place_that_cannot_hold_a_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DataError, match="found a file"):
        write_dataset(tmp_path / "file", SPEC)
    with pytest.raises((DataError, StorageError)):
        write_dataset(tmp_path / "file" / "below", SPEC)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"texture": "marble"}, "no texture"),
        ({"num_train_parts": 0}, "num_train_parts is at least 1"),
        ({"num_photos": 0}, "num_photos is at least 1"),
        ({"image_size": 10}, "image_size is at least 64"),
        ({"num_test_defective_parts": -1}, "num_test_defective_parts is at least 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        write_dataset(tmp_path / "data", DatasetSpec(**{**ARGUMENTS, **change}))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_severities_cover_the_range_evenly(count: int) -> None:
    severities = sorted(defect_severity(kind, index, count) for kind in range(5) for index in range(count))
    assert np.allclose(severities, np.linspace(0, 1, 5 * count), atol=1e-4)
