"""``edgeflame site``: pause a site, let it go on, or take it out of its run, before or while ``edgeflame train`` runs.

The state folder decides whose request it is: with a site's own, that of the site's operator; with the aggregator's,
that of the fleet's operator.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.output import echo
from cli.paths import FOLDER

if TYPE_CHECKING:
    from aggregator.control import OperatorRequest
    from trainer.agent.control import SiteControl


_SITE = click.argument("site", required=False)
_STATE = click.option(
    "--state", required=True, type=FOLDER, help="The site's state folder; or the aggregator's, for its site SITE."
)

MAX_REASON = 500
"""Characters; it is shown in tables."""
ANSWER_S = 30.0
"""A running aggregator looks twice a second, but not while it makes a model."""


@click.group(short_help="Pause a site of a run, let it go on, or leave the run.")
def command() -> None:
    """Pause a site, let it go on, or take it out of its run.

    On the site's machine --state is the site's own state folder, and no SITE is named. On the aggregator's machine it
    is the aggregator's, and SITE says which of its sites. What is asked for stands in that folder, whether the program
    runs just now or not.
    """


@command.command()
@_SITE
@_STATE
@click.option("--reason", default="the operator paused it", help="For the log, the journal and the site to show.")
@click.option(
    "--release",
    is_flag=True,
    help="End the worker, so that its memory is free; its task begins anew later. On the site's machine only.",
)
def pause(site: str | None, state: Path, reason: str, release: bool) -> None:
    """Stop computing until `edgeflame site resume`; the site is not asked meanwhile, and not missed.

    The result is the same, bit for bit, as without the pause, unless the round went on without the site.
    """
    from edgeflame.errors import UsageError

    if _is_aggregator(state, site):
        from aggregator.control import PauseSite

        if release:
            raise UsageError("--release is the site's own to ask for: give the site's state folder")
        ask_aggregator(state, PauseSite(site=_checked_name(site), reason=check_reason(reason)))
    else:
        from trainer.agent.control import SitePause

        _control(state).request_pause(SitePause(reason=check_reason(reason), release=release))
        echo(f"paused: {reason}")


@command.command()
@_SITE
@_STATE
def resume(site: str | None, state: Path) -> None:
    """Go on after a pause that was asked for with the same state folder."""
    if _is_aggregator(state, site):
        from aggregator.control import ResumeSite

        ask_aggregator(state, ResumeSite(site=_checked_name(site)))
    else:
        echo("goes on" if _control(state).clear_pause() else "was not paused")


@command.command()
@click.option("--state", required=True, type=FOLDER, help="The site's state folder.")
@click.option("--reason", default="the operator took it out", help="For the aggregator's ledger.")
def leave(state: Path, reason: str) -> None:
    """Leave the run for good: nothing more is asked of this site. Starting `edgeflame train` again joins anew."""
    from edgeflame.state import is_in_use
    from trainer.agent.control import LeaveRequest

    _control(state).request_leave(LeaveRequest(reason=check_reason(reason)))
    if is_in_use(state):
        echo("the site tells the aggregator, and ends")
    else:
        echo("`edgeflame train` does not run; started again with this state folder it leaves the run, and ends")


def check_reason(reason: str) -> str:
    """The reason as it was given.

    Raises:
        UsageError: it is too long.
    """
    from edgeflame.errors import UsageError

    if len(reason) > MAX_REASON:
        raise UsageError(f"a reason has at most {MAX_REASON} characters, not {len(reason)}")
    return reason


def is_aggregator_state(state: Path) -> bool:
    """Whether a folder is an aggregator's state folder."""
    return (state / "journal.sqlite").is_file()


def ask_aggregator(state: Path, request: OperatorRequest) -> None:
    """Put a request into the aggregator's state folder, wait for the answer of one that runs, and print it.

    Raises:
        UsageError: it is no aggregator's folder, or the aggregator refuses.
        StorageError: a running aggregator does not answer.
    """
    from aggregator.control import RequestQueue
    from edgeflame.errors import StorageError, UsageError
    from edgeflame.state import is_in_use

    if not is_aggregator_state(state):
        raise UsageError(f"{state}: not an aggregator's state folder (it holds no journal)")
    queue = RequestQueue(state)
    running = is_in_use(state)
    number = queue.submit(request)
    if not running:
        echo("no aggregator runs with this state folder; it will be done when one does")
        return
    deadline = time.monotonic() + ANSWER_S
    while (answer := queue.take_result(number)) is None:
        if time.monotonic() > deadline:
            raise StorageError(f"{state}: the aggregator has not answered within {ANSWER_S:g} s; the request stands")
        time.sleep(0.05)
    if not answer.ok:
        raise UsageError(answer.text)
    echo(answer.text)


def _is_aggregator(state: Path, site: str | None) -> bool:
    """Whether the folder is an aggregator's.

    Raises:
        UsageError: a site is named with its own folder, or none with the aggregator's.
    """
    from edgeflame.errors import UsageError

    found = is_aggregator_state(state)
    if found and site is None:
        raise UsageError(f"{state}: an aggregator's state folder; say which SITE of it")
    if site is not None and not found:
        raise UsageError(
            f"{state}: not an aggregator's state folder (it holds no journal); leave {site!r} out for a site's own"
        )
    return found


def _checked_name(site: str | None) -> str:
    from edgeflame.mqtt.topics import check_name

    return check_name("site", site or "")


def _control(state: Path) -> SiteControl:
    from edgeflame.errors import UsageError
    from trainer.agent.control import SiteControl

    if not (state / "install").is_file():
        raise UsageError(
            f"{state}: not a site's state folder; expected the --state of 'edgeflame train' (runs/FLEET/SITE)"
        )
    return SiteControl(state)
