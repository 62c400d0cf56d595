"""What the protocol side asks of the learning: worker messages, tasks, and the interface :class:`SiteTrainer`.

The protocol side (this package) runs in one process and keeps the link alive; an implementation of
:class:`SiteTrainer` runs in a worker process and may take hours. Models travel between them as safetensors files.

The two processes exchange JSON, one message a line. The worker reads :class:`WorkerSetup` first, then one order at a
time; it answers with any number of :class:`TaskProgress` and one :class:`TaskDone` or :class:`TaskError`. The end of
its standard input is the end of the worker. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeflame.log import Progress
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import StatisticsWanted


class _WorkerLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class WorkerSetup(_WorkerLine, frozen=True, kw_only=True, tag="setup"):
    """What the work is built from; paths are absolute."""

    learning: Learning
    site: str
    data: str
    state: str
    """A folder the work may keep things in."""
    groups_file: str | None = None


class InitialOrder(_WorkerLine, frozen=True, kw_only=True, tag="initial"):
    out: str


class TrainOrder(_WorkerLine, frozen=True, kw_only=True, tag="train"):
    round: int
    base: str
    history: str | None
    out: str
    seed: int
    private: str | None = None
    private_out: str | None = None


class StatisticsOrder(_WorkerLine, frozen=True, kw_only=True, tag="statistics"):
    model: str
    model_sha256: str
    wanted: StatisticsWanted
    out: str


class FinishOrder(_WorkerLine, frozen=True, kw_only=True, tag="finish"):
    model: str
    out_dir: str
    ledger: dict[str, Any]
    private: str | None = None
    statistics: str | None = None


Order = InitialOrder | TrainOrder | StatisticsOrder | FinishOrder
ToWorker = WorkerSetup | Order


class WorkerReady(_WorkerLine, frozen=True, kw_only=True, tag="ready"):
    """The work is built."""


class TaskProgress(_WorkerLine, frozen=True, kw_only=True, tag="step"):
    """Progress of the order at hand."""

    done: int
    total: int
    note: str = ""


class TaskDone(_WorkerLine, frozen=True, kw_only=True, tag="done"):
    """The order is carried out; which fields are set depends on it."""

    num_samples: int = 0
    num_steps: int = 0
    metrics: dict[str, float] = {}
    package: str | None = None
    statistics: str | None = None
    summary: dict[str, float | str] = {}


class TaskError(_WorkerLine, frozen=True, kw_only=True, tag="problem"):
    """An expected error: the class of ``edgeflame.errors`` and its message."""

    error: str
    message: str


FromWorker = WorkerReady | TaskProgress | TaskDone | TaskError

TO_WORKER: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
FROM_WORKER: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)


def encode_line(message: ToWorker | FromWorker) -> bytes:
    """The message as a line."""
    return msgspec.json.encode(message) + b"\n"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Train one round.

    Attributes:
        round: 1 and up.
        base: the global model of this round, safetensors.
        history: this site's own model of the last round it trained in; None in its first.
        out: where to write the trained model, with the tensors of ``base`` (names, shapes, types).
        private: what this site kept of the last round that counted, see ``private_out``; None before there is one.
        private_out: where to write what the next round needs and nobody else may see, safetensors; need not be.
        seed: of everything random; the same task with the same seed gives the same file, whatever was
            interrupted before. That is what makes a run with crashes end like one without.
    """

    round: int
    base: Path
    history: Path | None
    out: Path
    seed: int
    private: Path | None = None
    private_out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What came of it.

    Attributes:
        num_samples: images trained on, at least 1; the update's weight in the average.
        num_steps: optimiser steps taken; 0 is "not said", and rules that need them refuse the update.
        metrics: finite.
    """

    num_samples: int
    num_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StatisticsTask:
    """Make what the fleet is to have of this site's statistics.

    Attributes:
        model: the final global model, safetensors.
        model_sha256: of it; the statistics name it.
        wanted: in which form.
        out: where to write them, see :mod:`edgeflame.statistics.merge`.
    """

    model: Path
    model_sha256: str
    wanted: StatisticsWanted
    out: Path


@dataclass(frozen=True, kw_only=True)
class FinishTask:
    """Make this site's statistics, threshold and package.

    Attributes:
        model: the final global model, safetensors.
        out_dir: an existing folder to write into; what an interrupted attempt left there may be overwritten.
        ledger: who contributed what in which round; it goes into the package as its provenance.
        private: what this site kept of the last round that counted.
        statistics: the fleet's pooled statistics, to be used instead of this site's alone; None: there are none.
    """

    model: Path
    out_dir: Path
    ledger: Mapping[str, Any]
    private: Path | None = None
    statistics: Path | None = None


@dataclass(frozen=True, kw_only=True)
class FinishOutcome:
    """Files written (below ``out_dir``), and a few figures for people: counts, threshold, AUROC, ..."""

    package: Path | None
    statistics: Path | None
    summary: dict[str, float | str] = field(default_factory=dict)


class SiteTrainer(Protocol):
    """The learning of one site. Its errors are those of ``edgeflame.errors``."""

    def write_initial_model(self, out: Path) -> None:
        """Write the model every run starts from, as safetensors."""
        ...

    def train(self, task: TrainTask, report: Progress) -> TrainOutcome:
        """Train one round; ``report`` at least every few seconds: it is the sign of life others wait for."""
        ...

    def gather(self, task: StatisticsTask, report: Progress) -> TrainOutcome:
        """Make the statistics to be shared; ``num_samples`` is the number of images behind them."""
        ...

    def finish(self, task: FinishTask, report: Progress) -> FinishOutcome:
        """Make this site's package from the final model."""
        ...
