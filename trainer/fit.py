"""Fitting one site's model from its good images: backbone, optional training, statistics, threshold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeflame.dataset import Dataset, LoadReport, UnreadablePolicy
from edgeflame.errors import DataError, UsageError
from edgeflame.images import ImageU8
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import METHODS, SOLO_METHODS, Learning
from edgeflame.package import DEFAULT_REFERENCES, WeightsOrigin
from fitting.crossfit import PooledStatistics, require_enough
from fitting.imageset import ImageSet
from fitting.packaging import SiteStatistics, choose_references
from fitting.suspects import Suspect, worst_indices
from fitting.threshold import set_threshold
from trainer.backbone import EmbeddingNetwork
from trainer.crossfit import cross_fit
from trainer.device import keep_freed_memory
from trainer.embedding import Embeddings
from trainer.feddymem.site import MemoryLearner
from trainer.model import SiteModel, build_model
from trainer.training import train

log = EventLog("fit")

Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress of one stage of the work by its name."""


@contextmanager
def quiet_stage(name: str) -> Iterator[Progress]:
    """A stage that reports to nobody."""
    del name
    yield no_progress


@dataclass(frozen=True, kw_only=True)
class FittedModel:
    """A model that can be exported and can inspect.

    Attributes:
        network: the embedding network, on the CPU, in evaluation mode.
        site: statistics and threshold.
        weights: where the backbone's weights came from before any training.
        learning: the configuration it was fitted with.
        report: what happened while the images were read.
        training: metrics of the training, empty without one.
        seconds: by stage.
        references: good images for the package, ``[R, height, width, 3]``.
    """

    network: EmbeddingNetwork
    site: SiteStatistics
    weights: WeightsOrigin
    learning: Learning
    report: LoadReport
    training: dict[str, Any]
    seconds: dict[str, float]
    references: ImageU8

    def provenance(self) -> dict[str, Any]:
        """How this fit went, for the package's manifest."""
        return {
            "kind": "fit",
            "method": self.learning.method,
            "num_images": len(self.site.images),
            "num_unreadable": len(self.report.unreadable),
            "unreadable": self.report.unreadable[:20],
            "training": self.training,
            "statistics": self.site.details,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def fit(
    dataset: Dataset,
    learning: Learning,
    *,
    on_unreadable: UnreadablePolicy = "skip",
    device: torch.device | None = None,
    num_references: int = DEFAULT_REFERENCES,
    stage: Stage = quiet_stage,
) -> FittedModel:
    """Fit a model from the good training images of a data set; ``num_references`` of them go into the package.

    Raises:
        UsageError: the method needs other sites.
        DataError: too few images, or an unreadable one where that is refused.
        MissingDependencyError: no weights can be had.
        NumericalError: an embedding or a loss is not finite.
    """
    keep_freed_memory()
    device = device or torch.device("cpu")
    if learning.method not in SOLO_METHODS:
        raise UsageError(f"method {learning.method} needs other sites; fit takes {', '.join(SOLO_METHODS)}")
    seconds: dict[str, float] = {}
    with _timed(seconds, "reading"), stage("Reading images") as progress:
        images = read_training_images(dataset, learning, on_unreadable=on_unreadable, progress=progress)
    if METHODS[learning.method].exchange == "memory":
        return _fit_memory(dataset, images, learning, device, num_references, seconds, stage)
    model, weights = build_model(learning)
    model.to(device)
    training: dict[str, Any] = {}
    if learning.method != "none":
        with _timed(seconds, "training"), stage("Training") as progress:
            training = train(model, images, learning, seed=learning.seed, progress=progress).details()
    with _timed(seconds, "statistics"), stage("Statistics and threshold") as progress:
        site = fit_statistics(
            model, images, learning, groups_known=dataset.groups_known, device=device, progress=progress
        )
    return FittedModel(
        network=model.backbone.cpu(),
        site=site,
        weights=weights,
        learning=learning,
        report=images.report,
        training=training,
        seconds=seconds,
        references=choose_references(site.images, num_references),
    )


def _fit_memory(
    dataset: Dataset,
    images: ImageSet,
    learning: Learning,
    device: torch.device,
    num_references: int,
    seconds: dict[str, float],
    stage: Stage,
) -> FittedModel:
    """FedDyMem at one site: there is no other memory than its own."""
    learner = MemoryLearner(learning, images, device=device)
    with _timed(seconds, "training"), stage("Training") as progress:
        memory, metrics = learner.train(None, None, seed=learning.seed, progress=progress)
    with _timed(seconds, "statistics"), stage("Statistics and threshold") as progress:
        site = learner.fit(memory, None, groups_known=dataset.groups_known, progress=progress)
    return FittedModel(
        network=learner.network.cpu(),
        site=site,
        weights=learner.weights,
        learning=learning,
        report=images.report,
        training=metrics,
        seconds=seconds,
        references=choose_references(images, num_references),
    )


def read_training_images(
    dataset: Dataset,
    learning: Learning,
    *,
    on_unreadable: UnreadablePolicy = "skip",
    progress: Progress = no_progress,
) -> ImageSet:
    """The readable good training images.

    Raises:
        DataError: too few of them, or an unreadable one where that is refused.
    """
    images = ImageSet(dataset.train, learning.input, on_unreadable=on_unreadable, progress=progress)
    try:
        require_enough(len(images), len(set(images.groups)))
    except DataError as exc:
        unreadable = len(images.report.unreadable)
        raise DataError(
            f"{dataset.root}: {exc}" + (f" ({unreadable} could not be read)" if unreadable else "")
        ) from exc
    return images


def fit_statistics(
    model: SiteModel,
    images: ImageSet,
    learning: Learning,
    *,
    groups_known: bool,
    device: torch.device,
    pooled: PooledStatistics | None = None,
    progress: Progress = no_progress,
) -> SiteStatistics:
    """Statistics and threshold of a finished backbone; with ``pooled`` statistics only the threshold is of the images.

    Raises:
        DataError: too few images or parts.
        NumericalError: an embedding is not finite, or nothing varies between the images.
    """
    model.eval()
    embeddings = Embeddings(model.backbone, images, device=device)
    first = cross_fit(embeddings, images.groups, learning, pooled=pooled, progress=progress)
    result, kept, left_out = first, images, worst_indices(first.held_out_scores, learning.scoring.drop_worst)
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
    threshold = set_threshold(
        result.held_out_scores,
        kept.groups,
        learning.calibration,
        groups_known=groups_known,
        num_left_out=len(left_out),
    )
    suspects = tuple(
        Suspect(
            record=images.records[index],
            score=float(first.held_out_scores[index]),
            anomaly_map=one,
            left_out=index in set(left_out),
        )
        for index, one in first.highest_maps.items()
    )
    details: dict[str, Any] = {
        "rank": result.statistics.rank,
        "ridge": result.statistics.ridge,
        "num_forward_passes": embeddings.num_forward,
        "channels": model.backbone.num_channels,
        "channels_before_projection": model.backbone.num_tapped_channels,
        "held_out_score_median": float(np.median(result.held_out_scores)),
        "held_out_score_max": float(result.held_out_scores.max()),
    }
    details["least_normal"] = [
        {"file": one.record.name, "score": one.score, "left_out": one.left_out} for one in suspects[:10]
    ]
    if left_out:
        details["left_out"] = [images.records[index].name for index in left_out]
    if result.likelihoods is not None:
        details["held_out_log_likelihood_by_ridge_and_rank"] = result.likelihoods
    log.info(
        "statistics",
        images=len(kept),
        rank=result.statistics.rank,
        ridge=result.statistics.ridge,
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
        held_out_scores=result.held_out_scores,
        held_out_means=result.held_out_means,
        suspects=suspects,
        details=details,
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
