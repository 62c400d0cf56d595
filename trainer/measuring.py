"""Measures the models of a simulation: fits statistics to given images, and computes metrics on a test part."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from edgeflame.dataset import open_dataset
from edgeflame.images import ImageU8
from edgeflame.marks import MarkStore
from edgeflame.methods import Learning
from edgeflame.simulation import MeasureAnswer, MeasureTask
from edgeflame.tensors import F32
from fitting.crossfit import image_scores, score_maps
from fitting.evaluation import EvaluationReport, ScoredImages, compute_metrics, score_test_images
from fitting.imageset import ImageSet
from fitting.marked_images import SiteMarks, read_site_marks
from trainer.backbone import EmbeddingNetwork
from trainer.device import pick_device, rgb_tensor
from trainer.embedding import embed
from trainer.exchange import LocalLearner, TrainedModel, open_learner

MAX_TEST_CACHE_BYTES = 1 << 30
"""Test embeddings kept: models of many sites share a backbone, and are measured on the same images."""


class ModelEvaluator:
    """Evaluates one model after another; keeps what the next may need again.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ...
    """

    def __init__(self, device: str = "auto") -> None:
        self._device = pick_device(device)
        self._learner: tuple[Learning, LocalLearner] | None = None
        self._loaded: tuple[str, Learning, TrainedModel] | None = None
        self._images: dict[tuple[str, ...], ImageSet] = {}
        self._marked: SiteMarks | None = None
        self._embeddings: dict[bytes, F32] = {}

    def evaluate(self, task: MeasureTask) -> MeasureAnswer:
        """Fit statistics to ``task.train`` and score ``task.test``; without ``task.model`` a model is trained first.

        Raises:
            DataError: too few images.
            FederationError: the model file is not of this configuration.
            NumericalError: an embedding is not finite.
            StorageError: a file cannot be read.
        """
        images = self._training_images(task)
        test = open_dataset(Path(task.test))
        model = self._train_model(task, images) if task.model is None else self._load_model(task.model, task.learning)
        site = model.fit_statistics(images, groups_known=test.groups_known)
        without: list[F32] = []

        def score(batch: ImageU8) -> tuple[F32, F32]:
            embeddings = self._embed(model.network, batch)
            maps = score_maps(site.statistics, embeddings, task.learning.scoring)
            without.append(image_scores(maps))
            if site.head is not None:
                maps = maps * np.exp(site.head.log_factors(embeddings))[:, None, None]
            return image_scores(maps), maps

        scored = score_test_images(score, test, task.learning.input)

        def report_of(scored: ScoredImages, threshold: float) -> EvaluationReport:
            return compute_metrics(
                scored, task.learning.input, threshold=threshold, groups_known=test.groups_known, num_resamples=0
            )

        report, rank = report_of(scored, site.threshold.value), float(site.statistics.rank)
        told = site.details.get("head")
        if told is None:
            return measure_answer(task.name, report, rank=rank)
        # Without masks, which cost most of the time: a head tells images, not where a defect is.
        bare = [replace(record, mask=None) for record in scored.records]
        before = report_of(replace(scored, records=bare, scores=np.concatenate(without)), told["threshold_without"])
        answer = measure_answer(task.name, report, rank=rank, head_weight=float(told["weight"]))
        return _with_figures_before(answer, measure_answer(task.name, before))

    def _learner_of(self, learning: Learning) -> LocalLearner:
        if self._learner is None or self._learner[0] != learning:
            self._learner = (learning, open_learner(learning, self._device, marks=lambda: self._marked))
        return self._learner[1]

    def _load_model(self, path: str, learning: Learning) -> TrainedModel:
        if self._loaded is None or self._loaded[:2] != (path, learning):
            self._loaded = (path, learning, self._learner_of(learning).load(Path(path), None))
            self._embeddings.clear()
        return self._loaded[2]

    def _train_model(self, task: MeasureTask, images: ImageSet) -> TrainedModel:
        self._loaded = None
        self._embeddings.clear()
        return self._learner_of(task.learning).train_alone(images, seed=task.seed)[0]

    def _training_images(self, task: MeasureTask) -> ImageSet:
        key = (*task.train, task.marks or "")
        held = self._images.get(key)
        if held is None or held.preprocessing != task.learning.input:
            records = [record for folder in task.train for record in open_dataset(Path(folder)).train]
            # Only the last: rounds are measured with the same images, sites with others each.
            self._images.clear()
            self._marked = None
            held = ImageSet(records, task.learning.input)
            if task.marks is not None:
                dataset = open_dataset(Path(task.train[0]))
                self._marked = read_site_marks(MarkStore(Path(task.marks)), dataset, held, task.learning, product=None)
                held = self._marked.images
            self._images[key] = held
        return held

    def _embed(self, network: EmbeddingNetwork, batch: ImageU8) -> F32:
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in batch]
        missing = [index for index, key in enumerate(keys) if key not in self._embeddings]
        fresh: dict[bytes, F32] = {}
        if missing:
            embeddings = embed(network, rgb_tensor(batch[missing], self._device))
            fresh = {keys[index]: one for index, one in zip(missing, embeddings, strict=True)}
            if (len(self._embeddings) + len(fresh)) * embeddings[0].nbytes <= MAX_TEST_CACHE_BYTES:
                self._embeddings.update((key, one.copy()) for key, one in fresh.items())
        return np.stack([fresh[key] if key in fresh else self._embeddings[key] for key in keys])


def measure_answer(name: str, report: EvaluationReport, **more: float) -> MeasureAnswer:
    """The defined figures of a report, and ``more``, as an answer."""
    plain = msgspec.to_builtins(report)
    figures = {key: float(value) for key, value in plain.items() if type(value) in (int, float)}
    del figures["num_resamples"]
    classes = {
        label: {key: float(value) for key, value in one.items() if isinstance(value, int | float)}
        for label, one in plain["per_class"].items()
    }
    return MeasureAnswer(name=name, figures={**figures, **more}, classes=classes)


FIGURES_BEFORE = ("image_AUROC", "macro_image_AUROC", "good_rejected", "defective_caught", "caught")


def _with_figures_before(answer: MeasureAnswer, before: MeasureAnswer) -> MeasureAnswer:
    """An answer that also has what the same images gave without the head."""

    def both(figures: dict[str, float], old: dict[str, float]) -> dict[str, float]:
        return {**figures, **{f"{name}_without_head": old[name] for name in FIGURES_BEFORE if name in old}}

    return msgspec.structs.replace(
        answer,
        figures=both(answer.figures, before.figures),
        classes={label: both(figures, before.classes[label]) for label, figures in answer.classes.items()},
    )
