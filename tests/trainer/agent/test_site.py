"""A site's parts without a broker: the plan, the memory, the worker."""

from __future__ import annotations

import queue
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from edgeflame.errors import DataError, EdgeFlameError, FederationError, MissingDependencyError, StorageError
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import BlobManifest, RoundState
from edgeflame.state import atomic_write, locked_state_dir
from tests.support.fleet_processes import WORKER
from tests.support.paths import REPOSITORY
from trainer.agent.plan import (
    Fetch,
    Finish,
    Leave,
    OfferInitial,
    OfferUpdate,
    PlanInput,
    Prepare,
    Report,
    TellFailure,
    Train,
    Wait,
    plan,
)
from trainer.agent.state import FinishRecord, SiteState, UpdateRecord, plan_input
from trainer.agent.step_runner import task_seed
from trainer.agent.tasks import (
    FROM_WORKER,
    FinishTask,
    InitialTask,
    TaskError,
    TaskResult,
    TrainTask,
    WorkerSetup,
    encode_line,
)
from trainer.agent.worker_client import WorkerExited, WorkerMessage, WorkerSupervisor

RUN = "0" * 32
BASE = BlobManifest(sha256="b" * 64, size_bytes=10, chunk_bytes=10, crc32s=bytes(4))
LEDGER = BlobManifest(sha256="c" * 64, size_bytes=10, chunk_bytes=10, crc32s=bytes(4))
TRAIN = RoundState(run=RUN, phase="train", round=2, num_rounds=3, asked=("a", "b"), base=BASE)
FINISH = RoundState(run=RUN, phase="finish", round=3, asked=("a",), base=BASE, ledger=LEDGER)


def knows(announced: RoundState | None, **more: object) -> PlanInput:
    facts = {"site": "a", "announced": announced, "took_part": True, "initial": "d" * 64, **more}
    return PlanInput(**facts)  # type: ignore[arg-type]


def test_the_plan_takes_the_first_step_that_is_missing() -> None:
    blobs = frozenset({BASE.sha256})
    assert isinstance(plan(knows(None)), Wait)
    assert plan(knows(TRAIN, initial=None)) == Prepare(run=RUN)
    assert plan(knows(TRAIN)) == Fetch(run=RUN, manifest=BASE, keep=frozenset())
    assert plan(knows(TRAIN, blobs=blobs)) == Train(run=RUN, round=2, base=BASE.sha256)
    assert plan(knows(TRAIN, blobs=blobs, has_update=True)) == OfferUpdate(run=RUN, round=2)
    assert isinstance(plan(knows(TRAIN, has_update=True, answered=frozenset({("update", 2)}))), Wait)
    assert isinstance(plan(knows(TRAIN, has_update=True, answered=frozenset({("update", 1)}))), OfferUpdate)
    assert isinstance(plan(knows(msgspec.structs.replace(TRAIN, asked=("b",)))), Wait)


def test_the_plan_of_beginning_and_end() -> None:
    initialise = RoundState(run=RUN, phase="initialise", asked=("a",))
    assert plan(knows(initialise)) == OfferInitial(run=RUN)
    assert isinstance(plan(knows(initialise, answered=frozenset({("initial", 0)}))), Wait)
    assert plan(knows(FINISH)) == Fetch(run=RUN, manifest=LEDGER, keep=frozenset())
    both = frozenset({BASE.sha256, LEDGER.sha256})
    assert plan(knows(FINISH, blobs=both)) == Finish(run=RUN, model=BASE.sha256, ledger=LEDGER.sha256)
    assert plan(knows(FINISH, is_finished=True)) == Report(run=RUN, model=BASE.sha256)
    assert plan(knows(FINISH, is_finished=True, answered=frozenset({("finish", 0)}))) == Leave(run=RUN)


def test_the_plan_after_the_end() -> None:
    done = RoundState(run=RUN, phase="done", base=BASE)
    assert plan(knows(done, is_finished=True)) == Leave(run=RUN)
    assert isinstance(plan(knows(done, blobs=frozenset({BASE.sha256}))), Finish)
    late = plan(knows(done, aggregator_online=False))
    assert isinstance(late, Leave)
    assert late.problem
    assert isinstance(plan(knows(done, took_part=False)), Wait), "the last run's end is no news to a new site"
    assert isinstance(plan(knows(done)), Wait), "is the aggregator still there?"
    failed = plan(knows(RoundState(run=RUN, phase="failed", detail="quorum missed")))
    assert failed == Leave(run=RUN, problem="the run failed: quorum missed", run_failed=True)


def test_the_plan_after_the_end_when_the_aggregator_stays() -> None:
    done = RoundState(run=RUN, phase="done", base=BASE, ledger=LEDGER)
    assert plan(knows(done, aggregator_online=True)) == Fetch(run=RUN, manifest=LEDGER, keep=frozenset())
    both = frozenset({BASE.sha256, LEDGER.sha256})
    finish = plan(knows(done, aggregator_online=True, blobs=both))
    assert finish == Finish(run=RUN, model=BASE.sha256, ledger=LEDGER.sha256)
    assert plan(knows(done, aggregator_online=True, is_finished=True)) == Report(run=RUN, model=BASE.sha256)
    told = knows(done, aggregator_online=True, is_finished=True, answered=frozenset({("finish", 0)}))
    assert plan(told) == Leave(run=RUN)


def test_a_phase_of_a_later_version_is_waited_through() -> None:
    assert isinstance(plan(knows(msgspec.structs.replace(TRAIN, phase="celebration"))), Wait)


def test_a_failure_is_told_until_it_is_heard() -> None:
    failure = ("update", "no images")
    assert plan(knows(TRAIN, failure=failure)) == TellFailure(run=RUN, round=2, purpose="update", detail="no images")
    heard = plan(knows(TRAIN, failure=failure, answered=frozenset({("update", 2)})))
    assert heard == Leave(run=RUN, problem="no images")


def draft(memory: SiteState, value: float) -> Path:
    path = memory.temporary_path("test")
    safetensors.numpy.save_file({"w": np.full(3, value, np.float32)}, path)
    return path


def test_memory_keeps_the_historical_model_and_forgets_older_ones(tmp_path: Path) -> None:
    memory = SiteState(tmp_path)
    for number in (1, 2, 4):
        memory.store_update(RUN, number, draft(memory, number), UpdateRecord(num_samples=number, metrics={}))
    again = SiteState(tmp_path)
    assert again.install == memory.install
    assert again.update(RUN, 1) is None
    kept = again.update(RUN, 4)
    assert kept is not None
    assert kept[1].num_samples == 4
    history = again.previous_update(RUN, 4)
    assert history is not None
    assert safetensors.numpy.load_file(history)["w"][0] == 2
    assert again.previous_update(RUN, 2) is None
    again.discard_update(RUN, 4)
    assert again.update(RUN, 4) is None


def test_memory_keeps_what_only_the_site_may_see(tmp_path: Path) -> None:
    memory = SiteState(tmp_path)
    for number in (1, 2, 4):
        memory.store_private_state(RUN, number, draft(memory, number))
    memory.store_private_state(RUN, 5, tmp_path / "nothing was left")

    def kept(before: int | None = None) -> float | None:
        path = SiteState(tmp_path).private_state(RUN, before=before)
        return None if path is None else float(safetensors.numpy.load_file(path)["w"][0])

    # A training that is repeated reads what was left before it, not what it left itself.
    assert (kept(before=4), kept(before=5), kept()) == (2, 4, 4)
    # The oldest is gone; after a refusal the one before counts again.
    assert kept(before=2) is None
    memory.discard_private_state(RUN, 4)
    assert kept() == 2


def test_memory_of_an_unfinished_training_is_none(tmp_path: Path) -> None:
    memory = SiteState(tmp_path)
    memory.store_update(RUN, 1, draft(memory, 1), UpdateRecord(num_samples=1, metrics={}))
    # A power cut before the record was written: the model alone does not count.
    next(tmp_path.glob("runs/*/*/outcome.json")).unlink()
    assert memory.update(RUN, 1) is None
    assert memory.previous_update(RUN, 2) is None


def test_damaged_memory_is_a_clear_error(tmp_path: Path) -> None:
    memory = SiteState(tmp_path)
    memory.store_finished(RUN, FinishRecord(model="a" * 64, package=None, package_sha256=None, summary={}))
    atomic_write(tmp_path / "runs" / RUN / "finish.json", b'{"model": 1}')
    with pytest.raises(StorageError, match=r"finish\.json: damaged"):
        memory.finished(RUN)


def test_a_state_directory_is_one_process_at_a_time(tmp_path: Path) -> None:
    in_use = pytest.raises(StorageError, match="in use by another process")
    with locked_state_dir(tmp_path), in_use, locked_state_dir(tmp_path):
        pass
    with locked_state_dir(tmp_path):
        pass
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(StorageError, match="state directory"), locked_state_dir(blocked / "below"):
        pass


def test_seeds_differ_by_site_and_round() -> None:
    seeds = {task_seed(seed, site, number) for seed in (0, 1) for site in "ab" for number in (1, 2)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 32 for seed in seeds)


class Workshop:
    """A supervisor of the tiny worker, and its events."""

    def __init__(self, tmp_path: Path, command: list[str] | None = None) -> None:
        self.events: queue.SimpleQueue[WorkerMessage | WorkerExited] = queue.SimpleQueue()
        self.worker = WorkerSupervisor(command or shlex.split(WORKER), self.events.put)
        (tmp_path / "data").mkdir(exist_ok=True)
        self.setup = WorkerSetup(learning=Learning(method="flame"), site="a", data=str(tmp_path / "data"))

    def outcome(self) -> TaskResult | EdgeFlameError:
        while True:
            answer = self.worker.on_event(self.events.get(timeout=30))
            if answer is not None:
                return answer


@pytest.fixture(autouse=True)
def _python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def test_the_worker_does_all_tasks_in_one_process(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    initial, out = tmp_path / "initial", tmp_path / "out"
    shop.worker.start_task(shop.setup, InitialTask(out=str(initial)))
    assert isinstance(shop.outcome(), TaskResult)
    pid = shop.worker.worker_pid
    shop.worker.start_task(shop.setup, TrainTask(round=1, base=str(initial), out=str(out), seed=1))
    trained = shop.outcome()
    assert isinstance(trained, TaskResult)
    assert trained.num_samples > 0
    assert shop.worker.progress.done == 5
    shop.worker.start_task(shop.setup, FinishTask(model=str(out), out_dir=str(tmp_path), ledger={"rounds": [1]}))
    finished = shop.outcome()
    assert isinstance(finished, TaskResult)
    assert finished.summary == {"rounds": 1.0, "kind": "tiny"}
    assert shop.worker.worker_pid == pid
    shop.worker.stop()


def test_a_workers_expected_error_keeps_its_kind(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    missing = msgspec.structs.replace(shop.setup, data=str(tmp_path / "nowhere"))
    shop.worker.start_task(missing, InitialTask(out=str(tmp_path / "initial")))
    error = shop.outcome()
    assert isinstance(error, DataError)
    assert "nowhere: no such folder" in str(error)
    shop.worker.stop()


def test_a_worker_that_cannot_start_or_always_dies_is_an_error(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, ["/nonexistent/python"])
    with pytest.raises(MissingDependencyError, match="cannot start the worker"):
        shop.worker.start_task(shop.setup, InitialTask(out=str(tmp_path / "x")))
    shop = Workshop(tmp_path, ["/bin/sh", "-c", "exit 7"])
    shop.worker.start_task(shop.setup, InitialTask(out=str(tmp_path / "x")))
    error = shop.outcome()
    assert isinstance(error, FederationError)
    assert "died 3 times" in str(error)
    assert "exit code 7" in str(error)


def test_an_update_of_another_base_model_is_not_offered(tmp_path: Path) -> None:
    memory = SiteState(tmp_path)
    for base, offered in ((BASE.sha256, True), ("f" * 64, False), (None, True)):
        memory.store_update(RUN, 2, draft(memory, 1.0), UpdateRecord(num_samples=1, metrics={}, base=base))
        # As an aggregator says that lost its newest facts and made the round before anew.
        assert plan_input(memory, "a", TRAIN).has_update is offered


def test_the_worker_computes_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    setup = WorkerSetup(learning=Learning(method="flame"), site="a", data=str(tmp_path))
    command = [sys.executable, "-m", "cli.train_worker", "text", "--device=abacus"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(encode_line(setup))
        worker.stdin.flush()
        answer = FROM_WORKER.decode(worker.stdout.readline())
    assert isinstance(answer, TaskError)
    assert answer.error == "UsageError"
    assert "device 'abacus' cannot be used here" in answer.message
