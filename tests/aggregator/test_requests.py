"""An operator's requests, as the round machine takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.control import (
    FinishEarly,
    OperatorRequest,
    PauseSite,
    RemoveSite,
    RequestQueue,
    ResumeSite,
    StopRun,
    apply_request,
)
from aggregator.events import RoundsEndedEarly, RunEnded, SiteLeft, SitePaused, SiteResumed
from aggregator.outputs import DismissSite, PublishState, RecordEvent
from edgeflame.errors import UsageError
from tests.support.round_driver import Driver


def asked(run: Driver, request: OperatorRequest) -> tuple[list[type], str, bool]:
    """Events and other outputs by their type, the words, and whether an aggregator that stays is to leave."""
    outcome = apply_request(request, run.machine, 0.0)
    kinds = [type(o.event if isinstance(o, RecordEvent) else o) for o in run.take(outcome.outputs)]
    return kinds, outcome.text, outcome.ends_service


def started() -> Driver:
    run = Driver(sites=2)
    run.start("a", "b")
    return run


def test_a_site_is_paused_resumed_and_removed() -> None:
    run = started()
    assert asked(run, PauseSite(site="a", reason="x")) == ([SitePaused, PublishState], "a is paused", False)
    assert asked(run, PauseSite(site="a")) == ([], "a is paused", False), "twice is the same as once"
    run.take(run.machine.pause_site("a", by="site", reason="night", now=0.0))
    assert asked(run, ResumeSite(site="a")) == ([SiteResumed, PublishState], "a rests by its own wish: night", False)
    kinds, text, ends = asked(run, RemoveSite(site="a", reason="sold"))
    assert (kinds[:2], text, ends) == ([SiteLeft, DismissSite], "a is removed", False)
    with pytest.raises(UsageError, match="a is not a site of this run; its sites are: b"):
        asked(run, PauseSite(site="a"))


def test_rounds_end_early_only_when_there_is_a_model() -> None:
    with pytest.raises(UsageError, match="no round has begun"):
        asked(Driver(sites=2), FinishEarly())
    kinds, text, ends = asked(started(), FinishEarly(reason="enough"))
    assert (kinds[0], text, ends) == (RoundsEndedEarly, "the rounds end with round 1", False)


def test_a_stop_ends_the_run_and_then_the_service_that_stays() -> None:
    run = started()
    assert asked(run, StopRun(reason="x")) == ([RunEnded, PublishState], "the run is stopped", True)
    assert asked(run, FinishEarly()) == ([], "the run is over (failed)", False)
    assert asked(run, StopRun()) == ([], "the run is over (failed); the aggregator leaves", True)


def test_a_damaged_request_is_answered_and_ends_nothing(tmp_path: Path) -> None:
    requests = RequestQueue(tmp_path)
    (folder,) = tmp_path.iterdir()
    for number, damaged in enumerate((b"", b"{", b'{"reason":' + 3000 * b"["), start=1):
        (folder / f"{number}.json").write_bytes(damaged)
    done: list[OperatorRequest] = []
    requests.process_pending(lambda request: str(done.append(request)))
    assert done == []
    assert sorted(path.name for path in folder.iterdir()) == ["1.answer", "2.answer", "3.answer"]
    answer = requests.take_result("3")
    assert answer is not None
    assert not answer.ok
