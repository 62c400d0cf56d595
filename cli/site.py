"""``edgeflame site``: what a site's operator may decide while ``edgeflame train`` runs, or before it does."""

from __future__ import annotations

from pathlib import Path

import click

_STATE = click.option(
    "--state", required=True, type=click.Path(path_type=Path, file_okay=False), help="The site's state folder."
)


@click.group(short_help="Have this site rest, go on, or leave its run.")
def command() -> None:
    """Have this site rest, go on, or leave its run; on the site's machine.

    What is asked for stands in the state folder, whether `edgeflame train` runs just now or not.
    """


@command.command()
@_STATE
@click.option("--reason", default="the operator paused it", help="For the log and the aggregator to show.")
@click.option("--release", is_flag=True, help="End the worker, so that its memory is free; its task begins anew later.")
def pause(state: Path, reason: str, release: bool) -> None:
    """Stop computing until `edgeflame site resume`; the site is not asked meanwhile, and not missed.

    The result is the same, bit for bit, as without the pause, unless the round went on without the site.
    """
    from trainer.agent.control import SiteControl, SitePause

    SiteControl(_checked(state, reason)).rest(SitePause(reason=reason, release=release))
    click.echo(f"paused: {reason}")


@command.command()
@_STATE
def resume(state: Path) -> None:
    """Go on after a pause."""
    from trainer.agent.control import SiteControl

    click.echo("goes on" if SiteControl(_checked(state)).go_on() else "was not paused")


@command.command()
@_STATE
@click.option("--reason", default="the operator took it out", help="For the aggregator's ledger.")
def leave(state: Path, reason: str) -> None:
    """Leave the run for good: nothing more is asked of this site. Starting `edgeflame train` again joins anew."""
    from edgeflame.state import is_in_use
    from trainer.agent.control import LeaveRequest, SiteControl

    SiteControl(_checked(state, reason)).leave(LeaveRequest(reason=reason))
    if is_in_use(state):
        click.echo("the site tells the aggregator, and ends")
    else:
        click.echo("`edgeflame train` does not run; started again with this state folder it leaves the run, and ends")


def _checked(state: Path, reason: str = "") -> Path:
    from edgeflame.errors import UsageError

    if not (state / "install").is_file():
        raise UsageError(
            f"{state}: not a site's state folder; expected the --state of 'edgeflame train' (runs/FLEET/SITE)"
        )
    if len(reason) > 500:
        raise UsageError(f"a reason has at most 500 characters, not {len(reason)}")
    return state
