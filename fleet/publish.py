"""Publishing a package: announce it, serve its bytes to the lines that ask, follow their progress, withdraw it.

A line keeps what it has of a package, so a publisher may go away in the middle and come back: the announcement is
retained, and publishing the same package on the same terms continues the release that is announced already.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec

from edgeflame.errors import FederationError, NegativeAnswerError, PackageError
from edgeflame.log import EventLog
from edgeflame.mqtt.connection import ReceivedMessage
from edgeflame.mqtt.messages import encode_message
from edgeflame.mqtt.release_messages import Release, decode_need, decode_release
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import MessageTopic, Topics
from edgeflame.mqtt.url import BrokerUrl
from edgeflame.package import read_package
from edgeflame.signing import read_signature, verify_signature
from edgeflame.transfer.protocol import describe_file, unpack_mask
from edgeflame.transfer.store import OutgoingBlob
from fleet.observe import FleetModels, ReleaseProgress, WaitUntil, unfinished_lines

ANSWER_S = 10.0


def read_fleet_models(url: BrokerUrl, topics: Topics, *, connect_timeout_s: float | None) -> FleetModels:
    """What is retained about releases and lines.

    Raises:
        LinkError: the broker refuses us, or was not reached in time.
    """
    with _models_session(url, topics, connect_timeout_s) as (_, models):
        return models


def withdraw_release(url: BrokerUrl, topics: Topics, product: str, *, connect_timeout_s: float | None) -> Release:
    """Withdraw a product's release; returns what was released.

    Raises:
        NegativeAnswerError: there is none, or it was withdrawn before.
        LinkError: the broker refuses us, or was not reached in time.
    """
    with _models_session(url, topics, connect_timeout_s) as (session, models):
        release = models.releases.get(product)
        if release is None or release.withdrawn:
            others = ", ".join(name for name, one in sorted(models.releases.items()) if not one.withdrawn)
            raise NegativeAnswerError(
                f"nothing is released for the product {product!r} in the fleet {topics.fleet}; for these is: {others}"
            )
        withdrawn = encode_message(msgspec.structs.replace(release, withdrawn=True))
        session.publish(topics.release(product), withdrawn, retain=True, wait_s=ANSWER_S)
        return release


@contextmanager
def _models_session(
    url: BrokerUrl, topics: Topics, connect_timeout_s: float | None
) -> Iterator[tuple[Session, FleetModels]]:
    """A session, and what is retained about releases and lines."""
    models = FleetModels(topics)
    with Session(url, name="models", filters=models.filters(), connect_timeout_s=connect_timeout_s) as session:
        for message in session.retained():
            models.handle_message(message.topic, message.payload)
        yield session, models


log = EventLog("publish")
TICK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """The terms of a release: which lines are to take it, and how long its publisher serves and waits.

    Attributes:
        lines: the lines that are to take it; empty for every line that runs its product.
        shadow_parts: at least so many parts beside the present model.
        force: a new release, also of a package that lines have refused or rolled back.
        until: the state of a line that is waited for.
        timeout_s: give up after so long without progress on any line; None for never.
        stay: serve lines that come later, until interrupted.
    """

    lines: tuple[str, ...] = ()
    shadow_parts: int = 0
    force: bool = False
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
    accept = None if public_key is None else partial(verify_signature, public_key=public_key)
    package = read_package(path, accept=accept)
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
    """Publish a package; returns the progress of every line at the end.

    Args:
        path: the package.
        release: its announcement, made by :func:`describe_package`.
        terms: which lines are to take it, and until when it is served.
        broker: the broker's address.
        topics: those of the fleet.
        connect_timeout_s: give up if the broker was not reached within this time; None: never.
        report: called with the progress of all lines whenever it changes.

    Raises:
        NegativeAnswerError: no line to take it is known; or another release took its place.
        LinkError: the broker refuses us, or was not reached in time.
        StorageError: the file cannot be read any more.
    """
    view = FleetModels(topics)
    filters = (*view.filters(), topics.all_line_up())
    with (
        Session(broker, name="publish", filters=filters, connect_timeout_s=connect_timeout_s) as session,
        _Publisher(session, view, path, release, terms, topics, report) as publisher,
    ):
        return publisher.run()


class _Publisher:
    def __init__(
        self,
        session: Session,
        view: FleetModels,
        path: Path,
        release: Release,
        terms: ReleaseTerms,
        topics: Topics,
        report: Callable[[list[ReleaseProgress]], None],
    ) -> None:
        self._session = session
        self._view = view
        self._path = path
        self._terms = terms
        self._release = msgspec.structs.replace(release, lines=terms.lines, shadow_parts=terms.shadow_parts)
        self._topics = topics
        self._report = report
        self._expected: tuple[str, ...] = terms.lines
        self._outgoing: OutgoingBlob | None = None
        self._announced_at: int | None = None
        """The number of the connection on which the release was announced last."""
        self._is_heard = False
        """Our announcement came back; what comes after it is newer."""
        self._last_progress: list[ReleaseProgress] = []
        self._progress_at = 0.0

    def __enter__(self) -> _Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._outgoing is not None:
            self._outgoing.close()

    def run(self) -> list[ReleaseProgress]:
        for message in self._session.retained():
            self._handle_message(message)
        self._start()
        self._progress_at = time.monotonic()
        while True:
            self._send_chunks()
            received = self._session.receive(TICK_S)
            if received is not None:
                self._handle_message(received)
            # After a break the broker may have restarted, without what we had it keep.
            if self._announced_at != self._session.num_connects:
                self._announce()
            progress = self._update_progress()
            if not self._terms.stay and not unfinished_lines(progress):
                return progress
            silent_s = time.monotonic() - self._progress_at
            if not self._terms.stay and self._terms.timeout_s is not None and silent_s > self._terms.timeout_s:
                return progress

    def _start(self) -> None:
        """Decide which lines are to take it, continue a release that is announced already, and announce it."""
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
        if before is not None and not self._terms.force and _is_same(before, self._release):
            self._release = msgspec.structs.replace(
                self._release, release=before.release, published=before.published, name=before.name
            )
            log.info("release_continued", product=before.product, release=before.release[:8])
        self._announce()
        log.info(
            "release_announced",
            product=self._release.product,
            sha256=self._release.manifest.sha256[:12],
            release=self._release.release[:8],
            lines=", ".join(self._expected) or "none yet",
        )

    def _announce(self) -> None:
        chunk_bytes = self._session.chunk_bytes
        if self._outgoing is None or self._outgoing.sender.manifest.chunk_bytes != chunk_bytes:
            if self._outgoing is not None:
                self._outgoing.close()
            manifest = describe_file(self._path, chunk_bytes=chunk_bytes)
            if manifest.sha256 != self._release.manifest.sha256:
                raise PackageError(f"{self._path}: it changed while it was being published; publish it again")
            self._release = msgspec.structs.replace(self._release, manifest=manifest)
            self._outgoing = OutgoingBlob(self._path, manifest)
        self._session.publish(self._topics.release(self._release.product), encode_message(self._release), retain=True)
        self._announced_at = self._session.num_connects

    def _send_chunks(self) -> None:
        if self._outgoing is not None and self._session.is_up:
            sha256 = self._release.manifest.sha256
            self._outgoing.send_window(
                lambda index, data: self._session.publish(self._topics.release_chunk(sha256, index), data)
            )

    def _update_progress(self) -> list[ReleaseProgress]:
        """The progress of all lines; reports it when it has changed."""
        if self._terms.stay:
            self._expected = tuple(sorted({*self._expected, *self._view.lines_of(self._release.product)}))
        progress = [self._view.progress(line, self._release, self._terms.until) for line in self._expected]
        if progress != self._last_progress:
            self._last_progress = progress
            self._progress_at = time.monotonic()
            self._report(progress)
        return progress

    def _handle_message(self, message: ReceivedMessage) -> None:
        try:
            match self._topics.parse(message.topic):
                case MessageTopic(kind="line_up", line=str(line)):
                    self._handle_request(line, message.payload)
                case MessageTopic(kind="release", product=product) if (
                    product == self._release.product and self._announced_at is not None
                ):
                    self._handle_release(decode_release(message.payload, self._release.product))
                case _:
                    self._view.handle_message(message.topic, message.payload)
        except FederationError as exc:
            log.warning("message_refused", topic=message.topic, reason=str(exc))

    def _handle_request(self, line: str, payload: bytes) -> None:
        """Handle a line's request for the chunks that it lacks."""
        need = decode_need(payload)
        if self._outgoing is not None and need.sha256 == self._release.manifest.sha256:
            missing = unpack_mask(need.missing, self._release.manifest.num_chunks)
            self._outgoing.sender.handle_request(
                line, missing, resend=need.resend, now=time.monotonic(), window=need.window
            )

    def _handle_release(self, announced: Release) -> None:
        """Handle an announcement for the product: our own coming back, or a later one.

        Raises:
            NegativeAnswerError: ours was replaced or withdrawn.
        """
        if announced.release == self._release.release:
            self._is_heard = True
        elif self._is_heard:
            raise NegativeAnswerError(
                f"another release of {announced.product!r} took this one's place: {announced.name or announced.release}"
            )
        if announced.withdrawn and self._is_heard:
            raise NegativeAnswerError(f"this release of {announced.product!r} was withdrawn meanwhile")


def _is_same(before: Release, release: Release) -> bool:
    return not before.withdrawn and (before.manifest.sha256, before.lines, before.shadow_parts) == (
        release.manifest.sha256,
        release.lines,
        release.shadow_parts,
    )
