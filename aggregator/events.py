"""The events of a run, and the state that they add up to (event sourcing).

Whatever the aggregator decides is an :class:`Event`. Events are only ever appended to the journal, and the state of a
run is the fold of its events (:func:`apply_event`). So an aggregator that was killed knows after its restart exactly
what it knew before, and nothing that was not written down yet was acted upon.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from aggregator.config import AggregateConfig
from edgeflame.mqtt.messages import Phase, RefusalReason

RoundPurpose = Literal["update", "statistics"]
"""What sites are asked for: the updates of a round, or after the last round their statistics; these have round 0."""
PausedBy = Literal["site", "operator"]
"""Who paused a site: its own operator, or the aggregator's."""


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="fact"):
    pass


class RunStarted(_Event, frozen=True, kw_only=True, tag="run_started"):
    """A run waits for sites."""

    run: str
    config: AggregateConfig
    time: str
    """UTC, ISO 8601."""


class SiteJoined(_Event, frozen=True, kw_only=True, tag="site_joined"):
    """A site is ready to take part; ``install`` distinguishes it from another one of the same name."""

    site: str
    install: str
    initial: str
    """SHA-256 of its initial model."""


class InitialSiteChosen(_Event, frozen=True, kw_only=True, tag="source_chosen"):
    """The site whose initial model the run starts from."""

    site: str


class InitialModelAccepted(_Event, frozen=True, kw_only=True, tag="initial_accepted"):
    site: str
    sha256: str
    size_bytes: int


class InitialModelRefused(_Event, frozen=True, kw_only=True, tag="initial_refused"):
    site: str
    reason: RefusalReason
    detail: str


class RoundStarted(_Event, frozen=True, kw_only=True, tag="round_started"):
    round: int
    asked: tuple[str, ...]
    """In sorted order."""
    purpose: RoundPurpose = "update"


class UpdateAccepted(_Event, frozen=True, kw_only=True, tag="update_accepted"):
    round: int
    site: str
    sha256: str
    num_samples: int
    num_steps: int = 0
    """0 if the site did not say."""
    metrics: dict[str, float]
    relative_change: float
    purpose: RoundPurpose = "update"
    decoded: str | None = None
    """SHA-256 of the update in the store, where ``sha256`` is of an encoded one."""
    elapsed_s: float = 0.0
    """How long the round had lasted by then, seconds; 0 in journals that do not say."""


class UpdateRefused(_Event, frozen=True, kw_only=True, tag="update_refused"):
    round: int
    site: str
    sha256: str | None
    reason: RefusalReason
    detail: str
    purpose: RoundPurpose = "update"


class RoundClosed(_Event, frozen=True, kw_only=True, tag="round_closed"):
    """The contributors are fixed; the asked sites that are neither accepted nor refused were left out."""

    round: int
    left_out: tuple[str, ...]
    purpose: RoundPurpose = "update"
    paused: tuple[str, ...] = ()
    """Those of ``left_out`` that were paused; they do not count as lost."""
    overdue: tuple[str, ...] = ()
    """Those of ``left_out`` that went on when the round had lasted as long as it may (:mod:`aggregator.deadlines`)."""


class ModelAggregated(_Event, frozen=True, kw_only=True, tag="model_made"):
    """The round's global model is on disk."""

    round: int
    sha256: str
    size_bytes: int
    relative_change: float | None = None
    """The distance to the base model over the base model's norm; None if that is not defined."""


class StatisticsPooled(_Event, frozen=True, kw_only=True, tag="statistics_made"):
    """The pooled statistics are on disk. ``truncation``: see :class:`edgeflame.statistics.shared.Truncation`."""

    sha256: str
    size_bytes: int
    truncation: dict[str, float]


class SiteFinished(_Event, frozen=True, kw_only=True, tag="site_finished"):
    site: str
    package: str | None
    summary: dict[str, float | str]


class SiteNotFinished(_Event, frozen=True, kw_only=True, tag="site_not_finished"):
    """A site said that it cannot make its package."""

    site: str
    detail: str


class SitePaused(_Event, frozen=True, kw_only=True, tag="site_paused"):
    """A site is paused: it is not asked for anything."""

    site: str
    by: PausedBy
    reason: str


class SiteResumed(_Event, frozen=True, kw_only=True, tag="site_resumed"):
    """A site's own operator or the aggregator's no longer pauses it. It goes on when neither pauses it."""

    site: str
    by: PausedBy


class SiteLeft(_Event, frozen=True, kw_only=True, tag="site_left"):
    """A site, as this install, is no longer part of the run. It may come back as another install, by joining anew."""

    site: str
    install: str
    by: PausedBy
    detail: str


class RoundsEndedEarly(_Event, frozen=True, kw_only=True, tag="last_round"):
    """The rounds are over before their planned number, with the newest model as the final one: when the open round has
    its model, or at once if none is open.
    """

    cause: Literal["converged", "operator"]
    reason: str


class RunEnded(_Event, frozen=True, kw_only=True, tag="run_ended"):
    succeeded: bool
    reason: str
    """Why the run failed; empty if it did not."""


Event = (
    RunStarted
    | SiteJoined
    | InitialSiteChosen
    | InitialModelAccepted
    | InitialModelRefused
    | RoundStarted
    | UpdateAccepted
    | UpdateRefused
    | RoundClosed
    | ModelAggregated
    | StatisticsPooled
    | SiteFinished
    | SiteNotFinished
    | SitePaused
    | SiteResumed
    | SiteLeft
    | RoundsEndedEarly
    | RunEnded
)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round as it stands; or, as round 0, the statistics phase."""

    number: int
    base_sha256: str
    """Its base model."""
    asked: tuple[str, ...]
    accepted: dict[str, UpdateAccepted] = field(default_factory=dict)
    refused: dict[str, UpdateRefused] = field(default_factory=dict)
    """The last refusal of each site that was not accepted afterwards."""
    left_out: tuple[str, ...] = ()
    paused: tuple[str, ...] = ()
    """Those of ``left_out`` that were paused."""
    overdue: tuple[str, ...] = ()
    """Those of ``left_out`` that were overdue."""
    is_closed: bool = False
    result_sha256: str | None = None
    """Its result: the next model, or the pooled statistics."""
    purpose: RoundPurpose = "update"
    relative_change: float | None = None
    """As in :class:`ModelAggregated`."""
    num_refused: dict[str, int] = field(default_factory=dict)
    """How many updates of each site were refused."""
    refusals_by_reason: dict[RefusalReason, int] = field(default_factory=dict)

    @property
    def open_sites(self) -> tuple[str, ...]:
        """Sites that were asked and are neither accepted nor refused."""
        return tuple(site for site in self.asked if site not in self.accepted and site not in self.refused)

    def weights(self, *, equal: bool = False) -> dict[str, float]:
        """The weight of each accepted update, its share of the round's samples (or ``equal``); they sum to 1."""
        if equal:
            return {site: 1 / len(self.accepted) for site in sorted(self.accepted)}
        total = sum(update.num_samples for update in self.accepted.values())
        return {site: update.num_samples / total for site, update in sorted(self.accepted.items())}


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as it stands."""

    run: str
    config: AggregateConfig
    started: str
    phase: Phase = "waiting"
    members: dict[str, SiteJoined] = field(default_factory=dict)
    initial_sites_asked: tuple[str, ...] = ()
    """The sites that were asked for their initial model so far; the last of them is asked now."""
    refused_initial: dict[str, InitialModelRefused] = field(default_factory=dict)
    initial: InitialModelAccepted | None = None
    model: str | None = None
    """SHA-256 of the newest global model."""
    rounds: tuple[Round, ...] = ()
    statistics: Round | None = None
    truncation: dict[str, float] = field(default_factory=dict)
    finished: dict[str, SiteFinished] = field(default_factory=dict)
    not_finished: dict[str, str] = field(default_factory=dict)
    paused: dict[str, dict[PausedBy, str]] = field(default_factory=dict)
    """Paused sites: by whom, and why."""
    left: dict[str, SiteLeft] = field(default_factory=dict)
    """Members that left for good and have not joined again."""
    ended_early: RoundsEndedEarly | None = None
    ended: RunEnded | None = None

    @property
    def active_members(self) -> frozenset[str]:
        """Members that have not left."""
        return frozenset(self.members.keys() - self.left.keys())

    @property
    def rounds_over(self) -> bool:
        """Whether no further round is to begin."""
        return self.ended_early is not None or len(self.rounds) >= self.config.rounds

    @property
    def latest_round(self) -> Round | None:
        """The newest round of training."""
        return self.rounds[-1] if self.rounds else None

    @property
    def current_round(self) -> Round | None:
        """The round that was started last: the statistics phase, as round 0, or the newest round of training."""
        return self.statistics or self.latest_round

    @property
    def servable_blobs(self) -> frozenset[str]:
        """SHA-256 of the blobs that sites may still ask for: the newest model and the pooled statistics."""
        statistics = None if self.statistics is None else self.statistics.result_sha256
        return frozenset(sha256 for sha256 in (self.model, statistics) if sha256 is not None)

    @property
    def rounds_done(self) -> int:
        """Rounds whose model is made."""
        return sum(1 for entry in self.rounds if entry.result_sha256 is not None)

    @property
    def is_trained(self) -> bool:
        """Whether the final model is made."""
        return bool(self.rounds) and self.rounds[-1].result_sha256 is not None and self.rounds_over


def initial_state(event: RunStarted) -> RunState:
    """The state after the first event."""
    return RunState(run=event.run, config=event.config, started=event.time)


def apply_event(state: RunState, event: Event) -> RunState:
    """The state after one more event."""
    match event:
        case RunStarted():
            return initial_state(event)
        case SiteJoined():
            left = {site: gone for site, gone in state.left.items() if site != event.site}
            return replace(state, members={**state.members, event.site: event}, left=left)
        case InitialSiteChosen():
            return replace(state, phase="initialise", initial_sites_asked=(*state.initial_sites_asked, event.site))
        case InitialModelAccepted():
            return replace(state, initial=event, model=event.sha256)
        case InitialModelRefused():
            return replace(state, refused_initial={**state.refused_initial, event.site: event})
        case RoundStarted():
            assert state.model is not None
            new = Round(number=event.round, base_sha256=state.model, asked=event.asked, purpose=event.purpose)
            if event.purpose == "statistics":
                return replace(state, phase="statistics", statistics=new)
            return replace(state, phase="train", rounds=(*state.rounds, new))
        case StatisticsPooled():
            assert state.statistics is not None
            pooled = replace(state.statistics, result_sha256=event.sha256)
            return replace(state, phase="finish", statistics=pooled, truncation=event.truncation)
        case SiteFinished():
            return replace(state, finished={**state.finished, event.site: event})
        case SiteNotFinished():
            return replace(state, not_finished={**state.not_finished, event.site: event.detail})
        case SitePaused():
            reasons = {**state.paused.get(event.site, {}), event.by: event.reason}
            return replace(state, paused={**state.paused, event.site: reasons})
        case SiteResumed():
            reasons = {by: reason for by, reason in state.paused.get(event.site, {}).items() if by != event.by}
            others = {site: kept for site, kept in state.paused.items() if site != event.site}
            return replace(state, paused={**others, event.site: reasons} if reasons else others)
        case SiteLeft():
            paused = {site: kept for site, kept in state.paused.items() if site != event.site}
            return replace(state, left={**state.left, event.site: event}, paused=paused)
        case RoundsEndedEarly():
            state = replace(state, ended_early=event)
            return replace(state, phase=_phase_after_round(state))
        case RunEnded():
            return replace(state, phase="done" if event.succeeded else "failed", ended=event)
        case UpdateAccepted() | UpdateRefused() | RoundClosed() | ModelAggregated():
            return _apply_round_event(state, event)


def _apply_round_event(
    state: RunState, event: UpdateAccepted | UpdateRefused | RoundClosed | ModelAggregated
) -> RunState:
    if isinstance(event, ModelAggregated):
        current = replace(state.rounds[-1], result_sha256=event.sha256, relative_change=event.relative_change)
        state = replace(state, model=event.sha256, rounds=(*state.rounds[:-1], current))
        return replace(state, phase=_phase_after_round(state))
    gathered = state.statistics if event.purpose == "statistics" else state.latest_round
    assert gathered is not None
    current = gathered
    match event:
        case UpdateAccepted():
            refused = {site: refusal for site, refusal in current.refused.items() if site != event.site}
            current = replace(current, accepted={**current.accepted, event.site: event}, refused=refused)
        case UpdateRefused():
            by_site, by_reason = current.num_refused, current.refusals_by_reason
            current = replace(
                current,
                refused={**current.refused, event.site: event},
                num_refused={**by_site, event.site: by_site.get(event.site, 0) + 1},
                refusals_by_reason={**by_reason, event.reason: by_reason.get(event.reason, 0) + 1},
            )
        case RoundClosed():
            current = replace(
                current, left_out=event.left_out, paused=event.paused, overdue=event.overdue, is_closed=True
            )
    if event.purpose == "statistics":
        return replace(state, statistics=current)
    return replace(state, rounds=(*state.rounds[:-1], current))


def _phase_after_round(state: RunState) -> Phase:
    """``finish`` when the final model is made; where statistics are shared, these are gathered first."""
    finishes = state.phase == "train" and state.is_trained and state.config.statistics == "site"
    return "finish" if finishes else state.phase
