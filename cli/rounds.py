"""``edgeflame rounds``: what an aggregator's operator may do to a run: stop it, end its rounds, remove a site."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import former_name
from cli.paths import FOLDER
from cli.site import ask_aggregator, check_reason, pause, resume

_STATE = click.option(
    "--state",
    required=True,
    type=FOLDER,
    help="The aggregator's state folder.",
)
_REASON = click.option("--reason", default="no reason given", help="For the journal, and for the site to show.")


@click.group(short_help="Decide about a running fleet's rounds: stop, finish, remove a site.")
def command() -> None:
    """Decide about a running fleet's rounds, on the aggregator's machine. To pause one of its sites: `edgeflame site`.

    What is asked for is journalled, and survives restarts. An aggregator that does not run does it when it starts.
    """


@command.command()
@_STATE
@_REASON
def stop(state: Path, reason: str) -> None:
    """End the run now, without a result; or send away an aggregator that stays after the end."""
    from aggregator.control import StopRun

    ask_aggregator(state, StopRun(reason=check_reason(reason)))


@command.command()
@_STATE
@_REASON
def finish(state: Path, reason: str) -> None:
    """Begin no further round: the model of the round at hand is the final one."""
    from aggregator.control import FinishEarly

    ask_aggregator(state, FinishEarly(reason=check_reason(reason)))


@command.command()
@click.argument("site")
@_STATE
@_REASON
def remove(site: str, state: Path, reason: str) -> None:
    """Take SITE out of the run for good. What it has contributed stays; it may come back by joining anew."""
    from aggregator.control import RemoveSite
    from edgeflame.mqtt.topics import check_name

    ask_aggregator(state, RemoveSite(site=check_name("site", site), reason=check_reason(reason)))


for _name, _command in (("pause", pause), ("resume", resume)):
    command.add_command(former_name(f"edgeflame rounds {_name}", f"edgeflame site {_name}", _command))
