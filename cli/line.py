"""``edgeflame line``: ask something of an inspection that runs, over the broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.options import SECONDS, BrokerOptions, broker_options
from cli.output import cell, echo

if TYPE_CHECKING:
    from edge.commands.messages import Command, Reply


ACTIONS = (
    "new", "region", "collect", "stop", "take", "join", "part", "throw-out", "take-back", "learn", "cancel",
    "threshold", "try", "end-trial", "live", "back", "discard", "status",
)  # fmt: skip
"""What can be asked of the teaching; a test compares them with :mod:`edge.teaching.orders`."""

ROLES = ("operator", "publisher")
"""Whose kits may command lines."""

_CAMERA = click.option("--camera", metavar="NAME", help="Which camera; may be left out where there is one alone.")


@click.group("line", short_help="Ask something of a running inspection: status, pause, snapshot, another product.")
def command() -> None:
    """Ask something of a running inspection, over the broker.

    LINE is the name in its section [mqtt]; several are parted by commas, and asked one after the other. The exit code
    is 0 when it was done, that of the error the line answers with, and 7 when it does not answer; of several lines it
    is the first that is not 0.
    """


def _line_options(*, timeout_s: float = 20.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of every command, beside its own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in (
            broker_options(),
            click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON."),
            click.option(
                "--timeout", type=SECONDS, default=timeout_s, show_default=True, metavar="S", help="For each answer."
            ),
            click.argument("lines", metavar="LINE[,LINE]"),
        ):
            function = option(function)
        return function

    return decorate


@command.command()
@_line_options()
def status(lines: str, **options: Any) -> None:
    """Say what LINE is doing: cameras, products, models, thresholds."""
    from edge.commands.messages import DescribeLine

    _send(lines, options, DescribeLine)


@command.command()
@_line_options()
@_CAMERA
def pause(lines: str, camera: str | None, **options: Any) -> None:
    """Have LINE judge no more parts, of one camera or of all: a camera's pass unseen and are counted, files wait."""
    from edge.commands.messages import PauseCamera

    _send(lines, options, PauseCamera, camera=camera)


@command.command()
@_line_options()
@_CAMERA
def resume(lines: str, camera: str | None, **options: Any) -> None:
    """Have LINE go on."""
    from edge.commands.messages import ResumeCamera

    _send(lines, options, ResumeCamera, camera=camera)


@command.command()
@_line_options()
@click.argument("value", metavar="VALUE|default")
@_CAMERA
def threshold(lines: str, value: str, camera: str | None, **options: Any) -> None:
    """Set the raw distance above which a part fails; "default" goes back to the package's.

    It holds for the model in use, and over restarts.
    """
    from edge.commands.messages import SetThreshold

    _send(lines, options, SetThreshold, camera=camera, threshold=_number(value))


@command.command()
@_line_options()
@_CAMERA
def snapshot(lines: str, camera: str | None, **options: Any) -> None:
    """Have LINE keep a picture of its next part, with the heat map, in its state folder."""
    from edge.commands.messages import TakeSnapshot

    _send(lines, options, TakeSnapshot, camera=camera)


@command.command()
@_line_options()
@click.argument("product")
@_CAMERA
def product(lines: str, product: str, camera: str | None, **options: Any) -> None:
    """Have LINE judge another PRODUCT from the next part on, also after a restart."""
    from edge.commands.messages import SwitchProduct

    _send(lines, options, SwitchProduct, camera=camera, product=product)


@command.command()
@_line_options()
@_CAMERA
@click.option(
    "--expect",
    type=click.Choice(["good", "bad"]),
    help="The next part is a golden one, and is this.  [default: the photographs of golden parts]",
)
def golden(lines: str, camera: str | None, expect: Literal["good", "bad"] | None, **options: Any) -> None:
    """Have LINE test a camera with its golden parts."""
    from edge.commands.messages import RunGoldenTest

    _send(lines, options, RunGoldenTest, camera=camera, expected=expect)


@command.command()
@_line_options()
@_CAMERA
def acknowledge(lines: str, camera: str | None, **options: Any) -> None:
    """Take note that a self-test failed; it is no longer a reason not to be ready."""
    from edge.commands.messages import AcknowledgeTest

    _send(lines, options, AcknowledgeTest, camera=camera)


@command.command()
@_line_options()
@click.argument("action", type=click.Choice(["clear", "relearn"]))
@_CAMERA
def drift(lines: str, action: Literal["clear", "relearn"], camera: str | None, **options: Any) -> None:
    """Say what was done about a camera's drift: its cause was removed, or the line as it is now is right."""
    from edge.commands.messages import HandleDrift

    _send(lines, options, HandleDrift, camera=camera, action=action)


@command.command()
@_line_options()
@_CAMERA
@click.argument("part")
@click.argument("was", type=click.Choice(["good", "bad"]))
@click.option("--kind", metavar="NAME", help="Of the defect, for instance scratch.")
def mark(lines: str, part: str, was: str, camera: str | None, kind: str | None, **options: Any) -> None:
    """Tell LINE what PART really was, good or bad, while the line remembers it; see `edgeflame marks`.

    PART is its name in the results. The line keeps its picture; `edgeflame learn` learns from it.
    """
    import msgspec

    from edge.commands.messages import MarkPart
    from edgeflame.errors import UsageError
    from edgeflame.marks import Kind

    try:
        msgspec.convert(kind, Kind | None)
    except msgspec.ValidationError as exc:
        raise UsageError(f"--kind {(kind or '')[:80]!r}: letters, digits, ' _.-', at most 40 of them") from exc
    _send(lines, options, MarkPart, camera=camera, part=part, was=was, kind=kind)


@command.command()
@_line_options(timeout_s=60.0)
@click.argument("product")
@click.option("--to-file", is_flag=True, help="To that of its configuration's file, however many were between.")
def rollback(lines: str, product: str, to_file: bool, **options: Any) -> None:
    """Have LINE go back to the model of PRODUCT that it ran before.

    What is rolled back is not taken again until it is published anew (`edgeflame model publish --again`). To take a
    release back from every line, also from those that are off: `edgeflame model withdraw`.
    """
    from edge.commands.messages import RollBackModel

    _send(lines, options, RollBackModel, product=product, to_file=to_file)


@command.command("switch-model")
@_line_options(timeout_s=60.0)
@click.argument("product")
@click.option(
    "--allow-older", is_flag=True, help="Take up the release that was refused because a newer one was seen before."
)
def switch_model(lines: str, product: str, allow_older: bool, **options: Any) -> None:
    """Have LINE switch to the released model of PRODUCT that passed its shadow run and waits for this word.

    Lines wait for it where their configuration says models.auto_promote = false.
    """
    from edge.commands.messages import SwitchModel

    _send(lines, options, SwitchModel, product=product, allow_older=allow_older)


@command.command()
@_line_options(timeout_s=30.0)
@click.argument("action", type=click.Choice(ACTIONS))
@click.argument("product")
@_CAMERA
@click.option("--region", metavar="X,Y,WIDTH,HEIGHT", help="region: what to look at.  [default: the whole picture]")
@click.option(
    "--photograph", "photographs", multiple=True, metavar="NAME",
    help="join, part, throw-out, take-back: which; may be given several times.",
)  # fmt: skip
@click.option("--same-part", is_flag=True, help="take: the picture shows the part of the photograph before.")
@click.option("--value", type=float, metavar="X", help="threshold: one that the scores offer.  [default: as learnt]")
@click.option("--marks", is_flag=True, help="learn: also from the parts that were marked as good or bad.")
@click.option("--prior", metavar="PRODUCT", help="learn: lean on the model of another product of the line.")
@click.option(
    "--alone", is_flag=True, help="try: in place of the present model, with the verdicts marked as a trial's."
)
def teach(
    lines: str,
    action: Any,
    product: str,
    camera: str | None,
    region: str | None,
    photographs: tuple[str, ...],
    same_part: bool,
    value: float | None,
    marks: bool,
    prior: str | None,
    alone: bool,
    **options: Any,
) -> None:
    """Teach LINE a new PRODUCT from its own camera's pictures, or say how it stands.

    In this order: new, region, collect (stop ends it) or take, learn (cancel ends it), threshold, try (end-trial ends
    it), live, and back to what was before. Photographs: join says that some show one part, part that each shows one of
    its own, throw-out leaves some out, take-back takes them in again. discard deletes the product, status changes
    nothing.
    """
    from edge.commands.messages import TeachProduct
    from edge.teaching.orders import TeachingOrder
    from edgeflame.images import Region

    area = None
    if region is not None:
        parsed = Region.parse(region)
        area = (parsed.x, parsed.y, parsed.width, parsed.height)
    order = TeachingOrder(
        action=action,
        product=product,
        camera=camera,
        region=area,
        photographs=photographs,
        same_part=same_part,
        threshold=value,
        marks=marks,
        prior=prior,
        alone=alone,
    )
    _send(lines, options, TeachProduct, order=order)


@command.command()
@_line_options()
def reload(lines: str, **options: Any) -> None:
    """Have LINE read its configuration again, and say what needs a restart."""
    from edge.commands.messages import ReloadConfig

    _send(lines, options, ReloadConfig)


def _number(value: str) -> float | None:
    from edgeflame.errors import UsageError

    if value == "default":
        return None
    try:
        return float(value)
    except ValueError as exc:
        raise UsageError(f"threshold {value[:80]!r}: expected a number, or default") from exc


def _send(lines: str, options: dict[str, Any], kind: Callable[..., Command], /, **fields: Any) -> None:
    """Send the command to one line after the other, and print the answers.

    Raises:
        LinkError: the only line does not answer. Of several, the others are asked all the same.
    """
    import getpass
    import socket

    from edge.commands.client import new_id, send_command
    from edge.commands.messages import Reply
    from edgeflame.errors import LinkError

    broker: BrokerOptions = options["broker"]
    access = broker.resolve(*ROLES)
    names = lines.split(",")
    exit_code = 0
    for name in names:
        command = kind(id=new_id(), by=f"{getpass.getuser()}@{socket.gethostname()}"[:100], **fields)
        try:
            reply = send_command(
                access.url,
                fleet=access.fleet,
                line=name,
                command=command,
                timeout_s=options["timeout"],
                connect_timeout_s=broker.connect_timeout or 10.0,
            )
        except LinkError as exc:
            if len(names) == 1:
                raise
            reply = Reply(id=command.id, ok=False, error=str(exc), exit_code=exc.exit_code)
        exit_code = exit_code or reply.exit_code
        if not options["as_json"]:
            _show(name, reply, is_one_of_many=len(names) > 1)
        else:
            _print_reply(name, reply, is_one_of_many=len(names) > 1)
    click.get_current_context().exit(exit_code)


def _print_reply(name: str, reply: Reply, *, is_one_of_many: bool) -> None:
    """Print the answer as JSON; of several lines each is a document that names its line."""
    from cli.output import print_json

    if is_one_of_many:
        fields = ("ok", "error", "exit_code", "answer")
        print_json({"line": name, **{field: getattr(reply, field) for field in fields}})
    else:
        print_json(reply.answer if reply.ok else reply)
    if not reply.ok:
        echo(f"edgeflame: {reply.error}", err=True)


def _show(name: str, reply: Reply, *, is_one_of_many: bool) -> None:
    import msgspec

    prefix = f"{name}: " if is_one_of_many else ""
    if not reply.ok:
        echo(f"edgeflame: {prefix}{reply.error}", err=True)
        return
    answer = msgspec.json.decode(reply.answer)
    match answer:
        case {"cameras": _}:
            if is_one_of_many:
                echo(f"{name}:")
            _show_cameras(answer)
        case {"stage": stage, "num_parts": parts, "photographs": photographs, "promise": promise}:
            echo(f"{name}: {answer['product']}: {stage}, {parts} good parts in {len(photographs)} photographs")
            for told in (promise, answer["problem"], *answer["notes"]):
                if told:
                    echo(told)
        case {"present": {"sha256": sha256, "name": model, "origin": origin}}:
            text = "its configuration's file" if origin == "file" else model
            echo(f"{name}: runs {sha256[:12]} ({text})")
        case _:
            for one in (prefix + msgspec.json.format(bytes(reply.answer), indent=2).decode()).split("\n"):
                echo(one)


def _show_cameras(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("camera", "product", "model", "threshold", "parts", "now", "source"):
        table.add_column(heading, overflow="fold")
    for camera in answer["cameras"]:
        now = "paused" if camera["paused"] else "ended" if camera["ended"] else camera["problem"] or "judging"
        mark = " (set)" if camera["threshold_set"] else ""
        table.add_row(
            cell(camera["camera"]),
            cell(camera["product"]),
            cell(camera["model"]),
            cell(f"{camera['threshold']:.6g}{mark}"),
            cell(str(camera["parts"])),
            cell(now, style="" if now == "judging" else "yellow"),
            cell(camera["source"]),
        )
    Console(width=max(Console().width, 120)).print(table)
