"""Verdicts in a PLC's registers, against pymodbus's own server."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from edge.config.outputs import ModbusConfig
from edge.delivery.plc import DUPLICATE, HAS_NUMBER, LATE, MISSING, NO_SCORE, PlcSink
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError
from tests.support.inspection_results import inspected
from tests.support.modbus_server import Plc
from tests.support.ports import free_port
from tests.support.waiting import wait_for

BASE = 40


@pytest.fixture
def plc() -> Iterator[Plc]:
    opened = Plc(free_port())
    yield opened
    opened.stop()


@pytest.fixture
def sink(plc: Plc) -> Iterator[PlcSink]:
    opened = PlcSink(ModbusConfig(host="127.0.0.1", port=plc.port, register=BASE, heartbeat_s=0.05, timeout_s=1.0))
    yield opened
    opened.close()


def verdicts(plc: Plc) -> list[tuple[int, int]]:
    """Part number and verdict of each part written, in order."""
    return list(dict.fromkeys((words[0], words[1]) for words in plc.writes if words[0]))


def test_each_part_is_written_with_its_number_verdict_and_score(plc: Plc, sink: PlcSink) -> None:
    for sequence, verdict in enumerate(["pass", "fail", "unknown", "pass"]):
        sink.accept(inspected(sequence, verdict))
    wait_for(lambda: plc.registers[0] == 4, "the fourth part is written")
    assert verdicts(plc) == [(1, 1), (2, 2), (3, 3), (4, 1)]
    assert plc.registers[2] == 2000  # twice the threshold
    assert plc.registers[4:] == [0, 2, 0, 1, 0, 1]
    assert NO_SCORE == 65535


def test_layout_2_tells_the_plc_its_own_number_of_the_part_and_what_is_the_matter(plc: Plc) -> None:
    sink = PlcSink(ModbusConfig(host="127.0.0.1", port=plc.port, register=BASE, layout=2))
    for number, keys in enumerate(
        [{}, {"part_number": 70_000}, {"part_number": 2**32 + 5, "duplicate": True, "parts_missing": 2, "late": True}]
    ):
        one = inspected(number, "unknown")
        sink.accept(dataclasses.replace(one, result=msgspec.structs.replace(one.result, **keys)))
    wait_for(lambda: plc.registers[0] == 3, "the third part is written")
    sink.close()
    told = dict.fromkeys((words[0], *words[10:]) for words in plc.writes if words[0])
    assert list(told) == [(1, 0, 0, 0), (2, 1, 4464, HAS_NUMBER), (3, 0, 5, HAS_NUMBER | LATE | DUPLICATE | MISSING)]
    assert {len(words) for words in plc.writes} == {13}


def test_a_pass_that_is_written_after_its_deadline_is_unknown(plc: Plc) -> None:
    sink = PlcSink(ModbusConfig(host="127.0.0.1", port=plc.port, register=BASE, layout=2))
    for due_s in (time.monotonic() - 1, time.monotonic() + 3600):
        sink.accept(dataclasses.replace(inspected(0, "pass"), due_monotonic_s=due_s))
    wait_for(lambda: plc.registers[0] == 2, "the second part is written")
    sink.close()
    told = dict.fromkeys((words[0], words[1], words[12]) for words in plc.writes if words[0])
    assert list(told) == [(1, 3, LATE), (2, 1, 0)]
    assert sink.num_late == 1


def test_the_heart_beats_without_parts(plc: Plc, sink: PlcSink) -> None:
    wait_for(lambda: len({words[3] for words in plc.writes}) >= 5, "five heartbeats")
    assert plc.registers[:3] == [0, 0, NO_SCORE]


def test_verdicts_of_an_outage_are_counted_and_never_written_late(plc: Plc, sink: PlcSink) -> None:
    sink.accept(inspected(0, "pass"))
    wait_for(lambda: plc.registers[0] == 1, "the first part is written")
    plc.stop()
    for sequence in range(3):
        sink.accept(inspected(sequence, "fail"))
    wait_for(lambda: sink.num_missed == 3, "three verdicts are missed")
    plc.writes.clear()
    plc.start()
    wait_for(lambda: plc.writes, "the heart beats again")
    sink.accept(inspected(4, "pass"))
    wait_for(lambda: plc.registers[0] == 5, "the fifth part is written")
    # The jump from 1 tells the PLC that parts went by, and that there is no verdict on the last of them.
    assert verdicts(plc) == [(4, 0), (5, 1)]
    assert plc.registers[4:8] == [0, 2, 0, 3]


def test_a_plc_that_was_switched_off_and_on_between_parts_gets_no_old_verdict(plc: Plc, sink: PlcSink) -> None:
    for sequence in range(3):
        sink.accept(inspected(sequence, "pass"))
    wait_for(lambda: plc.registers[:2] == [3, 1], "the third part is written")
    plc.stop()
    wait_for(lambda: not sink.is_connected, "a heartbeat has failed")
    plc.writes.clear()
    plc.start()  # with registers of zeros
    wait_for(lambda: len(plc.writes) >= 3, "the heart beats again")
    sink.accept(inspected(3, "fail"))
    wait_for(lambda: plc.registers[0] == 4, "the fourth part is written")
    assert verdicts(plc) == [(3, 0), (4, 2)]
    assert sink.num_missed == 0


def test_a_plc_that_refuses_is_no_end_of_the_line(plc: Plc) -> None:
    sink = PlcSink(ModbusConfig(host="127.0.0.1", port=plc.port, register=60_000, heartbeat_s=0.05))
    sink.accept(inspected(0))
    wait_for(lambda: sink.num_missed == 1, "the verdict is missed")
    sink.close()


@pytest.mark.parametrize(
    "keys", [{"host": ""}, {"host": "h", "port": 0}, {"host": "h", "register": 65530}, {"host": "h", "heartbeat_s": 0}]
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="modbus"):
        parse_config(b"", ModbusConfig, "modbus", keys)
