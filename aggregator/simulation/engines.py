"""Where simulated sites do their work: in this process, in a pool of worker processes, or on a Ray cluster.

An engine is given a function from the bytes of a task to the bytes of its answer. What happens in a task depends on
the task alone and on files it names, so a result does not depend on the engine.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import msgspec

from aggregator.simulation.config import EngineConfig
from edgeflame import errors
from edgeflame.background import die_with_parent
from edgeflame.errors import EdgeFlameError, FederationError, LinkError, MissingDependencyError
from edgeflame.simulation import ANSWER_DECODER, MeasureAnswer, SimulationFailure, SimulationTask, SiteAnswer

TaskHandler = Callable[[bytes], bytes]
"""Carries out a task. It can be imported by name in another process."""


class SimulationEngine(Protocol):
    """Carries out tasks."""

    def run(self, tasks: Sequence[SimulationTask]) -> Iterator[SiteAnswer | MeasureAnswer]:
        """Yield answers in the order in which they come.

        Raises:
            EdgeFlameError: a task failed with it.
        """
        ...


@contextlib.contextmanager
def open_simulation_engine(config: EngineConfig, handle: TaskHandler) -> Iterator[SimulationEngine]:
    """The engine that is configured; what it started ends with the context.

    Raises:
        LinkError: the Ray cluster cannot be reached.
        MissingDependencyError: Ray is not installed.
    """
    if config.kind == "ray":
        with _ray_session(config) as ray:
            yield _RayEngine(ray, config, handle)
    elif config.workers:
        # Forking would copy the locks of numerical libraries' threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_init_worker) as pool:
            try:
                yield _ProcessPoolEngine(pool, handle)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    else:
        yield _InProcessEngine(handle)


class _InProcessEngine:
    def __init__(self, handle: TaskHandler) -> None:
        self._handle = handle

    def run(self, tasks: Sequence[SimulationTask]) -> Iterator[SiteAnswer | MeasureAnswer]:
        for task in tasks:
            yield _decode_answer(self._handle(msgspec.json.encode(task)))


class _ProcessPoolEngine:
    def __init__(self, pool: ProcessPoolExecutor, handle: TaskHandler) -> None:
        self._pool = pool
        self._handle = handle

    def run(self, tasks: Sequence[SimulationTask]) -> Iterator[SiteAnswer | MeasureAnswer]:
        futures = [self._pool.submit(self._handle, msgspec.json.encode(task)) for task in tasks]
        try:
            for future in as_completed(futures):
                yield _decode_answer(future.result())
        except BrokenProcessPool as exc:
            raise FederationError(
                "a worker process of the simulation died (out of memory?); run the command again to go on"
            ) from exc


class _RayEngine:
    def __init__(self, ray: Any, config: EngineConfig, handle: TaskHandler) -> None:
        self._ray = ray
        self._at_a_time = config.workers
        # Ray gives a task as many threads of the numerical libraries as it gives it CPUs.
        self._remote = ray.remote(handle).options(num_cpus=config.threads)

    def run(self, tasks: Sequence[SimulationTask]) -> Iterator[SiteAnswer | MeasureAnswer]:
        ray = self._ray
        waiting = list(reversed(tasks))
        running: list[Any] = []
        try:
            while waiting or running:
                while waiting and len(running) < (self._at_a_time or len(tasks)):
                    running.append(self._remote.remote(msgspec.json.encode(waiting.pop())))
                done, running = ray.wait(running, num_returns=1)
                yield _decode_answer(ray.get(done[0]))
        except ray.exceptions.RayTaskError:
            # Not the cluster's fault; an expected error comes as a SimulationFailure.
            raise
        except ray.exceptions.RayError as exc:
            raise FederationError(
                f"a task on the Ray cluster was lost ({str(exc).splitlines()[0]}); run the command again to go on"
            ) from exc


@contextlib.contextmanager
def _ray_session(config: EngineConfig) -> Iterator[Any]:
    # Send no usage statistics to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError(
            "the engine ray needs Ray: pip install 'edgeflame[sim]'; or set engine.kind to local"
        ) from exc
    try:
        ray.init(
            address=config.address or "local",
            include_dashboard=False if config.address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as exc:
        where = config.address or "this machine"
        raise LinkError(f"no Ray cluster at {where} ({str(exc).splitlines()[0]}); see engine.address") from exc
    try:
        yield ray
    finally:
        ray.shutdown()


def _init_worker() -> None:
    # The parent decides what Ctrl-C means, and a worker must not outlive it, however it ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


def _decode_answer(data: bytes) -> SiteAnswer | MeasureAnswer:
    answer = ANSWER_DECODER.decode(data)
    if isinstance(answer, SimulationFailure):
        kind = getattr(errors, answer.error, FederationError)
        raise kind(answer.message) if issubclass(kind, EdgeFlameError) else FederationError(answer.message)
    return answer
