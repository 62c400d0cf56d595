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
from pathlib import Path
from typing import Any

from aggregator.announcer import Announcer
from aggregator.conduct import RunResult, judge, log_fact, open_run, settle, write_results
from aggregator.config import AggregateConfig
from aggregator.facts import RunState
from aggregator.hall import Hall
from aggregator.intake import Arrived, Intake
from aggregator.journal import Journal
from aggregator.models import Verdict
from aggregator.rounds import Announce, Merge, Output, Receive, Record, RoundMachine, Tell
from edgeflame.brokerurl import BrokerUrl
from edgeflame.console import EventLog, Progress
from edgeflame.errors import FederationError
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
from edgeflame.statedir import locked_state_dir, storage_errors
from edgeflame.topics import Chunk, Spoken, Topics
from edgeflame.transfer.store import BlobStore

log = EventLog("aggregator")

TICK_S = 0.5


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
        state = open_run(journal, config, new_run=new_run)
        service = _Service(
            topics=topics, state=state, journal=journal, state_dir=state_dir, out_dir=out_dir, report=report
        )
        service.serve(broker, connect_timeout_s)
        return service.result()


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
        return write_results(self._machine.state, self._store, self._out_dir)

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
        verdict: Verdict | None
        if arrived.intact:
            verdict = judge(self._machine.state, arrived.offer, self._store)
        else:
            verdict = Verdict(reason="corrupt", detail="the bytes do not have the announced SHA-256")
        if verdict is None:
            return
        if verdict.reason is not None:
            log.warning(
                "model_refused", site=site, round=arrived.offer.round, reason=verdict.reason, detail=verdict.detail
            )
        self._carry_out(self._machine.checked(site, arrived.offer, verdict, now), now)

    def _carry_out(self, outputs: Sequence[Output], now: float) -> None:
        facts = [output.fact for output in outputs if isinstance(output, Record)]
        if facts:
            self._journal.append(self._machine.state.run, facts)
        for output in outputs:
            match output:
                case Record():
                    log_fact(output.fact)
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
        outputs = settle(self._machine, output.round, self._store, self._state_dir, time.monotonic)
        self._carry_out(outputs, time.monotonic())
        # What the state names now is needed, and what is being sent; the parts are not.
        self._store.prune({*self._machine.state.results, *self._announcer.blobs})

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
