"""``edgeflame fleet``: make a fleet, enrol, renew and revoke its members, report on a run, and see how it is doing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.options import SECONDS, BrokerOptions, broker_options
from cli.output import cell, echo

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from fleet.folder import FleetFolder
    from fleet.observe import FleetView


@click.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
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


@click.command("report")
@click.option("--state", type=click.Path(path_type=Path, file_okay=False), help="The aggregator's state folder.")
@click.option(
    "--ledger", "ledger_file", type=click.Path(path_type=Path, dir_okay=False), help="Or a ledger.json by itself."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="The page, HTML."
)
def report(state: Path | None, ledger_file: Path | None, out: Path) -> None:
    """Make a page of a run: loss and metrics by round, who contributed with what weight, who was left out and why.

    The page is one file that loads nothing. With --state it shows a run that is still going as well.
    """
    from cli.pages.fleet_report import render_run_page
    from cli.pages.page import write_page
    from edgeflame.errors import UsageError
    from edgeflame.state import storage_errors

    if (state is None) == (ledger_file is None):
        raise UsageError("--state or --ledger: exactly one of them has to say which run")
    ledger = _from_journal(state) if state is not None else _from_file(ledger_file)
    page = render_run_page(ledger)
    with storage_errors(out, "create the folder of"):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, page)
    echo(f"{out}: run {ledger['run'][:8]}, {ledger['outcome']}, rounds begun: {len(ledger['rounds'])}")


def _from_journal(state: Path) -> dict[str, Any]:
    from aggregator.journal import Journal
    from aggregator.ledger import build_ledger
    from edgeflame.errors import UsageError

    path = state / "journal.sqlite"
    if not path.exists():
        raise UsageError(f"{state}: no journal here; expected the folder given to `edgeflame aggregate --state`")
    with Journal(path) as journal:
        run = journal.last_run()
    if run is None:
        raise UsageError(f"{path}: the journal has no run yet")
    return build_ledger(run)


def _from_file(path: Path | None) -> dict[str, Any]:
    import msgspec

    from edgeflame.errors import DataError

    assert path is not None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"{path}: not a ledger of `edgeflame aggregate` ({exc})") from exc
    expected = {"run", "rounds", "members", "packages", "outcome"}
    if not expected <= found.keys():
        raise DataError(
            f"{path}: not a ledger of `edgeflame aggregate` (without {', '.join(sorted(expected - found.keys()))})"
        )
    return found


COLLECT_S = 2.5
"""Seconds to listen; every site sends at least two heartbeats in this time."""
_REDRAW_S = 0.5


@click.command("status")
@broker_options()
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, or until the run is over.")
@click.option("--json", "as_json", is_flag=True, help="Print what is known as JSON; with --watch a line a second.")
def status(
    broker: BrokerOptions,
    watch: bool,
    as_json: bool,
) -> None:
    """Show a fleet's run and its sites: link, phase, progress, rates, last error.

    It listens for a moment, for every site speaks once a second, and only reads; an observer's kit is enough. Exit
    code 1 if the run failed, or its aggregator is gone.
    """
    from cli.output import print_json
    from edgeflame.errors import NegativeAnswerError
    from edgeflame.mqtt.session import Session
    from edgeflame.mqtt.topics import Topics
    from fleet.observe import FleetView, listen

    access = broker.resolve("observer")
    view = FleetView(Topics(fleet=access.fleet))
    with Session(
        access.url, name="status", filters=view.filters(), connect_timeout_s=broker.connect_timeout
    ) as session:
        wait = functools.partial(listen, session, view)
        if not watch:
            wait(COLLECT_S)
            if as_json:
                print_json(view.as_data(time.monotonic()))
            else:
                _print(_table(view))
        elif as_json:
            wait(COLLECT_S)
            print_json(view.as_data(time.monotonic()))
            while not _is_over(view):
                wait(1.0)
                print_json(view.as_data(time.monotonic()))
        else:
            _watch(wait, view)
    problem = view.problem()
    if problem is not None:
        raise NegativeAnswerError(problem)


def _is_over(view: FleetView) -> bool:
    return view.state is not None and view.state.phase in ("done", "failed")


def _watch(wait: Callable[[float], None], view: FleetView) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if console.is_terminal:
        with Live(_table(view), console=console, auto_refresh=False) as live:
            while not _is_over(view):
                wait(_REDRAW_S)
                live.update(_table(view), refresh=True)
        return
    printed = ""
    wait(COLLECT_S)
    while True:
        line = _line(view)
        if line != printed:
            echo(f"{time.strftime('%H:%M:%S')} {line}")
            printed = line
        if _is_over(view):
            return
        wait(_REDRAW_S)


def _print(renderable: RenderableType) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(renderable)


def _headline(view: FleetView) -> str:
    state = view.state
    if state is None:
        return f"fleet {view.as_data(0.0)['fleet']}: nothing is known yet"
    where = f"round {state.round} of {state.num_rounds}" if state.round else f"{state.num_rounds} rounds to come"
    aggregator = "online" if view.aggregator_online else "OFFLINE"
    return f"run {state.run[:8]}: {state.phase}, {where}; aggregator {aggregator}"


def _line(view: FleetView) -> str:
    now = time.monotonic()
    online = sum(site.link(now) == "online" for site in view.sites.values())
    return f"{_headline(view)}; {online} of {len(view.sites)} sites online"


def _table(view: FleetView) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    now = time.monotonic()
    asked = () if view.state is None else view.state.asked
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("site", "link", "asked", "doing", "progress", "rate", "last error"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("progress", "rate") else "left")
    for _, site in sorted(view.sites.items()):
        link = site.link(now)
        rate = ""
        if site.bytes_per_s:
            rate = f"{site.bytes_per_s / 1e6:.1f} MB/s"
        elif site.steps_per_s:
            rate = f"{site.steps_per_s:.1f} /s"
        # Names and errors come from the network: they are text, never mark-up.
        table.add_row(
            cell(site.name, style="bold"),
            cell(link, style="green" if link == "online" else "red" if link == "offline" else "yellow"),
            cell("yes" if site.name in asked else ""),
            cell(site.activity_text if link != "offline" else "", style="" if site.activity != "wait" else "dim"),
            cell(f"{site.step}/{site.num_steps}" if site.num_steps else ""),
            cell(rate),
            cell(site.error, style="red"),
        )
    failed = view.state is not None and view.state.phase == "failed"
    lines: list[RenderableType] = [cell(_headline(view), style="bold red" if failed else "bold")]
    if failed and view.state is not None:
        lines.append(cell(view.state.detail, style="red"))
    lines.append(table if view.sites else cell("no site has been heard of", style="dim"))
    return Group(*lines)


@click.group("fleet")
def command() -> None:
    """Make a fleet, give its sites their kits and take them back, and see how it is doing."""


for _other in (init, enrol, renew, revoke, sync, members, status, report):
    command.add_command(_other)
