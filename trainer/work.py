"""A site's part in a federation: train one round, and in the end make the site's own package; and, in a simulation,
evaluate the models of a run.

:class:`TorchSiteTrainer` implements :class:`trainer.agent.tasks.SiteTrainer` with torch; it runs in the site's worker
process. Everything it needs between rounds is in the files its tasks name, so it may be killed at any time.
:class:`ModelEvaluator` fits statistics to the images it is given, and computes metrics on the given test part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch

from edgeflame.dataset import Dataset, UnreadablePolicy, open_dataset
from edgeflame.errors import StorageError, UsageError
from edgeflame.images import ImageU8
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import FEDERATED_METHODS, METHODS, Learning
from edgeflame.package import DEFAULT_REFERENCES, WeightsOrigin
from edgeflame.simulation import MeasureAnswer, MeasureTask
from edgeflame.statistics.codec import encode_statistics
from edgeflame.statistics.memory import write_bank
from edgeflame.statistics.merge import read_moments, write_site_statistics
from edgeflame.statistics.moments import MomentAccumulator
from edgeflame.tensors import F32
from fitting.crossfit import PooledStatistics, image_scores, score_maps
from fitting.evaluation import EvaluationReport, evaluate
from fitting.imageset import ImageSet
from fitting.packaging import SiteStatistics, choose_references
from trainer.agent.tasks import FinishTask, InitialTask, StatisticsTask, TaskResult, TrainTask
from trainer.backbone import EmbeddingNetwork
from trainer.device import keep_freed_memory, pick_device, rgb_tensor
from trainer.embedding import Embeddings, embed
from trainer.feddymem.learning import restore_memory
from trainer.feddymem.site import MemoryLearner, initial_bank
from trainer.fit import fit_statistics, read_training_images
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
from trainer.packaging import Exporter, save_package
from trainer.training import train
from trainer.weights import tensors_sha256

log = EventLog("work")

PACKAGE_FILE = "model.edgeflame"
STATISTICS_FILE = "statistics.safetensors"


class TorchSiteTrainer:
    """The learning of one site.

    Args:
        learning: the fleet's configuration.
        data: the site's images.
        site: its name, written into its package.
        groups_file: which images show the same part; None looks for one in ``data``.
        exporter: makes the scoring graph; None leaves out the package.
        product: the kind of part, written into the package.
        device: ``auto``, ``cpu``, ``cuda``, ...
        on_unreadable: skip images that cannot be read, or refuse to go on.
        num_references: good images put into the package; with 0 no image ever leaves with it.

    Raises:
        UsageError: the method is not a federated one.
        DataError: the folder holds no images, or its groups file is wrong.
    """

    def __init__(
        self,
        *,
        learning: Learning,
        data: Path,
        site: str,
        groups_file: Path | None = None,
        exporter: Exporter | None = None,
        product: str = "product",
        device: str = "auto",
        on_unreadable: UnreadablePolicy = "skip",
        num_references: int = DEFAULT_REFERENCES,
    ) -> None:
        if learning.method not in FEDERATED_METHODS:
            raise UsageError(
                f"method {learning.method} is not a federated one; those are {', '.join(FEDERATED_METHODS)}"
            )
        keep_freed_memory()
        self._learning = learning
        self._site = site
        self._exporter = exporter
        self._product = product
        self._device: torch.device = pick_device(device)
        self._on_unreadable: UnreadablePolicy = on_unreadable
        self._dataset: Dataset = open_dataset(data, groups_file)
        self._images: ImageSet | None = None
        self._memory_learner: MemoryLearner | None = None
        self._num_references = num_references

    def write_initial_model(self, task: InitialTask) -> None:
        """Write the pre-trained backbone and a seeded discriminator; the same at every site with the same weights.

        Raises:
            MissingDependencyError: no weights can be had here.
            StorageError: the file cannot be written.
        """
        if self._shares_memory:
            write_bank(Path(task.out), initial_bank(self._learning))
            return
        model, origin = build_model(self._learning)
        save_model(Path(task.out), model, origin)

    def train(self, task: TrainTask, report: Progress) -> TaskResult:
        """Train the global model on this site's images for one round.

        Raises:
            DataError: too few images.
            FederationError: a model file is not of this configuration.
            NumericalError: the loss is not finite.
            StorageError: a file cannot be read or written.
        """
        images = self._training_images(report)
        private = load_private(_path(task.private))
        if self._shares_memory:
            return self._train_memory(task, images, private, report)
        model, origin = self._load(Path(task.base), private)
        shared_norms = batch_norm_tensors(load_model(Path(task.base), self._learning)[0]) if self._keeps_norms else {}
        teacher = history = None
        if task.history is not None and METHODS[self._learning.method].objective in WITH_TEACHERS:
            teacher = self._load(Path(task.base), private)[0].backbone
            history = self._load(Path(task.history), private)[0].backbone
        run = train(
            model,
            images,
            self._learning,
            seed=task.seed,
            global_network=teacher,
            historical_network=history,
            private=private,
            progress=report,
        )
        kept = {**run.ending.private, **(batch_norm_tensors(model) if self._keeps_norms else {})}
        load_batch_norms(model, shared_norms)
        if kept and task.private_out is not None:
            save_private(Path(task.private_out), kept)
        save_model(Path(task.out), model, origin)
        return TaskResult(num_samples=len(images), num_steps=run.num_steps, metrics=run.metrics())

    def compute_statistics(self, task: StatisticsTask, report: Progress) -> TaskResult:
        """Moments of this site's images under the final model, in the form that is wanted.

        Raises:
            As :meth:`finish`.
        """
        images = self._training_images(report)
        model, _ = load_model(Path(task.model), self._learning)
        embeddings = Embeddings(model.to(self._device).backbone, images, device=self._device)
        accumulator, done = MomentAccumulator(), 0
        for indices, batch in embeddings.batches(range(len(images))):
            accumulator.add(batch)
            done += len(indices)
            report(done, len(images), "statistics")
        truncation = write_site_statistics(
            Path(task.out),
            accumulator.moments(),
            grid=model.backbone.grid,
            model=task.model_sha256,
            form=task.wanted.form,
            rank=task.wanted.rank,
        )
        return TaskResult(num_samples=len(images), metrics=truncation.figures())

    def finish(self, task: FinishTask, report: Progress) -> TaskResult:
        """Fit this site's statistics and threshold on the global model, and write its package.

        Raises:
            DataError: too few images.
            FederationError: the model file is not of this configuration.
            NumericalError: an embedding is not finite.
            StorageError: a file cannot be read or written.
        """
        images = self._training_images(report)
        if self._shares_memory:
            learner = self._learner(images)
            memory = restore_memory(load_private(_path(task.private)), learner.network.num_channels, self._device)
            fleet = learner.read_fleet(Path(task.model))
            result = learner.fit(memory, fleet, groups_known=self._dataset.groups_known, progress=report)
            network, origin = learner.network, learner.weights
        else:
            model, found = self._load(Path(task.model), load_private(_path(task.private)))
            result = fit_statistics(
                model,
                images,
                self._learning,
                groups_known=self._dataset.groups_known,
                device=self._device,
                pooled=None if task.statistics is None else self._pooled(Path(task.statistics)),
                progress=report,
            )
            network = model.backbone
            # The initial model says where its weights came from; averaging may have dropped that.
            origin = found or WeightsOrigin(
                source="federated rounds", sha256=tensors_sha256(network.network.state_dict())
            )
        out_dir = Path(task.out_dir)
        statistics = out_dir / STATISTICS_FILE
        try:
            statistics.write_bytes(encode_statistics(result.statistics))
        except OSError as exc:
            raise StorageError(f"{statistics}: cannot write the statistics ({exc.strerror})") from exc
        package = None
        if self._exporter is not None:
            package = out_dir / PACKAGE_FILE
            save_package(
                package,
                network=network.cpu(),
                site_statistics=result,
                learning=self._learning,
                weights=origin,
                provenance={"kind": "federated", "ledger": task.ledger, "statistics": result.details},
                exporter=self._exporter,
                product=self._product,
                site=self._site,
                references=choose_references(result.images, self._num_references),
            )
        threshold = result.threshold
        return TaskResult(
            package=None if package is None else str(package),
            summary={
                "num_images": float(len(images)),
                "num_images_in_statistics": float(result.statistics.count),
                "num_unreadable": float(len(images.report.unreadable)),
                "num_parts": float(threshold.num_groups),
                "rank": float(result.statistics.rank),
                "num_prototypes": float(result.statistics.num_prototypes),
                "threshold": threshold.value,
                "promised_false_reject_rate": threshold.false_reject_rate,
                "confidence": threshold.confidence,
            },
        )

    def _train_memory(
        self, task: TrainTask, images: ImageSet, private: Mapping[str, torch.Tensor], report: Progress
    ) -> TaskResult:
        """FedDyMem's round: a memory comes, a memory goes; the generator and the entries stay."""
        learner = self._learner(images)
        fleet = learner.read_fleet(Path(task.base))
        before = restore_memory(private, learner.network.num_channels, self._device)
        memory, metrics = learner.train(before, fleet, seed=task.seed, progress=report)
        bank = learner.reduced(memory, fleet)
        write_bank(Path(task.out), bank)
        if task.private_out is not None:
            save_private(Path(task.private_out), memory.tensors())
        figures = {
            "num_prototypes": float(len(bank)),
            "min_effective_patches": float(bank.effective_patches.min()),
            "min_effective_images": float(bank.effective_images.min()),
        }
        return TaskResult(num_samples=len(images), metrics={**metrics, **figures})

    def _learner(self, images: ImageSet) -> MemoryLearner:
        if self._memory_learner is None:
            self._memory_learner = MemoryLearner(self._learning, images, device=self._device)
        return self._memory_learner

    @property
    def _shares_memory(self) -> bool:
        return METHODS[self._learning.method].exchange == "memory"

    def _load(self, path: Path, private: Mapping[str, torch.Tensor]) -> tuple[SiteModel, WeightsOrigin | None]:
        """A model on the device, as this site sees it: with its own batch norms, where those stay at home."""
        model, origin = load_model(path, self._learning)
        if self._keeps_norms:
            load_batch_norms(model, private)
        return model.to(self._device), origin

    def _pooled(self, path: Path) -> PooledStatistics:
        moments, header = read_moments(path)
        log.info("pooled_statistics", images=header.count, sites=len(header.sites), own=header.sites.get(self._site, 0))
        return PooledStatistics(moments=moments, holds_these=self._site in header.sites)

    @property
    def _keeps_norms(self) -> bool:
        return self._learning.training.batch_norm == "local"

    def _training_images(self, report: Progress = no_progress) -> ImageSet:
        if self._images is None:
            self._images = read_training_images(
                self._dataset, self._learning, on_unreadable=self._on_unreadable, progress=report
            )
        return self._images


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


MAX_TEST_CACHE_BYTES = 1 << 30
"""Test embeddings kept: models of many sites share a backbone, and are measured on the same images."""


class ModelEvaluator:
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
        return measure_answer(task.name, report, rank=float(site.statistics.rank))

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
            if (len(self._embeddings) + len(fresh)) * embeddings[0].nbytes <= MAX_TEST_CACHE_BYTES:
                self._embeddings.update((key, one.copy()) for key, one in fresh.items())
        return np.stack([fresh[key] if key in fresh else self._embeddings[key] for key in keys])


def measure_answer(name: str, report: EvaluationReport, **more: float) -> MeasureAnswer:
    """A report's figures, without those that are not defined, and some more."""
    plain = msgspec.to_builtins(report)
    figures = {key: float(value) for key, value in plain.items() if type(value) in (int, float)}
    del figures["num_resamples"]
    classes = {
        label: {key: float(value) for key, value in one.items() if isinstance(value, int | float)}
        for label, one in plain["per_class"].items()
    }
    return MeasureAnswer(name=name, figures={**figures, **more}, classes=classes)
