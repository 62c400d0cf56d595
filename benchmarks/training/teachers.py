"""What caching FLAME's teachers saves in a round of E epochs, in forward passes and time; the loss stays the same.

    python benchmarks/training/teachers.py [--epochs 10] [--parts 12] [--size 128] [--repeats 3] [--device auto]

The same round is trained with the cache and with none, turn by turn, on generated boards; of the repeats the fastest
counts. Processor time is that of all threads; other work on the machine adds less to it than to the wall time. Images
are not augmented, so (E + 2) / 3E of the forward passes remain: 40% at ten epochs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from boards.dataset import DatasetSpec, write_dataset
from edgeflame.dataset import open_dataset
from edgeflame.images import Preprocessing
from edgeflame.methods import Learning, Training
from fitting.imageset import ImageSet
from trainer.device import keep_freed_memory, pick_device
from trainer.model import build_model
from trainer.objectives import interface
from trainer.training import train


@dataclass(frozen=True, kw_only=True)
class Round:
    passes: int
    losses: list[float]
    wall_s: float
    processor_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--parts", type=int, default=12, help="Boards, two photographs each.")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = pick_device(arguments.device)
    learning = Learning(
        method="flame",
        input=Preprocessing(height=arguments.size, width=arguments.size),
        training=Training(epochs=arguments.epochs),
    )
    with tempfile.TemporaryDirectory() as folder:
        spec = DatasetSpec(
            texture="warm_wood", num_train_parts=arguments.parts, num_test_good_parts=0, num_test_defective_parts=0
        )
        write_dataset(Path(folder), spec)
        images = ImageSet(open_dataset(Path(folder)).train, learning.input)
        one_round(images, msgspec.structs.replace(learning, training=Training(epochs=1)), device)  # warm-up
        print(f"{len(images)} images, {arguments.size} x {arguments.size}, {arguments.epochs} epochs, {device}\n")
        room = {"not cached": 0, "cached": interface.MAX_TEACHER_CACHE_BYTES}
        rounds: dict[str, list[Round]] = {title: [] for title in room}
        for _ in range(arguments.repeats):
            for title, max_cache_bytes in room.items():
                interface.Teacher.__init__.__kwdefaults__["max_cache_bytes"] = max_cache_bytes
                rounds[title].append(one_round(images, learning, device))
    print("| teachers | forward passes | wall time | processor time | loss of the last epoch |\n|---|---|---|---|---|")
    best = {title: min(found, key=lambda one: one.processor_s) for title, found in rounds.items()}
    for title, one in best.items():
        print(f"| {title} | {one.passes} | {one.wall_s:.1f} s | {one.processor_s:.1f} s | {one.losses[-1]:.7f} |")
    without, cached = best["not cached"], best["cached"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(without.losses, cached.losses, strict=True))
    print(
        f"\nSaved: {1 - cached.passes / without.passes:.1%} of the forward passes, "
        f"{1 - cached.processor_s / without.processor_s:.1%} of the processor time, "
        f"{1 - cached.wall_s / without.wall_s:.1%} of the wall time. "
        f"Largest relative difference of an epoch's loss: {worst:.1g}"
    )


def one_round(images: ImageSet, learning: Learning, device: torch.device) -> Round:
    """A site's second round: the teachers are the pre-trained network and one with slightly changed weights."""
    networks = [build_model(learning)[0].to(device) for _ in range(3)]
    with torch.no_grad():
        for parameter in networks[2].parameters():
            parameter.mul_(1.01)
    wall, processor = time.perf_counter(), time.process_time()
    run = train(
        networks[0],
        images,
        learning,
        seed=1,
        global_network=networks[1].backbone,
        historical_network=networks[2].backbone,
    )
    return Round(
        passes=run.num_forward + run.num_teacher_forward,
        losses=[epoch["loss"] for epoch in run.epochs],
        wall_s=time.perf_counter() - wall,
        processor_s=time.process_time() - processor,
    )


if __name__ == "__main__":
    main()
