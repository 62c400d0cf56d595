"""``edgeflame simulate``: a fleet's rounds on one machine."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeflame.log import LOGGER_NAME

if TYPE_CHECKING:
    from aggregator.run import RunResult
    from trainer.agent.tasks import SiteTrainer, WorkerSetup


_CHATTY = ("site", "work", "training", "fit", "gaussian", "feddymem", "backbone", "weights")
_THREADS = "OMP_NUM_THREADS"
"""Ray sets it for each of its tasks."""


@click.command(short_help="Simulate a fleet's rounds on this machine, or on a Ray cluster.")
@click.option(
    "--config", "config_path", required=True, type=click.Path(path_type=Path, dir_okay=False), help="TOML file."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
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

        from trainer.work import ModelEvaluator
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
    return TorchSiteTrainer(learning=setup.learning, data=Path(setup.data), site=setup.site, num_references=0)


def _metrics(out_dir: Path) -> dict[str, Any]:
    import msgspec

    from aggregator.simulation.run import METRICS_FILE

    return msgspec.json.decode((out_dir / METRICS_FILE).read_bytes(), type=dict[str, Any])


def _print_summary(result: RunResult, out_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = _metrics(out_dir)
    console = Console(soft_wrap=True)
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
    own = sorted(site["figures"]["image_AUROC"] for site in metrics["sites"].values())
    if own:
        console.print(
            f"sites with statistics of their own: image AUROC {own[0]:.4f} to {own[-1]:.4f}, "
            f"median {own[len(own) // 2]:.4f}"
        )
    console.print(f"figures: {out_dir / 'metrics.json'}", highlight=False)
    console.print(f"ledger: {result.ledger_path}", highlight=False)
