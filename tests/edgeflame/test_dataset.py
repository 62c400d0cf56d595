"""Finding images in folders: layouts, groups files, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeflame.dataset import LoadReport, list_images, load_images, open_dataset
from edgeflame.errors import DataError
from edgeflame.images import Preprocessing, write_image


def put(path: Path, seed: int = 0, size: tuple[int, int] = (40, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    return path


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    for index in range(4):
        put(tmp_path / "train" / "good" / f"{index}.png", index)
    put(tmp_path / "test" / "good" / "0.png", 10)
    put(tmp_path / "test" / "crack" / "0.png", 11)
    put(tmp_path / "test" / "stain" / "0.png", 12)
    put(tmp_path / "ground_truth" / "crack" / "0_mask.png", 13)
    return tmp_path


def test_mvtec_layout(mvtec: Path) -> None:
    dataset = open_dataset(mvtec)
    assert [record.name for record in dataset.train] == [f"train/good/{index}.png" for index in range(4)]
    assert [record.label for record in dataset.test] == ["crack", "good", "stain"]
    assert [record.mask is not None for record in dataset.test] == [True, False, False]
    assert [record.is_good for record in dataset.test] == [False, True, False]
    assert not dataset.groups_known
    assert len({record.group for record in dataset.train}) == 4


def test_plain_folder_is_good_training_images(tmp_path: Path) -> None:
    put(tmp_path / "b.JPG")
    put(tmp_path / "sub" / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    dataset = open_dataset(tmp_path)
    assert [record.name for record in dataset.train] == ["b.JPG", "sub/a.png"]
    assert dataset.test == ()


def test_groups_file_in_the_root(mvtec: Path) -> None:
    (mvtec / "groups.csv").write_text("path,group\ntrain/good/0.png,A\ntrain/good/1.png,A\ntrain/good/2.png,B\n")
    dataset = open_dataset(mvtec)
    assert dataset.groups_known
    assert [record.group for record in dataset.train] == ["A", "A", "B", "file:train/good/3.png"]


def test_named_groups_file(mvtec: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "who.csv"
    elsewhere.write_text("file,tile\ntrain\\good\\0.png,7\n")
    assert open_dataset(mvtec, elsewhere).train[0].group == "7"


@pytest.mark.parametrize(
    ("text", "what"), [("path,group\n", "no rows"), ("path,group\na.png\n", "expected `path,group`"), ("", "no rows")]
)
def test_wrong_groups_file(mvtec: Path, text: str, what: str) -> None:
    (mvtec / "groups.csv").write_text(text)
    with pytest.raises(DataError, match=what):
        open_dataset(mvtec)


def test_groups_file_that_is_not_there(mvtec: Path) -> None:
    with pytest.raises(DataError, match="cannot read the groups file"):
        open_dataset(mvtec, mvtec / "gone.csv")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match="no such folder"):
        list_images(tmp_path / "gone")


def test_empty_folder_and_folder_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images found"):
        open_dataset(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match="no images found"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no images found"):
        list_images(tmp_path)


def test_one_unreadable_image_is_named_skipped_and_counted(mvtec: Path) -> None:
    (mvtec / "train" / "good" / "1.png").write_bytes(b"not pixels")
    report = LoadReport()
    names = [
        r.name for r, _ in load_images(open_dataset(mvtec).train, Preprocessing(height=32, width=32), report=report)
    ]
    assert names == ["train/good/0.png", "train/good/2.png", "train/good/3.png"]
    assert report.unreadable == ["train/good/1.png"]
    assert report.num_read == 3


def test_one_unreadable_image_refused(mvtec: Path) -> None:
    (mvtec / "train" / "good" / "1.png").write_bytes(b"not pixels")
    images = load_images(open_dataset(mvtec).train, Preprocessing(), on_unreadable="refuse")
    with pytest.raises(DataError, match=r"1\.png"):
        list(images)


def test_mixed_sizes_are_resized_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.png", size=(40, 48))
    put(tmp_path / "b.png", size=(80, 100))
    report = LoadReport()
    images = [
        image
        for _, image in load_images(open_dataset(tmp_path).train, Preprocessing(height=32, width=64), report=report)
    ]
    assert {image.shape for image in images} == {(32, 64, 3)}
    assert report.sizes == {(48, 40): 1, (100, 80): 1}


@pytest.mark.parametrize(("bits", "warns"), [(None, True), (12, False)])
def test_images_that_use_little_of_their_range_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int | None, warns: bool
) -> None:
    for index in range(3):
        grey = np.random.default_rng(index).integers(0, 4096, (40, 48), dtype=np.uint16)
        write_image(tmp_path / f"{index}.png", grey)
    report = LoadReport()
    preprocessing = Preprocessing(height=32, width=32, bits=msgspec.UNSET if bits is None else bits)
    list(load_images(open_dataset(tmp_path).train, preprocessing, report=report))
    report.log_summary()
    assert ("little_of_range_used" in caplog.text) == warns


def test_a_photograph_with_more_bits_than_configured_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "deep.png", np.full((40, 48), 60_000, np.uint16))
    with pytest.raises(DataError, match=r"deep\.png: samples reach 60000"):
        list(load_images(open_dataset(tmp_path).train, Preprocessing(height=32, width=32, bits=12)))


def test_the_bound_on_pixels_is_a_setting_of_the_input(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    records = open_dataset(tmp_path).train
    small = Preprocessing(height=32, width=32, max_megapixels=0.001)
    with pytest.raises(DataError, match="megapixels"):
        list(load_images(records, small, on_unreadable="refuse"))
