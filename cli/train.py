"""``edgeflame train``: a site's part in a fleet's rounds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec

from cli.options import BrokerOptions, broker_options, metrics_option, option_or_kit
from cli.output import echo
from cli.paths import FILE, FOLDER
from cli.programs import program
from cli.train_worker import DEVICE_OPTION, REFERENCES_OPTION
from edgeflame.bounds import BASIC, NotEmpty
from edgeflame.package import DEFAULT_REFERENCES, MAX_REFERENCES, check_product


class SiteFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``edgeflame train --config F``, in place of its options. The aggregator decides what is learnt."""

    broker: Annotated[NotEmpty | None, BASIC] = None
    """``mqtt://[user@]host[:port]``, ``mqtts://``, ``ws://`` or ``wss://``; the password from
    ``EDGEFLAME_MQTT_PASSWORD``."""
    kit: Annotated[NotEmpty | None, BASIC] = None
    """A kit of `edgeflame fleet enrol`: the broker, the fleet, the site's name and certificate."""
    ca: NotEmpty | None = None
    """``mqtts``: certificate authority of the broker (PEM)."""
    cert: NotEmpty | None = None
    """``mqtts``: our certificate (PEM)."""
    key: NotEmpty | None = None
    """``mqtts``: our private key (PEM)."""
    fleet: Annotated[NotEmpty | None, BASIC] = None
    """Name of the fleet; a kit has it."""
    site: Annotated[NotEmpty | None, BASIC] = None
    """This site's name in the fleet; a kit has it."""
    data: Annotated[NotEmpty | None, BASIC] = None
    """Folder of this site's images; they stay here."""
    state: Annotated[NotEmpty | None, BASIC] = None
    """Folder of the site's state; ``runs/FLEET/SITE`` if left out."""
    groups: NotEmpty | None = None
    """CSV file that says which photographs show the same part."""
    marks: NotEmpty | None = None
    """Folder of marks, or a line's state folder with one; `feedback` learns from them, and they stay here."""
    product: NotEmpty | None = None
    """The kind of part; marks of others are left out."""
    out: NotEmpty | None = None
    """Where to write the package; if left out, it stays in the state folder."""
    schedule: NotEmpty | None = None
    """When to train, as after ``--schedule``."""
    device: NotEmpty | None = None
    """What trains, as after ``--device``."""
    reference_images: Annotated[int, msgspec.Meta(ge=0, le=MAX_REFERENCES)] | None = None
    """Good images that go into the package."""


@click.command(short_help="Take part in a fleet's training rounds.")
@broker_options()
@click.option("--site", metavar="ID", help="This site's name in it. A kit names both.")
@click.option("--data", type=FOLDER, help="This site's images; they stay here.")
@click.option("--state", type=FOLDER, help="What the site remembers [default: runs/FLEET/SITE].")
@click.option("--config", type=FILE, help="TOML file with any of these options.")
@click.option("--out", type=FILE, help="Where to write the package [default: left in the state folder].")
@click.option("--groups", type=FILE, help="CSV: which photographs show the same part.")
@click.option("--marks", type=FOLDER, help="Marks of this site, for the method feedback; they stay here.")
@click.option("--product", metavar="NAME", help="The kind of part; marks of others are left out.")
@click.option(
    "--reference-images",
    type=click.IntRange(0, MAX_REFERENCES),
    help=f"Good images put into the package, to check what runs it; 0 for none [default: {DEFAULT_REFERENCES}].",
)
@click.option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto].")
@click.option("--schedule", metavar="TEXT", help="When it may train, local time: 'mon-fri 22:00-06:00, sat-sun'.")
@click.option("--worker", hidden=True, help="Command line of another worker program.")
@metrics_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config: Path | None,
    worker: str | None,
    as_json: bool,
    broker: BrokerOptions,
    metrics: str | None,
    **settings: Any,
) -> None:
    """Take part in a fleet's training rounds, and make this site's package from the result.

    The images stay here, but for the few that the package holds; model weights and figures go to the aggregator,
    whose configuration says what is learnt. Killed and started again with the same --state, it continues where it was.
    `edgeflame site` pauses it, lets it go on, or has it leave the run for good.
    """
    from cli.marks import open_marks
    from cli.output import print_json, progress_bar
    from edgeflame.config import load_config
    from edgeflame.errors import UsageError
    from edgeflame.mqtt.topics import check_name
    from edgeflame.state import atomic_copy
    from trainer.agent.control import parse_schedule
    from trainer.agent.service import SiteOptions, run_site

    options = {
        **msgspec.structs.asdict(load_config(config, SiteFile)),
        **{name: value for name, value in settings.items() if value not in (None, "")},
    }
    if not options["data"]:
        raise UsageError("--data: missing, as an option and in the configuration file")
    names = ("kit", "ca", "cert", "key", "state", "groups", "marks", "out")
    paths = {name: Path(options[name]) if options[name] else None for name in names}
    credentials = {name: paths[name] for name in ("kit", "ca", "cert", "key")}
    access = broker.with_defaults(broker=options["broker"], fleet=options["fleet"], **credentials).resolve("site")
    fleet = check_name("fleet", access.fleet)
    site = check_name("site", option_or_kit("--site", options["site"], access.name))
    num_references = options["reference_images"]
    if num_references is None:
        num_references = DEFAULT_REFERENCES
    with progress_bar(f"site {site}") as report:
        result = run_site(
            SiteOptions(
                broker=access.url,
                fleet=fleet,
                site=site,
                data=Path(options["data"]),
                state_dir=paths["state"] or Path("runs") / fleet / site,
                worker_command=shlex.split(worker)
                if worker
                else _worker_command(ctx, num_references, options["device"] or "auto"),
                groups_file=paths["groups"],
                marks=None if paths["marks"] is None else open_marks(paths["marks"]).folder,
                product=None if options["product"] is None else check_product(options["product"]),
                connect_timeout_s=broker.connect_timeout,
                schedule=parse_schedule(options["schedule"]) if options["schedule"] else None,
                metrics=metrics,
                certificate_expires=access.certificate_expires,
            ),
            report=report,
        )
    if result is None:
        echo(f"{site}: has left the run")
        return
    package = result.package
    if package is not None and paths["out"] is not None:
        paths["out"].parent.mkdir(parents=True, exist_ok=True)
        atomic_copy(package, paths["out"])
        package = paths["out"]
    if as_json:
        print_json(
            {
                "site": site,
                "run": result.run,
                "model_sha256": result.model_sha256,
                "package": None if package is None else str(package),
                "summary": result.summary,
            }
        )
        return
    figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.summary.items())
    echo(f"{site}: {package or 'no package'}{': ' if figures else ''}{figures}")


def _worker_command(ctx: click.Context, num_references: int, device: str) -> list[str]:
    # The worker writes to the same terminal or log file; it writes it the same way.
    general = ctx.find_root().params
    return program(
        "cli.train_worker",
        str(general.get("log_format", "text")),
        f"{REFERENCES_OPTION}={num_references}",
        f"{DEVICE_OPTION}={device}",
        *["-v"] * int(general.get("verbose", 0)),
    )
