"""Images through a model: scores and anomaly maps beside the records they belong to. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeflame.console import Progress, no_progress
from edgeflame.dataset import Dataset, ImageRecord, LoadReport, UnreadablePolicy, load_images
from edgeflame.errors import DataError, NumericalError
from edgeflame.images import ImageU8, Preprocessing

F32 = npt.NDArray[np.float32]

Score = Callable[[ImageU8], tuple[F32, F32]]
"""Images ``[N, H, W, 3]`` uint8 BGR to raw scores ``[N]`` and maps ``[N, h, w]``."""

BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Test images and what the model says of them.

    Attributes:
        records: the readable ones.
        scores: ``[N]`` raw.
        maps: ``[N, h, w]`` raw.
        num_unreadable: images that could not be read.
    """

    records: Sequence[ImageRecord]
    scores: F32
    maps: F32
    num_unreadable: int = 0

    def scores_of(self, label: str) -> F32:
        """The scores of one class, or of the good images."""
        return self.scores[[record.label == label for record in self.records]]

    @property
    def defective_scores(self) -> F32:
        return self.scores[[not record.is_good for record in self.records]]


def score_tests(
    score: Score,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    on_unreadable: UnreadablePolicy = "skip",
    progress: Progress = no_progress,
) -> Scored:
    """Score the test images of a data set.

    Args:
        score: the model.
        dataset: its ``test`` part is used.
        preprocessing: the model's.
        on_unreadable: skip or refuse images that cannot be read.
        progress: counts images.

    Raises:
        DataError: no test images, or an unreadable one where that is refused.
        NumericalError: the model gave a score that is not finite.
    """
    if not dataset.test:
        msg = f"{dataset.root}: no test images (expected test/good and test/<defect>)"
        raise DataError(msg)
    report = LoadReport()
    records, scores, maps = score_records(
        score, dataset.test, preprocessing, on_unreadable=on_unreadable, report=report, progress=progress
    )
    return Scored(records=records, scores=scores, maps=maps, num_unreadable=len(report.unreadable))


def score_records(
    score: Score,
    records: Sequence[ImageRecord],
    preprocessing: Preprocessing,
    *,
    on_unreadable: UnreadablePolicy = "skip",
    report: LoadReport | None = None,
    progress: Progress = no_progress,
) -> tuple[list[ImageRecord], F32, F32]:
    """Score image files.

    Returns:
        The readable records, their scores ``[N]`` and maps ``[N, h, w]``.

    Raises:
        DataError: none can be read, or one cannot where that is refused.
        NumericalError: the model gave a score that is not finite.
    """
    report = report if report is not None else LoadReport()
    kept: list[ImageRecord] = []
    scores: list[F32] = []
    maps: list[F32] = []
    batch: list[ImageU8] = []

    def flush() -> None:
        if batch:
            batch_scores, batch_maps = score(np.stack(batch))
            scores.append(batch_scores)
            maps.append(batch_maps)
            batch.clear()

    for record, image in load_images(records, preprocessing, on_unreadable=on_unreadable, report=report):
        kept.append(record)
        batch.append(image)
        if len(batch) == BATCH_SIZE:
            flush()
        progress(report.num_read + len(report.unreadable), len(records), "scoring")
    flush()
    report.log_summary()
    if not kept:
        msg = f"none of the {len(records)} images could be read"
        raise DataError(msg)
    all_scores = np.concatenate(scores)
    faulty = np.flatnonzero(~np.isfinite(all_scores))
    if len(faulty):
        msg = f"the model gave no finite score for {len(faulty)} images, for instance {kept[faulty[0]].name}"
        raise NumericalError(msg)
    return kept, all_scores, np.concatenate(maps)
