"""One camera's loop: what may be changed about it while it runs, and what it survives."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from edge import camera_worker
from edge.camera_requests import MAX_CRASHES
from edge.camera_worker import PAUSED, CameraWorker
from edge.config.inspection import CaptureConfig
from edge.daemon import CameraThreads
from edge.frame import Captured
from edge.result import Inspected
from edge.status import Tally
from edge.systemd import Signals, SystemdNotifier, Watchdog
from edgeflame.errors import CrashLoopError, DataError, RuntimeUnavailableError, StorageError
from tests.support.scripted_camera import Belt, FakeInspector
from tests.support.waiting import wait_for


class Running:
    """A camera worker on its thread, its results, and its error."""

    def __init__(self, belt: Belt, inspector: FakeInspector, **keys: Any) -> None:
        self.belt, self.inspector = belt, inspector
        self.told: list[Any] = []
        self.halt = threading.Event()
        self.error: BaseException | None = None
        self.refuse: Exception | None = None
        self.worker = CameraWorker("a", lambda: belt, inspector, CaptureConfig(depth=16), **keys)
        self.thread = threading.Thread(target=self._run)

    def _accept(self, inspected: Inspected) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.told.append(inspected.result)

    def _run(self) -> None:
        try:
            self.worker.run(self._accept, self.halt)
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self.error = exc

    def wait(self, count: int) -> None:
        wait_for(lambda: len(self.told) >= count, f"{count} parts are judged")


Start = Callable[..., Running]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(camera_worker, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(camera_worker, "LONGEST_DELAY_S", 0.05)
    with contextlib.ExitStack() as stack:

        def begin(belt: Belt | None = None, inspector: FakeInspector | None = None, **keys: Any) -> Running:
            running = Running(belt or Belt(), inspector or FakeInspector(), **keys)
            running.thread.start()
            stack.callback(running.thread.join, 20)
            stack.callback(running.halt.set)
            return running

        yield begin


def test_while_it_rests_a_cameras_frames_are_dropped_by_name_and_counted(start: Start) -> None:
    running = start()
    running.belt.put()
    running.wait(1)
    running.worker.pause()
    running.belt.put(3)
    wait_for(lambda: running.worker.dropped[PAUSED] == 3, "three frames are dropped")
    assert running.worker.status().paused
    running.worker.resume()
    running.belt.put()
    running.wait(2)
    assert [told.sequence for told in running.told] == [0, 4]
    assert running.worker.status().dropped == {PAUSED: 3}


def test_while_it_rests_files_wait_and_none_is_lost(start: Start) -> None:
    running = start(Belt(is_live=False, is_endless=False))
    running.belt.put(2)
    running.wait(2)
    running.worker.pause()
    running.belt.put(5)
    running.belt.end()
    wait_for(lambda: running.belt.given >= 5, "frames wait")
    assert len(running.told) == 2
    running.worker.resume()
    running.thread.join(20)
    assert [told.part_id for told in running.told] == [f"p{number}" for number in range(1, 8)]
    assert running.worker.status().ended
    assert not running.worker.dropped


def test_a_stop_ends_a_rest(start: Start) -> None:
    running = start(Belt(is_live=False))
    running.worker.pause()
    running.belt.put()
    wait_for(lambda: running.belt.given, "a frame waits")
    running.halt.set()
    running.thread.join(20)
    assert not running.thread.is_alive()
    assert running.told == []


def test_another_threshold_and_another_judge_from_one_part_to_the_next(start: Start) -> None:
    running = start()
    running.belt.put()
    running.wait(1)
    running.worker.set_threshold(2.5)
    running.belt.put()
    running.wait(2)
    running.worker.set_threshold(None)
    other = FakeInspector("board")
    assert running.worker.replace_inspector(other) is running.inspector
    running.belt.put()
    running.wait(3)
    assert [(told.threshold, told.model) for told in running.told] == [
        (1.0, "tiletiletile"), (2.5, "tiletiletile"), (1.0, "boardboardboard"),
    ]  # fmt: skip
    assert running.worker.status().product == "board"


def test_a_change_waits_for_the_part_in_hand_and_loses_none_under_load(start: Start) -> None:
    running = start(Belt(is_live=False))
    running.belt.put(3000)
    inspectors = [FakeInspector(name) for name in ("x", "y")]
    for inspector in itertools.islice(itertools.cycle(inspectors), 20):
        running.worker.replace_inspector(inspector)
    running.wait(3000)
    assert [told.sequence for told in running.told] == list(range(3000))


def test_a_judge_that_hangs_is_said_to_and_not_waited_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_worker, "PATIENCE_S", 0.05)
    monkeypatch.setattr("edge.camera_requests.PATIENCE_S", 0.05)
    running = start()
    running.inspector.gate = threading.Event()
    running.belt.put()
    wait_for(lambda: running.worker.busy_s > 0, "a part is in hand")
    with pytest.raises(RuntimeUnavailableError, match="camera a: the part in hand"):
        running.worker.set_threshold(2.0)
    running.inspector.gate.set()
    running.wait(1)
    wait_for(lambda: running.worker.busy_s == 0, "it is done")


def test_a_snapshot_is_the_next_part(start: Start) -> None:
    running = start()
    assert running.worker.snapshot(0.01) is None
    running.belt.put()
    running.wait(1)
    taken: list[Inspected | None] = []
    thread = threading.Thread(target=lambda: taken.append(running.worker.snapshot(20)))
    thread.start()
    while thread.is_alive():
        running.belt.put()
        thread.join(0.02)
    assert taken[0] is not None
    assert taken[0].image is not None
    assert taken[0].result in running.told


def test_onlookers_see_what_the_sinks_saw_and_one_that_fails_is_sent_away(start: Start) -> None:
    class Onlooker:
        def __init__(self, failure: bool) -> None:
            self.seen: list[int] = []
            self.failure = failure

        def on_part(self, captured: Captured, inspected: Inspected) -> None:
            assert captured.sequence == inspected.result.sequence
            self.seen.append(captured.sequence)
            if self.failure:
                raise RuntimeError("no")

    good, bad, later = Onlooker(failure=False), Onlooker(failure=True), Onlooker(failure=False)
    running = start(listeners=[bad, good])
    running.belt.put()
    wait_for(lambda: len(good.seen) == 1, "the first is seen")
    running.worker.add_listener(later)
    running.belt.put()
    wait_for(lambda: len(later.seen) == 1, "the second is seen")
    assert (good.seen, bad.seen, later.seen) == ([0, 1], [0], [1])
    running.worker.remove_listener(good)
    running.belt.put()
    wait_for(lambda: len(later.seen) == 2, "the third is seen")
    assert good.seen == [0, 1]


class TestFailures:
    """Failures of a camera, of an inspector and of sinks are handled differently."""

    def test_a_lost_camera_gives_one_unknown_an_outage_and_is_found_again(self, start: Start) -> None:
        running = start()
        running.belt.put(2)
        running.wait(2)
        running.belt.fail(DataError("unplugged"))
        running.wait(3)
        wait_for(lambda: running.worker.status().problem == "unplugged", "the problem shows")
        running.belt.fail(DataError("still unplugged"))
        wait_for(running.belt.coming.empty, "it was tried again")
        running.belt.put()
        running.wait(4)
        assert [(told.sequence, told.verdict) for told in running.told] == [
            (0, "pass"), (1, "pass"), (2, "unknown"), (3, "pass"),
        ]  # fmt: skip
        assert running.told[2].detail == "parts may pass unseen: unplugged"
        assert running.worker.status().problem is None
        assert running.error is None

    def test_a_camera_that_cannot_be_opened_at_the_start_is_waited_for(self, start: Start) -> None:
        running = start()
        for _ in range(3):
            running.belt.fail(DataError("no such camera"))
        running.wait(1)
        running.belt.put()
        running.wait(2)
        assert [told.verdict for told in running.told] == ["unknown", "pass"]

    def test_a_file_that_ends_in_an_error_ends_the_line(self, start: Start) -> None:
        running = start(Belt(is_live=False, is_endless=False))
        running.belt.put()
        running.wait(1)
        running.belt.fail(DataError("cut short"))
        running.thread.join(20)
        assert str(running.error) == "cut short"
        assert running.worker.status().problem == "cut short"

    def test_a_judge_that_fails_unexpectedly_costs_a_verdict_and_too_often_the_daemon(self, start: Start) -> None:
        running = start(inspector=FakeInspector(failures=MAX_CRASHES))
        for count in range(1, MAX_CRASHES + 2):
            running.belt.put()
            running.wait(count)
        assert [told.verdict for told in running.told] == ["unknown"] * MAX_CRASHES + ["pass"]
        assert running.told[0].reasons == ("runtime_failed",)
        assert "a defect of ours" in str(running.told[0].detail)
        running.inspector.failures = 1
        running.belt.put()
        running.thread.join(20)
        assert isinstance(running.error, CrashLoopError)

    def test_errors_long_ago_are_forgotten(self, start: Start) -> None:
        now = itertools.count(0, 10_000)
        running = start(inspector=FakeInspector(failures=3 * MAX_CRASHES), clock=lambda: float(next(now)))
        for count in range(1, 3 * MAX_CRASHES + 1):
            running.belt.put()
            running.wait(count)
        assert running.error is None

    @pytest.mark.parametrize("failure", [StorageError("disk full"), BrokenPipeError()])
    def test_a_verdict_that_cannot_be_handed_on_ends_the_line(self, start: Start, failure: Exception) -> None:
        running = start()
        running.refuse = failure
        running.belt.put()
        running.thread.join(20)
        assert running.error is failure

    def test_a_capture_that_fails_unexpectedly_is_begun_again(self, start: Start) -> None:
        running = start()
        running.belt.put()
        running.wait(1)
        running.belt.fail(ZeroDivisionError())
        running.wait(2)
        running.belt.put()
        running.wait(3)
        assert [told.verdict for told in running.told] == ["pass", "unknown", "pass"]

    def test_a_camera_that_ends_is_lost_and_not_done(self, start: Start) -> None:
        running = start()
        running.belt.put()
        running.wait(1)
        running.belt.end()
        running.wait(2)
        assert running.told[1].detail == "parts may pass unseen: the source ended, which it never should"
        running.belt.put()
        running.wait(3)
        assert not running.worker.status().ended


def test_of_two_cameras_failures_the_graver_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """One camera's folder ends in an error first; then the other's results cannot be kept."""
    gone, full = Belt(is_live=False, is_endless=False), Belt(is_live=False)
    workers = [
        CameraWorker(name, lambda belt=belt: belt, FakeInspector(), CaptureConfig())
        for name, belt in (("gone", gone), ("full", full))
    ]

    class Full:
        def accept(self, inspected: Inspected) -> None:
            raise StorageError("the disk is full")

        def close(self) -> None:
            pass

    told: list[str] = []

    def ended(event: str, **fields: Any) -> None:
        told.append(f"{event} {fields['reason']}")
        if event == "camera_ended":
            full.put()

    monkeypatch.setattr("edge.daemon.log", SimpleNamespace(error=ended))
    threads = CameraThreads(workers, Full(), Tally(), None)
    gone.fail(DataError("the folder is gone"))
    watchdog = Watchdog(SystemdNotifier(), busy_s={}, status=lambda: "")
    with pytest.raises(StorageError, match="the disk is full"):
        threads.run(Signals(), watchdog, reload=lambda: None, on_stop=lambda: None)
    assert told == ["camera_ended the folder is gone", "camera_failed the folder is gone"]
