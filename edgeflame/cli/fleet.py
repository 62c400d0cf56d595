"""``edgeflame fleet``: who belongs to a fleet, and how it is doing."""

from __future__ import annotations

import click

from edgeflame.cli.fleet_init import init
from edgeflame.cli.fleet_members import enrol, members, renew, revoke, sync
from edgeflame.cli.fleet_report import report
from edgeflame.cli.fleet_status import status


@click.group("fleet")
def command() -> None:
    """Make a fleet, give its sites their kits and take them back, and see how it is doing."""


for _other in (init, enrol, renew, revoke, sync, members, status, report):
    command.add_command(_other)
