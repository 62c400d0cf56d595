"""The aggregation service: one thread that carries out what the round machine decides.

The link's thread only queues what arrives. This one takes it from the queue, decodes it, asks the machine, writes
the machine's facts to the journal, and then acts on them. Being killed between any two steps loses nothing: the
journal has the facts, the blobs are on disk, and sites repeat what was not answered.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aggregator.announcer import Announcer
from aggregator.config import AggregateConfig
from aggregator.facts import Fact, RunStarted, RunState, begin
from aggregator.hall import Hall
from aggregator.intake import Arrived, Intake
from aggregator.journal import Journal
from aggregator.ledger import contributions, ledger
from aggregator.models import Verdict, check_initial, check_update, merge
from aggregator.rounds import Announce, Merge, Output, Receive, Record, RoundMachine, Tell
from edgeflame.brokerurl import BrokerUrl
from edgeflame.console import EventLog, Progress
from edgeflame.errors import ConfigError, FederationError
from edgeflame.link import Down, Event, Failed, Link, Received, Up, Will
from edgeflame.messages import (
    BlobNeed,
    DownMessage,
    FinishReport,
    Heartbeat,
    Hello,
    Offer,
    Presence,
    TaskFailed,
    decode_presence,
    decode_up,
    encode,
)
from edgeflame.statedir import copy_durably, locked_state_dir, storage_errors, write_durably
from edgeflame.topics import Chunk, Spoken, Topics
from edgeflame.transfer.store import BlobStore

log = EventLog("aggregator")

TICK_S = 0.5
LEDGER = "ledger.json"
MODEL = "global-model.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        ledger: as plain data; also in ``ledger_path``.
        model_path: the final global model; None if the run failed before it had one.
    """

    succeeded: bool
    reason: str
    ledger: dict[str, Any]
    ledger_path: Path
    model_path: Path | None


def aggregate(
    *,
    broker: BrokerUrl,
    fleet: str,
    state_dir: Path,
    out_dir: Path,
    config: AggregateConfig,
    report: Progress,
    new_run: bool = False,
    connect_timeout_s: float | None = None,
) -> RunResult:
    """Serve a run to its end: a new one, or the one the state directory holds.

    Args:
        broker: where.
        fleet: whose sites.
        state_dir: journal and blobs; one process at a time.
        out_dir: gets the ledger and the final model.
        config: must be the same when an interrupted run continues.
        report: counts rounds.
        new_run: start another run where the last one has ended.
        connect_timeout_s: give up if the broker was not reached within this time; None: never.

    Raises:
        ConfigError: the interrupted run has another configuration.
        LinkError: the broker refuses us, or was not reached in time.
        StorageError: disk or state directory.
        UsageError: ``fleet`` cannot be a name.
    """
    topics = Topics(fleet=fleet)
    with ExitStack() as stack:
        stack.enter_context(locked_state_dir(state_dir))
        with storage_errors(out_dir, "create the output folder"):
            out_dir.mkdir(parents=True, exist_ok=True)
        journal = stack.enter_context(Journal(state_dir / "journal.sqlite"))
        state = _open_run(journal, config, new_run=new_run)
        service = _Service(
            topics=topics, state=state, journal=journal, state_dir=state_dir, out_dir=out_dir, report=report
        )
        service.serve(broker, connect_timeout_s)
        return service.result()


def _open_run(journal: Journal, config: AggregateConfig, *, new_run: bool) -> RunState:
    state = journal.last_run()
    if state is not None and not (new_run and state.ended):
        if state.ended is None and state.config != config:
            changed = [
                name
                for name in AggregateConfig.__struct_fields__
                if getattr(state.config, name) != getattr(config, name)
            ]
            msg = (
                f"the state directory holds an unfinished run with another configuration ({', '.join(changed)}); "
                "continue it with the same one, or use another --state"
            )
            raise ConfigError(msg)
        log.info("run_over" if state.ended else "run_continued", run=state.run, rounds_done=len(state.rounds))
        return state
    fact = RunStarted(run=uuid.uuid4().hex, config=config, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    journal.append(fact.run, [fact])
    log.info("run_started", run=fact.run, rounds=config.rounds, method=config.learning.method)
    return begin(fact)


class _Service:
    def __init__(
        self,
        *,
        topics: Topics,
        state: RunState,
        journal: Journal,
        state_dir: Path,
        out_dir: Path,
        report: Progress,
    ) -> None:
        now = time.monotonic()
        store = BlobStore(state_dir)
        self._state_dir = state_dir
        self._topics = topics
        self._journal = journal
        self._store = store
        self._out_dir = out_dir
        self._report = report
        self._boot = uuid.uuid4().hex
        self._machine = RoundMachine(state, now=now)
        self._hall = Hall(state, aggregator_boot=self._boot, now=now)
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._intake = Intake(store, self._tell)
        self._announcer = Announcer(store, drafts=state_dir)
        self._link: Link | None = None
        self._is_up = False

    def serve(self, broker: BrokerUrl, connect_timeout_s: float | None) -> None:
        """Until the run is over."""
        will = Will(topic=self._topics.aggregator_presence, payload=encode(self._presence(online=False)))
        link = Link(
            broker,
            client_id=f"edgeflame-aggregator-{self._topics.fleet}-{self._boot[:8]}",
            filters=[self._topics.all_up(), self._topics.all_site_presences(), self._topics.aggregator_presence],
            sink=self._inbox.put,
            will=will,
            connect_timeout_s=connect_timeout_s,
        )
        with link:
            self._link = link
            try:
                self._loop()
            finally:
                link.publish(self._topics.aggregator_presence, will.payload, retain=True)
                self._intake.close()
                self._announcer.close()

    def result(self) -> RunResult:
        """How it went; writes the ledger and the model."""
        state = self._machine.state
        entries = ledger(state)
        ledger_path = self._out_dir / LEDGER
        write_durably(ledger_path, msgspec.json.format(msgspec.json.encode(entries), indent=2) + b"\n")
        model_path: Path | None = None
        if state.model is not None and state.rounds and state.rounds[-1].model is not None:
            model_path = self._out_dir / MODEL
            copy_durably(self._store.path(state.model), model_path)
        assert state.ended is not None
        return RunResult(
            succeeded=state.ended.succeeded,
            reason=state.ended.reason,
            ledger=entries,
            ledger_path=ledger_path,
            model_path=model_path,
        )

    def _loop(self) -> None:
        now = time.monotonic()
        self._carry_out(self._machine.resume(now), now)
        next_tick = now
        ended_announced = False
        while self._machine.state.ended is None or not ended_announced:
            try:
                event = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                event = None
            now = time.monotonic()
            if event is not None:
                self._on_event(event, now)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._carry_out(self._machine.tick(now), now)
            self._pump()
            # The end must be told, also by an aggregator that was restarted after it.
            ended_announced = self._machine.state.ended is not None and self._is_up

    def _on_event(self, event: Event, now: float) -> None:
        match event:
            case Up():
                self._is_up = True
                self._announcer.use_chunks_of(event.chunk_bytes)
                self._publish(self._topics.aggregator_presence, encode(self._presence(online=True)), retain=True)
                self._announce()
            case Down():
                self._is_up = False
            case Failed():
                raise event.error
            case Received():
                try:
                    self._on_message(event, now)
                except FederationError as exc:
                    log.warning("message_refused", topic=event.topic, reason=str(exc))
                event.done()

    def _on_message(self, event: Received, now: float) -> None:
        match self._topics.parse(event.topic):
            case Chunk(site=str(site), sha256=sha256, index=index):
                is_new, arrived = self._intake.chunk(site, sha256, index, event.payload, now=now)
                if is_new:
                    self._machine.progressed(site, now)
                if arrived is not None:
                    self._on_arrival(site, arrived, now)
            case Spoken(kind="site_presence", site=str(site)):
                presence = decode_presence(event.payload)
                if not presence.online and self._hall.left(site, presence, now):
                    log.info("site_offline", site=site)
            case Spoken(kind="aggregator_presence") if event.payload:
                self._on_own_presence(decode_presence(event.payload))
            case Spoken(kind="up", site=str(site)):
                self._on_up(site, decode_up(event.payload), now)
            case _:
                log.warning("message_on_unknown_topic", topic=event.topic[:200])

    def _on_own_presence(self, presence: Presence) -> None:
        if presence.boot == self._boot:
            return
        if presence.online:
            log.warning("another_aggregator", fleet=self._topics.fleet, boot=presence.boot[:12], run=presence.run)
        else:
            # The last will of the process before us came late, and stands where our birth was.
            self._publish(self._topics.aggregator_presence, encode(self._presence(online=True)), retain=True)

    def _on_up(self, site: str, message: Any, now: float) -> None:
        machine = self._machine
        match message:
            case Hello():
                answer = self._hall.hello(site, message, now)
                self._tell(site, answer)
            case Heartbeat():
                if not self._hall.heartbeat(site, message, now):
                    return
                if self._hall.is_step(site, message):
                    machine.progressed(site, now, is_ready=message.ready)
                install = self._hall.install_of(site)
                if message.ready and message.run == machine.state.run and message.initial and install:
                    self._carry_out(machine.ready(site, install=install, initial=message.initial, now=now), now)
            case Offer():
                self._carry_out(machine.offered(site, message, now), now)
            case TaskFailed():
                log.warning("site_failed", site=site, task=message.purpose, reason=message.detail)
                self._carry_out(machine.task_failed(site, message, now), now)
            case FinishReport():
                self._carry_out(machine.finish_reported(site, message, now), now)
            case BlobNeed():
                if self._announcer.needed(site, message, now=now) and self._hall.is_new_need(site, message):
                    machine.progressed(site, now)

    def _on_arrival(self, site: str, arrived: Arrived, now: float) -> None:
        offer, state = arrived.offer, self._machine.state
        path = self._store.path(offer.manifest.sha256)
        if not arrived.intact:
            verdict = Verdict(reason="corrupt", detail="the bytes do not have the announced SHA-256")
        elif offer.purpose == "initial":
            verdict = check_initial(path)
        else:
            base = next((entry.base for entry in state.rounds if entry.number == offer.round), None)
            if base is None or base not in self._store:
                return
            verdict = check_update(path, self._store.path(base), max_relative_change=state.config.max_relative_change)
        if verdict.reason is not None:
            log.warning("model_refused", site=site, round=offer.round, reason=verdict.reason, detail=verdict.detail)
        self._carry_out(self._machine.checked(site, offer, verdict, now), now)

    def _carry_out(self, outputs: Sequence[Output], now: float) -> None:
        facts = [output.fact for output in outputs if isinstance(output, Record)]
        if facts:
            self._journal.append(self._machine.state.run, facts)
        for output in outputs:
            match output:
                case Record():
                    _log_fact(output.fact)
                case Announce():
                    self._announce()
                case Tell():
                    self._tell(output.site, output.message)
                case Receive():
                    arrived = self._intake.offer(output.site, output.offer, now=now)
                    if arrived is not None:
                        self._on_arrival(output.site, arrived, now)
                case Merge():
                    self._merge(output)

    def _merge(self, output: Merge) -> None:
        entry, state = output.round, self._machine.state
        draft = self._state_dir / ".model.draft"
        merge(
            state.config,
            self._store.path(entry.base),
            contributions(entry, self._store.path),
            draft,
            num_members=len(state.members),
        )
        manifest = self._store.add(draft)
        # Whatever came in meanwhile waits in the queue, so the deadlines must not run from before.
        now = time.monotonic()
        self._carry_out(
            self._machine.merged(entry.number, sha256=manifest.sha256, size_bytes=manifest.size_bytes, now=now), now
        )
        self._store.prune({manifest.sha256, *self._announcer.blobs})

    def _announce(self) -> None:
        state = self._machine.state
        made = sum(1 for entry in state.rounds if entry.model)
        self._report(made, state.config.rounds, state.phase)
        if self._is_up:
            message = self._announcer.describe(state, tuple(self._machine.available_sites()))
            self._publish(self._topics.round, encode(message), retain=True)

    def _presence(self, *, online: bool) -> Presence:
        return Presence(boot=self._boot, online=online, run=self._machine.state.run)

    def _pump(self) -> None:
        if self._is_up:
            self._announcer.pump(lambda sha256, index, data: self._publish(self._topics.chunk(sha256, index), data))

    def _tell(self, site: str, message: DownMessage) -> None:
        self._publish(self._topics.down(site), encode(message))

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        # While the link is down nothing is queued: all of it is said again when it is up, or asked for again.
        if self._is_up and self._link is not None:
            self._link.publish(topic, payload, retain=retain)


def _log_fact(fact: Fact) -> None:
    fields: dict[str, object] = {}
    for name, value in msgspec.structs.asdict(fact).items():
        match value:
            case None | "" | () | {}:
                continue
            case tuple():
                fields[name] = ",".join(map(str, value))
            case dict():
                fields.update({f"{name}_{key}": figure for key, figure in value.items()})
            case str() if len(value) >= 32 and " " not in value:
                # A hash or an id; the ledger has it whole.
                fields[name] = value[:12]
            case _:
                fields[name] = value
    log.info(str(fact.__struct_config__.tag), **fields)
