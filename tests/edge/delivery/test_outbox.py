"""The outbox: what was committed stays, in order, until every destination has it; and how it is bounded."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config.outputs import OutboxConfig
from edge.delivery.outbox import Outbox
from edge.delivery.pipeline import MAX_WAITING_BYTES, OutboxWriter
from edge.result import Inspected
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, StorageError
from tests.support.inspection_results import body, inspected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.sqlite"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with Outbox(path, OutboxConfig()) as opened:
        yield opened


def numbers(outbox: Outbox, name: str, limit: int = 1000) -> list[tuple[int, bool]]:
    return [(item.number, item.redelivered) for item in outbox.next_batch(name, limit)]


def test_each_destination_gets_everything_in_order_and_what_it_did_not_acknowledge_again(path: Path) -> None:
    with Outbox(path, OutboxConfig()) as outbox:
        outbox.register("a")
        outbox.register("b")
        assert outbox.append([body(0), body(1), body(2)]) == [1, 2, 3]
        assert numbers(outbox, "a") == [(1, False), (2, False), (3, False)]
        outbox.acknowledge("a", 2)
        identity = outbox.id
    with Outbox(path, OutboxConfig()) as outbox:
        assert outbox.id == identity
        outbox.register("a")
        assert outbox.append([body(3)]) == [4]
        # 3 was attempted before the restart and may have arrived; 4 surely did not.
        assert numbers(outbox, "a") == [(3, True), (4, False)]
        assert numbers(outbox, "b", 2) == [(1, False), (2, False)]
        assert outbox.status("a").waiting == 2
        assert outbox.next_batch("a", 1)[0].read_result().sequence == 2


def test_a_new_destination_starts_with_the_next_result_and_a_removed_one_holds_nothing_back(outbox: Outbox) -> None:
    outbox.append([body(0)])
    assert outbox.register("late").waiting == 0
    outbox.append([body(1)])
    assert numbers(outbox, "late") == [(2, False)]
    assert outbox.remove_destinations(["other"]) == ["late"]
    assert outbox.remove_destinations(["other"]) == []


def test_delivered_results_go_beyond_the_history_and_waiting_ones_only_at_the_bound(path: Path) -> None:
    with Outbox(path, OutboxConfig(history=100, max_results=1000)) as outbox:
        outbox.register("away")
        outbox.append([body(0)] * 900)
        assert outbox.status("away").waiting == 900
        outbox.acknowledge("away", 600)
        outbox.append([body(0)] * 300)
        assert len(outbox.latest(5000)) == 600  # 601..1200: all of the waiting ones, no more than the bound
        outbox.append([body(0)] * 600)
        status = outbox.status("away")
        assert (status.lost, status.waiting) == (200, 1000)
        assert numbers(outbox, "away", 1)[0][0] == 801  # the gap is seen by the receiver
        # Numbers are never used twice, even when all results are gone.
        outbox.acknowledge("away", 1800)
        assert outbox.append([body(0)] * 300)[0] == 1801
        outbox.acknowledge("away", 2100)
        outbox.append([body(0)] * 300)
        assert len(outbox.latest(5000)) == 300  # 2101 and up wait


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 5), st.just("attempt"), st.just("acknowledge"), st.just("reopen")), max_size=30)
)
def test_nothing_is_skipped_and_nothing_unmarked_comes_twice(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int | str]
) -> None:
    path = tmp_path_factory.mktemp("outbox") / "o.sqlite"
    outbox = Outbox(path, OutboxConfig())
    outbox.register("d")
    appended, seen, last = 0, set[int](), 0
    for step in steps:
        if isinstance(step, int):
            assert outbox.append([body(n) for n in range(step)])[-1] == appended + step
            appended += step
        elif step == "attempt":
            got = numbers(outbox, "d", 3)
            for number, redelivered in got:
                assert redelivered == (number in seen)
                seen.add(number)
            last = got[-1][0] if got else last
        elif step == "acknowledge":
            outbox.acknowledge("d", last)
        else:
            outbox.__exit__(None, None, None)
            outbox = Outbox(path, OutboxConfig())
    outbox.acknowledge("d", last)
    assert [number for number, _ in numbers(outbox, "d")] == list(range(last + 1, appended + 1))
    outbox.__exit__(None, None, None)


_KILLED = """
import sys
from pathlib import Path
from edge.config.outputs import OutboxConfig
from edge.delivery.outbox import Outbox
from tests.support.inspection_results import body
with Outbox(Path(sys.argv[1]), OutboxConfig()) as outbox:
    while True:
        for number in outbox.append([body(1)] * 3):
            print(number, flush=True)
"""


def test_what_was_reported_as_kept_survives_sigkill(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    reported = [int(child.stdout.readline()) for _ in range(100)]
    os.kill(child.pid, signal.SIGKILL)
    reported += [int(line) for line in child.stdout.read().splitlines()]
    child.stdout.close()
    child.wait()
    with Outbox(path, OutboxConfig()) as outbox:
        kept = {number for number, _ in outbox.latest(1_000_000)}
    assert set(reported) <= kept
    assert kept == set(range(1, len(kept) + 1))


def test_a_full_disk_takes_room_from_pictures_first_and_then_is_an_error_that_keeps_nothing_of_the_call(
    path: Path,
) -> None:
    given_away: list[int] = []

    def make_room() -> bool:
        # A page limit is SQLite's own full disk; the pictures give way twice.
        given_away.append(1)
        if len(given_away) <= 2:
            outbox._db.execute(f"PRAGMA max_page_count = {pages + 20 * len(given_away)}")
        return len(given_away) <= 2

    with Outbox(path, OutboxConfig(), make_room=make_room) as outbox:
        pages = outbox._db.execute("PRAGMA page_count").fetchone()[0] + 5
        outbox._db.execute(f"PRAGMA max_page_count = {pages}")
        kept = 0
        with pytest.raises(StorageError, match=r"outbox\.sqlite: cannot write the outbox .*full"):  # noqa: PT012
            for _ in range(1000):
                kept = outbox.append([body(1).ljust(2000)])[-1]
        assert len(given_away) == 3
        assert kept > 10
        assert len(outbox.latest(1000)) == kept


def test_a_file_that_is_none_or_of_another_format_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"outbox\.sqlite: cannot open the outbox .*; move it away"):
        Outbox(path, OutboxConfig())
    path.unlink()
    Outbox(path, OutboxConfig()).__exit__(None, None, None)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '2' WHERE key = 'format'")
    db.close()
    later = path.read_bytes()
    with pytest.raises(StorageError, match=r"outbox\.sqlite: the outbox is of format 2; .* reads up to 1"):
        Outbox(path, OutboxConfig())
    assert path.read_bytes() == later


@pytest.mark.parametrize("keys", [{"history": -1}, {"history": 10, "max_results": 9}, {"max_results": 0, "history": 0}])
def test_bounds_that_make_no_sense_are_refused(keys: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="outbox"):
        parse_config(b"", OutboxConfig, "outbox", keys)


class Shown:
    """A sink that remembers, and fails when told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.sequences: list[int] = []
        self._fail_at = fail_at

    def accept(self, inspected: Inspected) -> None:
        if inspected.result.sequence == self._fail_at:
            raise StorageError("results.jsonl: results cannot be written (No space left on device)")
        self.sequences.append(inspected.result.sequence)

    def close(self) -> None: ...


def test_the_writer_keeps_all_in_order_and_shows_them_only_then(outbox: Outbox) -> None:
    shown = Shown()
    with OutboxWriter(outbox, [shown]) as writer:
        for sequence in range(300):
            writer.accept(inspected(sequence))
    assert shown.sequences == list(range(300))
    assert len(outbox.latest(1000)) == 300


def test_large_pictures_do_not_pile_up_before_the_disk(outbox: Outbox) -> None:
    """By their bytes, that is; nothing of a picture's size is allocated here."""
    handed, ahead = [0], []

    class Counting(Shown):
        def accept(self, inspected: Inspected) -> None:
            super().accept(inspected)
            ahead.append(handed[0] - len(self.sequences))

    picture = np.broadcast_to(np.uint8(0), (MAX_WAITING_BYTES // 3 // 1000, 1000, 3))[:, :250]
    assert picture.nbytes <= MAX_WAITING_BYTES // 4 < 2 * picture.nbytes
    shown = Counting()
    with OutboxWriter(outbox, [shown]) as writer:
        for sequence in range(200):
            writer.accept(dataclasses.replace(inspected(sequence), image=picture))
            handed[0] += 1
    assert shown.sequences == list(range(200))
    assert max(ahead) <= 4


def test_an_error_behind_the_writer_reaches_the_inspection(outbox: Outbox) -> None:
    writer = OutboxWriter(outbox, [Shown(fail_at=3)])
    with pytest.raises(StorageError, match="No space left"):  # noqa: PT012 - whichever accept comes after it
        for sequence in range(1000):
            writer.accept(inspected(sequence))
    with pytest.raises(StorageError, match="No space left"):
        writer.close()
    assert len(outbox.latest(1000)) >= 4  # what was committed before it was shown stays


def test_an_outbox_that_was_emptied_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for expected in ([], [], ["database_empty"]):
        if expected:
            path.write_bytes(b"")
        caplog.clear()
        with Outbox(path, OutboxConfig()):
            assert [record.getMessage() for record in caplog.records] == expected
