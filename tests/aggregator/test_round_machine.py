"""The round machine under any order of events: Hypothesis plays sites, operators, time and crashes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregator.config import AggregateConfig, Convergence
from aggregator.events import Event, RunEnded, RunStarted, RunState, UpdateAccepted, apply_event, initial_state
from aggregator.exchanges import ValidationResult
from aggregator.ledger import build_ledger
from aggregator.outputs import AggregateRound, DismissSite, ReceiveUpload, RecordEvent, RoundOutput, SendToSite
from aggregator.rounds import RoundMachine
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import BlobManifest, FinishReport, Offer, Receipt, Refusal, TaskFailed

RUN = "0" * 32
DEADLINE_S = 100.0
SITES = ("a", "b", "c", "d")
FACT: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)

sites = st.sampled_from(SITES)
figures = st.integers(0, 5)
verdicts = st.sampled_from(
    [ValidationResult(relative_change=0.5)] * 4
    + [ValidationResult(reason="norm", detail="far"), ValidationResult(reason="corrupt", detail="x")]
)


def sha(number: int) -> str:
    return f"{number:064x}"


def replay(facts: list[Event]) -> RunState:
    """What a restarted aggregator knows: the facts as the journal's bytes give them back."""
    read = [FACT.decode(msgspec.json.encode(fact)) for fact in facts]
    assert isinstance(read[0], RunStarted)
    state = initial_state(read[0])
    for fact in read[1:]:
        state = apply_event(state, fact)
    return state


class Rounds(RuleBasedStateMachine):
    """Every rule is something that may happen at any time; every invariant must hold after any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: list[Event] = []

    @initialize(
        quorum=st.sampled_from([0.3, 0.6, 1.0]),
        fraction_train=st.sampled_from([0.4, 1.0]),
        rounds=st.integers(1, 4),
        converges=st.booleans(),
        begun=st.sampled_from([True, True, True, False]),
        statistics=st.sampled_from(["site", "federated"]),
    )
    def start(
        self, quorum: float, fraction_train: float, rounds: int, converges: bool, begun: bool, statistics: Any
    ) -> None:
        config = AggregateConfig(
            rounds=rounds,
            min_available_sites=2,
            quorum=quorum,
            fraction_train=fraction_train,
            deadline_s=DEADLINE_S,
            convergence=Convergence(model_change=0.1, patience=1) if converges else Convergence(),
            statistics=statistics,
            learning=Learning(method="flame"),
        )
        self.now = 0.0
        self.facts = [RunStarted(run=RUN, config=config, time="2026-01-01T00:00:00Z")]
        self.machine = RoundMachine(replay(self.facts), now=self.now)
        self.installs = dict.fromkeys(SITES, 0)
        self.receipts: dict[tuple[str, str, int], str] = {}
        self.merging: AggregateRound | None = None
        self.made = 0
        self.take(self.machine.restart(self.now))
        if begun:
            for site in SITES[:3]:
                self.site_is_ready(site)
            self.site_offers_an_initial_model("a", ValidationResult())

    @property
    def state(self) -> RunState:
        return self.machine.state

    def take(self, outputs: list[RoundOutput]) -> list[RoundOutput]:
        recorded = False
        ended_before = any(isinstance(fact, RunEnded) for fact in self.facts)
        for output in outputs:
            match output:
                case RecordEvent():
                    if ended_before:
                        assert output.event.__struct_config__.tag == "site_finished", "an ended run stays ended"
                    self.facts.append(output.event)
                    recorded = True
                case AggregateRound():
                    assert self.merging is None
                    self.merging = output
                case SendToSite(message=Receipt() as receipt, site=site) if receipt.purpose in ("update", "statistics"):
                    assert receipt.sha256 is not None
                    first = self.receipts.setdefault((site, receipt.purpose, receipt.round), receipt.sha256)
                    assert first == receipt.sha256, "two updates of one site in one round"
                case SendToSite(message=Refusal() as refusal):
                    assert refusal.detail, "every refusal says why"
                case DismissSite():
                    assert recorded
                case _:
                    pass
        return outputs

    def offer(self, purpose: Any, number: int, figure: int, samples: int = 10) -> Offer:
        manifest = BlobManifest(sha256=sha(figure), size_bytes=500, chunk_bytes=500, crc32s=bytes(4))
        return Offer(run=RUN, purpose=purpose, round=number, manifest=manifest, num_samples=samples)

    # What happens.

    @precondition(lambda self: self.merging is None)
    @rule(site=sites)
    def site_is_ready(self, site: str) -> None:
        self.machine.heartbeat_received(site, self.now)
        install = f"{self.installs[site]:032x}"
        self.take(self.machine.site_ready(site, install=install, initial=sha(0), now=self.now))

    @precondition(lambda self: self.merging is None)
    @rule(site=sites, figure=figures, verdict=verdicts, current=st.booleans(), number=st.integers(0, 5))
    def site_offers_an_update(
        self, site: str, figure: int, verdict: ValidationResult, current: bool, number: int
    ) -> None:
        purpose = "update"
        if current and self.state.current_round is not None:
            number, purpose = self.state.current_round.number, self.state.current_round.purpose
        offer = self.offer(purpose, number, figure, samples=1 + figure)
        for output in self.take(self.machine.offer_received(site, offer, self.now)):
            if isinstance(output, ReceiveUpload):
                self.machine.progress_made(site, self.now)
                self.take(self.machine.upload_validated(site, offer, verdict, self.now))

    @precondition(lambda self: self.merging is None and self.state.phase in ("train", "statistics"))
    @rule(keep=st.integers(0, 1))
    def sites_do_their_round(self, keep: int) -> None:
        current = self.state.current_round
        for site in current.open_sites[keep:] if current is not None else ():
            self.site_offers_an_update(site, 7 + current.number, ValidationResult(), True, 0)
        if self.merging is not None:
            self.model_is_made(0.05 * current.number)

    @precondition(lambda self: self.merging is None and self.state.phase == "finish")
    @rule()
    def sites_finish(self) -> None:
        for site in sorted(self.state.members):
            self.site_makes_its_package(site)

    @precondition(lambda self: self.merging is None)
    @rule(site=sites, verdict=verdicts)
    def site_offers_an_initial_model(self, site: str, verdict: ValidationResult) -> None:
        if self.state.initial_sites_asked:
            site = self.state.initial_sites_asked[-1]
        offer = self.offer("initial", 0, 0)
        for output in self.take(self.machine.offer_received(site, offer, self.now)):
            if isinstance(output, ReceiveUpload):
                self.take(self.machine.upload_validated(site, offer, verdict, self.now))

    @precondition(lambda self: self.merging is None)
    @rule(site=sites, purpose=st.sampled_from(["initial", "update", "statistics", "finish"]))
    def site_fails(self, site: str, purpose: Any) -> None:
        number = self.state.latest_round.number if self.state.latest_round is not None and purpose == "update" else 0
        message = TaskFailed(run=RUN, purpose=purpose, round=number, detail="no images")
        self.take(self.machine.task_failed(site, message, self.now))

    @precondition(lambda self: self.merging is None)
    @rule(site=sites)
    def site_makes_its_package(self, site: str) -> None:
        report = FinishReport(run=RUN, model=self.state.model or sha(99))
        self.take(self.machine.finish_report_received(site, report, self.now))

    @precondition(lambda self: self.merging is None)
    @rule(site=sites, by=st.sampled_from(["site", "operator"]))
    def pause(self, site: str, by: Any) -> None:
        self.take(self.machine.pause_site(site, by=by, reason="the line runs", now=self.now))

    @precondition(lambda self: self.merging is None)
    @rule(site=sites, by=st.sampled_from(["site", "operator"]))
    def resume(self, site: str, by: Any) -> None:
        self.take(self.machine.resume_site(site, by=by, now=self.now))

    @precondition(lambda self: self.merging is None and len(self.facts) > 8)
    @rule(site=sites, by=st.sampled_from(["site", "operator"]), again=st.booleans())
    def leave(self, site: str, by: Any, again: bool) -> None:
        self.take(self.machine.site_leaves(site, by=by, detail="sold", now=self.now))
        if again:
            self.installs[site] += 1

    @precondition(lambda self: self.merging is None)
    @rule(seconds=st.sampled_from([1.0, DEADLINE_S / 2, DEADLINE_S]), alive=st.sets(sites), steps=st.sets(sites))
    def time_passes(self, seconds: float, alive: set[str], steps: set[str]) -> None:
        self.now += seconds
        for site in alive:
            self.machine.heartbeat_received(site, self.now)
        for site in steps:
            self.machine.progress_made(site, self.now)
        self.take(self.machine.tick(self.now))

    @precondition(lambda self: self.merging is not None)
    @rule(change=st.sampled_from([None, 0.01, 0.5]))
    def model_is_made(self, change: float | None) -> None:
        assert self.merging is not None
        number, purpose, self.merging = self.merging.round.number, self.merging.round.purpose, None
        self.made += 1
        if purpose == "statistics":
            self.take(
                self.machine.statistics_pooled(
                    sha256=sha(2000 + self.made), size_bytes=500, truncation={"mean": 0.1}, now=self.now
                )
            )
            return
        outputs = self.machine.model_aggregated(
            number, sha256=sha(1000 + self.made), size_bytes=500, relative_change=change, now=self.now
        )
        self.take(outputs)

    @precondition(lambda self: self.merging is None and self.state.phase == "train")
    @rule()
    def operator_finishes_early(self) -> None:
        self.take(self.machine.finish_early("enough", self.now))

    @precondition(lambda self: self.merging is None and len(self.facts) > 25)
    @rule()
    def operator_stops(self) -> None:
        self.take(self.machine.stop_run("enough"))
        assert self.state.ended is not None

    @rule()
    def aggregator_is_killed_and_restarted(self) -> None:
        self.machine = RoundMachine(replay(self.facts), now=self.now)
        self.merging = None
        self.take(self.machine.restart(self.now))

    # What always holds.

    @invariant()
    def the_journal_is_the_state(self) -> None:
        assert replay(self.facts) == self.state
        assert msgspec.json.encode(build_ledger(replay(self.facts))) == msgspec.json.encode(build_ledger(self.state))

    @invariant()
    def a_site_counts_once_a_round(self) -> None:
        accepted = [(fact.purpose, fact.round, fact.site) for fact in self.facts if isinstance(fact, UpdateAccepted)]
        assert len(accepted) == len(set(accepted))

    @invariant()
    def quorum_is_honoured(self) -> None:
        for entry in (*self.state.rounds, *filter(None, [self.state.statistics])):
            assert set(entry.accepted) <= set(entry.asked)
            if entry.result_sha256 is not None:
                assert len(entry.accepted) >= self.state.config.replies_needed(len(entry.asked))

    @invariant()
    def rounds_follow_one_another(self) -> None:
        state = self.state
        assert [entry.number for entry in state.rounds] == list(range(1, len(state.rounds) + 1))
        assert len(state.rounds) <= state.config.rounds
        assert all(entry.result_sha256 is not None for entry in state.rounds[:-1])
        if state.phase in ("finish", "done"):
            assert state.rounds[-1].result_sha256 == state.model

    @invariant()
    def nobody_who_rests_or_left_is_asked_anew(self) -> None:
        available = self.machine.available_sites()
        assert not set(available) & (self.state.paused.keys() | self.state.left.keys())

    def teardown(self) -> None:
        """From wherever it stands, a run whose sites are all lost comes to an end by itself: nobody blocks it."""
        if not self.facts or self.state.phase == "waiting":
            return
        for _ in range(60):
            if self.state.ended is not None:
                return
            if self.merging is not None:
                self.model_is_made(0.5)
                continue
            self.now += DEADLINE_S
            for site in list(self.state.paused):
                for by in ("site", "operator"):
                    self.take(self.machine.resume_site(site, by=by, now=self.now))  # type: ignore[arg-type]
            self.take(self.machine.tick(self.now))
        pytest.fail(f"blocked in {self.state.phase}, round {self.state.latest_round}")


class TestRounds(Rounds.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
