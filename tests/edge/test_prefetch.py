"""Parts looked at side by side: in their order all the same, each once, and as if they had been looked at alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edge.capture import SUPERSEDED, Capture, PrefetchPool
from edge.config import InspectConfig
from edge.config.inspection import CaptureConfig
from edge.frame import Captured, Frame, make_frame
from edge.inspector import FrameObserver, Inspector
from edge.runtimes.load import open_runtime
from edge.verdict import Observation
from edgeflame.errors import DataError
from edgeflame.package import Package
from tests.support.inspection_results import judge
from tests.support.small_package import bad_image, good_image

IMAGE = good_image(0)


class Belt:
    """Frames as fast as they are taken; tells when it is through."""

    name, is_endless, num_frames = "belt", False, None

    def __init__(self, count: int, *, is_live: bool = False, failure: Exception | None = None) -> None:
        self.count, self.is_live, self.failure = count, is_live, failure
        self.through = threading.Event()

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for number in range(self.count):
            if stop.is_set():
                return
            yield make_frame(part_id=str(number), source=self.name, image_bgr=IMAGE)
        self.through.set()
        if self.failure is not None:
            raise self.failure


class Eyes:
    """Looks at frames; those of a gate not before it is open, and some never well."""

    num_parallel = 2

    def __init__(self, *, failing: int | None = None) -> None:
        self.gates: dict[int, threading.Event] = {}
        self.begun: dict[int, threading.Event] = {number: threading.Event() for number in range(50)}
        self.failing = failing
        self.beside_others: dict[int, bool] = {}

    def observe(self, captured: Captured, *, beside_others: bool = False) -> int:
        self.beside_others[captured.sequence] = beside_others
        self.begun[captured.sequence].set()
        if captured.sequence in self.gates:
            assert self.gates[captured.sequence].wait(20)
        if captured.sequence == self.failing:
            raise RuntimeError("a defect of ours")
        return 10 * captured.sequence


def prefetching(
    belt: Belt,
    observer: Callable[[], FrameObserver | None],
    *,
    count: int = 2,
    depth: int = 2,
    stop: threading.Event | None = None,
) -> PrefetchPool:
    stop = stop or threading.Event()
    return PrefetchPool(Capture(belt, CaptureConfig(depth=depth), stop), observer, stop, count=count)


def test_frames_come_in_order_with_what_was_found_however_long_each_took() -> None:
    eyes = Eyes()
    eyes.gates[0] = threading.Event()
    with prefetching(Belt(20), lambda: eyes) as frames:
        coming = iter(frames)
        first = next(coming)
        # The second is looked at while the first still is.
        assert eyes.begun[1].wait(20)
        eyes.gates[0].set()
        all_of_them = [first, *coming]
    assert [captured.sequence for captured in all_of_them] == list(range(20))
    assert [captured.prefetched.found.result() for captured in all_of_them if captured.prefetched] == list(
        range(0, 200, 10)
    )
    assert {captured.prefetched.observer for captured in all_of_them if captured.prefetched} == {eyes}


def test_all_cores_work_on_one_frame_until_frames_come_faster_than_they_are_taken() -> None:
    eyes = Eyes()
    eyes.gates = {number: threading.Event() for number in range(3)}
    go_on = threading.Event()

    class Slow(Belt):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for number, frame in enumerate(super().frames(stop)):
                # Thread and queue are asked for one after the other; with frames 1 and 2 the queue is full.
                assert number != 1 or eyes.begun[0].wait(20)
                assert number != 2 or go_on.wait(20)
                yield frame

    with prefetching(Slow(6), lambda: eyes) as frames:
        coming = iter(frames)
        assert next(coming).sequence == 0
        # One frame waits, and a thread is free: it does not take it.
        assert not eyes.begun[1].wait(0.5)
        go_on.set()
        assert eyes.begun[1].wait(20)
        for gate in eyes.gates.values():
            gate.set()
        assert [captured.sequence for captured in coming] == [1, 2, 3, 4, 5]
    assert not eyes.beside_others[0]
    assert eyes.beside_others[1]


def test_the_first_thread_works_alone_again_once_the_queue_was_empty() -> None:
    eyes = Eyes()
    eyes.gates[0] = threading.Event()
    all_done = threading.Event()

    class Pausing(Belt):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for number, frame in enumerate(super().frames(stop)):
                assert number != 4 or all_done.wait(20)
                yield frame

    with prefetching(Pausing(5), lambda: eyes) as frames:
        coming = iter(frames)
        assert next(coming).sequence == 0
        assert eyes.begun[1].wait(20)
        eyes.gates[0].set()
        early = [next(coming) for _ in range(3)]
        for captured in early:
            assert captured.prefetched is not None
            captured.prefetched.found.result(20)
        all_done.set()
        assert [captured.sequence for captured in coming] == [4]
    assert not eyes.beside_others[4]


def test_no_more_frames_are_taken_than_threads_can_hold() -> None:
    eyes = Eyes()
    eyes.gates = {number: threading.Event() for number in (0, 1)}

    class Held(Belt):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for number, frame in enumerate(super().frames(stop)):
                # The next only when a thread has the one before, as long as threads are free.
                assert not 1 <= number <= 2 or eyes.begun[number - 1].wait(20)
                yield frame

    belt = Held(30, is_live=True)
    with prefetching(belt, lambda: eyes, depth=1) as frames:
        coming = iter(frames)
        assert next(coming).sequence == 0
        # Both threads are busy: what nobody has taken gives way to what is newer.
        assert belt.through.wait(20)
        for gate in eyes.gates.values():
            gate.set()
        rest = [captured.sequence for captured in coming]
        dropped = frames._capture.dropped[SUPERSEDED]
    assert rest[0] == 1
    assert rest[-1] == 29
    assert len(rest) + 1 + dropped == 30


def test_what_looking_raised_is_raised_where_the_frames_turn_comes() -> None:
    eyes = Eyes(failing=1)
    with prefetching(Belt(3), lambda: eyes) as frames:
        taken = list(frames)
    assert [captured.prefetched.found.exception() is None for captured in taken if captured.prefetched] == [
        True,
        False,
        True,
    ]
    assert taken[1].prefetched is not None
    with pytest.raises(RuntimeError, match="a defect of ours"):
        taken[1].prefetched.found.result()


def test_a_source_that_breaks_is_told_after_its_frames() -> None:
    taken: list[int] = []
    with prefetching(Belt(5, failure=DataError("cable")), Eyes) as frames, pytest.raises(DataError, match="cable"):
        taken.extend(captured.sequence for captured in frames)
    assert taken == [0, 1, 2, 3, 4]


def test_nobody_looks_where_nobody_should() -> None:
    with prefetching(Belt(3), lambda: None) as frames:
        assert [captured.prefetched for captured in frames] == [None, None, None]


def test_leaving_early_ends_the_threads() -> None:
    eyes = Eyes()
    with prefetching(Belt(50), lambda: eyes, count=3) as frames:
        assert next(iter(frames)).sequence == 0
        threads = frames._threads
    assert not any(thread.is_alive for thread in threads)


def test_what_was_taken_and_not_given_out_is_known_after_a_stop() -> None:
    eyes, stop = Eyes(), threading.Event()
    with prefetching(Belt(50), lambda: eyes, stop=stop) as frames:
        coming = iter(frames)
        assert next(coming).sequence == 0
        assert eyes.begun[1].wait(20)
        stop.set()
        assert list(coming) == []
    unread = [captured.sequence for captured in frames.unread()]
    assert unread == list(range(1, len(unread) + 1))
    assert 1 <= len(unread) <= 7  # three that the threads may hold, two that are queued, one in the reader's hand


def _inspector(package: Package, *, num_parallel: int) -> Inspector:
    runtime, shared = (open_runtime(package.model_onnx, device="cpu", num_threads=count) for count in (2, 1))
    return Inspector(package, runtime, InspectConfig(), num_parallel=num_parallel, shared=shared)


def test_an_inspector_judges_the_same_ahead_of_its_turn_and_in_it(package: Package) -> None:
    inspector, alone = _inspector(package, num_parallel=2), _inspector(package, num_parallel=1)
    assert inspector.observer is inspector
    assert alone.observer is None
    images = [good_image(1), bad_image(2), good_image(3), np.zeros_like(IMAGE)] * 5

    class Images(Belt):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for number, image in enumerate(images):
                yield make_frame(part_id=str(number), source=self.name, image_bgr=image)

    with prefetching(Images(0), lambda: inspector) as frames:
        ahead = [judge(inspector, captured).result for captured in frames]
    with Capture(Images(0), CaptureConfig(), threading.Event()) as frames_alone:
        in_turn = [judge(alone, captured).result for captured in frames_alone]
    told = [(one.sequence, one.verdict, one.reasons, one.score) for one in ahead]
    assert told == [(one.sequence, one.verdict, one.reasons, one.score) for one in in_turn]
    assert {one.verdict for one in ahead} == {"pass", "fail", "unknown"}


def test_another_judge_takes_nobody_elses_word(package: Package) -> None:
    before, after = _inspector(package, num_parallel=2), _inspector(package, num_parallel=2)
    looked: list[int] = []
    observe = after.observe

    def note(captured: Captured) -> Observation:
        looked.append(captured.sequence)
        return observe(captured)

    after.observe = note  # type: ignore[method-assign]
    with prefetching(Belt(4), lambda: before) as frames:
        for captured in frames:
            after.inspect(captured)
    assert looked == [0, 1, 2, 3]
