"""The site's service: one thread between the link, the worker process and the state directory.

It plans the next step (:mod:`~trainer.agent.plan`), starts it, and plans again whenever something arrived. All waiting
is on one queue, so the link stays alive whatever the worker does.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edgeflame.errors import EdgeFlameError, FederationError, NegativeAnswerError
from edgeflame.log import EventLog, Progress
from edgeflame.methods import Learning
from edgeflame.metrics import MetricsServer
from edgeflame.mqtt.client import MqttClient, new_client_id
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, Disconnected, LastWill, ReceivedMessage
from edgeflame.mqtt.messages import (
    BlobNeed,
    DownMessage,
    Heartbeat,
    Purpose,
    Receipt,
    Refusal,
    RoundState,
    TurnedAway,
    Welcome,
    decode_down,
    decode_presence,
    decode_round,
)
from edgeflame.mqtt.refusals import RefusalLog
from edgeflame.mqtt.topics import ChunkTopic, MessageTopic, Topics, check_name
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.state import locked_state_dir
from trainer.agent.aggregator_client import AggregatorClient, LeaveHandshake
from trainer.agent.control import Schedule, SiteControl, SitePause
from trainer.agent.metrics import SiteMetrics
from trainer.agent.plan import Leave, PlanInput, plan
from trainer.agent.state import BAD_UPDATE_REASONS, SiteState, announced_learning, plan_input, step_purpose
from trainer.agent.step_runner import StepRunner
from trainer.agent.tasks import TaskResult, WorkerSetup
from trainer.agent.worker_client import WorkerExited, WorkerMessage, WorkerSupervisor

log = EventLog("site")

TICK_S = 0.25
FAILURE_REPORT_S = 10.0
"""How long a site that failed waits for the aggregator to hear of it before it ends anyway, seconds."""


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """A site's part in a fleet.

    Attributes:
        broker: the fleet's.
        fleet, site: their names.
        data: the site's images; they never leave it.
        state_dir: the site's durable state; one process at a time.
        worker_command: starts the worker process.
        groups_file: see :func:`edgeflame.dataset.open_dataset`.
        marks: folder of marks, which never leave the site either; None: it has none.
        product: the kind of part.
        connect_timeout_s: give up if the broker was not reached within this time; None waits for ever.
        schedule: when the site may train; None: always.
        metrics: ``HOST:PORT`` where metrics are served; None serves none.
        certificate_expires: end of the validity of the site's certificate, if that is known.
    """

    broker: BrokerUrl
    fleet: str
    site: str
    data: Path
    state_dir: Path
    worker_command: Sequence[str]
    groups_file: Path | None = None
    marks: Path | None = None
    product: str | None = None
    connect_timeout_s: float | None = None
    schedule: Schedule | None = None
    metrics: str | None = None
    certificate_expires: datetime | None = None


PAUSED_BY_AGGREGATOR = SitePause(reason="the aggregator's operator paused it")


@dataclass(frozen=True, kw_only=True)
class ParticipationResult:
    """The outcome of a run for a site. ``package`` is a file in the state directory; None if none is made."""

    run: str
    model_sha256: str
    package: Path | None
    summary: dict[str, float | str]


def run_site(options: SiteOptions, *, report: Progress) -> ParticipationResult | None:
    """Take part in one run, from wherever it stands to its end; None if its operator has it leave the run before.

    Raises:
        NegativeAnswerError: the run failed.
        FederationError: the name is in use, or the run went on without this site.
        LinkError: the broker refuses us, or was not reached in time.
        UsageError: a name cannot be one.
        StorageError, DataError, ...: the task that failed at this site; it was reported to the aggregator.
    """
    check_name("site", options.site)
    with ExitStack() as stack:
        stack.enter_context(locked_state_dir(options.state_dir, kind="site"))
        server = None if options.metrics is None else stack.enter_context(MetricsServer(options.metrics))
        metrics = SiteMetrics(options.state_dir, server, certificate_expires=options.certificate_expires)
        return _SiteService(options, Topics(fleet=options.fleet), report, metrics).serve()


class _SiteService:
    def __init__(self, options: SiteOptions, topics: Topics, report: Progress, metrics: SiteMetrics) -> None:
        self._metrics = metrics
        self._refusals = RefusalLog(log)
        self._options = options
        self._report = report
        self._state = SiteState(options.state_dir)
        self._inbox: queue.SimpleQueue[ClientEvent | WorkerMessage | WorkerExited] = queue.SimpleQueue()
        self._worker = WorkerSupervisor(options.worker_command, self._inbox.put)
        self._client = AggregatorClient(topics, site=options.site, boot=uuid.uuid4().hex, install=self._state.install)
        self._runner = StepRunner(
            client=self._client,
            state=self._state,
            worker=self._worker,
            setup=WorkerSetup(
                learning=Learning(),
                site=options.site,
                data=str(options.data.resolve()),
                groups_file=None if options.groups_file is None else str(options.groups_file.resolve()),
                marks=None if options.marks is None else str(options.marks.resolve()),
                product=options.product,
            ),
        )
        self._announced: RoundState | None = None
        self._answered: frozenset[tuple[Purpose, int]] = frozenset()
        self._answered_by: str | None = None
        self._failure: tuple[Purpose, EdgeFlameError, float] | None = None
        self._rejected_because: str | None = None
        self._control = SiteControl(options.state_dir)
        self._aggregator_online: bool | None = None
        self._pause: SitePause | None = None
        self._leaving: LeaveHandshake | None = None

    def serve(self) -> ParticipationResult | None:
        """Take part until the run is over."""
        options, client = self._options, self._client
        topics = client.topics
        presence = topics.site_presence(options.site)
        link = MqttClient(
            options.broker,
            client_id=new_client_id(f"site-{options.site}"),
            filters=[topics.round, topics.aggregator_presence, topics.site_down(options.site), presence],
            sink=self._inbox.put,
            will=LastWill(topic=presence, payload=client.offline_payload()),
            connect_timeout_s=options.connect_timeout_s,
        )
        with link:
            client.link = link
            try:
                return self._loop()
            finally:
                self._runner.stop()
                self._worker.stop()
                if client.accepted_by is not None:
                    link.publish(presence, client.offline_payload(), retain=True)

    def _loop(self) -> ParticipationResult | None:
        while True:
            try:
                event = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                event = None
            now = time.monotonic()
            if event is not None:
                self._on_event(event, now)
            if self._rejected_because is not None:
                raise FederationError(self._rejected_because)
            if self._failure is not None and now >= self._failure[2]:
                raise self._failure[1]
            self._apply_control()
            if self._leaving is not None:
                if self._finish_leaving(self._leaving, now):
                    return None
            else:
                step = plan(self._plan_input())
                if isinstance(step, Leave):
                    return self._leave(step)
                if self._pause is not None:
                    self._runner.pause(release=self._pause.release)
                elif step != self._runner.step:
                    self._runner.start(step, now)
            self._client.tick(now)
            self._metrics.publish(
                self._runner.progress,
                self._announced,
                link=self._client.link,
                is_up=self._client.is_connected,
                is_welcome=self._client.accepted_by is not None,
                now=now,
            )
            if self._client.accepted_by is not None:
                self._runner.tick(now)
                self._heartbeat(now)

    def _apply_control(self) -> None:
        request = self._control.leave_request
        if request is not None and self._leaving is None:
            log.info("leaving_for_good", reason=request.reason)
            self._runner.stop()
            self._leaving = LeaveHandshake(request.reason)
        pause = self._desired_pause()
        if pause != self._pause:
            if pause is None:
                log.info("goes_on")
                self._runner.resume()
            else:
                log.info("paused", reason=pause.reason)
            self._pause = pause

    def _desired_pause(self) -> SitePause | None:
        if (own := self._control.pause) is not None:
            return own
        schedule = self._options.schedule
        if schedule is not None and not schedule.is_open(datetime.now().astimezone()):
            return SitePause(reason=f"outside its schedule ({schedule.text})"[:500])
        if self._announced is not None and self._options.site in self._announced.paused:
            return PAUSED_BY_AGGREGATOR
        return None

    def _finish_leaving(self, handshake: LeaveHandshake, now: float) -> bool:
        """Continue the handshake; returns whether the site has left, or there is nothing to leave."""
        announced = self._announced
        if handshake.is_confirmed or (announced is not None and announced.phase in ("done", "failed")):
            if announced is not None:
                self._state.leave_run(announced.run)
            self._control.clear_leave()
            return True
        if announced is not None:
            handshake.tick(self._client, announced.run, now)
        return False

    def _on_event(self, event: ClientEvent | WorkerMessage | WorkerExited, now: float) -> None:
        match event:
            case Connected():
                self._runner.tasks.chunk_bytes = event.chunk_bytes
                self._aggregator_online = None
                self._client.connection_changed(is_up=True)
            case Disconnected():
                self._client.connection_changed(is_up=False)
            case ConnectionFailed():
                raise event.error
            case ReceivedMessage():
                try:
                    self._on_message(event, now)
                except FederationError as exc:
                    self._refusals.add(event.topic, str(exc), now)
                event.acknowledge()
            case WorkerMessage() | WorkerExited():
                outcome = self._worker.on_event(event)
                if isinstance(outcome, TaskResult):
                    self._runner.on_task_done(outcome)
                    self._metrics.on_task_done(outcome)
                elif outcome is not None:
                    self._on_failure(outcome, now)

    def _on_message(self, event: ReceivedMessage, now: float) -> None:
        client = self._client
        match client.topics.parse(event.topic):
            case ChunkTopic(site=None, sha256=sha256, index=index):
                self._runner.on_chunk(sha256, index, event.payload, now=now)
            case MessageTopic(kind="round") if event.payload:
                self._on_announcement(decode_round(event.payload))
            case MessageTopic(kind="aggregator_presence") if event.payload:
                presence = decode_presence(event.payload)
                log.info("aggregator_online" if presence.online else "aggregator_offline")
                self._aggregator_online = presence.online
                if presence.online and presence.boot != client.accepted_by:
                    client.restart_handshake()
            case MessageTopic(kind="site_presence") if event.payload:
                # The last will of an earlier process, or of one that was turned away, has replaced our presence.
                presence = decode_presence(event.payload)
                if client.accepted_by is not None and presence.boot != client.boot and not presence.online:
                    client.publish_presence()
            case MessageTopic(kind="down"):
                self._on_down(decode_down(event.payload), now)
            case _:
                pass

    def _on_announcement(self, announced: RoundState) -> None:
        if self._announced is None or self._announced.run != announced.run:
            self._answered = frozenset()
            self._failure = None
            self._runner.tasks.learning = announced_learning(announced)
            self._runner.tasks.codec = announced.codec
        self._announced = announced
        log.info(
            "announced", run=announced.run[:8], phase=announced.phase, round=announced.round, of=announced.num_rounds
        )

    def _on_down(self, message: DownMessage, now: float) -> None:
        client = self._client
        match message:
            case Welcome(boot=client.boot):
                if self._answered_by != message.aggregator:
                    # A new aggregator process may not know earlier messages any more: they are sent again.
                    self._answered, self._answered_by = frozenset(), message.aggregator
                if client.accepted_by != message.aggregator:
                    client.on_welcome(message.aggregator)
                    self._runner.announce(now)
            case TurnedAway(boot=client.boot) if message.reason == "left" and self._leaving is not None:
                self._leaving.is_confirmed = True
            case TurnedAway(boot=client.boot):
                self._rejected_because = message.detail
            case BlobNeed():
                self._runner.on_need(message, now=now)
            case Receipt() | Refusal() if self._announced is not None and message.run == self._announced.run:
                if isinstance(message, Refusal) and message.reason != "failed":
                    log.warning(
                        "refused",
                        what=message.purpose,
                        round=message.round,
                        reason=message.reason,
                        detail=message.detail,
                    )
                if isinstance(message, Refusal):
                    self._metrics.count_refusal(message.reason)
                self._answered |= {(message.purpose, message.round)}
                if isinstance(message, Refusal) and message.purpose == "update":
                    self._state.discard_private_state(message.run, message.round)
                    if message.reason in BAD_UPDATE_REASONS:
                        self._runner.stop()
                        self._state.discard_update(message.run, message.round)
            case _:
                pass

    def _on_failure(self, error: EdgeFlameError, now: float) -> None:
        purpose = step_purpose(self._runner.step)
        log.error("work_failed", what=purpose, reason=str(error))
        self._failure = (purpose, error, now + FAILURE_REPORT_S)

    def _plan_input(self) -> PlanInput:
        return plan_input(
            self._state,
            self._options.site,
            self._announced,
            answered=self._answered,
            failure=None if self._failure is None else (self._failure[0], str(self._failure[1])),
            aggregator_online=self._aggregator_online,
        )

    def _heartbeat(self, now: float) -> None:
        activity, done, total = self._runner.progress
        if self._pause is not None:
            activity = "paused"
        self._report(done, total, activity)
        announced = self._announced
        initial = None if announced is None else self._state.initial(announced.run)
        beat = Heartbeat(
            boot=self._client.boot,
            run=None if announced is None else announced.run,
            ready=initial is not None and self._failure is None,
            initial=initial,
            activity=activity,
            round=0 if announced is None else announced.round,
            step=done,
            num_steps=total,
            # What the aggregator's operator wants is known there already.
            paused=None if self._pause is None or self._pause is PAUSED_BY_AGGREGATOR else self._pause.reason,
        )
        self._client.send_heartbeat(beat, now)

    def _leave(self, leave: Leave) -> ParticipationResult:
        if leave.run_failed:
            raise NegativeAnswerError(leave.problem or "the run failed")
        if self._failure is not None:
            raise self._failure[1]
        if leave.problem is not None:
            raise FederationError(leave.problem)
        finished = self._state.finished(leave.run)
        assert finished is not None
        package = None if finished.package is None else self._state.package_dir(leave.run) / finished.package
        return ParticipationResult(
            run=leave.run, model_sha256=finished.model, package=package, summary=finished.summary
        )
