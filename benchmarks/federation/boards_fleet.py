"""A small fleet that learns FLAME on generated boards, in this process, in the real rounds."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from aggregator.config import AggregateConfig
from aggregator.run import RunResult
from aggregator.simulation.config import BoardsData, EngineConfig, Evaluation, Partition, SimulationConfig
from aggregator.simulation.engines import open_simulation_engine
from aggregator.simulation.run import METRICS_FILE, simulate
from edgeflame.images import Preprocessing
from edgeflame.log import no_progress
from edgeflame.methods import Learning, Training
from trainer.agent.simulated import SimulatedSites, answer_task
from trainer.agent.tasks import SiteTrainer, WorkerSetup
from trainer.measuring import ModelEvaluator
from trainer.work import TorchSiteTrainer

SIDE = 96


def work(setup: WorkerSetup) -> SiteTrainer:
    """The trainer of an honest site."""
    return TorchSiteTrainer(learning=setup.learning, data=Path(setup.data), site=setup.site, num_references=0)


def run(
    root: Path, *, num_sites: int, rounds: int, build: Callable[[WorkerSetup], SiteTrainer] = work, **fleet: Any
) -> tuple[RunResult, dict[str, float]]:
    """Run a fleet in ``root/run``; returns how the run ended, and the final model's metrics (empty if it failed).

    Statistics are fitted on good images of all sites, so that runs differ in the backbone alone. The images are made
    once, in ``root/data``.

    Args:
        root: a folder.
        num_sites: sites, of equal size.
        rounds: rounds of one epoch.
        build: makes a site's trainer.
        fleet: keys of :class:`AggregateConfig`.
    """
    config = SimulationConfig(
        data=BoardsData(train_parts=40, image_size=128, photos=1, test_good_parts=24, test_defective_parts=40),
        sites=num_sites,
        partition=Partition(beta="even"),
        fleet=AggregateConfig(
            rounds=rounds,
            quorum=0.2,
            learning=Learning(
                method="flame", input=Preprocessing(height=SIDE, width=SIDE), training=Training(epochs=1, batch_size=8)
            ),
            **fleet,
        ),
        evaluation=Evaluation(every=0, sites=False),
        engine=EngineConfig(threads=torch.get_num_threads()),
    )
    out, data = root / "run", root / "data"
    shutil.rmtree(out, ignore_errors=True)
    if data.exists():
        out.mkdir()
        (out / "data").symlink_to(data)
    handle = functools.partial(answer_task, sites=SimulatedSites(build), measure=ModelEvaluator().evaluate)
    with open_simulation_engine(config.engine, handle) as engine:
        result = simulate(config, out, engine, no_progress)
    if not data.exists():
        (out / "data").rename(data)
        (out / "data").symlink_to(data)
    if not result.succeeded:
        return result, {}
    return result, msgspec.json.decode((out / METRICS_FILE).read_bytes())["rounds"][-1]["figures"]
