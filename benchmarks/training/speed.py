"""Speed of a site's learning on a device, and a check that the results agree with the CPU's.

    python benchmarks/training/speed.py [--device cuda] [--backbone NAME] [--size 256] [--parts 40] [--epochs 2]

On generated boards (or the good images of --data): a FADE epoch, a FLAME round with its two teachers, and a `fit`
without training, each after a warm-up of its own; images a second by the wall clock. On a GPU each is run once more
under the profiler, for the share of the wall time in which a kernel ran. Then the same work is done on the CPU in
float32, and compared: embeddings of the untrained network, scores of held-out parts, and losses (whose noise another
device draws differently). Exit code 1 if they are further apart than the tolerances printed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from boards.dataset import DatasetSpec, write_dataset
from edgeflame.dataset import Dataset, open_dataset
from edgeflame.images import Preprocessing
from edgeflame.methods import Backbone, Learning
from edgeflame.tensors import F32
from fitting.imageset import ImageSet
from trainer.device import pick_device, rgb_tensor
from trainer.embedding import embed
from trainer.fit import fit
from trainer.model import build_model
from trainer.training import TrainingRun, train

TOLERANCES = {"embedding": 1e-3, "threshold": 0.02, "FADE loss": 0.05, "FLAME loss": 0.05}
"""Relative tolerances. Embeddings are float32 on both; losses in bfloat16, with other noise, agree in the mean only."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default=Backbone().name)
    parser.add_argument("--weights", default="auto", help="auto, random, or a file.")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2, help="Of the FLAME round.")
    parser.add_argument("--parts", type=int, default=40, help="Boards, two photographs each.")
    parser.add_argument("--data", type=Path, help="A data set in place of generated boards.")
    arguments = parser.parse_args()
    learning = Learning(
        method="flame",
        backbone=Backbone(name=arguments.backbone, weights=arguments.weights),
        input=Preprocessing(height=arguments.size, width=arguments.size),
    )
    learning = with_training(learning, epochs=arguments.epochs, batch_size=arguments.batch)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            spec = DatasetSpec(
                texture="warm_wood", num_train_parts=arguments.parts, num_test_good_parts=0, num_test_defective_parts=0
            )
            write_dataset(Path(folder), spec)
        return run(open_dataset(arguments.data or Path(folder)), learning, pick_device(arguments.device))


def run(dataset: Dataset, learning: Learning, device: torch.device) -> int:
    images = ImageSet(dataset.train, learning.input)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"{len(images)} images, {learning.input.width} x {learning.input.height}, {learning.backbone.name}, "
        f"{learning.backbone.taps}, batches of {learning.training.batch_size}\n"
    )
    work = Work(dataset, images, learning)
    print("| work | images | seconds | images a second | GPU busy |\n|---|---|---|---|---|")
    for title, count, job in work.jobs(device):
        job()  # warm-up
        seconds = timed(job, device)
        busy = f"{busy_share(job):.0%}" if device.type == "cuda" else "–"
        print(f"| {title} | {count} | {seconds:.2f} | {count / seconds:.1f} | {busy} |", flush=True)
    there, here = work.figures(device), work.figures(torch.device("cpu"))
    print("\n| result | here | CPU, float32 | relative difference | tolerance |\n|---|---|---|---|---|")
    worst = 0
    for key, tolerance in TOLERANCES.items():
        difference = float(np.abs(there[key] - here[key]).mean() / np.abs(here[key]).mean())
        worst += difference > tolerance
        shown = [f"{float(np.mean(value)):.5g}" for value in (there[key], here[key])]
        print(f"| {key} | {shown[0]} | {shown[1]} | {difference:.2g} | {tolerance:g} |")
    return 1 if worst else 0


class Work:
    """The three jobs."""

    def __init__(self, dataset: Dataset, images: ImageSet, learning: Learning) -> None:
        self._dataset = dataset
        self._images = images
        self._learning = learning

    def jobs(self, device: torch.device) -> list[tuple[str, int, Callable[[], object]]]:
        count, epochs = len(self._images), self._learning.training.epochs
        return [
            ("FADE, one epoch", count, lambda: self.fade(device, self._learning)),
            (f"FLAME round of {epochs} epochs", count * epochs, lambda: self.flame(device, self._learning)),
            ("fit without training", count, lambda: self.fit(device)),
        ]

    def fade(self, device: torch.device, learning: Learning) -> TrainingRun:
        learning = with_training(msgspec.structs.replace(learning, method="fade"), epochs=1)
        return train(build_model(learning)[0].to(device), self._images, learning, seed=1)

    def flame(self, device: torch.device, learning: Learning) -> TrainingRun:
        networks = [build_model(learning)[0].to(device) for _ in range(3)]
        with torch.no_grad():
            # A history that differs, as after a round.
            for parameter in networks[2].parameters():
                parameter.mul_(1.01)
        return train(
            networks[0],
            self._images,
            learning,
            seed=1,
            global_network=networks[1].backbone,
            historical_network=networks[2].backbone,
        )

    def fit(self, device: torch.device) -> Any:
        return fit(self._dataset, msgspec.structs.replace(self._learning, method="none"), device=device)

    def figures(self, device: torch.device) -> dict[str, F32]:
        """The jobs' results; on the CPU in float32, elsewhere in the device's precision."""
        network = build_model(self._learning)[0].backbone.to(device)
        batch = rgb_tensor(self._images.batch(range(min(8, len(self._images)))), device)
        return {
            "embedding": embed(network, batch),
            "threshold": np.array(self.fit(device).site.threshold.value),
            "FADE loss": np.array(self.fade(device, self._learning).epochs[-1]["loss"]),
            "FLAME loss": np.array(self.flame(device, self._learning).epochs[-1]["loss"]),
        }


def with_training(learning: Learning, **changes: object) -> Learning:
    return msgspec.structs.replace(learning, training=msgspec.structs.replace(learning.training, **changes))


def timed(job: Callable[[], object], device: torch.device) -> float:
    """Seconds by the wall clock, the device's work included."""
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def busy_share(job: Callable[[], object]) -> float:
    """Share of the wall time in which a kernel ran on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = timed(job, torch.device("cuda"))
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds


if __name__ == "__main__":
    sys.exit(main())
