"""Who may use a site's name."""

from __future__ import annotations

import pytest

from aggregator import membership
from aggregator.config import AggregateConfig
from aggregator.events import RunStarted, RunState, SiteJoined, apply_event, initial_state
from aggregator.membership import LIVENESS_TIMEOUT_S, Membership
from edgeflame.mqtt.messages import BlobNeed, Heartbeat, Hello, Presence, TurnedAway, Welcome

RUN, FIRST, SECOND = "0" * 32, "1" * 32, "2" * 32


def a_run(*members: str, **config: object) -> RunState:
    settings = AggregateConfig(**config)  # type: ignore[arg-type]
    state = initial_state(RunStarted(run=RUN, config=settings, time="2026-01-01T00:00:00Z"))
    for site in members:
        state = apply_event(state, SiteJoined(site=site, install=FIRST, initial="a" * 64))
    return state


class Names:
    """The members of a run, and processes that say hello."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.membership = Membership(state, aggregator_boot="f" * 32, now=0.0)

    def hello(self, site: str, *, install: str = FIRST, boot: str = "a", now: float = 0.0) -> str | None:
        """The reason of a refusal."""
        answer = self.membership.admit(site, Hello(boot=boot * 32, install=install), self.state, now)
        assert isinstance(answer, Welcome | TurnedAway)
        assert answer.boot == boot * 32
        return answer.reason if isinstance(answer, TurnedAway) else None

    def beat(self, site: str, boot: str, now: float) -> bool:
        return self.membership.heartbeat(site, Heartbeat(boot=boot * 32, ready=True), now)

    def offline(self, site: str, boot: str, now: float) -> bool:
        return self.membership.mark_offline(site, Presence(boot=boot * 32, online=False), now)


def test_a_name_belongs_to_the_install_that_was_heard_last() -> None:
    names = Names(a_run())
    assert names.hello("a", boot="a", now=0.0) is None
    assert names.hello("a", install=SECOND, boot="b", now=1.0) == "name_in_use"
    assert names.hello("a", boot="c", now=2.0) is None, "restarted"
    assert not names.beat("a", "a", 2.0)
    assert names.beat("a", "c", 10.0)
    assert names.hello("a", install=SECOND, boot="b", now=10.0 + LIVENESS_TIMEOUT_S - 1) == "name_in_use"
    assert names.hello("a", install=SECOND, boot="b", now=10.0 + LIVENESS_TIMEOUT_S) is None


def test_a_name_is_free_soon_after_its_holder_left_and_not_at_once_after_a_restart() -> None:
    names = Names(a_run("a"))
    assert names.membership.num_live(0.0) == 0, "known, and not heard yet"
    assert names.hello("a", install=SECOND, boot="b", now=1.0) == "name_in_use", "its holder has not come back yet"
    assert names.hello("a", boot="a", now=2.0) is None
    assert names.membership.num_live(2.0) == 1
    assert not names.offline("a", "d", 3.0)
    assert names.offline("a", "a", 3.0)
    assert names.hello("a", install=SECOND, boot="b", now=4.0) == "name_in_use"
    assert names.hello("a", install=SECOND, boot="b", now=7.0) is None


def test_names_that_are_made_up_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_SITES", 3)
    names = Names(a_run("member"))
    assert [names.hello(name, now=1.0) for name in ("x", "y", "z")] == [None, None, "full"]
    late = 1.0 + LIVENESS_TIMEOUT_S
    assert names.hello("z", now=late) is None
    assert [names.membership.is_known(name) for name in ("member", "x", "y", "z")] == [True, False, False, True]


def test_a_restart_within_a_step_is_progress_and_a_repeated_hello_is_none() -> None:
    names = Names(a_run())
    step = Heartbeat(boot="a" * 32, ready=True, activity="train", round=1, step=3)
    need = BlobNeed(sha256="b" * 64, missing=b"\x01")
    assert names.hello("a") is None
    assert [names.membership.is_progress("a", step) for _ in range(2)] == [True, False]
    assert [names.membership.is_new_chunk_request("a", need) for _ in range(2)] == [True, False]
    assert names.hello("a", now=1.0) is None
    assert not names.membership.is_progress("a", step)
    assert not names.membership.is_new_chunk_request("a", need)
    assert names.membership.release("a") == "a" * 32
    assert not names.membership.is_known("a")


def test_only_the_expected_sites_are_let_in() -> None:
    names = Names(a_run(expected_sites=("a", "b"), min_available_sites=2))
    assert [names.hello("a"), names.hello("c")] == [None, "unknown_site"]
