"""The generated conveyor."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from boards.board import DEFECTS
from boards.camera import Camera
from boards.dataset import BoardStream, DatasetSpec, plan_parts

STREAM = BoardStream(
    texture="green_grey_wood", seed=4, camera=Camera.for_site(0, 4), defect_rate=0.5, num_parts=12, image_size=64
)


def test_it_can_be_run_again() -> None:
    first, second = list(STREAM), list(STREAM)
    assert [part.part_id for part in first] == [f"part-{index:06d}" for index in range(12)]
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image_bgr, other.image_bgr)
        assert np.array_equal(one.mask, other.mask)
        assert (one.part_id, one.label, one.severity) == (other.part_id, other.label, other.severity)
    assert np.array_equal(STREAM.part(7).image_bgr, first[7].image_bgr)


def test_labels_masks_and_severities_agree() -> None:
    parts = list(STREAM)
    labels = {part.label for part in parts}
    assert "good" in labels
    assert len(labels & set(DEFECTS)) >= 2
    for part in parts:
        assert part.image_bgr.shape == (64, 64, 3)
        assert part.image_bgr.dtype == part.mask.dtype == np.uint8
        assert part.mask.any() == (part.label != "good")
        assert 0 <= part.severity <= 1
        if part.label == "good":
            assert part.severity == 0


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 12)])
def test_the_defect_rate_holds_at_its_ends(rate: float, expected: int) -> None:
    stream = BoardStream(texture="warm_wood", defect_rate=rate, num_parts=12, image_size=64)
    assert sum(part.label != "good" for part in stream) == expected


def test_it_never_ends_unless_told_to() -> None:
    endless = BoardStream(texture="warm_wood", seed=4, image_size=64)
    assert len(list(islice(endless, 14))) == 14
    assert list(BoardStream(texture="warm_wood", num_parts=0)) == []


def test_other_seeds_give_other_boards() -> None:
    first = BoardStream(texture="warm_wood", seed=0, image_size=64).part(0)
    second = BoardStream(texture="warm_wood", seed=1, image_size=64).part(0)
    assert not np.array_equal(first.image_bgr, second.image_bgr)


def test_no_board_of_a_data_set_comes_along() -> None:
    spec = DatasetSpec(
        texture="warm_wood",
        num_train_parts=200,
        num_test_good_parts=200,
        num_test_defective_parts=200,
        num_photos=1,
        image_size=64,
        seed=4,
        camera=Camera(),
    )
    stream = BoardStream(texture="warm_wood", seed=spec.seed)
    in_dataset = {part.seed for part in plan_parts(spec)}
    assert len(in_dataset) == 600
    assert not in_dataset & {stream._part_seed(index) for index in range(600)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"texture": "marble"}, "no texture"),
        ({"defect_rate": 1.5}, "defect_rate lies between"),
        ({"num_parts": -1}, "num_parts is at least"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BoardStream(**{"texture": "warm_wood", **change})  # type: ignore[arg-type]
