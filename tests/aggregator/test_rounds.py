"""The round machine, without a broker: transitions, deadlines, refusals, and that its journal is enough."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from aggregator.config import AggregateConfig, Convergence
from aggregator.exchanges import ValidationResult
from aggregator.journal import Journal
from aggregator.ledger import build_ledger
from aggregator.outputs import AggregateRound, PublishState, RecordEvent, SendToSite
from aggregator.rounds import RoundMachine
from edgeflame.config import load_config
from edgeflame.errors import ConfigError, StorageError
from edgeflame.mqtt.messages import Offer, Receipt, Refusal, TaskFailed
from tests.support.round_driver import DEADLINE_S, RUN, Driver, sha


def test_a_whole_run() -> None:
    run = Driver()
    run.ready("c", "b")
    assert run.state.phase == "waiting"
    run.ready("a")
    assert (run.state.phase, run.state.initial_sites_asked) == ("initialise", ("a",))
    run.deliver("a", run.offer("initial", 0, sha(0)))
    for number in (1, 2):
        assert run.state.latest_round is not None
        assert (run.state.phase, run.state.latest_round.number) == ("train", number)
        for site in "bca":
            assert isinstance(run.update(site, number), Receipt)
    assert run.state.phase == "finish"
    run.finish("a", "b", "c")
    assert run.state.phase == "done"
    assert run.state.ended is not None
    assert run.state.ended.succeeded


def test_every_decision_is_recorded_before_it_is_acted_upon() -> None:
    run = Driver()
    run.start("a", "b", "c")
    outputs = run.take(run.machine.upload_validated("a", run.offer("update", 1, sha(1)), ValidationResult(), 0.0))
    kinds = [type(output) for output in outputs]
    assert kinds.index(RecordEvent) < kinds.index(SendToSite)


def test_the_facts_alone_give_the_same_state_at_every_point(tmp_path: Path) -> None:
    run = Driver()
    run.start("a", "b", "c")
    run.update("b", 1)
    run.deliver("a", run.offer("update", 1, sha(77)), ValidationResult(reason="norm", detail="far"))
    run.update("c", 1)
    run.take(run.machine.task_failed("a", TaskFailed(run=RUN, purpose="update", round=2, detail="x"), 0.0))
    run.update("b", 2)
    run.update("c", 2)
    run.finish("b", "c", "a")
    with Journal(tmp_path / "journal.sqlite") as journal:
        for fact in run.facts:
            journal.append(RUN, [fact])
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.last_run() == run.state
    assert build_ledger(run.state)["outcome"] == "done"


def test_a_restarted_machine_asks_for_what_is_missing() -> None:
    run = Driver(sites=2)
    run.start("a", "b")
    run.update("a", 1)
    state = run.state
    # Killed after the second acceptance was journalled and before the model was made.
    outputs = run.machine.upload_validated("b", run.offer("update", 1, sha(9)), ValidationResult(), 0.0)
    assert any(isinstance(output, AggregateRound) for output in outputs)
    again = RoundMachine(run.state, now=50.0)
    kinds = [type(output) for output in again.restart(50.0)]
    assert kinds == [PublishState, AggregateRound]
    assert [type(output) for output in RoundMachine(state, now=0.0).restart(0.0)] == [PublishState]


def test_an_accepted_update_gets_its_first_receipt_again_and_another_is_a_duplicate() -> None:
    run = Driver()
    run.start("a", "b", "c")
    offer = run.offer("update", 1, sha(5))
    first = run.deliver("a", offer)
    recorded = len(run.facts)
    assert run.deliver("a", offer) == first
    second = run.deliver("a", run.offer("update", 1, sha(6)))
    assert isinstance(second, Refusal)
    assert second.reason == "duplicate"
    assert len(run.facts) == recorded
    run.update("b", 1)
    run.update("c", 1)
    assert run.deliver("a", offer) == first, "also when the round is long over"


def test_refusals_say_why() -> None:
    run = Driver(sites=2, rounds=3, max_samples=50)
    run.start("a", "b")
    other = Offer(run="f" * 32, purpose="update", round=1, manifest=run.offer("update", 1, sha(1)).manifest)

    def reason(site: str, offer: Offer) -> str:
        answer = run.deliver(site, offer)
        assert isinstance(answer, Refusal)
        assert answer.detail
        return answer.reason

    assert reason("a", other) == "unknown_run"
    assert reason("stranger", run.offer("update", 1, sha(1))) == "unknown_site"
    assert reason("a", run.offer("update", 2, sha(1))) == "stale_round"
    assert reason("a", run.offer("initial", 0, sha(3))) == "late"
    run.ready("later")
    assert reason("later", run.offer("update", 1, sha(1))) == "not_asked"
    assert reason("a", run.offer("update", 1, sha(1), samples=51)) == "samples"
    # One epoch in batches of 16: 33 images take three steps. Not saying how many is allowed where no rule needs it.
    assert reason("a", run.offer("update", 1, sha(1), samples=33, steps=4)) == "samples"
    assert reason("b", run.offer("update", 1, sha(1), size=500 + (64 << 10) + 1)) == "too_large"
    # Both are settled now; nobody contributed.
    assert run.state.phase == "failed"
    assert reason("a", run.offer("update", 1, sha(1))) == "late"


def test_quorum_missed_fails_and_says_so() -> None:
    run = Driver(quorum=1.0)
    run.start("a", "b", "c")
    run.update("a", 1)
    run.update("b", 1)
    run.deliver("c", run.offer("update", 1, sha(3)), ValidationResult(reason="not_finite", detail="NaN"))
    assert run.state.phase == "failed"
    assert run.state.ended is not None
    assert run.state.ended.reason == "quorum missed in round 1: 2 of 3 sites contributed, 3 needed"
    assert isinstance(run.said[-1], PublishState)


def goes_on(run: Driver, site: str, *, since: float, until: float) -> float:
    """A site shows progress in time, again and again; returns when the machine last decided nothing because of it."""
    now = since
    while now + DEADLINE_S / 2 <= until:
        now += DEADLINE_S / 2
        run.machine.progress_made(site, now, is_claim=True)
        assert run.take(run.machine.tick(now)) == []
    return now


def test_a_site_that_goes_on_is_waited_for_as_long_as_the_quorum_needs_it() -> None:
    run = Driver(quorum=1.0)
    run.start("a", "b", "c")
    run.update("a", 1)
    run.update("b", 1)
    now = goes_on(run, "c", since=0.0, until=50 * DEADLINE_S)
    assert isinstance(run.update("c", 1, now=now), Receipt)


@pytest.mark.parametrize(("took", "limit"), [(1.0, 4 * DEADLINE_S), (3 * DEADLINE_S, 12 * DEADLINE_S)])
def test_once_the_quorum_stands_a_round_has_a_limit(took: float, limit: float) -> None:
    run = Driver(rounds=6, straggler_factor=4.0)
    run.start("a", "b", "c")
    run.update("a", 1, now=0.5)
    goes_on(run, "c", since=0.0, until=took)
    run.update("b", 1, now=took)
    goes_on(run, "c", since=took, until=limit - 1)
    run.take(run.machine.tick(limit))
    first = run.state.rounds[0]
    assert (first.left_out, first.overdue, first.is_closed) == (("c",), ("c",), True)
    assert build_ledger(run.state)["rounds"][0]["left_out"] == [
        {"site": "c", "reason": "not done when the round had lasted as long as it may", "detail": ""}
    ]
    assert run.state.rounds[1].asked == ("a", "b")


def test_a_site_that_is_overdue_again_and_again_is_asked_ever_more_rarely() -> None:
    run = Driver(rounds=16, straggler_factor=1.0)
    run.start("a", "b", "c")
    asked = []
    for number in range(1, 15):
        current = run.state.latest_round
        assert current is not None
        # The driver makes models at time 0, so that is when each round begins.
        run.machine.progress_made("c", DEADLINE_S - 1)
        run.update("a", number)
        run.update("b", number)
        if "c" in current.asked:
            asked.append(number)
            run.machine.progress_made("c", DEADLINE_S - 1)
            run.take(run.machine.tick(DEADLINE_S))
            run.machine.progress_made("c", 0.0)
    assert asked == [1, 3, 6, 11]
    # It is in the journal: a restarted machine holds it back as well.
    again = RoundMachine(run.state, now=0.0)
    again.progress_made("c", 1.0)
    assert again.available_sites() == ["a", "b"]


def test_a_slow_site_whose_update_came_after_all_is_asked_again_as_before() -> None:
    run = Driver(rounds=6, straggler_factor=1.0)
    run.start("a", "b", "c")
    for number in (1, 2, 3):
        run.machine.progress_made("c", DEADLINE_S - 1)
        run.update("a", number)
        run.update("b", number)
        if number == 1:
            run.take(run.machine.tick(DEADLINE_S))
            run.machine.progress_made("c", 0.0)
        elif number == 3:
            assert isinstance(run.update("c", 3), Receipt)
    assert [entry.asked for entry in run.state.rounds] == [
        ("a", "b", "c"), ("a", "b"), ("a", "b", "c"), ("a", "b", "c")
    ]  # fmt: skip


def test_a_site_that_toggles_its_pause_holds_nobody_up_and_does_not_fill_the_journal() -> None:
    run = Driver(rounds=3, straggler_factor=2.0)
    run.start("a", "b", "c")
    run.update("a", 1)
    run.update("b", 1)
    before, now = len(run.facts), 0.0
    while len(run.state.rounds) == 1:
        now += 1.0
        assert now <= 2 * DEADLINE_S
        run.take(run.machine.pause_site("c", by="site", reason="on", now=now))
        run.take(run.machine.resume_site("c", by="site", now=now))
        run.machine.progress_made("c", now, is_claim=True)
        run.take(run.machine.tick(now))
    assert run.state.rounds[0].overdue == ("c",)
    assert len(run.facts) - before < 15
    # Its operator's word is not its own, and is always heard.
    run.take(run.machine.resume_site("c", by="site", now=now + 3600))
    run.take(run.machine.pause_site("c", by="operator", reason="enough", now=now + 3600))
    assert "operator" in run.state.paused["c"]


def test_a_site_that_comes_and_goes_does_not_fill_the_journal() -> None:
    run = Driver(rounds=3)
    run.start("a", "b", "c")
    before = len(run.facts)
    for number in range(200):
        run.take(run.machine.site_leaves("c", by="site", detail="bye", now=1.0))
        run.take(run.machine.site_ready("c", install=f"{number + 9:032x}", initial=sha(0), now=1.0))
    assert len(run.facts) - before < 15


def test_the_end_has_a_limit_too() -> None:
    run = Driver(rounds=1, straggler_factor=3.0)
    run.start("a", "b", "c")
    for site in "abc":
        run.update(site, 1)
    run.finish("a", "b")
    run.take(run.machine.tick(0.0))
    goes_on(run, "c", since=0.0, until=3 * DEADLINE_S - 1)
    run.take(run.machine.tick(3 * DEADLINE_S))
    assert run.state.phase == "done"
    assert [entry["site"] for entry in build_ledger(run.state)["packages_missing"]] == ["c"]


def test_a_word_is_no_progress_for_an_initial_model_and_chunks_have_a_limit() -> None:
    run = Driver(straggler_factor=3.0)
    run.ready("a", "b", "c")
    run.machine.progress_made("a", DEADLINE_S - 1, is_claim=True)
    run.take(run.machine.tick(DEADLINE_S))
    assert run.state.initial_sites_asked == ("a", "b")
    now = DEADLINE_S
    while now < 4 * DEADLINE_S - 10:
        now += DEADLINE_S / 2
        run.machine.progress_made("b", now)
        run.take(run.machine.tick(now))
    run.take(run.machine.tick(4 * DEADLINE_S))
    assert run.state.initial_sites_asked == ("a", "b", "c")
    for _ in range(20):
        now += DEADLINE_S / 2
        run.machine.progress_made("c", now)
        run.take(run.machine.tick(now))
    assert run.state.phase == "initialise", "it is the last that could give one"


def test_a_silent_site_is_left_out_and_not_asked_until_it_shows_progress() -> None:
    run = Driver(rounds=4)
    run.start("a", "b", "c")
    run.update("a", 1)
    run.update("b", 1)
    run.take(run.machine.tick(DEADLINE_S - 1))
    assert run.state.latest_round is not None
    assert run.state.latest_round.number == 1
    run.take(run.machine.tick(DEADLINE_S))
    assert run.state.rounds[0].left_out == ("c",)
    assert run.state.rounds[1].asked == ("a", "b")
    late = run.deliver("c", run.offer("update", 1, sha(99)))
    assert isinstance(late, Refusal)
    assert late.reason == "stale_round"
    run.update("a", 2)
    run.update("b", 2)
    assert run.state.rounds[2].asked == ("a", "b"), "lost for more than one round"
    run.machine.progress_made("c", DEADLINE_S + 5)
    run.update("a", 3)
    run.update("b", 3)
    assert run.state.rounds[3].asked == ("a", "b", "c")


def test_the_next_site_is_asked_when_the_first_has_no_initial_model() -> None:
    run = Driver()
    run.ready("a", "b", "c")
    run.take(run.machine.tick(DEADLINE_S))
    assert run.state.initial_sites_asked == ("a", "b")
    bad = run.deliver("b", run.offer("initial", 0, sha(0)), ValidationResult(reason="not_tensors", detail="x"))
    assert isinstance(bad, Refusal)
    run.take(run.machine.task_failed("c", TaskFailed(run=RUN, purpose="initial", round=0, detail="no data"), 0.0))
    assert run.state.phase == "failed"


def test_sampling_is_seeded_and_asks_a_share() -> None:
    def asked(seed: int) -> list[tuple[str, ...]]:
        run = Driver(sites=10, rounds=5, fraction_train=0.3, seed=seed)
        sites = [f"s{number}" for number in range(10)]
        run.start(*sites)
        for number in range(1, 6):
            assert run.state.latest_round is not None
            for site in run.state.latest_round.asked:
                run.update(site, number)
        return [entry.asked for entry in run.state.rounds]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)
    assert {len(sites) for sites in asked(1)} == {3}


def test_expected_sites_are_waited_for_by_name() -> None:
    run = Driver(expected_sites=("a", "b"))
    run.ready("a", "x")
    assert run.state.phase == "waiting"
    run.ready("b")
    assert run.state.phase == "initialise"


def test_any_order_of_arrival_gives_the_same_contributors_and_weights() -> None:
    ledgers = set()
    for seed in range(6):
        run = Driver(sites=3, rounds=1)
        run.start("a", "b", "c")
        order = list("abc")
        random.Random(seed).shuffle(order)
        for site in order:
            run.deliver(site, run.offer("update", 1, sha(ord(site)), samples=ord(site)))
        ledgers.add(str(build_ledger(run.state)["rounds"]))
    assert len(ledgers) == 1


def test_a_journal_that_was_emptied_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"")
    with Journal(path):
        assert [record.getMessage() for record in caplog.records] == ["database_empty"]


def test_a_journal_of_another_kind_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"this is not a database, and long enough to be sure of that" * 20)
    with pytest.raises(StorageError, match="journal"):
        Journal(path)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rounds": 0}, "rounds"),
        ({"quorum": 0.0}, "quorum"),
        ({"fraction_train": 1.5}, "fraction_train"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"strategy": "magic"}, "fedavg"),
        ({"expected_sites": ("a/b",)}, "expected_sites"),
        ({"learning": {"method": "none"}}, "flame"),
    ],
)
def test_a_wrong_configuration_names_its_key(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(None, AggregateConfig, wrong)


@pytest.mark.parametrize(
    ("quorum", "asked", "needed"), [(0.6, 5, 3), (0.6, 3, 2), (0.1, 3, 1), (1.0, 7, 7), (0.3, 10, 3)]
)
def test_quorum_arithmetic(quorum: float, asked: int, needed: int) -> None:
    assert AggregateConfig(quorum=quorum).replies_needed(asked) == needed


def test_a_paused_site_is_not_asked_not_lost_and_does_not_hold_up_a_quorum() -> None:
    run = Driver(rounds=3)
    run.start("a", "b", "c")
    run.update("a", 1)
    run.update("b", 1)
    run.take(run.machine.pause_site("c", by="site", reason="the line runs", now=10.0))
    run.machine.heartbeat_received("c", 10.0 + DEADLINE_S - 1)
    assert run.take(run.machine.tick(10.0 + DEADLINE_S - 1)) == [], "as long as for any other site"
    run.take(run.machine.tick(10.0 + DEADLINE_S))
    assert (run.state.rounds[0].left_out, run.state.rounds[0].paused) == (("c",), ("c",))
    assert build_ledger(run.state)["rounds"][0]["left_out"] == [{"site": "c", "reason": "paused", "detail": ""}]
    assert run.state.rounds[1].asked == ("a", "b")
    run.take(run.machine.resume_site("c", by="site", now=200.0))
    run.update("a", 2)
    run.update("b", 2)
    assert run.state.rounds[2].asked == ("a", "b", "c"), "it was not lost"


def test_a_round_waits_for_a_paused_site_that_lives_where_the_quorum_depends_on_it() -> None:
    run = Driver(sites=2, quorum=1.0)
    run.start("a", "b")
    run.update("a", 1)
    run.take(run.machine.pause_site("b", by="operator", reason="shift", now=0.0))
    now = 0.0
    for _ in range(5):
        now += DEADLINE_S - 1
        run.machine.heartbeat_received("b", now)
        assert run.take(run.machine.tick(now)) == []
    run.take(run.machine.tick(now + DEADLINE_S))
    assert run.state.phase == "failed", "a site that is paused and dead is dead"


def test_no_round_begins_while_every_site_rests() -> None:
    run = Driver(sites=2, rounds=2)
    run.start("a", "b")
    run.update("a", 1)
    for site in "ab":
        run.take(run.machine.pause_site(site, by="site", reason="night", now=0.0))
    assert run.update("b", 1).purpose == "update"
    assert (run.state.phase, len(run.state.rounds)) == ("train", 1)
    assert run.take(run.machine.tick(10 * DEADLINE_S)) == []
    run.take(run.machine.resume_site("b", by="site", now=10 * DEADLINE_S))
    assert run.state.rounds[1].asked == ("b",)


def test_a_site_paused_by_both_goes_on_when_both_want_it_to() -> None:
    run = Driver()
    run.start("a", "b", "c")
    run.take(run.machine.pause_site("a", by="site", reason="x", now=0.0))
    run.take(run.machine.pause_site("a", by="operator", reason="y", now=0.0))
    run.take(run.machine.resume_site("a", by="site", now=0.0))
    assert run.machine.available_sites() == ["b", "c"]
    run.take(run.machine.resume_site("a", by="operator", now=0.0))
    assert run.machine.available_sites() == ["a", "b", "c"]


def test_a_site_that_left_is_waited_for_no_more_and_comes_back_as_another_install() -> None:
    run = Driver(rounds=3)
    run.start("a", "b", "c")
    run.update("a", 1)
    run.update("b", 1)
    run.take(run.machine.site_leaves("c", by="site", detail="sold", now=0.0))
    assert run.state.rounds[1].asked == ("a", "b"), "the round closed at once"
    late = run.update("c", 2)
    assert isinstance(late, Refusal)
    assert (late.reason, late.detail) == ("left", "the site has left the run: sold")
    run.ready("c")
    assert "c" in run.state.left, "the same install is not let in again"
    run.take(run.machine.site_ready("c", install="2" * 32, initial=sha(0), now=0.0))
    run.update("a", 2)
    run.update("b", 2)
    assert run.state.rounds[2].asked == ("a", "b", "c")


def test_a_site_gone_wrong_does_not_fill_the_journal() -> None:
    run = Driver()
    run.start("a", "b", "c")
    for number in range(100):
        answer = run.deliver(
            "a", run.offer("update", 1, sha(500 + number)), ValidationResult(reason="norm", detail="far")
        )
        assert isinstance(answer, Refusal)
    assert len(run.facts) < 15


def test_convergence_is_a_rule_on_journalled_figures() -> None:
    def rounds(changes: list[float], losses: list[float], **rule: object) -> tuple[int, str]:
        run = Driver(sites=1, rounds=9, convergence=Convergence(**rule))  # type: ignore[arg-type]
        run.ready("a")
        run.changes = iter(changes)
        run.deliver("a", run.offer("initial", 0, sha(0)))
        for number, loss in enumerate(losses, start=1):
            if run.state.phase == "train":
                offer = msgspec.structs.replace(run.offer("update", number, sha(number)), metrics={"loss": loss})
                run.deliver("a", offer)
        return len(run.state.rounds), run.state.ended_early.reason if run.state.ended_early else ""

    still = [0.5, 0.09, 0.2, 0.08, 0.07, 0.06, 0.05, 0.05, 0.05]
    ended, why = rounds(still, [1.0] * 9, model_change=0.1, patience=2)
    assert ended == 5
    assert why == "converged in round 5: the model changed by 0.07 (below 0.1), for 2 rounds"
    losses = [4.0, 2.0, 1.0, 0.99, 0.985, 0.5, 0.4, 0.3, 0.2]
    assert rounds(still, losses, metric_change=0.02, patience=2)[0] == 5
    assert rounds(still, losses, metric_change=0.02, model_change=0.01)[0] == 9
    assert rounds(still, losses, metric_change=0.02, metric="accuracy")[0] == 9, "nobody reports it"
    assert rounds(still, [1.0] * 9, model_change=0.9, patience=1, min_rounds=4)[0] == 4
    assert rounds(still, [1.0] * 9)[0] == 9


def test_an_update_that_comes_after_a_stop_does_not_count() -> None:
    run = Driver(sites=2)
    run.start("a", "b")
    run.take(run.machine.stop_run("enough"))
    state = run.state
    answer = run.update("a", 1)
    assert isinstance(answer, Refusal)
    assert answer.reason == "late"
    assert run.state is state, "an ended run stays ended"
