"""Triggers from an MQTT broker: one message, one part.

The time of a trigger is that of its arrival, taken first of all on the client's thread: later than the sending by the
way through the broker. Messages sent while the connection is down are not delivered later, since the session is not
kept: an old trigger must not take the image of another part. A retained message has an unknown time and is ignored.
Delivery is at least once: a message repeated by the broker gives a part with the same name.

A message that announces a part is JSON, or the part's name as it is.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from edge.config.inspection import MqttTriggerConfig
from edge.frame import AcceptTrigger, Trigger, trigger_now
from edge.result import Reason
from edgeflame.background import BackgroundThread
from edgeflame.errors import DataError
from edgeflame.log import EventLog
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, Disconnected, ReceivedMessage
from edgeflame.mqtt.url import BrokerUrl

MAX_PAYLOAD_BYTES = 64 * 1024
MAX_NAME_CHARS = 200
MAX_NUMBER = 2**62
"""Largest number of a part; SQLite, PLCs and JavaScript could not hold larger ones."""


@dataclass(frozen=True, kw_only=True)
class PartAnnouncement:
    """The content of a message that announces a part."""

    part_id: str | None
    number: int | None
    time: dt.datetime | None


def read_announcement(
    payload: bytes, *, part_id_key: str = "part_id", number_key: str = "number", time_key: str = "time"
) -> PartAnnouncement:
    """Read a message that announces a part.

    Args:
        payload: a JSON object with these keys (others are ignored), or the part's name as UTF-8 text.
        part_id_key: key of the part's name, a text or an integer.
        number_key: key of the part's number, an integer; may be missing. A part needs a name or a number.
        time_key: key of the time, ISO 8601 with its offset from UTC or seconds since 1970; may be missing.

    Raises:
        DataError: it is neither of them, or a value is not valid.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise DataError(f"{len(payload)} bytes; a part is announced in at most {MAX_PAYLOAD_BYTES}")
    if not payload.lstrip().startswith(b"{"):
        return PartAnnouncement(part_id=_name(_text(payload).strip()), number=None, time=None)
    try:
        message = msgspec.json.decode(payload, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"not JSON ({exc})") from exc
    part_id, number, time = message.get(part_id_key), message.get(number_key), message.get(time_key)
    if number is not None and (type(number) is not int or not 0 <= number <= MAX_NUMBER):
        raise DataError(f"{number_key} must be an integer from 0 to 2^62, not {str(number)[:50]!r}")
    if part_id is None and number is None:
        raise DataError(f"neither {part_id_key} nor {number_key} in it")
    if part_id is not None and type(part_id) is not int and not isinstance(part_id, str):
        raise DataError(f"{part_id_key} must be a text or an integer, not {str(part_id)[:50]!r}")
    return PartAnnouncement(
        part_id=None if part_id is None else _name(str(part_id)),
        number=number,
        time=None if time is None else _time(time, time_key),
    )


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as exc:
        raise DataError("neither JSON nor text") from exc


def _name(text: str) -> str:
    if not (0 < len(text) <= MAX_NAME_CHARS and text.isprintable()):
        raise DataError(f"a part's name has 1 to {MAX_NAME_CHARS} printable characters, not {text[:50]!r}")
    return text


def _time(value: Any, key: str) -> dt.datetime:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return dt.datetime.fromtimestamp(value, dt.timezone.utc)
        time = msgspec.convert(value, dt.datetime)
        if time.tzinfo is None:
            raise ValueError(value)
        return time.astimezone(dt.timezone.utc)
    except (msgspec.ValidationError, ValueError, OverflowError, OSError) as exc:
        raise DataError(
            f"{key} must be an ISO 8601 time with its offset from UTC, or seconds since 1970, not {str(value)[:50]!r}"
        ) from exc


log = EventLog("trigger")

MAX_AHEAD_S, MAX_BEHIND_S = 1.0, 10.0
"""Largest difference of a trigger's time from our clock, seconds. Beyond it the clocks differ, or the message was held
up, and the trigger is unclear."""

RETRY_S = 10.0
"""Time to the next attempt after the broker has refused the connection, seconds."""


class MqttTrigger:
    """Announcements of parts on an MQTT topic.

    Args:
        url: the broker's address and credentials.
        topic: the topic of the messages.
        client_id: unique among the broker's clients.
        config: section ``[trigger.mqtt]``.

    Raises:
        LinkError: the TLS files cannot be used.
    """

    def __init__(self, url: BrokerUrl, *, topic: str, client_id: str, config: MqttTriggerConfig) -> None:
        url.ssl_context()
        self.name = f"{url.address} {topic}"
        self._url = url
        self._topic = topic
        self._client_id = client_id
        self._config = config
        self._accept: AcceptTrigger | None = None
        self._problem: str | None = "no connection to the broker yet"
        self._changed = threading.Condition()
        self._failed = False
        self._thread = BackgroundThread("trigger", self._run, wake=self._notify, join_s=3.0)

    def open(self, accept: AcceptTrigger) -> None:
        """Start listening; connects in the background, again and again. ``accept`` is called with every trigger."""
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
        while not stop.is_set():
            self._failed = False
            link = MqttClient(self._url, client_id=self._client_id, filters=[self._topic], sink=self._on_event)
            link.start()
            with self._changed:
                self._changed.wait_for(lambda: stop.is_set() or self._failed)
            link.close(flush_s=0.0)
            with self._changed:
                self._changed.wait_for(stop.is_set, RETRY_S)

    def _on_event(self, event: ClientEvent) -> None:
        """On the client's thread."""
        match event:
            case ReceivedMessage():
                self._on_message(event)
                event.acknowledge()
            case Connected():
                log.info("trigger_listening", source=self.name)
                self._problem = None
            case Disconnected():
                self._lost(f"the connection to the broker was lost: {event.reason}")
            case ConnectionFailed():
                self._lost(str(event.error))
                self._failed = True
                self._notify()
            case _:
                pass

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _lost(self, reason: str) -> None:
        if not self._thread.stop.is_set():
            log.error("trigger_lost", source=self.name, reason=reason, meaning="parts may pass unseen")
        self._problem = reason

    def _on_message(self, event: ReceivedMessage) -> None:
        assert self._accept is not None
        arrived = trigger_now(None)
        if event.retained:
            log.warning("trigger_ignored", source=self.name, reason="it was retained: of a part of an unknown time")
            return
        if self._thread.stop.is_set():
            return
        config = self._config
        try:
            announced = read_announcement(
                event.payload, part_id_key=config.part_id, number_key=config.number, time_key=config.time
            )
        except DataError as exc:
            log.warning("trigger_unclear", source=self.name, reason=str(exc))
            self._accept(dataclasses.replace(arrived, fault=Reason.TRIGGER_UNCLEAR, detail=f"the trigger: {exc}"))
            return
        trigger = dataclasses.replace(arrived, part_id=announced.part_id, number=announced.number)
        if config.use_time and announced.time is not None:
            trigger = at_time(trigger, announced.time)
        self._accept(trigger)


def at_time(trigger: Trigger, time: dt.datetime) -> Trigger:
    """The trigger with the time that its message gives, or with a fault if that is too far from our clock.

    Args:
        trigger: with the time of its arrival.
        time: the message's, UTC.
    """
    behind_s = (trigger.at_utc - time).total_seconds()
    if not -MAX_AHEAD_S <= behind_s <= MAX_BEHIND_S:
        detail = f"the trigger's time is {abs(behind_s):.3g} s {'behind' if behind_s > 0 else 'ahead of'} our clock"
        return dataclasses.replace(trigger, fault=Reason.TRIGGER_UNCLEAR, detail=detail)
    return dataclasses.replace(trigger, at_s=trigger.at_s - behind_s, at_utc=time)
