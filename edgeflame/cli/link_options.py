"""The options of commands that talk to a broker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgeflame.brokerurl import BrokerUrl

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)


def link_options(*, broker_required: bool = True) -> Callable[[F], F]:
    """``--broker``, ``--ca``, ``--cert``, ``--key`` and ``--connect-timeout``."""
    options = (
        click.option(
            "--broker",
            metavar="URL",
            required=broker_required,
            help="mqtt://[user@]host[:port], or mqtts://; the password from EDGEFLAME_MQTT_PASSWORD.",
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


def broker_url(text: str, *, ca: Path | None, cert: Path | None, key: Path | None) -> BrokerUrl:
    """The options as a :class:`BrokerUrl`.

    Raises:
        UsageError: they make none.
    """
    from edgeflame.brokerurl import TlsFiles, parse_broker_url

    return parse_broker_url(text, tls=TlsFiles(ca=ca, cert=cert, key=key))
