"""A simulation of tiny sites; ``main`` is for a process of its own, with CONFIG and OUT as its arguments.

Knobs as in ``tiny_trainer``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import safetensors.numpy

from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.engines import open_simulation_engine
from aggregator.simulation.run import simulate
from edgeflame.config import load_config
from edgeflame.log import no_progress
from edgeflame.simulation import MeasureAnswer, MeasureTask
from tests.support.tiny_trainer import TinyTrainer
from trainer.agent.simulated import SimulatedSites, answer_task


def measure(task: MeasureTask) -> MeasureAnswer:
    """The mean of the weights: other models have other figures."""
    assert all(Path(folder, "train", "good").is_dir() for folder in task.train)
    assert Path(task.test, "test", "good").is_dir()
    if task.model is None:
        figures = {"image_AUROC": task.seed / 2**32, "num_epochs": float(task.learning.training.epochs)}
        return MeasureAnswer(name=task.name, figures=figures, classes={})
    weight = safetensors.numpy.load_file(task.model)["weight"]
    figures = {"image_AUROC": float(weight.mean()), "num_folders": float(len(task.train))}
    return MeasureAnswer(name=task.name, figures=figures, classes={})


@functools.cache
def sites() -> SimulatedSites:
    return SimulatedSites(TinyTrainer)


def handle(data: bytes) -> bytes:
    return answer_task(data, sites(), measure)


def main() -> None:
    config = load_config(Path(sys.argv[1]), SimulationConfig)
    with open_simulation_engine(config.engine, handle) as engine:
        simulate(config, Path(sys.argv[2]), engine, no_progress)
