"""Simulated sites, without a link: they take every step of the plan at once, as far as what was announced lets them.

The plan, the state directory, the orders and the learning are those of a site that talks over MQTT. Only the way of
blobs differs: they are taken from the aggregator's folder, as hard links where the file system has them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from edgeflame.errors import DataError, EdgeFlameError, FederationError, NumericalError
from edgeflame.log import EventLog, no_progress
from edgeflame.mqtt.messages import (
    FinishReport,
    Purpose,
    RoundState,
    TaskFailed,
    UpMessage,
    decode_round,
    encode_message,
)
from edgeflame.simulation import (
    TASK_DECODER,
    MeasureAnswer,
    MeasureTask,
    SimulationAnswer,
    SimulationFailure,
    SiteAnswer,
    SiteTask,
)
from edgeflame.state import link_or_copy
from trainer.agent import step_runner
from trainer.agent.plan import (
    Fetch,
    Finish,
    Gather,
    Leave,
    OfferInitial,
    OfferStatistics,
    OfferUpdate,
    Prepare,
    Report,
    TellFailure,
    Train,
    Wait,
    plan,
)
from trainer.agent.state import (
    BAD_UPDATE_REASONS,
    SiteState,
    UpdateRecord,
    announced_learning,
    plan_input,
    step_purpose,
)
from trainer.agent.tasks import Order, SiteTrainer, TaskDone, WorkerSetup
from trainer.agent.worker import execute_order

log = EventLog("site")

MAX_TRAINERS = 64
"""Sites of which this process keeps the work at hand, with the images it has read; others are built again."""


class SimulatedSites:
    """Does what simulated sites are asked; keeps nothing that is not also on disk.

    Args:
        build: makes the work of a site.
    """

    def __init__(self, build: Callable[[WorkerSetup], SiteTrainer]) -> None:
        self._build = build
        self._works: OrderedDict[str, tuple[WorkerSetup, SiteTrainer]] = OrderedDict()

    def carry_out(self, task: SiteTask) -> SiteAnswer:
        """Take the site's steps until it has something to say, or nothing more to do.

        Raises:
            ConfigError: the announced learning is not one this version knows.
            StorageError: the disk fails.
        """
        return _SiteTaskRun(task, self._work).steps()

    def _work(self, setup: WorkerSetup) -> SiteTrainer:
        held = self._works.pop(setup.site, None)
        if held is None or held[0] != setup:
            held = (setup, self._build(setup))
        self._works[setup.site] = held
        if len(self._works) > MAX_TRAINERS:
            self._works.popitem(last=False)
        return held[1]


class _SiteTaskRun:
    """One task of one site."""

    def __init__(self, task: SiteTask, work: Callable[[WorkerSetup], SiteTrainer]) -> None:
        self._task = task
        self._work = work
        self._announced: RoundState = decode_round(bytes(task.announced))
        self._learning = announced_learning(self._announced)
        self._memory = SiteState(Path(task.state))
        self._failure: tuple[Purpose, str] | None = None
        for number, reason in task.refused.items():
            self._memory.forget_private(self._announced.run, number)
            if reason in BAD_UPDATE_REASONS:
                self._memory.forget_update(self._announced.run, number)

    def steps(self) -> SiteAnswer:
        memory, site = self._memory, self._task.site
        while True:
            step = plan(plan_input(memory, site, self._announced, failure=self._failure))
            match step:
                case Wait() | Leave():
                    return self._answer(None)
                case OfferInitial(run=run):
                    sha256 = memory.initial(run)
                    assert sha256 is not None
                    return self._offer(memory.store.path(sha256), run, "initial", 0, step_runner.NO_TRAINING)
                case OfferUpdate(run=run, round=number):
                    kept = memory.update(run, number)
                    assert kept is not None
                    return self._offer(kept[0], run, "update", number, kept[1])
                case OfferStatistics(run=run):
                    shared = memory.statistics(run)
                    assert shared is not None
                    return self._offer(shared[0], run, "statistics", 0, shared[1])
                case Report(run=run, model=model):
                    finished = memory.finished(run)
                    assert finished is not None
                    report = FinishReport(
                        run=run, model=model, package=finished.package_sha256, summary=finished.summary
                    )
                    return self._answer(report)
                case TellFailure(run=run, round=number, purpose=purpose, detail=detail):
                    return self._answer(TaskFailed(run=run, purpose=purpose, round=number, detail=detail[:500]))
                case Fetch(run=run, keep=keep, manifest=manifest):
                    memory.store.prune({memory.initial(run) or "", *keep})
                    link_or_copy(Path(self._task.blobs) / manifest.sha256, memory.store.path(manifest.sha256))
                case Prepare(run=run):
                    self._prepare(run)
                case Train() | Gather() | Finish():
                    try:
                        self._labour(step)
                    except (DataError, FederationError, NumericalError) as exc:
                        log.warning("work_failed", site=site, reason=str(exc))
                        self._failure = (step_purpose(step), str(exc))
                case _:
                    raise AssertionError(f"a resident site does not know how to {type(step).__name__}")

    def _prepare(self, run: str) -> None:
        memory = self._memory
        memory.forget_other_runs(run)
        # A fleet's sites begin with the same model: same configuration, same seed, same weights.
        shared = Path(self._task.shared) / f"initial-{run}.safetensors"
        draft = memory.draft("initial")
        if shared.exists():
            link_or_copy(shared, draft)
        else:
            self._order(step_runner.initial_order(memory))
        memory.keep_initial(run, draft)
        sha256 = memory.initial(run)
        assert sha256 is not None
        if not shared.exists():
            link_or_copy(memory.store.path(sha256), shared)

    def _labour(self, step: Train | Gather | Finish) -> None:
        memory = self._memory
        match step:
            case Train(run=run, round=number, base=base):
                path = memory.store.path(base)
                order = step_runner.train_order(
                    memory, self._learning, self._task.site, run=run, number=number, base=path
                )
                done = self._order(order)
                step_runner.keep_update(memory, done, run=run, number=number, base=base, codec=self._announced.codec)
            case Gather(run=run, model=model, wanted=wanted):
                done = self._order(step_runner.statistics_order(memory, model=model, wanted=wanted))
                step_runner.keep_statistics(memory, done, run=run)
            case Finish(run=run, model=model, ledger=ledger, statistics=statistics):
                finish = step_runner.finish_order(
                    memory,
                    run=run,
                    model=memory.store.path(model),
                    ledger=step_runner.read_ledger(memory, run, model, ledger),
                    statistics=None if statistics is None else memory.store.path(statistics),
                )
                step_runner.keep_finished(memory, self._order(finish), run=run, model=model)

    def _order(self, order: Order) -> TaskDone:
        setup = WorkerSetup(
            learning=self._learning,
            site=self._task.site,
            data=self._task.data,
            state=str(self._memory.work_dir),
        )
        return execute_order(self._work(setup), order, no_progress)

    def _offer(
        self,
        path: Path,
        run: str,
        purpose: Literal["initial", "update", "statistics"],
        number: int,
        outcome: UpdateRecord,
    ) -> SiteAnswer:
        offer = step_runner.make_offer(path, run=run, purpose=purpose, number=number, outcome=outcome)
        return self._answer(offer, blob=path)

    def _answer(self, message: UpMessage | None, blob: Path | None = None) -> SiteAnswer:
        return SiteAnswer(
            site=self._task.site,
            install=self._memory.install,
            initial=self._memory.initial(self._announced.run),
            said=None if message is None else encode_message(message).decode(),
            blob=None if blob is None else str(blob.resolve()),
        )


def answer_task(data: bytes, residents: SimulatedSites, measure: Callable[[MeasureTask], MeasureAnswer]) -> bytes:
    """An encoded task's encoded answer; expected errors become a :class:`SimulationFailure`."""
    task = TASK_DECODER.decode(data)
    try:
        result: SimulationAnswer = residents.carry_out(task) if isinstance(task, SiteTask) else measure(task)
    except EdgeFlameError as exc:
        result = SimulationFailure(error=type(exc).__name__, message=str(exc))
    return msgspec.json.encode(result)
