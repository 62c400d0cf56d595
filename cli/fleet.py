"""``edgeflame fleet``: make a fleet, and enrol, renew and revoke its members; of its runs see ``cli/fleet_run.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.fleet_run import report, status
from cli.options import SECONDS
from cli.output import cell, echo
from cli.paths import FILE, FOLDER

if TYPE_CHECKING:
    from fleet.folder import FleetFolder


@click.command("init")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--fleet", required=True, metavar="NAME", help="The fleet's name.")
@click.option(
    "--host",
    "hosts",
    required=True,
    multiple=True,
    metavar="HOST",
    help="Name or address by which sites reach the broker; repeat it for more. Kits get the first.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True, help="The broker's port.")
@click.option("--bind", metavar="ADDRESS", help="Where the broker listens.  [default: everywhere]")
@click.option(
    "--install-dir",
    metavar="PATH",
    help="Where DIR/broker will lie on the broker's machine.  [default: where it is made]",
)
@click.option("--plugin", metavar="PATH", help="mosquitto_dynamic_security.so there.  [default: looked for here]")
@click.option("--broker-user", metavar="USER", help="Whom Mosquitto becomes when root starts it.  [default: mosquitto]")
@click.option("--replace", is_flag=True, help="Put a fleet that is in DIR aside (renamed, not deleted).")
def init(
    folder: Path,
    fleet: str,
    hosts: tuple[str, ...],
    port: int,
    bind: str | None,
    install_dir: str | None,
    plugin: str | None,
    broker_user: str | None,
    replace: bool,
) -> None:
    """Make a fleet in DIR: certificate authority, signing key, and everything its Mosquitto needs.

    DIR holds the fleet's secrets and belongs on the administrator's machine. Copy DIR/broker to the broker's machine
    and start Mosquitto with it; give DIR/kits/aggregator.kit to the aggregator; then enrol the sites.
    """
    from fleet.folder import make_fleet

    made = make_fleet(
        folder,
        fleet=fleet,
        hosts=hosts,
        port=port,
        bind=bind,
        install_dir=None if install_dir is None else PurePosixPath(install_dir),
        plugin=None if plugin is None else PurePosixPath(plugin),
        broker_user=broker_user,
        replace=replace,
    )
    where = install_dir or made.broker_files
    echo(f"fleet {fleet} in {folder}, broker {made.registry.url}")
    echo(f"  broker:      mosquitto -c {where}/mosquitto.conf")
    echo(f"  aggregator:  edgeflame aggregate --kit {made.kit_path('aggregator')} --state DIR")
    echo(f"  a site:      edgeflame fleet enrol {folder} NAME --offline   (without --offline once the broker runs)")
    echo(f"  packages:    edgeflame model sign F.edgeflame --key {folder}/signing/edgeflame-key.pem")


F = TypeVar("F", bound=Callable[..., Any])

_FOLDER = click.argument("folder", metavar="DIR", type=FOLDER)
_NAME = click.argument("name", metavar="NAME")
_OUT = click.option("--out", type=FILE, metavar="FILE", help="Kit.  [default: DIR/kits/NAME.kit]")
_DAYS = click.option(
    "--days", type=click.IntRange(1, 3650), default=825, show_default=True, help="How long the certificate is valid."
)


def _reaches_the_broker(function: F) -> F:
    for option in (
        click.option(
            "--broker", metavar="URL", help="The broker, where it is reached otherwise from here.  [default: the kits']"
        ),
        click.option(
            "--connect-timeout", type=SECONDS, default=5.0, show_default=True, metavar="S", help="How long to try."
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
    from fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        kit = fleet.enrol(name, role=role, days=days, out=out, reinstate=reinstate)
        echo(f"{role} {name}: {kit}, valid for {days} days")
        if not offline:
            _sync_broker_if_running(fleet, broker, connect_timeout)
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
    from fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        made = fleet.renew(name, days=days, out=out, revoke_old=revoke_old)
        echo(f"{name}: {made}, valid for {days} days")
        if name == "broker":
            echo("copy server.crt and server.key to the broker's machine, and make it load them (SIGHUP)")
        if revoke_old:
            _echo_revocation_list(fleet)


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
    from fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        fleet.revoke(name, reason=reason)
        fleet.write_access()
        try:
            was_notified = _sync_broker(fleet, broker, connect_timeout, goodbye=(name, reason))
        except EdgeFlameError as exc:
            raise LinkError(
                f"{name} is revoked in {folder}, but NOT YET on the broker: {exc}; run `edgeflame fleet sync {folder}`"
            ) from exc
        echo(f"{name}: revoked{', told and thrown out' if was_notified else ''}; it has no rights on the broker")
        _echo_revocation_list(fleet)


@click.command("sync")
@_FOLDER
@_reaches_the_broker
def sync(folder: Path, broker: str | None, connect_timeout: float) -> None:
    """Make a running broker know exactly what DIR says about its members; safe to repeat."""
    from fleet.folder import open_fleet

    with open_fleet(folder) as fleet:
        _sync_broker(fleet, broker, connect_timeout)
        fleet.write_access()
        echo(f"the broker knows the {len(fleet.registry.clients())} members of {fleet.registry.fleet}")


@click.command("members")
@_FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def members(folder: Path, as_json: bool) -> None:
    """List a fleet's members, and when their certificates expire. Exit code 1 if one has expired."""
    from datetime import datetime, timezone

    from cli.output import print_json
    from edgeflame.errors import NegativeAnswerError
    from edgeflame.mqtt.kit import EXPIRY_WARNING
    from fleet.folder import open_fleet

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

        table = Table(box=None, pad_edge=False, title=f"fleet {registry.fleet}, {registry.url}", title_justify="left")
        for heading in ("name", "role", "certificate until", "days left", "state"):
            table.add_column(heading)
        for entry, row in zip(registry.identities, rows, strict=True):
            soon = entry.not_after - now < EXPIRY_WARNING
            state = "active" if entry.revoked_at is None else f"revoked {entry.revoked_at:%Y-%m-%d} {entry.reason}"
            style = "dim" if entry.revoked_at else "yellow" if soon else ""
            cells = (entry.name, entry.role, f"{entry.not_after:%Y-%m-%d}", str(row["days_left"]), state)
            table.add_row(*(cell(one, style=style) for one in cells))
        Console().print(table)
    expired = [entry.name for entry in registry.identities if entry.not_after <= now and entry.revoked_at is None]
    if expired:
        raise NegativeAnswerError(f"expired: {', '.join(expired)}; edgeflame fleet renew {folder} NAME")


def _sync_broker_if_running(fleet: FleetFolder, broker: str | None, connect_timeout: float) -> None:
    """Give the broker the fleet's rights if it can be reached; if not, print how to do it later."""
    from edgeflame.errors import LinkError

    try:
        _sync_broker(fleet, broker, connect_timeout)
    except LinkError as exc:
        echo(
            f"no broker was told ({exc}); the rights are in {fleet.broker_files} for its first start. If it runs "
            f"elsewhere: edgeflame fleet sync {fleet.path}",
            err=True,
        )
    else:
        echo("the broker was told")


def _sync_broker(
    fleet: FleetFolder, broker: str | None, connect_timeout: float, *, goodbye: tuple[str, str] | None = None
) -> bool:
    """Give the broker the fleet's rights.

    Args:
        fleet: the fleet.
        broker: its address, in place of that of the administrator's kit.
        connect_timeout: how long to try, seconds.
        goodbye: a revoked member and the reason, which is sent to it first.

    Returns:
        Whether the member of ``goodbye`` was connected and was sent the reason.
    """
    from fleet.broker_control import BrokerControl

    url = fleet.admin_kit().broker_url(broker)
    with BrokerControl(url, fleet=fleet.registry.fleet, connect_timeout_s=connect_timeout) as control:
        was_notified = goodbye is not None and control.notify_revoked(*goodbye)
        control.sync(fleet.registry.clients())
    return was_notified


def _echo_revocation_list(fleet: FleetFolder) -> None:
    echo(
        f"copy {fleet.broker_files / 'crl.pem'} to the broker's machine as well and make it load it (SIGHUP): "
        "from then on TLS refuses the old certificates too"
    )


@click.group("fleet")
def command() -> None:
    """Make a fleet, give its sites their kits and take them back, and see how it is doing."""


for _other in (init, enrol, renew, revoke, sync, members, status, report):
    command.add_command(_other)
