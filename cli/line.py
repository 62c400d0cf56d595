"""``edgeflame line``: ask something of an inspection that runs, over the broker."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cli.options import broker_options, option_or_kit, resolve_broker

if TYPE_CHECKING:
    from edge.commands.messages import Command, Reply


F = TypeVar("F", bound=Callable[..., Any])

ROLES = ("operator", "publisher")
"""Whose kits may command lines."""

_CAMERA = click.option("--camera", metavar="NAME", help="Which camera; may be left out where there is one alone.")


@click.group("line", short_help="Ask something of a running inspection: status, pause, snapshot, another product.")
def command() -> None:
    """Ask something of a running inspection, over the broker.

    LINE is the name in its section [mqtt]. The exit code is 0 when it was done, that of the error the line answers
    with, and 7 when it does not answer.
    """


def _line_options(function: F) -> F:
    """What every command takes beside its own."""
    options = (
        click.argument("line"),
        click.option("--fleet", metavar="NAME", help="Which fleet. A kit names it too."),
        click.option("--timeout", type=float, default=20.0, show_default=True, metavar="S", help="For the answer."),
        click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON."),
    )
    for option in reversed(options):
        function = option(function)
    return broker_options()(function)


@command.command()
@_line_options
def status(line: str, **given: Any) -> None:
    """Say what LINE is doing: cameras, products, models, thresholds."""
    from edge.commands.messages import DescribeLine

    _send(line, given, DescribeLine)


@command.command()
@_line_options
@_CAMERA
def pause(line: str, camera: str | None, **given: Any) -> None:
    """Have LINE judge no more parts, of one camera or of all: a camera's pass unseen and are counted, files wait."""
    from edge.commands.messages import PauseCamera

    _send(line, given, PauseCamera, camera=camera)


@command.command()
@_line_options
@_CAMERA
def resume(line: str, camera: str | None, **given: Any) -> None:
    """Have LINE go on."""
    from edge.commands.messages import ResumeCamera

    _send(line, given, ResumeCamera, camera=camera)


@command.command()
@_line_options
@click.argument("value", metavar="VALUE|default")
@_CAMERA
def threshold(line: str, value: str, camera: str | None, **given: Any) -> None:
    """Set the raw distance above which a part fails; "default" goes back to the package's.

    It holds for the model in use, and over restarts.
    """
    from edge.commands.messages import SetThreshold

    _send(line, given, SetThreshold, camera=camera, threshold=_number(value))


@command.command()
@_line_options
@_CAMERA
def snapshot(line: str, camera: str | None, **given: Any) -> None:
    """Have LINE keep a picture of its next part, with the heat map, in its state folder."""
    from edge.commands.messages import TakeSnapshot

    _send(line, given, TakeSnapshot, camera=camera)


@command.command()
@_line_options
@click.argument("product")
@_CAMERA
def product(line: str, product: str, camera: str | None, **given: Any) -> None:
    """Have LINE judge another PRODUCT from the next part on, also after a restart."""
    from edge.commands.messages import SwitchProduct

    _send(line, given, SwitchProduct, camera=camera, product=product)


@command.command()
@_line_options
@_CAMERA
@click.option(
    "--expect",
    type=click.Choice(["good", "bad"]),
    help="The next part is a golden one, and is this.  [default: the photographs of golden parts]",
)
def golden(line: str, camera: str | None, expect: Literal["good", "bad"] | None, **given: Any) -> None:
    """Have LINE test a camera with its golden parts."""
    from edge.commands.messages import RunGoldenTest

    _send(line, given, RunGoldenTest, camera=camera, expected=expect)


@command.command()
@_line_options
@_CAMERA
def acknowledge(line: str, camera: str | None, **given: Any) -> None:
    """Take note that a self-test failed; it is no longer a reason not to be ready."""
    from edge.commands.messages import AcknowledgeTest

    _send(line, given, AcknowledgeTest, camera=camera)


@command.command()
@_line_options
@click.argument("action", type=click.Choice(["clear", "relearn"]))
@_CAMERA
def drift(line: str, action: Literal["clear", "relearn"], camera: str | None, **given: Any) -> None:
    """Say what was done about a camera's drift: its cause was removed, or the line as it is now is right."""
    from edge.commands.messages import HandleDrift

    _send(line, given, HandleDrift, camera=camera, action=action)


@command.command()
@_line_options
@click.argument("product")
@click.option("--to-file", is_flag=True, help="To that of its configuration's file, however many were between.")
def rollback(line: str, product: str, to_file: bool, **given: Any) -> None:
    """Have LINE go back to the model of PRODUCT that it ran before."""
    from edge.commands.messages import RollBackModel

    _send(line, given, RollBackModel, product=product, to_file=to_file)


@command.command("switch-model")
@_line_options
@click.argument("product")
def switch_model(line: str, product: str, **given: Any) -> None:
    """Have LINE switch to the released model of PRODUCT that has passed its shadow run and waits for a word."""
    from edge.commands.messages import SwitchModel

    _send(line, given, SwitchModel, product=product)


@command.command()
@_line_options
def reload(line: str, **given: Any) -> None:
    """Have LINE read its configuration again, and say what needs a restart."""
    from edge.commands.messages import ReloadConfig

    _send(line, given, ReloadConfig)


def _number(value: str) -> float | None:
    from edgeflame.errors import UsageError

    if value == "default":
        return None
    try:
        return float(value)
    except ValueError as exc:
        raise UsageError(f"threshold {value[:80]!r}: expected a number, or default") from exc


def _send(
    line: str,
    given: dict[str, Any],
    kind: Callable[..., Command],
    **fields: Any,
) -> None:
    import getpass
    import socket

    from edge.commands.client import new_id, send_command

    met = resolve_broker(
        given["broker"], kit=given["kit"], ca=given["ca"], cert=given["cert"], key=given["key"], role=ROLES
    )
    reply = send_command(
        met.url,
        fleet=option_or_kit("--fleet", given["fleet"], met.fleet),
        line=line,
        command=kind(id=new_id(), by=f"{getpass.getuser()}@{socket.gethostname()}"[:100], **fields),
        timeout_s=given["timeout"],
        connect_timeout_s=given["connect_timeout"] or 10.0,
    )
    _show(reply, as_json=given["as_json"])


def _show(reply: Reply, *, as_json: bool) -> None:
    import msgspec

    from cli.output import print_json

    if not reply.ok:
        if as_json:
            print_json(reply)
        sys.stderr.write(f"edgeflame: {reply.error}\n")
        click.get_current_context().exit(reply.exit_code)
    answer = msgspec.json.decode(reply.answer)
    if as_json:
        print_json(answer)
    elif isinstance(answer, dict) and "cameras" in answer:
        _show_cameras(answer)
    else:
        click.echo(msgspec.json.format(bytes(reply.answer), indent=2).decode())


def _show_cameras(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("camera", "product", "model", "threshold", "parts", "now", "source"):
        table.add_column(heading, overflow="fold")
    for camera in answer["cameras"]:
        now = "paused" if camera["paused"] else "ended" if camera["ended"] else camera["problem"] or "judging"
        mark = " (set)" if camera["threshold_set"] else ""
        table.add_row(
            Text(camera["camera"]),
            Text(camera["product"]),
            Text(camera["model"]),
            Text(f"{camera['threshold']:.6g}{mark}"),
            Text(str(camera["parts"])),
            Text(now, style="" if now == "judging" else "yellow"),
            Text(camera["source"]),
        )
    Console(width=max(Console().width, 120)).print(table)
