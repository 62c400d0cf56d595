"""What marks are worth: ranking and verdicts with 0, 5, 20 and all marked parts.

    python benchmarks/accuracy/marks.py [--toy DIR] [--tile DIR] [--rows NAME ...]

A model is fitted to a set's good training photographs with the defaults of `edgeflame fit`. The parts of the test set
are dealt into five folds. For each fold, that many defective parts of the other four are drawn and all of their
photographs marked as bad; a head is trained, decided upon and the threshold set as `edgeflame learn` does, and the fold
is judged. No photograph of a part that is judged was marked. Three seeds deal the folds and draw the parts.

"mean of kinds" is the mean over the kinds of defects of their areas under the curve. "no mask, no kind": the marks say
`it was bad` and nothing else, but that each kind's name is known where there are several. "never marked": marks of all
parts of all other kinds, for each kind in turn; its area under the curve, the mean over kinds.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from decisions import SHARED, rows
from sklearn.metrics import roc_auc_score

from edgeflame.dataset import Dataset, ImageRecord
from edgeflame.methods import DEFAULT_COST_OF_MISS, Learning
from edgeflame.statistics.head import DefectHead, top_mean
from fitting import expected_cost
from fitting.crossfit import image_scores, make_folds, score_maps
from fitting.defect_head import HeadFit, HeadImages, describe_images, fit_head
from fitting.embeddings import Embeddings
from fitting.expected_cost import set_least_cost
from fitting.imageset import ImageSet
from fitting.site_statistics import fit_statistics
from fitting.threshold import set_threshold
from trainer.exchange import open_learner

HERE = Path(__file__).resolve().parent
COUNTS = (5, 20, None)
"""Marked parts; None: all."""
FOLDS, SEEDS = 5, 3
F64 = npt.NDArray[np.float64]
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

    def described(of: Embeddings, records: Sequence[ImageRecord], held_out: F64 | None) -> HeadImages:
        cells, distances, scores = [], [], []
        for _, batch in of.batches(range(len(of))):
            one = describe_images(site.statistics, batch)
            cells.append(one[0])
            distances.append(one[1])
            scores.append(image_scores(score_maps(site.statistics, batch, learning.scoring)))
        return HeadImages(
            cells=np.concatenate(cells),
            distances=np.concatenate(distances),
            scores=np.concatenate(scores).astype(np.float64) if held_out is None else held_out,
            groups=[record.group for record in records],
            kinds=["" if record.is_good else record.label for record in records],
        )

    test = ImageSet(dataset.test, learning.input, on_unreadable="refuse")
    return Set(
        good=described(embeddings, site.images.records, site.held_out_scores),
        test=described(Embeddings(model.embedder, test, max_cache_bytes=0), test.records, None),
        labels=[record.label for record in test.records],
        grid=site.statistics.grid,
        learning=learning,
    )


def factors(head: DefectHead | None, images: HeadImages) -> F64:
    """The head's factors, from cells instead of embeddings."""
    if head is None:
        return np.ones(len(images))
    hidden = np.maximum(images.cells.astype(np.float32) @ head.weights + head.bias, 0)
    logs: F64 = np.clip(top_mean(hidden @ head.out, head.top) + head.offset, -1.5, 1.5).astype(np.float64)
    return np.exp(logs)


def threshold_of(data: Set, fitted: HeadFit, bad: HeadImages | None) -> float:
    """As `edgeflame learn` sets it."""
    groups = data.good.groups
    threshold = set_threshold(fitted.good_scores, groups, data.learning.calibration, groups_known=True)
    if bad is not None:
        threshold = set_least_cost(
            threshold,
            fitted.good_scores,
            groups,
            fitted.bad_scores,
            bad.groups,
            cost_of_miss=DEFAULT_COST_OF_MISS,
        )
    return threshold.value


def figures_of(data: Set, relative: F64) -> Figures:
    """Of scores over thresholds, ``[N]`` of the test part."""
    labels = np.array(data.labels)
    good = relative[labels == "good"]

    def area(bad: F64) -> float:
        target = np.r_[np.zeros(len(good)), np.ones(len(bad))]
        return float(roc_auc_score(target, np.r_[good, bad]))

    return {
        "image_AUROC": area(relative[labels != "good"]),
        "by_kind": {kind: area(relative[labels == kind]) for kind in data.kinds},
        "caught": float((relative[labels != "good"] > 1).mean()),
        "rejected": float((good > 1).mean()),
    }


def without_marks(data: Set) -> Figures:
    fitted = HeadFit(head=None, good_scores=data.good.scores, bad_scores=np.zeros(0))
    return figures_of(data, data.test.scores / threshold_of(data, fitted, None))


def with_marks(data: Set, count: int | None, seed: int, *, unseen: str | None = None) -> Figures:
    """Figures with so many marked parts; of kinds but ``unseen``, if one is named."""
    labels = np.array(data.labels)
    groups = np.array(data.test.groups)
    relative = np.full(len(labels), np.nan)
    rng = np.random.default_rng(seed)
    weights, num_images = [], []
    for fold in make_folds(data.test.groups, FOLDS, seed):
        held = np.zeros(len(labels), dtype=bool)
        held[fold] = True
        markable = (labels != "good") & ~held & (labels != (unseen or ""))
        names = np.unique(groups[markable])
        drawn = names[rng.permutation(len(names))][:count]
        bad = data.test.subset(np.flatnonzero(markable & np.isin(groups, drawn)))
        fitted = fit_head(data.good, bad, grid=data.grid, seed=seed)
        judged = data.test.subset(fold)
        relative[fold] = judged.scores * factors(fitted.head, judged) / threshold_of(data, fitted, bad)
        weights.append(fitted.details["weight"])
        num_images.append(len(bad))
    return {**figures_of(data, relative), "weights": weights, "num_images": float(np.mean(num_images))}


def measure(data: Set, seeds: int) -> Figures:
    """All figures of a set."""
    found: Figures = {"none": [without_marks(data)]}
    for count in COUNTS:
        found[str(count or "all")] = [with_marks(data, count, seed) for seed in range(seeds)]
    if len(data.kinds) > 1:
        found["never marked"] = [
            {kind: with_marks(data, None, seed, unseen=kind)["by_kind"][kind] for kind in data.kinds}
            for seed in range(seeds)
        ]
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
        for count in ("none", *(str(one or "all") for one in COUNTS)):
            runs = found[count]
            photographs = f" ({np.mean([run['num_images'] for run in runs]):.0f})" if count != "none" else ""
            weights = [weight for run in runs for weight in run.get("weights", [])]
            used = f"{sum(weight > 0 for weight in weights)} of {len(weights)}" if weights else "–"
            cells = [_mean(runs, key) for key in ("image_AUROC", "kinds", "caught", "rejected")]
            lines.append(f"| {name} | {count}{photographs} | {' | '.join(cells)} | {used} |")
    lines += [
        "",
        "By kind (image AUROC, mean over the seeds):",
        "",
        "| data | kind | no marks | 5 | 20 | all | never marked |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        for kind in found["none"][0]["by_kind"]:
            of = [np.mean([run["by_kind"][kind] for run in found[count]]) for count in ("none", "5", "20", "all")]
            unseen = [run[kind] for run in found.get("never marked", [])]
            last = f"{np.mean(unseen):.3f}" if unseen else "–"
            lines.append(f"| {name} | {kind} | {' | '.join(f'{value:.3f}' for value in of)} | {last} |")
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
