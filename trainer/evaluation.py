"""How well a model tells good from defective, on the test part of a data set.

The model is a function from pre-processed images to scores and maps, so that what is evaluated can be the very
graph the line runs. No torch here.

Definitions: a defect class's ``image_AUROC`` is its images against the good ones, its ``pixel_AUROC`` and
``pixel_AUPRO`` are over its own images; the overall pixel figures are over all test images, the macro figures are
means over the classes. Pixel figures are taken at the model's input size: maps resized bilinearly, masks by nearest
neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.console import EventLog, Progress, no_progress
from edgeflame.dataset import GOOD, Dataset, ImageRecord, LoadReport, UnreadablePolicy, load_images
from edgeflame.errors import DataError, NumericalError
from edgeflame.images import ImageU8, Preprocessing, read_mask
from trainer.metrics import PixelCounts, auroc, bin_edges, bootstrap_auroc, f1_max

log = EventLog("evaluation")

F32 = npt.NDArray[np.float32]

Score = Callable[[ImageU8], tuple[F32, F32]]
"""Images ``[N, H, W, 3]`` uint8 BGR to raw scores ``[N]`` and maps ``[N, h, w]``."""

BATCH_SIZE = 8

NUM_RESAMPLES = 500


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """One defect class. Figures are fractions of 1; pixel figures None without masks."""

    num_images: int
    num_with_mask: int
    image_AUROC: float | None
    pixel_AUROC: float | None
    pixel_AUPRO: float | None
    caught: int
    """Images above the threshold."""


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """A test set's figures, fractions of 1; None where they are not defined."""

    image_AUROC: float | None
    image_AUROC_interval: tuple[float, float] | None
    """95%, by bootstrap over parts."""
    macro_image_AUROC: float | None
    pixel_AUROC: float | None
    macro_pixel_AUROC: float | None
    pixel_AUPRO: float | None
    image_F1Max: float | None
    per_class: dict[str, ClassReport]
    threshold: float
    num_images: int
    num_good: int
    num_defective: int
    num_groups: int
    groups_known: bool
    num_unreadable: int
    good_passed: int
    good_rejected: int
    defective_caught: int
    defective_missed: int


def evaluate(
    score: Score,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    threshold: float,
    on_unreadable: UnreadablePolicy = "skip",
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Score the test images and compare with what they are.

    Args:
        score: the model.
        dataset: its ``test`` part is used.
        preprocessing: the model's.
        threshold: raw score above which an image is rejected.
        on_unreadable: skip or refuse images that cannot be read.
        seed: of the bootstrap.
        num_resamples: of the bootstrap; 0 for no interval.
        progress: counts images, scored and then measured.

    Raises:
        DataError: no test images, or an unreadable one where that is refused.
        NumericalError: the model gave a score that is not finite.
    """
    if not dataset.test:
        msg = f"{dataset.root}: no test images (expected test/good and test/<defect>)"
        raise DataError(msg)
    load_report = LoadReport()
    records, scores, maps = score_records(
        score, dataset.test, preprocessing, on_unreadable=on_unreadable, report=load_report, progress=progress
    )
    good = scores[[record.is_good for record in records]]
    per_class_pixels, all_pixels = _count_pixels(records, maps, preprocessing)
    per_class = {}
    for name in sorted({record.label for record in records} - {GOOD}):
        own = [index for index, record in enumerate(records) if record.label == name]
        pixels = per_class_pixels.get(name)
        per_class[name] = ClassReport(
            num_images=len(own),
            num_with_mask=sum(records[index].mask is not None for index in own),
            image_AUROC=auroc(good, scores[own]),
            pixel_AUROC=pixels.auroc() if pixels else None,
            pixel_AUPRO=pixels.aupro() if pixels else None,
            caught=int((scores[own] > threshold).sum()),
        )
    defective = scores[[not record.is_good for record in records]]
    caught = int((defective > threshold).sum())
    rejected = int((good > threshold).sum())
    return EvaluationReport(
        image_AUROC=auroc(good, defective),
        image_AUROC_interval=_interval(records, scores, seed, num_resamples),
        macro_image_AUROC=_mean([one.image_AUROC for one in per_class.values()]),
        pixel_AUROC=all_pixels.auroc() if all_pixels else None,
        macro_pixel_AUROC=_mean([one.pixel_AUROC for one in per_class.values()]),
        pixel_AUPRO=all_pixels.aupro() if all_pixels else None,
        image_F1Max=f1_max(good, defective),
        per_class=per_class,
        threshold=threshold,
        num_images=len(records),
        num_good=len(good),
        num_defective=len(defective),
        num_groups=len({record.group for record in records}),
        groups_known=dataset.groups_known,
        num_unreadable=len(load_report.unreadable),
        good_passed=len(good) - rejected,
        good_rejected=rejected,
        defective_caught=caught,
        defective_missed=len(defective) - caught,
    )


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


def _count_pixels(
    records: Sequence[ImageRecord], maps: F32, preprocessing: Preprocessing
) -> tuple[dict[str, PixelCounts], PixelCounts | None]:
    """Pixels per defect class and over all images. A defective image without a mask counts nowhere."""
    if not any(record.mask is not None for record in records):
        return {}, None
    edges = bin_edges(maps)
    counts: dict[str, PixelCounts] = {}
    for record, small in zip(records, maps, strict=True):
        if not record.is_good and record.mask is None:
            continue
        size = (preprocessing.width, preprocessing.height)
        full = np.asarray(cv2.resize(small, size, interpolation=cv2.INTER_LINEAR), dtype=np.float32)
        mask = preprocessing.apply_to_mask(read_mask(record.mask)) if record.mask is not None else None
        counts.setdefault(record.label, PixelCounts(edges)).add(full, mask)
    everything = PixelCounts(edges)
    for one in counts.values():
        everything.merge(one)
    counts.pop(GOOD, None)
    return counts, everything


def _interval(records: Sequence[ImageRecord], scores: F32, seed: int, num_resamples: int) -> tuple[float, float] | None:
    good: dict[str, list[float]] = {}
    defective: dict[str, list[float]] = {}
    for record, score in zip(records, scores, strict=True):
        (good if record.is_good else defective).setdefault(record.group, []).append(float(score))
    if not good or not defective or not num_resamples:
        return None
    parts = sorted(set(good) | set(defective))
    return bootstrap_auroc(
        [np.array(good.get(part, [])) for part in parts],
        [np.array(defective.get(part, [])) for part in parts],
        num_resamples=num_resamples,
        seed=seed,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
