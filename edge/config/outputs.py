"""Sections for a daemon's results and models: ``[outbox]``, ``[delivery]``, ``[mqtt]``, ``[webhook]``, ``[modbus]``,
``[rejects]``, ``[web]`` and ``[models]``.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from edgeflame.errors import ConfigError, UsageError
from edgeflame.mqtt.messages import MAX_OUTCOMES, MAX_SHADOW_PARTS
from edgeflame.mqtt.topics import check_name


class OutboxConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[outbox]``."""

    history: int = 10_000
    """Delivered results kept for looking back; about 600 bytes each."""
    max_results: int = 1_000_000
    """Results kept at most, delivered or not. At one part a second, eleven days without a broker."""

    def __post_init__(self) -> None:
        if not 0 <= self.history <= self.max_results:
            raise ConfigError(f"outbox.history must be 0..max_results, not {self.history} with {self.max_results}")
        if self.max_results < 1:
            raise ConfigError(f"outbox.max_results must be at least 1, not {self.max_results}")


class DeliveryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[delivery]``: how destinations are tried again."""

    first_delay_s: float = 0.5
    """Before the second attempt."""
    max_delay_s: float = 30.0
    """Between attempts: doubles from the first to this, less up to half of it by chance."""
    flush_s: float = 3.0
    """At the end of a run, how long results may still be delivered; the rest goes out at the next start."""

    def __post_init__(self) -> None:
        if not 0 < self.first_delay_s <= self.max_delay_s <= 3600:
            raise ConfigError(
                f"delivery: 0 < first_delay_s <= max_delay_s <= 3600, not {self.first_delay_s} and {self.max_delay_s}"
            )
        if not 0 <= self.flush_s <= 60:
            raise ConfigError(f"delivery.flush_s must be 0..60, not {self.flush_s}")


class MqttConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[mqtt]``."""

    broker: str | None = None
    """``mqtt://[user@]host[:port]`` or ``mqtts://``; the password from ``EDGEFLAME_MQTT_PASSWORD``. A kit has it."""
    fleet: str
    """Which fleet."""
    line: str
    """Name of this line; two daemons never share one."""
    ca: str | None = None
    """``mqtts``: certificate authority of the broker (PEM)."""
    cert: str | None = None
    """``mqtts``: this line's certificate (PEM)."""
    key: str | None = None
    """``mqtts``: this line's private key (PEM)."""
    kit: str | None = None
    """A kit of ``edgeflame fleet enrol --role line``, made for this fleet and line, in place of those files."""
    home_assistant: str | None = None
    """Home Assistant's discovery prefix, ``homeassistant`` as it comes; left out: not announced there."""
    timeout_s: float = 10.0
    """Without an answer from the broker for so long, the connection is given up and made anew."""

    def __post_init__(self) -> None:
        try:
            check_name("fleet", self.fleet)
            check_name("line", self.line)
        except UsageError as exc:
            raise ConfigError(f"mqtt: {exc}") from exc
        if self.broker is None and self.kit is None:
            raise ConfigError("mqtt: broker or kit has to say where the broker is")
        if self.kit is not None and (self.ca or self.cert or self.key):
            raise ConfigError("mqtt.kit holds the certificates; ca, cert and key are for those without one")
        if not 0.1 <= self.timeout_s <= 600:
            raise ConfigError(f"mqtt.timeout_s must be 0.1..600, not {self.timeout_s}")
        if self.home_assistant is not None and (
            not self.home_assistant or any(sign in self.home_assistant for sign in "+#")
        ):
            raise ConfigError(
                f"mqtt.home_assistant must be a topic prefix without wildcards, not {self.home_assistant!r}"
            )


class WebhookConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[webhook]``. A token in ``EDGEFLAME_WEBHOOK_TOKEN`` is sent as ``Authorization: Bearer``."""

    url: str
    """Where results are POSTed."""
    verdicts: tuple[Literal["pass", "fail", "unknown"], ...] = ("pass", "fail", "unknown")
    """Parts that are reported; the others are skipped, and their numbers missing."""
    timeout_s: float = 10.0
    """Of a request."""
    ca: str | None = None
    """Certificate authority of an ``https`` server (PEM); the system's when left out."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(
                f"webhook.url must be http(s)://host[:port]/path without credentials, not {self.url[:200]!r}"
            )
        if not 0.1 <= self.timeout_s <= 600:
            raise ConfigError(f"webhook.timeout_s must be 0.1..600, not {self.timeout_s}")


NUM_REGISTERS = {1: 10, 2: 13}
"""By layout."""


class ModbusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the PLC is, and which of its registers are ours."""

    host: str
    """Name or address of the PLC."""
    port: int = 502
    """Of its Modbus TCP server."""
    unit: int = 1
    """Device id."""
    register: int = 0
    """Address of the first of our holding registers, from 0."""
    layout: Literal[1, 2] = 1
    """1: ten registers. 2: these and three more, for a PLC that announces its parts: the part's own number and what is
    the matter with it."""
    heartbeat_s: float = 0.5
    """How often the register +3 changes."""
    timeout_s: float = 1.0
    """Of a request."""

    def __post_init__(self) -> None:
        rules = (
            (bool(self.host), "modbus.host must not be empty", self.host),
            (1 <= self.port <= 65535, "modbus.port must be 1..65535", self.port),
            (0 <= self.unit <= 255, "modbus.unit must be 0..255", self.unit),
            (
                0 <= self.register <= 65536 - self.num_registers,
                f"modbus.register must be 0..{65536 - self.num_registers}",
                self.register,
            ),
            (0.05 <= self.heartbeat_s <= 60, "modbus.heartbeat_s must be 0.05..60", self.heartbeat_s),
            (0.05 <= self.timeout_s <= 60, "modbus.timeout_s must be 0.05..60", self.timeout_s),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")

    @property
    def num_registers(self) -> int:
        """Of the layout."""
        return NUM_REGISTERS[self.layout]


class RejectsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[rejects]``. Whichever bound is reached first, the oldest pictures go."""

    max_count: int = 1000
    """Pictures kept at most."""
    max_mib: float = 1000.0
    """MiB that they may take together."""
    max_age_days: float | None = None
    """Days after which a picture goes; left out: its age does not matter."""

    def __post_init__(self) -> None:
        rules = (
            (self.max_count >= 1, "rejects.max_count must be at least 1", self.max_count),
            (self.max_mib > 0, "rejects.max_mib must be > 0", self.max_mib),
            (self.max_age_days is None or self.max_age_days > 0, "rejects.max_age_days must be > 0", self.max_age_days),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")


_LISTEN = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})", re.ASCII)


class WebConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the page is served, and how much it remembers."""

    listen: str = "127.0.0.1:8080"
    """``host:port``; ``0.0.0.0:8080`` for every interface: whoever reaches it sees the pictures."""
    stale_after_s: float = 30.0
    """Without a part for so long the line is not ready (``/readiness``), and the page says so."""
    recent: int = 8
    """Last parts whose picture is kept in memory, whatever their verdict."""
    rejects: int = 12
    """Last failed and unknown parts whose picture is kept in memory."""
    history: int = 300
    """Scores shown in the chart."""
    max_marks: int = 10_000
    """Parts that operators said something about and whose pictures are kept for the next training. They are never
    deleted: beyond these a mark is refused."""

    def __post_init__(self) -> None:
        match = _LISTEN.fullmatch(self.listen)
        if match is None or not 0 <= int(match["port"]) <= 65535:
            raise ConfigError(f"web.listen must be host:port, not {self.listen[:100]!r}")
        rules = (
            (self.stale_after_s > 0, "web.stale_after_s must be > 0", self.stale_after_s),
            (1 <= self.recent <= 100, "web.recent must be 1..100", self.recent),
            (1 <= self.rejects <= 100, "web.rejects must be 1..100", self.rejects),
            (self.max_marks >= 1, "web.max_marks must be at least 1", self.max_marks),
            (10 <= self.history <= 10_000, "web.history must be 10..10000", self.history),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ConfigError(f"{rule}, not {value}")

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])


class ModelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[models]``; needs ``[mqtt]`` and ``--state``."""

    public_keys: tuple[str, ...]
    """Files of the keys that are trusted (``edgeflame-key.pub``). A package that none of them signed is refused, also
    one that was taken while its key still stood here."""
    shadow_parts: int = 200
    """A new model first judges so many parts beside the present one; 0: it is switched to as soon as it is checked."""
    max_disagreement: float = 0.02
    """Share of these parts on which the two verdicts may differ."""
    max_slowdown: float = 1.5
    """How many times the present model's computing time for a part a new one may take."""
    trial_parts: int = 2000
    """For so many parts after a switch the model before judges along, and the new one is rolled back if it proves bad;
    0: never by itself."""
    max_faults: int = 3
    """Parts on trial that the new model's own failures may leave without a score, of any 100 in a row, before it is
    rolled back."""
    auto: bool = True
    """Switch when the shadow run is passed; otherwise wait for a person's word."""
    keep: int = 2
    """Earlier released models kept to roll back to, besides the configuration's own file."""
    max_bytes: int = 2 << 30
    """Larger packages are refused before they are fetched."""

    def __post_init__(self) -> None:
        checks = (
            (bool(self.public_keys), "models.public_keys: at least one key file; nothing unsigned is ever taken"),
            (0 <= self.shadow_parts <= MAX_SHADOW_PARTS, f"models.shadow_parts must be 0..{MAX_SHADOW_PARTS}"),
            (0 <= self.max_disagreement <= 0.5, "models.max_disagreement must be 0..0.5"),
            (1 <= self.max_slowdown <= 100, "models.max_slowdown must be 1..100"),
            (0 <= self.trial_parts <= 10_000_000, "models.trial_parts must be 0..10000000"),
            (1 <= self.max_faults <= 100, "models.max_faults must be 1..100"),
            (1 <= self.keep < MAX_OUTCOMES, f"models.keep must be 1..{MAX_OUTCOMES - 1}"),
            (1 <= self.max_bytes <= 64 << 30, "models.max_bytes must be 1..68719476736"),
        )
        for is_good, expected in checks:
            if not is_good:
                raise ConfigError(expected)
