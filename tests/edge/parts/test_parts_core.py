"""The pure cores of what a part is: numbers, deadlines, images for triggers, messages, polls."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.inspection import ModbusTriggerConfig, MqttTriggerConfig, PartsConfig, TriggerConfig
from edge.frame import Captured, Trigger, make_frame
from edge.parts.deadline import BoundedCall
from edge.parts.matching import ARRIVAL_S, MAX_HELD, MAX_IMAGES, MAX_WAITING, UNTRIGGERED, Match, Matcher, MatchWindow
from edge.parts.modbus_trigger import PartCounter, RisingEdge
from edge.parts.mqtt_trigger import MAX_PAYLOAD_BYTES, PartAnnouncement, read_announcement
from edge.parts.sequence import NumberRange, SequenceCheck, SequenceFinding, SequenceKind, check_parts
from edge.result import Reason
from edge.status import PartCounts
from edge.verdict import Observation
from edgeflame.config import parse_config
from edgeflame.errors import ConfigError, DataError

UTC = dt.timezone.utc
NOON = dt.datetime(2026, 1, 2, 12, tzinfo=UTC)


def kinds(identity: SequenceCheck, *numbers: int) -> list[SequenceKind]:
    return [identity.check(None, number).kind for number in numbers]


# Numbers.


def test_a_jump_is_so_many_missing_parts() -> None:
    identity = SequenceCheck()
    assert identity.check("a", 4) == SequenceFinding(kind=SequenceKind.FIRST)
    assert identity.check("b", 5) == SequenceFinding(kind=SequenceKind.NEXT, last=4)
    assert identity.check("c", 9) == SequenceFinding(kind=SequenceKind.GAP, missing=3, last=5)


def test_a_number_seen_before_is_a_duplicate_and_changes_nothing() -> None:
    identity = SequenceCheck()
    assert kinds(identity, 1, 2, 3, 2, 3, 3, 4) == [
        SequenceKind.FIRST, SequenceKind.NEXT, SequenceKind.NEXT,
        SequenceKind.DUPLICATE, SequenceKind.DUPLICATE, SequenceKind.DUPLICATE, SequenceKind.NEXT,
    ]  # fmt: skip


def test_a_part_that_was_jumped_over_and_comes_after_all_is_out_of_order_and_no_duplicate() -> None:
    assert kinds(SequenceCheck(), 1, 3, 2, 2, 4) == [
        SequenceKind.FIRST, SequenceKind.GAP, SequenceKind.OUT_OF_ORDER, SequenceKind.DUPLICATE, SequenceKind.NEXT,
    ]  # fmt: skip


def test_a_numbering_that_begins_anew_is_no_thousand_missing_parts() -> None:
    identity = SequenceCheck(max_gap=100)
    assert kinds(identity, 5000, 1, 2, 4000, 4001, 2) == [
        SequenceKind.FIRST, SequenceKind.RESTART, SequenceKind.NEXT,
        SequenceKind.RESTART, SequenceKind.NEXT, SequenceKind.RESTART,
    ]  # fmt: skip
    assert identity.last == 2


def test_counters_wrap() -> None:
    identity = SequenceCheck(wrap=NumberRange(first=1, last=65535))
    assert kinds(identity, 65534, 65535, 1, 2, 65535) == [
        SequenceKind.FIRST, SequenceKind.NEXT, SequenceKind.NEXT, SequenceKind.NEXT, SequenceKind.DUPLICATE,
    ]  # fmt: skip
    assert identity.check(None, 5) == SequenceFinding(kind=SequenceKind.GAP, missing=2, last=2)
    assert identity.check(None, 0).kind is SequenceKind.NEXT  # no number of this counter: nothing can be said
    assert identity.last == 5


def test_a_missing_part_across_the_wrap() -> None:
    identity = SequenceCheck(wrap=NumberRange(first=0, last=99))
    assert [identity.check(None, number).missing for number in (98, 1)] == [0, 2]


def test_names_without_numbers_can_be_repeated_as_far_as_they_are_remembered() -> None:
    identity = SequenceCheck(remembered=2)
    found = [identity.check(name, None).kind for name in ("a", "b", "a", "c", "b", None, None)]
    assert found == [
        SequenceKind.NEXT,
        SequenceKind.NEXT,
        SequenceKind.DUPLICATE,
        SequenceKind.NEXT,
        SequenceKind.NEXT,
        SequenceKind.NEXT,
        SequenceKind.NEXT,
    ]


@given(st.integers(1, 50), st.lists(st.integers(1, 40), max_size=60), st.booleans())
def test_missing_parts_are_counted_whole_over_any_number_of_wraps(start: int, steps: list[int], wraps: bool) -> None:
    """Against a plain count that never wraps: what was stepped over is what is missing, once."""
    wrap = NumberRange(first=1, last=100) if wraps else None
    identity, position, missing = SequenceCheck(wrap=wrap), start, 0
    identity.check(None, start)
    for step in steps:
        position += step
        finding = identity.check(None, (position - 1) % 100 + 1 if wraps else position)
        assert finding.kind is (SequenceKind.NEXT if step == 1 else SequenceKind.GAP)
        missing += finding.missing
    assert missing == position - start - len(steps)


@given(
    st.lists(st.integers(0, 30), max_size=80),
    st.sampled_from([None, NumberRange(first=0, last=30), NumberRange(first=3, last=20)]),
)
def test_whatever_comes_the_last_number_is_one_that_came_and_memory_is_bounded(
    numbers: list[int], wrap: NumberRange | None
) -> None:
    identity = SequenceCheck(wrap=wrap, max_gap=10, remembered=7)
    for index, number in enumerate(numbers):
        finding = identity.check(None, number)
        assert finding.missing >= 0
        assert (finding.missing > 0) == (finding.kind is SequenceKind.GAP)
        if index and number == numbers[index - 1] == identity.last:
            assert finding.kind is SequenceKind.DUPLICATE
        assert identity.last is None or identity.last in numbers[: index + 1]
        assert len(identity._seen) <= 7


# Deadlines.


class Timed:
    """An inspector for which each image takes so long on a clock that it moves itself."""

    product, model_id, provider, observer = "p", "m", "cpu", None
    threshold, review_band = 1.0, 0.0

    def __init__(self) -> None:
        self.now_s = 0.0
        self.takes_s = 0.0
        self.failure: Exception | None = None
        self.scored: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def inspect(self, captured: Captured) -> Observation:
        self.scored.append(captured.frame.part_id)
        self.now_s += self.takes_s
        if self.failure is not None:
            raise self.failure
        return Observation(score=0.5)

    set_threshold = reconfigured = inspect_photograph = None


@contextlib.contextmanager
def bounded(inspector: Timed) -> Iterator[tuple[Callable[[str, float], Observation], PartCounts]]:
    counts = PartCounts()
    call = BoundedCall(camera="c", counts=counts, clock=inspector.clock)

    def inspect(name: str, due_s: float) -> Observation:
        captured = Captured(sequence=0, frame=make_frame(part_id=name, source="s", captured_monotonic_s=0.0))
        return call.inspect(inspector, captured, due_s)  # type: ignore[arg-type]

    try:
        yield inspect, counts
    finally:
        call.close()


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 30)), min_size=1, max_size=12), st.floats(0.1, 8))
def test_an_answer_counts_if_and_only_if_it_comes_before_the_deadline(
    parts: list[tuple[float, float]], deadline_s: float
) -> None:
    """A simulated line: pauses between captures, and how long the model takes for each."""
    inspector, captured_s, num_late = Timed(), 0.0, 0
    with bounded(inspector) as (inspect, counts):
        for number, (pause_s, takes_s) in enumerate(parts):
            captured_s += pause_s
            inspector.now_s, inspector.takes_s = max(inspector.now_s, captured_s), takes_s
            due_s = captured_s + deadline_s
            begun_s = inspector.now_s
            found = inspect(str(number), due_s)
            if begun_s >= due_s:
                assert found.details == ("its turn came after the deadline",)
                assert str(number) not in inspector.scored
                continue
            # Also of a late one: what it would have been is shown.
            assert (found.score, found.faults) == (0.5, ())
            num_late += inspector.now_s >= due_s
        assert counts.late_answers == num_late


def test_an_answer_at_the_very_deadline_is_late() -> None:
    inspector = Timed()
    inspector.takes_s = 1.0
    with bounded(inspector) as (inspect, counts):
        assert inspect("a", 1.0).score == 0.5
        assert counts.late_answers == 1
        assert inspect("b", 1.0).faults == (Reason.LATE,)
    assert inspector.scored == ["a"]


def test_a_failure_is_raised_in_time_and_noted_after_the_deadline() -> None:
    inspector = Timed()
    inspector.failure = ValueError("no")
    with bounded(inspector) as (inspect, counts):
        with pytest.raises(ValueError, match="no"):
            inspect("a", 1.0)
        inspector.takes_s = 2.0
        late = inspect("b", 1.0)
    assert (late.faults, late.score) == ((Reason.LATE,), None)
    assert late.details == ("the model failed after the deadline: ValueError('no')",)
    assert counts.late_answers == 1


# Images for triggers.


def trigger(at_s: float, name: str = "p", **keys: Any) -> Trigger:
    return Trigger(part_id=name, at_s=at_s, at_utc=NOON, **keys)


def matcher(delay_s: float = 0.0, window_s: float = 0.1, **keys: Any) -> Matcher[str]:
    return Matcher(MatchWindow(delay_s=delay_s, window_s=window_s, **keys))


def ends(matcher: Matcher[str]) -> list[tuple[str | None, str | Reason | None]]:
    return [(match.trigger.part_id, match.image or match.reason) for match in matcher.matches()]


def test_the_first_image_after_trigger_and_delay_is_the_parts() -> None:
    matching = matcher(delay_s=0.05)
    matching.add_image("before", 9.99, 9.99)
    matching.add_trigger(trigger(10.0), 10.0)
    matching.add_image("too early", 10.04, 10.04)
    assert ends(matching) == []
    matching.add_image("right", 10.06, 10.07)
    matching.add_image("another", 10.08, 10.09)
    assert ends(matching) == [("p", "right")]
    matching.advance(11.0)
    assert matching.dropped == {UNTRIGGERED: 3}


def test_a_trigger_that_comes_after_its_image_still_gets_it() -> None:
    matching = matcher()
    matching.add_image("image", 10.02, 10.02)
    matching.add_trigger(trigger(10.0), 10.1)
    assert ends(matching) == [("p", "image")]


def test_no_image_in_the_window_is_said_when_a_later_one_comes_or_nothing_does() -> None:
    matching = matcher()
    matching.add_trigger(trigger(10.0, "a"), 10.0)
    matching.add_image("too late", 10.2, 10.2)
    assert ends(matching) == [("a", Reason.NO_IMAGE)]
    matching.add_trigger(trigger(20.0, "b"), 20.0)
    assert matching.wake_at() == pytest.approx(20.1 + ARRIVAL_S)
    matching.camera_away("unplugged")
    matching.advance(20.34)
    assert ends(matching) == []
    matching.advance(20.36)
    (match,) = matching.matches()
    assert match.reason is Reason.NO_IMAGE
    assert match.detail == "no image between 0 and 100 ms after the trigger; the camera is away: unplugged"
    assert matching.wake_at() is None


def test_two_triggers_share_no_image() -> None:
    matching = matcher()
    matching.add_trigger(trigger(10.0, "a"), 10.0)
    matching.add_trigger(trigger(10.01, "b"), 10.01)
    matching.add_image("one", 10.05, 10.05)
    matching.add_image("two", 10.2, 10.2)  # past b's window
    assert ends(matching) == [("a", "one"), ("b", Reason.NO_IMAGE)]


def test_a_part_ends_at_its_deadline_if_that_is_before_its_window_does() -> None:
    matching = matcher(window_s=5.0, deadline_s=1.0)
    matching.add_trigger(trigger(10.0), 10.0)
    assert matching.wake_at() is not None
    assert 10.9 < (matching.wake_at() or 0.0) < 11.0
    matching.advance(11.0)
    assert ends(matching) == [("p", Reason.NO_IMAGE)]


def test_a_trigger_with_a_fault_gets_no_image() -> None:
    matching = matcher()
    matching.add_image("image", 10.02, 10.02)
    matching.add_trigger(trigger(10.0, fault=Reason.TRIGGER_UNCLEAR, detail="junk"), 10.03)
    (match,) = matching.matches()
    assert (match.image, match.reason, match.detail) == (None, Reason.TRIGGER_UNCLEAR, "junk")


def test_too_many_parts_lose_their_images_then_are_refused_and_never_vanish() -> None:
    matching = matcher()
    for number in range(MAX_WAITING):
        assert matching.add_trigger(trigger(float(number), str(number)), float(number))
        matching.add_image("image", float(number), float(number))
    assert not matching.add_trigger(trigger(1e6), 1e6)
    found = ends(matching)
    assert [reason for _, reason in found] == ["image"] * MAX_IMAGES + [Reason.OVERRUN] * (MAX_WAITING - MAX_IMAGES)
    assert matching.dropped == {"overrun": MAX_WAITING - MAX_IMAGES}
    assert matching.num_waiting == 0


def test_closing_ends_every_trigger() -> None:
    matching = matcher()
    matching.add_trigger(trigger(10.0, "a"), 10.0)
    matching.close("gone")
    (match,) = matching.matches()
    assert (match.reason, match.detail) == (Reason.NO_IMAGE, "gone")


_TIMES = st.floats(0, 20).map(lambda value: round(value, 3))


@given(
    st.lists(_TIMES, max_size=30).map(sorted),
    st.lists(st.tuples(_TIMES, st.floats(0, 0.2)), max_size=30),
    st.floats(0, 0.5),
    st.floats(0.01, 1.0),
)
def test_every_trigger_ends_once_with_an_image_of_its_window_that_is_nobody_elses(
    images: list[float], triggers: list[tuple[float, float]], delay_s: float, window_s: float
) -> None:
    """Images arrive as they are captured; triggers a little after they are."""
    matching: Matcher[int] = Matcher(MatchWindow(delay_s=delay_s, window_s=window_s))
    events: list[tuple[float, int, Any]] = [(at, 0, (key, at)) for key, at in enumerate(images)]
    events += [(at + late, 1, trigger(at, str(key))) for key, (at, late) in enumerate(triggers)]
    found: list[Match[int]] = []
    for now, kind, what in sorted(events, key=lambda event: event[:2]):
        if kind == 0:
            matching.add_image(what[0], what[1], now)
        else:
            assert matching.add_trigger(what, now)
        found += matching.matches()
    while (wake_at := matching.wake_at()) is not None:
        matching.advance(wake_at)
        found += matching.matches()
    matching.advance(100.0)
    assert sorted(match.trigger.part_id or "" for match in found) == sorted(str(key) for key in range(len(triggers)))
    used = [match.image for match in found if match.image is not None]
    assert len(used) == len(set(used))
    assert len(used) + matching.dropped[UNTRIGGERED] == len(images)
    for match in found:
        opens = match.trigger.at_s + delay_s
        if match.image is not None:
            assert opens <= images[match.image] <= opens + window_s
        else:
            assert match.reason is Reason.NO_IMAGE


def test_a_lone_trigger_gets_its_image_whatever_went_before() -> None:
    matching = matcher(window_s=0.5)
    for number in range(5 * MAX_HELD):
        matching.add_image(f"image {number}", number / 100, number / 100)
    matching.add_trigger(trigger(0.35), 0.4)
    assert ends(matching) == [("p", "image 35")]


# Messages.


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"A-17", ("A-17", None, None)),
        (b" 17\n", ("17", None, None)),
        (b'{"part_id": "A-17"}', ("A-17", None, None)),
        (b'{"part_id": 17, "number": 3, "plant": [1, 2]}', ("17", 3, None)),
        (b'{"number": 3, "time": "2026-01-02T13:00:00+01:00"}', (None, 3, NOON)),
        (b'{"number": 3, "time": 1767355200}', (None, 3, NOON)),
    ],
)
def test_messages_that_announce_a_part(payload: bytes, expected: tuple[Any, ...]) -> None:
    part_id, number, time = expected
    assert read_announcement(payload) == PartAnnouncement(part_id=part_id, number=number, time=time)


def test_the_plants_own_keys() -> None:
    said = read_announcement(b'{"serial": "x", "n": 7}', part_id_key="serial", number_key="n")
    assert (said.part_id, said.number) == ("x", 7)


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"  ", b"\xff\xfe", b"two\nlines", b"x" * 201, b"{", b'{"part_id": null}', b'{"part_id": ["a"]}',
        b'{"part_id": true}', b'{"part_id": ""}', b'{"number": -1}', b'{"number": 1.5}', b'{"number": true}',
        b'{"number": 99999999999999999999}', b'{"part_id": "a", "time": "2026-01-02T13:00:00"}',
        b'{"part_id": "a", "time": "noon"}', b'{"part_id": "a", "time": 1e300}', b"{" * 9000,
        b"[" * MAX_PAYLOAD_BYTES + b"]",
    ],
)  # fmt: skip
def test_junk_is_one_error(payload: bytes) -> None:
    with pytest.raises(DataError) as raised:
        read_announcement(payload)
    assert "\n" not in str(raised.value)


@given(
    st.binary(max_size=60)
    | st.text(max_size=40).map(str.encode)
    | st.text(max_size=40).map(lambda text: b"{" + text.encode())
)
def test_any_bytes_are_a_part_or_an_error(payload: bytes) -> None:
    try:
        said = read_announcement(payload)
    except DataError:
        return
    assert said.part_id or said.number is not None


# Polls.


def test_a_contact_closes_once_a_part() -> None:
    contact = RisingEdge(max_interval_s=0.5)
    noticed = [contact.update(level, now / 10) for now, level in enumerate([1, 1, 0, 1, 1, 0, 0, 1])]
    assert [number for number, part in enumerate(noticed) if part is not None] == [3, 7]
    assert all(part.fault is None for part in noticed if part is not None)


def test_a_contact_that_closed_while_nobody_asked_is_a_part_of_an_unknown_time() -> None:
    contact = RisingEdge(max_interval_s=0.5)
    contact.update(False, 0.0)
    part = contact.update(True, 3.0)
    assert part is not None
    assert part.fault == "it came while the PLC could not be asked for 3 s; when, is not known"


def test_a_counter_announces_its_changes() -> None:
    counter = PartCounter(NumberRange(first=0, last=65535), max_gap=1000, max_interval_s=0.5)
    values = [7, 7, 8, 11, 65535, 0]
    noticed = [counter.update(value, now / 10) for now, value in enumerate(values)]
    assert [part and part.number for part in noticed] == [None, None, 8, 11, 65535, 0]
    assert [bool(part and part.fault) for part in noticed] == [False, False, False, False, True, False]


def test_a_counter_that_went_back_may_announce_no_part() -> None:
    counter = PartCounter(NumberRange(first=1, last=65535), max_gap=1000, max_interval_s=0.5)
    noticed = [counter.update(value, 0.1 * now) for now, value in enumerate([500, 0, 1, 2, 1])]
    # 0 is no number of a counter that begins with 1: it was reset, and 1 is the first part after that.
    assert [part and part.number for part in noticed] == [None, None, 1, 2, 1]
    assert [bool(part and part.fault) for part in noticed] == [False, False, False, False, True]


# Settings.


@pytest.mark.parametrize(
    ("kind", "keys", "says"),
    [
        (MqttTriggerConfig, {"topic": "a/#"}, "without wildcards"),
        (MqttTriggerConfig, {"ca": "ca.pem"}, "broker of its own"),
        (ModbusTriggerConfig, {"host": "h"}, "only one"),
        (ModbusTriggerConfig, {"host": "h", "coil": 1, "register": 1}, "only one"),
        (ModbusTriggerConfig, {"host": "h", "register": 65535, "words": 2}, "must be at 0..65534, not 65535"),
        (ModbusTriggerConfig, {"host": "", "coil": 1}, "host"),
        (TriggerConfig, {"delay_ms": -500}, "lookback_ms"),
        (TriggerConfig, {"window_ms": 0}, "window_ms"),
        (PartsConfig, {"deadline_ms": 0}, "deadline_ms"),
        (PartsConfig, {"number": "("}, "regular expression"),
        (PartsConfig, {"number": r"\d+"}, "one group"),
        (PartsConfig, {"wrap": (5, 5)}, "wrap"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(kind: Any, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(b"", kind, "line.toml", keys)


def test_a_deadline_before_the_first_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="deadline_ms must be more than"):
        check_parts(TriggerConfig(delay_ms=100, mqtt=MqttTriggerConfig(topic="t")), PartsConfig(deadline_ms=100))
