"""The verdict: whatever is wrong, never a pass."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.inspector import decide_verdict
from edge.result import Reason, Verdict


def test_the_threshold_itself_passes_and_above_it_fails() -> None:
    assert decide_verdict(score=10.0, threshold=10.0).verdict is Verdict.PASS
    above = decide_verdict(score=math.nextafter(10.0, 11.0), threshold=10.0)
    assert above.verdict is Verdict.FAIL
    assert above.reasons == (Reason.ABOVE_THRESHOLD,)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("band", [0.0, 0.2])
def test_no_number_is_unknown(score: float, band: float) -> None:
    decision = decide_verdict(score=score, threshold=1.0, review_band=band)
    assert decision.verdict is Verdict.UNKNOWN
    assert decision.reasons == (Reason.SCORE_NOT_FINITE,)


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_broken_threshold_is_unknown(threshold: float) -> None:
    assert decide_verdict(score=0.0, threshold=threshold).verdict is Verdict.UNKNOWN


def test_no_score_is_unknown() -> None:
    assert decide_verdict(score=None, threshold=1.0).reasons == (Reason.NOT_SCORED,)


@pytest.mark.parametrize(
    ("score", "verdict"), [(8.9, "pass"), (9.0, "unknown"), (10.0, "unknown"), (11.0, "unknown"), (11.1, "fail")]
)
def test_the_review_band_leaves_near_scores_to_a_person(score: float, verdict: str) -> None:
    assert decide_verdict(score=score, threshold=10.0, review_band=0.1).verdict.value == verdict


@given(
    score=st.none() | st.floats(),
    threshold=st.floats(),
    review_band=st.floats(0, 1, exclude_max=True),
    faults=st.lists(st.sampled_from(Reason), max_size=3),
)
def test_a_pass_means_scored_as_good_and_nothing_wrong(
    score: float | None, threshold: float, review_band: float, faults: list[Reason]
) -> None:
    decision = decide_verdict(score=score, threshold=threshold, review_band=review_band, faults=faults)
    if decision.verdict is Verdict.PASS:
        assert not faults
        assert score is not None
        assert math.isfinite(score)
        assert math.isfinite(threshold)
        assert score <= threshold
        assert not decision.reasons
    else:
        assert decision.reasons
    if faults:
        assert decision.verdict is Verdict.UNKNOWN
