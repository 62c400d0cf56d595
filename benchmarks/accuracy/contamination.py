"""The effect of defective images among the good ones, which of them `fit` finds, and what leaving out the worst gains.

    python benchmarks/accuracy/contamination.py --data D --seeds 0 1 2 --out contamination.json
    python benchmarks/accuracy/contamination.py --table contamination.json ...

From the test part of the data set whole parts with a defect are drawn until enough of their defective images are there
for the share wanted (0, 1%, 5% and 10% of the training images); those images join the training part under their own
part, and everything of those parts leaves the test part. Then the statistics are fitted as `fit` does by default
(frozen backbone, cross-fit over parts), with nothing and with a share of the worst images left out. Embeddings are
computed once. The defects a user would be warned of are those among the images with the highest cross-fitted scores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.dataset import Dataset, ImageRecord, open_dataset
from edgeflame.images import Preprocessing
from edgeflame.methods import Learning, Scoring
from edgeflame.tensors import F32
from fitting.crossfit import cross_fit, image_scores, score_maps
from fitting.embeddings import BATCH_SIZE, Embeddings
from fitting.imageset import ImageSet
from fitting.metrics import auroc
from fitting.suspects import worst_indices
from fitting.threshold import set_threshold
from trainer.embedding import network_embeddings
from trainer.model import build_model

CONTAMINATIONS = (0.0, 0.01, 0.05, 0.1)
LEFT_OUT = (0.0, 0.02, 0.05, 0.1)


class Held:
    """Embeddings in memory, looked up by a choice of images: what `cross_fit` needs of :class:`Embeddings`."""

    def __init__(self, everything: F32, chosen: Sequence[int], embeddings: Embeddings) -> None:
        self._everything = everything
        self._chosen = np.asarray(chosen)
        self.grid, self.num_channels = embeddings.grid, embeddings.num_channels

    def __len__(self) -> int:
        return len(self._chosen)

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], F32]]:
        for start in range(0, len(indices), BATCH_SIZE):
            part = list(indices[start : start + BATCH_SIZE])
            yield part, self._everything[self._chosen[part]]


def mixed_in(dataset: Dataset, count: int, seed: int) -> list[ImageRecord]:
    """Defective images of whole parts of the test part, drawn part by part."""
    by_part: dict[str, list[ImageRecord]] = {}
    for record in dataset.test:
        if not record.is_good:
            by_part.setdefault(record.group, []).append(record)
    parts = sorted(by_part)
    drawn: list[ImageRecord] = []
    for index in np.random.default_rng(seed).permutation(len(parts)):
        if len(drawn) >= count:
            break
        drawn += by_part[parts[index]][: count - len(drawn)]
    return drawn


def run(data: Path, seeds: Sequence[int], shares: Sequence[float], learning: Learning) -> Iterator[dict[str, object]]:
    dataset = open_dataset(data)
    images = ImageSet([*dataset.train, *dataset.test], learning.input)
    model, _ = build_model(learning)
    model.eval()
    embeddings = network_embeddings(model.backbone, images, max_cache_bytes=0)
    everything = np.concatenate([batch for _, batch in embeddings.batches(range(len(images)))])
    index = {record.name: number for number, record in enumerate(images.records)}
    good = [record for record in images.records if record.name.startswith("train/")]
    for seed in seeds:
        for contamination in CONTAMINATIONS:
            bad = mixed_in(dataset, round(contamination * len(good)), seed)
            gone = {record.group for record in bad}
            test = [record for record in images.records if record.name.startswith("test/") and record.group not in gone]
            train, is_bad = [*good, *bad], np.array([False] * len(good) + [True] * len(bad))
            first: npt.NDArray[np.float64] | None = None
            for share in sorted({0.0, *shares}):  # nothing left out comes first: it finds the suspects
                started = time.monotonic()
                out = [] if first is None else worst_indices(first, share)
                kept = [number for number in range(len(train)) if number not in set(out)]
                records = [train[number] for number in kept]
                groups = [record.group for record in records]
                held = Held(everything, [index[record.name] for record in records], embeddings)
                fitted = cross_fit(held, groups, learning)  # type: ignore[arg-type]
                threshold = set_threshold(
                    fitted.held_out.scores, groups, learning.calibration, groups_known=True, num_left_out=len(out)
                )
                result: dict[str, object] = {}
                if first is None:
                    first = fitted.held_out.scores
                    order = np.argsort(-first, kind="stable")
                    for times in (1, 2):
                        among = int(is_bad[order[: times * len(bad)]].sum())
                        result[f"recall_at_{times}x"] = among / len(bad) if len(bad) else None
                scores = np.concatenate(
                    [
                        image_scores(
                            score_maps(
                                fitted.statistics, everything[[index[one.name] for one in part]], learning.scoring
                            )
                        )
                        for part in (test[start : start + 64] for start in range(0, len(test), 64))
                    ]
                )
                test_good = np.array([record.is_good for record in test])
                result.update(
                    data=str(data.name),
                    seed=seed,
                    contamination=contamination,
                    num_mixed_in=len(bad),
                    left_out=share,
                    num_left_out=len(out),
                    bad_left_out=int(is_bad[out].sum()),
                    image_AUROC=auroc(scores[test_good], scores[~test_good]),
                    threshold=threshold.value,
                    rejected=float((scores[test_good] > threshold.value).mean()),
                    caught=float((scores[~test_good] > threshold.value).mean()),
                    seconds=round(time.monotonic() - started, 1),
                )
                print(result, flush=True)
                yield result


def table(results: Sequence[dict[str, float]]) -> str:
    """Markdown: a row for each contamination and share left out, mean over the seeds with the range of the AUROC."""
    heading = "| mixed in | left out | found among the n / 2n worst | defective of those left out "
    lines = [
        f"{heading}| image AUROC (range over seeds) | good rejected | defective caught |",
        "|---|---|---|---|---|---|---|",
    ]
    for contamination in CONTAMINATIONS:
        for share in sorted({one["left_out"] for one in results}):
            rows = [one for one in results if (one["contamination"], one["left_out"]) == (contamination, share)]
            if not rows:
                continue

            def mean(name: str, rows: list[dict[str, float]] = rows) -> float:
                return float(np.mean([row[name] for row in rows]))

            aurocs = [row["image_AUROC"] for row in rows]
            recall = "" if share or not contamination else f"{mean('recall_at_1x'):.0%} / {mean('recall_at_2x'):.0%}"
            defective = f"{mean('bad_left_out'):.0f} of {mean('num_left_out'):.0f}" if share else ""
            lines.append(
                f"| {contamination:.0%} ({mean('num_mixed_in'):.0f}) | {share:.0%} | {recall} | {defective} "
                f"| {np.mean(aurocs):.3f} ({min(aurocs):.3f} to {max(aurocs):.3f}) "
                f"| {mean('rejected'):.1%} | {mean('caught'):.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--left-out", type=float, nargs="+", default=LEFT_OUT)
    parser.add_argument("--size", type=int, default=256, help="Side of the input; 128 takes a quarter of the time.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--ridge", type=float, default=0.1)
    parser.add_argument("--table", type=Path, nargs="+", help="Print the table of results written before.")
    options = parser.parse_args()
    if options.table:
        print(table([one for path in options.table for one in json.loads(path.read_text())]))
        return
    if options.data is None or options.out is None:
        parser.error("--data and --out, or --table")
    # What `fit` chooses on the magnetic tiles, fixed so that a run does not pay for the choice forty times.
    learning = msgspec.structs.replace(
        Learning(),
        input=Preprocessing(height=options.size, width=options.size),
        scoring=Scoring(rank=options.rank, ridge=options.ridge),
    )
    results = list(run(options.data, options.seeds, options.left_out, learning))
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
