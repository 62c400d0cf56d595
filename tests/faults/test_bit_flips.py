"""Disks that give back something else than was written: whatever is read is what was written, or is not believed."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from aggregator.journal import Journal
from cli import cli
from edge.cameras import Overrides
from edge.config.outputs import OutboxConfig
from edge.delivery.outbox import Outbox
from edgeflame.errors import StorageError
from edgeflame.state import read_json, write_record
from tests.faults.test_power_loss import RUN, transactions
from tests.support.inspection_results import body, result
from trainer.agent.state import UpdateRecord

FLIPS = 300
"""Single flips of each file, at places that are the same every time."""


def flips(data: bytes) -> list[bytes]:
    places = random.Random(1).sample(range(8 * len(data)), min(FLIPS, 8 * len(data)))
    return [data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :] for at in places]


def journal(folder: Path) -> Path:
    path = folder / "journal.sqlite"
    with Journal(path) as opened:
        for events in transactions():
            opened.append(RUN, events)
    # All of it in the one file.
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    return path


def test_a_fact_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    path = journal(tmp_path)
    with Journal(path) as opened:
        whole = opened.last_run()
    (tmp_path / "flipped").mkdir()
    flipped = tmp_path / "flipped" / "journal.sqlite"
    refused = 0
    for data in flips(path.read_bytes()):
        shutil.rmtree(flipped.parent)
        flipped.parent.mkdir()
        flipped.write_bytes(data)
        try:
            with Journal(flipped) as opened:
                assert opened.last_run() == whole
        except StorageError:
            refused += 1
    assert refused > FLIPS // 10


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE facts SET fact = CAST(replace(CAST(fact AS TEXT), '\"num_samples\":9', '\"num_samples\":8') AS BLOB)",
        "UPDATE facts SET run = 'f' WHERE number = (SELECT MAX(number) FROM facts)",
        "UPDATE facts SET fact = 'text' WHERE number = 3",
        "DELETE FROM facts WHERE number = 5",
        "DELETE FROM facts WHERE number = 1",
    ],
)
def test_what_still_makes_sense_is_not_believed_either(statement: str, tmp_path: Path) -> None:
    path = journal(tmp_path)
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()
    with Journal(path) as opened, pytest.raises(StorageError, match=r"journal is damaged.*fact \d+ is not as it was"):
        opened.last_run()


def test_a_journal_without_digests_is_read_and_gets_them_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    early, late = transactions()[:4], transactions()[4:]
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE facts (number INTEGER PRIMARY KEY, run TEXT NOT NULL, fact BLOB NOT NULL, time TEXT)")
        for event in [event for events in early for event in events]:
            db.execute("INSERT INTO facts (run, fact) VALUES (?, ?)", (RUN, msgspec.json.encode(event)))
        db.commit()
    for events in late:
        with Journal(path) as opened:
            assert opened.last_run() is not None
            opened.append(RUN, events)
    (tmp_path / "new").mkdir()
    with Journal(path) as mixed, Journal(journal(tmp_path / "new")) as new:
        assert mixed.last_run() == new.last_run()
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE facts SET fact = CAST(replace(CAST(fact AS TEXT), ':9,', ':8,') AS BLOB) WHERE number > 9")
        db.commit()
    with Journal(path) as opened, pytest.raises(StorageError, match="is not as it was written"):
        opened.last_run()


@pytest.fixture
def outbox_file(tmp_path: Path) -> Path:
    path = tmp_path / "outbox.sqlite"
    with Outbox(path, OutboxConfig()) as outbox:
        outbox.register("mqtt")
        outbox.register("webhook")
        outbox.append([body(number, "fail") for number in range(10)])
        outbox.acknowledge("webhook", 4)
    return path


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def test_a_result_that_was_changed_is_told_to_nobody_and_counted(outbox_file: Path) -> None:
    change(
        outbox_file,
        "UPDATE results SET body = CAST(replace(CAST(body AS TEXT), '\"fail\"', '\"pass\"') AS BLOB) WHERE number = 3",
        "UPDATE results SET body = x'ff' WHERE number = 7",
    )
    with Outbox(outbox_file, OutboxConfig()) as outbox:
        assert [number for number, _ in outbox.latest(20)] == [10, 9, 8, 6, 5, 4, 2, 1]
        outbox.register("mqtt")
        outbox.register("webhook")
        assert [one.number for one in outbox.next_batch("mqtt", 2)] == [1, 2]
        assert [one.number for one in outbox.next_batch("mqtt", 20)] == [1, 2, 4, 5, 6, 8, 9, 10]
        assert [one.number for one in outbox.next_batch("webhook", 20)] == [5, 6, 8, 9, 10]
        # 3 had arrived at the web service.
        assert (outbox.status("mqtt").lost, outbox.status("webhook").lost) == (2, 1)
        assert outbox.append([body(11)]) == [11]


def test_results_that_are_all_damaged_hold_nothing_up(outbox_file: Path) -> None:
    change(outbox_file, "UPDATE results SET body = x'00' WHERE number < 10")
    with Outbox(outbox_file, OutboxConfig()) as outbox:
        outbox.register("mqtt")
        assert [one.number for one in outbox.next_batch("mqtt", 3)] == [10]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE destinations SET acknowledged = 9, crc32 = crc32 + 1",
        "UPDATE destinations SET acknowledged = 'x', crc32 = crc32 + 1",
        "UPDATE destinations SET name = 'mqtu' WHERE name = 'mqtt'",
    ],
)
def test_a_progress_that_was_changed_loses_no_result(statement: str, outbox_file: Path) -> None:
    change(outbox_file, statement)
    with Outbox(outbox_file, OutboxConfig()) as outbox:
        outbox.remove_destinations(["mqtt", "webhook"])
        outbox.register("mqtt")
        batch = outbox.next_batch("mqtt", 20)
        assert [(one.number, one.redelivered) for one in batch] == [(number, True) for number in range(1, 11)]


def test_a_version_without_checksums_may_come_between(outbox_file: Path) -> None:
    plain = body(99).decode()
    change(
        outbox_file,
        "UPDATE destinations SET acknowledged = 8 WHERE name = 'mqtt'",
        f"INSERT INTO results (body) VALUES (CAST('{plain}' AS BLOB))",
    )
    with Outbox(outbox_file, OutboxConfig()) as outbox:
        outbox.register("mqtt")
        assert [one.number for one in outbox.next_batch("mqtt", 20)] == [9, 10, 11]


def test_an_outbox_whose_file_has_single_flips(outbox_file: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(outbox_file)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    sound = {number + 1: result(number, "fail") for number in range(10)}
    flipped = tmp_path / "flipped" / "outbox.sqlite"
    for data in flips(outbox_file.read_bytes()):
        shutil.rmtree(flipped.parent, ignore_errors=True)
        flipped.parent.mkdir()
        flipped.write_bytes(data)
        try:
            with Outbox(flipped, OutboxConfig()) as outbox:
                outbox.remove_destinations(["mqtt", "webhook"])
                outbox.register("mqtt")
                told = {one.number: one.read_result() for one in outbox.next_batch("mqtt", 20)}
                assert told.items() <= sound.items()
                assert len(told) + outbox.status("mqtt").lost >= 10
                assert dict(outbox.latest(20)).items() <= sound.items()
        except StorageError:
            continue


def test_a_record_is_as_it_was_written_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    record = UpdateRecord(num_samples=90, metrics={"loss": 0.5}, sha256="a" * 64)
    write_record(path, record)
    data = path.read_bytes()
    assert msgspec.json.decode(data, type=UpdateRecord) == record, "as versions without checksums read it"
    for at in range(8 * len(data)):
        path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
        try:
            assert read_json(path, UpdateRecord, advice="") == record
        except StorageError:
            continue
    path.write_bytes(msgspec.json.encode(record))
    assert read_json(path, UpdateRecord, advice="") == record, "as versions without checksums wrote it"


def test_a_release_number_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "release-numbers.json"
    write_record(path, {"tile": 7, "lid": 12})
    assert read_json(path, dict[str, int], advice="") == {"tile": 7, "lid": 12}
    path.write_bytes(path.read_bytes().replace(b"12", b"02"))
    with pytest.raises(StorageError, match="damaged"):
        read_json(path, dict[str, int], advice="")


def test_a_threshold_that_was_changed_is_not_judged_by(tmp_path: Path) -> None:
    Overrides(tmp_path).set_threshold("camera", "m" * 64, 12.5)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_bytes())["cameras"]["camera"]
    path.write_bytes(path.read_bytes().replace(b"12.5", b"13.5"))
    with pytest.raises(StorageError, match=r"does not have its checksum.*delete it"):
        Overrides(tmp_path)


def test_a_state_folder_that_was_deleted_is_noticed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with Outbox(state / "outbox.sqlite", OutboxConfig()) as outbox, Journal(state / "journal.sqlite") as opened:
        outbox.append([body(1)])
        opened.append(RUN, transactions()[0])
        shutil.rmtree(state)
        with pytest.raises(StorageError, match=r"outbox.sqlite: cannot find again"):
            outbox.append([body(2)])
        with pytest.raises(StorageError, match=r"journal.sqlite: cannot find again"):
            opened.append(RUN, transactions()[1])
        state.mkdir()
        shutil.copy(__file__, state / "outbox.sqlite")
        with pytest.raises(StorageError, match="was replaced while it was in use"):
            outbox.append([body(2)])


def test_a_line_with_a_bad_byte_in_its_results_starts_and_goes_on(tmp_path: Path, package_file: Path) -> None:
    (tmp_path / "line.toml").write_text('[web]\nlisten = "127.0.0.1:0"\n[parts]\nnumber = "(\\\\d+)$"\n')
    options = ("--model", package_file, "--source", "boards:warm_white_grid?size=64&parts=2")
    options += ("--config", tmp_path / "line.toml", "--state", tmp_path / "state")
    for _ in range(2):
        done = CliRunner().invoke(cli, ["inspect", *map(str, options)], catch_exceptions=False)
        assert done.exit_code == 0
        change(tmp_path / "state" / "outbox.sqlite", "UPDATE results SET body = x'7bff7d' WHERE number = 1")
    with Outbox(tmp_path / "state" / "outbox.sqlite", OutboxConfig()) as outbox:
        assert [number for number, _ in outbox.latest(9)] == [4, 3, 2]
