"""The options of commands that talk to a broker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from datetime import datetime

    from edgeflame.brokerurl import BrokerUrl

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)


metrics_option = click.option(
    "--metrics", metavar="HOST:PORT", help="Figures for Prometheus, at http://HOST:PORT/metrics."
)


def link_options() -> Callable[[F], F]:
    """``--broker``, ``--kit``, ``--ca``, ``--cert``, ``--key`` and ``--connect-timeout``."""
    options = (
        click.option(
            "--broker",
            metavar="URL",
            help="mqtt://[user@]host[:port], or mqtts://; the password from EDGEFLAME_MQTT_PASSWORD.",
        ),
        click.option(
            "--kit", type=_FILE, help="A kit of `edgeflame fleet`: the broker, the fleet, our name and certificate."
        ),
        click.option("--ca", type=_FILE, help="mqtts: certificate authority of the broker (PEM)."),
        click.option("--cert", type=_FILE, help="mqtts: our certificate (PEM)."),
        click.option("--key", type=_FILE, help="mqtts: our private key (PEM)."),
        click.option(
            "--connect-timeout",
            type=float,
            metavar="S",
            help="Give up when the broker was not reached in S seconds [default: try for ever].",
        ),
    )

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@dataclass(frozen=True, kw_only=True)
class Contact:
    """The broker, and what a kit says about us; without one the options must say it."""

    url: BrokerUrl
    fleet: str | None = None
    name: str | None = None
    certificate_expires: datetime | None = None


def contact(
    broker: str | None,
    *,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    role: str | tuple[str, ...],
) -> Contact:
    """The options as a :class:`Contact`.

    Args:
        broker: wins over the kit's address.
        kit: made for ``role``.
        ca: in place of a kit, with
        cert: and
        key: as files.
        role: what the command is in the fleet, or may be.

    Raises:
        UsageError: they make none, or contradict each other.
        ConfigError: the kit is none.
        LinkError: the kit has expired.
    """
    from edgeflame.brokerurl import TlsFiles, parse_broker_url
    from edgeflame.errors import UsageError

    if kit is None:
        if broker is None:
            msg = "--broker or --kit: one of them has to say where the broker is"
            raise UsageError(msg)
        return Contact(url=parse_broker_url(broker, tls=TlsFiles(ca=ca, cert=cert, key=key)))
    if ca or cert or key:
        msg = "--kit holds the certificates; --ca, --cert and --key are for those without one"
        raise UsageError(msg)
    from edgeflame.fleet.kit import read_kit

    opened = read_kit(kit)
    roles = (role,) if isinstance(role, str) else role
    if opened.role not in roles:
        msg = (
            f"{kit}: the kit of the {opened.role} {opened.name!r}; this command takes the kit of one enrolled as "
            f"{' or '.join(roles)}"
        )
        raise UsageError(msg)
    return Contact(
        url=opened.broker_url(broker), fleet=opened.fleet, name=opened.name, certificate_expires=opened.expires
    )


def agreed(option: str, given: str | None, from_kit: str | None) -> str:
    """What an option and a kit say together.

    Raises:
        UsageError: nothing, or not the same.
    """
    from edgeflame.errors import UsageError

    if given and from_kit and given != from_kit:
        msg = f"{option} {given!r}: the kit is made for {from_kit!r}; leave the option out, or take the right kit"
        raise UsageError(msg)
    value = given or from_kit
    if not value:
        msg = f"{option}: missing, as an option and in a kit or configuration file"
        raise UsageError(msg)
    return value
