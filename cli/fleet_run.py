"""``edgeflame fleet status`` and ``edgeflame fleet report``: how a run is doing, and what became of it."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import BrokerOptions, broker_options
from cli.output import cell, echo
from cli.paths import FILE, FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from fleet.observe import FleetView, SiteView


@click.command("report")
@click.option("--state", type=FOLDER, help="The aggregator's state folder.")
@click.option("--ledger", "ledger_file", type=FILE, help="Or a ledger.json by itself.")
@click.option("--out", type=FILE, required=True, metavar="FILE", help="The page, HTML.")
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
    return view.is_finished or (view.state is not None and view.state.phase == "failed")


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
    run, rounds = f"run {state.run[:8]}", f"{state.round} round{'s' * (state.round != 1)}"
    if state.phase == "done":
        stays = "; the aggregator stays, for sites that come late" if view.aggregator_online else ""
        return f"{run}: finished after {rounds}{stays}"
    if state.phase == "failed":
        return f"{run}: FAILED {f'in round {state.round} of {state.num_rounds}' if state.round else 'before round 1'}"
    where = f"round {state.round} of {state.num_rounds}" if state.round else f"{state.num_rounds} rounds to come"
    return f"{run}: {state.phase}, {where}; aggregator {'online' if view.aggregator_online else 'OFFLINE'}"


def _line(view: FleetView) -> str:
    now = time.monotonic()
    online = sum(site.link(now) == "online" for site in view.sites.values())
    # After a good end sites leave: that nobody is there any more is no news.
    sites = "" if view.is_finished else f"; {online} of {len(view.sites)} sites online"
    return f"{_headline(view)}{sites}"


def _link_cell(view: FleetView, site: SiteView, now: float) -> RenderableType:
    link = site.link(now)
    if link == "online":
        return cell(link, style="green")
    if view.is_finished:
        return cell("left", style="dim")
    return cell(link, style="red" if link == "offline" else "yellow")


def _table(view: FleetView) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    now = time.monotonic()
    asked = () if view.state is None else view.state.asked
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("site", "link", "asked", "doing", "progress", "rate", "last error"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("progress", "rate") else "left")
    for _, site in sorted(view.sites.items()):
        rate = ""
        if site.bytes_per_s:
            rate = f"{site.bytes_per_s / 1e6:.1f} MB/s"
        elif site.steps_per_s:
            rate = f"{site.steps_per_s:.1f} /s"
        # Names and errors come from the network: they are text, never mark-up.
        table.add_row(
            cell(site.name, style="bold"),
            _link_cell(view, site, now),
            cell("yes" if site.name in asked else ""),
            cell(site.activity_text if site.is_online else "", style="" if site.activity != "wait" else "dim"),
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
