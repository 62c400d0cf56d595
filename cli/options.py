"""Options that several commands share: those of the broker, and those of scoring and thresholds.

Also how thresholds and their promises are printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from edgeflame.methods import RejectUnit

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np
    import numpy.typing as npt

    from edgeflame.mqtt.url import BrokerUrl
    from edgeflame.package import Threshold


F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)


metrics_option = click.option(
    "--metrics", metavar="HOST:PORT", help="Figures for Prometheus, at http://HOST:PORT/metrics."
)


def broker_options() -> Callable[[F], F]:
    """``--broker``, ``--kit``, ``--ca``, ``--cert``, ``--key`` and ``--connect-timeout``."""
    options = (
        click.option(
            "--broker",
            metavar="URL",
            help="mqtt://[user@]host[:port], or mqtts://; the password from EDGEFLAME_MQTT_PASSWORD.",
        ),
        click.option(
            "--kit", type=_FILE, help="A kit of `edgeflame fleet`: the broker, the fleet, our name and certificate."
        ),
        click.option("--ca", type=_FILE, help="mqtts: certificate authority of the broker (PEM)."),
        click.option("--cert", type=_FILE, help="mqtts: our certificate (PEM)."),
        click.option("--key", type=_FILE, help="mqtts: our private key (PEM)."),
        click.option(
            "--connect-timeout",
            type=float,
            metavar="S",
            help="Give up when the broker was not reached in S seconds [default: try for ever].",
        ),
    )

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@dataclass(frozen=True, kw_only=True)
class BrokerAccess:
    """The broker, and what a kit says about us; without one the options must say it."""

    url: BrokerUrl
    fleet: str | None = None
    name: str | None = None
    certificate_expires: datetime | None = None


def resolve_broker(
    broker: str | None,
    *,
    kit: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    role: str | tuple[str, ...],
) -> BrokerAccess:
    """The options as a :class:`BrokerAccess`.

    Args:
        broker: wins over the kit's address.
        kit: made for ``role``.
        ca: in place of a kit, with
        cert: and
        key: as files.
        role: what the command is in the fleet, or may be.

    Raises:
        UsageError: they make none, or contradict each other.
        ConfigError: the kit is none.
        LinkError: the kit has expired.
    """
    from edgeflame.errors import UsageError
    from edgeflame.mqtt.url import TlsFiles, parse_broker_url

    if kit is None:
        if broker is None:
            raise UsageError("--broker or --kit: one of them has to say where the broker is")
        return BrokerAccess(url=parse_broker_url(broker, tls=TlsFiles(ca=ca, cert=cert, key=key)))
    if ca or cert or key:
        raise UsageError("--kit holds the certificates; --ca, --cert and --key are for those without one")
    from edgeflame.mqtt.kit import read_kit

    opened = read_kit(kit)
    roles = (role,) if isinstance(role, str) else role
    if opened.role not in roles:
        raise UsageError(
            f"{kit}: the kit of the {opened.role} {opened.name!r}; this command takes the kit of one enrolled as "
            f"{' or '.join(roles)}"
        )
    return BrokerAccess(
        url=opened.broker_url(broker), fleet=opened.fleet, name=opened.name, certificate_expires=opened.expires
    )


def option_or_kit(option: str, given: str | None, from_kit: str | None) -> str:
    """What an option and a kit say together.

    Raises:
        UsageError: nothing, or not the same.
    """
    from edgeflame.errors import UsageError

    if given and from_kit and given != from_kit:
        raise UsageError(
            f"{option} {given!r}: the kit is made for {from_kit!r}; leave the option out, or take the right kit"
        )
    value = given or from_kit
    if not value:
        raise UsageError(f"{option}: missing, as an option and in a kit or configuration file")
    return value


THIS_PACKAGE = "this package"

_PATH = click.Path(path_type=Path)

model_option = click.option("--model", required=True, type=_PATH, metavar="FILE", help="The package (.edgeflame).")

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where it runs."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def dataset_options(function: F) -> F:
    """``--groups`` and ``--on-unreadable``."""
    function = click.option(
        "--on-unreadable",
        type=click.Choice(["skip", "refuse"]),
        default="skip",
        show_default=True,
        help="Skip and count images that cannot be read, or stop at the first.",
    )(function)
    return click.option(
        "--groups",
        type=_PATH,
        metavar="CSV",
        help="Which images show the same part.  [default: groups.csv or tiles.csv in the folder]",
    )(function)


def promise_options(default: str) -> Callable[[F], F]:
    """``--false-reject-rate``, ``--confidence`` and ``--unit``; ``default`` says where the defaults come from."""

    def decorate(function: F) -> F:
        for option in (
            click.option(
                "--unit",
                type=click.Choice(get_args(RejectUnit)),
                help="What the line rejects: each photograph by itself, or a part as soon as one of its photographs is."
                f"  [default: {default}]",
            ),
            click.option("--confidence", type=float, help=f"With which this is promised.  [default: {default}]"),
            click.option(
                "--false-reject-rate",
                type=float,
                help=f"Share of the good that may be rejected.  [default: {default}]",
            ),
        ):
            function = option(function)
        return function

    return decorate


def print_threshold(threshold: Threshold) -> None:
    """What it is and what it promises, in a line each."""
    how = "of the highest F1, " if threshold.chosen_by == "f1" else ""
    click.echo(f"threshold {threshold.value:.4g}: {how}{threshold.promise()}")
    for note in threshold.caveats():
        click.echo(f"({note})")


def print_promises(
    threshold: Threshold,
    good: npt.NDArray[np.floating],
    defective: npt.NDArray[np.floating] | None = None,
) -> None:
    """A table of what other promises would cost and bring on scored images; nothing for a package without them."""
    if not threshold.others:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    with_defects = defective is not None and len(defective) > 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["promised at most", "threshold", "good rejected", *(["defective caught"] if with_defects else []), ""]
    for heading in columns:
        table.add_column(heading, justify="right" if heading else "left")
    for value, name, note in promise_rows(threshold):
        if value is None:
            table.add_row(name, "–", "–", *(["–"] if with_defects else []), note, style="dim")
            continue
        counts = [_share(good, value)]
        if with_defects:
            assert defective is not None
            counts.append(_share(defective, value))
        table.add_row(name, f"{value:.4g}", *counts, note, style="bold" if note == THIS_PACKAGE else None)
    Console(width=max(Console().width, 100)).print(table)


def promise_rows(threshold: Threshold) -> Sequence[tuple[float | None, str, str]]:
    """Rising promises: threshold (None where it cannot be promised), what is promised, a note."""
    rates = {one.false_reject_rate: one.value for one in threshold.others}
    rates[threshold.false_reject_rate] = threshold.value
    mine = threshold.false_reject_rate
    return [
        (
            value,
            f"{rate:.1%}",
            "too few parts" if value is None else THIS_PACKAGE if rate == mine else "",
        )
        for rate, value in sorted(rates.items())
    ]


def _share(scores: npt.NDArray[np.floating], value: float) -> str:
    above = int((scores > value).sum())
    return f"{above} of {len(scores)} ({above / len(scores):.1%})" if len(scores) else "–"
