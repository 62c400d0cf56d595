"""A site's learning that takes a moment: seeded least squares in numpy, and the worker program that serves it.

Knobs for tests come through the environment, because the worker is a process of its own:

    TINY_ELEMENTS   size of the model's large tensor (default 2000)
    TINY_STEPS      steps of a training (default 5)
    TINY_GATE       a folder: before step 2 of each training wait until the file ``go``, or ``go-<site>-<round>``,
                    is in it, and say so by the file ``waiting-<site>-<round>``
    TINY_FAIL       ``site:round:kind``: that training fails; kind is ``data`` (an expected error), ``crash``
                    (the process dies, each time), ``crash-once``, ``nan``, ``shape``; with round 0 its statistics
                    fail: ``other-model``
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from edgeflame.errors import DataError
from edgeflame.log import Progress
from edgeflame.statistics.moments import MomentAccumulator
from edgeflame.statistics.shared import read_moments, write_site_statistics
from trainer.agent.tasks import FinishTask, InitialTask, StatisticsTask, TaskResult, TrainTask, WorkerSetup
from trainer.agent.worker import run_worker


def images_of(site: str, count: int) -> npt.NDArray[np.float32]:
    """A site's "embeddings" ``[count, 6, 5]``; other sites' lie elsewhere."""
    generator = np.random.default_rng(list(site.encode()))
    return (generator.normal(size=(count, 6, 5)) + generator.normal(size=(6, 5))).astype(np.float32)


class TinyTrainer:
    """Implements :class:`trainer.agent.tasks.SiteTrainer`."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._num_samples = 10 + sum(map(ord, setup.site)) % 40
        training = setup.learning.training
        self._num_steps = training.epochs * -(-self._num_samples // training.batch_size)
        if not Path(setup.data).is_dir():
            raise DataError(f"{setup.data}: no such folder")

    def write_initial_model(self, task: InitialTask) -> None:
        generator = np.random.default_rng(self._setup.learning.seed)
        elements = int(os.environ.get("TINY_ELEMENTS", "2000"))
        tensors = {
            "weight": generator.normal(size=(elements,)).astype(np.float32),
            "bias": generator.normal(size=(3, 2)).astype(np.float16),
            "count": np.array(0, dtype=np.int64),
        }
        safetensors.numpy.save_file(tensors, task.out, metadata={"origin": "tiny", "a": "b"})

    def train(self, task: TrainTask, report: Progress) -> TaskResult:
        base = safetensors.numpy.load_file(task.base)
        history = safetensors.numpy.load_file(task.history) if task.history else base
        generator = np.random.default_rng(task.seed)
        weight = base["weight"].astype(np.float64)
        if task.private is not None:
            weight -= 0.01 * safetensors.numpy.load_file(task.private)["drift"]
        failure = self._failure(task.round)
        steps = int(os.environ.get("TINY_STEPS", "5"))
        for step in range(steps):
            if step == 2:
                self._wait_at_gate(task.round)
                self._maybe_crash(failure, Path(task.out).parent / "crashed")
            target = generator.normal(size=weight.shape)
            weight += 0.1 * (target - weight) + 0.01 * (weight - history["weight"])
            report(step + 1, steps, "training")
        if failure == "data":
            raise DataError("the images are gone")
        if failure == "nan":
            weight[7] = np.nan
        if failure == "shape":
            weight = weight[:-1]
        self._keep(task, weight)
        tensors = {
            "weight": weight.astype(np.float32),
            "bias": (base["bias"] * np.float16(0.5)).astype(np.float16),
            "count": np.asarray(base["count"] + self._num_samples, dtype=np.int64),
        }
        safetensors.numpy.save_file(tensors, task.out)
        loss = float(np.square(weight).mean())
        return TaskResult(num_samples=self._num_samples, num_steps=self._num_steps, metrics={"loss": loss})

    def compute_statistics(self, task: StatisticsTask, report: Progress) -> TaskResult:
        accumulator = MomentAccumulator()
        accumulator.add(images_of(self._setup.site, self._num_samples))
        other = self._failure(0) == "other-model"
        truncation = write_site_statistics(
            Path(task.out),
            accumulator.moments(),
            grid=(2, 3),
            model="0" * 64 if other else task.model_sha256,
            form=task.wanted.form,
            rank=task.wanted.rank,
        )
        report(1, 1)
        return TaskResult(num_samples=self._num_samples, metrics=truncation.figures())

    def finish(self, task: FinishTask, report: Progress) -> TaskResult:
        report(1, 1)
        package = Path(task.out_dir) / "site.edgeflame"
        package.write_bytes(b"package of " + self._setup.site.encode() + Path(task.model).read_bytes()[:100])
        summary: dict[str, float | str] = {"rounds": float(len(task.ledger.get("rounds", ()))), "kind": "tiny"}
        if task.statistics is not None:
            summary["pooled_images"] = float(read_moments(Path(task.statistics))[0].count)
        return TaskResult(package=str(package), summary=summary)

    def _keep(self, task: TrainTask, weight: np.ndarray) -> None:
        """What the next round needs: how far this site has moved in all."""
        if task.private_out is None:
            return
        drift = weight - safetensors.numpy.load_file(task.base)["weight"][: len(weight)]
        if task.private is not None:
            drift = drift + safetensors.numpy.load_file(task.private)["drift"][: len(weight)]
        safetensors.numpy.save_file({"drift": drift}, task.private_out)

    def _failure(self, number: int) -> str | None:
        site, _, rest = os.environ.get("TINY_FAIL", "").partition(":")
        at, _, kind = rest.partition(":")
        return kind if (site, at) == (self._setup.site, str(number)) else None

    def _maybe_crash(self, failure: str | None, marker: Path) -> None:
        if failure == "crash" or (failure == "crash-once" and not marker.exists()):
            marker.touch()
            os.abort()

    def _wait_at_gate(self, number: int) -> None:
        gate = os.environ.get("TINY_GATE")
        if not gate:
            return
        name = f"{self._setup.site}-{number}"
        (Path(gate) / f"waiting-{name}").touch()
        while not ((Path(gate) / "go").exists() or (Path(gate) / f"go-{name}").exists()):
            time.sleep(0.01)


if __name__ == "__main__":
    print("libraries print on standard output; it must not disturb the protocol")
    run_worker(TinyTrainer)
