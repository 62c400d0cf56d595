"""How well a model tells good from defective, on the test part of a data set.

The model is a function from pre-processed images to scores and maps, so that what is evaluated can be the very
graph the line runs. No torch here. First the images are scored, beside the records they belong to; then the metrics
are computed; the report is data, and the JSON of ``edgeflame evaluate`` is this.

Definitions: a defect class's image metrics are its images against the good ones, its pixel metrics are over its own
images; the overall pixel metrics are over all test images, the macro metrics are means over the classes. Pixel metrics
are taken at the model's input size: maps resized bilinearly, masks by nearest neighbour. All are fractions of 1, and
None where they are not defined. An interval is 95%: of the metrics by bootstrap over parts
(:mod:`fitting.metrics`), of rejected shares by the bound that thresholds rest on (:mod:`fitting.threshold`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import msgspec
import numpy as np

from edgeflame.dataset import Dataset, ImageRecord, LoadReport, UnreadablePolicy, load_images
from edgeflame.errors import DataError, NumericalError
from edgeflame.frame_sizes import FrameSizes
from edgeflame.images import ImageU8, Preprocessing, read_mask
from edgeflame.layout import GOOD
from edgeflame.log import Progress, no_progress
from edgeflame.tensors import F32, F64
from edgeflame.threshold import ThresholdPromise
from fitting import metrics
from fitting.metrics import PixelCounts, auroc, best_f1, bin_edges, f1_max
from fitting.threshold import confidence_interval

Interval = tuple[float, float]


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """One defect class: its images against the good ones, its pixels over its own images."""

    num_images: int
    num_groups: int
    num_with_mask: int
    image_AUROC: float | None
    pixel_AUROC: float | None
    pixel_AUPRO: float | None
    image_F1Max: float | None
    caught: int
    """Images above the threshold."""
    caught_interval: Interval | None
    intervals: dict[str, Interval]
    """By the figure's name."""
    without_interval: dict[str, str]
    """Figures that have none, and why."""


class PromiseOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one of the package's thresholds on the test images."""

    false_reject_rate: float
    """What it promises at most."""
    threshold: float
    good_rejected: int
    defective_caught: int


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """A test set's figures; ``macro_*`` are means over the classes."""

    image_AUROC: float | None
    pixel_AUROC: float | None
    pixel_AUPRO: float | None
    image_F1Max: float | None
    macro_image_AUROC: float | None
    macro_pixel_AUROC: float | None
    macro_pixel_AUPRO: float | None
    macro_image_F1Max: float | None
    intervals: dict[str, Interval]
    """By the figure's name."""
    without_interval: dict[str, str]
    """Figures that have none, and why."""
    num_resamples: int
    """Of the bootstrap."""
    image_F1Max_threshold: float | None
    pixel_F1Max: float | None
    pixel_F1Max_threshold: float | None
    """The threshold that fits the masks of these very images best; for display, not for rejecting parts."""
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
    good_rejected_interval: Interval | None
    defective_caught: int
    defective_caught_interval: Interval | None
    defective_missed: int
    promises: tuple[PromiseOutcome, ...]
    """What the package's other thresholds would have done; empty where it names none."""


ScoreFunction = Callable[[ImageU8], tuple[F32, F32]]
"""Images ``[N, H, W, 3]`` uint8 BGR to raw scores ``[N]`` and maps ``[N, h, w]``."""

BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """Test images with the model's scores and maps.

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


def score_test_images(
    score: ScoreFunction,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    on_unreadable: UnreadablePolicy = "skip",
    made_of: FrameSizes | None = None,
    progress: Progress = no_progress,
) -> ScoredImages:
    """Score the test images of a data set.

    Args:
        score: the model.
        dataset: its ``test`` part is used.
        preprocessing: the model's.
        on_unreadable: skip or refuse images that cannot be read.
        made_of: sizes of the photographs that the model was made of; the log tells of others.
        progress: counts images.

    Raises:
        DataError: no test images, or an unreadable one where that is refused.
        NumericalError: the model gave a score that is not finite.
    """
    if not dataset.test:
        raise DataError(f"{dataset.root}: no test images (expected test/good and test/<defect>)")
    report = LoadReport(made_of=made_of)
    records, scores, maps = score_records(
        score, dataset.test, preprocessing, on_unreadable=on_unreadable, report=report, progress=progress
    )
    return ScoredImages(records=records, scores=scores, maps=maps, num_unreadable=len(report.unreadable))


def score_records(
    score: ScoreFunction,
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
        raise DataError(f"none of the {len(records)} images could be read")
    all_scores = np.concatenate(scores)
    faulty = np.flatnonzero(~np.isfinite(all_scores))
    if len(faulty):
        raise NumericalError(
            f"the model gave no finite score for {len(faulty)} images, for instance {kept[faulty[0]].name}"
        )
    return kept, all_scores, np.concatenate(maps)


METRIC_NAMES = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max")


def evaluate(
    score: ScoreFunction,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    threshold: float,
    on_unreadable: UnreadablePolicy = "skip",
    seed: int = 0,
    num_resamples: int = metrics.NUM_RESAMPLES,
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Score the test images and compare with what they are: :func:`score_test_images`, then :func:`compute_metrics`."""
    scored = score_test_images(score, dataset, preprocessing, on_unreadable=on_unreadable, progress=progress)
    return compute_metrics(
        scored,
        preprocessing,
        threshold=threshold,
        groups_known=dataset.groups_known,
        seed=seed,
        num_resamples=num_resamples,
    )


def compute_metrics(
    scored: ScoredImages,
    preprocessing: Preprocessing,
    *,
    threshold: float,
    groups_known: bool,
    promises: Sequence[ThresholdPromise] = (),
    seed: int = 0,
    num_resamples: int = metrics.NUM_RESAMPLES,
) -> EvaluationReport:
    """The figures of scored test images.

    Args:
        scored: the images.
        preprocessing: the model's.
        threshold: raw score above which an image is rejected.
        groups_known: whether the records' groups are known, or each image was taken for a part of its own.
        promises: the package's other thresholds.
        seed: of the bootstrap.
        num_resamples: of the bootstrap; 0 for no interval.
    """
    records, scores = scored.records, scored.scores
    parts = _PartIndex(records)
    resamples = metrics.Resamples(len(parts.names), seed=seed, num_resamples=num_resamples)
    good, defective = scored.scores_of(GOOD), scored.defective_scores
    per_class_pixels, everything = _count_pixels(scored, preprocessing, parts)
    spread_by_class = {}
    per_class = {}
    for name in sorted({record.label for record in records} - {GOOD}):
        chosen = [record.label == name for record in records]
        own, own_records = scores[chosen], [record for record in records if record.label == name]
        pixels = per_class_pixels.get(name)
        spread = _resampled_metrics(scored, parts, resamples, chosen, pixels)
        spread_by_class[name] = spread
        figures = _metric_values(good, own, pixels)
        intervals, without = _intervals(figures, spread)
        per_class[name] = ClassReport(
            num_images=len(own),
            num_groups=len({record.group for record in own_records}),
            num_with_mask=sum(record.mask is not None for record in own_records),
            **figures,
            caught=int((own > threshold).sum()),
            caught_interval=_share_interval(own_records, own, threshold),
            intervals=intervals,
            without_interval=without,
        )
    figures = _metric_values(good, defective, everything)
    spread = _resampled_metrics(scored, parts, resamples, [not record.is_good for record in records], everything)
    for name in METRIC_NAMES:
        values = [getattr(one, name) for one in per_class.values()]
        known = [value for value in values if value is not None]
        figures[f"macro_{name}"] = float(np.mean(known)) if known else None
        if known:
            defined = [spread_by_class[key][name] for key, one in per_class.items() if getattr(one, name) is not None]
            spread[f"macro_{name}"] = metrics.mean_over_classes(defined)
    intervals, without = _intervals(figures, spread)
    image_f1 = best_f1(good, defective) if len(good) and len(defective) else None
    pixel_f1 = everything.counts.best_f1() if everything else None
    caught, rejected = int((defective > threshold).sum()), int((good > threshold).sum())
    return EvaluationReport(
        **figures,
        intervals=intervals,
        without_interval=without,
        num_resamples=len(resamples.drawn),
        image_F1Max_threshold=image_f1[1] if image_f1 else None,
        pixel_F1Max=pixel_f1[0] if pixel_f1 else None,
        pixel_F1Max_threshold=pixel_f1[1] if pixel_f1 else None,
        per_class=per_class,
        threshold=threshold,
        num_images=len(records),
        num_good=len(good),
        num_defective=len(defective),
        num_groups=len(parts.names),
        groups_known=groups_known,
        num_unreadable=scored.num_unreadable,
        good_passed=len(good) - rejected,
        good_rejected=rejected,
        good_rejected_interval=_share_interval([one for one in records if one.is_good], good, threshold),
        defective_caught=caught,
        defective_caught_interval=_share_interval([one for one in records if not one.is_good], defective, threshold),
        defective_missed=len(defective) - caught,
        promises=tuple(
            PromiseOutcome(
                false_reject_rate=one.false_reject_rate,
                threshold=one.value,
                good_rejected=int((good > one.value).sum()),
                defective_caught=int((defective > one.value).sum()),
            )
            for one in promises
            if one.value is not None
        ),
    )


class _PartIndex:
    """The parts of the test images, by index."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self.names = sorted({record.group for record in records})
        number = {name: index for index, name in enumerate(self.names)}
        self.of = np.array([number[record.group] for record in records], dtype=np.intp)


@dataclass
class _PixelTotals:
    """Pixels of a class or of all images.

    Attributes:
        counts: of all of them.
        coarse: by part, in wide bins.
        num_regions: by part.
    """

    counts: PixelCounts
    coarse: dict[int, F64] = field(default_factory=dict)
    num_regions: dict[int, int] = field(default_factory=dict)

    def add(self, part: int, counts: PixelCounts, coarse: F64) -> None:
        self.counts.merge(counts)
        self.coarse[part] = self.coarse[part] + coarse if part in self.coarse else coarse
        self.num_regions[part] = self.num_regions.get(part, 0) + counts.num_regions

    def by_part(self, num_parts: int) -> tuple[F64, F64]:
        """Coarse counts ``[G, 3, K]`` and numbers of regions ``[G]``."""
        shape = next(iter(self.coarse.values())).shape
        coarse, regions = np.zeros((num_parts, *shape)), np.zeros(num_parts)
        for part, counts in self.coarse.items():
            coarse[part], regions[part] = counts, self.num_regions[part]
        return coarse, regions


def _count_pixels(
    scored: ScoredImages, preprocessing: Preprocessing, parts: _PartIndex
) -> tuple[dict[str, _PixelTotals], _PixelTotals | None]:
    """Pixels per defect class and over all images. A defective image without a mask counts nowhere."""
    if not any(record.mask is not None for record in scored.records):
        return {}, None
    edges = bin_edges(scored.maps)
    per_class: dict[str, _PixelTotals] = {}
    everything = _PixelTotals(PixelCounts(edges))
    size = (preprocessing.width, preprocessing.height)
    for record, small, part in zip(scored.records, scored.maps, parts.of, strict=True):
        if not record.is_good and record.mask is None:
            continue
        full = np.asarray(cv2.resize(small, size, interpolation=cv2.INTER_LINEAR), dtype=np.float32)
        mask = (
            preprocessing.apply_to_mask(read_mask(record.mask, max_pixels=preprocessing.max_pixels))
            if record.mask is not None
            else None
        )
        counts = PixelCounts(edges)
        counts.add(full, mask)
        coarse = counts.coarse()
        everything.add(int(part), counts, coarse)
        if not record.is_good:
            per_class.setdefault(record.label, _PixelTotals(PixelCounts(edges))).add(int(part), counts, coarse)
    return per_class, everything


def _metric_values(good: F32, defective: F32, pixels: _PixelTotals | None) -> dict[str, float | None]:
    return {
        "image_AUROC": auroc(good, defective),
        "pixel_AUROC": pixels.counts.auroc() if pixels else None,
        "pixel_AUPRO": pixels.counts.aupro() if pixels else None,
        "image_F1Max": f1_max(good, defective),
    }


def _resampled_metrics(
    scored: ScoredImages,
    parts: _PartIndex,
    resamples: metrics.Resamples,
    defective: Sequence[bool],
    pixels: _PixelTotals | None,
) -> dict[str, F64]:
    """Each figure in every resample ``[R]``, of some defective images against the good ones."""
    is_good = np.array([record.is_good for record in scored.records])
    chosen = np.array(defective)
    spread = {}
    if is_good.any() and chosen.any():
        values = metrics.distinct_values(scored.scores[is_good | chosen])
        good, bad = (
            resamples.counts(metrics.image_counts(scored.scores[kind], parts.of[kind], len(parts.names), values))
            for kind in (is_good, chosen)
        )
        spread["image_AUROC"] = metrics.auroc_of_counts(good, bad)
        spread["image_F1Max"] = metrics.f1_of_counts(good, bad)
    if pixels is not None:
        coarse, regions = pixels.by_part(len(parts.names))
        counts = resamples.counts(coarse)
        spread["pixel_AUROC"] = metrics.auroc_of_counts(counts[:, 0], counts[:, 1])
        spread["pixel_AUPRO"] = metrics.aupro_of_counts(counts[:, 0], counts[:, 2], resamples.counts(regions))
    return spread


def _intervals(figures: dict[str, float | None], spread: dict[str, F64]) -> tuple[dict[str, Interval], dict[str, str]]:
    """The intervals by figure, and for figures without one the reason."""
    intervals: dict[str, Interval] = {}
    without: dict[str, str] = {}
    for name, value in figures.items():
        if value is None:
            without[name] = "not defined: " + (
                "no image with a mask" if "pixel" in name else "good or defective images are missing"
            )
            continue
        one = metrics.bootstrap_interval(spread[name])
        if not len(spread[name]):
            without[name] = "no resamples were asked for"
        elif one is None:
            without[name] = "too few parts: more than half of the resamples lack a class or the good images"
        else:
            intervals[name] = one
    return intervals, without


def _share_interval(records: Sequence[ImageRecord], scores: F32, threshold: float) -> Interval | None:
    """95% of the share of photographs above the threshold, each part counting alike."""
    if not records:
        return None
    above: dict[str, list[bool]] = {}
    for record, score in zip(records, scores, strict=True):
        above.setdefault(record.group, []).append(bool(score > threshold))
    return confidence_interval([float(np.mean(one)) for one in above.values()], 0.95)
