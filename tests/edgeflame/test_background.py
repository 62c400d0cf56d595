"""Threads with an orderly end, and how long to wait before something is tried again."""

from __future__ import annotations

import queue
import threading

import pytest

from edgeflame.background import BackgroundThread, Backoff, RetryTimer
from edgeflame.errors import StorageError


def test_a_thread_is_stopped_and_waited_for() -> None:
    ended = threading.Event()

    def work(stop: threading.Event) -> None:
        stop.wait()
        ended.set()

    with BackgroundThread("test", work) as thread:
        assert thread.is_alive
    assert ended.is_set()
    assert not thread.is_alive


def test_a_target_that_waits_for_something_else_is_woken() -> None:
    waiting: queue.Queue[int | None] = queue.Queue()
    seen: list[int | None] = []

    def work(stop: threading.Event) -> None:
        while not stop.is_set():
            seen.append(waiting.get())

    thread = BackgroundThread("test", work, wake=lambda: waiting.put(None))
    thread.start()
    assert thread.close()
    assert seen == [None]


def test_one_that_does_not_end_is_left_behind() -> None:
    go = threading.Event()
    thread = BackgroundThread("test", lambda _: go.wait() and None, join_s=0.01)
    thread.start()
    assert not thread.close()
    go.set()
    assert thread.close(5.0)


def test_one_that_was_never_started_is_closed_at_once() -> None:
    assert BackgroundThread("test", lambda _: None).close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [StorageError("full"), ValueError("a defect")])
def test_an_error_is_handed_over(error: Exception) -> None:
    def work(_: threading.Event) -> None:
        raise error

    def run() -> None:
        with BackgroundThread("test", work):
            pass

    with pytest.raises(type(error), match=str(error)):
        run()


def test_delays_double_up_to_a_limit_and_begin_again() -> None:
    backoff = Backoff(0.5, 3.0, jitter=0.0)
    assert [backoff.next_delay() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.num_failures == 5
    backoff.reset()
    assert backoff.next_delay() == 0.5


def test_chance_takes_off_a_share() -> None:
    delays = {Backoff(4.0, 60.0, jitter=0.5).next_delay() for _ in range(100)}
    assert len(delays) > 1
    assert all(2.0 <= delay <= 4.0 for delay in delays)


def test_what_is_not_answered_is_sent_again_after_longer_and_longer() -> None:
    timer = RetryTimer(0.0)
    assert [second for second in range(200) if timer.is_due(second)] == [5, 15, 35, 65, 95, 125, 155, 185]


def test_progress_shortens_the_wait_but_not_below_twice_the_last_pause() -> None:
    timer = RetryTimer(0.0)
    timer.progressed(8.0)
    assert not timer.is_due(23.9)
    assert timer.is_due(24.0)
    timer.sent(30.0)
    assert not timer.is_due(59.0)
    timer.progressed(60.0)
    timer.progressed(60.1)
    assert timer.is_due(65.2)
