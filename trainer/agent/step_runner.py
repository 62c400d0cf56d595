"""Executes the steps of a site's plan.

:class:`StepTasks` gives the worker's task of each step, stores its result and builds the messages about it; it is
the same over MQTT and in a simulation. :class:`StepRunner` executes one step at a time over MQTT.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeflame.log import EventLog
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, BlobNeed, FinishReport, Offer, TaskFailed, UpMessage
from edgeflame.transfer.compression import usable_codec
from edgeflame.transfer.protocol import describe_file
from edgeflame.transfer.store import Download, OutgoingBlob
from trainer.agent.aggregator_client import BLOB_OWNER, REPEAT_INTERVAL_S, AggregatorClient, Upload
from trainer.agent.plan import (
    Fetch,
    Finish,
    Gather,
    OfferInitial,
    OfferStatistics,
    OfferUpdate,
    PlanStep,
    Prepare,
    Report,
    TellFailure,
    Train,
    Wait,
)
from trainer.agent.state import FinishRecord, SiteState, UpdateRecord
from trainer.agent.tasks import FinishTask, InitialTask, StatisticsTask, Task, TaskResult, TrainTask, WorkerSetup
from trainer.agent.worker_client import WorkerSupervisor

log = EventLog("site")

NO_TRAINING = UpdateRecord(num_samples=0, metrics={})
"""The record of the initial model, which nothing was trained for."""

MAX_DETAIL_CHARS = 500
"""Length to which the reason of a failure is cut before it is sent."""


class StepTasks:
    """The tasks, results and messages of a site's steps.

    Args:
        state: the site's durable state.
        site: the site's name.

    Attributes:
        learning: the fleet's configuration.
        codec: in which form the fleet wants updates.
        chunk_bytes: size of the chunks of what is offered.
    """

    def __init__(self, state: SiteState, site: str) -> None:
        self._state = state
        self._site = site
        self.learning = Learning()
        self.codec = "raw"
        self.chunk_bytes = DEFAULT_CHUNK_BYTES

    def discard_obsolete(self, step: PlanStep) -> None:
        """Delete what earlier steps left, and this one and those after it do not need."""
        match step:
            case Prepare(run=run):
                self._state.discard_other_runs(run)
            case Fetch(run=run, keep=keep):
                self._state.store.prune({self._state.initial(run) or "", *keep})
            case Train():
                # A worker that was killed may have left one behind.
                self._state.temporary_path("private").unlink(missing_ok=True)
            case _:
                pass

    def task_for(self, step: PlanStep) -> Task | None:
        """The worker's task in a step; None where it has none. The same however often it is asked for."""
        state = self._state
        match step:
            case Prepare():
                return InitialTask(out=str(state.temporary_path("initial")))
            case Train(run=run, round=number, base=base):
                return TrainTask(
                    round=number,
                    base=str(state.store.path(base).resolve()),
                    history=_text(state.previous_update(run, number)),
                    out=str(state.temporary_path("update")),
                    seed=task_seed(self.learning.seed, self._site, number),
                    private=_text(state.private_state(run, before=number)),
                    private_out=str(state.temporary_path("private")),
                )
            case Gather(model=model, wanted=wanted):
                return StatisticsTask(
                    model=str(state.store.path(model).resolve()),
                    model_sha256=model,
                    wanted=wanted,
                    out=str(state.temporary_path("statistics")),
                )
            case Finish(run=run, model=model, ledger=ledger, statistics=statistics):
                return FinishTask(
                    model=str(state.store.path(model).resolve()),
                    out_dir=str(state.package_dir(run).resolve()),
                    ledger=self._read_ledger(run, model, ledger),
                    private=_text(state.private_state(run)),
                    statistics=_text(None if statistics is None else state.store.path(statistics)),
                )
            case _:
                return None

    def store(self, step: PlanStep, result: TaskResult) -> None:
        """Store what the worker made in a step."""
        state = self._state
        match step:
            case Prepare(run=run):
                state.store_initial(run, state.temporary_path("initial"))
            case Train(run=run, round=number, base=base):
                state.store_private_state(run, number, state.temporary_path("private"))
                record = UpdateRecord.of(result, base=base, codec=usable_codec(self.codec))
                state.store_update(run, number, state.temporary_path("update"), record)
                log.info("trained", round=number, num_samples=result.num_samples, **result.metrics)
            case Gather(run=run, model=model):
                state.store_statistics(run, state.temporary_path("statistics"), UpdateRecord.of(result, base=model))
                log.info("statistics_made", num_samples=result.num_samples, **result.metrics)
            case Finish(run=run, model=model):
                package = None if result.package is None else Path(result.package)
                finished = FinishRecord(
                    model=model,
                    package=None if package is None else package.name,
                    package_sha256=None if package is None else describe_file(package).sha256,
                    summary=result.summary,
                )
                state.store_finished(run, finished)
                log.info("package_made", **result.summary)
            case _:
                pass

    def offer_for(self, step: PlanStep) -> tuple[Path, Offer] | None:
        """The file that a step uploads, and the message that offers it; None where it uploads none."""
        state = self._state
        match step:
            case OfferInitial(run=run):
                sha256 = state.initial(run)
                assert sha256 is not None
                return self._offer(run, "initial", 0, (state.store.path(sha256), NO_TRAINING))
            case OfferUpdate(run=run, round=number):
                return self._offer(run, "update", number, state.update(run, number))
            case OfferStatistics(run=run):
                return self._offer(run, "statistics", 0, state.statistics(run))
            case _:
                return None

    def message_for(self, step: PlanStep) -> UpMessage | None:
        """The message that a step repeats until it is answered; None where it has none."""
        match step:
            case Report(run=run, model=model):
                finished = self._state.finished(run)
                assert finished is not None
                return FinishReport(run=run, model=model, package=finished.package_sha256, summary=finished.summary)
            case TellFailure(run=run, round=number, purpose=purpose, detail=detail):
                return TaskFailed(run=run, purpose=purpose, round=number, detail=detail[:MAX_DETAIL_CHARS])
            case _:
                return None

    def _offer(
        self,
        run: str,
        purpose: Literal["initial", "update", "statistics"],
        number: int,
        stored: tuple[Path, UpdateRecord] | None,
    ) -> tuple[Path, Offer]:
        assert stored is not None
        path, record = stored
        manifest = msgspec.structs.replace(describe_file(path, chunk_bytes=self.chunk_bytes), codec=record.codec)
        return path, Offer(
            run=run,
            purpose=purpose,
            round=number,
            manifest=manifest,
            num_samples=record.num_samples,
            num_steps=record.num_steps,
            metrics=record.metrics,
        )

    def _read_ledger(self, run: str, model: str, sha256: str | None) -> dict[str, Any]:
        """The ledger from the store; the little that is known anyway if it could not be had, or is unreadable."""
        if sha256 is not None:
            try:
                data = self._state.store.path(sha256).read_bytes()
                ledger: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                log.warning("ledger_unreadable", reason=str(exc))
            else:
                return ledger
        return {"run": run, "model_sha256": model}


def task_seed(seed: int, site: str, number: int) -> int:
    """The seed of a site's round: 32 bits, which every generator takes, and another for each site and round."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}:{number}".encode()).digest()[:4], "big")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


PAUSED = Wait(why="paused")


class StepRunner:
    """Executes one step at a time over MQTT.

    Args:
        client: the channel to the aggregator.
        state: the site's durable state.
        worker: runs the tasks.
        setup: the site's data, for the worker; the learning is the announced one.

    Attributes:
        tasks: tasks and results of the steps; its ``learning`` and ``codec`` are set from the announcement.
        step: the current one.
    """

    def __init__(
        self,
        *,
        client: AggregatorClient,
        state: SiteState,
        worker: WorkerSupervisor,
        setup: WorkerSetup,
    ) -> None:
        self._client = client
        self._state = state
        self._worker = worker
        self._site_setup = setup
        self.tasks = StepTasks(state, client.site)
        self.step: PlanStep = Wait(why="not connected")
        self._download: Download | None = None
        self._upload: Upload | None = None
        self._announced_at = 0.0

    def start(self, step: PlanStep, now: float) -> None:
        """Abandon the current step and begin another."""
        self.stop()
        self.step = step
        if isinstance(step, Wait):
            log.info("waiting", why=step.why)
        self.tasks.discard_obsolete(step)
        if isinstance(step, Fetch):
            self._client.subscribe_chunks(step.manifest.sha256)
            self._download = Download(
                self._state.store, step.manifest, owner=BLOB_OWNER, send=self._client.send, now=now
            )
        if (task := self.tasks.task_for(step)) is not None:
            self._worker.start_task(self._setup(), task)
        if (offered := self.tasks.offer_for(step)) is not None:
            self._upload = self._start_upload(*offered)
        self.announce(now)

    def pause(self, *, release: bool) -> None:
        """Compute and transfer nothing until another step is started, or this one is resumed; may be called again.

        Args:
            release: end the worker, which frees its memory; its task begins anew. Otherwise it is stopped where it is.
        """
        if self._worker.is_busy and not release:
            self._worker.suspend()
        elif self.step != PAUSED:
            self.stop()
            self.step = PAUSED
            if release:
                self._worker.stop()

    def resume(self) -> None:
        """End a pause."""
        self._worker.resume()

    def stop(self) -> None:
        """Abandon the current step: its transfers and its task."""
        if self._download is not None:
            self._client.unsubscribe_chunks(self._download.manifest.sha256)
            self._download.close()
            self._download = None
        if self._upload is not None:
            self._upload.close()
            self._upload = None
        if self._worker.is_busy:
            # The announcement changed meanwhile: nobody needs the result now.
            self._worker.stop()

    def announce(self, now: float) -> None:
        """Send the step's request, offer or report; called again on each new connection."""
        self._announced_at = now
        if self._client.accepted_by is None:
            return
        if self._download is not None:
            self._download.request_missing(now=now)
        if self._upload is not None:
            self._upload.offer(now=now)
        if (message := self.tasks.message_for(self.step)) is not None:
            self._client.send(message)

    def tick(self, now: float) -> None:
        """Send what the aggregator has room for, and repeat what it did not answer.

        To be called only while the aggregator accepts this site.
        """
        if self._download is not None:
            self._download.tick(now)
        if self._upload is not None:
            self._upload.tick(now)
            self._upload.pump()
        if isinstance(self.step, Report | TellFailure) and now - self._announced_at >= REPEAT_INTERVAL_S:
            self.announce(now)

    def on_chunk(self, sha256: str, index: int, data: bytes, *, now: float) -> None:
        """A chunk arrived."""
        if self._download is not None and self._download.manifest.sha256 == sha256:
            self._download.add_chunk(index, data, now=now)

    def on_need(self, need: BlobNeed, *, now: float) -> None:
        """The aggregator said which chunks it lacks."""
        if self._upload is not None:
            self._upload.on_need(need, now=now)

    def on_task_done(self, result: TaskResult) -> None:
        """The worker finished the step's task."""
        self.tasks.store(self.step, result)

    @property
    def progress(self) -> tuple[str, int, int]:
        """The step's wire name, how far it is and how far it goes; 0 of 0 where that is unknown."""
        name = self.step.wire_name
        if self._download is not None:
            return (name, *self._download.progress)
        if self._upload is not None:
            return (name, *self._upload.progress)
        if self._worker.is_busy:
            return name, max(self._worker.progress.done, 0), max(self._worker.progress.total, 0)
        return name, 0, 0

    def _start_upload(self, path: Path, offer: Offer) -> Upload:
        def publish(index: int, data: bytes) -> None:
            self._client.send_chunk(offer.manifest.sha256, index, data)

        return Upload(OutgoingBlob(path, offer.manifest), offer, send=self._client.send, publish=publish)

    def _setup(self) -> WorkerSetup:
        return msgspec.structs.replace(self._site_setup, learning=self.tasks.learning)
