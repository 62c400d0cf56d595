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
from datetime import datetime
from pathlib import Path
from typing import Any

from aggregator.config import AggregateConfig
from aggregator.control import FinishEarly, OperatorRequest, PauseSite, RemoveSite, RequestQueue, ResumeSite, StopRun
from aggregator.events import RunState
from aggregator.exchanges import ValidationResult
from aggregator.journal import Journal
from aggregator.membership import Membership
from aggregator.metrics import StatusReporter, run_summary
from aggregator.publisher import StatePublisher
from aggregator.rounds import (
    AggregateRound,
    DismissSite,
    PublishState,
    ReceiveUpload,
    RecordEvent,
    RoundMachine,
    RoundOutput,
    SendToSite,
)
from aggregator.run import RunResult, close_round, log_event, open_run, write_results
from aggregator.uploads import ReceivedUpload, UploadReceiver
from aggregator.validation import validate_upload
from edgeflame.errors import FederationError, UsageError
from edgeflame.log import EventLog, Progress
from edgeflame.metrics import MetricsServer
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, Disconnected, LastWill, ReceivedMessage
from edgeflame.mqtt.messages import (
    BlobNeed,
    DownMessage,
    FinishReport,
    Heartbeat,
    Hello,
    Leaving,
    Offer,
    Presence,
    TaskFailed,
    TurnedAway,
    decode_presence,
    decode_round,
    decode_up,
    encode_message,
)
from edgeflame.mqtt.topics import ChunkTopic, MessageTopic, Topics
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.state import locked_state_dir, storage_errors
from edgeflame.transfer.store import BlobStore

log = EventLog("aggregator")

TICK_S = 0.5


def run_aggregator(
    *,
    broker: BrokerUrl,
    fleet: str,
    state_dir: Path,
    out_dir: Path,
    config: AggregateConfig,
    report: Progress,
    new_run: bool = False,
    connect_timeout_s: float | None = None,
    stay: bool = False,
    metrics: str | None = None,
    certificate_expires: datetime | None = None,
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
        stay: answer and serve late sites after the end, until interrupted or told to stop.
        metrics: ``HOST:PORT`` where Prometheus may ask.
        certificate_expires: end of the validity of what we show the broker, if that is known.

    Raises:
        ConfigError: the interrupted run has another configuration.
        LinkError: the broker refuses us, or was not reached in time.
        StorageError: disk or state directory.
        UsageError: ``fleet`` cannot be a name.
    """
    topics = Topics(fleet=fleet)
    with ExitStack() as stack:
        stack.enter_context(locked_state_dir(state_dir, kind="aggregator"))
        with storage_errors(out_dir, "create the output folder"):
            out_dir.mkdir(parents=True, exist_ok=True)
        journal = stack.enter_context(Journal(state_dir / "journal.sqlite"))
        state = open_run(journal, config, new_run=new_run)
        server = None if metrics is None else stack.enter_context(MetricsServer(metrics))
        service = _AggregatorService(
            topics=topics,
            state=state,
            journal=journal,
            state_dir=state_dir,
            out_dir=out_dir,
            report=report,
            metrics=server,
            certificate_expires=certificate_expires,
            stay=stay,
        )
        service.serve(broker, connect_timeout_s)
        return service.result()


class _AggregatorService:
    def __init__(
        self,
        *,
        topics: Topics,
        state: RunState,
        journal: Journal,
        state_dir: Path,
        out_dir: Path,
        report: Progress,
        stay: bool,
        metrics: MetricsServer | None,
        certificate_expires: datetime | None,
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
        self._hall = Membership(state, aggregator_boot=self._boot, now=now)
        self._inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        self._intake = UploadReceiver(store, self._tell)
        self._announcer = StatePublisher(store, drafts=state_dir)
        self._watch = StatusReporter(state_dir, self._say_tag, metrics, certificate_expires=certificate_expires)
        self._link: MqttClient | None = None
        self._is_up = False
        self._stay = stay
        self._requests = RequestQueue(state_dir)
        self._dismissed = False
        self._is_end_told = False
        self._written: RunState | None = None

    def serve(self, broker: BrokerUrl, connect_timeout_s: float | None) -> None:
        """Until the run is over."""
        will = LastWill(topic=self._topics.aggregator_presence, payload=encode_message(self._presence(online=False)))
        link = MqttClient(
            broker,
            client_id=f"edgeflame-aggregator-{self._topics.fleet}-{self._boot[:8]}",
            filters=[
                self._topics.all_up(),
                self._topics.all_site_presences(),
                self._topics.aggregator_presence,
                self._topics.round,
            ],
            sink=self._inbox.put,
            will=will,
            connect_timeout_s=connect_timeout_s,
        )
        with link:
            self._link = link
            try:
                self._loop()
            except KeyboardInterrupt:
                # An aggregator that stays is sent away in this way; before the end it is an interruption.
                if not self._stay or self._machine.state.ended is None:
                    raise
            finally:
                link.publish(self._topics.aggregator_presence, will.payload, retain=True)
                self._intake.close()
                self._announcer.close()

    def result(self) -> RunResult:
        """How it went; writes the ledger and the model."""
        return write_results(self._machine.state, self._store, self._out_dir)

    def _loop(self) -> None:
        now = time.monotonic()
        self._carry_out(self._machine.restart(now), now)
        next_tick = now
        is_over = False
        while not is_over or (self._stay and not self._dismissed):
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
                self._requests.process_pending(self._on_request)
                self._look(now)
            self._pump()
            # The end must be told, also by an aggregator that was restarted after it: the broker has it when it
            # gives it back to us. A connection that seems to be up may be none.
            is_over = self._machine.state.ended is not None and self._is_end_told
            if is_over and self._stay:
                self._write_results()
        self._look(time.monotonic())

    def _write_results(self) -> None:
        """While the aggregator stays: once, and again when a late site has reported."""
        state = self._machine.state
        if state is not self._written:
            self._written = state
            result = write_results(state, self._store, self._out_dir)
            log.info("run_over_staying", outcome=state.phase, ledger=result.ledger_path)

    def _look(self, now: float) -> None:
        state, num_online = self._machine.state, self._hall.num_live(now)
        made = sum(1 for entry in state.rounds if entry.model)
        self._report(made, state.config.rounds, run_summary(state, num_online=num_online))
        self._watch.report(
            state,
            num_online=num_online,
            progress_at=self._machine.last_progress_at,
            link=self._link,
            is_up=self._is_up,
            now=now,
        )

    def _on_event(self, event: ClientEvent, now: float) -> None:
        match event:
            case Connected():
                self._is_up = True
                self._watch.reconnected()
                self._announcer.set_chunk_size(event.chunk_bytes)
                self._publish(
                    self._topics.aggregator_presence, encode_message(self._presence(online=True)), retain=True
                )
                self._announce()
            case Disconnected():
                self._is_up = False
            case ConnectionFailed():
                raise event.error
            case ReceivedMessage():
                try:
                    self._on_message(event, now)
                except FederationError as exc:
                    log.warning("message_refused", topic=event.topic, reason=str(exc))
                event.done()

    def _on_message(self, event: ReceivedMessage, now: float) -> None:
        match self._topics.parse(event.topic):
            case ChunkTopic(site=str(site), sha256=sha256, index=index):
                is_new, arrived = self._intake.receive_chunk(site, sha256, index, event.payload, now=now)
                if is_new:
                    self._machine.progress_made(site, now)
                if arrived is not None:
                    self._on_arrival(site, arrived, now)
            case MessageTopic(kind="site_presence", site=str(site)):
                presence = decode_presence(event.payload)
                if not presence.online and self._hall.left(site, presence, now):
                    log.info("site_offline", site=site)
            case MessageTopic(kind="aggregator_presence") if event.payload:
                self._on_own_presence(decode_presence(event.payload))
            case MessageTopic(kind="round") if event.payload:
                said, state = decode_round(event.payload), self._machine.state
                self._is_end_told = said.run == state.run and state.ended is not None and said.phase == state.phase
            case MessageTopic(kind="up", site=str(site)):
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
            self._publish(self._topics.aggregator_presence, encode_message(self._presence(online=True)), retain=True)

    def _on_up(self, site: str, message: Any, now: float) -> None:
        machine = self._machine
        match message:
            case Hello():
                self._tell(site, self._hall.hello(site, message, machine.state, now))
            case Leaving():
                self._on_leaving(site, message, now)
            case _ if not self._hall.knows(site):
                # It says hello first; if it did before our start, it sees our boot and does so again.
                log.debug("message_before_hello", site=site, message=message.__struct_config__.tag)
            case Heartbeat():
                if not self._hall.heartbeat(site, message, now):
                    return
                machine.heartbeat_received(site, now)
                if self._hall.is_step(site, message):
                    machine.progress_made(site, now, is_ready=message.ready)
                install = self._hall.install_of(site)
                if message.ready and message.run == machine.state.run and message.initial and install:
                    self._carry_out(machine.site_ready(site, install=install, initial=message.initial, now=now), now)
                if message.paused is None:
                    self._carry_out(machine.resume_site(site, by="site", now=now), now)
                else:
                    self._carry_out(machine.pause_site(site, by="site", reason=message.paused, now=now), now)
            case Offer():
                self._carry_out(machine.offer_received(site, message, now), now)
            case TaskFailed():
                log.warning("site_failed", site=site, task=message.purpose, reason=message.detail)
                self._carry_out(machine.task_failed(site, message, now), now)
            case FinishReport():
                self._carry_out(machine.finish_report_received(site, message, now), now)
            case BlobNeed():
                if self._announcer.chunks_requested(site, message, now=now) and self._hall.is_new_need(site, message):
                    machine.progress_made(site, now)

    def _on_leaving(self, site: str, message: Leaving, now: float) -> None:
        machine = self._machine
        if message.run == machine.state.run and self._hall.is_admitted(site, message.boot):
            self._carry_out(machine.site_leaves(site, by="site", detail=message.detail or "it said so", now=now), now)
        if site not in machine.state.active_members:
            # Also where it never joined, or had left before: there is nothing to leave any more.
            self._tell(site, TurnedAway(boot=message.boot, reason="left", detail=f"{site} has left the run"))

    def _on_request(self, request: OperatorRequest) -> str:
        machine, now = self._machine, time.monotonic()
        state = machine.state
        if isinstance(request, PauseSite | ResumeSite | RemoveSite) and request.site not in state.active_members:
            here = ", ".join(sorted(state.active_members)) or "nobody"
            raise UsageError(f"{request.site} is not a site of this run; its sites are: {here}")
        match request:
            case _ if state.ended is not None:
                self._dismissed = isinstance(request, StopRun)
                return f"the run is over ({state.phase}){'; the aggregator leaves' if self._dismissed else ''}"
            case StopRun():
                self._carry_out(machine.stop_run(request.reason), now)
                self._dismissed = True
                return "the run is stopped"
            case FinishEarly():
                if state.phase in ("waiting", "initialise"):
                    raise UsageError("no round has begun, so there is no model to finish with; stop the run instead")
                self._carry_out(machine.finish_early(f"by the operator: {request.reason}", now), now)
                return f"the rounds end with round {len(machine.state.rounds)}"
            case PauseSite():
                self._carry_out(machine.pause_site(request.site, by="operator", reason=request.reason, now=now), now)
                return f"{request.site} is paused"
            case ResumeSite():
                self._carry_out(machine.resume_site(request.site, by="operator", now=now), now)
                own = machine.state.paused.get(request.site, {}).get("site")
                return f"{request.site} goes on" if own is None else f"{request.site} rests by its own wish: {own}"
            case RemoveSite():
                detail = f"removed by the aggregator's operator: {request.reason}"
                self._carry_out(machine.site_leaves(request.site, by="operator", detail=detail, now=now), now)
                return f"{request.site} is removed"

    def _on_arrival(self, site: str, arrived: ReceivedUpload, now: float) -> None:
        verdict: ValidationResult | None
        if arrived.intact:
            verdict = validate_upload(self._machine.state, arrived.offer, self._store)
        else:
            verdict = ValidationResult(reason="corrupt", detail="the bytes do not have the announced SHA-256")
        if verdict is None:
            return
        if verdict.reason is not None:
            log.warning(
                "model_refused", site=site, round=arrived.offer.round, reason=verdict.reason, detail=verdict.detail
            )
        self._carry_out(self._machine.upload_validated(site, arrived.offer, verdict, now), now)

    def _carry_out(self, outputs: Sequence[RoundOutput], now: float) -> None:
        facts = [output.event for output in outputs if isinstance(output, RecordEvent)]
        if facts:
            self._journal.append(self._machine.state.run, facts)
        for output in outputs:
            match output:
                case RecordEvent():
                    log_event(output.event)
                case PublishState():
                    self._announce()
                case SendToSite():
                    self._tell(output.site, output.message)
                case ReceiveUpload():
                    self._receive(output, now)
                case AggregateRound():
                    self._merge(output)
                case DismissSite():
                    self._intake.cancel(output.site)
                    if (boot := self._hall.release(output.site)) is not None:
                        self._tell(output.site, TurnedAway(boot=boot, reason="left", detail=output.detail[:500]))

    def _receive(self, output: ReceiveUpload, now: float) -> None:
        site, offer = output.site, output.offer
        size_bytes = offer.manifest.size_bytes
        if offer.purpose == "initial" and not self._store.has_room(size_bytes):
            # It is as large as the site says, unlike an update: one site must not end the run.
            verdict = ValidationResult(
                reason="too_large", detail=f"{size_bytes} bytes; the aggregator's disk has no room"
            )
            self._carry_out(self._machine.upload_validated(site, offer, verdict, now), now)
            return
        arrived = self._intake.start(site, offer, now=now)
        if arrived is not None:
            self._on_arrival(site, arrived, now)

    def _merge(self, output: AggregateRound) -> None:
        outputs = close_round(self._machine, output.round, self._store, self._state_dir, time.monotonic)
        self._carry_out(outputs, time.monotonic())
        # What the state names now is needed, and what is being sent; the parts are not.
        self._store.prune({*self._machine.state.servable_blobs, *self._announcer.served_blobs})

    def _announce(self) -> None:
        if self._is_up:
            message = self._announcer.round_state(self._machine.state, tuple(self._machine.available_sites()))
            self._publish(self._topics.round, encode_message(message), retain=True)

    def _presence(self, *, online: bool) -> Presence:
        return Presence(boot=self._boot, online=online, run=self._machine.state.run)

    def _pump(self) -> None:
        if self._is_up:
            self._announcer.send_pending(
                lambda sha256, index, data: self._publish(self._topics.chunk(sha256, index), data)
            )

    def _tell(self, site: str, message: DownMessage) -> None:
        self._publish(self._topics.down(site), encode_message(message))

    def _say_tag(self, name: str, value: bytes) -> None:
        self._publish(self._topics.status(name), value, retain=True)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        # While the link is down nothing is queued: all of it is said again when it is up, or asked for again.
        if self._is_up and self._link is not None:
            self._link.publish(topic, payload, retain=retain)
