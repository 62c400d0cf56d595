"""The aggregation service: one thread that carries out what the round machine decides.

The MQTT client's thread only queues what arrives. This one takes it from the queue, decodes it, asks the machine,
writes the machine's events to the journal, and then acts on them. Being killed between any two steps loses nothing:
the journal has the events, the blobs are on disk, and sites repeat what was not answered.
"""

from __future__ import annotations

import queue
import time
import uuid
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from aggregator.allowances import message_allowances, warning_allowances
from aggregator.config import AggregateConfig
from aggregator.control import OperatorRequest, RequestQueue, apply_request
from aggregator.events import RunState
from aggregator.exchanges import ValidationResult
from aggregator.journal import Journal
from aggregator.membership import Membership
from aggregator.metrics import StatusReporter, run_summary
from aggregator.outputs import DismissSite, PublishState, ReceiveUpload, RoundOutput, SendToSite
from aggregator.run import Run, RunResult, open_run, write_results
from aggregator.uploads import ReceivedUpload, UploadReceiver
from aggregator.validation import validate_upload
from edgeflame.errors import FederationError
from edgeflame.log import EventLog, Progress
from edgeflame.metrics import MetricsServer
from edgeflame.mqtt.client import MqttClient, new_client_id
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
from edgeflame.mqtt.topics import MAX_NAME_CHARS, ChunkTopic, MessageTopic, Topics
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
        broker: the fleet's broker.
        fleet: the fleet's name.
        state_dir: holds journal and blobs; used by one process at a time.
        out_dir: gets the ledger and the final model.
        config: must be the same when an interrupted run continues.
        report: counts rounds.
        new_run: if the state directory's run has ended, start another one.
        connect_timeout_s: give up if the broker was not reached within this time; None waits for ever.
        stay: answer and serve late sites after the end, until interrupted or stopped by the operator.
        metrics: ``HOST:PORT`` at which metrics are served to Prometheus; None serves none.
        certificate_expires: when the certificate that the broker is shown expires, if that is known.

    Raises:
        ConfigError: the interrupted run has another configuration.
        LinkError: the broker refuses the connection, or was not reached in time.
        StorageError: the disk fails, or the state directory cannot be used.
        UsageError: ``fleet`` is not a valid name.
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
        store = BlobStore(state_dir)
        self._topics = topics
        self._store = store
        self._out_dir = out_dir
        self._report = report
        self._boot = uuid.uuid4().hex
        self._run = Run(state, journal=journal, store=store, clock=time.monotonic, handle=self._handle)
        self._machine = self._run.machine
        self._membership = Membership(state, aggregator_boot=self._boot, now=time.monotonic())
        self._messages = message_allowances()
        self._refusals_logged, self._failures_logged = warning_allowances(), warning_allowances()
        self._inbox: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        self._uploads = UploadReceiver(store, self._send)
        self._status = StatusReporter(state_dir, self._publish_tag, metrics, certificate_expires=certificate_expires)
        self._link: MqttClient | None = None
        self._is_up = False
        self._stay = stay
        self._requests = RequestQueue(state_dir)
        self._stop_requested = False
        self._is_end_published = False
        self._written: RunState | None = None

    def serve(self, broker: BrokerUrl, connect_timeout_s: float | None) -> None:
        """Serve the run until it is over."""
        will = LastWill(topic=self._topics.aggregator_presence, payload=encode_message(self._presence(online=False)))
        link = MqttClient(
            broker,
            client_id=new_client_id("aggregator"),
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
                # After the end this is how an aggregator that stays is stopped; before, it is an interruption.
                if not self._stay or self._run.state.ended is None:
                    raise
            finally:
                link.publish(self._topics.aggregator_presence, will.payload, retain=True)
                self._uploads.close()
                self._run.publisher.close()

    def result(self) -> RunResult:
        """Write the ledger and the model; returns how the run ended."""
        return write_results(self._run.state, self._store, self._out_dir)

    def _loop(self) -> None:
        now = time.monotonic()
        self._run.execute(self._machine.restart(now))
        next_tick = now
        is_over = False
        while not is_over or (self._stay and not self._stop_requested):
            try:
                event = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                event = None
            now = time.monotonic()
            if event is not None:
                self._on_event(event, now)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._run.execute(self._machine.tick(now))
                self._requests.process_pending(self._on_request)
                self._report_status(now)
            self._send_chunks()
            # The end must be published, also by an aggregator that was restarted after it. It counts as published
            # when the broker sends it back: a connection that seems to be up may be dead.
            is_over = self._run.state.ended is not None and self._is_end_published
            if is_over and self._stay:
                self._write_results()
        self._report_status(time.monotonic())

    def _write_results(self) -> None:
        """Write the results while the aggregator stays: once, and again when a late site has reported."""
        state = self._run.state
        if state is not self._written:
            self._written = state
            result = write_results(state, self._store, self._out_dir)
            log.info("run_over_staying", outcome=state.phase, ledger=result.ledger_path)

    def _report_status(self, now: float) -> None:
        state, num_online = self._run.state, self._membership.num_live(now)
        self._report(state.rounds_done, state.config.rounds, run_summary(state, num_online=num_online))
        self._status.report(
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
                self._status.reconnected()
                self._run.publisher.set_chunk_size(event.chunk_bytes)
                self._publish_presence()
                self._publish_state()
            case Disconnected():
                self._is_up = False
            case ConnectionFailed():
                raise event.error
            case ReceivedMessage():
                address = self._topics.parse(event.topic)
                try:
                    self._on_message(address, event, now)
                except FederationError as exc:
                    if self._refusals_logged.take(_sender(event.topic), now):
                        log.warning("message_refused", topic=event.topic[:200], reason=str(exc))
                event.acknowledge()

    def _on_message(self, address: ChunkTopic | MessageTopic | None, event: ReceivedMessage, now: float) -> None:
        match address:
            case ChunkTopic(site=str(site), sha256=sha256, index=index):
                is_new, received = self._uploads.receive_chunk(site, sha256, index, event.payload, now=now)
                if is_new:
                    self._machine.progress_made(site, now)
                if received is not None:
                    self._on_upload_complete(site, received, now)
            case MessageTopic(kind="site_presence", site=str(site)):
                presence = decode_presence(event.payload)
                is_heard = self._messages.take(site, now)
                if is_heard and not presence.online and self._membership.mark_offline(site, presence, now):
                    log.info("site_offline", site=site)
            case MessageTopic(kind="aggregator_presence") if event.payload:
                self._on_own_presence(decode_presence(event.payload))
            case MessageTopic(kind="round") if event.payload:
                published, state = decode_round(event.payload), self._run.state
                is_same = published.run == state.run and published.phase == state.phase
                self._is_end_published = is_same and state.ended is not None
            case MessageTopic(kind="up", site=str(site)):
                message = decode_up(event.payload)
                if isinstance(message, BlobNeed) or self._messages.take(site, now):
                    self._on_site_message(site, message, now)
            case _:
                raise FederationError("nobody is told anything on this topic")

    def _on_own_presence(self, presence: Presence) -> None:
        if presence.boot == self._boot:
            return
        if presence.online:
            log.warning("another_aggregator", fleet=self._topics.fleet, boot=presence.boot[:12], run=presence.run)
        else:
            # The last will of the process before this one came late, and replaced this one's presence.
            self._publish_presence()

    def _on_site_message(self, site: str, message: Any, now: float) -> None:
        machine = self._machine
        match message:
            case Hello():
                self._send(site, self._membership.admit(site, message, machine.state, now))
            case Leaving():
                self._on_leaving(site, message, now)
            case _ if not self._membership.is_known(site):
                # A site sends Hello first, and again when it sees that the aggregator's process is a new one.
                log.debug("message_before_hello", site=site, message=message.__struct_config__.tag)
            case Heartbeat():
                self._on_heartbeat(site, message, now)
            case Offer():
                self._run.execute(machine.offer_received(site, message, now))
            case TaskFailed():
                if self._failures_logged.take(site, now):
                    log.warning("site_failed", site=site, task=message.purpose, reason=message.detail)
                self._run.execute(machine.task_failed(site, message, now))
            case FinishReport():
                self._run.execute(machine.finish_report_received(site, message, now))
            case BlobNeed():
                is_served = self._run.publisher.chunks_requested(site, message, now=now)
                if is_served and self._membership.is_new_chunk_request(site, message):
                    machine.progress_made(site, now)

    def _on_heartbeat(self, site: str, message: Heartbeat, now: float) -> None:
        machine = self._machine
        if not self._membership.heartbeat(site, message, now):
            return
        machine.heartbeat_received(site, now)
        if self._membership.is_progress(site, message):
            machine.progress_made(site, now, is_ready=message.ready, is_claim=True)
        install = self._membership.install_of(site)
        if message.ready and message.run == machine.state.run and message.initial and install:
            self._run.execute(machine.site_ready(site, install=install, initial=message.initial, now=now))
        if message.paused is None:
            self._run.execute(machine.resume_site(site, by="site", now=now))
        else:
            self._run.execute(machine.pause_site(site, by="site", reason=message.paused, now=now))

    def _on_leaving(self, site: str, message: Leaving, now: float) -> None:
        machine = self._machine
        if message.run == machine.state.run and self._membership.is_admitted(site, message.boot):
            detail = message.detail or "it said so"
            self._run.execute(machine.site_leaves(site, by="site", detail=detail, now=now))
        if site not in machine.state.active_members:
            # Also where it never joined, or had left before: there is nothing to leave any more.
            self._send(site, TurnedAway(boot=message.boot, reason="left", detail=f"{site} has left the run"))

    def _on_request(self, request: OperatorRequest) -> str:
        outcome = apply_request(request, self._machine, time.monotonic())
        self._run.execute(outcome.outputs)
        self._stop_requested |= outcome.ends_service
        return outcome.text

    def _on_upload_complete(self, site: str, upload: ReceivedUpload, now: float) -> None:
        result: ValidationResult | None
        if upload.intact:
            result = validate_upload(self._run.state, upload.offer, self._store)
        else:
            result = ValidationResult(reason="corrupt", detail="the bytes do not have the announced SHA-256")
        if result is None:
            return
        if not result.is_valid:
            log.warning(
                "model_refused", site=site, round=upload.offer.round, reason=result.reason, detail=result.detail
            )
        self._run.execute(self._machine.upload_validated(site, upload.offer, result, now))

    def _handle(self, output: RoundOutput) -> None:
        """Carry out an output that concerns sites; the run has journalled the events."""
        match output:
            case PublishState():
                self._publish_state()
            case SendToSite():
                self._send(output.site, output.message)
            case ReceiveUpload():
                self._receive(output.site, output.offer, time.monotonic())
            case DismissSite():
                self._uploads.cancel(output.site)
                if (boot := self._membership.release(output.site)) is not None:
                    self._send(output.site, TurnedAway(boot=boot, reason="left", detail=output.detail[:500]))

    def _receive(self, site: str, offer: Offer, now: float) -> None:
        size_bytes = offer.manifest.size_bytes
        if offer.purpose == "initial" and not self._store.has_room(size_bytes):
            # Its size, unlike an update's, is the site's own claim: one site must not fill the disk and end the run.
            detail = f"{size_bytes} bytes; the aggregator's disk has no room"
            result = ValidationResult(reason="too_large", detail=detail)
            self._run.execute(self._machine.upload_validated(site, offer, result, now))
        elif (upload := self._uploads.start(site, offer, now=now)) is not None:
            self._on_upload_complete(site, upload, now)

    def _presence(self, *, online: bool) -> Presence:
        return Presence(boot=self._boot, online=online, run=self._run.state.run)

    def _publish_presence(self) -> None:
        self._publish(self._topics.aggregator_presence, encode_message(self._presence(online=True)), retain=True)

    def _publish_state(self) -> None:
        if self._is_up:
            self._publish(self._topics.round, encode_message(self._run.round_state()), retain=True)

    def _send_chunks(self) -> None:
        if self._is_up:
            self._run.publisher.send_pending(
                lambda sha256, index, data: self._publish(self._topics.training_chunk(sha256, index), data)
            )

    def _send(self, site: str, message: DownMessage) -> None:
        self._publish(self._topics.site_down(site), encode_message(message))

    def _publish_tag(self, name: str, value: bytes) -> None:
        self._publish(self._topics.status(name), value, retain=True)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        # While the connection is down nothing is queued: all of it is sent again when it is up, or asked for again.
        if self._is_up and self._link is not None:
            self._link.publish(topic, payload, retain=retain)


def _sender(topic: str) -> str:
    """The site below whose name a message was sent, which access control at the broker holds; empty if it is none."""
    _, is_site, below = topic.partition("/site/")
    return below.partition("/")[0][:MAX_NAME_CHARS] if is_site else ""
