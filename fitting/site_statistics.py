"""A site's statistics, threshold and suspects, fitted to the embeddings of its good images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import Learning
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.head import DefectHead
from edgeflame.statistics.shared import ScoreDeviation
from edgeflame.threshold import Threshold
from fitting.crossfit import HeldOutScores, PooledStatistics, cross_fit
from fitting.embeddings import Embeddings
from fitting.grouping import find_parts
from fitting.imageset import ImageSet
from fitting.prior import FleetPrior
from fitting.suspects import InfluentialPart, Suspect, influential_parts, worst_indices
from fitting.threshold import set_threshold

log = EventLog("fit")


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What a site adds to a backbone.

    Attributes:
        statistics: of all its good images, as a package stores them.
        threshold: by cross-fitting over its parts.
        images: those it rests on: all that could be read, but for those left out.
        held_out_scores: ``[N]`` of these images, by statistics that did not see them.
        held_out_means: ``[N]`` means of the maps whose maxima these scores are.
        suspects: of all images those that look least normal, the worst first.
        others: how much scores vary at other sites, where the threshold leans on it.
        influential: good parts without any one of which the threshold of the good would be much lower.
        head: for defects that were marked in its fleet, if one counts.
        details: for the package's provenance: rank, pooling, counts, seconds.
    """

    statistics: PackageStatistics
    threshold: Threshold
    images: ImageSet
    held_out_scores: npt.NDArray[np.float64]
    held_out_means: npt.NDArray[np.float64]
    suspects: tuple[Suspect, ...]
    others: ScoreDeviation | None = None
    influential: tuple[InfluentialPart, ...] = ()
    head: DefectHead | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def with_head(
        self,
        head: DefectHead | None,
        scores: npt.NDArray[np.float64],
        threshold: Threshold,
        influential: tuple[InfluentialPart, ...],
    ) -> SiteStatistics:
        """The same with a head, which multiplies the whole map of an image.

        Args:
            head: None: none counts.
            scores: ``[N]`` with the head, of one that did not see them.
            threshold: of these.
            influential: of these.
        """
        factors = scores / self.held_out_scores
        of_image = {record.path: float(factor) for record, factor in zip(self.images.records, factors, strict=True)}
        suspects = []
        for one in self.suspects:
            factor = of_image.get(one.record.path, 1.0)
            shown = (one.anomaly_map * factor).astype(np.float32)
            suspects.append(replace(one, score=one.score * factor, anomaly_map=shown))
        return replace(
            self,
            head=head,
            threshold=threshold,
            held_out_scores=scores,
            held_out_means=self.held_out_means * factors,
            suspects=tuple(sorted(suspects, key=lambda one: -one.score)),
            influential=influential,
        )


def fit_statistics(
    embeddings: Embeddings,
    learning: Learning,
    *,
    groups_known: bool,
    pooled: PooledStatistics | FleetPrior | None = None,
    progress: Progress = no_progress,
) -> SiteStatistics:
    """Gaussian statistics and threshold of a site's good images under a finished backbone.

    Args:
        embeddings: of the images.
        learning: the configuration.
        groups_known: whether the images' parts are known; otherwise they are told by their looks.
        pooled: statistics of more images than these: either they are used, and only the threshold is of these images,
            or they are a prior.
        progress: counts images, over all passes.

    Raises:
        DataError: too few images or parts.
        NumericalError: an embedding is not finite, or nothing varies between the images.
    """
    if not groups_known:
        embeddings = embeddings.with_groups(find_parts(embeddings))
    images = embeddings.images
    first = cross_fit(embeddings, images.groups, learning, pooled=pooled, progress=progress)
    result, kept, left_out = first, images, worst_indices(first.held_out.scores, learning.scoring.drop_worst)
    if left_out:
        log.warning(
            "images_left_out",
            count=len(left_out),
            share=learning.scoring.drop_worst,
            worst=", ".join(images.records[index].name for index in left_out[:5]),
        )
        embeddings = embeddings.subset(sorted(set(range(len(images))) - set(left_out)))
        kept = embeddings.images
        result = cross_fit(embeddings, kept.groups, learning, pooled=pooled, progress=progress)
    others = result.spread
    threshold = set_threshold(
        result.held_out.scores,
        kept.groups,
        learning.calibration,
        groups_known=groups_known,
        num_left_out=len(left_out),
        others=others,
    )
    suspects = find_suspects(images, first.held_out, left_out)
    influential = find_influential(kept, result.held_out.scores, learning, threshold, others)
    details: dict[str, Any] = {
        "rank": result.statistics.rank,
        "ridge": result.statistics.ridge,
        "pooling_radius": result.radius,
        "log_volume_by_pooling_radius": {str(radius): round(value, 4) for radius, value in result.volumes.items()},
        "num_forward_passes": embeddings.num_forward,
        "channels": embeddings.num_channels,
        "channels_before_projection": embeddings.num_tapped_channels,
        "held_out_score_median": float(np.median(result.held_out.scores)),
        "held_out_score_max": float(result.held_out.scores.max()),
    }
    if result.prior is not None:
        details["prior"] = result.prior.describe()
    details["least_normal"] = [
        {"file": one.record.name, "score": one.score, "left_out": one.left_out} for one in suspects[:10]
    ]
    details["influential_parts"] = describe_influential(kept, influential)
    if left_out:
        details["left_out"] = [images.records[index].name for index in left_out]
    log.info(
        "statistics",
        images=len(kept),
        rank=result.statistics.rank,
        ridge=result.statistics.ridge,
        pooling_radius=result.radius,
        threshold=threshold.value,
        parts=threshold.num_groups,
        promised_false_reject_rate=round(threshold.false_reject_rate, 4),
        confidence=threshold.confidence,
        expected_false_reject_rate=threshold.expected_false_reject_rate,
    )
    return SiteStatistics(
        statistics=result.statistics,
        threshold=threshold,
        images=kept,
        held_out_scores=result.held_out.scores,
        held_out_means=result.held_out.means,
        others=others,
        suspects=suspects,
        influential=influential,
        details=details,
    )


def find_suspects(images: ImageSet, held_out: HeldOutScores, left_out: Sequence[int] = ()) -> tuple[Suspect, ...]:
    """The images that look least normal, the worst first; ``left_out`` are indices of those not used."""
    return tuple(
        Suspect(
            record=images.records[index],
            score=float(held_out.scores[index]),
            anomaly_map=one,
            left_out=index in set(left_out),
        )
        for index, one in held_out.highest_maps.items()
    )


def find_influential(
    images: ImageSet,
    scores: npt.NDArray[np.float64],
    learning: Learning,
    threshold: Threshold,
    others: ScoreDeviation | None = None,
) -> tuple[InfluentialPart, ...]:
    """Parts that move the threshold by themselves; they are in the log, too. ``scores`` are held-out, ``[N]``."""
    found = influential_parts(scores, images.groups, learning.calibration, others)
    if found:
        log.warning(
            "part_moves_threshold",
            threshold=threshold.value,
            without_it=found[0].without,
            images=", ".join(images.records[index].name for index in found[0].images[:5]),
            such_parts=len(found),
        )
    return found


def describe_influential(images: ImageSet, parts: Sequence[InfluentialPart]) -> list[dict[str, Any]]:
    """For the package's provenance: the photographs of a part, and what the threshold would be without it."""
    return [
        {"files": [images.records[index].name for index in one.images[:10]], "threshold_without": one.without}
        for one in parts[:10]
    ]
