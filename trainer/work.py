"""A site's tasks in a federation: train a round, and in the end make the site's own package.

:class:`TorchSiteTrainer` implements :class:`trainer.agent.tasks.SiteTrainer` with torch; it runs in the site's worker
process. Everything it needs between rounds is in the files its tasks name, so it may be killed at any time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import nn

from edgeflame.dataset import Dataset, UnreadablePolicy, open_dataset
from edgeflame.errors import DataError, UsageError
from edgeflame.images import Preprocessing
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.marks import MarkStore
from edgeflame.methods import FEDERATED_METHODS, METHODS, Learning
from edgeflame.package import DEFAULT_REFERENCES
from edgeflame.state import atomic_write
from edgeflame.statistics.codec import PackageStatistics, encode_statistics
from edgeflame.statistics.head import HEAD_WEIGHT, MARKED_BAD, MARKS_LEFT_OUT, NO_HEAD, DefectHead
from edgeflame.statistics.moments import MomentAccumulator
from edgeflame.statistics.shared import ScoreDeviation, read_moments, write_site_statistics
from fitting.crossfit import PooledStatistics
from fitting.embeddings import Embeddings
from fitting.fit import read_training_images
from fitting.imageset import ImageSet
from fitting.marked_images import SiteMarks, read_site_marks
from fitting.packaging import choose_references, save_package
from fitting.prior import FleetPrior
from fitting.site_statistics import fit_statistics
from fitting.threshold import measure_spread
from trainer.agent.tasks import FinishTask, InitialTask, StatisticsTask, TaskResult, TrainTask
from trainer.device import keep_freed_memory, pick_device
from trainer.embedding import TorchEmbedder, network_embeddings
from trainer.exchange import LocalLearner, open_learner

log = EventLog("work")

PACKAGE_FILE = "model.edgeflame"
STATISTICS_FILE = "statistics.safetensors"


class Exporter(Protocol):
    """Makes the scoring graph of a network and its statistics. It is handed in: the trainer knows no export format."""

    def __call__(
        self,
        network: nn.Module,
        statistics: PackageStatistics,
        *,
        preprocessing: Preprocessing,
        smoothing_sigma: float,
        metadata: Mapping[str, str],
        head: DefectHead | None = None,
    ) -> bytes: ...


class TorchSiteTrainer:
    """The learning of one site.

    Args:
        learning: the fleet's configuration.
        data: the site's images.
        site: its name, written into its package.
        groups_file: which images show the same part; None looks for one in ``data``.
        exporter: makes the scoring graph; None leaves out the package.
        product: the kind of part, written into the package; None: "product".
        marks: folder of marks, which methods that exchange heads learn from.
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
        product: str | None = None,
        marks: Path | None = None,
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
        self._marks = None if marks is None else MarkStore(marks)
        self._marked: SiteMarks | None = None
        self._device: torch.device = pick_device(device)
        self._on_unreadable: UnreadablePolicy = on_unreadable
        self._dataset: Dataset = open_dataset(data, groups_file)
        self._images: ImageSet | None = None
        self._num_references = num_references

    def write_initial_model(self, task: InitialTask) -> None:
        """Write what every run starts from; the same at every site with the same backbone weights.

        Raises:
            MissingDependencyError: no weights can be had here.
            StorageError: the file cannot be written.
        """
        self._learner.write_initial(Path(task.out))

    def train(self, task: TrainTask, report: Progress) -> TaskResult:
        """Train on this site's images for one round.

        Raises:
            DataError: too few images.
            FederationError: a file is not of this configuration.
            NumericalError: the loss is not finite.
            StorageError: a file cannot be read or written.
        """
        return self._learner.train_round(task, self._training_images(report), progress=report)

    def compute_statistics(self, task: StatisticsTask, report: Progress) -> TaskResult:
        """Moments of this site's images under the final model, in the form that the task wants.

        Raises:
            As :meth:`finish`.
        """
        images = self._training_images(report)
        network = self._learner.load(Path(task.model), None).network
        embeddings = network_embeddings(network, images)
        accumulator, done = MomentAccumulator(), 0
        for indices, batch in embeddings.batches(range(len(images))):
            accumulator.add(batch)
            done += len(indices)
            report(done, len(images), "statistics")
        truncation = write_site_statistics(
            Path(task.out),
            accumulator.moments(),
            grid=network.grid,
            model=task.model_sha256,
            form=task.wanted.form,
            rank=task.wanted.rank,
            spread=self._score_spread(embeddings),
        )
        return TaskResult(num_samples=len(images), metrics=truncation.figures())

    def finish(self, task: FinishTask, report: Progress) -> TaskResult:
        """Fit this site's statistics and threshold under the final model, and write its package.

        Raises:
            DataError: too few images.
            FederationError: the model file is not of this configuration.
            NumericalError: an embedding is not finite.
            StorageError: a file cannot be read or written.
        """
        images = self._training_images(report)
        model = self._learner.load(Path(task.model), None if task.private is None else Path(task.private))
        result = model.fit_statistics(
            images,
            groups_known=self._dataset.groups_known,
            pooled=None if task.statistics is None else self._pooled(Path(task.statistics)),
            progress=report,
        )
        out_dir = Path(task.out_dir)
        atomic_write(out_dir / STATISTICS_FILE, encode_statistics(result.statistics), durable=False)
        package = None
        if self._exporter is not None:
            package = out_dir / PACKAGE_FILE
            network = model.network.cpu()
            save_package(
                package,
                embedder=TorchEmbedder(network),
                site_statistics=result,
                learning=self._learning,
                weights=model.weights,
                provenance={"kind": "federated", "ledger": task.ledger, "statistics": result.details},
                make_graph=functools.partial(self._exporter, network, preprocessing=self._learning.input),
                product=self._product or "product",
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
                **_told_of_head(result.details.get("head")),
            },
        )

    def _score_spread(self, embeddings: Embeddings) -> ScoreDeviation | msgspec.UnsetType:
        """How much the scores of this site's good parts vary, by its own statistics."""
        try:
            alone = fit_statistics(embeddings, self._learning, groups_known=self._dataset.groups_known)
        except DataError:
            return msgspec.UNSET  # too few images or parts to hold any out
        return measure_spread(alone.held_out_scores, alone.images.groups)

    @functools.cached_property
    def _learner(self) -> LocalLearner:
        return open_learner(
            self._learning,
            self._device,
            marks=lambda: self._marked,
            groups_known=self._dataset.groups_known,
        )

    def _pooled(self, path: Path) -> PooledStatistics | FleetPrior:
        moments, header = read_moments(path)
        own = header.sites.get(self._site, 0)
        log.info("pooled_statistics", images=header.count, sites=len(header.sites), own=own)
        if header.centre == "site":
            return FleetPrior.of_fleet(moments, header, num_own=own)
        return PooledStatistics.of_fleet(moments, header, num_own=own)

    def _training_images(self, report: Progress = no_progress) -> ImageSet:
        if self._images is None:
            self._images = read_training_images(
                self._dataset, self._learning, on_unreadable=self._on_unreadable, progress=report
            )
            if self._marks is not None and METHODS[self._learning.method].exchange == "head":
                self._marked = read_site_marks(
                    self._marks, self._dataset, self._images, self._learning, product=self._product
                )
                self._images = self._marked.images
            elif self._marks is not None:
                log.warning("marks_not_used", method=self._learning.method)
        return self._images


def _told_of_head(details: dict[str, Any] | None) -> dict[str, float | str]:
    """Of the fleet's head, for the summary of a site."""
    if details is None:
        return {}
    told: dict[str, float | str] = {
        MARKED_BAD: float(details["num_bad_marks"]),
        MARKS_LEFT_OUT: float(sum(details["marks_left_out"].values())),
        HEAD_WEIGHT: float(details["weight"]),
    }
    return {**told, NO_HEAD: details["no_head"]} if "no_head" in details else told
