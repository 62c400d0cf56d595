"""Fitting one site's model from its good images: backbone, optional training, statistics, threshold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edgeflame.dataset import Dataset, LoadReport, UnreadablePolicy
from edgeflame.errors import DataError, UsageError
from edgeflame.images import ImageU8
from edgeflame.log import Progress, no_progress
from edgeflame.methods import SOLO_METHODS, Learning
from edgeflame.package import DEFAULT_REFERENCES, WeightsOrigin
from fitting.crossfit import require_enough
from fitting.imageset import ImageSet
from fitting.packaging import choose_references
from fitting.site_statistics import SiteStatistics
from trainer.backbone import EmbeddingNetwork
from trainer.device import keep_freed_memory
from trainer.exchange import open_learner

Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress of one stage of the work by its name."""


@contextmanager
def quiet_stage(name: str) -> Iterator[Progress]:
    """A stage without a progress display."""
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
    learner = open_learner(learning, device)
    with ExitStack() as stack:
        progress = no_progress
        if learner.trains:
            stack.enter_context(_timed(seconds, "training"))
            progress = stack.enter_context(stage("Training"))
        model, training = learner.train_alone(images, seed=learning.seed, progress=progress)
    with _timed(seconds, "statistics"), stage("Statistics and threshold") as progress:
        site = model.fit_statistics(images, groups_known=dataset.groups_known, progress=progress)
    return FittedModel(
        network=model.network.cpu(),
        site=site,
        weights=model.weights,
        learning=learning,
        report=images.report,
        training=training,
        seconds=seconds,
        references=choose_references(site.images, num_references),
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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
