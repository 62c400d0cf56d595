"""Simulated sites, without a network: each takes all steps of the plan at once, as far as the announcement lets it.

Plan, state directory, tasks and learning are those of a site that talks over MQTT. Only blobs are had differently:
from the aggregator's folder, as hard links where the file system has them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgeflame.errors import DataError, EdgeFlameError, FederationError, NumericalError
from edgeflame.log import EventLog, no_progress
from edgeflame.mqtt.messages import Purpose, RoundState, UpMessage, decode_round, encode_message
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
from trainer.agent.plan import Fetch, Leave, PlanStep, Prepare, Wait, plan
from trainer.agent.state import BAD_UPDATE_REASONS, SiteState, announced_learning, plan_input, step_purpose
from trainer.agent.step_runner import StepTasks
from trainer.agent.tasks import SiteTrainer, WorkerSetup
from trainer.agent.worker import execute_task

log = EventLog("site")

MAX_TRAINERS = 64
"""Sites whose trainer this process keeps, with the images it has read; others are built again."""


class SimulatedSites:
    """Does the tasks of simulated sites; keeps nothing that is not also on disk.

    Args:
        build: makes the trainer of a site.
    """

    def __init__(self, build: Callable[[WorkerSetup], SiteTrainer]) -> None:
        self._build = build
        self._trainers: OrderedDict[str, tuple[WorkerSetup, SiteTrainer]] = OrderedDict()

    def execute(self, task: SiteTask) -> SiteAnswer:
        """Take the site's steps until it has a message for the aggregator, or nothing more to do.

        Raises:
            ConfigError: the announced learning is not one this version knows.
            StorageError: the disk fails.
        """
        return _SiteTaskRun(task, self._trainer_for).run()

    def _trainer_for(self, setup: WorkerSetup) -> SiteTrainer:
        held = self._trainers.pop(setup.site, None)
        if held is None or held[0] != setup:
            held = (setup, self._build(setup))
        self._trainers[setup.site] = held
        if len(self._trainers) > MAX_TRAINERS:
            self._trainers.popitem(last=False)
        return held[1]


class _SiteTaskRun:
    """One task of one site."""

    def __init__(self, task: SiteTask, trainer_for: Callable[[WorkerSetup], SiteTrainer]) -> None:
        self._task = task
        self._trainer_for = trainer_for
        self._announced: RoundState = decode_round(bytes(task.announced))
        self._state = SiteState(Path(task.state))
        self._tasks = StepTasks(self._state, task.site)
        self._tasks.learning = announced_learning(self._announced)
        self._tasks.codec = self._announced.codec
        self._failure: tuple[Purpose, str] | None = None
        for number, reason in task.refused.items():
            self._state.discard_private_state(self._announced.run, number)
            if reason in BAD_UPDATE_REASONS:
                self._state.discard_update(self._announced.run, number)

    def run(self) -> SiteAnswer:
        tasks = self._tasks
        while True:
            step = plan(plan_input(self._state, self._task.site, self._announced, failure=self._failure))
            if isinstance(step, Wait | Leave):
                return self._answer(None)
            if (offered := tasks.offer_for(step)) is not None:
                return self._answer(offered[1], blob=offered[0])
            if (message := tasks.message_for(step)) is not None:
                return self._answer(message)
            tasks.discard_obsolete(step)
            match step:
                case Fetch(manifest=manifest):
                    blob = Path(self._task.blobs) / manifest.sha256
                    link_or_copy(blob, self._state.store.path(manifest.sha256))
                case Prepare():
                    self._prepare(step)
                case _:
                    self._run_task(step)

    def _prepare(self, step: Prepare) -> None:
        """A fleet's sites begin with the same model, so the first makes it for all."""
        shared = Path(self._task.shared) / f"initial-{step.run}.safetensors"
        if shared.exists():
            link_or_copy(shared, self._state.temporary_path("initial"))
            self._state.store_initial(step.run, self._state.temporary_path("initial"))
            return
        self._execute(step)
        sha256 = self._state.initial(step.run)
        assert sha256 is not None
        link_or_copy(self._state.store.path(sha256), shared)

    def _run_task(self, step: PlanStep) -> None:
        try:
            self._execute(step)
        except (DataError, FederationError, NumericalError) as exc:
            log.warning("work_failed", site=self._task.site, reason=str(exc))
            self._failure = (step_purpose(step), str(exc))

    def _execute(self, step: PlanStep) -> None:
        task = self._tasks.task_for(step)
        assert task is not None, f"a simulated site has no task for {step}"
        setup = WorkerSetup(
            learning=self._tasks.learning, site=self._task.site, data=self._task.data, marks=self._task.marks
        )
        self._tasks.store(step, execute_task(self._trainer_for(setup), task, no_progress))

    def _answer(self, message: UpMessage | None, blob: Path | None = None) -> SiteAnswer:
        return SiteAnswer(
            site=self._task.site,
            install=self._state.install,
            initial=self._state.initial(self._announced.run),
            said=None if message is None else encode_message(message).decode(),
            blob=None if blob is None else str(blob.resolve()),
        )


def answer_task(data: bytes, sites: SimulatedSites, measure: Callable[[MeasureTask], MeasureAnswer]) -> bytes:
    """An encoded task's encoded answer; expected errors become a :class:`SimulationFailure`."""
    task = TASK_DECODER.decode(data)
    try:
        result: SimulationAnswer = sites.execute(task) if isinstance(task, SiteTask) else measure(task)
    except EdgeFlameError as exc:
        result = SimulationFailure(error=type(exc).__name__, message=str(exc))
    return msgspec.json.encode(result)
