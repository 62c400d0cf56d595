"""How a site learns and what it exchanges with its fleet: one implementation for each kind of exchange.

A :class:`LocalLearner` writes what a run starts from, trains a round from what the aggregator sends, and gives a
:class:`TrainedModel`, whose statistics go into a package. :class:`WeightsLearner` exchanges the model's tensors
(SCAFFOLD's control variates among them); :class:`trainer.feddymem.site.MemoryLearner` a memory of patches;
:class:`trainer.feedback.HeadLearner` a head for marked defects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeflame.log import Progress, no_progress
from edgeflame.methods import METHODS, Learning
from edgeflame.package import WeightsOrigin
from fitting.fit import GaussianModel, Learner, Model
from fitting.imageset import ImageSet
from fitting.marked_images import SiteMarks
from trainer.agent.tasks import TaskResult, TrainTask
from trainer.backbone import EmbeddingNetwork
from trainer.embedding import TorchEmbedder
from trainer.feddymem.site import MemoryLearner
from trainer.feedback import HeadLearner, no_marks
from trainer.model import (
    SiteModel,
    batch_norm_tensors,
    build_model,
    load_batch_norms,
    load_model,
    load_private,
    save_model,
    save_private,
)
from trainer.objectives import WITH_TEACHERS
from trainer.training import train
from trainer.weights import tensors_sha256


class TrainedModel(Model, Protocol):
    """A model as a site uses it: the global one with what the site keeps to itself, or one of its own."""

    @property
    def network(self) -> EmbeddingNetwork:
        """The embedding network, on the learner's device."""
        ...


class LocalLearner(Learner[TrainedModel], Protocol):
    """The learning of one site, by the kind of exchange of its method."""

    def write_initial(self, path: Path) -> None:
        """Write what every run starts from; the same at every site with the same backbone weights.

        Raises:
            MissingDependencyError: no weights can be had here.
            StorageError: the file cannot be written.
        """
        ...

    def train_round(self, task: TrainTask, images: ImageSet, *, progress: Progress) -> TaskResult:
        """Train one round; reads and writes the files that the task names.

        Raises:
            DataError: too few images.
            FederationError: a file is not of this configuration.
            NumericalError: the loss is not finite.
            StorageError: a file cannot be read or written.
        """
        ...

    def load(self, path: Path, private: Path | None) -> TrainedModel:
        """The global model at ``path`` with what the site kept of its last round.

        Raises:
            FederationError: the file is not of this configuration.
            StorageError: a file cannot be read.
        """
        ...


def open_learner(
    learning: Learning,
    device: torch.device,
    *,
    marks: Callable[[], SiteMarks | None] = no_marks,
    groups_known: bool = False,
) -> LocalLearner:
    """The learner of a method.

    Args:
        learning: the configuration.
        device: to learn on.
        marks: gives the site's marks; only heads are learnt from them.
        groups_known: whether it is known which images show one part.

    Raises:
        ConfigError: unknown backbone.
        MissingDependencyError: no weights can be had here, and the learner needs them from the beginning.
    """
    if METHODS[learning.method].exchange == "memory":
        return MemoryLearner(learning, device)
    if METHODS[learning.method].exchange == "head":
        return HeadLearner(learning, device, marks=marks, groups_known=groups_known)
    return WeightsLearner(learning, device)


class _WeightsModel(GaussianModel):
    """Implements :class:`TrainedModel` by Gaussian statistics."""

    def __init__(self, model: SiteModel, weights: WeightsOrigin | None, learning: Learning) -> None:
        self.network = model.eval().backbone
        if weights is None:
            # The initial model says where its weights came from; averaging may have dropped that.
            sha256 = tensors_sha256(self.network.network.state_dict())
            weights = WeightsOrigin(source="federated rounds", sha256=sha256)
        super().__init__(TorchEmbedder(self.network), weights, learning)


class WeightsLearner:
    """Trains the model and exchanges its tensors; implements :class:`LocalLearner`.

    Args:
        learning: the configuration.
        device: to train on.
    """

    def __init__(self, learning: Learning, device: torch.device) -> None:
        self._learning = learning
        self._device = device
        self._keeps_norms = learning.training.batch_norm == "local"

    @property
    def trains(self) -> bool:
        return METHODS[self._learning.method].objective is not None

    def write_initial(self, path: Path) -> None:
        model, origin = build_model(self._learning)
        save_model(path, model, origin)

    def train_round(self, task: TrainTask, images: ImageSet, *, progress: Progress) -> TaskResult:
        base, private = Path(task.base), load_private(task.private)
        model, origin = self._load(base, private)
        shared_norms = batch_norm_tensors(load_model(base, self._learning)[0]) if self._keeps_norms else {}
        teacher = history = None
        if task.history is not None and METHODS[self._learning.method].objective in WITH_TEACHERS:
            teacher = self._load(base, private)[0].backbone
            history = self._load(Path(task.history), private)[0].backbone
        run = train(
            model,
            images,
            self._learning,
            seed=task.seed,
            global_network=teacher,
            historical_network=history,
            private=private,
            progress=progress,
        )
        kept = {**run.ending.private, **(batch_norm_tensors(model) if self._keeps_norms else {})}
        load_batch_norms(model, shared_norms)
        if kept and task.private_out is not None:
            save_private(Path(task.private_out), kept)
        save_model(Path(task.out), model, origin)
        return TaskResult(num_samples=len(images), num_steps=run.num_steps, metrics=run.metrics())

    def train_alone(
        self, images: ImageSet, *, seed: int, progress: Progress = no_progress
    ) -> tuple[TrainedModel, dict[str, Any]]:
        model, origin = build_model(self._learning)
        model.to(self._device)
        details = train(model, images, self._learning, seed=seed, progress=progress).details() if self.trains else {}
        return _WeightsModel(model, origin, self._learning), details

    def load(self, path: Path, private: Path | None) -> TrainedModel:
        model, origin = self._load(path, load_private(private))
        return _WeightsModel(model, origin, self._learning)

    def _load(self, path: Path, private: Mapping[str, torch.Tensor]) -> tuple[SiteModel, WeightsOrigin | None]:
        """A model on the device, as this site sees it: with its own batch norms, where those stay at home."""
        model, origin = load_model(path, self._learning)
        if self._keeps_norms:
            load_batch_norms(model, private)
        return model.to(self._device), origin
