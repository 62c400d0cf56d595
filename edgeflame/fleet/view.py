"""A fleet as an onlooker sees it, put together from retained topics, heartbeats and answers. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeflame.errors import FederationError
from edgeflame.messages import (
    Heartbeat,
    Leaving,
    Offer,
    Refusal,
    RoundState,
    TaskFailed,
    Turned,
    decode_down,
    decode_presence,
    decode_round,
    decode_up,
)
from edgeflame.topics import Spoken, Topics

SILENT_S = 5.0
"""Sites speak every second; one that has not been heard for so long deserves a look."""
_SMOOTHING = 0.5
"""Weight of the newest interval in a rate."""
_WORDS = {
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
    heard_at: float | None = None
    activity: str = ""
    round: int = 0
    step: int = 0
    num_steps: int = 0
    steps_per_s: float = 0.0
    bytes_per_s: float | None = None
    """While something is sent or fetched."""
    paused: str | None = None
    """Why it is at rest; None: it is not."""
    error: str = ""
    """The last; it stays until another."""
    upload_chunk_bytes: int = field(default=0, repr=False)

    def link(self, now: float) -> str:
        """``online``, ``offline``, or how long it has been silent."""
        if not self.is_online:
            return "offline"
        silent_s = 0.0 if self.heard_at is None else now - self.heard_at
        return "online" if silent_s < SILENT_S else f"silent {silent_s:.0f} s"

    @property
    def doing(self) -> str:
        """In words."""
        if self.paused is not None:
            return f"is paused: {self.paused}" if self.paused else "is paused"
        return _WORDS.get(self.activity, self.activity)


class FleetView:
    """What is known; give it messages with :meth:`take`.

    Args:
        topics: the fleet's.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self.state: RoundState | None = None
        self.aggregator_online: bool | None = None
        """None: never heard of one."""
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

    def take(self, topic: str, payload: bytes, now: float) -> None:
        """A message came."""
        spoken = self._topics.parse(topic)
        if not isinstance(spoken, Spoken) or not payload:
            return
        try:
            self._take(spoken, payload, now)
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
                    "silent_s": None if site.heard_at is None else round(now - site.heard_at, 1),
                    "error": site.error or None,
                }
                for _, site in sorted(self.sites.items())
            ],
        }

    def problem(self) -> str | None:
        """Why all is not well; None if it is."""
        if self.state is None:
            return (
                "nothing was ever said about this fleet on the broker; is its name right, and its aggregator started?"
            )
        if self.state.phase == "failed":
            return f"the run failed: {self.state.detail}"
        if self.state.phase != "done" and not self.aggregator_online:
            return "the aggregator is offline in the middle of a run; start it again with the same --state"
        return None

    def _take(self, spoken: Spoken, payload: bytes, now: float) -> None:
        match spoken:
            case Spoken(kind="round"):
                self.state = decode_round(payload)
            case Spoken(kind="aggregator_presence"):
                self.aggregator_online = decode_presence(payload).online
            case Spoken(kind="site_presence", site=str(name)):
                self._site(name).is_online = decode_presence(payload).online
            case Spoken(kind="up", site=str(name)):
                site = self._site(name)
                site.is_online, before = True, site.heard_at
                site.heard_at = now
                match decode_up(payload):
                    case Heartbeat() as beat:
                        self._beat(site, beat, 0.0 if before is None else now - before)
                    case Offer() as offer:
                        site.upload_chunk_bytes = offer.manifest.chunk_bytes
                    case TaskFailed() as failed:
                        site.error = f"{failed.purpose} {failed.round}: {failed.detail}"
                    case Leaving() as leaving:
                        site.error = f"left for good: {leaving.detail}"
                    case _:
                        pass
            case Spoken(kind="down", site=str(name)):
                match decode_down(payload):
                    case Refusal() as refusal:
                        detail = f" ({refusal.detail})" if refusal.detail else ""
                        self._site(name).error = f"{refusal.purpose} {refusal.round} refused: {refusal.reason}{detail}"
                    case Turned() as turned:
                        self._site(name).error = f"turned away: {turned.detail}"
                    case _:
                        pass
            case _:
                pass

    def _site(self, name: str) -> SiteView:
        return self.sites.setdefault(name, SiteView(name=name))

    def _beat(self, site: SiteView, beat: Heartbeat, elapsed_s: float) -> None:
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
