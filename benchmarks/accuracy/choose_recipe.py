"""Compare recipes on held-out parts of the good images, with synthetic defects; no test image is read.

    python benchmarks/accuracy/choose_recipe.py --data DIR RECIPE.toml ...

A recipe is what `edgeflame fit --config` takes. The parts of train/good are dealt into folds; each recipe learns
from all folds but one, and is tested on that fold's photographs against copies of them with a faint defect. Printed:
the mean over folds of the image AUROC, per kind of defect and over kinds. Differences below 0.005 mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from synthetic_defects import KINDS, add_defect

from edgeflame.config import load_config
from edgeflame.dataset import open_dataset
from edgeflame.images import ImageU8
from edgeflame.methods import Learning
from edgeflame.statistics.gaussian import fit_gaussian
from edgeflame.statistics.moments import MomentAccumulator
from edgeflame.tensors import F32
from fitting.crossfit import image_scores, make_folds, score_maps
from fitting.imageset import ImageSet
from trainer.device import pick_device, rgb_tensor
from trainer.embedding import embed
from trainer.model import SiteModel, build_model
from trainer.training import train

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--use-folds", type=int, default=None, help="Hold out only the first of them.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    dataset = open_dataset(arguments.data)
    print("| recipe | mean | " + " | ".join(KINDS) + " |")
    print("|---|---|" + "---|" * len(KINDS))
    for path in arguments.recipes:
        learning = load_config(path, Learning)
        images = ImageSet(dataset.train, learning.input)
        rng = np.random.default_rng(arguments.seed)
        kinds = rng.permutation([KINDS[index % len(KINDS)] for index in range(len(images))])
        spoiled = np.stack([add_defect(images.batch([i])[0], kind, rng) for i, kind in enumerate(kinds)])
        folds = make_folds(images.groups, arguments.folds, arguments.seed)
        figures = []
        for fold in folds[: arguments.use_folds]:
            kept = sorted(set(range(len(images))) - set(fold))
            good, bad = fold_scores(learning, images, kept, images.batch(fold), spoiled[fold], device)
            figures.append([_auroc(good, bad[kinds[fold] == kind]) for kind in KINDS])
        means = np.mean(figures, axis=0)
        print(f"| {path.stem} | {means.mean():.4f} | " + " | ".join(f"{one:.3f}" for one in means) + " |", flush=True)


def fold_scores(
    learning: Learning, images: ImageSet, kept: Sequence[int], good: ImageU8, bad: ImageU8, device: torch.device
) -> tuple[F32, F32]:
    """Scores of held-out photographs and their spoiled copies, by what was learnt from ``kept``."""
    model, _ = build_model(learning)
    model.to(device)
    subset = ImageSet([images.records[index] for index in kept], learning.input)
    if learning.method != "none":
        train(model, subset, learning, seed=learning.seed)
    accumulator = MomentAccumulator()
    for start in range(0, len(subset), 8 * BATCH):
        chosen = range(start, min(start + 8 * BATCH, len(subset)))
        accumulator.add(_embed(model, subset.batch(chosen), device))
    scoring = learning.scoring
    if scoring.rank == "auto" or scoring.ridge == "auto":
        # What `auto` would choose is decided by fit; a comparison wants them fixed.
        scoring = msgspec.structs.replace(scoring, rank=scoring.max_rank, ridge=0.1)
    gaussian = fit_gaussian(
        accumulator.moments(), grid=model.backbone.grid, rank=int(scoring.rank), ridge=float(scoring.ridge)
    )
    return tuple(  # type: ignore[return-value]
        np.concatenate(
            [
                image_scores(score_maps(gaussian, _embed(model, batch[i : i + 64], device), scoring))
                for i in range(0, len(batch), 64)
            ]
        )
        for batch in (good, bad)
    )


def _embed(model: SiteModel, batch: ImageU8, device: torch.device) -> F32:
    parts = [embed(model.backbone, rgb_tensor(batch[i : i + BATCH], device)) for i in range(0, len(batch), BATCH)]
    return np.concatenate(parts)


def _auroc(good: F32, bad: F32) -> float:
    labels = np.concatenate([np.zeros(len(good)), np.ones(len(bad))])
    return float(roc_auc_score(labels, np.concatenate([good, bad])))


if __name__ == "__main__":
    main()
