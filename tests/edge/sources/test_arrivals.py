"""When a file of a watched folder is read, waits, or is given up; on a clock of our own."""

from __future__ import annotations

import pytest

from edge.sources.arrivals import Arrivals, FileIdentity, IncompleteFile, SeenFile


def arrivals(**done: FileIdentity) -> Arrivals:
    return Arrivals(done, settle_s=1.0, deadline_s=30.0)


def seen(size: int = 100, mtime_ns: int = 5, inode: int = 7) -> SeenFile:
    return SeenFile(FileIdentity(size, mtime_ns), inode)


def test_a_file_is_tried_once_it_has_not_changed_for_long_enough() -> None:
    files = arrivals()
    files.observe("a.png", seen(50), 0.0)
    assert files.ready(0.9) == []
    files.observe("a.png", seen(100), 0.9)
    assert files.ready(1.8) == []
    assert files.ready(2.0) == ["a.png"]
    files.mark_done("a.png", seen(100).identity)
    assert files.ready(9.0) == files.pending == []


def test_the_kernels_word_needs_no_wait_but_a_look() -> None:
    files = arrivals()
    files.moved_in("a.png", 0.0)
    assert files.ready(0.0) == []
    files.observe("a.png", seen(), 0.0)
    assert files.ready(0.0) == ["a.png"]


def test_what_was_old_when_it_was_found_needs_no_wait_unless_it_changes() -> None:
    files = arrivals()
    files.observe("a.png", seen(), 0.0, is_old=True)
    assert files.ready(0.0) == ["a.png"]
    files.observe("a.png", seen(200), 0.1, is_old=True)
    assert files.ready(0.1) == []


def test_a_file_that_cannot_be_decoded_is_tried_again_when_it_has_changed() -> None:
    files = arrivals()
    files.moved_in("a.png", 0.0)
    files.observe("a.png", seen(50), 0.0)
    files.failed("a.png", seen(50).identity, "cut short")
    assert files.ready(29.0) == []
    files.observe("a.png", seen(100), 29.0)
    assert files.ready(29.5) == []
    assert files.ready(30.0) == ["a.png"]
    # The clock of its patience started again with the change.
    files.failed("a.png", seen(100).identity, "cut short")
    assert list(files.given_up(58.9)) == []
    reason = "not complete 30 s after its last change: cut short"
    assert list(files.given_up(59.0)) == [IncompleteFile("a.png", seen(100).identity, reason)]
    assert files.pending == []


def test_a_file_that_was_given_up_comes_again_when_it_is_written_after_all() -> None:
    files = arrivals()
    files.observe("a.png", seen(50), 0.0)
    files.failed("a.png", seen(50).identity, "cut short")
    assert len(list(files.given_up(30.0))) == 1
    files.observe("a.png", seen(50), 31.0)
    assert files.pending == []
    files.observe("a.png", seen(100, mtime_ns=9), 32.0)
    assert files.ready(33.0) == ["a.png"]


def test_a_file_that_is_written_for_ever_is_given_up() -> None:
    files = arrivals()
    for step in range(600):
        files.observe("log.png", seen(step), step / 2)
        assert files.ready(step / 2) == []
        assert list(files.given_up(step / 2)) == []
    (given_up,) = files.given_up(300.0)
    assert given_up.reason == "still being written after 300 s"


def test_what_was_done_comes_again_only_if_it_is_written_anew() -> None:
    files = arrivals(**{"a.png": FileIdentity(100, 5)})
    files.observe("a.png", seen(), 0.0)
    files.moved_in("a.png", 0.0)
    files.observe("a.png", seen(), 0.0)
    assert files.pending == []
    files.observe("a.png", seen(mtime_ns=6), 1.0, is_old=True)
    assert files.ready(1.0) == ["a.png"]


def test_files_come_in_the_order_in_which_they_were_completed() -> None:
    files = arrivals()
    for name in ("slow.png", "b.png", "c.png", "d.png"):
        files.observe(name, seen(), 0.0)
    files.changed("slow.png", 0.1)  # it was closed
    files.moved_in("c.png", 0.2)
    assert files.ready(0.2) == ["c.png"]
    assert files.ready(2.0) == ["b.png", "d.png", "slow.png", "c.png"]


def test_a_file_that_disappears_is_lost_after_a_while_and_another_name_is_no_loss() -> None:
    files = arrivals()
    files.observe("a.tmp.png", seen(inode=1), 0.0)
    files.observe("b.png", seen(inode=2), 0.0)
    files.observe("c.png", seen(inode=3), 0.0)
    for name in ("a.tmp.png", "b.png"):
        files.observe(name, None, 0.5)
    files.observe("a.png", seen(inode=1), 0.6)
    files.renamed("c.png")
    assert list(files.lost(1.4)) == []
    assert list(files.lost(1.5)) == ["b.png"]
    assert files.pending == ["a.png"]
    # Gone and there again, as a share does that was away for a moment.
    files.observe("a.png", None, 2.0)
    files.observe("a.png", seen(inode=1), 2.5)
    assert list(files.lost(9.0)) == []


def test_what_is_known_of_files_that_are_gone_is_forgotten() -> None:
    files = arrivals(**{"a.png": FileIdentity(1, 1), "b.png": FileIdentity(1, 1)})
    assert files.forget_absent(["b.png", "c.png"]) == ["a.png"]
    assert files.done.keys() == {"b.png"}


@pytest.mark.parametrize("call", ["failed", "observe"])
def test_news_of_unknown_files_does_no_harm(call: str) -> None:
    files = arrivals()
    if call == "failed":
        files.failed("a.png", FileIdentity(1, 1), "x")
    else:
        files.observe("a.png", None, 0.0)
    files.renamed("a.png")
    assert files.pending == []
