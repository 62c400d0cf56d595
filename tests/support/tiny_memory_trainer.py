"""The worker program of a site that learns a memory, in numpy: what FedDyMem's rounds need of a site, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy

from edgeflame.log import Progress
from edgeflame.statistics.memory import MemoryBank, empty_bank, read_bank, write_bank
from tests.support.tiny_trainer import TinyTrainer
from trainer.agent.tasks import InitialTask, TaskResult, TrainTask
from trainer.agent.worker import run_worker

CHANNELS, SPACE = 3, "a" * 64


class TinyMemoryTrainer(TinyTrainer):
    """As :class:`TinyTrainer`, with a memory for a model; ``nan`` and ``shape`` mean its own kinds of them."""

    def write_initial_model(self, task: InitialTask) -> None:
        write_bank(Path(task.out), empty_bank(CHANNELS, SPACE))

    def train(self, task: TrainTask, report: Progress) -> TaskResult:
        fleet = read_bank(Path(task.base))
        generator = np.random.default_rng(task.seed)
        centre = fleet.prototypes.mean(axis=0) if len(fleet) else np.zeros(CHANNELS)
        if task.private is not None:
            centre = centre + safetensors.numpy.load_file(task.private)["drift"]
        self._wait_at_gate(task.round)
        failure = self._failure(task.round)
        size = 6
        bank = MemoryBank(
            prototypes=(centre + generator.normal(size=(size, CHANNELS))).astype(np.float32),
            weights=np.full(size, 1 / size, dtype=np.float32),
            effective_patches=np.full(size, 3.0 if failure == "floor" else 40.0, dtype=np.float32),
            effective_images=np.full(size, 5.0, dtype=np.float32),
            count=self._num_samples,
            space="b" * 64 if failure == "space" else SPACE,
        )
        write_bank(Path(task.out), bank)
        if task.private_out is not None:
            safetensors.numpy.save_file({"drift": bank.prototypes.mean(axis=0) - centre}, task.private_out)
        report(1, 1)
        return TaskResult(num_samples=self._num_samples, num_steps=1, metrics={"loss": 1.0})


if __name__ == "__main__":
    run_worker(TinyMemoryTrainer)
