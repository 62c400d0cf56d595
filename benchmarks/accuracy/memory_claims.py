"""FedDyMem's claims, measured: bytes and rounds beside FLAME, and what an update gives away.

    python benchmarks/accuracy/memory_claims.py [--rounds 4] [--boards 24] [--size 128] [--out memory_claims.md]

Three sites of generated boards, each with its own camera; sites and server rule are the product's own, without a broker
between them. Everything is seeded. Prints a Markdown table; progress goes to standard error.

What an attacker who sees a site's update and has images of another site can do, for several privacy floors:

- *nearest patch*: distance of a sent vector to the nearest patch of the site's training images, in units of the root
  mean square distance of two such patches. Beside it the same for patches of another site's images, which have never
  been near this one. A sent vector that *is* a training patch has distance 0.
- *inversion*: a ridge regression from embeddings to pixels, learnt on the other site's images, turns each sent vector
  into pixels; root mean square error (grey levels) to the most similar training patch's. Beside it the same for vectors
  drawn from a normal distribution with the mean and covariance of the other site's patches: guessing.
- *membership*: can the attacker tell training images from other good images of the site by their mean distance to the
  sent vectors? AUC; 0.5 is guessing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from aggregator.config import AggregateConfig
from aggregator.run import aggregate_updates
from aggregator.strategies.interface import Contribution
from edgeflame.dataset import Dataset, open_dataset
from edgeflame.images import Preprocessing
from edgeflame.log import no_progress
from edgeflame.methods import Learning, start_from_presets
from edgeflame.simulation import MeasureTask
from edgeflame.statistics.memory import read_bank
from edgeflame.tensors import F64
from fitting.imageset import ImageSet
from trainer.agent.step_runner import task_seed
from trainer.agent.tasks import InitialTask, TrainTask
from trainer.backbone import EmbeddingNetwork
from trainer.device import rgb_tensor
from trainer.embedding import embed
from trainer.measuring import ModelEvaluator
from trainer.model import build_model
from trainer.work import TorchSiteTrainer

SITES = ("site-1", "site-2", "site-3")
FLOORS = ((1.0, 1.0), (32.0, 4.0), (128.0, 8.0))
SETTLED = 0.01
"""Image AUROC within this of the last round's: converged."""

MAX_PATCHES = 4000
"""Of the site's and the attacker's patches, drawn at random: distances between all of them are taken."""


@dataclass(frozen=True)
class Trace:
    """One method over its rounds: bytes of a site's update, the global model's change, and mean image AUROC."""

    num_bytes: list[int]
    changes: list[float | None]
    aurocs: list[float]

    @property
    def settled_at(self) -> int:
        """The first round from which on the AUROC stays near the last; 0 is the start."""
        near = [abs(one - self.aurocs[-1]) <= SETTLED for one in self.aurocs]
        return len(near) - next((k for k, one in enumerate(reversed(near)) if not one), len(near))


def run_rounds(learning: Learning, data: Path, folder: Path, rounds: int) -> Trace:
    """The rounds of three sites, as the aggregation service carries them out."""
    folder.mkdir()
    config = AggregateConfig(learning=learning)
    works = {site: TorchSiteTrainer(learning=learning, data=data / site, site=site, device="cpu") for site in SITES}
    model = folder / "0"
    works[SITES[0]].write_initial_model(InitialTask(out=str(model)))
    evaluator = ModelEvaluator("cpu")
    trace = Trace(num_bytes=[], changes=[], aurocs=[])

    def measure(path: Path) -> float:
        figures = [
            evaluator.evaluate(
                MeasureTask(
                    name=site, learning=learning, model=str(path), train=(str(data / site),), test=str(data / site)
                )
            ).figures["image_AUROC"]
            for site in SITES
        ]
        return float(np.mean(figures))

    trace.aurocs.append(measure(model))
    kept: dict[str, tuple[Path, Path]] = {}
    for number in range(1, rounds + 1):
        contributions = []
        for site, work in works.items():
            out, private = folder / f"{site}-{number}", folder / f"{site}-{number}.private"
            history, before = kept.get(site, (None, None))
            work.train(
                TrainTask(
                    round=number,
                    base=str(model),
                    history=None if history is None else str(history),
                    out=str(out),
                    seed=task_seed(learning.seed, site, number),
                    private=str(before) if before is not None and before.exists() else None,
                    private_out=str(private),
                ),
                no_progress,
            )
            kept[site] = (out, private)
            contributions.append(Contribution(site=site, path=out, weight=1 / len(SITES)))
            trace.num_bytes.append(out.stat().st_size)
        base, model = model, folder / str(number)
        aggregate_updates(config, base, contributions, model, num_members=len(SITES))
        trace.changes.append(config.exchange.relative_change(base, model))
        trace.aurocs.append(measure(model))
        print(f"{learning.method} round {number}: AUROC {trace.aurocs[-1]:.3f}", file=sys.stderr)
    return trace


class Attacker:
    """Has images of another site, and the frozen backbone, which is public; sees one site's update."""

    def __init__(self, learning: Learning, data: Path, victim: str, other: str) -> None:
        network = build_model(learning)[0].backbone
        self._grid = network.grid
        generator = np.random.default_rng(learning.seed)
        train, unseen = (self._images(open_dataset(data / victim), learning, test) for test in (False, True))
        own = self._images(open_dataset(data / other), learning, False)
        self.train, self.train_pixels = self._patches(network, train)
        self.unseen, _ = self._patches(network, unseen)
        embeddings, pixels = self._patches(network, own)
        flat, grey = embeddings.reshape(-1, embeddings.shape[-1]), pixels.reshape(-1, pixels.shape[-1])
        chosen = generator.permutation(len(flat))[:MAX_PATCHES]
        self.own, self._own_pixels = flat[chosen], grey[chosen]
        flat = self.train.reshape(-1, flat.shape[1])
        chosen = generator.permutation(len(flat))[:MAX_PATCHES]
        self._typical = float(np.sqrt(2 * np.square(flat[chosen] - flat.mean(axis=0)).sum(axis=1).mean()))
        self._generator = generator
        self._centre = self.own.mean(axis=0)
        centred = self.own - self._centre
        gram = centred.T @ centred
        gram += 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        self._inverse = np.linalg.solve(gram, centred.T @ (self._own_pixels - self._own_pixels.mean(axis=0)))

    def nearest(self, vectors: F64) -> float:
        """Median distance to the nearest of all training patches, in units of two patches' distance."""
        flat = self.train.reshape(-1, self.train.shape[-1])
        return float(np.median(np.sqrt(_least(vectors, flat))) / self._typical)

    def inversion(self, vectors: F64) -> float:
        """Median root mean square error of the inverted pixels to the most similar training patch's."""
        pixels = (vectors - self._centre) @ self._inverse + self._own_pixels.mean(axis=0)
        known = self.train_pixels.reshape(-1, self.train_pixels.shape[-1])
        return float(np.median(np.sqrt(_least(pixels, known) / known.shape[1])))

    def guesses(self, count: int) -> F64:
        """Vectors drawn from the other site's mean and covariance alone."""
        covariance = np.cov(self.own.T)
        return self._generator.multivariate_normal(self._centre, covariance, size=count)

    def membership(self, vectors: F64) -> float:
        """AUC of telling training images from unseen ones by their patches' distances."""
        scores = [-np.sqrt(_least(image, vectors)).mean() for images in (self.train, self.unseen) for image in images]
        return float(roc_auc_score([1] * len(self.train) + [0] * len(self.unseen), scores))

    def _images(self, dataset: Dataset, learning: Learning, test: bool) -> npt.NDArray[np.uint8]:
        records = [record for record in (dataset.test if test else dataset.train) if record.is_good]
        images = ImageSet(records, learning.input)
        return images.batch(range(len(images)))

    def _patches(self, network: EmbeddingNetwork, images: npt.NDArray[np.uint8]) -> tuple[F64, F64]:
        embeddings = np.concatenate([embed(network, rgb_tensor(one[None], torch.device("cpu"))) for one in images])
        rows, columns = self._grid
        height, width = images.shape[1] // rows, images.shape[2] // columns
        cells = images.reshape(len(images), rows, height, columns, width, 3).transpose(0, 1, 3, 2, 4, 5)
        return embeddings.astype(np.float64), cells.reshape(len(images), rows * columns, -1).astype(np.float64)


def _least(rows: F64, columns: F64) -> F64:
    squared = np.square(rows).sum(axis=1)[:, None] + np.square(columns).sum(axis=1) - 2 * rows @ columns.T
    least: F64 = np.clip(squared, 0, None).min(axis=1)
    return least


def privacy_rows(learning: Learning, data: Path, folder: Path) -> list[str]:
    """One row for each floor, and the attacker's baselines."""
    attacker = Attacker(learning, data, SITES[0], SITES[1])
    rows = []
    for patches, images in FLOORS:
        memory = msgspec.structs.replace(learning.memory, min_group=patches, min_images=images)
        changed = msgspec.structs.replace(learning, memory=memory)
        work = TorchSiteTrainer(learning=changed, data=data / SITES[0], site=SITES[0], device="cpu")
        base, out = folder / "base", folder / "update"
        work.write_initial_model(InitialTask(out=str(base)))
        work.train(TrainTask(round=1, base=str(base), out=str(out), seed=1), no_progress)
        sent = read_bank(out).prototypes.astype(np.float64)
        name = "none" if patches == 1 else f"{patches:g} patches of {images:g} images"
        rows.append(_row(name, len(sent), attacker, sent))
        print(rows[-1], file=sys.stderr)
    rows.append(_row("*patches of another site*", 256, attacker, attacker.own[:256]))
    rows.append(_row("*guesses*", 256, attacker, attacker.guesses(256)))
    return rows


def _row(name: str, count: int, attacker: Attacker, vectors: F64) -> str:
    figures = (attacker.nearest(vectors), attacker.inversion(vectors), attacker.membership(vectors))
    return f"| {name} | {count} | {figures[0]:.3f} | {figures[1]:.1f} | {figures[2]:.3f} |"


def learning_of(method: str, seed: int, size: Preprocessing) -> Learning:
    """The product's defaults of a method."""
    preset = msgspec.convert(start_from_presets({"method": method}, Learning), Learning)
    return msgspec.structs.replace(preset, seed=seed, input=size)


def main() -> None:
    """Run both parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--boards", type=int, default=24)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(2)
    size = Preprocessing(height=given.size, width=given.size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "boards"
        options = ["--out", str(data), "--sites", "3", "--parts", str(given.boards), "--photos", "1"]
        command = [sys.executable, "-m", "edgeflame", "demo-data", *options, "--seed", str(given.seed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [
            f"| method | bytes up, per site and round | model change | image AUROC | within {SETTLED:g} from |",
            "|---|---|---|---|---|",
        ]
        for method in ("feddymem", "flame"):
            learning = learning_of(method, given.seed, size)
            trace = run_rounds(learning, data, folder / method, given.rounds)
            changes = ", ".join("–" if change is None else f"{change:.3g}" for change in trace.changes)
            aurocs = ", ".join(f"{one:.3f}" for one in trace.aurocs)
            mean_bytes = np.mean(trace.num_bytes)
            lines.append(f"| {method} | {mean_bytes:,.0f} | {changes} | {aurocs} | {trace.settled_at} |")
        lines += [
            "",
            "| privacy floor | vectors | nearest patch | inversion | membership |",
            "|---|---|---|---|---|",
            *privacy_rows(learning_of("feddymem", given.seed, size), data, folder),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
