"""What folders say about the images in them: nothing that is not said to be good is taken for good."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeflame.dataset import Dataset, list_images, open_dataset, open_defects
from edgeflame.errors import DataError


def put(root: Path, *names: str) -> Path:
    """Empty files; a layout is read from names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def train_names(dataset: Dataset) -> list[str]:
    return [record.name for record in dataset.train]


def left_out(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    told = [record.fields for record in caplog.records if record.message == "folder_left_out"]  # type: ignore[attr-defined]
    return {fields["folder"]: fields["images"] for fields in told}


@pytest.mark.parametrize(
    ("train", "good"), [("Train", "Good"), ("TRAIN", "GOOD"), ("train", "OK"), ("Train", "normal")]
)
def test_the_layout_may_be_written_in_any_case_of_letters(tmp_path: Path, train: str, good: str) -> None:
    put(tmp_path, f"{train}/{good}/1.png", f"Test/{good}/2.png", "Test/Crack/3.png", "Ground_Truth/crack/3_mask.png")
    dataset = open_dataset(tmp_path)
    assert train_names(dataset) == [f"{train}/{good}/1.png"]
    assert {record.name: record.label for record in dataset.test} == {
        f"Test/{good}/2.png": "good",
        "Test/Crack/3.png": "Crack",
    }
    assert [record.mask for record in dataset.test if not record.is_good] == [
        tmp_path / "Ground_Truth" / "crack" / "3_mask.png"
    ]


@pytest.mark.parametrize("folder", ["train/good", "Test/Good"])
def test_a_folder_one_level_too_high_is_refused(tmp_path: Path, folder: str) -> None:
    put(tmp_path, f"bottle/{folder}/1.png", "bottle/test/broken/2.png", "cable/train/good/1.png", "0.png")
    with pytest.raises(DataError, match=r"a whole data set lies below it.*bottle, .*cable"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("good", "bad"), [("good", "bad"), ("OK", "NG"), ("Good", "scratched")])
def test_beside_a_folder_of_good_parts_only_that_one_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, good: str, bad: str
) -> None:
    """As the operator's page keeps what was marked, and as a test folder lies in the MVTec layout."""
    put(tmp_path, f"{good}/1.png", f"{good}/monday/2.png", f"{bad}/3.png", f"{bad}/4.png")
    assert train_names(open_dataset(tmp_path)) == [f"{good}/1.png", f"{good}/monday/2.png"]
    assert left_out(caplog) == {bad: 2}


def test_several_folders_of_marks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "line1/good/1.png", "line1/bad/2.png", "line2/good/ok/3.png", "line2/good/4.png", "line3/5.png")
    good = ["line1/good/1.png", "line2/good/4.png", "line2/good/ok/3.png", "line3/5.png"]
    assert train_names(open_dataset(tmp_path)) == good
    assert left_out(caplog) == {"line1/bad": 1}


@pytest.mark.parametrize(
    "folder", ["bad", "Defects", "ground_truth/crack", "masks", "test", "rejects-2024", "line 3 NG", "not_good", "val"]
)
def test_a_folder_in_a_plain_one_that_says_it_is_not_good_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    put(tmp_path, "1.png", "monday/2.png", f"monday/{folder}/3.png", "latest/4.png", "failover/5.png")
    assert train_names(open_dataset(tmp_path)) == ["1.png", "failover/5.png", "latest/4.png", "monday/2.png"]
    assert left_out(caplog) == {f"monday/{folder.partition('/')[0]}": 1}


def test_a_data_set_tells_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train/good/1.png", "train/good/defects/2.png", "train/scratch/3.png", "test/loose.png", "a.png")
    put(tmp_path, "validation/good/4.png", "test/good/5.png", "test/crack/6.png", "ground_truth/crack/6_mask.png")
    dataset = open_dataset(tmp_path)
    assert train_names(dataset) == ["train/good/1.png"]
    assert [record.label for record in dataset.test] == ["crack", "good"]
    assert set(left_out(caplog)) == {"train/good/defects", "train/scratch", "test", ".", "validation/good"}


@pytest.mark.parametrize("folder", ["state/marks/bad", "NG", "data/ground_truth", "data/ground_truth/crack"])
def test_a_folder_whose_own_name_says_not_good_is_refused(tmp_path: Path, folder: str) -> None:
    put(tmp_path, f"{folder}/1.png")
    with pytest.raises(DataError, match="the name of this folder says that these are not"):
        open_dataset(tmp_path / folder)


def test_the_folder_of_a_defect_in_a_test_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "test/good/1.png", "test/crack/2.png")
    with pytest.raises(DataError, match="the folder of a defect"):
        open_dataset(tmp_path / "test" / "crack")
    assert train_names(open_dataset(tmp_path / "test" / "good")) == ["1.png"]
    assert train_names(open_dataset(put(tmp_path, "other/test/part/3.png") / "other" / "test" / "part")) == ["3.png"]


def test_nothing_but_folders_that_are_not_good_is_an_error_that_names_them(tmp_path: Path) -> None:
    put(tmp_path, "defects/1.png", "masks/2.png")
    with pytest.raises(DataError, match=r"these are not: defects, masks"):
        open_dataset(tmp_path)


def test_hidden_folders_and_thumbnails_of_other_programs_are_not_looked_at(tmp_path: Path) -> None:
    put(tmp_path, "1.png", ".trash/2.png", "__MACOSX/3.png", "@eaDir/4.png")
    assert train_names(open_dataset(tmp_path)) == ["1.png"]


def test_links_are_followed_and_a_folder_counts_once(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/1.png", "data/train/stays.txt")
    (tmp_path / "data" / "train" / "good").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    assert train_names(open_dataset(tmp_path / "data")) == ["train/good/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "locked/2.png")
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(DataError, match="locked: the folder cannot be read"):
            list_images(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_a_groups_file_of_another_data_set_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "Train/Good/1.png")
    (tmp_path / "groups.csv").write_text("path,group\ntrain/good/1.png,A\n")
    with pytest.raises(DataError, match=r"no image is in the groups file; paths such as Train/Good/1\.png"):
        open_dataset(tmp_path)


def test_labelled_defects_of_a_data_set_of_its_test_folder_and_of_a_folder_of_their_own(tmp_path: Path) -> None:
    put(
        tmp_path,
        "Train/Good/1.png",
        "Test/good/2.png",
        "Test/crack/3.png",
        "Test/crack/4.png",
        "ground_truth/crack/3.png",
    )
    (tmp_path / "groups.csv").write_text("path,part\nTest/crack/3.png,A\nTest/crack/4.png,A\n")
    whole = open_defects(tmp_path)
    assert whole.train == ()
    assert [(one.name, one.label, one.group) for one in whole.test] == [
        ("Test/crack/3.png", "crack", "A"),
        ("Test/crack/4.png", "crack", "A"),
    ]
    assert [one.name for one in open_defects(tmp_path / "Test").test] == ["crack/3.png", "crack/4.png"]
    assert {one.label for one in open_defects(tmp_path / "Test" / "crack").test} == {"crack"}
    put(tmp_path, "marks/good/5.png", "marks/bad/6.png", "marks/bad/masks/6.png")
    assert [one.name for one in open_defects(tmp_path / "marks").test] == ["bad/6.png"]


def test_what_holds_no_labelled_defects(tmp_path: Path) -> None:
    put(tmp_path, "train/good/1.png", "test/good/2.png")
    with pytest.raises(DataError, match="no images of labelled defects"):
        open_defects(tmp_path)
    with pytest.raises(DataError, match="this folder's name says that its parts are good"):
        open_defects(tmp_path / "test" / "good")
    with pytest.raises(DataError, match="a whole data set lies below it"):
        open_defects(tmp_path.parent)
