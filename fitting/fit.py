"""Fitting one site's model from its good images: optional training, statistics, threshold.

What learns is handed in: in torch, or a backbone in ONNX Runtime, which learns nothing (:class:`FrozenLearner`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from edgeflame.dataset import Dataset, ImageRecord, LoadReport, UnreadablePolicy
from edgeflame.errors import DataError, UsageError
from edgeflame.fitted_images import known_among
from edgeflame.images import ImageU8
from edgeflame.log import Progress, no_progress
from edgeflame.methods import DEFAULT_COST_OF_MISS, SOLO_METHODS, Learning
from edgeflame.package import DEFAULT_REFERENCES, WeightsOrigin
from edgeflame.tensors import F32
from fitting.crossfit import PooledStatistics, image_scores, require_enough, score_maps
from fitting.embeddings import Embedder, Embeddings
from fitting.evaluation import score_records
from fitting.expected_cost import set_least_cost
from fitting.imageset import ImageSet
from fitting.packaging import choose_references
from fitting.prior import FleetPrior
from fitting.site_statistics import SiteStatistics, fit_statistics

Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress of one stage of the work by its name."""


@contextmanager
def quiet_stage(name: str) -> Iterator[Progress]:
    """A stage without a progress display."""
    del name
    yield no_progress


class Model(Protocol):
    """A network that is done, and how statistics are fitted to its embeddings."""

    @property
    def embedder(self) -> Embedder:
        """The network."""
        ...

    @property
    def weights(self) -> WeightsOrigin:
        """Where the network's weights came from."""
        ...

    def fit_statistics(
        self,
        images: ImageSet,
        *,
        groups_known: bool,
        pooled: PooledStatistics | FleetPrior | None = None,
        progress: Progress = no_progress,
    ) -> SiteStatistics:
        """Statistics and threshold of a site's good images; ``pooled`` are the fleet's or a prior, where there
        are any.

        Raises:
            DataError: too few images or parts.
            NumericalError: an embedding is not finite, or nothing varies between the images.
        """
        ...


M_co = TypeVar("M_co", bound=Model, covariant=True)


class Learner(Protocol[M_co]):
    """What learns from the images of one site."""

    @property
    def trains(self) -> bool:
        """Whether the method trains anything."""
        ...

    def train_alone(
        self, images: ImageSet, *, seed: int, progress: Progress = no_progress
    ) -> tuple[M_co, dict[str, Any]]:
        """A model of these images alone, and the metrics of its training; untrained where the method trains nothing.

        Raises:
            MissingDependencyError: no weights can be had here.
            NumericalError: the loss is not finite.
        """
        ...


class GaussianModel:
    """A network whose embeddings are described by Gaussian statistics; implements :class:`Model`.

    Args:
        embedder: the network.
        weights: where its weights came from.
        learning: the configuration.
    """

    def __init__(self, embedder: Embedder, weights: WeightsOrigin, learning: Learning) -> None:
        self.embedder = embedder
        self.weights = weights
        self._learning = learning

    def fit_statistics(
        self,
        images: ImageSet,
        *,
        groups_known: bool,
        pooled: PooledStatistics | FleetPrior | None = None,
        progress: Progress = no_progress,
    ) -> SiteStatistics:
        """As :meth:`Model.fit_statistics`."""
        embeddings = Embeddings(self.embedder, images)
        return fit_statistics(embeddings, self._learning, groups_known=groups_known, pooled=pooled, progress=progress)


class FrozenLearner:
    """A network that is taken as it is; implements :class:`Learner`.

    Args:
        model: the network.
    """

    trains = False

    def __init__(self, model: GaussianModel) -> None:
        self._model = model

    def train_alone(
        self, images: ImageSet, *, seed: int, progress: Progress = no_progress
    ) -> tuple[GaussianModel, dict[str, Any]]:
        """As :meth:`Learner.train_alone`: nothing is trained."""
        del images, seed, progress
        return self._model, {}


@dataclass(frozen=True, kw_only=True)
class FittedModel(Generic[M_co]):
    """A model that can be exported and can inspect.

    Attributes:
        model: the network.
        site: statistics and threshold.
        learning: the configuration it was fitted with.
        report: what happened while the images were read.
        training: metrics of the training, empty without one.
        seconds: by stage.
        references: good images for the package, ``[R, height, width, 3]``.
        defective_scores: ``[M]`` scores of the labelled defects; empty without any.
    """

    model: M_co
    site: SiteStatistics
    learning: Learning
    report: LoadReport
    training: dict[str, Any]
    seconds: dict[str, float]
    references: ImageU8
    defective_scores: F32

    def provenance(self) -> dict[str, Any]:
        """How this fit went, for the package's manifest."""
        return {
            "kind": "fit",
            "method": self.learning.method,
            "num_images": len(self.site.images),
            "num_unreadable": len(self.report.unreadable),
            "unreadable": self.report.unreadable[:20],
            "num_unfit": len(self.report.unfit),
            "unfit": {name: list(reasons) for name, reasons in list(self.report.unfit.items())[:20]},
            "training": self.training,
            "statistics": self.site.details,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def fit(
    dataset: Dataset,
    learning: Learning,
    learner: Learner[M_co],
    *,
    prior: FleetPrior | None = None,
    on_unreadable: UnreadablePolicy = "skip",
    num_references: int = DEFAULT_REFERENCES,
    defects: Sequence[ImageRecord] = (),
    cost_of_miss: float = DEFAULT_COST_OF_MISS,
    stage: Stage = quiet_stage,
) -> FittedModel[M_co]:
    """Fit a model from the good training images of a data set.

    Args:
        dataset: its good training images are used.
        learning: the settings.
        learner: by them.
        prior: how good parts vary elsewhere; needed where they are few.
        on_unreadable: what to do about images that cannot be read.
        num_references: good images that go into the package.
        defects: labelled defects, which move the threshold (:mod:`fitting.expected_cost`) and nothing else.
        cost_of_miss: of one of them against a rejected good part.
        stage: shows the progress of each stage.

    Raises:
        UsageError: the method needs other sites.
        DataError: too few images, or an unreadable one where that is refused.
        MissingDependencyError: no weights can be had.
        NumericalError: an embedding or a loss is not finite.
    """
    if learning.method not in SOLO_METHODS:
        raise UsageError(f"method {learning.method} needs other sites; fit takes {', '.join(SOLO_METHODS)}")
    seconds: dict[str, float] = {}
    with _timed(seconds, "reading"), stage("Reading images") as progress:
        images = read_training_images(dataset, learning, on_unreadable=on_unreadable, progress=progress)
    with ExitStack() as stack:
        progress = no_progress
        if learner.trains:
            stack.enter_context(_timed(seconds, "training"))
            progress = stack.enter_context(stage("Training"))
        model, training = learner.train_alone(images, seed=learning.seed, progress=progress)
    with _timed(seconds, "statistics"), stage("Statistics and threshold") as progress:
        site = model.fit_statistics(images, groups_known=dataset.groups_known, pooled=prior, progress=progress)
    defective = np.zeros(0, dtype=np.float32)
    if defects:
        with _timed(seconds, "defects"), stage("Scoring defects") as progress:
            site, defective = _weigh_defects(
                model.embedder,
                site,
                learning,
                defects,
                cost_of_miss=cost_of_miss,
                on_unreadable=on_unreadable,
                progress=progress,
            )
    return FittedModel(
        model=model,
        site=site,
        learning=learning,
        report=images.report,
        training=training,
        seconds=seconds,
        references=choose_references(site.images, num_references),
        defective_scores=defective,
    )


def _weigh_defects(
    embedder: Embedder,
    site: SiteStatistics,
    learning: Learning,
    defects: Sequence[ImageRecord],
    *,
    cost_of_miss: float,
    on_unreadable: UnreadablePolicy,
    progress: Progress,
) -> tuple[SiteStatistics, F32]:
    """The site with the threshold of least expected cost, and the defects' scores ``[M]``."""
    report = LoadReport()

    def score(batch: ImageU8) -> tuple[F32, F32]:
        maps = score_maps(site.statistics, embedder.embed(batch), learning.scoring)
        return image_scores(maps), maps

    kept, scores, _ = score_records(
        score, defects, learning.input, on_unreadable=on_unreadable, report=report, progress=progress
    )
    both = known_among(report.digests, set(site.images.report.digests.values()))
    if both is not None:
        raise DataError(f"{both} are labelled as defects, and are among the good training images too")
    threshold = set_least_cost(
        site.threshold,
        site.held_out_scores,
        site.images.groups,
        scores,
        [record.group for record in kept],
        cost_of_miss=cost_of_miss,
        seed=learning.seed,
    )
    return replace(site, threshold=threshold), scores


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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
