"""Options that several commands share: those of the broker, of data sets and of thresholds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from cli.output import echo
from cli.paths import FILE, PATH
from edgeflame.methods import DEFAULT_COST_OF_MISS, RejectUnit, ThresholdMode

if TYPE_CHECKING:
    from datetime import datetime

    from edgeflame.mqtt.kit import Kit
    from edgeflame.mqtt.url import BrokerUrl


F = TypeVar("F", bound=Callable[..., Any])


class _Seconds(click.FloatRange):
    """A time of up to a year; click's own range lets NaN through."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


SECONDS = _Seconds(min=0, max=366 * 86_400)


@dataclass(frozen=True, kw_only=True)
class BrokerAccess:
    """A broker, and our identity in the fleet.

    Attributes:
        url: the broker's address, with our certificates.
        fleet: the fleet's name.
        name: our name in the fleet, which only a kit has; None without one.
        certificate_expires: when the kit's certificate expires; None without a kit.
    """

    url: BrokerUrl
    fleet: str
    name: str | None = None
    certificate_expires: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class BrokerOptions:
    """The options by which a command reaches the broker, see :func:`broker_options`."""

    broker: str | None = None
    """Its URL; wins over the kit's."""
    kit: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    connect_timeout: float | None = None
    """Seconds; None tries for ever."""
    fleet: str | None = None

    def with_defaults(self, **defaults: Any) -> BrokerOptions:
        """These options, and for those that were left out the values of a configuration file."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def open(self) -> tuple[BrokerUrl, Kit | None]:
        """The broker's address with our certificates, and the kit that holds them; None without a kit.

        Raises:
            UsageError: the options do not say where the broker is, or contradict each other.
            ConfigError: the kit cannot be read, or is not a kit.
            LinkError: the kit has expired.
        """
        from edgeflame.errors import UsageError
        from edgeflame.mqtt.url import TlsFiles, parse_broker_url

        if self.kit is None:
            if self.broker is None:
                raise UsageError("--broker or --kit: one of them has to say where the broker is")
            return parse_broker_url(self.broker, tls=TlsFiles(ca=self.ca, cert=self.cert, key=self.key)), None
        if self.ca or self.cert or self.key:
            raise UsageError("--kit holds the certificates; --ca, --cert and --key are for those without one")
        from edgeflame.mqtt.kit import read_kit

        kit = read_kit(self.kit)
        return kit.broker_url(self.broker), kit

    def resolve(self, *roles: str) -> BrokerAccess:
        """The broker, and our identity as a member of the fleet.

        Args:
            roles: the roles whose kits the command accepts.

        Raises:
            UsageError: as :meth:`open`, or no fleet is named, or the kit is one of another role.
            ConfigError: as :meth:`open`.
            LinkError: as :meth:`open`.
        """
        from edgeflame.errors import UsageError

        url, kit = self.open()
        if kit is None:
            return BrokerAccess(url=url, fleet=option_or_kit("--fleet", self.fleet, None))
        if kit.role not in roles:
            raise UsageError(
                f"{self.kit}: the kit of the {kit.role} {kit.name!r}; this command takes the kit of one enrolled as "
                f"{' or '.join(roles)}"
            )
        return BrokerAccess(
            url=url,
            fleet=option_or_kit("--fleet", self.fleet, kit.fleet),
            name=kit.name,
            certificate_expires=kit.expires,
        )


_BROKER_OPTIONS = (
    click.option(
        "--broker",
        metavar="URL",
        help="mqtt://[user@]host[:port], mqtts://, ws:// or wss://; the password from EDGEFLAME_MQTT_PASSWORD.",
    ),
    click.option(
        "--kit", type=FILE, help="A kit of `edgeflame fleet`: the broker, the fleet, our name and certificate."
    ),
    click.option("--ca", type=FILE, help="mqtts: certificate authority of the broker (PEM)."),
    click.option("--cert", type=FILE, help="mqtts: our certificate (PEM)."),
    click.option("--key", type=FILE, help="mqtts: our private key (PEM)."),
    click.option(
        "--connect-timeout",
        type=SECONDS,
        metavar="S",
        help="Give up when the broker was not reached in S seconds [default: try for ever].",
    ),
)
_FLEET_OPTION = click.option("--fleet", metavar="NAME", help="Which fleet. A kit names it too.")


def broker_options(*, fleet: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options by which it reaches a broker, as one argument ``broker``: :class:`BrokerOptions`.

    They are ``--broker``, ``--kit``, ``--ca``, ``--cert``, ``--key``, ``--connect-timeout``, and ``--fleet`` unless
    ``fleet`` is false.
    """
    options = (*_BROKER_OPTIONS, _FLEET_OPTION) if fleet else _BROKER_OPTIONS
    names = [field.name for field in fields(BrokerOptions) if fleet or field.name != "fleet"]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> None:
            broker = BrokerOptions(**{name: kwargs.pop(name) for name in names})
            function(*args, broker=broker, **kwargs)

        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def option_or_kit(option: str, value: str | None, from_kit: str | None) -> str:
    """The value of an option that a kit may give as well.

    Raises:
        UsageError: neither gives it, or they give different ones.
    """
    from edgeflame.errors import UsageError

    if value and from_kit and value != from_kit:
        raise UsageError(
            f"{option} {value!r}: the kit is made for {from_kit!r}; leave the option out, or take the right kit"
        )
    if not value and not from_kit:
        raise UsageError(f"{option}: missing, as an option and in a kit or configuration file")
    return value or from_kit or ""


def former_name(
    old: str, new: str, command: click.Command, *, params: Sequence[click.Parameter] | None = None
) -> click.Command:
    """A command under the name it had before: hidden in help, and it warns that it goes with the next version.

    Args:
        old: the earlier name, ``edgeflame GROUP NAME``.
        new: today's name.
        command: today's command.
        params: the parameters of the earlier one; None for the same.
    """

    def run(**options: Any) -> None:
        echo(f"`{old}` goes with the next version: use `{new}`", err=True)
        click.get_current_context().invoke(command, **options)

    name = old.rpartition(" ")[2]
    return click.Command(
        name, callback=run, params=list(command.params if params is None else params), hidden=True, help=command.help
    )


metrics_option = click.option(
    "--metrics", metavar="HOST:PORT", help="Figures for Prometheus, at http://HOST:PORT/metrics."
)

model_option = click.option("--model", required=True, type=PATH, metavar="FILE", help="The package (.edgeflame).")

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where it runs."
)

scores_option = click.option(
    "--scores",
    "scores_file",
    type=PATH,
    metavar="FILE",
    help="Write there, as JSON, the score of each image, and what other thresholds would reject and promise.",
)

prior_option = click.option(
    "--prior",
    "prior_file",
    type=PATH,
    metavar="PACKAGE",
    help="Lean on what another line or the fleet learnt, as far as these images become likelier by it: from five "
    "images on. `fit` takes the package's backbone, too, so no PyTorch is needed.",
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
        type=PATH,
        metavar="CSV",
        help="Which images show the same part.  [default: groups.csv or tiles.csv in the folder]",
    )(function)


def defects_options(function: F) -> F:
    """``--defects`` and ``--cost-of-miss``."""
    function = click.option(
        "--cost-of-miss",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="With --defects: what missing a share of the defective costs against rejecting that share of the good.  "
        f"[default: {DEFAULT_COST_OF_MISS:g}]",
    )(function)
    return click.option(
        "--defects",
        type=PATH,
        metavar="DIR",
        help="Labelled defects, a folder or a data set's test/<defect>: take the threshold of least expected cost, no "
        "lower than the good parts allow. They are in no statistics.",
    )(function)


def cost_of_a_miss(value: float | None, defects: Path | None) -> float:
    """The value of ``--cost-of-miss``, or its default.

    Raises:
        UsageError: it was given without defects.
    """
    from edgeflame.errors import UsageError

    if value is not None and defects is None:
        raise UsageError("--cost-of-miss needs labelled defects: --defects DIR")
    return DEFAULT_COST_OF_MISS if value is None else value


def promise_options(default: str) -> Callable[[F], F]:
    """``--mode``, ``--false-reject-rate``, ``--confidence`` and ``--unit``, whose defaults are ``default``."""

    def decorate(function: F) -> F:
        for option in (
            click.option(
                "--unit",
                type=click.Choice(get_args(RejectUnit)),
                help="What the line rejects: each photograph by itself, or a part as soon as one of its photographs is."
                f"  [default: {default}]",
            ),
            click.option("--confidence", type=float, help=f"With which a rate is promised.  [default: {default}]"),
            click.option(
                "--mode",
                type=click.Choice(get_args(ThresholdMode)),
                help="Whether the rate is what to expect, or what is promised not to be exceeded; a promise takes many "
                f"parts.  [default: {default}]",
            ),
            click.option(
                "--false-reject-rate",
                type=float,
                help=f"Share of the good that may be rejected.  [default: {default}]",
            ),
        ):
            function = option(function)
        return function

    return decorate
