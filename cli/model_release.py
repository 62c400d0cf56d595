"""``edgeflame model publish|fetch|withdraw|status``: packages to the lines, and the state of each on every line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.line import rollback as roll_back
from cli.line import switch_model
from cli.options import SECONDS, BrokerOptions, broker_options, former_name
from cli.output import cell, echo
from cli.paths import PATH

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgeflame.mqtt.release_messages import ProductModels
    from fleet.observe import FleetModels, ReleaseProgress


_json_option = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")


@click.command("publish")
@click.argument("package_file", metavar="FILE", type=PATH)
@broker_options()
@click.option("--lines", metavar="A,B", help="Only these lines take it.  [default: all that run its product]")
@click.option(
    "--shadow-parts",
    type=click.IntRange(0, 100_000),
    default=0,
    metavar="N",
    help="Judge N parts beside the present model first; a line's own configuration may ask for more, never for less.",
)
@click.option("--public-key", type=PATH, metavar="FILE", help="Make sure beforehand that this key signed it.")
@click.option(
    "--until",
    type=click.Choice(["checked", "running"]),
    default="checked",
    show_default=True,
    help="What to wait for: the lines have it whole and found it good, or judge with it.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    metavar="S",
    help="Give up when no line makes progress for so long.",
)
@click.option("--stay", is_flag=True, help="Go on serving lines that come later, until interrupted.")
@click.option("--again", is_flag=True, help="A new release, also for lines that refused or rolled back this package.")
@_json_option
def publish(
    package_file: Path,
    broker: BrokerOptions,
    lines: str | None,
    shadow_parts: int,
    public_key: Path | None,
    until: Literal["checked", "running"],
    timeout: float,
    stay: bool,
    again: bool,
    as_json: bool,
) -> None:
    """Announce a signed package to the lines of a fleet, and serve it until they have it.

    The announcement stays on the broker, for lines that are off now. If this command is interrupted, run it again: a
    line goes on where it was. Exit code 1 if a line refuses the package, or does not get on.
    """
    from cli.output import print_json, progress_bar
    from edgeflame.errors import NegativeAnswerError
    from edgeflame.mqtt.topics import Topics, check_name
    from fleet import publish as publisher

    access = broker.resolve("publisher")
    names = tuple(sorted({check_name("line", name.strip()) for name in lines.split(",")})) if lines else ()
    topics = Topics(fleet=access.fleet)
    release = publisher.describe_package(package_file, public_key)
    terms = publisher.ReleaseTerms(
        lines=names,
        shadow_parts=shadow_parts,
        force=again,
        until=until,
        timeout_s=timeout,
        stay=stay,
    )
    last: dict[str, str] = {}
    with progress_bar("publishing") as bar:

        def report(standings: list[ReleaseProgress]) -> None:
            bar(sum(one.is_over for one in standings), len(standings), "; ".join(_short(one) for one in standings[:4]))
            for one in standings:
                if last.get(one.line) != one.word:
                    last[one.line] = one.word
                    publisher.log.info("line", line=one.line, does=one.in_words())

        standings = publisher.publish_package(
            package_file,
            release,
            terms,
            broker=access.url,
            topics=topics,
            connect_timeout_s=broker.connect_timeout,
            report=report,
        )
    if as_json:
        print_json({"product": release.product, "sha256": release.manifest.sha256, "lines": standings})
    else:
        for one in standings:
            echo(f"{one.line}: {one.in_words()}")
    behind = [one for one in standings if not one.is_good]
    if behind:
        said_of = "; ".join(f"{one.line} {one.in_words()}" for one in behind[:20])
        raise NegativeAnswerError(
            f"{len(behind)} of {len(standings)} lines do not have it: {said_of}. A line that was away gets it when this"
            " command is run again; one that refused or rolled it back takes it again only with --again"
        )


def _short(one: ReleaseProgress) -> str:
    return f"{one.line} {one.word.replace('_', ' ')}" + (f" {one.done}/{one.total}" if one.total else "")


@click.command("fetch")
@click.argument("product")
@click.option("--out", type=PATH, required=True, metavar="FILE", help="The package to write.")
@broker_options()
@click.option("--public-key", type=PATH, metavar="FILE", help="Take it only if this key signed it.")
@click.option(
    "--timeout", type=SECONDS, default=60.0, show_default=True, metavar="S", help="Give up after S seconds of silence."
)
def fetch(product: str, out: Path, broker: BrokerOptions, public_key: Path | None, timeout: float) -> None:
    """Fetch the package that is released for PRODUCT, while its publisher serves it.

    To look at, or to fit another product by its backbone (`fit --backbone-from`). No line begins to use it.
    """
    from cli.output import progress_bar
    from edgeflame.errors import UsageError
    from edgeflame.mqtt.topics import Topics
    from fleet.fetch import fetch_release, find_release

    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder to write {out.name} into")
    access = broker.resolve("line")
    topics = Topics(fleet=access.fleet)
    release = find_release(access.url, topics, product, connect_timeout_s=broker.connect_timeout)
    with progress_bar("fetching") as progress:
        fetch_release(
            release,
            out,
            broker=access.url,
            topics=topics,
            line=access.name,
            public_key=public_key,
            connect_timeout_s=broker.connect_timeout,
            timeout_s=timeout,
            progress=progress,
        )
    echo(f"{out}: {product}, {release.manifest.size_bytes / 1e6:.1f} MB, {release.manifest.sha256[:12]}")


@click.command("withdraw")
@click.argument("product", metavar="PRODUCT")
@broker_options()
def withdraw(
    product: str,
    broker: BrokerOptions,
) -> None:
    """Take the released package of PRODUCT back from all lines.

    Lines that try it drop it, lines that run it go back to the model before; lines that are off do so when they come
    back.
    """
    from edgeflame.mqtt.topics import Topics
    from fleet.publish import withdraw_release

    access = broker.resolve("publisher")
    topics = Topics(fleet=access.fleet)
    release = withdraw_release(access.url, topics, product, connect_timeout_s=broker.connect_timeout)
    echo(f"{product}: the release of {release.name} ({release.manifest.sha256[:12]}) is withdrawn")


@click.command("status")
@broker_options()
@_json_option
def status(
    broker: BrokerOptions,
    as_json: bool,
) -> None:
    """Show what is released, and for every line what it runs, tries, refused, and how far its models disagree.

    It reads what is retained on the broker; an observer's kit is enough. Exit code 1 if no line has said what it runs.
    """
    from cli.output import print_json
    from edgeflame.errors import NegativeAnswerError
    from edgeflame.mqtt.topics import Topics
    from fleet.publish import read_fleet_models

    access = broker.resolve("observer", "publisher")
    topics = Topics(fleet=access.fleet)
    view = read_fleet_models(access.url, topics, connect_timeout_s=broker.connect_timeout)
    if as_json:
        print_json(view.as_data())
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 160)
        console.print(_tables(view))
    if not view.lines:
        raise NegativeAnswerError(
            f"no line of the fleet {topics.fleet} has said what it runs; do their daemons have a section [models]?"
        )


def _tables(view: FleetModels) -> RenderableType:
    """Two tables: the releases, and the lines' models. Names and reasons come from the network: never mark-up."""
    from rich.console import Group
    from rich.table import Table

    released = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("released product", "package", "sha256", "key", "published", "for"):
        released.add_column(heading, overflow="fold")
    for _, one in sorted(view.releases.items()):
        whom = "withdrawn" if one.withdrawn else ", ".join(one.lines) or "all lines"
        cells = (one.product, one.name, one.manifest.sha256[:12], one.key, f"{one.published:%Y-%m-%d %H:%M}", whom)
        released.add_row(*map(cell, cells))
    lines = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("line", "link", "product", "runs", "tries", "disagreement", "last outcome"):
        lines.add_column(heading, overflow="fold")
    for name, models in sorted(view.lines.items()):
        link = "online" if view.online.get(name) else "offline"
        for entry in models.products:
            lines.add_row(
                cell(name, style="bold"),
                cell(link, style="green" if link == "online" else "red"),
                cell(entry.product),
                *map(cell, _cells(entry)),
            )
    if not view.releases:
        return lines
    return Group(released, cell(""), lines)


def _cells(entry: ProductModels) -> tuple[str, str, str, str]:
    present, candidate = entry.present, entry.candidate
    runs = f"{present.sha256[:12]} {present.name}" + (", on trial" if present.on_trial else "")
    tries = disagreement = ""
    if candidate is not None:
        how_far = f" {candidate.done}/{candidate.total}" if candidate.total else ""
        tries = f"{candidate.sha256[:12]} {candidate.name}: {candidate.stage}{how_far}"
    last = entry.outcomes[0] if entry.outcomes else None
    measured = (candidate and candidate.disagreement) or (last and last.disagreement)
    if measured and measured.share is not None:
        disagreement = (
            f"{measured.share:.1%} of {measured.parts} parts ({measured.newly_failed} newly failed, "
            f"{measured.newly_passed} newly passed)"
        )
    if last is None:
        return runs, tries, disagreement, ""
    why = ": ".join(text for text in ((last.reason or "").replace("_", " "), last.detail) if text)
    outcome = f"{last.sha256[:12]} {last.fate.replace('_', ' ')}, {last.at:%Y-%m-%d %H:%M}"
    return runs, tries, disagreement, outcome + (f" ({why})" if why else "")


def _former(name: str, command: click.Command) -> click.Command:
    """A command of ``edgeflame line``, which ``edgeflame model`` had with PRODUCT first and an option for each line."""
    lines = click.Option(
        ["--line", "lines"], multiple=True, required=True, callback=lambda _context, _option, value: ",".join(value)
    )
    others = [parameter for parameter in command.params if parameter.name not in ("lines", "as_json")]
    new = f"edgeflame line {command.name} LINE PRODUCT"
    return former_name(f"edgeflame model {name}", new, command, params=[*others, lines])


switch = _former("switch", switch_model)
rollback = _former("rollback", roll_back)
