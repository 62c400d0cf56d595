"""Measuring models in a simulation: statistics of the given images, figures on the given test part."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from edgeflame.dataset import open_dataset
from edgeflame.images import ImageU8
from edgeflame.learning import METHODS, Learning
from edgeflame.simulated import MeasureAnswer, MeasureTask
from trainer.backbone import EmbeddingNetwork
from trainer.device import pick_device
from trainer.embedding import F32, embed
from trainer.evaluation import evaluate
from trainer.feddymem.site import MemoryLearner
from trainer.figures import EvaluationReport
from trainer.fit import fit_statistics
from trainer.gaussian import image_scores, score_maps
from trainer.imageset import ImageSet, rgb_tensor
from trainer.model import SiteModel, build_model, load_model
from trainer.site_statistics import SiteStatistics
from trainer.training import train

MAX_CACHE_BYTES = 1 << 30
"""Test embeddings kept: models of many sites share a backbone, and are measured on the same images."""


class Measurer:
    """Measures one model after another; keeps what the next may need again.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ...
    """

    def __init__(self, device: str = "auto") -> None:
        self._device = pick_device(device)
        self._loaded: tuple[str, Learning, SiteModel] | None = None
        self._images: dict[tuple[str, ...], ImageSet] = {}
        self._embeddings: dict[bytes, F32] = {}

    def measure(self, task: MeasureTask) -> MeasureAnswer:
        """Fit statistics to ``task.train``, of the model that is given or that is learnt from it; score ``task.test``.

        Raises:
            DataError: too few images.
            FederationError: the model file is not of this configuration.
            NumericalError: an embedding is not finite.
            StorageError: a file cannot be read.
        """
        images = self._training_images(task)
        test = open_dataset(Path(task.test))
        if METHODS[task.learning.method].exchange == "memory":
            network, site = self._remembered(task, images, groups_known=test.groups_known)
        else:
            model = self._trained(task, images) if task.model is None else self._model(task.model, task.learning)
            network = model.backbone
            site = fit_statistics(model, images, task.learning, groups_known=test.groups_known, device=self._device)

        def score(batch: ImageU8) -> tuple[F32, F32]:
            maps = score_maps(site.statistics, self._embed(network, batch), task.learning.scoring)
            return image_scores(maps), maps

        report = evaluate(score, test, task.learning.input, threshold=site.threshold.value, num_resamples=0)
        return answer_of(task.name, report, rank=float(site.statistics.rank))

    def _model(self, path: str, learning: Learning) -> SiteModel:
        if self._loaded is None or self._loaded[:2] != (path, learning):
            model, _ = load_model(Path(path), learning)
            self._loaded = (path, learning, model.to(self._device).eval())
            self._embeddings.clear()
        return self._loaded[2]

    def _trained(self, task: MeasureTask, images: ImageSet) -> SiteModel:
        self._loaded = None
        self._embeddings.clear()
        model, _ = build_model(task.learning)
        model.to(self._device)
        if METHODS[task.learning.method].objective is not None:
            train(model, images, task.learning, seed=task.seed)
        return model.eval()

    def _remembered(
        self, task: MeasureTask, images: ImageSet, *, groups_known: bool
    ) -> tuple[EmbeddingNetwork, SiteStatistics]:
        """FedDyMem's frozen backbone, and the fleet's memory beside one of these images."""
        self._loaded = None
        self._embeddings.clear()
        learner = MemoryLearner(task.learning, images, device=self._device)
        fleet = None if task.model is None else learner.read_fleet(Path(task.model))
        memory = learner.train(None, None, seed=task.seed)[0] if fleet is None else None
        return learner.network, learner.fit(memory, fleet, groups_known=groups_known)

    def _training_images(self, task: MeasureTask) -> ImageSet:
        held = self._images.get(task.train)
        if held is None or held.preprocessing != task.learning.input:
            records = [record for folder in task.train for record in open_dataset(Path(folder)).train]
            # Only the last: rounds are measured with the same images, sites with others each.
            self._images.clear()
            held = self._images[task.train] = ImageSet(records, task.learning.input)
        return held

    def _embed(self, network: EmbeddingNetwork, batch: ImageU8) -> F32:
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in batch]
        missing = [index for index, key in enumerate(keys) if key not in self._embeddings]
        fresh: dict[bytes, F32] = {}
        if missing:
            embeddings = embed(network, rgb_tensor(batch[missing], self._device))
            fresh = {keys[index]: one for index, one in zip(missing, embeddings, strict=True)}
            if (len(self._embeddings) + len(fresh)) * embeddings[0].nbytes <= MAX_CACHE_BYTES:
                self._embeddings.update((key, one.copy()) for key, one in fresh.items())
        return np.stack([fresh[key] if key in fresh else self._embeddings[key] for key in keys])


def answer_of(name: str, report: EvaluationReport, **more: float) -> MeasureAnswer:
    """A report's figures, without those that are not defined, and some more."""
    plain = msgspec.to_builtins(report)
    figures = {key: float(value) for key, value in plain.items() if type(value) in (int, float)}
    del figures["num_resamples"]
    classes = {
        label: {key: float(value) for key, value in one.items() if isinstance(value, int | float)}
        for label, one in plain["per_class"].items()
    }
    return MeasureAnswer(name=name, figures={**figures, **more}, classes=classes)
