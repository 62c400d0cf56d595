"""The release fetcher: receives announced releases, fetches their packages, and publishes the state of models.

One thread does all of it and runs all decisions of the model manager; other threads hand it calls
(:meth:`ReleaseFetcher.call`). It has a connection of its own, so that packages of megabytes do not delay results.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import final

from edge.models.manager import ModelManager
from edge.models.store import PUBLISHER_OWNER, PackageStore
from edgeflame.background import BackgroundThread
from edgeflame.errors import EdgeFlameError, FederationError, LinkError, RuntimeUnavailableError, StorageError
from edgeflame.log import EventLog
from edgeflame.mqtt.client import MqttClient, new_client_id
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, Disconnected, ReceivedMessage
from edgeflame.mqtt.messages import BlobNeed, encode_message
from edgeflame.mqtt.refusals import RefusalLog
from edgeflame.mqtt.release_messages import LineModels, ProductModels, Release, decode_release
from edgeflame.mqtt.topics import ChunkTopic, MessageTopic, Topics
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.transfer.store import Download

log = EventLog("models")

TICK_S = 0.5
"""Time between two polls of the manager, seconds."""
PUBLISH_EVERY_S = 1.0
"""Least time between two messages about progress, seconds; other changes are published at once."""
LOG_TROUBLE_EVERY_S = 60.0
"""Least time between two log lines about the same failure, seconds."""
ANSWER_S = 60.0
"""How long a command waits for the thread, seconds: opening a large package takes some."""
RETRY_S = 30.0
"""Time to the next attempt after the broker has refused the connection, seconds."""

_WAKE = "wake"


@final
class ReleaseFetcher:
    """Fetches releases on a thread of its own, while its context is open.

    Args:
        make_manager: makes the model manager, given a function that wakes the thread.
        store: where packages are kept.
        broker: the broker's address and credentials.
        fleet: the fleet's name.
        line: the line's name in it.
        on_change: called after every change of a product's models but progress.
    """

    def __init__(
        self,
        make_manager: Callable[[Callable[[], None]], ModelManager],
        *,
        store: PackageStore,
        broker: BrokerUrl,
        fleet: str,
        line: str,
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._broker = broker
        self._topics = Topics(fleet=fleet)
        self._line = line
        self._client_id = new_client_id(f"models-{line}")
        self._on_change = on_change
        self._boot = uuid.uuid4().hex
        self._refusals = RefusalLog(log)
        self._inbox: queue.SimpleQueue[ClientEvent | Callable[[], None] | str] = queue.SimpleQueue()
        self.manager = make_manager(lambda: self._inbox.put(_WAKE))
        self._downloads: dict[str, tuple[str, Download]] = {}
        """By product: the release's id and its download."""
        self._link: MqttClient | None = None
        self._is_up = False
        self.models: tuple[ProductModels, ...] = ()
        """As published, whether or not the broker can be reached."""
        self._published: LineModels | None = None
        self._published_at = 0.0
        self._milestones: tuple[object, ...] = ()
        self._retry_at: float | None = None
        self._trouble = "", 0.0
        # The thread may be opening a package when it is left behind, which does no harm.
        self._thread = BackgroundThread("models", self._run, wake=lambda: self._inbox.put(_WAKE), join_s=2.0)

    def __enter__(self) -> ReleaseFetcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.close()
        # The thread may be left behind in the middle of a check, which is no fault of the package.
        self._store.forget_check()

    def call(self, action: Callable[[], None]) -> None:
        """Run an action on the thread, and wait for its end.

        Raises:
            EdgeFlameError: the action raised it, or the thread is busy for too long.
        """
        answer: queue.SimpleQueue[EdgeFlameError | None] = queue.SimpleQueue()

        def answered() -> None:
            try:
                action()
            except EdgeFlameError as exc:
                answer.put(exc)
            else:
                answer.put(None)

        self._inbox.put(answered)
        try:
            failure = answer.get(timeout=ANSWER_S)
        except queue.Empty:
            raise RuntimeUnavailableError(
                f"the thread that looks after models has been busy for {ANSWER_S:g} s; try again"
            ) from None
        if failure is not None:
            raise failure

    # The rest runs on the thread.

    def offer(self, release: Release) -> None:
        """Take up a release as if it were announced now."""
        self._on_release(release)

    def _run(self, stop: threading.Event) -> None:
        try:
            self._guarded(self.manager.restore)
            while not stop.is_set():
                try:
                    self._serve(stop)
                except Exception as exc:  # noqa: BLE001 - a thread's outermost frame; the line goes on without it
                    log.error("models_thread_failed", reason=repr(exc), retry_in_s=RETRY_S)
                    stop.wait(RETRY_S)
        finally:
            self.manager.close()
            for _, download in self._downloads.values():
                download.close()
            if self._link is not None:
                self._link.close(flush_s=0.5)

    def _serve(self, stop: threading.Event) -> None:
        next_poll = 0.0
        while not stop.is_set():
            self._connect_if_due()
            try:
                item = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                item = _WAKE
            if isinstance(item, str):
                self._guarded(self.manager.poll)
            elif callable(item):
                item()
            else:
                self._guarded(partial(self._on_event, item))
            now = time.monotonic()
            is_due = now >= next_poll
            if is_due:
                next_poll = now + TICK_S
                self._guarded(self.manager.poll)
                self._tick(now)
            # Not with every chunk.
            if is_due or not isinstance(item, ReceivedMessage):
                self._publish_status(now)

    def _guarded(self, call: Callable[[], object]) -> None:
        """Log an error of ``call`` and go on: a disk that is full for a while must not end the thread."""
        try:
            call()
        except EdgeFlameError as exc:
            # With a full disk this may happen twice a second.
            reason, now = str(exc), time.monotonic()
            if reason != self._trouble[0] or now > self._trouble[1] + LOG_TROUBLE_EVERY_S:
                self._trouble = reason, now
                log.error("models_not_settled", reason=reason)

    def _connect_if_due(self) -> None:
        if self._link is not None or (self._retry_at is not None and time.monotonic() < self._retry_at):
            return
        try:
            self._link = MqttClient(
                self._broker,
                client_id=self._client_id,
                filters=[self._topics.all_releases()],
                sink=self._inbox.put,
            )
        except LinkError as exc:
            self._on_refused(exc)
        else:
            self._link.start()

    def _on_refused(self, error: LinkError) -> None:
        # The certificate may be renewed, or rights granted, so it is tried again.
        log.error("models_not_connected", reason=str(error), retry_in_s=RETRY_S)
        if self._link is not None:
            self._link.close(flush_s=0.0)
        self._link, self._is_up, self._retry_at = None, False, time.monotonic() + RETRY_S

    def _on_event(self, event: ClientEvent) -> None:
        match event:
            case Connected():
                self._is_up, self._published = True, None
                for _, download in self._downloads.values():
                    download.request_missing(now=time.monotonic())
            case Disconnected():
                self._is_up = False
            case ConnectionFailed(error=error):
                self._on_refused(error)
            case ReceivedMessage():
                try:
                    self._on_message(event)
                except FederationError as exc:
                    self._refusals.add(event.topic, str(exc), time.monotonic())
                finally:
                    event.acknowledge()
            case _:
                pass

    def _on_message(self, event: ReceivedMessage) -> None:
        match self._topics.parse(event.topic):
            case ChunkTopic(is_release=True, sha256=sha256, index=index):
                self._on_chunk(sha256, index, event.payload)
            case MessageTopic(kind="release", product=str(product)) if event.payload:
                self._on_release(decode_release(event.payload, product))
            case _:
                pass

    def _on_release(self, release: Release) -> None:
        product = release.product
        if not self.manager.on_release(release):
            self._forget_unwanted(product)
            return
        under_way = self._downloads.get(product)
        if under_way is not None and under_way[0] == release.release:
            download = under_way[1]
            if download.manifest == release.manifest:
                # Announced again: the publisher is back.
                download.request_missing(now=time.monotonic())
                return
        self._stop_download(product)
        if self._store.has(release.manifest.sha256):
            self._fetched(product)
            return
        try:
            download = Download(
                self._store.incoming,
                release.manifest,
                owner=PUBLISHER_OWNER,
                send=self._publish_need,
                now=time.monotonic(),
            )
        except StorageError as exc:
            self.manager.reject(product, "storage", str(exc))
            return
        self._downloads[product] = (release.release, download)
        if self._link is not None:
            self._link.subscribe(self._topics.release_chunks(release.manifest.sha256))
        log.info("fetching", product=product, sha256=release.manifest.sha256[:12], chunks=release.manifest.num_chunks)
        if download.request_missing(now=time.monotonic()):
            self._arrived(product)

    def _on_chunk(self, sha256: str, index: int, data: bytes) -> None:
        for product, (_, download) in list(self._downloads.items()):
            if download.manifest.sha256 != sha256:
                continue
            try:
                if download.add_chunk(index, data, now=time.monotonic()):
                    self._arrived(product)
            except FederationError as exc:
                self._stop_download(product)
                self.manager.reject(product, "hash", str(exc))
            except StorageError as exc:
                self._stop_download(product)
                self.manager.reject(product, "storage", str(exc))

    def _arrived(self, product: str) -> None:
        self._stop_download(product)
        self._fetched(product)

    def _fetched(self, product: str) -> None:
        self._publish_status(time.monotonic(), is_checking=product)
        self.manager.on_package(product)

    def _forget_unwanted(self, product: str) -> None:
        """Stop the download of a release that was withdrawn or superseded."""
        wanted = self.manager.pending_release(product)
        under_way = self._downloads.get(product)
        if under_way is not None and (wanted is None or wanted.release != under_way[0]):
            self._stop_download(product)

    def _stop_download(self, product: str) -> None:
        under_way = self._downloads.pop(product, None)
        if under_way is None:
            return
        download = under_way[1]
        download.close()
        sha256 = download.manifest.sha256
        if self._link is not None and all(one.manifest.sha256 != sha256 for _, one in self._downloads.values()):
            self._link.unsubscribe(self._topics.release_chunks(sha256))

    def _tick(self, now: float) -> None:
        if self._is_up:
            for _, download in self._downloads.values():
                download.tick(now)

    def _publish_need(self, need: BlobNeed) -> None:
        # While the connection is down nothing is queued: chunks are requested again when it is up.
        if self._is_up and self._link is not None:
            self._link.publish(self._topics.line_up(self._line), encode_message(need))

    def _publish_status(self, now: float, *, is_checking: str | None = None) -> None:
        progress = {product: download.progress for product, (_, download) in self._downloads.items()}
        models = LineModels(boot=self._boot, products=self.manager.statuses(progress, is_checking=is_checking))
        self.models = models.products
        milestones = _milestones(models)
        is_progress = milestones == self._milestones
        if not is_progress:
            self._milestones = milestones
            self._on_change()
        if models == self._published or not self._is_up or self._link is None:
            return
        if is_progress and self._published is not None and now - self._published_at < PUBLISH_EVERY_S:
            return
        self._published, self._published_at = models, now
        with contextlib.suppress(LinkError):
            self._link.publish(self._topics.line_models(self._line), encode_message(models), retain=True)


def _milestones(models: LineModels) -> tuple[object, ...]:
    """The state of all models without the candidates' progress."""
    return tuple(
        (
            one.product,
            one.present,
            one.previous,
            one.outcomes,
            None if one.candidate is None else (one.candidate.release, one.candidate.stage),
        )
        for one in models.products
    )
