"""``edgeflame fleet enrol|renew|revoke|sync|members``: who belongs to a fleet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgeflame.fleet.folder import FleetFolder

F = TypeVar("F", bound=Callable[..., Any])

_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
_NAME = click.argument("name", metavar="NAME")
_OUT = click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Kit.  [default: DIR/kits/NAME.kit]"
)
_DAYS = click.option(
    "--days", type=click.IntRange(1, 3650), default=825, show_default=True, help="How long the certificate is valid."
)


def _reaches_the_broker(function: F) -> F:
    for option in (
        click.option(
            "--broker", metavar="URL", help="The broker, where it is reached otherwise from here.  [default: the kits']"
        ),
        click.option(
            "--connect-timeout", type=float, default=5.0, show_default=True, metavar="S", help="How long to try."
        ),
    ):
        function = option(function)
    return function


@click.command("enrol")
@_FOLDER
@_NAME
@click.option(
    "--role",
    type=click.Choice(["site", "line", "observer", "operator", "publisher"]),
    default="site",
    show_default=True,
    help="site: trains. line: inspects. observer: only watches. operator: commands lines. publisher: brings models to "
    "lines.",
)
@_DAYS
@_OUT
@click.option("--reinstate", is_flag=True, help="Take a revoked name in again.")
@click.option("--offline", is_flag=True, help="Do not look for the broker: it is not started yet.")
@_reaches_the_broker
def enrol(
    folder: Path,
    name: str,
    role: Any,
    days: int,
    out: Path | None,
    reinstate: bool,
    offline: bool,
    broker: str | None,
    connect_timeout: float,
) -> None:
    """Take NAME into the fleet in DIR, and write its kit: one file, to be handed over in secret.

    A broker that runs learns of it at once. If none can be reached, the rights go into DIR/broker for its next start.
    """
    from edgeflame.fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        kit = fleet.enrol(name, role=role, days=days, out=out, reinstate=reinstate)
        click.echo(f"{role} {name}: {kit}, valid for {days} days")
        if not offline:
            _tell_or_keep(fleet, broker, connect_timeout)
        fleet.write_access()


@click.command("renew")
@_FOLDER
@_NAME
@_DAYS
@_OUT
@click.option("--revoke-old", is_flag=True, help="Put the earlier certificates on the revocation list.")
def renew(folder: Path, name: str, days: int, out: Path | None, revoke_old: bool) -> None:
    """Give NAME a new certificate; the broker's own is called `broker`.

    The old one works until it expires, so that a site may change when it suits it.
    """
    from edgeflame.fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        made = fleet.renew(name, days=days, out=out, revoke_old=revoke_old)
        click.echo(f"{name}: {made}, valid for {days} days")
        if name == "broker":
            click.echo("copy server.crt and server.key to the broker's machine, and make it load them (SIGHUP)")
        if revoke_old:
            _tell_revocation_list(fleet)


@click.command("revoke")
@_FOLDER
@_NAME
@click.option("--reason", default="", metavar="TEXT", help="Told to the site, if it is connected.")
@_reaches_the_broker
def revoke(folder: Path, name: str, reason: str, broker: str | None, connect_timeout: float) -> None:
    """Take NAME's rights away, at once: a connected one is told why and thrown out; the others go on.

    If the broker cannot be reached this ends with exit code 7, and the rights are in force until `sync` succeeds.
    """
    from edgeflame.errors import EdgeFlameError, LinkError
    from edgeflame.fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        fleet.revoke(name, reason=reason)
        fleet.write_access()
        try:
            told = _tell(fleet, broker, connect_timeout, goodbye=(name, reason))
        except EdgeFlameError as exc:
            msg = (
                f"{name} is revoked in {folder}, but NOT YET on the broker: {exc}; run `edgeflame fleet sync {folder}`"
            )
            raise LinkError(msg) from exc
        click.echo(f"{name}: revoked{', told and thrown out' if told else ''}; it has no rights on the broker")
        _tell_revocation_list(fleet)


@click.command("sync")
@_FOLDER
@_reaches_the_broker
def sync(folder: Path, broker: str | None, connect_timeout: float) -> None:
    """Make a running broker know exactly what DIR says about its members; safe to repeat."""
    from edgeflame.fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        _tell(fleet, broker, connect_timeout)
        fleet.write_access()
        click.echo(f"the broker knows the {len(fleet.registry.clients())} members of {fleet.registry.fleet}")


@click.command("members")
@_FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def members(folder: Path, as_json: bool) -> None:
    """List a fleet's members, and when their certificates expire. Exit code 1 if one has expired."""
    from datetime import datetime, timezone

    from edgeflame.console import print_json
    from edgeflame.errors import NegativeAnswerError
    from edgeflame.fleet.folder import open_fleet
    from edgeflame.fleet.kit import EXPIRY_WARNING

    with open_fleet(folder) as fleet:
        registry = fleet.registry
    now = datetime.now(timezone.utc)
    rows = [
        {
            "name": entry.name,
            "role": entry.role,
            "expires": entry.not_after,
            "days_left": (entry.not_after - now).days,
            "revoked": entry.revoked_at,
            "reason": entry.reason,
        }
        for entry in registry.identities
    ]
    if as_json:
        print_json({"fleet": registry.fleet, "broker": registry.url, "members": rows})
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, title=f"fleet {registry.fleet}, {registry.url}", title_justify="left")
        for heading in ("name", "role", "certificate until", "days left", "state"):
            table.add_column(heading)
        for entry, row in zip(registry.identities, rows, strict=True):
            soon = entry.not_after - now < EXPIRY_WARNING
            state = "active" if entry.revoked_at is None else f"revoked {entry.revoked_at:%Y-%m-%d} {entry.reason}"
            style = "dim" if entry.revoked_at else "yellow" if soon else ""
            cells = (entry.name, entry.role, f"{entry.not_after:%Y-%m-%d}", str(row["days_left"]), state)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        Console().print(table)
    expired = [entry.name for entry in registry.identities if entry.not_after <= now and entry.revoked_at is None]
    if expired:
        msg = f"expired: {', '.join(expired)}; edgeflame fleet renew {folder} NAME"
        raise NegativeAnswerError(msg)


def _tell_or_keep(fleet: FleetFolder, broker: str | None, connect_timeout: float) -> None:
    """Tell the broker, or a broker that is started later."""
    from edgeflame.errors import LinkError

    try:
        _tell(fleet, broker, connect_timeout)
    except LinkError as exc:
        click.echo(
            f"no broker was told ({exc}); the rights are in {fleet.broker_files} for its first start. If it runs "
            f"elsewhere: edgeflame fleet sync {fleet.path}",
            err=True,
        )
    else:
        click.echo("the broker was told")


def _tell(
    fleet: FleetFolder, broker: str | None, connect_timeout: float, *, goodbye: tuple[str, str] | None = None
) -> bool:
    """Bring the broker up to date; whether somebody was there to say goodbye to."""
    from edgeflame.fleet.control import Control

    url = fleet.admin_kit().broker_url(broker)
    with Control(url, fleet=fleet.registry.fleet, connect_timeout_s=connect_timeout) as control:
        told = goodbye is not None and control.say_goodbye(*goodbye)
        control.sync(fleet.registry.clients())
    return told


def _tell_revocation_list(fleet: FleetFolder) -> None:
    click.echo(
        f"copy {fleet.broker_files / 'crl.pem'} to the broker's machine as well and make it load it (SIGHUP): "
        "from then on TLS refuses the old certificates too"
    )
