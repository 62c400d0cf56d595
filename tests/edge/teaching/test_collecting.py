"""Collecting photographs of a new product while the line inspects: what is taken, what is left out, and restarts."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge.teaching.record import REFUSED_KEPT, TeachingStore
from edgeflame.errors import DataError, UsageError
from edgeflame.images import read_image
from tests.support.taught_line import HEIGHT, WIDTH, FedCamera, part, taught_line
from tests.support.waiting import wait_for


class TestCollecting:
    """Pictures are taken while parts pass."""

    def test_each_next_part_is_taken_and_still_gets_its_verdict(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            stood = line.collect(5)
            assert (stood.num_parts, stood.frame, stood.stage) == (5, (WIDTH, HEIGHT), "stopped")
            assert [one.parts for one in stood.promises] == [30, 60, 120]
            assert [round(one.promised, 3) for one in stood.promises] == [0.095, 0.049, 0.025]
            # Whole frames, without loss.
            kept = read_image(tmp_path / "teaching" / "cap" / "photographs" / stood.photographs[2].name)
            assert (kept == part(102)).all()
            line.feed(part(7))  # nothing is taken after the stop
            assert len(line.order("status").photographs) == 5
            assert [one.verdict for one in line.results].count("unknown") == 0
            assert len(line.results) == 6

    def test_it_goes_on_over_a_restart(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.order("collect")
            line.feed(part(1))
            wait_for(lambda: line.order("status").num_parts == 1, "the first")
        with taught_line(tmp_path, package_file) as line:
            assert line.order("status").stage == "collecting"
            line.feed(part(2))
            wait_for(lambda: line.order("status").num_parts == 2, "the second")
            assert [one.name for one in line.order("stop").photographs] == ["00001.png", "00002.png"]

    def test_what_the_health_checks_refuse_is_shown_and_left_out(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.order("collect")
            for index in range(REFUSED_KEPT + 3):
                line.feed(np.full((HEIGHT, WIDTH, 3), index % 2, np.uint8))
                wait_for(lambda count=index + 1: line.order("status").num_refused == count, "it was left out")
            line.feed(part(1))
            wait_for(lambda: line.order("status").num_parts == 1, "a good one")
            stood = line.order("stop")
            assert len(stood.refused) == REFUSED_KEPT
            assert stood.refused[0].reasons == ("too_dark", "blank")
            assert len(list((tmp_path / "teaching" / "cap" / "refused").iterdir())) == REFUSED_KEPT
            assert line.teacher.picture("cap", "refused", stood.refused[0].name, side=64) is not None

    def test_a_part_that_lies_still_is_taken_once_unless_by_hand(self, tmp_path: Path, package_file: Path) -> None:
        """Ten pictures of one part are one part: the line's own cameras give them by themselves."""
        rng = np.random.default_rng(0)
        still = [np.clip(part(1) + rng.normal(0, 2, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8) for _ in range(12)]
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.order("collect")
            for image in still[:6]:
                line.feed(image)
            line.feed(part(2))
            wait_for(lambda: line.order("status").num_parts == 2, "another part")
            line.order("stop")
            # By hand it is taken, and grouped where a person says so.
            for index, image in enumerate(still[6:]):
                line.take(image, same_part=index > 0)
            stood = line.order("status")
            assert (len(stood.photographs), stood.num_parts) == (8, 3)

    def test_two_frozen_pictures_are_one(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.order("collect")
            for image in (part(1), part(1), part(2)):
                line.feed(image)
            wait_for(lambda: line.order("status").num_parts == 2, "both")
            assert line.order("stop").refused[0].reasons == ("frozen",)

    def test_photographs_are_grouped_and_thrown_out_and_taken_back(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.collect(4)
            names = tuple(one.name for one in line.order("status").photographs)
            assert line.order("join", photographs=names[:2]).num_parts == 3
            assert line.order("throw-out", photographs=names[3:]).num_parts == 2
            assert line.order("take-back", photographs=names[3:]).num_parts == 3
            assert line.order("part", photographs=names).num_parts == 4
            for wrong in ((), ("gone.png",)):
                with pytest.raises(UsageError, match="photograph"):
                    line.order("join", photographs=wrong)


class TestBadInput:
    """Each with what it does."""

    def test_a_region_outside_the_picture_is_refused(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            with pytest.raises(DataError, match="no picture yet"):
                line.order("region", region=(0, 0, 64, 64))
            line.feed(part(1))
            for region in ((100, 0, 64, 64), (0, 60, 40, 40), (-1, 0, 40, 40), (0, 0, 0, 40)):
                with pytest.raises(UsageError, match=r"reaches beyond the camera's picture of 128x96"):
                    line.order("region", region=region)
            with pytest.raises(UsageError, match="too small"):
                line.order("region", region=(0, 0, 31, 64))
            assert line.order("region", region=(16, 8, 64, 64)).region == (16, 8, 64, 64)
            assert line.order("region").region is None

    def test_a_camera_whose_size_changed_since_collecting(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.collect(3)
        with taught_line(tmp_path, package_file, camera=FedCamera(name="camera:larger")) as line:
            line.feed(np.tile(part(4), (2, 2, 1)))
            with pytest.raises(DataError, match=r"gives 256x192 pixels now, and the photographs have 128x96"):
                line.order("collect")
            assert "256x192" in line.order("status").notes[0]
            # One that changes while parts are collected is left out, and said.
            line.feed(part(4))

    def test_a_size_that_changes_while_collecting_is_left_out(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.order("collect")
            line.feed(part(1))
            wait_for(lambda: line.order("status").num_parts == 1, "the first")
            line.feed(part(2)[::2, ::2].copy())
            wait_for(lambda: line.order("status").num_refused == 1, "the other size")
            assert line.order("stop").refused[0].reasons == ("wrong_size",)

    def test_two_people_see_one_product_and_each_others_changes(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            with pytest.raises(UsageError, match="cap is being taught already"):
                line.order("new", "Cap")
            line.order("new", "lid")
            line.order("collect")
            with pytest.raises(UsageError, match="camera camera collects for cap; stop that first"):
                line.order("collect", "lid")
            # Both press at once: everything is there once.
            line.feed(part(1))
            wait_for(lambda: line.order("status").num_parts == 1, "the first")
            name = line.order("stop").photographs[0].name
            people = [threading.Thread(target=lambda: line.order("throw-out", photographs=(name,))) for _ in range(8)]
            for one in people:
                one.start()
            for one in people:
                one.join()
            assert [one.thrown_out for one in line.order("status").photographs] == [True]

    def test_a_full_disk_ends_collecting_and_not_the_line(
        self, tmp_path: Path, package_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.collect(2)
            monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
            line.order("collect")
            line.feed(part(50))
            wait_for(lambda: line.order("status").problem is not None, "the problem")
            stood = line.order("status")
            assert (stood.collecting, stood.num_parts) == (False, 2)
            assert "bytes" in (stood.problem or "") or "MB of disk are free" in (stood.problem or "")
            assert line.feed(part(51)).verdict != "unknown"

    def test_names_and_cameras_that_make_no_sense(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            for name in ("../x", "a b", ".", "-x", "x" * 65):
                with pytest.raises(UsageError, match="product name"):
                    line.order("new", name)
            with pytest.raises(UsageError, match="product of the configuration"):
                line.order("new", "tile")
            with pytest.raises(UsageError, match="say which camera"):
                line.order("new", camera="nowhere")
            for action in ("collect", "learn", "live", "back", "discard", "status", "threshold"):
                with pytest.raises(UsageError, match="is taught at this line"):
                    line.order(action, "never")
            line.order("new")
            for action, why in (
                ("learn", "at least 10"),
                ("live", "nothing has been learnt"),
                ("back", "nothing to go"),
            ):
                with pytest.raises((UsageError, DataError), match=why):
                    line.order(action)
            assert line.order("discard").stage == "stopped"
            assert not list((tmp_path / "teaching").iterdir())

    def test_too_few_parts_and_one_part_again_and_again_are_not_learnt_from(
        self, tmp_path: Path, package_file: Path
    ) -> None:
        rng = np.random.default_rng(0)
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            for _ in range(10):
                image = np.clip(part(1) + rng.normal(0, 2, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
                line.take(image)
            with pytest.raises(DataError, match="seem to show one part again and again"):
                line.order("learn")
            names = tuple(one.name for one in line.order("status").photographs)
            line.order("join", photographs=names)
            with pytest.raises(DataError, match=r"1 different good parts are collected \(10 photographs\)"):
                line.order("learn")

    def test_a_damaged_record_is_reported_and_left_alone(self, tmp_path: Path, package_file: Path) -> None:
        with taught_line(tmp_path, package_file) as line:
            line.order("new")
            line.order("new", "lid")
        record = tmp_path / "teaching" / "cap" / "record.json"
        record.write_bytes(record.read_bytes()[:-20])
        with taught_line(tmp_path, package_file) as line:
            status = line.teacher.status()
            assert [one.product for one in status.products] == ["lid"]
            assert "damaged" in status.damaged["cap"]
            with pytest.raises(UsageError, match="damaged"):
                line.order("new")
        assert record.exists()

    def test_a_later_format_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cap").mkdir()
        (tmp_path / "cap" / "record.json").write_text(
            '{"format": 2, "product": "cap", "camera": "c", "created": "2026-01-01T00:00:00Z"}'
        )
        assert "of format 2" in TeachingStore(tmp_path).damaged["cap"]


def test_a_camera_without_a_product_shows_pictures_and_passes_nothing(tmp_path: Path) -> None:
    with taught_line(tmp_path, None) as line:
        result = line.feed(part(1))
        assert (result.verdict, result.reasons, result.model) == ("unknown", ("model_not_ready",), "")
        assert line.inspected[0].image is not None
        line.order("new")
        line.collect(10)
        with pytest.raises(DataError, match="there is no base network here"):
            line.order("learn")
        with pytest.raises(UsageError, match="nothing has been"):
            line.order("try")
