"""A kit: the one small file that makes a machine a member of a fleet.

It is TOML, so that whoever receives it can read what it is: the fleet, the name, the role, the broker's address, and
in PEM the authority's certificate, its own certificate and its private key. Whoever holds the file *is* that member.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgeflame import __version__
from edgeflame.bounds import SECRET
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, LinkError
from edgeflame.log import EventLog
from edgeflame.mqtt.topics import check_name
from edgeflame.mqtt.url import BrokerUrl, TlsPem, parse_broker_url
from edgeflame.state import FormatHead

FleetRole = Literal["site", "line", "observer", "operator", "publisher", "aggregator", "admin", "broker"]

log = EventLog("kit")

KIT_FORMAT = 1
EXPIRY_WARNING = timedelta(days=30)
_MAX_BYTES = 1 << 16

_USAGE_BY_ROLE: dict[str, str] = {
    "site": "edgeflame train --kit {name}.kit --data GOOD-PARTS --out {name}.edgeflame",
    "line": 'edgeflame inspect --config line.toml ..., with kit = "{name}.kit" in its section [mqtt]',
    "observer": "edgeflame fleet status --kit {name}.kit",
    "operator": "edgeflame line status LINE --kit {name}.kit",
    "publisher": "edgeflame model publish F.edgeflame --kit {name}.kit",
    "aggregator": "edgeflame aggregate --kit {name}.kit --state DIR",
    "admin": "edgeflame fleet enrol, revoke and sync use it; it stays in the fleet's folder",
}


class Kit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's contents."""

    format: Literal[1] = 1
    fleet: str
    name: str
    """What the holder is called: a site's name, say."""
    role: FleetRole
    broker: str
    """``mqtts://host:port``."""
    expires: datetime
    """End of the certificate's validity."""
    ca: str
    cert: str
    key: Annotated[str, SECRET]

    def __repr__(self) -> str:
        return f"Kit(fleet={self.fleet!r}, name={self.name!r}, role={self.role!r}, broker={self.broker!r})"

    def broker_url(self, override: str | None = None) -> BrokerUrl:
        """The broker, and who we are to it; ``override`` is another address for it.

        Raises:
            UsageError: not an address of a broker, or not ``mqtts://``.
        """
        pem = TlsPem(ca=self.ca, cert=self.cert, key=self.key, name=self.name)
        return parse_broker_url(override or self.broker, tls=pem)


def encode_kit(kit: Kit) -> bytes:
    """The file of a kit."""
    lines = [
        f"# EdgeFlame kit: makes its holder the {kit.role} {kit.name} of the fleet {kit.fleet}. KEEP IT SECRET.",
        f"#   {_USAGE_BY_ROLE[kit.role].format(name=kit.name)}",
        f"# Valid until {kit.expires:%Y-%m-%d}. Lost, or seen by others: edgeflame fleet revoke FOLDER {kit.name}",
    ]
    for name, value in msgspec.structs.asdict(kit).items():
        match value:
            case datetime():
                lines.append(f"{name} = {value.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}")
            case int():
                lines.append(f"{name} = {value}")
            case str() if "\n" in value:
                # PEM: no quotes and no backslashes.
                lines.append(f'{name} = """\n{value.rstrip()}\n"""')
            case _:
                # A JSON string is a TOML one, but for DEL.
                text = msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}")
    return "\n".join(lines).encode() + b"\n"


def read_kit(path: Path, *, now: datetime | None = None, must_be_valid: bool = True) -> Kit:
    """Read a kit; one that will expire soon, or that others can read, is worth a warning.

    Args:
        path: the file.
        now: the time; None: the clock's.
        must_be_valid: whether an expired kit is an error; if false, for callers that can work without the broker, it
            is only logged.

    Raises:
        ConfigError: it cannot be read, or is not a kit.
        LinkError: it has expired.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES)
        mode = path.stat().st_mode
    except OSError as exc:
        raise ConfigError(
            f"{path}: the kit cannot be read ({exc.strerror}); `edgeflame fleet enrol` makes one"
        ) from exc
    head = parse_config(data, FormatHead, f"{path}: not a kit of `edgeflame fleet enrol`")
    if head.format > KIT_FORMAT:
        raise ConfigError(
            f"{path}: not a kit this EdgeFlame {__version__} can use: it is of format {head.format}, "
            f"known are those up to {KIT_FORMAT}; upgrade EdgeFlame on this machine"
        )
    kit = parse_config(data, Kit, f"{path}: not a kit of `edgeflame fleet enrol`")
    check_name("fleet", kit.fleet)
    check_name(kit.role, kit.name)
    if mode & 0o077:
        log.warning("kit_readable_by_others", file=str(path), advice=f"chmod 600 {path}")
    left = _utc(kit.expires) - (now or datetime.now(timezone.utc))
    if left <= timedelta(0):
        msg = (
            f"{path}: the certificate of {kit.role} {kit.name} expired on {kit.expires:%Y-%m-%d}; ask whoever runs the "
            f"fleet for a new kit (edgeflame fleet renew FOLDER {kit.name}), and check this machine's clock"
        )
        if must_be_valid:
            raise LinkError(msg)
        log.error("kit_expired", file=str(path), advice=f"edgeflame fleet renew FOLDER {kit.name}")
    elif left < EXPIRY_WARNING:
        advice = f"edgeflame fleet renew FOLDER {kit.name}"
        log.warning("kit_expires_soon", name=kit.name, days=left.days, advice=advice)
    return kit


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
