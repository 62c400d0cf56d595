"""Publishing a package: announce it, serve its bytes to the lines that ask, follow their progress, withdraw it.

A line keeps what it has of a package, so a publisher may go away in the middle and come back: the announcement is
retained, and publishing the same package on the same terms continues the release that is announced already.
"""

from __future__ import annotations

import os
import queue
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import msgspec

from edgeflame.errors import FederationError, LinkError, NegativeAnswerError, PackageError
from edgeflame.log import EventLog
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import (
    ClientEvent,
    Connected,
    ConnectionFailed,
    Disconnected,
    PublishResult,
    ReceivedMessage,
)
from edgeflame.mqtt.messages import DEFAULT_CHUNK_BYTES, Release, decode_need, decode_release, encode_message
from edgeflame.mqtt.topics import MessageTopic, Topics
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.package import read_package
from edgeflame.signing import read_signature, verify_signature
from edgeflame.transfer.protocol import describe_file, unpack_mask
from edgeflame.transfer.store import Outgoing
from fleet.observe import FleetModels, ReleaseProgress, WaitUntil, unfinished_lines

COLLECT_S = 0.6
"""What is retained comes right after the subscription."""
ANSWER_S = 10.0


def read_fleet_models(url: BrokerUrl, topics: Topics, *, connect_timeout_s: float | None) -> FleetModels:
    """What is retained.

    Raises:
        LinkError: the broker refuses us, or was not reached in time.
    """
    with _ModelsObserver(url, topics, connect_timeout_s) as onlooker:
        return onlooker.view


def withdraw_release(url: BrokerUrl, topics: Topics, product: str, *, connect_timeout_s: float | None) -> Release:
    """Take a product's release back; what it was.

    Raises:
        NegativeAnswerError: there is none, or it was withdrawn before.
        LinkError: the broker refuses us, or was not reached in time.
    """
    with _ModelsObserver(url, topics, connect_timeout_s) as onlooker:
        release = onlooker.view.releases.get(product)
        if release is None or release.withdrawn:
            others = ", ".join(name for name, one in sorted(onlooker.view.releases.items()) if not one.withdrawn)
            raise NegativeAnswerError(
                f"nothing is released for the product {product!r} in the fleet {topics.fleet}; for these is: {others}"
            )
        onlooker.publish(topics.release(product), encode_message(msgspec.structs.replace(release, withdrawn=True)))
        return release


class _ModelsObserver:
    def __init__(self, url: BrokerUrl, topics: Topics, connect_timeout_s: float | None) -> None:
        self.view = FleetModels(topics)
        self._events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        self._link = MqttClient(
            url,
            client_id=f"edgeflame-models-{os.getpid()}-{os.urandom(4).hex()}",
            filters=self.view.filters(),
            sink=self._events.put,
            connect_timeout_s=connect_timeout_s,
        )
        try:
            while not isinstance(self._next(None), Connected):
                pass
            until = time.monotonic() + COLLECT_S
            while (left := until - time.monotonic()) > 0:
                self._next(left)
        except BaseException:
            self._link.close()
            raise

    def __enter__(self) -> _ModelsObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._link.close()

    def publish(self, topic: str, payload: bytes) -> None:
        """Say something, retained, and wait until the broker has it.

        Raises:
            LinkError: it refuses it, or does not answer.
        """
        self._link.publish(topic, payload, retain=True, token=1)
        until = time.monotonic() + ANSWER_S
        while (left := until - time.monotonic()) > 0:
            event = self._next(left)
            if isinstance(event, PublishResult):
                if event.error is not None:
                    raise LinkError(f"the broker refuses it on {topic}: {event.error}")
                return
        raise LinkError(f"the broker did not answer within {ANSWER_S:g} s")

    def _next(self, timeout_s: float | None) -> ClientEvent | None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, ConnectionFailed):
            raise event.error
        if isinstance(event, ReceivedMessage):
            self.view.take(event.topic, event.payload)
            event.done()
        return event


log = EventLog("publish")
TICK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """How a package is to be taken.

    Attributes:
        lines: who is to take it; empty: every line that runs its product.
        shadow_parts: at least so many parts beside the present model.
        again: a new release, also of a package that lines have refused or rolled back.
        until: what is waited for.
        timeout_s: without any line's progress for so long it is given up; None: never.
        stay: serve lines that come later, until interrupted.
    """

    lines: tuple[str, ...] = ()
    shadow_parts: int = 0
    again: bool = False
    until: WaitUntil = "checked"
    timeout_s: float | None = None
    stay: bool = False


def describe_package(path: Path, public_key: Path | None) -> Release:
    """The announcement of a package on no particular terms yet.

    Raises:
        PackageError: no sound package, unsigned, or not signed by ``public_key``.
        StorageError: it cannot be read.
        UsageError, MissingDependencyError: see :func:`~edgeflame.signing.verify_signature`.
    """
    package = read_package(path)
    if public_key is not None:
        verify_signature(package, public_key)
    signature = read_signature(package)
    if signature is None:
        raise PackageError(
            f"{path}: not signed, and no line takes an unsigned package: edgeflame model sign {path} --key KEY"
        )
    manifest = describe_file(path)
    if manifest.sha256 != package.sha256:
        raise PackageError(f"{path}: it changed while it was read; publish it again when nobody writes it")
    try:
        return msgspec.convert(
            {
                "type": "release",
                "release": uuid.uuid4().hex,
                "product": package.manifest.product,
                "manifest": manifest,
                "key": signature.key_id,
                "name": path.name[:200],
                "published": datetime.now(timezone.utc),
            },
            Release,
        )
    except msgspec.ValidationError as exc:
        raise PackageError(f"{path}: cannot be announced ({exc})") from exc


def publish_package(
    path: Path,
    release: Release,
    terms: ReleaseTerms,
    *,
    broker: BrokerUrl,
    topics: Topics,
    connect_timeout_s: float | None,
    report: Callable[[list[ReleaseProgress]], None],
) -> list[ReleaseProgress]:
    """Publish a package; how every line stands at the end.

    Args:
        path: the package.
        release: of :func:`describe_package`.
        terms: see there.
        broker: where.
        topics: of which fleet.
        connect_timeout_s: give up if the broker was not reached within this time; None: never.
        report: told how the lines stand, whenever that has changed.

    Raises:
        NegativeAnswerError: no line to take it is known; or another release took its place.
        LinkError: the broker refuses us, or was not reached in time.
        StorageError: the file cannot be read any more.
    """
    with _Publisher(path, release, terms, broker, topics, connect_timeout_s, report) as publisher:
        return publisher.run()


class _Publisher:
    def __init__(
        self,
        path: Path,
        release: Release,
        terms: ReleaseTerms,
        broker: BrokerUrl,
        topics: Topics,
        connect_timeout_s: float | None,
        report: Callable[[list[ReleaseProgress]], None],
    ) -> None:
        self._path = path
        self._terms = terms
        self._release = msgspec.structs.replace(release, lines=terms.lines, shadow_parts=terms.shadow_parts)
        self._topics = topics
        self._report = report
        self._view = FleetModels(topics)
        self._expected: tuple[str, ...] = terms.lines
        self._outgoing: Outgoing | None = None
        self._chunk_bytes = DEFAULT_CHUNK_BYTES
        self._events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
        self._is_up = False
        self._is_announced = False
        self._is_heard = False
        """Our announcement came back; what comes after it is newer."""
        self._said: list[ReleaseProgress] = []
        self._progress_at = 0.0
        self._link = MqttClient(
            broker,
            client_id=f"edgeflame-publish-{os.getpid()}-{os.urandom(4).hex()}",
            filters=[*self._view.filters(), topics.all_line_up()],
            sink=self._events.put,
            connect_timeout_s=connect_timeout_s,
        )

    def __enter__(self) -> _Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._link.close()
        if self._outgoing is not None:
            self._outgoing.close()

    def run(self) -> list[ReleaseProgress]:
        while not self._is_up:
            self._step(None)
        until = time.monotonic() + COLLECT_S
        while (left := until - time.monotonic()) > 0:
            self._step(left)
        self._begin()
        self._progress_at = time.monotonic()
        while True:
            self._step(TICK_S)
            standings = self._look()
            if not self._terms.stay and not unfinished_lines(standings):
                return standings
            silent_s = time.monotonic() - self._progress_at
            if not self._terms.stay and self._terms.timeout_s is not None and silent_s > self._terms.timeout_s:
                return standings

    def _begin(self) -> None:
        """Who is to take it, and whether it is announced already."""
        known = self._view.lines_of(self._release.product)
        if not self._expected:
            self._expected = known
        if not self._expected and not self._terms.stay:
            raise NegativeAnswerError(
                f"no line of the fleet {self._topics.fleet} has said that it runs the product "
                f"{self._release.product!r} with a section [models]; name with --lines those that will, or serve "
                "whoever comes with --stay"
            )
        before = self._view.releases.get(self._release.product)
        if before is not None and not self._terms.again and _is_same(before, self._release):
            self._release = msgspec.structs.replace(
                self._release, release=before.release, published=before.published, name=before.name
            )
            log.info("release_continued", product=before.product, release=before.release[:8])
        self._announce()

    def _announce(self) -> None:
        if self._outgoing is None or self._outgoing.sender.manifest.chunk_bytes != self._chunk_bytes:
            if self._outgoing is not None:
                self._outgoing.close()
            manifest = describe_file(self._path, chunk_bytes=self._chunk_bytes)
            if manifest.sha256 != self._release.manifest.sha256:
                raise PackageError(f"{self._path}: it changed while it was being published; publish it again")
            self._release = msgspec.structs.replace(self._release, manifest=manifest)
            self._outgoing = Outgoing(self._path, manifest)
        self._link.publish(self._topics.release(self._release.product), encode_message(self._release), retain=True)
        if not self._is_announced:
            self._is_announced = True
            log.info(
                "release_announced",
                product=self._release.product,
                sha256=self._release.manifest.sha256[:12],
                release=self._release.release[:8],
                lines=", ".join(self._expected) or "none yet",
            )

    def _look(self) -> list[ReleaseProgress]:
        if self._terms.stay:
            self._expected = tuple(sorted({*self._expected, *self._view.lines_of(self._release.product)}))
        standings = [self._view.standing(line, self._release, self._terms.until) for line in self._expected]
        if standings != self._said:
            self._said = standings
            self._progress_at = time.monotonic()
            self._report(standings)
        return standings

    def _step(self, timeout_s: float | None) -> None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            event = None
        match event:
            case ConnectionFailed():
                raise event.error
            case Connected():
                self._is_up = True
                self._chunk_bytes = event.chunk_bytes
                if self._is_announced:
                    self._announce()
            case Disconnected():
                self._is_up = False
            case ReceivedMessage():
                try:
                    self._take(event)
                except FederationError as exc:
                    log.warning("message_refused", topic=event.topic, reason=str(exc))
                event.done()
            case _:
                pass
        if self._outgoing is not None and self._is_up:
            sha256 = self._release.manifest.sha256
            self._outgoing.pump(lambda index, data: self._link.publish(self._topics.release_chunk(sha256, index), data))

    def _take(self, event: ReceivedMessage) -> None:
        match self._topics.parse(event.topic):
            case MessageTopic(kind="line_up", line=str(line)):
                need = decode_need(event.payload)
                if self._outgoing is not None and need.sha256 == self._release.manifest.sha256:
                    missing = unpack_mask(need.missing, self._release.manifest.num_chunks)
                    self._outgoing.sender.need(
                        line, missing, resend=need.resend, now=time.monotonic(), window=need.window
                    )
            case MessageTopic(kind="release", product=product) if (
                product == self._release.product and self._is_announced
            ):
                said = decode_release(event.payload, self._release.product)
                if said.release == self._release.release:
                    self._is_heard = True
                elif self._is_heard:
                    raise NegativeAnswerError(
                        f"another release of {said.product!r} took this one's place: {said.name or said.release}"
                    )
                if said.withdrawn and self._is_heard:
                    raise NegativeAnswerError(f"this release of {said.product!r} was withdrawn meanwhile")
            case _:
                self._view.take(event.topic, event.payload)


def _is_same(before: Release, release: Release) -> bool:
    return not before.withdrawn and (before.manifest.sha256, before.lines, before.shadow_parts) == (
        release.manifest.sha256,
        release.lines,
        release.shadow_parts,
    )
