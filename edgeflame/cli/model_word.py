"""``edgeflame model switch|rollback``: a person's word on what lines run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeflame.cli.link_options import agreed, contact, link_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.commands.messages import Command

_LINES = click.option("--line", "lines", multiple=True, required=True, metavar="NAME", help="Which; may be repeated.")
_FLEET = click.option("--fleet", metavar="NAME", help="Which fleet. A kit names it too.")
_TIMEOUT = click.option(
    "--timeout", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="S", help="For each answer."
)


@click.command("switch")
@click.argument("product", metavar="PRODUCT")
@_LINES
@link_options()
@_FLEET
@_TIMEOUT
def switch(
    product: str,
    lines: tuple[str, ...],
    broker: str | None,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    connect_timeout: float | None,
    fleet: str | None,
    timeout: float,
) -> None:
    """Have lines switch to the released model of PRODUCT that passed its shadow run and waits for this word.

    Lines wait for it where their configuration says models.auto = false.
    """
    from functools import partial

    from edge.commands.messages import SwitchModel

    _tell(partial(SwitchModel, product=product), lines, broker, kit, ca, cert, key, connect_timeout, fleet, timeout)


@click.command("rollback")
@click.argument("product", metavar="PRODUCT")
@_LINES
@click.option("--to-file", is_flag=True, help="To that of the line's configuration, however many were between.")
@link_options()
@_FLEET
@_TIMEOUT
def rollback(
    product: str,
    lines: tuple[str, ...],
    to_file: bool,
    broker: str | None,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    connect_timeout: float | None,
    fleet: str | None,
    timeout: float,
) -> None:
    """Have lines go back to the model of PRODUCT they ran before.

    What is rolled back is not taken again until it is published anew (`publish --again`). To take a release back from
    every line, also from those that are off: `edgeflame model withdraw`.
    """
    from functools import partial

    from edge.commands.messages import RollBackModel

    command = partial(RollBackModel, product=product, to_file=to_file)
    _tell(command, lines, broker, kit, ca, cert, key, connect_timeout, fleet, timeout)


def _tell(
    command: Callable[..., Command],
    lines: tuple[str, ...],
    broker: str | None,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    connect_timeout: float | None,
    fleet: str | None,
    timeout: float,
) -> None:
    """Ask one line after the other; those that did it stay so when a later one cannot."""
    import getpass
    import socket

    import msgspec

    from edge.commands.client import new_id, send_command
    from edgeflame.cli.line import ROLES
    from edgeflame.errors import LinkError, NegativeAnswerError
    from edgeflame.releases.messages import ProductModels

    met = contact(broker, kit=kit, ca=ca, cert=cert, key=key, role=ROLES)
    name = agreed("--fleet", fleet, met.fleet)
    failed = []
    for line in lines:
        try:
            reply = send_command(
                met.url,
                fleet=name,
                line=line,
                command=command(id=new_id(), by=f"{getpass.getuser()}@{socket.gethostname()}"[:100]),
                timeout_s=timeout,
                connect_timeout_s=connect_timeout or 10.0,
            )
        except LinkError as exc:
            failed.append(f"{line}: {exc}")
            continue
        if not reply.ok:
            failed.append(f"{line}: {reply.error}")
            continue
        present = msgspec.json.decode(reply.answer, type=ProductModels).present
        said = "its configuration's file" if present.origin == "file" else present.name
        click.echo(f"{line}: runs {present.sha256[:12]} ({said})")
    if failed:
        msg = f"{len(failed)} of {len(lines)} lines did not: {'; '.join(failed)}"
        raise NegativeAnswerError(msg)
