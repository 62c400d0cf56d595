"""Sections for a daemon's results and models: ``[images]``, ``[outbox]``, ``[retry]``, ``[mqtt]``, ``[webhook]``,
``[modbus]``, ``[web]`` and ``[models]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edge.config.inspection import DeviceId, RequestTimeout
from edgeflame.bounds import BASIC, Count, NotEmpty, Port, Positive, Register, Seconds
from edgeflame.errors import ConfigError, UsageError
from edgeflame.masking import without_secrets
from edgeflame.mqtt.release_messages import MAX_OUTCOMES, MAX_SHADOW_PARTS
from edgeflame.mqtt.topics import check_name

TopicPrefix = Annotated[str, Meta(pattern="^[^+#]+$", description="a topic prefix without wildcards")]
"""The beginning of MQTT topics."""
AnswerTimeout = Annotated[float, Meta(ge=0.1, le=600)]
"""How long a server's answer may take, seconds."""


class OutboxConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[outbox]``."""

    history: Annotated[int, Meta(ge=0, le=10**9)] = 10_000
    """Delivered results kept for looking back; about 600 bytes each."""
    max_results: Count = 1_000_000
    """The most results that are kept, delivered or not. At one part a second, eleven days without a broker."""

    def __post_init__(self) -> None:
        if self.history > self.max_results:
            raise ConfigError(f"outbox.history must be 0..max_results, not {self.history} with {self.max_results}")


class RetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[retry]``: how results are delivered again where a destination did not take them."""

    first_delay_s: Annotated[float, Meta(gt=0, le=3600)] = 0.5
    """Time before the second attempt."""
    max_delay_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    """Longest time between attempts: it doubles from the first to this, less up to half of it by chance."""
    flush_s: Annotated[float, Meta(ge=0, le=60)] = 3.0
    """How long results may still be delivered at the end of a run; the rest goes out at the next start."""

    def __post_init__(self) -> None:
        if self.first_delay_s > self.max_delay_s:
            raise ConfigError(
                f"retry.first_delay_s must be <= max_delay_s, not {self.first_delay_s:g} with {self.max_delay_s:g}"
            )


class MqttConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[mqtt]``."""

    broker: Annotated[NotEmpty | None, BASIC] = None
    """``mqtt://[user@]host[:port]`` or ``mqtts://``, or through a web server's port ``ws://host/path`` or ``wss://``;
    the password from ``EDGEFLAME_MQTT_PASSWORD``. Not needed with a kit, which names its broker."""
    fleet: Annotated[str, BASIC]
    """Name of the fleet that the line belongs to."""
    line: Annotated[str, BASIC]
    """Name of this line; no two daemons may share one."""
    ca: NotEmpty | None = None
    """``mqtts``: certificate authority of the broker (PEM)."""
    cert: NotEmpty | None = None
    """``mqtts``: this line's certificate (PEM)."""
    key: NotEmpty | None = None
    """``mqtts``: this line's private key (PEM)."""
    kit: Annotated[NotEmpty | None, BASIC] = None
    """A kit of ``edgeflame fleet enrol --role line``, made for this fleet and line, in place of those files."""
    home_assistant: TopicPrefix | None = None
    """Home Assistant's discovery prefix, by its default ``homeassistant``; if left out, the line is not announced
    there."""
    timeout_s: AnswerTimeout = 10.0
    """Without an answer from the broker for this many seconds, the connection is given up and made anew."""

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


_SCHEME_AND_HOST = re.compile(r"(?:[^/?#]*://)?[^/?#]*")


class WebhookConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[webhook]``. A token in ``EDGEFLAME_WEBHOOK_TOKEN`` is sent as ``Authorization: Bearer``."""

    url: str
    """Where results are POSTed: ``http(s)://host[:port]/path`` without credentials."""
    verdicts: tuple[Literal["pass", "fail", "unknown"], ...] = ("pass", "fail", "unknown")
    """Verdicts of the parts that are posted; the others are skipped, so their numbers are missing."""
    timeout_s: AnswerTimeout = 10.0
    """How long an answer to a request may take, seconds."""
    ca: NotEmpty | None = None
    """Certificate authority of an ``https`` server (PEM); the system's if left out."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_plain = self.url.isascii() and self.url.isprintable() and " " not in self.url and parts.port != 0
            is_sound = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and is_plain
        except ValueError:
            # A port or an IPv6 address that is none; the exception may quote what it is given.
            is_sound = False
        if not is_sound:
            # Of many services the path is the secret.
            scheme_and_host = _SCHEME_AND_HOST.match(without_secrets(self.url))
            assert scheme_and_host is not None
            raise ConfigError(
                "webhook.url must be http(s)://host[:port]/path without credentials, spaces or other letters than "
                f"ASCII's, not {scheme_and_host[0][:200]!r}..."
            )


NUM_REGISTERS = {1: 10, 2: 13}
"""Number of registers by layout."""


class ModbusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[modbus]``: address of the PLC, and the holding registers that verdicts are written to."""

    host: NotEmpty
    """Name or address of the PLC."""
    port: Port = 502
    """TCP port of its Modbus server."""
    unit: DeviceId = 1
    """Device id of the PLC."""
    register: Register = 0
    """Address of the first of our holding registers, from 0."""
    layout: Literal[1, 2] = 1
    """1: ten registers. 2: these and three more, for a PLC that announces its parts: the part's own number and its
    sequence's faults."""
    heartbeat_s: Annotated[float, Meta(ge=0.05, le=60)] = 0.5
    """Time between two changes of the register +3."""
    timeout_s: RequestTimeout = 1.0
    """How long an answer to a request may take, seconds."""

    def __post_init__(self) -> None:
        if self.register > 65536 - self.num_registers:
            raise ConfigError(f"modbus.register must be 0..{65536 - self.num_registers}, not {self.register}")

    @property
    def num_registers(self) -> int:
        """Number of registers that the layout has."""
        return NUM_REGISTERS[self.layout]


class ImagesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[images]``, the pictures of failed and unknown parts. The oldest go as soon as one bound is reached."""

    max_count: Annotated[Count, BASIC] = 1000
    """The most pictures that are kept."""
    max_mib: Positive = 1000.0
    """The most disk that they may take together, MiB."""
    max_age_days: Annotated[float, Meta(gt=0, le=36_500)] | None = None
    """Days after which a picture is deleted; if left out, its age does not matter."""


HostName = Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{1,253}$", description="a host's name without a port")]
"""A name of a host."""

_LISTEN = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})", re.ASCII)


class WebConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[web]``: where the page for operators is served, and how much it shows."""

    listen: Annotated[str, BASIC] = "127.0.0.1:8080"
    """``host:port``; ``0.0.0.0:8080`` for every interface: whoever reaches it sees the pictures."""
    names: tuple[HostName, ...] = ()
    """Names under which browsers open the page, as in ``http://line-1.plant.example:8080``. It is always served under
    addresses, ``localhost`` and the machine's own names; other names are refused, since a page elsewhere may have its
    own name lead here."""
    stale_after_s: Seconds = 30.0
    """Without a part for this many seconds the line is not ready (``/readiness``), and the page says so. A watched
    folder is excepted: no file is no fault there."""
    recent: Annotated[int, Meta(ge=1, le=100)] = 8
    """Number of last parts whose pictures are kept in memory, whatever their verdict."""
    rejects: Annotated[int, Meta(ge=1, le=100)] = 12
    """Number of last failed and unknown parts whose pictures are kept in memory."""
    history: Annotated[int, Meta(ge=10, le=10_000)] = 300
    """Number of scores shown in the chart."""
    max_marks: Count = 10_000
    """Number of parts that operators marked and whose pictures are kept for the next training. They are never deleted:
    once there are as many, another mark is refused."""

    def __post_init__(self) -> None:
        match = _LISTEN.fullmatch(self.listen)
        if match is None or not 0 <= int(match["port"]) <= 65535:
            raise ConfigError(f"web.listen must be host:port, not {self.listen[:100]!r}")

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])


class ModelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[models]``; needs ``[mqtt]`` and ``--state``."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"auto": "auto_promote"}

    public_keys: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Files of the public keys that are trusted (``edgeflame-key.pub``). A package that none of them signed is refused,
    also one that was taken while its key was still listed here."""
    shadow_parts: Annotated[int, Meta(ge=0, le=MAX_SHADOW_PARTS)] = 200
    """Number of parts that a new model first inspects beside the present one; 0: it takes over as soon as it is
    checked."""
    max_disagreement: Annotated[float, Meta(ge=0, le=0.5)] = 0.02
    """Share of these parts on which the two verdicts may differ."""
    max_slowdown: Annotated[float, Meta(ge=1, le=100)] = 1.5
    """How many times the present model's computing time for a part a new one may take."""
    trial_parts: Annotated[int, Meta(ge=0, le=10_000_000)] = 2000
    """Number of parts after a switch that the model before inspects as well; if the new one proves bad, it is rolled
    back. 0: it is never rolled back automatically."""
    max_faults: Annotated[int, Meta(ge=1, le=100)] = 3
    """Parts on trial that the new model's own failures may leave without a score, of any 100 in a row, before it is
    rolled back."""
    auto_promote: bool = True
    """Whether a new model takes over once it has passed its shadow run; otherwise it waits until a person switches."""
    keep: Annotated[int, Meta(ge=1, le=MAX_OUTCOMES - 1)] = 2
    """Earlier released models kept to roll back to, besides the configuration's own file."""
    max_bytes: Annotated[int, Meta(ge=1, le=64 << 30)] = 2 << 30
    """Larger packages are refused before they are fetched."""


class TeachingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[teaching]``: what learning a new product on the line's page may take of the machine."""

    base: NotEmpty | None = None
    """Package, or file of ``edgeflame export --backbone``, whose base network new products are learnt with; if left
    out, that of the package that the camera uses, else of any product of the line, else PyTorch makes it."""
    cores: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """CPU cores for learning; if left out, half of those there are."""
    max_memory_mib: Annotated[float, Meta(ge=64, le=1 << 20)] = 4096.0
    """Learning that takes more memory than this is ended, MiB."""
