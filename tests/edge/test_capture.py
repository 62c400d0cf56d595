"""Capture ahead of scoring: order, drop policies, failures, and a clean end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edge.capture import SUPERSEDED, Capture
from edge.config.inspection import CaptureConfig
from edge.frame import Frame, make_frame
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, DataError
from tests.support.small_package import good_image

IMAGE = good_image(0)


class FakeSource:
    """So many frames; tells when it is through, and may wait for leave before each."""

    name = "fake"
    is_endless = False
    num_frames = None

    def __init__(self, count: int, *, is_live: bool = False, failure: Exception | None = None) -> None:
        self.count, self.is_live, self.failure = count, is_live, failure
        self.through = threading.Event()
        self.given = 0

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for index in range(self.count):
            if stop.is_set():
                break
            self.given += 1
            yield make_frame(part_id=str(index), source=self.name, image_bgr=IMAGE)
        self.through.set()
        if self.failure is not None:
            raise self.failure


def capture(source: FakeSource, **config: object) -> Capture:
    return Capture(source, CaptureConfig(**config), threading.Event())  # type: ignore[arg-type]


def test_files_wait_and_none_is_dropped() -> None:
    source = FakeSource(50)
    with capture(source, depth=2) as frames:
        taken = []
        for captured in frames:
            taken.append(captured.sequence)
            assert source.given <= len(taken) + 3  # two queued, one in hand
    assert taken == list(range(50))
    assert not frames.dropped


def test_live_frames_give_way_to_newer_ones_and_are_counted() -> None:
    source = FakeSource(10, is_live=True)
    with capture(source, depth=2) as frames:
        assert source.through.wait(10)
        taken = [captured.sequence for captured in frames]
    assert taken == [8, 9]
    assert frames.dropped == {SUPERSEDED: 8}


def test_what_the_source_itself_lost_is_counted_and_leaves_a_gap() -> None:
    class Lossy(FakeSource):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for part_id, missed in (("0", {}), ("3", {"overwritten": 2}), ("5", {"overwritten": 1})):
                yield make_frame(part_id=part_id, source=self.name, image_bgr=IMAGE, missed=missed)

    with capture(Lossy(3)) as frames:
        taken = [(captured.sequence, captured.frame.part_id) for captured in frames]
    assert taken == [(0, "0"), (3, "3"), (5, "5")]
    assert frames.dropped == {"overwritten": 3}


def test_a_frame_without_a_name_is_named_by_its_place() -> None:
    class Camera(FakeSource):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for part_id, missed in (("", {}), ("A-7", {}), ("", {"overwritten": 2})):
                yield make_frame(part_id=part_id, source=self.name, image_bgr=IMAGE, missed=missed)

    with Capture(Camera(3), CaptureConfig(), threading.Event(), first=40) as frames:
        taken = [(captured.sequence, captured.frame.part_id) for captured in frames]
    assert taken == [(40, "frame-000040"), (41, "A-7"), (44, "frame-000044")]


def test_a_policy_by_name_wins_over_the_kind_of_source() -> None:
    with capture(FakeSource(10, is_live=True), policy="wait") as frames:
        assert len(list(frames)) == 10
    source = FakeSource(10)
    with capture(source, policy="latest", depth=1) as frames:
        assert source.through.wait(10)
        assert [captured.sequence for captured in frames] == [9]


def test_what_the_source_raises_comes_after_its_frames() -> None:
    with capture(FakeSource(3, failure=DataError("unplugged"))) as frames:
        iterator = iter(frames)
        assert [next(iterator).sequence for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="unplugged"):
            next(iterator)


def test_the_stop_event_ends_the_iteration_and_leaving_ends_the_thread() -> None:
    stop = threading.Event()
    with Capture(FakeSource(10**9), CaptureConfig(), stop) as frames:
        for captured in frames:
            if captured.sequence == 5:
                stop.set()
    assert captured.sequence == 5
    assert not [thread for thread in threading.enumerate() if thread.name == "edgeflame-capture"]


def test_leaving_early_ends_the_thread() -> None:
    with capture(FakeSource(10**9)) as frames:
        next(iter(frames))
    assert not [thread for thread in threading.enumerate() if thread.name == "edgeflame-capture"]


def test_a_file_waits_for_us_but_a_camera_does_not() -> None:
    waiting, live = FakeSource(1), FakeSource(1, is_live=True)
    for source, restamped in ((waiting, True), (live, False)):
        with capture(source) as frames:
            assert source.through.wait(10)
            before = make_frame(part_id="", source="").captured_monotonic_s
            (captured,) = frames
        assert (captured.frame.captured_monotonic_s >= before) is restamped


def test_an_impossible_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth"):
        parse_config(b"", CaptureConfig, "capture", {"depth": 0})
