"""Observing a fleet over MQTT: its training run and sites, and its releases and lines.

:class:`FleetView` is put together from retained topics, heartbeats and answers; :class:`FleetModels` from what is
retained about releases and lines. Both are pure; a session with the broker fills them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from edgeflame.errors import FederationError
from edgeflame.mqtt.messages import (
    MAX_MESSAGE_BYTES,
    Heartbeat,
    Leaving,
    Offer,
    Refusal,
    RoundState,
    TaskFailed,
    TurnedAway,
    decode_down,
    decode_presence,
    decode_round,
    decode_up,
)
from edgeflame.mqtt.release_messages import LineModels, ProductModels, Release, decode_line_models, decode_release
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import MessageTopic, Topics

SILENT_S = 5.0
"""Sites send a heartbeat every second; one without any for so long is shown as silent."""
_SMOOTHING = 0.5
"""Weight of the newest interval in a rate."""
_ACTIVITY_TEXTS = {
    "wait": "waits",
    "prepare": "makes its initial model",
    "offerinitial": "sends its initial model",
    "fetch": "fetches the model",
    "train": "trains",
    "offerupdate": "sends its update",
    "gather": "fits its statistics",
    "offerstatistics": "sends its statistics",
    "finish": "makes its package",
    "report": "reports",
    "tellfailure": "has failed",
}
_UPLOADS, _DOWNLOADS = ("offerinitial", "offerupdate", "offerstatistics"), ("fetch",)


@dataclass
class SiteView:
    """A site; times are a monotonic clock's, seconds."""

    name: str
    is_online: bool = False
    last_seen_at: float | None = None
    activity: str = ""
    round: int = 0
    step: int = 0
    num_steps: int = 0
    steps_per_s: float = 0.0
    bytes_per_s: float | None = None
    """While something is sent or fetched."""
    paused: str | None = None
    """Why it is paused; None if it is not."""
    error: str = ""
    """The last error; it stays until another comes."""
    upload_chunk_bytes: int = field(default=0, repr=False)

    def link(self, now: float) -> str:
        """``online``, ``offline``, or how long it has been silent."""
        if not self.is_online:
            return "offline"
        silent_s = 0.0 if self.last_seen_at is None else now - self.last_seen_at
        return "online" if silent_s < SILENT_S else f"silent {silent_s:.0f} s"

    @property
    def activity_text(self) -> str:
        """What the site does, for people."""
        if self.paused is not None:
            return f"is paused: {self.paused}" if self.paused else "is paused"
        return _ACTIVITY_TEXTS.get(self.activity, self.activity)


class FleetView:
    """The state of a fleet's run and sites, put together from the messages passed to :meth:`handle_message`.

    Args:
        topics: the fleet's.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self.state: RoundState | None = None
        self.aggregator_online: bool | None = None
        """None until one has announced itself."""
        self.sites: dict[str, SiteView] = {}
        self.num_unreadable = 0

    def filters(self) -> tuple[str, ...]:
        """What to subscribe to."""
        base = self._topics.base
        return (
            self._topics.round,
            self._topics.aggregator_presence,
            self._topics.all_site_presences(),
            f"{base}/site/+/up/message",
            f"{base}/site/+/down/message",
        )

    def handle_message(self, topic: str, payload: bytes, now: float) -> None:
        """Take a message into account; one that cannot be read is counted in ``num_unreadable``."""
        address = self._topics.parse(topic)
        if not isinstance(address, MessageTopic) or not payload:
            return
        try:
            self._apply(address, payload, now)
        except FederationError:
            self.num_unreadable += 1

    def as_data(self, now: float) -> dict[str, Any]:
        """All of it, for JSON."""
        state = self.state
        return {
            "fleet": self._topics.fleet,
            "aggregator_online": bool(self.aggregator_online),
            "run": None if state is None else state.run,
            "phase": None if state is None else state.phase,
            "round": None if state is None else state.round,
            "num_rounds": None if state is None else state.num_rounds,
            "asked": [] if state is None else list(state.asked),
            "model_sha256": None if state is None or state.base is None else state.base.sha256,
            "detail": "" if state is None else state.detail,
            "unreadable_messages": self.num_unreadable,
            "sites": [
                {
                    "site": site.name,
                    "link": site.link(now),
                    "activity": site.activity or None,
                    "paused": site.paused,
                    "round": site.round,
                    "step": site.step,
                    "num_steps": site.num_steps,
                    "steps_per_s": round(site.steps_per_s, 3),
                    "bytes_per_s": None if site.bytes_per_s is None else round(site.bytes_per_s),
                    "silent_s": None if site.last_seen_at is None else round(now - site.last_seen_at, 1),
                    "error": site.error or None,
                }
                for _, site in sorted(self.sites.items())
            ],
        }

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to a good end. Its aggregator and sites then leave, by and by."""
        return self.state is not None and self.state.phase == "done"

    def problem(self) -> str | None:
        """Why the run needs attention: it failed, or its aggregator is gone or unknown; None if all is well."""
        if self.state is None:
            return (
                "nothing was ever said about this fleet on the broker; is its name right, and its aggregator started?"
            )
        if self.state.phase == "failed":
            return f"the run failed: {self.state.detail}"
        if not self.is_finished and not self.aggregator_online:
            return "the aggregator is offline in the middle of a run; start it again with the same --state"
        return None

    def _apply(self, address: MessageTopic, payload: bytes, now: float) -> None:
        match address:
            case MessageTopic(kind="round"):
                self.state = decode_round(payload)
            case MessageTopic(kind="aggregator_presence"):
                self.aggregator_online = decode_presence(payload).online
            case MessageTopic(kind="site_presence", site=str(name)):
                self._site(name).is_online = decode_presence(payload).online
            case MessageTopic(kind="up", site=str(name)):
                site = self._site(name)
                site.is_online, before = True, site.last_seen_at
                site.last_seen_at = now
                match decode_up(payload):
                    case Heartbeat() as beat:
                        self._apply_heartbeat(site, beat, 0.0 if before is None else now - before)
                    case Offer() as offer:
                        site.upload_chunk_bytes = offer.manifest.chunk_bytes
                    case TaskFailed() as failed:
                        site.error = f"{failed.purpose} {failed.round}: {failed.detail}"
                    case Leaving() as leaving:
                        site.error = f"left for good: {leaving.detail}"
                    case _:
                        pass
            case MessageTopic(kind="down", site=str(name)):
                match decode_down(payload):
                    case Refusal() as refusal:
                        detail = f" ({refusal.detail})" if refusal.detail else ""
                        self._site(name).error = f"{refusal.purpose} {refusal.round} refused: {refusal.reason}{detail}"
                    case TurnedAway() as turned:
                        self._site(name).error = f"turned away: {turned.detail}"
                    case _:
                        pass
            case _:
                pass

    def _site(self, name: str) -> SiteView:
        return self.sites.setdefault(name, SiteView(name=name))

    def _apply_heartbeat(self, site: SiteView, beat: Heartbeat, elapsed_s: float) -> None:
        same = (site.activity, site.round, site.num_steps) == (beat.activity, beat.round, beat.num_steps)
        if not same or beat.step < site.step:
            site.steps_per_s = 0.0
        elif elapsed_s > 0:
            newest = (beat.step - site.step) / elapsed_s
            site.steps_per_s += _SMOOTHING * (newest - site.steps_per_s) if site.steps_per_s else newest
        site.paused = beat.paused
        site.activity, site.round = beat.activity, beat.round
        site.step, site.num_steps = beat.step, beat.num_steps
        chunk_bytes = 0
        if beat.activity in _UPLOADS:
            chunk_bytes = site.upload_chunk_bytes
        elif beat.activity in _DOWNLOADS and self.state is not None and self.state.base is not None:
            chunk_bytes = self.state.base.chunk_bytes
        site.bytes_per_s = site.steps_per_s * chunk_bytes if chunk_bytes else None


def listen(session: Session, view: FleetView, seconds: float) -> None:
    """Pass a view the messages of the next ``seconds``, from a session that is subscribed to its filters.

    Raises:
        LinkError: the broker refuses us.
    """
    for message in session.messages(seconds):
        view.handle_message(message.topic, message.payload, time.monotonic())


WaitUntil = Literal["checked", "running"]
"""What is waited for: a line has the package whole and found it good (``checked``), or judges with it (``running``)."""

_GOOD_FATES = ("running", "confirmed")
_CHECKED_STAGES = ("shadow", "waiting")


class ReleaseProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one line is with one release."""

    line: str
    word: str
    """A stage, a fate, or ``not_heard_of``, ``announced``, ``other_product``."""
    done: int = 0
    total: int = 0
    detail: str = ""
    is_over: bool = False
    """The line needs no more waiting for: it has, runs or refused the release, or does not run the product."""
    is_good: bool = False
    """The line has reached the state that is waited for (:data:`WaitUntil`)."""

    def in_words(self) -> str:
        """The progress as text, for people."""
        how_far = f" {self.done}/{self.total}" if self.total else ""
        return f"{self.word.replace('_', ' ')}{how_far}" + (f": {self.detail}" if self.detail else "")


class _LinePresence(msgspec.Struct):
    online: bool = False


class FleetModels:
    """Releases and lines of a fleet, put together from the messages passed to :meth:`handle_message`.

    Args:
        topics: the fleet's.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self.releases: dict[str, Release] = {}
        """The release of each product."""
        self.lines: dict[str, LineModels] = {}
        self.online: dict[str, bool] = {}
        self.num_unreadable = 0

    def filters(self) -> tuple[str, ...]:
        """What to subscribe to."""
        return (
            self._topics.all_releases(),
            self._topics.all_line_models(),
            f"{self._topics.base}/line/+/state",
        )

    def handle_message(self, topic: str, payload: bytes) -> None:
        """Take a message into account; one that cannot be read is counted in ``num_unreadable``."""
        if not payload:
            return
        match topic.removeprefix(f"{self._topics.base}/").split("/"):
            case ["line", line, "state"] if len(payload) <= MAX_MESSAGE_BYTES:
                try:
                    self.online[line] = msgspec.json.decode(payload, type=_LinePresence).online
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    self.num_unreadable += 1
                return
        try:
            match self._topics.parse(topic):
                case MessageTopic(kind="release", product=str(product)):
                    self.releases[product] = decode_release(payload, product)
                case MessageTopic(kind="line_models", line=str(line)):
                    self.lines[line] = decode_line_models(payload)
                case _:
                    pass
        except FederationError:
            self.num_unreadable += 1

    def lines_of(self, product: str) -> tuple[str, ...]:
        """The lines that run a product."""
        return tuple(sorted(line for line, models in self.lines.items() if models.of(product) is not None))

    def progress(self, line: str, release: Release, until: WaitUntil) -> ReleaseProgress:
        """How far a line is with a release."""
        models = self.lines.get(line)
        if models is None:
            return ReleaseProgress(line=line, word="not_heard_of")
        entry = models.of(release.product)
        if entry is None:
            products = ", ".join(one.product for one in models.products) or "nothing"
            detail = f"the line runs {products}"
            return ReleaseProgress(line=line, word="other_product", detail=detail, is_over=True)
        return _progress_of(line, entry, release.release, until)

    def as_data(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "fleet": self._topics.fleet,
            "unreadable_messages": self.num_unreadable,
            "releases": [
                {
                    "product": one.product,
                    "release": one.release,
                    "sha256": one.manifest.sha256,
                    "size_bytes": one.manifest.size_bytes,
                    "key": one.key,
                    "name": one.name,
                    "published": one.published,
                    "lines": one.lines,
                    "shadow_parts": one.shadow_parts,
                    "withdrawn": one.withdrawn,
                }
                for _, one in sorted(self.releases.items())
            ],
            "lines": [
                {"line": line, "online": self.online.get(line, False), "products": models.products}
                for line, models in sorted(self.lines.items())
            ],
        }


def _progress_of(line: str, entry: ProductModels, release: str, until: WaitUntil) -> ReleaseProgress:
    outcome = entry.outcome(release)
    if outcome is not None:
        is_good = outcome.fate in _GOOD_FATES
        reason = "" if outcome.reason is None else outcome.reason.replace("_", " ")
        detail = "" if is_good else ": ".join(text for text in (reason, outcome.detail) if text)
        return ReleaseProgress(line=line, word=outcome.fate, detail=detail, is_over=True, is_good=is_good)
    candidate = entry.candidate
    if candidate is None or candidate.release != release:
        return ReleaseProgress(line=line, word="announced")
    is_good = until == "checked" and candidate.stage in _CHECKED_STAGES
    # A line that waits for a person's decision may wait for days; the publisher does not.
    is_over = is_good or candidate.stage == "waiting"
    return ReleaseProgress(
        line=line,
        word=candidate.stage,
        done=candidate.done,
        total=candidate.total,
        detail=candidate.detail,
        is_over=is_over,
        is_good=is_good,
    )


def unfinished_lines(standings: Sequence[ReleaseProgress]) -> tuple[str, ...]:
    """The lines that are still waited for."""
    return tuple(one.line for one in standings if not one.is_over)
