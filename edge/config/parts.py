"""Sections ``[trigger]`` and ``[parts]``, for each camera."""

from __future__ import annotations

import re

import msgspec

from edgeflame.errors import ConfigError


class MqttTriggerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[trigger.mqtt]``: one message is one part."""

    topic: str | None = None
    """Without wildcards; left out: ``edgeflame/v1/<fleet>/line/<line>/trigger`` of the section ``[mqtt]``."""
    broker: str | None = None
    """``mqtt://[user@]host[:port]`` or ``mqtts://``, the password from ``EDGEFLAME_MQTT_PASSWORD``; left out: that of
    ``[mqtt]``, with its certificates or kit."""
    ca: str | None = None
    """PEM file of the authority of a broker of its own."""
    cert: str | None = None
    """PEM file of our certificate there."""
    key: str | None = None
    """PEM file of its key."""
    part_id: str = "part_id"
    """Key of the part's name in a message that is a JSON object; any other message is the name itself."""
    number: str = "number"
    """Key of the part's number; a message may lack it."""
    time: str = "time"
    """Key of the time at which the part was there, with its offset from UTC; a message may lack it."""
    use_time: bool = False
    """Believe that time rather than that of the message's arrival: only where both clocks are kept together, and
    ``trigger.lookback_ms`` covers the transport."""

    def __post_init__(self) -> None:
        if self.topic is not None and (not self.topic or any(sign in self.topic for sign in "+#\0")):
            raise ConfigError(f"trigger.mqtt.topic must be one topic without wildcards, not {self.topic!r}")
        if self.broker is None and (self.ca or self.cert or self.key):
            raise ConfigError(
                "trigger.mqtt: ca, cert and key are for a broker of its own; [mqtt] has those of its broker"
            )


class ModbusTriggerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[trigger.modbus]``: exactly one of the four places is polled."""

    host: str
    """Name or address of the PLC."""
    port: int = 502
    """Of Modbus TCP."""
    unit: int = 1
    """Device id."""
    register: int | None = None
    """Address, from 0, of a holding register that counts parts: a change is one part, and a jump shows what was
    missed. The form to prefer."""
    input_register: int | None = None
    """The same in an input register."""
    coil: int | None = None
    """Address, from 0, of a coil whose rising edge is one part. A pulse shorter than ``poll_ms`` may go unseen."""
    discrete_input: int | None = None
    """The same of a discrete input."""
    words: int = 1
    """Registers of the counter: 1, or 2 with the high word first."""
    poll_ms: float = 20.0
    """From one request to the next; a trigger is noticed so much later at most, and the time of an answer."""
    timeout_s: float = 1.0
    """Of a request."""

    def __post_init__(self) -> None:
        places = (self.register, self.input_register, self.coil, self.discrete_input)
        address = next((place for place in places if place is not None), 0)
        rules = (
            (bool(self.host), "trigger.modbus.host must not be empty", self.host),
            (1 <= self.port <= 65535, "trigger.modbus.port must be 1..65535", self.port),
            (0 <= self.unit <= 255, "trigger.modbus.unit must be 0..255", self.unit),
            (self.words in (1, 2), "trigger.modbus.words must be 1 or 2", self.words),
            (0 <= address <= 65536 - self.words, "trigger.modbus: an address must be 0..65535", address),
            (1 <= self.poll_ms <= 60_000, "trigger.modbus.poll_ms must be 1..60000", self.poll_ms),
            (0.05 <= self.timeout_s <= 60, "trigger.modbus.timeout_s must be 0.05..60", self.timeout_s),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")
        if sum(place is not None for place in places) != 1:
            raise ConfigError(
                "trigger.modbus needs one of register, input_register, coil and discrete_input, and only one"
            )

    @property
    def is_counter(self) -> bool:
        """Whether it counts parts; else it is a contact."""
        return self.register is not None or self.input_register is not None


class TriggerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[trigger]``; without ``mqtt`` or ``modbus`` every frame is a part."""

    delay_ms: float = 0.0
    """From the trigger to the moment the part is in front of the camera."""
    window_ms: float = 500.0
    """How long it stays there: the first image in this time is the part's."""
    lookback_ms: float = 250.0
    """How long after an image's capture its trigger may reach us; so long images are held."""
    mqtt: MqttTriggerConfig | None = None
    """Messages that announce parts."""
    modbus: ModbusTriggerConfig | None = None
    """A PLC's register or contact that announces parts."""

    def __post_init__(self) -> None:
        if self.mqtt is not None and self.modbus is not None:
            raise ConfigError("trigger: mqtt or modbus, not both")
        rules = (
            (-5000 <= self.delay_ms <= 600_000, "trigger.delay_ms must be -5000..600000", self.delay_ms),
            (1 <= self.window_ms <= 600_000, "trigger.window_ms must be 1..600000", self.window_ms),
            (
                max(0, -self.delay_ms) <= self.lookback_ms <= 10_000,
                "trigger.lookback_ms must cover a negative delay_ms and be at most 10000",
                self.lookback_ms,
            ),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")

    @property
    def is_on(self) -> bool:
        """Whether parts are announced; else every frame is one."""
        return self.mqtt is not None or self.modbus is not None


class PartsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[parts]``."""

    deadline_ms: float | None = None
    """The verdict is out so long after the trigger, or after the capture where there is none: ``unknown``, if the
    model has not answered by then."""
    max_age_ms: float | None = None
    """An image captured longer ago than this when its turn comes is not judged."""
    hang_s: float = 60.0
    """With a deadline: a model that is busy with one image for so long ends the inspection with exit code 12,
    to be started again by whoever supervises it."""
    number: str | None = None
    """Regular expression whose one group is the part's number in its name, for instance ``(\\d+)$``; for parts
    whose trigger gives no number, and for files."""
    wrap: tuple[int, int] | None = None
    """First and last number, where the numbers begin anew after the last; a counter in registers wraps by itself."""
    max_gap: int = 1000
    """A jump by more is a numbering that began anew, not so many missing parts."""
    remembered: int = 1000
    """Parts by whose number or name a repetition is known."""

    def __post_init__(self) -> None:
        rules = (
            (self.deadline_ms is None or 1 <= self.deadline_ms <= 3.6e6, "deadline_ms: 1..3600000", self.deadline_ms),
            (self.max_age_ms is None or 1 <= self.max_age_ms <= 3.6e6, "max_age_ms: 1..3600000", self.max_age_ms),
            (0.1 <= self.hang_s <= 86400, "hang_s must be 0.1..86400", self.hang_s),
            (self.max_gap >= 1, "max_gap must be at least 1", self.max_gap),
            (1 <= self.remembered <= 100_000, "remembered must be 1..100000", self.remembered),
            (
                self.wrap is None or 0 <= self.wrap[0] < self.wrap[1] - 1,
                "wrap must be [first, last], three numbers or more",
                self.wrap,
            ),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"parts.{rule}, not {value}")
        if self.number is not None:
            try:
                groups = re.compile(self.number).groups
            except re.error as exc:
                raise ConfigError(f"parts.number is no regular expression ({exc}): {self.number!r}") from exc
            if groups != 1:
                raise ConfigError(f"parts.number must have one group, for the number, not {groups}: {self.number!r}")
