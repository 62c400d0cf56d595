"""A run's life on disk: open or continue it, carry out what its state machine decides, write the results.

Used by the service over MQTT and by the simulation alike. Every step may be repeated after a crash: events are on disk
before anything is done about them, blobs are named by their SHA-256, and results are written whole or not at all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aggregator.config import AggregateConfig
from aggregator.events import Event, Round, RunStarted, RunState, initial_state
from aggregator.journal import Journal
from aggregator.ledger import build_ledger
from aggregator.outputs import AggregateRound, RecordEvent, RoundOutput
from aggregator.pooling import pool_statistics
from aggregator.publisher import StatePublisher
from aggregator.rounds import RoundMachine
from aggregator.strategies.interface import Contribution, RoundInputs
from edgeflame.errors import ConfigError
from edgeflame.log import EventLog
from edgeflame.methods import METHODS, Calibration, Memory, resized_as_begun
from edgeflame.mqtt.messages import RoundState
from edgeflame.state import atomic_copy, write_json
from edgeflame.transfer.store import BlobStore

log = EventLog("aggregator")

LEDGER_FILE = "ledger.json"
MODEL_FILE = "global-model.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        ledger: the ledger as plain data; also in ``ledger_path``.
        model_path: the final global model; None if the run failed before it had one.
    """

    succeeded: bool
    reason: str
    ledger: dict[str, Any]
    ledger_path: Path
    model_path: Path | None


def open_run(journal: Journal, config: AggregateConfig, *, new_run: bool = False) -> RunState:
    """The run the journal holds, or a new one in it; ``new_run`` asks for another where the last has ended.

    Raises:
        ConfigError: the unfinished run has another configuration.
        MissingDependencyError: its strategy needs a package that is not installed here.
        StorageError: the journal fails.
    """
    if config.rule.check is not None:
        config.rule.check()
    state = journal.last_run()
    if state is not None and not (new_run and state.ended):
        learning = resized_as_begun(config.learning, state.config.learning)
        begun = _without_calibration(state.config)
        now = _without_calibration(msgspec.structs.replace(config, learning=learning))
        if state.ended is None and begun != now:
            changed = [name for name in AggregateConfig.__struct_fields__ if getattr(begun, name) != getattr(now, name)]
            raise ConfigError(
                f"the state directory holds an unfinished run with another configuration ({', '.join(changed)}); "
                "continue it with the same one, or use another --state"
            )
        log.info("run_over" if state.ended else "run_continued", run=state.run, rounds_done=len(state.rounds))
        return state
    event = RunStarted(run=uuid.uuid4().hex, config=config, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    journal.append(event.run, [event])
    log.info("run_started", run=event.run, rounds=config.rounds, method=config.learning.method)
    return initial_state(event)


def _without_calibration(config: AggregateConfig) -> AggregateConfig:
    """What decides the models of a run: thresholds are set by each site after the last round, as the run began.

    Their defaults may so change from one version to the next without ending a run in progress; and so may those of a
    memory where the sites exchange none.
    """
    learning = msgspec.structs.replace(config.learning, calibration=Calibration())
    if METHODS[learning.method].exchange != "memory":
        learning = msgspec.structs.replace(learning, memory=Memory())
    return msgspec.structs.replace(config, learning=learning)


class Run:
    """A run in progress: its state machine, its journal and its blobs.

    Args:
        state: the run as the journal has it.
        journal: gets the events.
        store: holds the blobs, and gets the models.
        clock: the state machine's clock: monotonic, seconds.
        handle: carries out what depends on how sites are reached: all outputs but :class:`RecordEvent` and
            :class:`AggregateRound`.
    """

    def __init__(
        self,
        state: RunState,
        *,
        journal: Journal,
        store: BlobStore,
        clock: Callable[[], float],
        handle: Callable[[RoundOutput], None],
    ) -> None:
        self.machine = RoundMachine(state, now=clock())
        self.store = store
        self.publisher = StatePublisher(store)
        self._journal = journal
        self._clock = clock
        self._handle = handle

    @property
    def state(self) -> RunState:
        return self.machine.state

    def round_state(self) -> RoundState:
        """The message to publish; the blobs it names are served from now on, and no others."""
        return self.publisher.round_state(self.state, tuple(self.machine.available_sites()))

    def execute(self, outputs: Sequence[RoundOutput]) -> None:
        """Carry out what the machine decided in one call: all its events are journalled before anything is done."""
        events = [output.event for output in outputs if isinstance(output, RecordEvent)]
        if events:
            self._journal.append(self.state.run, events)
        for output in outputs:
            match output:
                case RecordEvent():
                    log_event(output.event)
                case AggregateRound():
                    self.execute(self._close_round(output.round))
                    # Blobs that the state names or that are being sent are kept; the updates are no longer needed.
                    self.store.prune({*self.state.servable_blobs, *self.publisher.served_blobs})
                case _:
                    self._handle(output)

    def _close_round(self, entry: Round) -> list[RoundOutput]:
        """Make a closed round's model, or pool the statistics, and report it to the machine."""
        # The clock is read when the work is done, so that deadlines do not run from before it.
        if entry.purpose == "update":
            model = aggregate_round(self.state, entry, self.store)
            return self.machine.model_aggregated(
                entry.number,
                sha256=model.sha256,
                size_bytes=model.size_bytes,
                relative_change=model.relative_change,
                now=self._clock(),
            )
        draft = self.store.draft_path("statistics")
        parts = {site: self.store.path(part.sha256) for site, part in entry.accepted.items()}
        config = self.state.config
        truncation = pool_statistics(parts, draft, rank=config.statistics_rank, as_prior=config.statistics == "prior")
        pooled = self.store.add(draft)
        return self.machine.statistics_pooled(
            sha256=pooled.sha256, size_bytes=pooled.size_bytes, truncation=truncation.figures(), now=self._clock()
        )


@dataclass(frozen=True, kw_only=True)
class GlobalModel:
    """A round's model, in the store; ``relative_change`` as in :class:`aggregator.events.ModelAggregated`."""

    sha256: str
    size_bytes: int
    relative_change: float | None


def aggregate_round(state: RunState, entry: Round, store: BlobStore) -> GlobalModel:
    """Make a round's model of its accepted updates, into the store."""
    base, draft = store.path(entry.base_sha256), store.draft_path("model")
    contributions = round_contributions(entry, state.config, store.path)
    aggregate_updates(state.config, base, contributions, draft, num_members=len(state.members))
    change = state.config.exchange.relative_change(base, draft)
    manifest = store.add(draft)
    return GlobalModel(sha256=manifest.sha256, size_bytes=manifest.size_bytes, relative_change=change)


def round_contributions(entry: Round, config: AggregateConfig, path_of: Callable[[str], Path]) -> list[Contribution]:
    """The accepted updates of a round as a strategy gets them; ``path_of`` gives a blob's path by its SHA-256."""
    accepted = entry.accepted
    return [
        Contribution(
            site=site,
            path=path_of(accepted[site].decoded or accepted[site].sha256),
            weight=weight,
            num_samples=accepted[site].num_samples,
            num_steps=accepted[site].num_steps,
            relative_change=accepted[site].relative_change,
        )
        for site, weight in entry.weights(equal=config.rule.equal_votes).items()
    ]


def aggregate_updates(
    config: AggregateConfig, base: Path, contributions: Iterable[Contribution], out: Path, *, num_members: int
) -> None:
    """Write the next global model by the configuration's rule, in canonical form.

    The result depends on the set of contributions alone: sites are taken in sorted order, whatever the order here.

    Args:
        config: of the run.
        base: the round's base model.
        contributions: the accepted updates.
        out: where to write.
        num_members: sites of the run.

    Raises:
        DataError, StorageError: a blob on disk is not what was checked, or the disk fails.
    """
    ordered = tuple(sorted(contributions, key=lambda contribution: contribution.site))
    inputs = RoundInputs(config=config, contributions=ordered, num_members=num_members)
    config.rule.build(inputs).aggregate(base, ordered, out)


def write_results(state: RunState, store: BlobStore, out_dir: Path) -> RunResult:
    """Write the ledger and the final model of a run that is over."""
    entries = build_ledger(state)
    ledger_path = out_dir / LEDGER_FILE
    write_json(ledger_path, entries, indent=2)
    model_path: Path | None = None
    if state.model is not None and state.rounds and state.rounds[-1].result_sha256 is not None:
        model_path = out_dir / MODEL_FILE
        atomic_copy(store.path(state.model), model_path)
    assert state.ended is not None
    return RunResult(
        succeeded=state.ended.succeeded,
        reason=state.ended.reason,
        ledger=entries,
        ledger_path=ledger_path,
        model_path=model_path,
    )


def log_event(event: Event) -> None:
    """Log a decision, hashes shortened: the ledger has them whole."""
    fields: dict[str, object] = {}
    for name, value in msgspec.structs.asdict(event).items():
        match value:
            case None | "" | () | {}:
                continue
            case tuple():
                fields[name] = ",".join(map(str, value))
            case dict():
                fields.update({f"{name}_{key}": figure for key, figure in value.items()})
            case str() if len(value) >= 32 and " " not in value:
                fields[name] = value[:12]
            case _:
                fields[name] = value
    log.info(str(event.__struct_config__.tag), **fields)
