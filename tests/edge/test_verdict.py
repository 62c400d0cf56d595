"""The verdict: whatever is wrong, never a pass; and never after the deadline."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.frame import Captured, make_frame
from edge.parts.sequence import SequenceFinding, SequenceKind
from edge.result import Reason, Result
from edge.verdict import Observation, make_result, mark_late, unscored

CAPTURED = Captured(
    sequence=7, frame=make_frame(part_id="p", source="s", error="cable", label="good", captured_monotonic_s=100.0)
)


def decide(
    score: float | None, threshold: float = 1.0, *, faults: tuple[Reason, ...] = (), now_s: float = 100.5, **keys: Any
) -> Result:
    observation = Observation(score=score, faults=faults, details=tuple(f"about {fault.value}" for fault in faults))
    return make_result(CAPTURED, observation, camera="c", model="m", threshold=threshold, now_s=now_s, **keys)


def test_what_is_known_of_the_part_is_in_the_result() -> None:
    result = decide(0.5)
    assert (result.camera, result.model, result.sequence, result.part_id, result.source) == ("c", "m", 7, "p", "s")
    assert (result.label, result.score, result.threshold, result.latency_ms) == ("good", 0.5, 1.0, 500.0)
    assert (result.detail, result.part_number, result.parts_missing) == (None, None, 0)
    assert not result.late
    assert not result.duplicate
    assert not result.golden


def test_the_threshold_itself_passes_and_above_it_fails() -> None:
    assert decide(10.0, 10.0).verdict == "pass"
    above = decide(math.nextafter(10.0, 11.0), 10.0)
    assert (above.verdict, above.reasons) == ("fail", ("above_threshold",))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("band", [0.0, 0.2])
def test_no_number_is_unknown(score: float, band: float) -> None:
    result = decide(score, review_band=band)
    assert (result.verdict, result.reasons, result.score) == ("unknown", ("score_not_finite",), None)


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_broken_threshold_is_unknown(threshold: float) -> None:
    assert decide(0.0, threshold).verdict == "unknown"


def test_no_score_is_unknown() -> None:
    assert decide(None).reasons == ("not_scored",)


def test_a_fault_is_unknown_however_good_the_score() -> None:
    result = decide(0.1, faults=(Reason.TOO_DARK, Reason.BLANK))
    assert (result.verdict, result.reasons, result.score) == ("unknown", ("too_dark", "blank"), 0.1)
    assert result.detail == "about too_dark; about blank"


def test_a_frame_that_no_model_has_looked_at_is_unknown_for_the_reason_given() -> None:
    stale = unscored(CAPTURED, Reason.STALE, "2 s old")
    result = make_result(CAPTURED, stale, camera="c", model="m", threshold=1.0, now_s=102.0)
    assert (result.verdict, result.reasons, result.detail) == ("unknown", ("stale",), "2 s old")


@pytest.mark.parametrize(
    ("score", "verdict"), [(8.9, "pass"), (9.0, "unknown"), (10.0, "unknown"), (11.0, "unknown"), (11.1, "fail")]
)
def test_the_review_band_leaves_near_scores_to_a_person(score: float, verdict: str) -> None:
    assert decide(score, 10.0, review_band=0.1).verdict == verdict


def test_from_the_deadline_on_a_verdict_is_late() -> None:
    in_time = decide(0.5, now_s=math.nextafter(101.0, 0.0), due_s=101.0)
    assert (in_time.verdict, in_time.late) == ("pass", False)
    late = decide(0.5, now_s=101.0, due_s=101.0)
    assert (late.verdict, late.reasons, late.late, late.score) == ("unknown", ("late",), True, 0.5)
    assert late.detail == "0.0 ms after its deadline; it would have been pass"


def test_a_late_part_keeps_its_other_reasons_and_details() -> None:
    late = decide(2.0, now_s=101.25, due_s=101.0)
    assert (late.reasons, late.detail) == (
        ("late", "above_threshold"), "250.0 ms after its deadline; it would have been fail",
    )  # fmt: skip
    unready = decide(None, faults=(Reason.MODEL_NOT_READY,), now_s=101.0, due_s=101.0)
    assert unready.reasons == ("late", "model_not_ready")
    assert unready.detail == "0.0 ms after its deadline; about model_not_ready"
    assert decide(None, faults=(Reason.LATE,), now_s=101.0, due_s=101.0).reasons == ("late",)


def test_late_is_said_once() -> None:
    late = decide(0.5, now_s=101.0, due_s=101.0)
    assert mark_late(late, now_s=200.0, due_s=101.0) is late
    passed = decide(0.5)
    assert mark_late(passed, now_s=200.0, due_s=None) is passed
    assert mark_late(passed, now_s=200.0, due_s=200.0).verdict == "unknown"


def test_a_parts_place_among_the_others_is_added() -> None:
    gap = SequenceFinding(kind=SequenceKind.GAP, missing=2, last=3)
    result = decide(0.5, number=6, sequence=gap)
    assert (result.verdict, result.part_number, result.parts_missing, result.duplicate) == ("pass", 6, 2, False)
    assert result.detail == "2 parts missing between 3 and 6"
    late = decide(0.5, number=6, sequence=gap, now_s=101.0, due_s=101.0)
    assert late.detail == "0.0 ms after its deadline; it would have been pass; 2 parts missing between 3 and 6"
    assert decide(0.5, number=3, sequence=SequenceFinding(kind=SequenceKind.DUPLICATE, last=3)).duplicate


@given(
    score=st.none() | st.floats(),
    threshold=st.floats(),
    review_band=st.floats(0, 1, exclude_max=True),
    faults=st.lists(st.sampled_from(Reason), max_size=3),
    left_s=st.none() | st.floats(-5, 5),
)
def test_a_pass_means_scored_as_good_and_nothing_wrong(
    score: float | None, threshold: float, review_band: float, faults: list[Reason], left_s: float | None
) -> None:
    due_s = None if left_s is None else 100.0 + left_s
    result = decide(
        score, threshold, review_band=review_band, faults=tuple(faults), now_s=100.0, due_s=due_s
    )  # fmt: skip
    if result.verdict == "pass":
        assert not faults
        assert score is not None
        assert math.isfinite(score)
        assert math.isfinite(threshold)
        assert score <= threshold
        assert due_s is None or due_s > 100.0
        assert not result.reasons
    else:
        assert result.reasons
    if faults:
        assert result.verdict == "unknown"
    assert result.late == (due_s is not None and due_s <= 100.0)
