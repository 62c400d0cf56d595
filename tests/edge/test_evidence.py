"""Pictures of rejected parts: what they show, and how many are kept."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from results import result
from small_model import GRID, good_image

from edge.overlay import MIN_SIDE, overlay
from edge.rejects import RejectsConfig, RejectsSink
from edge.results import Inspected
from edgeflame.errors import StorageError
from edgeflame.images import read_image

IMAGE = good_image(0, 128)


def inspected(sequence: int, verdict: str = "fail", part_id: str = "part") -> Inspected:
    return Inspected(
        result=result(sequence, verdict, part_id), image=IMAGE, anomaly_map=np.ones((GRID, GRID), np.float32)
    )


def hot_spot(height: float) -> np.ndarray:
    anomaly_map = np.full((GRID, GRID), 0.2, np.float32)
    anomaly_map[5:7, 1:3] = height
    return anomaly_map


def change(picture: np.ndarray) -> np.ndarray:
    """Grey levels changed, on the 8x8 grid."""
    plain = cv2.resize(IMAGE, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    difference = np.abs(picture.astype(int) - plain).mean(axis=2).astype(np.float32)
    return cv2.resize(difference, (GRID, GRID), interpolation=cv2.INTER_AREA)


class TestOverlay:
    """The picture."""

    def test_heat_lies_where_the_map_is_high_and_nowhere_else(self) -> None:
        changed = change(overlay(IMAGE, hot_spot(2.0), 1.0))
        assert changed[5:7, 1:3].min() > 20
        assert changed[3:, 5:].max() < 1  # away from the spot and the label
        assert changed[2, 4:].max() < 1

    def test_a_quiet_map_leaves_the_image(self) -> None:
        assert change(overlay(IMAGE, hot_spot(0.3), 1.0))[2:].max() < 1

    def test_small_images_are_enlarged_and_large_ones_kept(self) -> None:
        assert overlay(IMAGE, hot_spot(2.0), 1.0).shape == (MIN_SIDE, MIN_SIDE, 3)
        assert overlay(good_image(0, 500), hot_spot(2.0), 1.0).shape == (500, 500, 3)

    def test_the_mask_is_outlined(self) -> None:
        mask = np.zeros((128, 128), np.uint8)
        mask[90:110, 90:110] = 255
        assert change(overlay(IMAGE, hot_spot(0.3), 1.0, mask))[5:7, 5:7].max() > 5

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_broken_map_is_not_drawn(self, value: float) -> None:
        assert change(overlay(IMAGE, hot_spot(value), 1.0))[2:].max() < 1

    def test_the_image_itself_is_not_touched(self) -> None:
        large = good_image(0, 500)
        before = large.copy()
        overlay(large, hot_spot(2.0), 1.0)
        np.testing.assert_array_equal(large, before)


class TestRejects:
    """The folder."""

    def test_failed_and_unknown_parts_are_kept_and_passed_ones_not(self, tmp_path: Path) -> None:
        sink = RejectsSink(tmp_path / "a" / "b", RejectsConfig())
        for sequence, verdict in enumerate(("fail", "pass", "unknown")):
            sink.accept(inspected(sequence, verdict))
        assert [path.name.rsplit("-", 1)[1] for path in sorted((tmp_path / "a" / "b").iterdir())] == [
            "fail.png",
            "unknown.png",
        ]

    def test_the_oldest_go_first_also_after_a_restart_and_nothing_else_is_deleted(self, tmp_path: Path) -> None:
        (tmp_path / "0.png").write_bytes(b"not ours")
        for first in (0, 4):
            sink = RejectsSink(tmp_path, RejectsConfig(keep=3))
            for sequence in range(first, first + 4):
                sink.accept(inspected(sequence))
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept[0] == "0.png"
        assert [int(name.split("-")[1]) for name in kept[1:]] == [5, 6, 7]

    def test_a_part_id_cannot_lead_out_of_the_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "rejects"
        RejectsSink(folder, RejectsConfig()).accept(inspected(0, part_id="../../etc/pass wd"))
        assert len(list(folder.iterdir())) == 1
        assert list(tmp_path.iterdir()) == [folder]

    def test_a_part_without_an_image_leaves_no_picture(self, tmp_path: Path) -> None:
        sink = RejectsSink(tmp_path, RejectsConfig())
        sink.accept(Inspected(result=result(0, "unknown"), image=None, anomaly_map=None))
        assert not list(tmp_path.iterdir())

    def test_large_pictures_are_shrunk(self, tmp_path: Path) -> None:
        large = np.zeros((300, 3000, 3), np.uint8)
        RejectsSink(tmp_path, RejectsConfig()).accept(Inspected(result=result(0), image=large, anomaly_map=None))
        (picture,) = tmp_path.iterdir()
        assert read_image(picture).shape == (102, 1024, 3)

    def test_a_lost_picture_is_counted_and_the_line_goes_on(self, tmp_path: Path) -> None:
        folder = tmp_path / "rejects"
        sink = RejectsSink(folder, RejectsConfig())
        folder.rmdir()
        sink.accept(inspected(0))
        assert sink.num_lost == 1

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match="rejected images"):
            RejectsSink(tmp_path / "file", RejectsConfig())
