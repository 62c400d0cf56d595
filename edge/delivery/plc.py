"""Verdicts for the machine that ejects parts: holding registers of a PLC, over Modbus TCP.

Theory of operation
-------------------
Ten registers, or thirteen in layout 2, written with one request, so that a PLC never sees the verdict of one part with
the number of another:

    +0      part number: rises by one a part, 1 to 65535 and round again; 0 before the first
    +1      verdict: 0 none yet, 1 pass, 2 fail, 3 unknown
    +2      score over threshold in thousandths, at most 65534; 65535: no score
    +3      heartbeat: changes every ``heartbeat_s`` as long as the inspection runs, with or without parts
    +4, +5  passed since the start, high word first
    +6, +7  failed
    +8, +9  unknown
    +10, +11  layout 2: the part's own number as announced by the trigger, modulo 2^32, high word first
    +12     layout 2: bits; 1: the part has a number of its own, 2: late, 4: duplicate, 8: parts are missing before it

A PLC takes a verdict when the part number changes, and must treat a heartbeat that stands still, and a number that
jumps, as "not inspected". While the connection is down verdicts cannot be written; they are counted and logged, the
next one shows the jump, and the heartbeat has stopped meanwhile. They are not written later, when the machine would
take them for those of other parts. A missed part's number is shown with verdict 0.

After any write that failed, of a heartbeat too, verdict 0 is shown until the next part: a PLC that was switched off has
empty registers, in which the last part's number and verdict would look like those of a new part. For the same reason
the first write over a new connection is a heartbeat without a verdict.

The verdicts of a model on trial are always 3, unknown.

A verdict that is written after its part's deadline is always 3, unknown, with the bit for late: a PLC that has given
the part up must not see a pass.
"""

from __future__ import annotations

import collections
import threading
import time

import msgspec

from edge.config.outputs import ModbusConfig
from edge.modbus import ModbusLink
from edge.result import Inspected, Result, Verdict
from edge.verdict import mark_late
from edgeflame.background import BackgroundThread
from edgeflame.errors import LinkError
from edgeflame.log import EventLog

log = EventLog("plc")

VERDICTS = {"pass": 1, "fail": 2, "unknown": 3}
NO_SCORE = 0xFFFF

HAS_NUMBER, LATE, DUPLICATE, MISSING = 1, 2, 4, 8
"""Bits of register +12."""

_RETRY_S = 1.0


def encode_result(result: Result | None, *, layout: int) -> tuple[int, int, tuple[int, ...]]:
    """The registers +1 and +2, and those from +10 on that only layout 2 has (else empty).

    Args:
        result: of the part; None: it has no verdict.
        layout: 1 or 2.
    """
    if result is None:
        return 0, NO_SCORE, (0, 0, 0) if layout == 2 else ()
    ratio = NO_SCORE if result.ratio is None else min(round(1000 * result.ratio), NO_SCORE - 1)
    flags = (
        (HAS_NUMBER if result.part_number is not None else 0)
        | (LATE if result.late else 0)
        | (DUPLICATE if result.duplicate else 0)
        | (MISSING if result.parts_missing else 0)
    )
    own = (*_words(result.part_number or 0), flags) if layout == 2 else ()
    return VERDICTS[result.verdict], ratio, own


class PlcSink:
    """Writes each verdict to a PLC on a thread of its own, so that a PLC that does not answer delays no camera.

    Args:
        config: section ``[modbus]``.
    """

    def __init__(self, config: ModbusConfig) -> None:
        self._config = config
        self._link = ModbusLink(config.host, config.port, timeout_s=config.timeout_s)
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[Result, float | None]] = collections.deque()
        """Results with their deadlines."""
        self._counts = dict.fromkeys(VERDICTS, 0)
        self._number = 0
        self._shown: Result | None = None
        self._heartbeat = 0
        self._is_up: bool | None = None
        self.num_missed = 0
        """Verdicts that could not be written."""
        self.num_late = 0
        """Verdicts that were in time, but written as unknown because the deadline had passed by then."""
        self._thread = BackgroundThread("plc", self._run, wake=self._notify, join_s=2 * config.timeout_s + 1)
        self._thread.start()

    @property
    def is_connected(self) -> bool:
        """Whether the last write, a verdict or a heartbeat, reached the PLC."""
        return bool(self._is_up)

    def accept(self, inspected: Inspected) -> None:
        """Queue a verdict; does not block."""
        result = inspected.result
        if result.trial:
            # Nobody has said yet that this model may decide what is ejected.
            result = msgspec.structs.replace(result, verdict=Verdict.UNKNOWN.value)
        with self._changed:
            self._counts[result.verdict] += 1
            self._waiting.append((result, inspected.due_monotonic_s))
            self._changed.notify_all()

    def start_flush(self) -> None:
        """Have the queued verdicts written and the connection closed; does not wait for it."""
        self._thread.request_stop()

    def close(self) -> None:
        """Write the queued verdicts, close the connection and end the thread."""
        self._thread.close()
        if self.num_missed or self.num_late:
            log.warning("plc_verdicts_missed", count=self.num_missed, late=self.num_late, host=self._config.host)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self, stop: threading.Event) -> None:
        next_beat = time.monotonic()
        while True:
            with self._changed:
                while not self._waiting and not stop.is_set() and time.monotonic() < next_beat:
                    self._changed.wait(max(0.0, next_beat - time.monotonic()))
                if not self._waiting and stop.is_set():
                    break
                part = self._waiting.popleft() if self._waiting and self._is_up else None
                registers = self._registers(part)
            written = self._write(registers)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._config.heartbeat_s
            if not written:
                self._drop_waiting(part is not None)
        self._link.close()

    def _registers(self, part: tuple[Result, float | None] | None) -> list[int]:
        self._heartbeat = (self._heartbeat + 1) % 0x10000
        if part is not None:
            self._number = self._number % 0xFFFF + 1
            self._shown = self._as_of_now(*part)
        verdict, ratio, own = encode_result(self._shown, layout=self._config.layout)
        counts = [word for count in self._counts.values() for word in _words(count)]
        return [self._number, verdict, ratio, self._heartbeat, *counts, *own]

    def _as_of_now(self, result: Result, due_s: float | None) -> Result:
        shown = mark_late(result, now_s=time.monotonic(), due_s=due_s)
        if shown.late and not result.late:
            self.num_late += 1
            written = VERDICTS[shown.verdict]
            log.warning(
                "plc_verdict_late", number=result.part_number or 0, verdict=VERDICTS[result.verdict], written=written
            )
        return shown

    def _write(self, registers: list[int]) -> bool:
        config = self._config
        try:
            self._link.request(lambda client: client.write_registers(config.register, registers, device_id=config.unit))
        except LinkError as exc:
            if self._is_up is not False:
                log.error("plc_lost", address=self._link.address, reason=str(exc))
            self._is_up = False
        else:
            if not self._is_up:
                log.info("plc_connected", address=self._link.address)
            self._is_up = True
        return self._is_up

    def _drop_waiting(self, in_hand: bool) -> None:
        """After a failed write: wait ``_RETRY_S``, unless closing, then drop and count all verdicts that wait.

        The next heartbeat shows the last part's number without a verdict, whatever was in the failed write.
        """
        with self._changed:
            self._changed.wait_for(self._thread.stop.is_set, _RETRY_S)
            missed = len(self._waiting) + in_hand
            self._number = (self._number + len(self._waiting) - 1) % 0xFFFF + 1 if self._waiting else self._number
            self._waiting.clear()
            self.num_missed += missed
            self._shown = None


def _words(number: int) -> tuple[int, int]:
    """A number modulo 2^32 in two registers, high word first."""
    return number >> 16 & 0xFFFF, number & 0xFFFF
