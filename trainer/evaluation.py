"""How well a model tells good from defective, on the test part of a data set.

The model is a function from pre-processed images to scores and maps, so that what is evaluated can be the very
graph the line runs. No torch here.

Definitions: a defect class's image figures are its images against the good ones, its pixel figures are over its own
images; the overall pixel figures are over all test images, the macro figures are means over the classes. Pixel figures
are taken at the model's input size: maps resized bilinearly, masks by nearest neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from edgeflame.console import Progress, no_progress
from edgeflame.dataset import GOOD, Dataset, ImageRecord, UnreadablePolicy
from edgeflame.images import Preprocessing, read_mask
from edgeflame.threshold import Promise
from trainer import bootstrap
from trainer.confidence import two_sided
from trainer.figures import ClassReport, EvaluationReport, Interval, PromiseOutcome
from trainer.metrics import PixelCounts, auroc, best_f1, bin_edges, f1_max
from trainer.scoring import Score, Scored, score_tests

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

FIGURES = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max")


def evaluate(
    score: Score,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    threshold: float,
    on_unreadable: UnreadablePolicy = "skip",
    seed: int = 0,
    num_resamples: int = bootstrap.NUM_RESAMPLES,
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Score the test images and compare with what they are: :func:`score_tests`, then :func:`measure`."""
    scored = score_tests(score, dataset, preprocessing, on_unreadable=on_unreadable, progress=progress)
    return measure(
        scored,
        preprocessing,
        threshold=threshold,
        groups_known=dataset.groups_known,
        seed=seed,
        num_resamples=num_resamples,
    )


def measure(
    scored: Scored,
    preprocessing: Preprocessing,
    *,
    threshold: float,
    groups_known: bool,
    promises: Sequence[Promise] = (),
    seed: int = 0,
    num_resamples: int = bootstrap.NUM_RESAMPLES,
) -> EvaluationReport:
    """The figures of scored test images.

    Args:
        scored: the images.
        preprocessing: the model's.
        threshold: raw score above which an image is rejected.
        groups_known: whether the records' groups are knowledge.
        promises: the package's other thresholds.
        seed: of the bootstrap.
        num_resamples: of the bootstrap; 0 for no interval.
    """
    records, scores = scored.records, scored.scores
    parts = _Parts(records)
    resamples = bootstrap.Resamples(len(parts.names), seed=seed, num_resamples=num_resamples)
    good, defective = scored.scores_of(GOOD), scored.defective_scores
    per_class_pixels, everything = _count_pixels(scored, preprocessing, parts)
    spread_by_class = {}
    per_class = {}
    for name in sorted({record.label for record in records} - {GOOD}):
        chosen = [record.label == name for record in records]
        own, own_records = scores[chosen], [record for record in records if record.label == name]
        pixels = per_class_pixels.get(name)
        spread = _spread(scored, parts, resamples, chosen, pixels)
        spread_by_class[name] = spread
        figures = _figures(good, own, pixels)
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
    figures = _figures(good, defective, everything)
    spread = _spread(scored, parts, resamples, [not record.is_good for record in records], everything)
    for name in FIGURES:
        values = [getattr(one, name) for one in per_class.values()]
        known = [value for value in values if value is not None]
        figures[f"macro_{name}"] = float(np.mean(known)) if known else None
        if known:
            defined = [spread_by_class[key][name] for key, one in per_class.items() if getattr(one, name) is not None]
            spread[f"macro_{name}"] = bootstrap.mean_over_classes(defined)
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


class _Parts:
    """The parts of the test images, by index."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self.names = sorted({record.group for record in records})
        number = {name: index for index, name in enumerate(self.names)}
        self.of = np.array([number[record.group] for record in records], dtype=np.intp)


@dataclass
class _Pixels:
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
    scored: Scored, preprocessing: Preprocessing, parts: _Parts
) -> tuple[dict[str, _Pixels], _Pixels | None]:
    """Pixels per defect class and over all images. A defective image without a mask counts nowhere."""
    if not any(record.mask is not None for record in scored.records):
        return {}, None
    edges = bin_edges(scored.maps)
    per_class: dict[str, _Pixels] = {}
    everything = _Pixels(PixelCounts(edges))
    size = (preprocessing.width, preprocessing.height)
    for record, small, part in zip(scored.records, scored.maps, parts.of, strict=True):
        if not record.is_good and record.mask is None:
            continue
        full = np.asarray(cv2.resize(small, size, interpolation=cv2.INTER_LINEAR), dtype=np.float32)
        mask = preprocessing.apply_to_mask(read_mask(record.mask)) if record.mask is not None else None
        counts = PixelCounts(edges)
        counts.add(full, mask)
        coarse = counts.coarse()
        everything.add(int(part), counts, coarse)
        if not record.is_good:
            per_class.setdefault(record.label, _Pixels(PixelCounts(edges))).add(int(part), counts, coarse)
    return per_class, everything


def _figures(good: F32, defective: F32, pixels: _Pixels | None) -> dict[str, float | None]:
    return {
        "image_AUROC": auroc(good, defective),
        "pixel_AUROC": pixels.counts.auroc() if pixels else None,
        "pixel_AUPRO": pixels.counts.aupro() if pixels else None,
        "image_F1Max": f1_max(good, defective),
    }


def _spread(
    scored: Scored, parts: _Parts, resamples: bootstrap.Resamples, defective: Sequence[bool], pixels: _Pixels | None
) -> dict[str, F64]:
    """Each figure in every resample ``[R]``, of some defective images against the good ones."""
    is_good = np.array([record.is_good for record in scored.records])
    chosen = np.array(defective)
    spread = {}
    if is_good.any() and chosen.any():
        values = bootstrap.distinct_values(scored.scores[is_good | chosen])
        good, bad = (
            resamples.counts(bootstrap.image_counts(scored.scores[kind], parts.of[kind], len(parts.names), values))
            for kind in (is_good, chosen)
        )
        spread["image_AUROC"] = bootstrap.auroc_of_counts(good, bad)
        spread["image_F1Max"] = bootstrap.f1_of_counts(good, bad)
    if pixels is not None:
        coarse, regions = pixels.by_part(len(parts.names))
        counts = resamples.counts(coarse)
        spread["pixel_AUROC"] = bootstrap.auroc_of_counts(counts[:, 0], counts[:, 1])
        spread["pixel_AUPRO"] = bootstrap.aupro_of_counts(counts[:, 0], counts[:, 2], resamples.counts(regions))
    return spread


def _intervals(figures: dict[str, float | None], spread: dict[str, F64]) -> tuple[dict[str, Interval], dict[str, str]]:
    """The intervals there are, and why there is no other."""
    intervals: dict[str, Interval] = {}
    without: dict[str, str] = {}
    for name, value in figures.items():
        if value is None:
            without[name] = "not defined: " + (
                "no image with a mask" if "pixel" in name else "good or defective images are missing"
            )
            continue
        one = bootstrap.interval(spread[name])
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
    return two_sided([float(np.mean(one)) for one in above.values()], 0.95)
