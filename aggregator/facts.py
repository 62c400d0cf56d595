"""What happened in a run: the facts the journal keeps, and the state they add up to.

Facts are only ever added. The state of a run is the fold of its facts (:func:`apply`), so an aggregator that was
killed knows exactly what it knew, and nothing it had not yet written down was acted upon.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from aggregator.config import AggregateConfig
from edgeflame.messages import Phase, Reason


class _Fact(msgspec.Struct, frozen=True, kw_only=True, tag_field="fact"):
    pass


class RunStarted(_Fact, frozen=True, kw_only=True, tag="run_started"):
    """A run waits for sites."""

    run: str
    config: AggregateConfig
    time: str
    """UTC, ISO 8601."""


class SiteJoined(_Fact, frozen=True, kw_only=True, tag="site_joined"):
    """A site is ready to take part; ``install`` tells it from another of the same name."""

    site: str
    install: str
    initial: str
    """SHA-256 of its initial model."""


class SourceChosen(_Fact, frozen=True, kw_only=True, tag="source_chosen"):
    """The site whose initial model the run starts from."""

    site: str


class InitialAccepted(_Fact, frozen=True, kw_only=True, tag="initial_accepted"):
    site: str
    sha256: str
    size_bytes: int


class InitialRefused(_Fact, frozen=True, kw_only=True, tag="initial_refused"):
    site: str
    reason: Reason
    detail: str


class RoundStarted(_Fact, frozen=True, kw_only=True, tag="round_started"):
    round: int
    asked: tuple[str, ...]
    """In sorted order."""


class UpdateAccepted(_Fact, frozen=True, kw_only=True, tag="update_accepted"):
    round: int
    site: str
    sha256: str
    num_samples: int
    num_steps: int = 0
    """0: the site did not say."""
    metrics: dict[str, float]
    relative_change: float


class UpdateRefused(_Fact, frozen=True, kw_only=True, tag="update_refused"):
    round: int
    site: str
    sha256: str | None
    reason: Reason
    detail: str


class RoundClosed(_Fact, frozen=True, kw_only=True, tag="round_closed"):
    """The contributors are fixed; the asked sites that are neither accepted nor refused were left out."""

    round: int
    left_out: tuple[str, ...]


class ModelMade(_Fact, frozen=True, kw_only=True, tag="model_made"):
    """The round's global model is on disk."""

    round: int
    sha256: str
    size_bytes: int


class SiteFinished(_Fact, frozen=True, kw_only=True, tag="site_finished"):
    site: str
    package: str | None
    summary: dict[str, float | str]


class SiteNotFinished(_Fact, frozen=True, kw_only=True, tag="site_not_finished"):
    """A site said that it cannot make its package."""

    site: str
    detail: str


class RunEnded(_Fact, frozen=True, kw_only=True, tag="run_ended"):
    succeeded: bool
    reason: str
    """Why it failed; empty if it did not."""


Fact = (
    RunStarted
    | SiteJoined
    | SourceChosen
    | InitialAccepted
    | InitialRefused
    | RoundStarted
    | UpdateAccepted
    | UpdateRefused
    | RoundClosed
    | ModelMade
    | SiteFinished
    | SiteNotFinished
    | RunEnded
)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round as it stands."""

    number: int
    base: str
    """SHA-256 of its base model."""
    asked: tuple[str, ...]
    accepted: dict[str, UpdateAccepted] = field(default_factory=dict)
    refused: dict[str, UpdateRefused] = field(default_factory=dict)
    """The last refusal of each site that was not accepted afterwards."""
    left_out: tuple[str, ...] = ()
    is_closed: bool = False
    model: str | None = None

    @property
    def open_sites(self) -> tuple[str, ...]:
        """Asked, and neither accepted nor refused."""
        return tuple(site for site in self.asked if site not in self.accepted and site not in self.refused)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as it stands."""

    run: str
    config: AggregateConfig
    started: str
    phase: Phase = "waiting"
    members: dict[str, SiteJoined] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    """Who was asked for the initial model, the last of them now."""
    refused_sources: dict[str, InitialRefused] = field(default_factory=dict)
    initial: InitialAccepted | None = None
    model: str | None = None
    """SHA-256 of the newest global model."""
    rounds: tuple[Round, ...] = ()
    finished: dict[str, SiteFinished] = field(default_factory=dict)
    not_finished: dict[str, str] = field(default_factory=dict)
    ended: RunEnded | None = None

    @property
    def round(self) -> Round | None:
        """The newest round."""
        return self.rounds[-1] if self.rounds else None


def begin(fact: RunStarted) -> RunState:
    """The state after the first fact."""
    return RunState(run=fact.run, config=fact.config, started=fact.time)


def apply(state: RunState, fact: Fact) -> RunState:
    """The state after one more fact."""
    match fact:
        case RunStarted():
            return begin(fact)
        case SiteJoined():
            return replace(state, members={**state.members, fact.site: fact})
        case SourceChosen():
            return replace(state, phase="initialise", sources=(*state.sources, fact.site))
        case InitialAccepted():
            return replace(state, initial=fact, model=fact.sha256)
        case InitialRefused():
            return replace(state, refused_sources={**state.refused_sources, fact.site: fact})
        case RoundStarted():
            assert state.model is not None
            new = Round(number=fact.round, base=state.model, asked=fact.asked)
            return replace(state, phase="train", rounds=(*state.rounds, new))
        case SiteFinished():
            return replace(state, finished={**state.finished, fact.site: fact})
        case SiteNotFinished():
            return replace(state, not_finished={**state.not_finished, fact.site: fact.detail})
        case RunEnded():
            return replace(state, phase="done" if fact.succeeded else "failed", ended=fact)
        case UpdateAccepted() | UpdateRefused() | RoundClosed() | ModelMade():
            return _apply_to_round(state, fact)


def _apply_to_round(state: RunState, fact: UpdateAccepted | UpdateRefused | RoundClosed | ModelMade) -> RunState:
    current = state.rounds[-1]
    match fact:
        case UpdateAccepted():
            refused = {site: refusal for site, refusal in current.refused.items() if site != fact.site}
            current = replace(current, accepted={**current.accepted, fact.site: fact}, refused=refused)
        case UpdateRefused():
            current = replace(current, refused={**current.refused, fact.site: fact})
        case RoundClosed():
            current = replace(current, left_out=fact.left_out, is_closed=True)
        case ModelMade():
            current = replace(current, model=fact.sha256)
            last = fact.round == state.config.rounds
            state = replace(state, model=fact.sha256, phase="finish" if last else state.phase)
    return replace(state, rounds=(*state.rounds[:-1], current))
