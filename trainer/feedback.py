"""A site that learns a head for marked defects with its fleet: its frozen backbone, its good images and its marks.

Statistics and threshold are the site's own, as with the method ``none``. The fleet's head goes into the package if the
site's own parts say that it may (:mod:`fitting.shared_head`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeflame.errors import FederationError
from edgeflame.log import Progress, no_progress
from edgeflame.methods import DEFAULT_COST_OF_MISS, Learning
from edgeflame.statistics.head import MARKED_BAD, MARKS_LEFT_OUT
from fitting.crossfit import PooledStatistics
from fitting.defect_head import MIN_BAD_PARTS, HeadFit
from fitting.embeddings import Embeddings
from fitting.expected_cost import set_least_cost
from fitting.head_training import Coordinates, HeadImages
from fitting.imageset import ImageSet
from fitting.marked_images import SiteMarks, describe_for_head, describe_marked
from fitting.prior import FleetPrior
from fitting.shared_head import SharedHead, initial_head, judge, judging_both, read_head, train_round, write_head
from fitting.site_statistics import SiteStatistics, find_influential, fit_statistics
from fitting.threshold import set_threshold
from trainer.agent.tasks import TaskResult, TrainTask
from trainer.embedding import TorchEmbedder
from trainer.model import build_model, embedding_space_id


def no_marks() -> SiteMarks | None:
    """A site that has none."""
    return None


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A site's images as heads see them."""

    images: ImageSet
    site: SiteStatistics
    coordinates: Coordinates
    good: HeadImages
    bad: HeadImages


class HeadLearner:
    """Learns a head beside a frozen backbone and exchanges it; implements :class:`trainer.exchange.LocalLearner`.

    Args:
        learning: the configuration.
        device: of the backbone.
        marks: gives the site's marks.
        groups_known: whether it is known which images show one part.

    Raises:
        MissingDependencyError: no weights can be had here.
    """

    trains = True

    def __init__(
        self,
        learning: Learning,
        device: torch.device,
        *,
        marks: Callable[[], SiteMarks | None] = no_marks,
        groups_known: bool = False,
    ) -> None:
        model, self.weights = build_model(learning)
        self.network = model.eval().backbone.to(device)
        self.learning = learning
        self._space = embedding_space_id(learning, self.weights)
        self._marks = marks
        self._groups_known = groups_known
        self._described: _Described | None = None

    def write_initial(self, path: Path) -> None:
        """Write the head that every run starts from."""
        write_head(path, initial_head(self.network.num_channels, space=self._space, seed=self.learning.seed))

    def train_round(self, task: TrainTask, images: ImageSet, *, progress: Progress) -> TaskResult:
        """Train from the fleet's head and write this site's."""
        fleet = self._read(Path(task.base))
        known = self.describe(images, groups_known=self._groups_known, progress=progress)
        head, loss = train_round(fleet, known.coordinates, known.good, known.bad, seed=self.learning.seed)
        write_head(Path(task.out), head)
        return TaskResult(
            num_samples=len(known.good) + len(known.bad),
            metrics={
                "loss": loss,
                MARKED_BAD: float(len(known.bad)),
                MARKS_LEFT_OUT: float(sum(self.left_out().values())),
            },
        )

    def train_alone(
        self, images: ImageSet, *, seed: int, progress: Progress = no_progress
    ) -> tuple[HeadModel, dict[str, Any]]:
        """A model of these images alone: without a fleet there is no head of one."""
        del images, progress
        return HeadModel(self, initial_head(self.network.num_channels, space=self._space, seed=seed)), {}

    def load(self, path: Path, private: Path | None) -> HeadModel:
        """The fleet's head; a site keeps nothing to itself."""
        del private
        return HeadModel(self, self._read(path))

    def describe(
        self,
        images: ImageSet,
        *,
        groups_known: bool,
        pooled: PooledStatistics | FleetPrior | None = None,
        progress: Progress = no_progress,
    ) -> _Described:
        """What heads need of a site's images, computed once for all rounds.

        Raises:
            DataError: too few images or parts.
            NumericalError: an embedding is not finite, or nothing varies between the images.
        """
        if pooled is None and self._described is not None and self._described.images is images:
            return self._described
        learning, embedder = self.learning, TorchEmbedder(self.network)
        embeddings = Embeddings(embedder, images)
        site = fit_statistics(embeddings, learning, groups_known=groups_known, pooled=pooled, progress=progress)
        if len(site.images) != len(images):
            embeddings = Embeddings(embedder, site.images)
        good = describe_for_head(site.statistics, embeddings, learning, site.images.groups, scores=site.held_out_scores)
        marked = self._marks()
        bad_images, bad_marks = (images.subset([]), []) if marked is None else (marked.bad, marked.bad_marks)
        bad = describe_marked(site.statistics, Embeddings(embedder, bad_images), learning, bad_marks)
        described = _Described(
            images=images, site=site, coordinates=Coordinates(good, symmetric=True), good=good, bad=bad
        )
        if pooled is None:
            self._described = described
        return described

    def left_out(self) -> dict[str, int]:
        """Marks that were left out, by the reason."""
        marked = self._marks()
        return {} if marked is None else dict(marked.left_out)

    def _read(self, path: Path) -> SharedHead:
        head = read_head(path, num_channels=self.network.num_channels)
        if head.space != self._space:
            raise FederationError(
                f"the fleet's head is of the embeddings {head.space[:12]}, this site's backbone gives "
                f"{self._space[:12]}: all sites of a fleet need the same backbone weights (here: {self.weights.source})"
            )
        return head


class HeadModel:
    """A frozen backbone and the fleet's head; implements :class:`trainer.exchange.TrainedModel`.

    Args:
        learner: the learner it came from.
        head: the fleet's.
    """

    def __init__(self, learner: HeadLearner, head: SharedHead) -> None:
        self.network = learner.network
        self.embedder = TorchEmbedder(learner.network)
        self.weights = learner.weights
        self._learner = learner
        self._head = head

    def fit_statistics(
        self,
        images: ImageSet,
        *,
        groups_known: bool,
        pooled: PooledStatistics | FleetPrior | None = None,
        progress: Progress = no_progress,
    ) -> SiteStatistics:
        """Statistics, the head if it may count here, and the threshold of both.

        Raises:
            DataError: too few images or parts.
            NumericalError: an embedding is not finite, or nothing varies between the images.
        """
        learning = self._learner.learning
        known = self._learner.describe(images, groups_known=groups_known, pooled=pooled, progress=progress)
        site, good, bad = known.site, known.good, known.bad
        fitted = judge(
            self._head,
            known.coordinates,
            good,
            bad,
            grid=site.statistics.grid,
            rate=learning.calibration.false_reject_rate,
            seed=learning.seed,
        )
        threshold = site.threshold
        if fitted.head is not None:
            threshold = set_threshold(
                fitted.good_scores,
                good.groups,
                learning.calibration,
                groups_known=groups_known,
                num_left_out=site.threshold.num_left_out,
                others=site.others,
            )
        told = _bad_that_count(fitted, good, bad, learning.seed)
        if len(told):
            threshold = set_least_cost(
                threshold,
                fitted.good_scores,
                good.groups,
                fitted.bad_scores[told],
                [bad.groups[int(index)] for index in told],
                cost_of_miss=DEFAULT_COST_OF_MISS,
                seed=learning.seed,
            )
        details = {
            "num_bad_marks": len(bad),
            "marks_left_out": self._learner.left_out(),
            "threshold_without": site.threshold.value,
            **fitted.details,
        }
        influential = site.influential
        if fitted.head is not None:
            influential = find_influential(site.images, fitted.good_scores, learning, threshold, site.others)
        site = site.with_head(fitted.head, fitted.good_scores, threshold, influential)
        return replace(site, details={**site.details, "head": details})


def _bad_that_count(fitted: HeadFit, good: HeadImages, bad: HeadImages, seed: int) -> np.ndarray[Any, Any]:
    """Indices of the marked images whose scores may set the threshold: those that the head has not learnt from."""
    chosen = np.arange(len(bad)) if fitted.head is None else np.flatnonzero(judging_both(good, bad, seed)[1])
    parts = {bad.groups[int(index)] for index in chosen}
    return chosen if len(parts) >= MIN_BAD_PARTS else chosen[:0]
