"""``edgeflame rounds``: what the aggregator's operator may decide while a run goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from aggregator.control import OperatorRequest


_STATE = click.option(
    "--state",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The aggregator's state folder.",
)
_REASON = click.option("--reason", default="no reason given", help="For the journal, and for the site to show.")

ANSWER_S = 30.0
"""A running aggregator looks twice a second, but not while it makes a model."""


@click.group(short_help="Decide about a running fleet's rounds: stop, finish, pause, remove.")
def command() -> None:
    """Decide about a running fleet's rounds, on the aggregator's machine.

    What is asked for is journalled, and survives restarts. An aggregator that does not run does it when it starts.
    """


@command.command()
@_STATE
@_REASON
def stop(state: Path, reason: str) -> None:
    """End the run now, without a result; or send away an aggregator that stays after the end."""
    from aggregator.control import StopRun

    _ask(state, StopRun(reason=reason))


@command.command()
@_STATE
@_REASON
def finish(state: Path, reason: str) -> None:
    """Begin no further round: the model of the round at hand is the final one."""
    from aggregator.control import FinishEarly

    _ask(state, FinishEarly(reason=reason))


@command.command()
@click.argument("site")
@_STATE
@_REASON
def pause(site: str, state: Path, reason: str) -> None:
    """Have SITE rest: it stops computing, is not asked, and is not missed."""
    from aggregator.control import PauseSite
    from edgeflame.mqtt.topics import check_name

    _ask(state, PauseSite(site=check_name("site", site), reason=reason))


@command.command()
@click.argument("site")
@_STATE
def resume(site: str, state: Path) -> None:
    """Have SITE go on."""
    from aggregator.control import ResumeSite
    from edgeflame.mqtt.topics import check_name

    _ask(state, ResumeSite(site=check_name("site", site)))


@command.command()
@click.argument("site")
@_STATE
@_REASON
def remove(site: str, state: Path, reason: str) -> None:
    """Take SITE out of the run for good. What it has contributed stays; it may come back by joining anew."""
    from aggregator.control import RemoveSite
    from edgeflame.mqtt.topics import check_name

    _ask(state, RemoveSite(site=check_name("site", site), reason=reason))


def _ask(state: Path, request: OperatorRequest) -> None:
    from aggregator.control import RequestQueue
    from edgeflame.errors import StorageError, UsageError
    from edgeflame.state import is_in_use

    if not (state / "journal.sqlite").is_file():
        raise UsageError(f"{state}: not an aggregator's state folder (it holds no journal)")
    if len(request.reason) > 500:
        raise UsageError(f"a reason has at most 500 characters, not {len(request.reason)}")
    box = RequestQueue(state)
    running = is_in_use(state)
    number = box.put(request)
    if not running:
        click.echo("no aggregator runs with this state folder; it will be done when one does")
        return
    deadline = time.monotonic() + ANSWER_S
    while (answer := box.answer_to(number)) is None:
        if time.monotonic() > deadline:
            raise StorageError(f"{state}: the aggregator has not answered within {ANSWER_S:g} s; the request stands")
        time.sleep(0.05)
    if not answer.ok:
        raise UsageError(answer.text)
    click.echo(answer.text)
