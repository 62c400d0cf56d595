"""What caching FLAME's teachers saves in a round of E epochs: forward passes, time, and that the loss is the same.

    python benchmarks/training/teachers.py [--epochs 10] [--parts 12] [--size 128] [--device auto]

The same round is trained with the cache and with none, on generated boards. Images are not augmented, so (E + 2) / 3E
of the forward passes remain: 40% at ten epochs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import msgspec
import torch

import trainer.teacher
from edgeflame.boards import write_dataset
from edgeflame.dataset import open_dataset
from edgeflame.images import Preprocessing
from edgeflame.learning import Learning, Training
from trainer.device import keep_freed_memory, pick_device
from trainer.imageset import ImageSet
from trainer.model import build_model
from trainer.training import TrainingRun, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--parts", type=int, default=12, help="Boards, two photographs each.")
    parser.add_argument("--size", type=int, default=128)
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
        write_dataset(
            Path(folder), texture="warm_wood", num_train_parts=arguments.parts, num_test_good_parts=0,
            num_test_defective_parts=0,
        )  # fmt: skip
        images = ImageSet(open_dataset(Path(folder)).train, learning.input)
        one_round(images, msgspec.structs.replace(learning, training=Training(epochs=1)), device)  # warm-up
        print(f"{len(images)} images, {arguments.size} x {arguments.size}, {arguments.epochs} epochs, {device}\n")
        print("| teachers | forward passes | seconds | loss of the last epoch |\n|---|---|---|---|")
        results = {}
        for title, room in (("not cached", 0), ("cached", trainer.teacher.MAX_CACHE_BYTES)):
            trainer.teacher.Teacher.__init__.__kwdefaults__["max_cache_bytes"] = room
            run, seconds = one_round(images, learning, device)
            passes = run.num_forward + run.num_teacher_forward
            results[title] = passes, seconds, [epoch["loss"] for epoch in run.epochs]
            print(f"| {title} | {passes} | {seconds:.1f} | {run.epochs[-1]['loss']:.7f} |", flush=True)
    (passes, seconds, losses), (fewer, less, same) = results["not cached"], results["cached"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(losses, same, strict=True))
    print(
        f"\nForward passes saved: {1 - fewer / passes:.1%}; time: {1 - less / seconds:.1%}; "
        f"largest relative difference of an epoch's loss: {worst:.1g}"
    )


def one_round(images: ImageSet, learning: Learning, device: torch.device) -> tuple[TrainingRun, float]:
    """A site's second round: the teachers are the pre-trained network and one that went astray from it."""
    networks = [build_model(learning)[0].to(device) for _ in range(3)]
    with torch.no_grad():
        for parameter in networks[2].parameters():
            parameter.mul_(1.01)
    start = time.perf_counter()
    run = train(
        networks[0],
        images,
        learning,
        seed=1,
        global_network=networks[1].backbone,
        historical_network=networks[2].backbone,
    )
    return run, time.perf_counter() - start


if __name__ == "__main__":
    main()
