"""What the line makes of its parts: in time or late, once, and in the order of their numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from edge.config import InspectConfig
from edge.config.inspection import ModbusTriggerConfig, MqttTriggerConfig, PartsConfig, TriggerConfig
from edge.frame import Captured, make_frame, trigger_now
from edge.inspector import Inspector
from edge.parts.tracker import PartTracker
from edge.result import Reason, Result
from edge.runtimes.load import open_runtime
from edge.verdict import Observation
from edgeflame.errors import CrashLoopError, RuntimeUnavailableError
from edgeflame.images import ImageU8
from edgeflame.package import Package
from tests.support.inspection_results import result
from tests.support.small_package import bad_image, good_image
from tests.support.waiting import wait_for

BY_MQTT = TriggerConfig(mqtt=MqttTriggerConfig(topic="t"))
BY_COUNTER = TriggerConfig(modbus=ModbusTriggerConfig(host="plc", register=0))
AGES = 3600.0


class SlowInspector:
    """A real inspector that waits for leave before each image."""

    product, provider, observer, review_band = "p", "cpu", None, 0.0

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self.model_id, self.threshold = inspector.model_id, inspector.threshold
        self.may_go = threading.Semaphore(0)
        self.begun: list[str] = []
        self.failure: Exception | None = None

    def set_threshold(self, value: float | None) -> None:
        raise NotImplementedError

    def inspect(self, captured: Captured) -> Observation:
        self.begun.append(captured.frame.part_id)
        assert self.may_go.acquire(timeout=60)
        if self.failure is not None:
            raise self.failure
        return self._inspector.inspect(captured)


@pytest.fixture(scope="module")
def inspector(package: Package) -> Inspector:
    return Inspector(package, open_runtime(package.model_onnx, device="cpu"), InspectConfig())


@pytest.fixture
def slow(inspector: Inspector) -> Iterator[SlowInspector]:
    judge = SlowInspector(inspector)
    yield judge
    judge.may_go.release(1000)


@contextlib.contextmanager
def keeping(
    trigger: TriggerConfig | None = None, *, judge: SlowInspector | None = None, **keys: Any
) -> Iterator[PartTracker]:
    """A tracker; in the end ``judge`` may go, so that closing need not wait for it."""
    tracker = PartTracker("cam", trigger or TriggerConfig(), PartsConfig(**keys))
    try:
        yield tracker
    finally:
        if judge is not None:
            judge.may_go.release(1000)
        tracker.close()


def part(
    name: str = "p", image: ImageU8 | None = None, *, age_s: float = 0.0, number: int | None = None, **keys: Any
) -> Captured:
    frame = make_frame(
        part_id=name,
        source="s",
        image_bgr=good_image(1, 200) if image is None else image,
        captured_monotonic_s=time.monotonic() - age_s,
    )
    if number is not None:
        keys["trigger"] = dataclasses.replace(trigger_now(None, number), at_s=frame.captured_monotonic_s)
    return Captured(sequence=0, frame=dataclasses.replace(frame, **keys))


def verdict(tracker: PartTracker, judge: Any, captured: Captured) -> Result:
    return tracker.finish(judge, captured, tracker.inspect(judge, captured)).result


# In time or late.


@pytest.mark.parametrize("deadline_ms", [None, 1000 * AGES])
def test_in_time_the_models_verdict_is_the_parts(inspector: Inspector, deadline_ms: float | None) -> None:
    with keeping(deadline_ms=deadline_ms) as tracker:
        found = [verdict(tracker, inspector, part(image=image)) for image in (good_image(1, 200), bad_image(2, 200))]
        assert tracker.problem() is None
        tracker.raise_if_hung()
    assert [(one.verdict, one.reasons, one.late) for one in found] == [
        ("pass", (), False), ("fail", ("above_threshold",), False),
    ]  # fmt: skip


def test_at_the_deadline_the_verdict_is_unknown_while_the_model_still_runs(slow: SlowInspector) -> None:
    with keeping(deadline_ms=500) as tracker:
        late = verdict(tracker, slow, part("late"))
        wait_for(lambda: slow.begun == ["late"], "the model has it")  # and does not answer: it has no leave
        assert (late.verdict, late.reasons, late.late, late.score) == ("unknown", ("late",), True, None)
        assert "the model has not answered by then" in (late.detail or "")
        assert tracker.counts.late_answers == 0
        slow.may_go.release()
        wait_for(lambda: tracker.counts.late_answers == 1, "the model answers")
        assert tracker.busy_s() == 0.0
        slow.may_go.release()
        following = part("following", age_s=-AGES)  # with a deadline far away
        assert verdict(tracker, slow, following).verdict == "pass"
        assert tracker.counts.late_answers == 1
    assert slow.begun == ["late", "following"]


def test_while_the_model_hangs_every_part_is_unknown_in_time_and_the_line_says_so(slow: SlowInspector) -> None:
    with keeping(judge=slow, deadline_ms=500, hang_s=0.1) as tracker:
        first, second = verdict(tracker, slow, part("first")), verdict(tracker, slow, part("second"))
        assert (first.reasons, first.late) == (("late",), True)
        assert (second.verdict, second.reasons, second.late) == ("unknown", ("late", "model_not_ready"), True)
        assert "busy with part first" in (second.detail or "")
        wait_for(lambda: slow.begun == ["first"], "the model has the first")
        assert "the model has been busy with one image" in (tracker.problem() or "")
        wait_for(lambda: tracker.busy_s() > 0.1, "it has hung for long")
        with pytest.raises(CrashLoopError, match="has to be started again"):
            tracker.raise_if_hung()


def test_a_part_whose_turn_comes_too_late_is_not_given_to_the_model(slow: SlowInspector) -> None:
    with keeping(deadline_ms=50) as tracker:
        late = verdict(tracker, slow, part(age_s=1.0))
    assert (late.reasons, late.late, slow.begun) == (("late",), True, [])
    assert "its turn came after the deadline" in (late.detail or "")


def test_what_comes_after_its_deadline_keeps_its_score_and_is_no_pass(inspector: Inspector) -> None:
    """As when the answer and the deadline come together: whoever finishes it looks at the clock last."""
    with keeping(deadline_ms=50) as tracker:
        captured = part(age_s=1.0)
        late = tracker.finish(inspector, captured, inspector.inspect(captured))
    assert (late.result.verdict, late.result.reasons, late.result.late) == ("unknown", ("late",), True)
    assert late.result.score is not None
    assert "it would have been pass" in (late.result.detail or "")
    assert late.due_monotonic_s == captured.frame.captured_monotonic_s + 0.05


def test_the_deadline_counts_from_the_trigger(slow: SlowInspector) -> None:
    with keeping(BY_COUNTER, deadline_ms=500) as tracker:
        captured = part(number=4)
        assert captured.frame.trigger is not None
        assert tracker.due_s(captured) == captured.frame.trigger.at_s + 0.5


def test_what_a_judge_raises_in_time_is_raised(slow: SlowInspector) -> None:
    slow.failure = RuntimeUnavailableError("out of memory")
    slow.may_go.release(2)
    with keeping(deadline_ms=1000 * AGES) as tracker:
        with pytest.raises(RuntimeUnavailableError, match="out of memory"):
            tracker.inspect(slow, part())
        slow.failure = None
        assert verdict(tracker, slow, part()).verdict == "pass"


# Faults that need no model.


def test_an_image_captured_too_long_ago_is_not_judged(slow: SlowInspector) -> None:
    with keeping(max_age_ms=500) as tracker:
        stale = verdict(tracker, slow, part(age_s=2.0))
    assert (stale.verdict, stale.reasons, stale.late, slow.begun) == ("unknown", ("stale",), False, [])
    assert "parts.max_age_ms is 500" in (stale.detail or "")


@pytest.mark.parametrize("fault", [None, Reason.NO_IMAGE, Reason.OVERRUN, Reason.TRIGGER_UNCLEAR])
def test_a_part_without_an_image_is_unknown_even_while_the_model_hangs(
    slow: SlowInspector, fault: Reason | None
) -> None:
    with keeping(judge=slow, deadline_ms=30) as tracker:
        verdict(tracker, slow, part("hangs"))
        captured = part(age_s=-AGES, fault=fault, error="why")
        captured = dataclasses.replace(captured, frame=dataclasses.replace(captured.frame, image_bgr=None))
        unseen = verdict(tracker, slow, captured)
    expected = "unreadable" if fault is None else fault.value
    assert (unseen.verdict, unseen.reasons, unseen.detail, unseen.late) == ("unknown", (expected,), "why", False)


# Numbers and names.


def numbered(tracker: PartTracker, inspector: Inspector, *numbers: int) -> list[tuple[int | None, int, bool]]:
    found = [verdict(tracker, inspector, part(number=number)) for number in numbers]
    return [(one.part_number, one.parts_missing, one.duplicate) for one in found]


def test_missing_and_repeated_parts_are_in_the_result(inspector: Inspector) -> None:
    with keeping(BY_COUNTER) as tracker:
        assert numbered(tracker, inspector, 65534, 65535, 2, 2) == [
            (65534, 0, False), (65535, 0, False), (2, 2, False), (2, 0, True),
        ]  # fmt: skip
        jumped = verdict(tracker, inspector, part(number=5))
    assert jumped.detail == "2 parts missing between 2 and 5"


def test_a_part_that_could_not_be_judged_is_not_missing(inspector: Inspector) -> None:
    with keeping(BY_COUNTER) as tracker:
        numbered(tracker, inspector, 1)
        captured = part(number=2, fault=Reason.NO_IMAGE, error="none")
        captured = dataclasses.replace(captured, frame=dataclasses.replace(captured.frame, image_bgr=None))
        verdict(tracker, inspector, captured)
        assert numbered(tracker, inspector, 3) == [(3, 0, False)]


def test_names_that_end_in_a_number(inspector: Inspector) -> None:
    with keeping(number=r"(\d+)\.png$") as tracker:
        names = ("a-1.png", "a-2.png", "a-5.png", "x.png", "a-6.png", "x.png")
        found = [verdict(tracker, inspector, part(name)) for name in names]
    assert [one.part_number for one in found] == [1, 2, 5, None, 6, None]
    assert [one.parts_missing for one in found] == [0, 0, 2, 0, 0, 0]
    assert [one.duplicate for one in found] == [False] * 5 + [True]


def test_without_triggers_or_numbers_names_mean_nothing(inspector: Inspector) -> None:
    with keeping() as tracker:
        assert not any(verdict(tracker, inspector, part("same")).duplicate for _ in range(2))


def test_an_outage_of_the_camera_is_no_part(inspector: Inspector) -> None:
    with keeping(BY_MQTT, number=r"(\d+)$") as tracker:
        assert numbered(tracker, inspector, 7) == [(7, 0, False)]
        outage = verdict(tracker, inspector, part("outage-000009"))
        assert (outage.part_number, outage.parts_missing) == (None, 0)
        assert numbered(tracker, inspector, 8) == [(8, 0, False)]


def test_a_restart_hides_no_gap_and_no_repetition(inspector: Inspector) -> None:
    past = [msgspec.structs.replace(result(n, part_id=f"p{n}"), camera="cam", part_number=n) for n in (6, 7)]
    other = msgspec.structs.replace(result(9), camera="other", part_number=900)
    with keeping(BY_COUNTER) as tracker:
        tracker.restore([*past, other])
        assert numbered(tracker, inspector, 7, 10) == [(7, 0, True), (10, 2, False)]
    with keeping(BY_MQTT) as tracker:
        tracker.restore([msgspec.structs.replace(result(1, part_id="A-1"), camera="cam")])
        captured = part("A-1", trigger=trigger_now("A-1"))
        assert verdict(tracker, inspector, captured).duplicate


def test_results_of_older_versions_are_read(inspector: Inspector) -> None:
    old = msgspec.json.decode(msgspec.json.encode(result(1)))
    for field in ("part_number", "parts_missing", "duplicate", "late", "camera"):
        old.pop(field, None)
    read = msgspec.convert(old, Result, strict=False)
    assert (read.part_number, read.parts_missing, read.duplicate, read.late) == (None, 0, False, False)
