"""``edgeflame fleet status``: how a fleet is doing, live."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeflame.cli.link_options import agreed, contact, link_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from edgeflame.fleet.view import FleetView

COLLECT_S = 2.5
"""Every site speaks at least twice in this time."""
_REDRAW_S = 0.5


@click.command("status")
@link_options()
@click.option("--fleet", metavar="NAME", help="Which fleet. A kit names it too.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, or until the run is over.")
@click.option("--json", "as_json", is_flag=True, help="Print what is known as JSON; with --watch a line a second.")
def status(
    broker: str | None,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    connect_timeout: float | None,
    fleet: str | None,
    watch: bool,
    as_json: bool,
) -> None:
    """Show a fleet's run and its sites: link, phase, progress, rates, last error.

    It listens for a moment, for every site speaks once a second, and only reads; an observer's kit is enough. Exit
    code 1 if the run failed, or its aggregator is gone.
    """
    from edgeflame.console import print_json
    from edgeflame.errors import NegativeAnswerError
    from edgeflame.fleet.onlooker import Onlooker
    from edgeflame.fleet.view import FleetView
    from edgeflame.topics import Topics

    met = contact(broker, kit=kit, ca=ca, cert=cert, key=key, role="observer")
    view = FleetView(Topics(fleet=agreed("--fleet", fleet, met.fleet)))
    with Onlooker(met.url, view, connect_timeout_s=connect_timeout) as onlooker:
        if not watch:
            onlooker.listen(COLLECT_S)
            if as_json:
                print_json(view.as_data(time.monotonic()))
            else:
                _print(_table(view))
        elif as_json:
            onlooker.listen(COLLECT_S)
            print_json(view.as_data(time.monotonic()))
            while not _is_over(view):
                onlooker.listen(1.0)
                print_json(view.as_data(time.monotonic()))
        else:
            _watch(onlooker.listen, view)
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
    said = ""
    wait(COLLECT_S)
    while True:
        line = _line(view)
        if line != said:
            click.echo(f"{time.strftime('%H:%M:%S')} {line}")
            said = line
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
        return f"fleet {view.as_data(0.0)['fleet']}: nothing was said yet"
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
    from rich.text import Text

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
            Text(site.name, style="bold"),
            Text(link, style="green" if link == "online" else "red" if link == "offline" else "yellow"),
            Text("yes" if site.name in asked else ""),
            Text(site.doing if link != "offline" else "", style="" if site.activity != "wait" else "dim"),
            Text(f"{site.step}/{site.num_steps}" if site.num_steps else ""),
            Text(rate),
            Text(site.error, style="red"),
        )
    failed = view.state is not None and view.state.phase == "failed"
    lines: list[RenderableType] = [Text(_headline(view), style="bold red" if failed else "bold")]
    if failed and view.state is not None:
        lines.append(Text(view.state.detail, style="red"))
    lines.append(table if view.sites else Text("no site has been heard of", style="dim"))
    return Group(*lines)
