"""The round state machine: every transition of a run. Pure: inputs and timers go in, outputs to carry out come out.

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
                that it cannot), or left out (no progress for ``deadline_s``; or it is overdue, when the quorum has
                long been there). When none is open the round closes: with a quorum of accepted updates the next model
                is made of them, without one the run fails.
    statistics  Only where statistics are federated. Each member is asked for its own with the final model, and ends
                up as in a round: round 0 of the journal, with the same quorum. Then they are pooled.
    finish      Each member makes its package from the final model and reports it; silent ones are left out.
    done/failed Nothing more happens, except that an aggregator that stays records packages made late.

Three things may happen in any phase before the end:

    pause       A site, or the aggregator's operator, pauses a site. It is not asked and not missed: a round in
                which it was asked waits for it as long as for any other site; then it is left out without counting
                as lost, unless the quorum depends on it: while its heartbeats come the round waits, for nothing
                would be gained by failing. While every site is paused no round begins.
    leave       A site, or the operator, ends its part for good. What it has contributed stays; nothing is asked of
                it or waited for any more. It may come back as another install, by joining anew.
    early end   The rounds are over before their number when the configuration's criterion says that the model has
                converged (:mod:`aggregator.convergence`; from journalled events only), or the operator wants no further
                one; then the finish follows. ``stop`` ends the run.

Every decision is an :class:`~aggregator.events.Event`. A call returns the events it decided on, as outputs
(:mod:`aggregator.outputs`), before the outputs that act on them; the caller writes all events of a call in one
transaction before it does anything else. A restarted aggregator folds the events into the same state and calls
:meth:`RoundMachine.restart`, which asks for whatever that state still waits for.

Whom a step waits for, and for how long, is in :mod:`aggregator.deadlines`. Who made progress when, and who was heard
when, is *not* journalled. It only delays the deadline: after a restart every site has the whole of it again.

A site that joins, leaves, pauses or goes on more often than :mod:`aggregator.allowances` lets it is not listened to
until it may again: it would fill the journal.

Answers are idempotent. An offer that was accepted gets its receipt again, one that was refused its refusal; an
offer is checked against the state at hand, so nothing depends on the order or number of messages. A site that was left
out is not asked in the next rounds until it shows progress again.
"""

from __future__ import annotations

import random

from aggregator.allowances import change_allowances
from aggregator.convergence import convergence_reason
from aggregator.deadlines import Deadlines
from aggregator.events import (
    Event,
    InitialModelAccepted,
    InitialModelRefused,
    InitialSiteChosen,
    ModelAggregated,
    PausedBy,
    Round,
    RoundClosed,
    RoundsEndedEarly,
    RoundStarted,
    RunEnded,
    RunState,
    SiteFinished,
    SiteJoined,
    SiteLeft,
    SiteNotFinished,
    SitePaused,
    SiteResumed,
    StatisticsPooled,
    UpdateAccepted,
    UpdateRefused,
    apply_event,
)
from aggregator.exchanges import ValidationResult
from aggregator.outputs import (
    AggregateRound,
    DismissSite,
    PublishState,
    ReceiveUpload,
    RecordEvent,
    RoundOutput,
    SendToSite,
)
from aggregator.validation import answer_from_state, receipt_for, refusal_for, validate_offer
from edgeflame.mqtt.messages import DownMessage, FinishReport, Offer, Receipt, Refusal, RefusalReason, TaskFailed


class RoundMachine:
    """The state machine of a run; ``now`` is a monotonic clock's reading in seconds.

    Args:
        state: the run as the journal has it.
        now: monotonic clock, seconds.
    """

    def __init__(self, state: RunState, *, now: float) -> None:
        self._state = state
        self._deadlines = Deadlines(state, now=now)
        self._changes = change_allowances()

    @property
    def state(self) -> RunState:
        return self._state

    def available_sites(self) -> list[str]:
        """Members that may be asked, sorted."""
        return self._deadlines.available_sites(self._state)

    @property
    def last_progress_at(self) -> float:
        """When any site last made progress; the beginning of the step, if none did."""
        return self._deadlines.last_progress_at

    def restart(self, now: float) -> list[RoundOutput]:
        """Ask again for what the state waits for; called once, after construction."""
        outputs: list[RoundOutput] = [PublishState()]
        current = self._state.current_round
        is_open = self._state.phase in ("train", "statistics")
        if is_open and current is not None and current.is_closed and current.result_sha256 is None:
            outputs.append(AggregateRound(round=current))
        return outputs + self._advance(now)

    def site_ready(self, site: str, *, install: str, initial: str, now: float) -> list[RoundOutput]:
        """A site can take part; it says so repeatedly, and only the first time of each install counts."""
        known = self._state.members.get(site)
        if self._state.ended or (known is not None and known.install == install):
            return []
        if not self._changes.take(site, now):
            return []
        self._deadlines.progress_made(site, now)
        joined = self._record(SiteJoined(site=site, install=install, initial=initial))
        return [*joined, *self._advance(now)]

    def heartbeat_received(self, site: str, now: float) -> None:
        """A site's process is alive; that alone is no progress."""
        self._deadlines.heartbeat_received(site, now)

    def progress_made(self, site: str, now: float, *, is_ready: bool = True, is_claim: bool = False) -> None:
        """A site has made progress: it trained, sent or fetched something new.

        Args:
            site: the site.
            now: monotonic clock, seconds.
            is_ready: false while it prepares, and after a failure of its; a lost site is then not asked again.
            is_claim: nothing but its word says so. That does not count for an initial model, which is there already
                and needs only to be sent.
        """
        if not (is_claim and self._state.phase == "initialise"):
            self._deadlines.progress_made(site, now)
        if is_ready:
            self._deadlines.recovered(site)

    def offer_received(self, site: str, offer: Offer, now: float) -> list[RoundOutput]:
        """A site offers a model or statistics, perhaps not for the first time."""
        if (known := answer_from_state(self._state, site, offer)) is not None:
            return [SendToSite(site=site, message=known)]
        if (result := validate_offer(self._state, offer)) is not None:
            return self.upload_validated(site, offer, result, now)
        return [ReceiveUpload(site=site, offer=offer)]

    def upload_validated(self, site: str, offer: Offer, result: ValidationResult, now: float) -> list[RoundOutput]:
        """An offered blob has arrived, and this is the result of its validation."""
        # The state may have changed while it arrived.
        if (known := answer_from_state(self._state, site, offer)) is not None:
            return [SendToSite(site=site, message=known)]
        if offer.purpose == "initial":
            return self._initial_validated(site, offer, result, now)
        sha256 = offer.manifest.sha256
        if result.reason is not None:
            event: Event = UpdateRefused(
                round=offer.round,
                site=site,
                sha256=sha256,
                reason=result.reason,
                detail=result.detail,
                purpose=offer.purpose,
            )
            answer: DownMessage = refusal_for(offer, result.reason, result.detail)
        else:
            event = UpdateAccepted(
                round=offer.round,
                site=site,
                sha256=sha256,
                num_samples=offer.num_samples,
                num_steps=offer.num_steps,
                metrics=offer.metrics,
                relative_change=result.relative_change,
                purpose=offer.purpose,
                decoded=result.decoded,
                elapsed_s=round(self._deadlines.elapsed_s(now), 3),
            )
            answer = receipt_for(offer)
        return [*self._record(event), SendToSite(site=site, message=answer), *self._close_if_complete(now)]

    def task_failed(self, site: str, message: TaskFailed, now: float) -> list[RoundOutput]:
        """A site reports that its task failed."""
        state, current = self._state, self._state.current_round
        reply = Refusal(
            run=message.run, purpose=message.purpose, round=message.round, reason="failed", detail=message.detail
        )
        outputs: list[RoundOutput] = []
        if message.run == state.run and site in state.members and state.ended is None:
            if message.purpose == "initial" and state.phase == "initialise" and state.initial_sites_asked[-1] == site:
                refused = InitialModelRefused(site=site, reason="failed", detail=message.detail)
                outputs = [*self._record(refused), *self._choose_next_initial_site(now)]
            elif (
                current is not None
                and (message.purpose, message.round) == (current.purpose, current.number)
                and not current.is_closed
                and site in current.open_sites
            ):
                self._deadlines.lost(site)
                outputs = [
                    *self._refuse_without_update(current, site, "failed", message.detail),
                    *self._close_if_complete(now),
                ]
            elif message.purpose == "finish" and state.phase == "finish" and site not in state.not_finished:
                outputs = [
                    *self._record(SiteNotFinished(site=site, detail=message.detail)),
                    *self._end_if_finished(now),
                ]
        return [*outputs, SendToSite(site=site, message=reply)]

    def model_aggregated(
        self, number: int, *, sha256: str, size_bytes: int, relative_change: float | None = None, now: float
    ) -> list[RoundOutput]:
        """A round's model is on disk; ``relative_change`` as in :class:`ModelAggregated`."""
        made = ModelAggregated(round=number, sha256=sha256, size_bytes=size_bytes, relative_change=relative_change)
        outputs = self._record(made)
        if not self._state.rounds_over and (reason := convergence_reason(self._state)) is not None:
            outputs += self._record(RoundsEndedEarly(cause="converged", reason=reason))
        if self._state.phase == "finish":
            self._deadlines.begin_step(self._state, now)
            return [*outputs, PublishState()]
        return [*outputs, *(self._advance(now) or [PublishState()])]

    def statistics_pooled(
        self, *, sha256: str, size_bytes: int, truncation: dict[str, float], now: float
    ) -> list[RoundOutput]:
        """The pooled statistics are on disk."""
        self._deadlines.begin_step(self._state, now)
        made = StatisticsPooled(sha256=sha256, size_bytes=size_bytes, truncation=truncation)
        return [*self._record(made), PublishState()]

    def finish_report_received(self, site: str, report: FinishReport, now: float) -> list[RoundOutput]:
        """A site made its package."""
        state = self._state
        if report.run != state.run or site not in state.members or report.model != state.model:
            reason: RefusalReason = "unknown_run" if report.run != state.run else "stale_round"
            detail = "the report is not of this run's final model by a member of it"
            answer = Refusal(run=report.run, purpose="finish", round=0, reason=reason, detail=detail)
            return [SendToSite(site=site, message=answer)]
        outputs: list[RoundOutput] = []
        # After the end as well, if it ended well: the package exists, and the ledger should say so.
        if state.phase in ("finish", "done") and site not in state.finished:
            outputs = self._record(SiteFinished(site=site, package=report.package, summary=report.summary))
        outputs.append(SendToSite(site=site, message=Receipt(run=state.run, purpose="finish", round=0)))
        return [*outputs, *self._end_if_finished(now)]

    def pause_site(self, site: str, *, by: PausedBy, reason: str, now: float) -> list[RoundOutput]:
        """A site is paused from now on."""
        state = self._state
        if state.ended or site not in state.active_members or by in state.paused.get(site, {}):
            return []
        if by == "site" and not self._changes.take(site, now):
            return []
        self._deadlines.progress_made(site, now)
        outputs = self._record(SitePaused(site=site, by=by, reason=reason))
        return [*outputs, PublishState()] if by == "operator" else outputs

    def resume_site(self, site: str, *, by: PausedBy, now: float) -> list[RoundOutput]:
        """End a site's pause by its own or the aggregator's operator; it goes on when neither pauses it."""
        if self._state.ended or by not in self._state.paused.get(site, {}):
            return []
        if by == "site" and not self._changes.take(site, now):
            return []
        self._deadlines.progress_made(site, now)
        outputs = self._record(SiteResumed(site=site, by=by))
        if by == "operator":
            outputs.append(PublishState())
        return [*outputs, *self._advance(now)]

    def site_leaves(self, site: str, *, by: PausedBy, detail: str, now: float) -> list[RoundOutput]:
        """A site leaves the run for good, or is removed from it."""
        state, current = self._state, self._state.current_round
        if state.ended or site not in state.active_members:
            return []
        if by == "site" and not self._changes.take(site, now):
            return []
        outputs = self._record(SiteLeft(site=site, install=state.members[site].install, by=by, detail=detail))
        outputs.append(DismissSite(site=site, detail=detail))
        if state.phase == "initialise" and state.initial is None and state.initial_sites_asked[-1] == site:
            outputs += self._record(InitialModelRefused(site=site, reason="left", detail=detail))
        elif current is not None and not current.is_closed and site in current.open_sites:
            outputs += self._refuse_without_update(current, site, "left", detail)
            return [*outputs, *self._close_if_complete(now)]
        elif state.phase == "finish" and site not in state.finished:
            outputs += self._record(SiteNotFinished(site=site, detail=f"left: {detail}"))
        return [*outputs, *self._advance(now)]

    def finish_early(self, reason: str, now: float) -> list[RoundOutput]:
        """The operator wants no further round after the open one."""
        if self._state.phase != "train" or self._state.rounds_over:
            return []
        outputs = self._record(RoundsEndedEarly(cause="operator", reason=reason))
        if self.state.phase == "finish":
            self._deadlines.begin_step(self._state, now)
        return [*outputs, *(self._advance(now) or [PublishState()])]

    def stop_run(self, reason: str) -> list[RoundOutput]:
        """The operator ends the run, without a result."""
        return [] if self._state.ended else self._end_run(succeeded=False, reason=f"stopped by the operator: {reason}")

    def tick(self, now: float) -> list[RoundOutput]:
        """Check deadlines; call it at least every second."""
        state, current, deadlines = self._state, self._state.current_round, self._deadlines
        match state.phase:
            case "initialise" if state.initial is None:
                is_silent = deadlines.is_silent(state, state.initial_sites_asked[-1], now)
                # While nobody else could be asked, there is nothing to win by giving up a site that goes on.
                if is_silent or (deadlines.limit_passed(state, now) and self._initial_candidates()):
                    return self._choose_next_initial_site(now)
            case "train" | "statistics" if current is not None and not current.is_closed:
                is_over = all(deadlines.is_silent(state, site, now) for site in current.open_sites)
                if (is_over and not deadlines.must_wait_for_paused(state, now)) or deadlines.limit_passed(state, now):
                    return self._close(now)
            case _:
                return self._advance(now)
        return []

    # Transitions.

    def _record(self, event: Event) -> list[RoundOutput]:
        self._state = apply_event(self._state, event)
        return [RecordEvent(event=event)]

    def _refuse_without_update(
        self, current: Round, site: str, reason: RefusalReason, detail: str
    ) -> list[RoundOutput]:
        """An asked site contributes nothing to the open round."""
        refused = UpdateRefused(
            round=current.number, site=site, sha256=None, reason=reason, detail=detail, purpose=current.purpose
        )
        return self._record(refused)

    def _advance(self, now: float) -> list[RoundOutput]:
        """Begin what can begin now; called when sites come, go, pause or resume, and when a step is done."""
        state, current = self._state, self._state.latest_round
        match state.phase:
            case "waiting":
                return self._start_if_enough(now)
            case "initialise" if state.initial is None:
                is_refused = state.initial_sites_asked[-1] in state.refused_initial
                return self._choose_next_initial_site(now) if is_refused else []
            case "initialise" | "train" if current is None or current.result_sha256 is not None:
                return self._start_next_round(now)
            case "finish":
                return self._end_if_finished(now)
            case _:
                return []

    def _start_if_enough(self, now: float) -> list[RoundOutput]:
        config = self._state.config
        ready = self._state.active_members - self._state.paused.keys()
        enough = ready.issuperset(config.expected_sites) and len(ready) >= (
            len(config.expected_sites) or config.min_available_sites
        )
        return self._choose_next_initial_site(now) if enough else []

    def _choose_next_initial_site(self, now: float) -> list[RoundOutput]:
        state = self._state
        candidates = self._initial_candidates()
        if not candidates:
            if (state.active_members & state.paused.keys()) - state.refused_initial.keys():
                return []
            return self._end_run(succeeded=False, reason="no site could give an initial model")
        self._deadlines.begin_step(self._state, now)
        return [*self._record(InitialSiteChosen(site=candidates[0])), PublishState()]

    def _initial_candidates(self) -> list[str]:
        state = self._state
        return sorted(state.active_members - set(state.initial_sites_asked) - state.paused.keys())

    def _initial_validated(self, site: str, offer: Offer, result: ValidationResult, now: float) -> list[RoundOutput]:
        if result.reason is not None:
            refused = InitialModelRefused(site=site, reason=result.reason, detail=result.detail)
            answer = SendToSite(site=site, message=refusal_for(offer, result.reason, result.detail))
            return [*self._record(refused), *self._choose_next_initial_site(now), answer]
        manifest = offer.manifest
        accepted = InitialModelAccepted(site=site, sha256=manifest.sha256, size_bytes=manifest.size_bytes)
        return [
            *self._record(accepted),
            *(self._advance(now) or [PublishState()]),
            SendToSite(site=site, message=receipt_for(offer)),
        ]

    def _start_next_round(self, now: float) -> list[RoundOutput]:
        """Ask for the next round's updates or, after the last round, for the statistics, if any site can be asked."""
        config = self._state.config
        if not self._state.active_members:
            return self._end_run(succeeded=False, reason="every site has left the run")
        asked = self.available_sites()
        if not asked:
            # Every site is paused; the first that is resumed starts the round.
            return []
        if self._state.is_trained:
            event = RoundStarted(round=0, asked=tuple(asked), purpose="statistics")
        else:
            number = len(self._state.rounds) + 1
            sample = random.Random(f"{config.seed}:{number}").sample(asked, config.sample_size(len(asked)))
            event = RoundStarted(round=number, asked=tuple(sorted(sample)))
        self._deadlines.begin_step(self._state, now)
        return [*self._record(event), PublishState()]

    def _close_if_complete(self, now: float) -> list[RoundOutput]:
        current = self._state.current_round
        assert current is not None
        return [] if current.is_closed or current.open_sites else self._close(now)

    def _close(self, now: float) -> list[RoundOutput]:
        current = self._state.current_round
        assert current is not None
        left_out = current.open_sites
        # Who goes on, or changes between pause and work, when the limit has passed.
        overdue = tuple(site for site in left_out if not self._deadlines.is_silent(self._state, site, now))
        paused = tuple(site for site in left_out if site in self._state.paused and site not in overdue)
        self._deadlines.lost(*(site for site in left_out if site not in paused))
        closed = RoundClosed(
            round=current.number, left_out=left_out, purpose=current.purpose, paused=paused, overdue=overdue
        )
        outputs = self._record(closed)
        needed = self._state.config.replies_needed(len(current.asked))
        if len(current.accepted) < needed:
            came, asked = len(current.accepted), len(current.asked)
            which = "the statistics phase" if current.purpose == "statistics" else f"round {current.number}"
            reason = f"quorum missed in {which}: {came} of {asked} sites contributed, {needed} needed"
            return [*outputs, *self._end_run(succeeded=False, reason=reason)]
        self._deadlines.begin_step(self._state, now)
        assert self._state.current_round is not None
        return [*outputs, AggregateRound(round=self._state.current_round)]

    def _end_if_finished(self, now: float) -> list[RoundOutput]:
        state = self._state
        if state.phase != "finish":
            return []
        settled = state.finished.keys() | state.not_finished.keys()
        awaited = state.active_members - self._deadlines.lost_sites(state) - settled
        if self._deadlines.limit_passed(state, now) or all(
            self._deadlines.is_silent(state, site, now) for site in awaited
        ):
            return self._end_run(succeeded=True, reason="")
        return []

    def _end_run(self, *, succeeded: bool, reason: str) -> list[RoundOutput]:
        return [*self._record(RunEnded(succeeded=succeeded, reason=reason)), PublishState()]
