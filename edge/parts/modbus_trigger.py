"""Triggers from a PLC, by polling a coil, an input, or better a register that counts parts.

The time of a trigger is that of the answer in which it was first seen: later than the part by up to ``poll_ms`` and the
time of a request. A PLC that does not answer is polled again every second; only a counter then shows how many parts
have passed meanwhile.

From polls to parts
-------------------
A poll reads a state, not events; only a counter shows how much happened between two polls. A part noticed more than one
poll interval and one window after the poll before may have left the camera's view, so that its image cannot be
determined: it is announced with a fault, and gets ``unknown``.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from pymodbus.client import ModbusTcpClient
from pymodbus.pdu import ModbusPDU

from edge.config.inspection import ModbusTriggerConfig
from edge.frame import AcceptTrigger, trigger_now
from edge.modbus import ModbusLink
from edge.parts.sequence import NumberRange
from edge.result import Reason
from edgeflame.background import BackgroundThread
from edgeflame.errors import LinkError
from edgeflame.log import EventLog


@dataclass(frozen=True, kw_only=True)
class PolledPart:
    """A part noticed by a poll."""

    number: int | None
    """The counter's value; None for a contact."""
    fault: str | None = None
    """Why the part's time is not known; None if it is."""


class RisingEdge:
    """A coil or input whose rising edge is one part.

    Args:
        max_interval_s: longest time between two polls for which the time of an edge is known well enough.
    """

    def __init__(self, max_interval_s: float) -> None:
        self._max_interval_s = max_interval_s
        self._level: bool | None = None
        self._polled_s = 0.0

    def update(self, level: bool, now: float) -> PolledPart | None:
        """Add a poll's answer; returns the part that it shows, if any. The first one only gives the initial level."""
        before, interval_s = self._level, now - self._polled_s
        self._level, self._polled_s = level, now
        if before is None or before or not level:
            return None
        return PolledPart(number=None, fault=_fault(interval_s, self._max_interval_s))


class PartCounter:
    """A register that counts parts.

    Args:
        wrap: range of the numbers; a value outside, such as 0 if it counts from 1, is not a part.
        max_gap: a jump by more, or back, means that the counter was set anew.
        max_interval_s: as in :class:`RisingEdge`.
    """

    def __init__(self, wrap: NumberRange, max_gap: int, max_interval_s: float) -> None:
        self._wrap = wrap
        self._max_gap = max_gap
        self._max_interval_s = max_interval_s
        self._value: int | None = None
        self._polled_s = 0.0

    def update(self, value: int, now: float) -> PolledPart | None:
        """Add a poll's answer; returns the part that it shows, if any. The first one only gives the initial value."""
        before, interval_s = self._value, now - self._polled_s
        self._value, self._polled_s = value, now
        if before is None or value == before or not self._is_number(value):
            return None
        fault = _fault(interval_s, self._max_interval_s)
        # After a value that is not a number of a part, as after a reset to 0, any number may be the first.
        if self._is_number(before) and (value - before) % self._wrap.size > self._max_gap:
            fault = f"the counter went from {before} to {value}; it may have been set anew, and announce no part"
        return PolledPart(number=value, fault=fault)

    def _is_number(self, value: int) -> bool:
        return self._wrap.first <= value <= self._wrap.last


def _fault(interval_s: float, max_interval_s: float) -> str | None:
    if interval_s <= max_interval_s:
        return None
    return f"it came while the PLC could not be asked for {interval_s:.2g} s; when, is not known"


log = EventLog("trigger")

RETRY_S = 1.0


class ModbusTrigger:
    """Parts that a PLC announces in a coil, an input or a counting register.

    Args:
        config: section ``[trigger.modbus]``.
        counting: range of the counter's numbers; None for a contact.
        max_gap: a larger jump of the counter means that it was set anew.
        window_s: how long a part is in front of the camera, seconds.
    """

    def __init__(
        self, config: ModbusTriggerConfig, *, counting: NumberRange | None, max_gap: int, window_s: float
    ) -> None:
        self._link = ModbusLink(config.host, config.port, timeout_s=config.timeout_s)
        self.name = self._link.address
        self._config = config
        max_interval_s = config.poll_ms / 1000 + window_s
        self._contact = RisingEdge(max_interval_s)
        self._counter = (
            None if counting is None else PartCounter(counting, min(max_gap, counting.size // 2), max_interval_s)
        )
        self._accept: AcceptTrigger | None = None
        self._problem: str | None = "the PLC was not asked yet"
        self._is_up: bool | None = None
        self._thread = BackgroundThread("trigger", self._run, join_s=config.timeout_s + 1)

    def open(self, accept: AcceptTrigger) -> None:
        """Start polling; ``accept`` is called with every trigger."""
        self._accept = accept
        self._thread.start()

    def problem(self) -> str | None:
        """Why no trigger can come at present."""
        return self._problem

    def close(self) -> None:
        """End."""
        self._thread.close()
        self._problem = "the camera is not open"

    def _run(self, stop: threading.Event) -> None:
        poll_s = self._config.poll_ms / 1000
        next_poll = time.monotonic()
        while not stop.is_set():
            try:
                value = self._read()
            except LinkError as exc:
                self._report_state(str(exc))
                stop.wait(RETRY_S)
                next_poll = time.monotonic()
                continue
            self._report_state(None)
            noticed = self._detect(value)
            if noticed is not None and not stop.is_set():
                self._publish(noticed)
            next_poll = max(next_poll + poll_s, time.monotonic())
            stop.wait(next_poll - time.monotonic())
        self._link.close()

    def _detect(self, value: int) -> PolledPart | None:
        now = time.monotonic()
        if self._counter is not None:
            return self._counter.update(value, now)
        return self._contact.update(bool(value), now)

    def _publish(self, noticed: PolledPart) -> None:
        assert self._accept is not None
        if noticed.fault is not None:
            log.warning("trigger_unclear", source=self.name, number=noticed.number, reason=noticed.fault)
        self._accept(
            trigger_now(
                None,
                noticed.number,
                fault=Reason.TRIGGER_UNCLEAR if noticed.fault else None,
                detail=noticed.fault,
            )
        )

    def _read(self) -> int:
        """The contact's level (0 or 1), or the counter's value.

        Raises:
            LinkError: the PLC does not answer, or refuses.
        """
        answer = self._link.request(self._ask)
        if not self._config.is_counter:
            return int(answer.bits[0])
        value = 0
        for word in answer.registers:
            value = value << 16 | word
        return value

    def _ask(self, client: ModbusTcpClient) -> ModbusPDU:
        config = self._config
        if config.coil is not None:
            return client.read_coils(config.coil, device_id=config.unit)
        if config.discrete_input is not None:
            return client.read_discrete_inputs(config.discrete_input, device_id=config.unit)
        if config.register is not None:
            return client.read_holding_registers(config.register, count=config.words, device_id=config.unit)
        assert config.input_register is not None
        return client.read_input_registers(config.input_register, count=config.words, device_id=config.unit)

    def _report_state(self, reason: str | None) -> None:
        self._problem = reason
        if self._is_up != (reason is None):
            self._is_up = reason is None
            if reason is None:
                log.info("trigger_listening", source=self.name)
            else:
                log.error("trigger_lost", source=self.name, reason=reason, meaning="parts may pass unseen")
