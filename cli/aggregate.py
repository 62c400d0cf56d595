"""``edgeflame aggregate``: serve the rounds of a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import BrokerOptions, broker_options, metrics_option
from cli.paths import FILE, FOLDER
from edgeflame.methods import FEDERATED_METHODS, PRESETS

if TYPE_CHECKING:
    from aggregator.config import AggregateConfig
    from aggregator.run import RunResult


@click.command(short_help="Serve the training rounds of a fleet.")
@broker_options()
@click.option("--state", required=True, type=FOLDER, help="Journal and models; an interrupted run continues from it.")
@click.option("--config", type=FILE, help="TOML file with the run's settings.")
@click.option("--rounds", type=int, help="Number of rounds [default: 2].")
@click.option("--sites", type=int, help="Begin when so many sites are ready [default: 2].")
@click.option("--method", help=f"{', '.join(FEDERATED_METHODS)} [default: flame].")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="What settings start from [default: default].")
@click.option("--out", type=FOLDER, help="Where to write the global model and the ledger [default: the state folder].")
@click.option("--new-run", is_flag=True, help="Begin another run although the state folder holds a finished one.")
@click.option("--stay", is_flag=True, help="Keep answering and serving late sites after the end, as a service does.")
@metrics_option
@click.option("--json", "as_json", is_flag=True, help="Print the ledger as JSON.")
def command(
    broker: BrokerOptions,
    state: Path,
    config: Path | None,
    rounds: int | None,
    sites: int | None,
    method: str | None,
    preset: str | None,
    out: Path | None,
    new_run: bool,
    stay: bool,
    metrics: str | None,
    as_json: bool,
) -> None:
    """Serve the training rounds of a fleet: wait for sites, average their models, hand out the result.

    Ends when every site has its package, or exits with 1 when a round misses its quorum. Killed and started again
    with the same --state, it continues where it was. With --stay it ends when it is interrupted, or on
    `edgeflame rounds stop`. `edgeflame rounds` also ends the rounds early and removes sites; `edgeflame site` pauses
    them.
    """
    from aggregator.service import run_aggregator
    from cli.output import print_json, progress_bar
    from edgeflame.errors import NegativeAnswerError

    settings = _settings(config, rounds=rounds, sites=sites, method=method, preset=preset)
    access = broker.resolve("aggregator")
    with progress_bar(f"fleet {access.fleet}: rounds") as report:
        result = run_aggregator(
            broker=access.url,
            fleet=access.fleet,
            state_dir=state,
            out_dir=out or state,
            config=settings,
            report=report,
            new_run=new_run,
            connect_timeout_s=broker.connect_timeout,
            stay=stay,
            metrics=metrics,
            certificate_expires=access.certificate_expires,
        )
    if as_json:
        print_json(result.ledger)
    else:
        _print_summary(result)
    if not result.succeeded:
        raise NegativeAnswerError(f"{result.reason}; see {result.ledger_path}")


def _settings(
    path: Path | None, *, rounds: int | None, sites: int | None, method: str | None, preset: str | None
) -> AggregateConfig:
    """The file's settings; the command line wins over them."""
    from aggregator.config import AggregateConfig
    from edgeflame.config import load_config

    learning = {"method": method, "preset": preset} if method or preset else None
    overrides = {"rounds": rounds, "min_available_sites": sites, "learning": learning}
    return load_config(path, AggregateConfig, overrides)


def _print_summary(result: RunResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table(title=f"run {result.ledger['run'][:8]}: {result.ledger['outcome']}")
    for heading in ("round", "contributed", "left out", "model"):
        table.add_column(heading)
    for entry in result.ledger["rounds"]:
        came = ", ".join(f"{c['site']} ({c['num_samples']})" for c in entry["contributed"])
        missed = ", ".join(f"{m['site']}: {m['reason']}" for m in entry["left_out"])
        table.add_row(str(entry["round"]), came, missed, (entry["model_sha256"] or "")[:12])
    console.print(table)
    if result.model_path is not None:
        console.print(f"global model: {result.model_path}", highlight=False)
    console.print(f"ledger: {result.ledger_path}", highlight=False)
