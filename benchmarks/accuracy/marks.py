"""What marks are worth: ranking and verdicts with 0, 5, 20 and all marked parts.

    python benchmarks/accuracy/marks.py [--toy DIR] [--tile DIR] [--rows NAME ...]

A model is fitted to a set's good training photographs with the defaults of `edgeflame fit`, but for images that are
resized by area. The parts of the test set are dealt into five folds. For each fold, that many defective parts of the
other four are drawn and all of their photographs marked as bad; a head is trained, decided upon and the threshold set
as `edgeflame learn` does, and the fold is judged. No photograph of a part that is judged was marked. Three seeds deal
the folds and draw the parts.

Areas under the curve are of defective photographs beside the good ones of the same fold, since each fold has a head
and a threshold of its own; "mean of kinds" is the mean over the kinds of defects. The marks say `it was bad` and the
kind's name, where there are several, and nothing else; in the row "20, where" (of sets with masks) they also say
where. "never marked": marks of all parts of all other kinds, for each kind in turn, folds of the first seed.

"cost": the share of good photographs rejected, plus 10 times the share of defective ones passed, at the threshold that
`edgeflame learn` sets; at that of the good photographs alone; at that of least expected cost with no bound by the good
ones; and at the best threshold there is for the fold, which nobody can know.

Rows: `toy`, `solar-mono`, `solar-poly`, `tile-122`, drawn as in `decisions.py` with seed 0. The settings of the
head were chosen on solar cells and boards; magnetic tile chose only between kinds of heads (docs/experiments.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from decisions import SHARED, rows

from edgeflame.dataset import Dataset, ImageRecord
from edgeflame.methods import DEFAULT_COST_OF_MISS, Learning
from edgeflame.statistics.head import DefectHead
from edgeflame.tensors import F32, F64
from fitting import expected_cost
from fitting.crossfit import make_folds
from fitting.defect_head import HeadFit, fit_head
from fitting.embeddings import Embeddings
from fitting.expected_cost import set_least_cost
from fitting.head_training import HeadImages, region_of
from fitting.imageset import ImageSet
from fitting.marked_images import describe_for_head
from fitting.site_statistics import fit_statistics
from fitting.threshold import set_threshold
from trainer.exchange import open_learner

HERE = Path(__file__).resolve().parent
COUNTS = (0, 5, 20, None)
"""Marked parts; None: all."""
TOLD_WHERE = 20
NAMES = {0: "none", 5: "5", 20: "20", None: "all"}
THRESHOLDS = ("chosen", "by_good", "least_cost")
FOLDS, SEEDS = 5, 3
Figures = dict[str, Any]


@dataclass(frozen=True)
class Set:
    """A data set with what heads need of it.

    Attributes:
        good: of the training part, with held-out scores.
        test: of the test part.
        labels: of the test part; ``good`` or the kind.
        grid: of the embeddings.
        learning: the defaults.
    """

    good: HeadImages
    test: HeadImages
    labels: list[str]
    grid: tuple[int, int]
    learning: Learning

    @property
    def kinds(self) -> list[str]:
        return sorted(set(self.labels) - {"good"})


def prepare(dataset: Dataset) -> Set:
    """Fit the statistics and describe all images."""
    learning = Learning()
    learner = open_learner(learning, torch.device("cpu"))
    images = ImageSet(dataset.train, learning.input, on_unreadable="refuse")
    model, _ = learner.train_alone(images, seed=learning.seed)
    embeddings = Embeddings(model.embedder, images)
    site = fit_statistics(embeddings, learning, groups_known=dataset.groups_known)

    def region(record: ImageRecord) -> F32 | None:
        if record.mask is None:
            return None
        mask = np.asarray(cv2.imread(str(record.mask), cv2.IMREAD_GRAYSCALE), dtype=np.uint8)
        return region_of(learning.input.crop(mask), site.statistics.grid)

    test = ImageSet(dataset.test, learning.input, on_unreadable="refuse")
    return Set(
        good=describe_for_head(site.statistics, embeddings, learning, site.images.groups, scores=site.held_out_scores),
        test=describe_for_head(
            site.statistics,
            Embeddings(model.embedder, test, max_cache_bytes=0),
            learning,
            test.groups,
            kinds=["" if record.is_good else record.label for record in test.records],
            regions=[region(record) for record in test.records] if any(record.mask for record in test.records) else (),
        ),
        labels=[record.label for record in test.records],
        grid=site.statistics.grid,
        learning=learning,
    )


def factors(head: DefectHead | None, images: HeadImages) -> F64:
    """The head's factors, from cells instead of embeddings."""
    if head is None:
        return np.ones(len(images))
    return np.exp(head.log_factors_of_cells(images.cells.astype(np.float32)).astype(np.float64))


@dataclass(frozen=True)
class Thresholds:
    """Of one fold: as `edgeflame learn` sets it, of good photographs alone, and of least expected cost."""

    chosen: float
    by_good: float
    least_cost: float


def thresholds_of(data: Set, fitted: HeadFit, bad: HeadImages) -> Thresholds:
    groups = data.good.groups
    by_good = set_threshold(fitted.good_scores, groups, data.learning.calibration, groups_known=True)
    if not len(bad):
        return Thresholds(by_good.value, by_good.value, by_good.value)
    chosen = set_least_cost(
        by_good, fitted.good_scores, groups, fitted.bad_scores, bad.groups, cost_of_miss=DEFAULT_COST_OF_MISS
    )
    assert chosen.labelled is not None
    return Thresholds(chosen.value, by_good.value, chosen.labelled.least_cost_at)


def cost_at(threshold: float, good: F64, bad: F64) -> float:
    """The share of good ones rejected, plus the cost of the share of defective ones that pass."""
    return float((good > threshold).mean() + DEFAULT_COST_OF_MISS * (bad <= threshold).mean())


def with_marks(
    data: Set, count: int | None, seed: int, *, unseen: str | None = None, is_told_where: bool = False
) -> Figures:
    """Figures with so many marked parts; of kinds but ``unseen``, if one is named."""
    labels = np.array(data.labels)
    groups = np.array(data.test.groups)
    placed, is_rejected = np.full(len(labels), np.nan), np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(seed)
    weights, num_images, costs = [], [], []
    for fold in make_folds(data.test.groups, FOLDS, seed):
        held = np.zeros(len(labels), dtype=bool)
        held[fold] = True
        markable = (labels != "good") & ~held & (labels != (unseen or ""))
        names = np.unique(groups[markable])
        drawn = names[rng.permutation(len(names))][:count]
        bad = data.test.subset(np.flatnonzero(markable & np.isin(groups, drawn)))
        fitted = (
            fit_head(data.good, bad if is_told_where else replace(bad, regions=()), grid=data.grid, seed=seed)
            if len(bad)
            else HeadFit(head=None, good_scores=data.good.scores, bad_scores=np.zeros(0))
        )
        judged = data.test.subset(fold)
        scores = judged.scores * factors(fitted.head, judged)
        is_good = labels[fold] == "good"
        good_scores, bad_scores = scores[is_good], scores[~is_good]
        above = (good_scores[:, None] < scores).mean(axis=0)
        placed[fold] = above + 0.5 * (good_scores[:, None] == scores).mean(axis=0)
        thresholds = thresholds_of(data, fitted, bad)
        is_rejected[fold] = scores > thresholds.chosen
        each = [cost_at(one, good_scores, bad_scores) for one in (0.0, *scores)]
        costs.append(
            {name: cost_at(getattr(thresholds, name), good_scores, bad_scores) for name in THRESHOLDS}
            | {"best": min(each)}
        )
        weights.append(fitted.details.get("weight", 0.0))
        num_images.append(len(bad))
    return {
        "image_AUROC": float(placed[labels != "good"].mean()),
        "by_kind": {kind: float(placed[labels == kind].mean()) for kind in data.kinds},
        "caught": float(is_rejected[labels != "good"].mean()),
        "rejected": float(is_rejected[labels == "good"].mean()),
        "weights": weights,
        "num_images": float(np.mean(num_images)),
        "cost": {name: float(np.mean([one[name] for one in costs])) for name in costs[0]},
    }


def measure(data: Set, seeds: int) -> Figures:
    """All figures of a set."""
    found: Figures = {}
    for count in COUNTS:
        name = NAMES[count]
        found[name] = [with_marks(data, count, seed) for seed in range(seeds)]
        if count == TOLD_WHERE and data.test.regions:
            found[f"{name}, where"] = [with_marks(data, count, seed, is_told_where=True) for seed in range(seeds)]
    if len(data.kinds) > 1:
        found["never marked"] = [{kind: with_marks(data, None, 0, unseen=kind)["by_kind"][kind] for kind in data.kinds}]
    return found


def _mean(runs: Sequence[Figures], name: str) -> str:
    values = [float(np.mean(list(run["by_kind"].values()))) if name == "kinds" else run[name] for run in runs]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def table(results: dict[str, Figures]) -> str:
    lines = [
        "# Marks",
        "",
        "`python benchmarks/accuracy/marks.py`, whose text says what the columns are. Mean over three seeds (least to",
        'greatest). "Caught" and "rejected": at the default threshold.',
        "",
        "| data | marked parts (photographs) | image AUROC | mean of kinds | caught | good rejected | head in use |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for count in (one for one in found if one != "never marked"):
            runs = found[count]
            photographs = f" ({np.mean([run['num_images'] for run in runs]):.0f})" if count != "none" else ""
            weights = [weight for run in runs for weight in run["weights"]]
            used = f"{sum(weight > 0 for weight in weights)} of {len(weights)}" if count != "none" else "–"
            cells = [_mean(runs, key) for key in ("image_AUROC", "kinds", "caught", "rejected")]
            lines.append(f"| {name} | {count}{photographs} | {' | '.join(cells)} | {used} |")
    lines += [
        "",
        "By kind (image AUROC, mean over the seeds):",
        "",
        "| data | kind | no marks | 5 | 20 | all | never marked |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for kind in found["none"][0]["by_kind"]:
            of = [np.mean([run["by_kind"][kind] for run in found[count]]) for count in NAMES.values()]
            unseen = [run[kind] for run in found.get("never marked", [])]
            last = f"{np.mean(unseen):.3f}" if unseen else "–"
            lines.append(f"| {name} | {kind} | {' | '.join(f'{value:.3f}' for value in of)} | {last} |")
    lines += [
        "",
        "Cost (good rejected + 10 x defects passed, shares; mean over folds and seeds) at different thresholds:",
        "",
        "| data | marked parts | as learnt | of the good alone | least expected, no bound | best there is |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for count in NAMES.values():
            costs = [np.mean([run["cost"][key] for run in found[count]]) for key in (*THRESHOLDS, "best")]
            lines.append(f"| {name} | {count} | {' | '.join(f'{value:.2f}' for value in costs)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    # The interval about a threshold of least cost takes most of the time, and is not looked at here.
    expected_cost.NUM_RESAMPLES = 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", type=Path, default=SHARED / "toy-figures")
    parser.add_argument("--tile", type=Path, default=SHARED / "magnetic-tile")
    parser.add_argument("--rows", nargs="+", default=["toy", "solar-mono", "solar-poly", "tile-122"])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "marks.json")
    arguments = parser.parse_args()
    results: dict[str, Figures] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for row in rows(arguments.toy, arguments.tile):
        if row.name not in arguments.rows:
            continue
        if row.missing is not None:
            print(f"{row.name}: left out, {row.missing}", file=sys.stderr)
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            data = prepare(row.draw(0, Path(folder)))
        results[row.title] = measure(data, arguments.seeds)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(results))
        print(f"{row.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
