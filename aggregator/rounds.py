"""The round machine: every transition of a run, pure. What happened goes in, what is to be done comes out.

Theory of operation
-------------------
A run goes through these phases::

    waiting ──enough sites are ready──> initialise ──initial model accepted──> train (round 1..R)
                                            │                                    │
                                            │ no site can give one               │ round R's model is made
                                            v                                    v
                                          failed <──quorum missed── (statistics) ──> finish ──> done

    waiting     Sites say that they are ready (data, worker and an initial model at hand).
    initialise  One site, the first by name, is asked for its initial model. If it is refused or silent, the next.
    train       A sample of the members is asked. Each asked site ends up accepted, refused (bad update, or it says
                that it cannot), or left out (no progress for ``deadline_s``). When none is open the round closes:
                with a quorum of accepted updates the next model is made of them, without one the run fails.
    statistics  Only where statistics are federated. Each member is asked for its own with the final model, and ends
                up as in a round: round 0 of the journal, with the same quorum. Then they are pooled.
    finish      Each member makes its package from the final model, and says so; who is silent is left out.
    done/failed Nothing more happens.

Everything decided is a :class:`~aggregator.facts.Fact`. A call returns the facts it decided on, as
:class:`Record` outputs, before the outputs that act on them; the caller writes all facts of a call in one
transaction before it does anything else. A restarted aggregator folds the facts into the same state and calls
:meth:`RoundMachine.resume`, which asks for whatever that state still waits for.

What is *not* journalled is who made progress when. It only delays the deadline: after a restart every site has
the whole of it again.

Answers are idempotent. An offer that was accepted gets its receipt again, one that was refused its refusal; an
offer is judged by the state at hand, so nothing depends on the order or number of messages. A site that was left
out is not asked in the next rounds until it shows progress again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from aggregator.answers import implausible, known_answer, receipt, refusal
from aggregator.facts import (
    Fact,
    InitialAccepted,
    InitialRefused,
    ModelMade,
    Round,
    RoundClosed,
    RoundStarted,
    RunEnded,
    RunState,
    SiteFinished,
    SiteJoined,
    SiteNotFinished,
    SourceChosen,
    StatisticsMade,
    UpdateAccepted,
    UpdateRefused,
    apply,
)
from aggregator.models import Verdict
from edgeflame.messages import DownMessage, FinishReport, Offer, Reason, Receipt, Refusal, TaskFailed


@dataclass(frozen=True, kw_only=True)
class Record:
    """Write a fact to the journal, before anything after it."""

    fact: Fact


@dataclass(frozen=True, kw_only=True)
class Announce:
    """Publish the run's state to all."""


@dataclass(frozen=True, kw_only=True)
class Tell:
    """Send a message to a site."""

    site: str
    message: DownMessage


@dataclass(frozen=True, kw_only=True)
class Receive:
    """Fetch the offered blob, check it, and report :meth:`RoundMachine.checked`."""

    site: str
    offer: Offer


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make the round's model from its accepted updates, and report :meth:`RoundMachine.merged`; or pool the accepted
    statistics, and report :meth:`RoundMachine.pooled`.
    """

    round: Round


Output = Record | Announce | Tell | Receive | Merge


class RoundMachine:
    """A run; ``now`` is a monotonic clock's reading in seconds.

    Args:
        state: as the journal has it.
        now: see above.
    """

    def __init__(self, state: RunState, *, now: float) -> None:
        self._state = state
        self._progress: dict[str, float] = dict.fromkeys(state.members, now)
        self._restarted_at = now
        self._returned: set[str] = set()

    @property
    def state(self) -> RunState:
        return self._state

    def resume(self, now: float) -> list[Output]:
        """Ask again for what the state waits for; call it once after construction."""
        outputs: list[Output] = [Announce()]
        current = self._state.gathering
        is_open = self._state.phase in ("train", "statistics")
        if is_open and current is not None and current.is_closed and current.model is None:
            outputs.append(Merge(round=current))
        return outputs + self._start_if_enough(now)

    def ready(self, site: str, *, install: str, initial: str, now: float) -> list[Output]:
        """A site can take part. Repeated; only the first time matters."""
        known = self._state.members.get(site)
        if self._state.ended or (known is not None and (known.install, known.initial) == (install, initial)):
            return []
        self._progress[site] = now
        joined = self._record(SiteJoined(site=site, install=install, initial=initial))
        return [*joined, *self._start_if_enough(now)]

    def progressed(self, site: str, now: float, *, is_ready: bool = True) -> None:
        """A site is a step further: it trained, sent or fetched something new.

        ``is_ready`` is false while it prepares, or on its way out after a failure: that brings no lost site back.
        """
        self._progress[site] = now
        if is_ready:
            self._returned.add(site)

    def offered(self, site: str, offer: Offer, now: float) -> list[Output]:
        """A site has a model for us; maybe not for the first time."""
        if (known := known_answer(self._state, site, offer)) is not None:
            return [Tell(site=site, message=known)]
        if (verdict := implausible(self._state, offer)) is not None:
            return self.checked(site, offer, verdict, now)
        return [Receive(site=site, offer=offer)]

    def checked(self, site: str, offer: Offer, verdict: Verdict, now: float) -> list[Output]:
        """An offered model has arrived, and this is what the checks say."""
        # The state may have changed while it arrived.
        if (known := known_answer(self._state, site, offer)) is not None:
            return [Tell(site=site, message=known)]
        if offer.purpose == "initial":
            return self._checked_initial(site, offer, verdict, now)
        sha256 = offer.manifest.sha256
        if verdict.reason is not None:
            fact: Fact = UpdateRefused(
                round=offer.round,
                site=site,
                sha256=sha256,
                reason=verdict.reason,
                detail=verdict.detail,
                purpose=offer.purpose,
            )
            answer: DownMessage = refusal(offer, verdict.reason, verdict.detail)
        else:
            fact = UpdateAccepted(
                round=offer.round,
                site=site,
                sha256=sha256,
                num_samples=offer.num_samples,
                num_steps=offer.num_steps,
                metrics=offer.metrics,
                relative_change=verdict.relative_change,
                purpose=offer.purpose,
            )
            answer = receipt(offer)
        return [*self._record(fact), Tell(site=site, message=answer), *self._close_if_complete(now)]

    def task_failed(self, site: str, message: TaskFailed, now: float) -> list[Output]:
        """A site says that it cannot do its part."""
        state, current = self._state, self._state.gathering
        reply = Refusal(
            run=message.run, purpose=message.purpose, round=message.round, reason="failed", detail=message.detail
        )
        outputs: list[Output] = []
        if message.run == state.run and site in state.members and state.ended is None:
            if message.purpose == "initial" and state.phase == "initialise" and state.sources[-1] == site:
                refused = InitialRefused(site=site, reason="failed", detail=message.detail)
                outputs = [*self._record(refused), *self._next_source(now)]
            elif (
                current is not None
                and (message.purpose, message.round) == (current.purpose, current.number)
                and not current.is_closed
                and site in current.open_sites
            ):
                fact = UpdateRefused(
                    round=current.number,
                    site=site,
                    sha256=None,
                    reason="failed",
                    detail=message.detail,
                    purpose=current.purpose,
                )
                self._returned.discard(site)
                outputs = [*self._record(fact), *self._close_if_complete(now)]
            elif message.purpose == "finish" and state.phase == "finish" and site not in state.not_finished:
                outputs = [
                    *self._record(SiteNotFinished(site=site, detail=message.detail)),
                    *self._end_if_finished(now),
                ]
        return [*outputs, Tell(site=site, message=reply)]

    def merged(self, number: int, *, sha256: str, size_bytes: int, now: float) -> list[Output]:
        """A round's model is on disk."""
        outputs = self._record(ModelMade(round=number, sha256=sha256, size_bytes=size_bytes))
        if self._state.phase == "finish":
            self._restart_deadlines(now)
            return [*outputs, Announce()]
        if self._state.is_trained:
            self._restart_deadlines(now)
            asked = tuple(self.available_sites())
            return [*outputs, *self._record(RoundStarted(round=0, asked=asked, purpose="statistics")), Announce()]
        return [*outputs, *self._start_round(number + 1, now)]

    def pooled(self, *, sha256: str, size_bytes: int, truncation: dict[str, float], now: float) -> list[Output]:
        """The pooled statistics are on disk."""
        self._restart_deadlines(now)
        made = StatisticsMade(sha256=sha256, size_bytes=size_bytes, truncation=truncation)
        return [*self._record(made), Announce()]

    def finish_reported(self, site: str, report: FinishReport, now: float) -> list[Output]:
        """A site made its package."""
        state = self._state
        if report.run != state.run or site not in state.members or report.model != state.model:
            reason: Reason = "unknown_run" if report.run != state.run else "stale_round"
            detail = "the report is not of this run's final model by a member of it"
            answer = Refusal(run=report.run, purpose="finish", round=0, reason=reason, detail=detail)
            return [Tell(site=site, message=answer)]
        outputs: list[Output] = []
        if state.phase == "finish" and site not in state.finished:
            outputs = self._record(SiteFinished(site=site, package=report.package, summary=report.summary))
        outputs.append(Tell(site=site, message=Receipt(run=state.run, purpose="finish", round=0)))
        return [*outputs, *self._end_if_finished(now)]

    def tick(self, now: float) -> list[Output]:
        """Time passes; call it at least every second."""
        state, current = self._state, self._state.gathering
        match state.phase:
            case "initialise" if state.initial is None and self._is_silent(state.sources[-1], now):
                return self._next_source(now)
            case "train" | "statistics" if current is not None and not current.is_closed:
                if all(self._is_silent(site, now) for site in current.open_sites):
                    return self._close(now)
            case "finish":
                return self._end_if_finished(now)
            case _:
                pass
        return []

    # Transitions.

    def _record(self, fact: Fact) -> list[Output]:
        self._state = apply(self._state, fact)
        return [Record(fact=fact)]

    def _start_if_enough(self, now: float) -> list[Output]:
        state, config = self._state, self._state.config
        if state.phase != "waiting":
            return []
        ready = set(state.members)
        enough = ready.issuperset(config.expected_sites) and len(ready) >= (
            len(config.expected_sites) or config.min_sites
        )
        return self._next_source(now) if enough else []

    def _next_source(self, now: float) -> list[Output]:
        candidates = sorted(self._state.members.keys() - set(self._state.sources))
        if not candidates:
            return self._end(succeeded=False, reason="no site could give an initial model")
        self._restart_deadlines(now)
        return [*self._record(SourceChosen(site=candidates[0])), Announce()]

    def _checked_initial(self, site: str, offer: Offer, verdict: Verdict, now: float) -> list[Output]:
        if verdict.reason is not None:
            refused = InitialRefused(site=site, reason=verdict.reason, detail=verdict.detail)
            answer = Tell(site=site, message=refusal(offer, verdict.reason, verdict.detail))
            return [*self._record(refused), *self._next_source(now), answer]
        manifest = offer.manifest
        accepted = InitialAccepted(site=site, sha256=manifest.sha256, size_bytes=manifest.size_bytes)
        return [*self._record(accepted), *self._start_round(1, now), Tell(site=site, message=receipt(offer))]

    def _start_round(self, number: int, now: float) -> list[Output]:
        config = self._state.config
        candidates = self.available_sites()
        asked = sorted(random.Random(f"{config.seed}:{number}").sample(candidates, config.sample_size(len(candidates))))
        self._restart_deadlines(now)
        return [*self._record(RoundStarted(round=number, asked=tuple(asked))), Announce()]

    def available_sites(self) -> list[str]:
        """Members that may be asked, sorted: all but those that were lost and not heard of since."""
        lost: set[str] = set()
        for entry in (*self._state.rounds, *filter(None, [self._state.statistics])):
            failed = {site for site, refusal in entry.refused.items() if refusal.reason == "failed"}
            lost = (lost - entry.accepted.keys() - entry.refused.keys()) | failed | set(entry.left_out)
        members = set(self._state.members)
        # If all are lost they are asked all the same; the deadline will tell.
        return sorted(members - (lost - self._returned) or members)

    def _close_if_complete(self, now: float) -> list[Output]:
        current = self._state.gathering
        assert current is not None
        return [] if current.is_closed or current.open_sites else self._close(now)

    def _close(self, now: float) -> list[Output]:
        current = self._state.gathering
        assert current is not None
        self._returned -= set(current.open_sites)
        outputs = self._record(RoundClosed(round=current.number, left_out=current.open_sites, purpose=current.purpose))
        needed = self._state.config.replies_needed(len(current.asked))
        if len(current.accepted) < needed:
            came, asked = len(current.accepted), len(current.asked)
            which = "the statistics phase" if current.purpose == "statistics" else f"round {current.number}"
            reason = f"quorum missed in {which}: {came} of {asked} sites contributed, {needed} needed"
            return [*outputs, *self._end(succeeded=False, reason=reason)]
        self._restart_deadlines(now)
        assert self._state.gathering is not None
        return [*outputs, Merge(round=self._state.gathering)]

    def _end_if_finished(self, now: float) -> list[Output]:
        state = self._state
        if state.phase != "finish":
            return []
        settled = state.finished.keys() | state.not_finished.keys()
        if all(site in settled or self._is_silent(site, now) for site in self.available_sites()):
            return self._end(succeeded=True, reason="")
        return []

    def _end(self, *, succeeded: bool, reason: str) -> list[Output]:
        return [*self._record(RunEnded(succeeded=succeeded, reason=reason)), Announce()]

    def _is_silent(self, site: str, now: float) -> bool:
        return now - self._progress.get(site, self._restarted_at) >= self._state.config.deadline_s

    def _restart_deadlines(self, now: float) -> None:
        self._progress = dict.fromkeys(self._state.members, now)
