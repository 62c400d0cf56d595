"""Pictures of rejected parts: what they show, and how many are kept."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.config.outputs import ImagesConfig
from edge.delivery.sinks import RejectsSink
from edge.overlay import MIN_SIDE, draw_overlay
from edge.result import Inspected
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, StorageError
from edgeflame.images import read_image, write_image
from tests.support.inspection_results import result
from tests.support.small_package import GRID, good_image

IMAGE = good_image(0, 128)
TAKEN = result(0).captured
"""Of the made-up results, which are a microsecond apart."""


def inspected(sequence: int, verdict: str = "fail", part_id: str = "part") -> Inspected:
    return Inspected(
        result=result(sequence, verdict, part_id), image=IMAGE, anomaly_map=np.ones((GRID, GRID), np.float32)
    )


def kept(folder: Path) -> list[str]:
    """Names in the order of writing; those of an earlier version are not among them."""
    return sorted(path.name for path in folder.glob("0*-2*-*.png"))


def microseconds(folder: Path) -> list[int]:
    return [int(name.split("Z-")[0][-6:]) for name in kept(folder)]


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
        changed = change(draw_overlay(IMAGE, hot_spot(2.0), 1.0))
        assert changed[5:7, 1:3].min() > 20
        assert changed[3:, 5:].max() < 1  # away from the spot and the label
        assert changed[2, 4:].max() < 1

    def test_a_quiet_map_leaves_the_image(self) -> None:
        assert change(draw_overlay(IMAGE, hot_spot(0.3), 1.0))[2:].max() < 1

    def test_small_images_are_enlarged_and_large_ones_kept(self) -> None:
        assert draw_overlay(IMAGE, hot_spot(2.0), 1.0).shape == (MIN_SIDE, MIN_SIDE, 3)
        assert draw_overlay(good_image(0, 500), hot_spot(2.0), 1.0).shape == (500, 500, 3)

    def test_the_mask_is_outlined(self) -> None:
        mask = np.zeros((128, 128), np.uint8)
        mask[90:110, 90:110] = 255
        assert change(draw_overlay(IMAGE, hot_spot(0.3), 1.0, mask))[5:7, 5:7].max() > 5

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_broken_map_is_not_drawn(self, value: float) -> None:
        assert change(draw_overlay(IMAGE, hot_spot(value), 1.0))[2:].max() < 1

    def test_the_image_itself_is_not_touched(self) -> None:
        large = good_image(0, 500)
        before = large.copy()
        draw_overlay(large, hot_spot(2.0), 1.0)
        np.testing.assert_array_equal(large, before)


class TestRejects:
    """The folder."""

    def test_failed_and_unknown_parts_are_kept_and_passed_ones_not(self, tmp_path: Path) -> None:
        sink = RejectsSink(tmp_path / "a" / "b", ImagesConfig())
        for sequence, verdict in enumerate(("fail", "pass", "unknown")):
            sink.accept(inspected(sequence, verdict))
        assert [path.name.rsplit("-", 1)[1] for path in sorted((tmp_path / "a" / "b").iterdir())] == [
            "fail.png",
            "unknown.png",
        ]

    def test_the_oldest_go_first_also_after_a_restart_and_nothing_else_is_deleted(self, tmp_path: Path) -> None:
        strangers = {"0.png", "20260102T030405000000Z-notes.txt", "99999999T999999999999Z-0-x-fail.png"}
        for name in strangers:
            (tmp_path / name).write_bytes(b"not ours")
        for first in (0, 4):
            sink = RejectsSink(tmp_path, ImagesConfig(max_count=3))
            for sequence in range(first, first + 4):
                sink.accept(inspected(sequence))
        assert {path.name for path in tmp_path.iterdir()} - set(kept(tmp_path)) == strangers
        assert microseconds(tmp_path) == [5, 6, 7]

    def test_pictures_of_an_earlier_version_are_the_oldest(self, tmp_path: Path) -> None:
        old = tmp_path / "20991231T235959000000Z-00000009-part-fail.png"
        write_image(old, IMAGE)
        sink = RejectsSink(tmp_path, ImagesConfig(max_count=2))
        sink.accept(inspected(1))
        assert old.exists()
        sink.accept(inspected(2))
        assert not old.exists()
        assert microseconds(tmp_path) == [1, 2]

    def test_a_clock_set_back_does_not_make_the_newest_the_oldest(self, tmp_path: Path) -> None:
        for first in (500, 100, 50):  # the clock of each run is behind
            sink = RejectsSink(tmp_path, ImagesConfig(max_count=3, max_age_days=30), now=lambda: TAKEN)
            for step in range(2):
                sink.accept(inspected(first + step))
        assert microseconds(tmp_path) == [101, 50, 51]
        # Pictures of the future have no age, and stay.
        RejectsSink(tmp_path, ImagesConfig(max_age_days=1), now=lambda: TAKEN - dt.timedelta(days=400))
        assert len(kept(tmp_path)) == 3

    def test_the_size_of_all_is_bounded_and_one_always_stays(self, tmp_path: Path) -> None:
        sink = RejectsSink(tmp_path, ImagesConfig())
        for sequence in range(6):
            sink.accept(inspected(sequence))
        sizes = [(tmp_path / name).stat().st_size for name in kept(tmp_path)]
        room = sum(sizes[-3:]) / (1 << 20)
        # After a restart with less room, and while it runs.
        smaller = RejectsSink(tmp_path, ImagesConfig(max_mib=room))
        assert microseconds(tmp_path) == [3, 4, 5]
        smaller.accept(inspected(6))
        assert microseconds(tmp_path)[-1] == 6
        assert sum((tmp_path / name).stat().st_size for name in kept(tmp_path)) <= room * (1 << 20)
        RejectsSink(tmp_path, ImagesConfig(max_mib=0.0001))
        assert microseconds(tmp_path) == [6]

    def test_the_old_go_even_if_only_good_parts_come(self, tmp_path: Path) -> None:
        now = TAKEN
        sink = RejectsSink(tmp_path, ImagesConfig(max_age_days=2), now=lambda: now)
        sink.accept(inspected(0))
        now += dt.timedelta(days=1, hours=23)
        sink.accept(inspected(1, "pass"))
        assert len(kept(tmp_path)) == 1
        now += dt.timedelta(hours=2)
        sink.accept(inspected(2, "pass"))
        assert kept(tmp_path) == []

    def test_what_a_kill_left_half_written_is_swept_away(self, tmp_path: Path) -> None:
        RejectsSink(tmp_path, ImagesConfig()).accept(inspected(0))
        (name,) = kept(tmp_path)
        for partial in (f"{name}.partial", f".{name}.4711.partial"):
            (tmp_path / partial).write_bytes(b"half")
        (tmp_path / "mine.png.partial").write_bytes(b"not ours")
        RejectsSink(tmp_path, ImagesConfig())
        assert {path.name for path in tmp_path.iterdir()} == {name, "mine.png.partial"}

    def test_room_is_made_by_the_oldest_and_said_to_be_lost(self, tmp_path: Path) -> None:
        sink = RejectsSink(tmp_path, ImagesConfig())
        for sequence in range(5):
            sink.accept(inspected(sequence))
        (tmp_path / kept(tmp_path)[1]).unlink()  # a person tidied up
        assert sink.discard_oldest(3)
        assert microseconds(tmp_path) == [3, 4]
        assert sink.num_lost == 2
        assert sink.discard_oldest(3)
        assert not sink.discard_oldest(3)

    @pytest.mark.parametrize("keys", [{"max_count": 0}, {"max_mib": 0}, {"max_age_days": 0}, {"max_age_days": -1.0}])
    def test_bounds_that_make_no_sense_are_refused(self, keys: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match=next(iter(keys))):
            parse_config(b"", ImagesConfig, "images", keys)

    def test_a_part_id_cannot_lead_out_of_the_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "rejects"
        RejectsSink(folder, ImagesConfig()).accept(inspected(0, part_id="../../etc/pass wd"))
        assert len(list(folder.iterdir())) == 1
        assert list(tmp_path.iterdir()) == [folder]

    def test_a_part_without_an_image_leaves_no_picture(self, tmp_path: Path) -> None:
        sink = RejectsSink(tmp_path, ImagesConfig())
        sink.accept(Inspected(result=result(0, "unknown"), image=None, anomaly_map=None))
        assert not list(tmp_path.iterdir())

    def test_large_pictures_are_shrunk(self, tmp_path: Path) -> None:
        large = np.zeros((300, 3000, 3), np.uint8)
        RejectsSink(tmp_path, ImagesConfig()).accept(Inspected(result=result(0), image=large, anomaly_map=None))
        (picture,) = tmp_path.iterdir()
        assert read_image(picture).shape == (102, 1024, 3)

    def test_a_lost_picture_is_counted_and_the_line_goes_on(self, tmp_path: Path) -> None:
        folder = tmp_path / "rejects"
        sink = RejectsSink(folder, ImagesConfig())
        folder.rmdir()
        sink.accept(inspected(0))
        assert sink.num_lost == 1

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match="rejected images"):
            RejectsSink(tmp_path / "file", ImagesConfig())
