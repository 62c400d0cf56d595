"""Runs a step of the plan: the orders to the worker, the transfers and the messages it consists of.

First what a site asks of its worker, and what it keeps of the answer; that is the same over MQTT and in a simulation.
Then :class:`StepRunner`, which takes one step at a time over MQTT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeflame.log import EventLog
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, BlobNeed, FinishReport, Offer, StatisticsWanted, TaskFailed
from edgeflame.transfer.compression import usable_codec
from edgeflame.transfer.protocol import describe_file
from edgeflame.transfer.store import Download, Outgoing
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
from trainer.agent.tasks import FinishOrder, InitialOrder, StatisticsOrder, TaskDone, TrainOrder, WorkerSetup
from trainer.agent.worker_client import WorkerSupervisor

log = EventLog("site")

NO_TRAINING = UpdateRecord(num_samples=0, metrics={})
"""Of the initial model, which nothing was trained for."""


def initial_order(memory: SiteState) -> InitialOrder:
    """The order for the initial model."""
    return InitialOrder(out=str(memory.draft("initial")))


def train_order(memory: SiteState, learning: Learning, site: str, *, run: str, number: int, base: Path) -> TrainOrder:
    """The order for a round's update; the same however often it is given."""
    history, private = memory.history(run, number), memory.private(run, before=number)
    # A worker that was killed may have left one behind.
    memory.draft("private").unlink(missing_ok=True)
    return TrainOrder(
        round=number,
        base=str(base.resolve()),
        history=None if history is None else str(history.resolve()),
        out=str(memory.draft("update")),
        seed=task_seed(learning.seed, site, number),
        private=None if private is None else str(private),
        private_out=str(memory.draft("private")),
    )


def statistics_order(memory: SiteState, *, model: str, wanted: StatisticsWanted) -> StatisticsOrder:
    """The order for what the fleet is to have of the site's statistics; ``model`` is the final model's SHA-256."""
    return StatisticsOrder(
        model=str(memory.store.path(model).resolve()),
        model_sha256=model,
        wanted=wanted,
        out=str(memory.draft("statistics")),
    )


def finish_order(
    memory: SiteState, *, run: str, model: Path, ledger: Mapping[str, Any], statistics: Path | None = None
) -> FinishOrder:
    """The order for the site's package; ``statistics`` are the fleet's, where it shares them."""
    private = memory.private(run)
    return FinishOrder(
        model=str(model.resolve()),
        out_dir=str(memory.finish_dir(run).resolve()),
        ledger=dict(ledger),
        private=None if private is None else str(private),
        statistics=None if statistics is None else str(statistics.resolve()),
    )


def read_ledger(memory: SiteState, run: str, model: str, sha256: str | None) -> dict[str, Any]:
    """The ledger from the store; the little that is known anyway if it could not be had, or is unreadable."""
    if sha256 is not None:
        try:
            data = memory.store.path(sha256).read_bytes()
            ledger: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
            log.warning("ledger_unreadable", reason=str(exc))
        else:
            return ledger
    return {"run": run, "model_sha256": model}


def make_offer(
    path: Path,
    *,
    run: str,
    purpose: Literal["initial", "update", "statistics"],
    number: int,
    outcome: UpdateRecord,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Offer:
    """The offer of a model that lies at ``path``."""
    return Offer(
        run=run,
        purpose=purpose,
        round=number,
        manifest=msgspec.structs.replace(describe_file(path, chunk_bytes=chunk_bytes), codec=outcome.codec),
        num_samples=outcome.num_samples,
        num_steps=outcome.num_steps,
        metrics=outcome.metrics,
    )


def keep_update(
    memory: SiteState, done: TaskDone, *, run: str, number: int, base: str | None = None, codec: str = "raw"
) -> None:
    """Keep what a train order gave; ``base`` is its base model's SHA-256, ``codec`` how the fleet wants it sent."""
    outcome = UpdateRecord(
        num_samples=done.num_samples,
        num_steps=done.num_steps,
        metrics=done.metrics,
        base=base,
        codec="raw" if base is None else usable_codec(codec),
    )
    memory.keep_private(run, number, memory.draft("private"))
    memory.keep_update(run, number, memory.draft("update"), outcome)
    log.info("trained", round=number, num_samples=done.num_samples, **done.metrics)


def keep_statistics(memory: SiteState, done: TaskDone, *, run: str, model: str | None = None) -> None:
    """Keep what a statistics order gave; ``model`` is the final model's SHA-256."""
    outcome = UpdateRecord(num_samples=done.num_samples, metrics=done.metrics, base=model)
    memory.keep_statistics(run, memory.draft("statistics"), outcome)
    log.info("statistics_made", num_samples=done.num_samples, **done.metrics)


def keep_finished(memory: SiteState, done: TaskDone, *, run: str, model: str) -> None:
    """Keep what a finish order gave; ``model`` is the final model's SHA-256."""
    package = None if done.package is None else Path(done.package)
    finished = FinishRecord(
        model=model,
        package=None if package is None else package.name,
        package_sha256=None if package is None else describe_file(package).sha256,
        summary=done.summary,
    )
    memory.keep_finished(run, finished)
    log.info("package_made", **done.summary)


def task_seed(seed: int, site: str, number: int) -> int:
    """The seed of a site's round: 32 bits, which every generator takes, and another for each site and round."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}:{number}".encode()).digest()[:4], "big")


PAUSED = Wait(why="paused")


class StepRunner:
    """Takes one step at a time.

    Args:
        voice: speaks to the aggregator.
        memory: the state directory.
        labour: the worker.
        data: the site's images.
        groups_file: see :func:`edgeflame.dataset.open_dataset`.
    """

    def __init__(
        self,
        *,
        voice: AggregatorClient,
        memory: SiteState,
        labour: WorkerSupervisor,
        data: Path,
        groups_file: Path | None,
    ) -> None:
        self._voice = voice
        self._memory = memory
        self._labour = labour
        self._data = data
        self._groups_file = groups_file
        self.learning = Learning()
        self.codec = "raw"
        """In which form the fleet wants updates."""
        self.chunk_bytes = DEFAULT_CHUNK_BYTES
        self.step: PlanStep = Wait(why="not connected")
        self._download: Download | None = None
        self._upload: Upload | None = None
        self._said_at = 0.0

    def begin(self, step: PlanStep, now: float) -> None:
        """Leave the step at hand and take another."""
        self.stop()
        self.step = step
        memory = self._memory
        match step:
            case Wait(why=why):
                log.info("waiting", why=why)
            case Prepare(run=run):
                memory.forget_other_runs(run)
                self._labour.begin(self._setup(), initial_order(memory))
            case Fetch(run=run, keep=keep, manifest=manifest):
                memory.store.prune({memory.initial(run) or "", *keep})
                self._voice.listen(manifest.sha256)
                self._download = Download(memory.store, manifest, owner=BLOB_OWNER, send=self._voice.send, now=now)
            case Train(run=run, round=number, base=base):
                order = train_order(
                    memory, self.learning, self._voice.site, run=run, number=number, base=memory.store.path(base)
                )
                self._labour.begin(self._setup(), order)
            case OfferInitial(run=run):
                self._upload = self._offer_initial(run)
            case OfferUpdate(run=run, round=number):
                self._upload = self._offer_update(run, number)
            case Gather(run=run, model=model, wanted=wanted):
                self._labour.begin(self._setup(), statistics_order(memory, model=model, wanted=wanted))
            case OfferStatistics(run=run):
                shared = memory.statistics(run)
                assert shared is not None
                self._upload = self._offer(shared[0], run, "statistics", 0, shared[1])
            case Finish(run=run, model=model, ledger=ledger, statistics=statistics):
                record = read_ledger(memory, run, model, ledger)
                pooled = None if statistics is None else memory.store.path(statistics)
                path = memory.store.path(model)
                self._labour.begin(
                    self._setup(), finish_order(memory, run=run, model=path, ledger=record, statistics=pooled)
                )
            case _:
                pass
        self.say(now)

    def rest(self, *, release: bool) -> None:
        """Compute and transfer nothing until another step is taken, or this one goes on. Repeated.

        Args:
            release: end the worker, which frees its memory; its task begins anew. Otherwise it is stopped where it is.
        """
        if self._labour.is_busy and not release:
            self._labour.freeze()
        elif self.step != PAUSED:
            self.stop()
            self.step = PAUSED
            if release:
                self._labour.stop()

    def go_on(self) -> None:
        """No more rest."""
        self._labour.thaw()

    def stop(self) -> None:
        """Leave the step at hand."""
        if self._download is not None:
            self._voice.listen_no_more(self._download.manifest.sha256)
            self._download.close()
            self._download = None
        if self._upload is not None:
            self._upload.close()
            self._upload = None
        if self._labour.is_busy:
            # The announcement changed under the work: it is for nothing now.
            self._labour.stop()

    def say(self, now: float) -> None:
        """Tell or ask the aggregator what the step needs; again on a new connection, and until it is answered."""
        self._said_at = now
        if self._voice.welcomed_by is None:
            return
        if self._download is not None:
            self._download.ask(now=now)
        if self._upload is not None:
            self._upload.ask(now=now)
        match self.step:
            case Report(run=run, model=model):
                finished = self._memory.finished(run)
                assert finished is not None
                self._voice.send(
                    FinishReport(run=run, model=model, package=finished.package_sha256, summary=finished.summary)
                )
            case TellFailure(run=run, round=number, purpose=purpose, detail=detail):
                self._voice.send(TaskFailed(run=run, purpose=purpose, round=number, detail=detail[:500]))
            case _:
                pass

    def tick(self, now: float) -> None:
        """Send what may be sent, and repeat what was not answered; while we are welcome."""
        if self._download is not None:
            self._download.tick(now)
        if self._upload is not None:
            self._upload.tick(now)
            self._upload.pump()
        if isinstance(self.step, Report | TellFailure) and now - self._said_at >= REPEAT_INTERVAL_S:
            self.say(now)

    def chunk(self, sha256: str, index: int, data: bytes, *, now: float) -> None:
        """A chunk arrived."""
        if self._download is not None and self._download.manifest.sha256 == sha256:
            self._download.chunk(index, data, now=now)

    def need(self, need: BlobNeed, *, now: float) -> None:
        """The aggregator's bitmap arrived."""
        if self._upload is not None:
            self._upload.need(need, now=now)

    def done(self, done: TaskDone) -> None:
        """The worker carried the step's order out; remember what it made."""
        memory = self._memory
        match self.step:
            case Prepare(run=run):
                memory.keep_initial(run, memory.draft("initial"))
            case Train(run=run, round=number, base=base):
                keep_update(memory, done, run=run, number=number, base=base, codec=self.codec)
            case Gather(run=run, model=model):
                keep_statistics(memory, done, run=run, model=model)
            case Finish(run=run, model=model):
                keep_finished(memory, done, run=run, model=model)
            case _:
                pass

    @property
    def activity(self) -> tuple[str, int, int]:
        """What is being done, how far it is and how far it goes; 0 of 0 where that is unknown."""
        name = self.step.wire_name
        if self._download is not None:
            return (name, *self._download.progress)
        if self._upload is not None:
            return (name, *self._upload.progress)
        if self._labour.is_busy:
            return name, max(self._labour.step.done, 0), max(self._labour.step.total, 0)
        return name, 0, 0

    def _offer_initial(self, run: str) -> Upload:
        sha256 = self._memory.initial(run)
        assert sha256 is not None
        return self._offer(self._memory.store.path(sha256), run, "initial", 0, NO_TRAINING)

    def _offer_update(self, run: str, number: int) -> Upload:
        kept = self._memory.update(run, number)
        assert kept is not None
        return self._offer(kept[0], run, "update", number, kept[1])

    def _offer(
        self,
        path: Path,
        run: str,
        purpose: Literal["initial", "update", "statistics"],
        number: int,
        outcome: UpdateRecord,
    ) -> Upload:
        offer = make_offer(path, run=run, purpose=purpose, number=number, outcome=outcome, chunk_bytes=self.chunk_bytes)
        manifest = offer.manifest

        def publish(index: int, data: bytes) -> None:
            self._voice.send_chunk(manifest.sha256, index, data)

        return Upload(Outgoing(path, manifest), offer, send=self._voice.send, publish=publish)

    def _setup(self) -> WorkerSetup:
        return WorkerSetup(
            learning=self.learning,
            site=self._voice.site,
            data=str(self._data.resolve()),
            state=str(self._memory.work_dir.resolve()),
            groups_file=None if self._groups_file is None else str(self._groups_file.resolve()),
        )
