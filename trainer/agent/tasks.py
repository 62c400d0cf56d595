"""The interface between a site's protocol side and its learning: tasks, results and :class:`SiteTrainer`.

The protocol side (this package) runs in one process and keeps the link alive; an implementation of
:class:`SiteTrainer` runs in a worker process and may take hours. Models travel between them as safetensors files.

The two processes exchange JSON, one message a line. The worker reads :class:`WorkerSetup` first, then one task at a
time; it answers with any number of :class:`TaskProgress` and one :class:`TaskResult` or :class:`TaskError`. The end of
its standard input is the end of the worker. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from edgeflame.log import Progress
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import StatisticsWanted


class _WorkerLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class WorkerSetup(_WorkerLine, frozen=True, kw_only=True, tag="setup"):
    """What a :class:`SiteTrainer` is built from; paths are absolute."""

    learning: Learning
    site: str
    data: str
    groups_file: str | None = None
    marks: str | None = None
    """Folder of marks."""
    product: str | None = None
    """The kind of part."""


class InitialTask(_WorkerLine, frozen=True, kw_only=True, tag="initial"):
    """Write the model that every run starts from; the same at every site."""

    out: str
    """Where to write it, safetensors."""


class TrainTask(_WorkerLine, frozen=True, kw_only=True, tag="train"):
    """Train one round."""

    round: int
    """1 and up."""
    base: str
    """The global model of this round, safetensors."""
    history: str | None = None
    """This site's own model of the last round it trained in; None in its first."""
    out: str
    """Where to write the trained model, with the tensors of ``base`` (names, shapes, types)."""
    seed: int
    """Seed of random numbers. The same task with the same seed gives the same file, whatever was interrupted before:
    that is what makes a run with crashes end like one without."""
    private: str | None = None
    """What ``private_out`` of the last round that counted holds; None before there is one."""
    private_out: str | None = None
    """Where to write what the next round needs and nobody else may see, safetensors; need not be written."""


class StatisticsTask(_WorkerLine, frozen=True, kw_only=True, tag="statistics"):
    """Compute this site's part of the fleet's statistics."""

    model: str
    """The final global model, safetensors."""
    model_sha256: str
    """Of that file; the statistics name it."""
    wanted: StatisticsWanted
    """In which form."""
    out: str
    """Where to write them, see :mod:`edgeflame.statistics.shared`."""


class FinishTask(_WorkerLine, frozen=True, kw_only=True, tag="finish"):
    """Make this site's statistics, threshold and package from the final model."""

    model: str
    """The final global model, safetensors."""
    out_dir: str
    """An existing folder to write into; what an interrupted attempt left there may be overwritten."""
    ledger: dict[str, Any]
    """Who contributed what in which round; it goes into the package as its provenance."""
    private: str | None = None
    """What this site kept of the last round that counted."""
    statistics: str | None = None
    """The fleet's pooled statistics, to be used instead of this site's alone; None if none are shared."""


Task = InitialTask | TrainTask | StatisticsTask | FinishTask
ToWorker = WorkerSetup | Task


class WorkerReady(_WorkerLine, frozen=True, kw_only=True, tag="ready"):
    """The :class:`SiteTrainer` is built."""


class TaskProgress(_WorkerLine, frozen=True, kw_only=True, tag="step"):
    """How far the current task is: ``done`` of ``total`` steps, and what they are."""

    done: int
    total: int
    note: str = ""


class TaskResult(_WorkerLine, frozen=True, kw_only=True, tag="done"):
    """A task is done; which fields are set depends on it."""

    num_samples: int = 0
    """Images trained on, or behind the statistics, at least 1; the update's weight in the average."""
    num_steps: int = 0
    """Optimiser steps taken; 0 is "not known", and rules that need them refuse the update."""
    metrics: dict[str, float] = {}
    """Of a training or of statistics."""
    package: str | None = None
    """The package that was written, below ``out_dir``; None if none is made."""
    summary: dict[str, float | str] = {}
    """Figures of a finished site for people: counts, threshold, ..."""


class TaskError(_WorkerLine, frozen=True, kw_only=True, tag="problem"):
    """An expected error: the class of ``edgeflame.errors`` and its message."""

    error: str
    message: str


FromWorker = WorkerReady | TaskProgress | TaskResult | TaskError

TO_WORKER: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
FROM_WORKER: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)


def encode_line(message: ToWorker | FromWorker) -> bytes:
    """The message as a line."""
    return msgspec.json.encode(message) + b"\n"


class SiteTrainer(Protocol):
    """The learning of one site. Its errors are those of ``edgeflame.errors``.

    ``report`` is to be called at least every few seconds: it is the sign of life that others wait for.
    """

    def write_initial_model(self, task: InitialTask) -> None:
        """Write the model that every run starts from."""
        ...

    def train(self, task: TrainTask, report: Progress) -> TaskResult:
        """Train one round; sets ``num_samples``, ``num_steps`` and ``metrics``."""
        ...

    def compute_statistics(self, task: StatisticsTask, report: Progress) -> TaskResult:
        """Compute the statistics to be shared; sets ``num_samples`` and ``metrics``."""
        ...

    def finish(self, task: FinishTask, report: Progress) -> TaskResult:
        """Make this site's package from the final model; sets ``package`` and ``summary``."""
        ...
