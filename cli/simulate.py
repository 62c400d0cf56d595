"""``edgeflame simulate``: a fleet's rounds on one machine."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from cli.paths import FILE, FOLDER
from edgeflame.log import LOGGER_NAME

if TYPE_CHECKING:
    from rich.table import Table

    from aggregator.run import RunResult
    from trainer.agent.tasks import SiteTrainer, WorkerSetup


_CHATTY = ("site", "work", "training", "fit", "gaussian", "feddymem", "backbone", "weights")
_THREADS = "OMP_NUM_THREADS"
"""Ray sets it for each of its tasks."""
TABLE_WIDTH = 100


@click.command(short_help="Simulate a fleet's rounds on this machine, or on a Ray cluster.")
@click.option("--config", "config_path", required=True, type=FILE, help="TOML file.")
@click.option(
    "--out", type=FOLDER,
    help="Everything the run makes; an interrupted one continues from it [default: the config's name].",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(config_path: Path, out: Path | None, as_json: bool) -> None:
    """Simulate a fleet: N sites with their share of a data set, in the rounds of `aggregate` and `train`, without MQTT.

    Ends with the global model, the ledger and the figures in --out. Killed and started again with the same --config
    and --out, it continues to the same result. Exits with 1 when a round misses its quorum.
    """
    from aggregator.simulation.config import SimulationConfig
    from aggregator.simulation.engines import open_simulation_engine
    from aggregator.simulation.run import simulate
    from cli.output import print_json, progress_bar
    from edgeflame.config import load_config
    from edgeflame.errors import NegativeAnswerError

    config = load_config(config_path, SimulationConfig)
    # Child processes inherit it, as libraries that are not loaded yet do.
    os.environ[_THREADS] = str(config.engine.threads)
    out_dir = out or Path(config_path.stem)
    with open_simulation_engine(config.engine, answer_simulation_task) as engine, progress_bar("simulation") as report:
        result = simulate(config, out_dir, engine, report)
    if as_json:
        print_json(_metrics(out_dir))
    else:
        _print_summary(result, out_dir)
    if not result.succeeded:
        raise NegativeAnswerError(f"{result.reason}; see {result.ledger_path}")


def answer_simulation_task(data: bytes) -> bytes:
    """The encoded answer to one encoded task; called in this process, in a child process, or in one of Ray's."""
    return _handler()(data)


@functools.cache
def _handler() -> Callable[[bytes], bytes]:
    """The function that carries out tasks in this process; made once.

    Raises:
        MissingDependencyError: torch, or what else training needs, is not installed.
    """
    from edgeflame.errors import MissingDependencyError
    from trainer.agent.simulated import SimulatedSites, answer_task

    try:
        import torch
        from threadpoolctl import threadpool_limits

        from trainer.measuring import ModelEvaluator
    except ImportError as exc:
        raise MissingDependencyError(
            f"a simulation needs more than is installed here ({exc}): pip install 'edgeflame[train]'"
        ) from exc
    threads = int(os.environ.get(_THREADS, "1"))
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    if not logging.getLogger(LOGGER_NAME).isEnabledFor(logging.DEBUG):
        # A log line for each epoch of each of a hundred sites would only hide the others.
        for part in _CHATTY:
            logging.getLogger(f"{LOGGER_NAME}.{part}").setLevel(logging.WARNING)
    return functools.partial(answer_task, sites=SimulatedSites(_build_trainer), measure=ModelEvaluator().evaluate)


def _build_trainer(setup: WorkerSetup) -> SiteTrainer:
    from trainer.work import TorchSiteTrainer

    # No exporter: a simulation needs a site's statistics and figures, not its package.
    return TorchSiteTrainer(
        learning=setup.learning,
        data=Path(setup.data),
        site=setup.site,
        marks=None if setup.marks is None else Path(setup.marks),
        num_references=0,
    )


def _metrics(out_dir: Path) -> dict[str, Any]:
    import msgspec

    from aggregator.simulation.run import METRICS_FILE

    return msgspec.json.decode((out_dir / METRICS_FILE).read_bytes(), type=dict[str, Any])


def _print_summary(result: RunResult, out_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from cli.pages.fleet_report import what_became_of_the_head

    metrics = _metrics(out_dir)
    # A pipe has no width of its own; tables must not be cut to the 80 columns assumed for it.
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else TABLE_WIDTH)
    table = Table(title=f"simulation {out_dir}: {result.ledger['outcome']}")
    for heading in ("round", "sites", "loss", "image AUROC", "macro image", "pixel AUROC", "macro pixel"):
        table.add_column(heading, justify="right")
    entries = {entry["round"]: entry for entry in result.ledger["rounds"]}
    for one in metrics["rounds"]:
        came = entries.get(one["round"], {}).get("contributed", [])
        losses = [site["weight"] * site["metrics"]["loss"] for site in came if "loss" in site["metrics"]]
        figures = one["figures"]
        table.add_row(
            str(one["round"]),
            str(len(came)),
            f"{sum(losses):.4f}" if losses else "",
            *(
                f"{figures[name]:.4f}" if name in figures else ""
                for name in ("image_AUROC", "macro_image_AUROC", "pixel_AUROC", "macro_pixel_AUROC")
            ),
        )
    console.print(table)
    if (kinds := _table_of_kinds(out_dir, metrics)) is not None:
        console.print(kinds)
        every = [one["figures"] for one in metrics["sites"].values()]
        before, after, good = (
            sum(one[name] for one in every) for name in ("good_rejected_without_head", "good_rejected", "num_good")
        )
        console.print(f"{before:.0f} of {good:.0f} good photographs rejected without the head, {after:.0f} with it.")
    for sentence in what_became_of_the_head(result.ledger):
        console.print(sentence, highlight=False)
    own = sorted(site["figures"]["image_AUROC"] for site in metrics["sites"].values())
    if own:
        console.print(
            f"sites with statistics of their own: image AUROC {own[0]:.4f} to {own[-1]:.4f}, "
            f"median {own[len(own) // 2]:.4f}"
        )
    console.print(f"figures: {out_dir / 'metrics.json'}", highlight=False)
    console.print(f"ledger: {result.ledger_path}", highlight=False)


def _table_of_kinds(out_dir: Path, metrics: dict[str, Any]) -> Table | None:
    """What the fleet's head brought: of each kind of defect at the site that marked it, and at the others together;
    None where no site was measured with and without one.
    """
    import msgspec
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from aggregator.simulation.run import RECORD_FILE

    sites = {name: one["classes"] for name, one in metrics["sites"].items() if "head_weight" in one["figures"]}
    if not sites:
        return None
    record = msgspec.json.decode((out_dir / RECORD_FILE).read_bytes(), type=dict[str, Any])
    marked = {kind: (place["site"], len(parts)) for place in record["sites"] for kind, parts in place["marked"].items()}
    table = Table(title="each kind of defect, by each site's model without and with the fleet's head", box=SIMPLE_HEAD)
    for heading in ("kind", "at"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parts\nmarked", "AUROC\nwithout", "\nwith", "caught\nwithout", "\nwith", "\nof"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in sorted({kind for classes in sites.values() for kind in classes}):
        home, num_parts = marked.get(kind, ("", 0))
        elsewhere = "the others" if home else "all"
        for where, names in ((home, sites.keys() & {home}), (elsewhere, sites.keys() - {home})):
            own = [sites[name][kind] for name in names if kind in sites[name]]
            if own:
                areas = (fmean(one[name] for one in own) for name in ("image_AUROC_without_head", "image_AUROC"))
                counts = (sum(one[name] for one in own) for name in ("caught_without_head", "caught", "num_images"))
                table.add_row(
                    kind,
                    where,
                    str(num_parts) if where == home else "",
                    *(f"{area:.4f}" for area in areas),
                    *(f"{count:.0f}" for count in counts),
                )
    return table
