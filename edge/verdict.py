"""The verdict on one part, made in one place. Pure.

:func:`make_result` turns what was found out about a frame into the part's result. It looks in this order, and the first
that applies decides:

    1. there is a fault, or no score                    unknown, with all faults
    2. the score is not finite                          unknown
    3. the score is within the review band              unknown: a person decides
    4. the score is above the threshold                 fail
    5. otherwise                                        pass

In any case, a part whose deadline has passed by then is unknown and late (:func:`mark_late`): its receiver has given
it up and must not see a pass. Findings about the part's number (missing parts, duplicates) are added last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from edge.frame import Captured
from edge.parts.sequence import SequenceFinding, SequenceKind
from edge.regions import find_regions
from edge.result import AnomalyRegion, Hop, Inspected, Reason, Result, Verdict
from edgeflame.images import ImageU8, Region


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What was found about one frame, before its verdict."""

    faults: Sequence[Reason] = ()
    """What went wrong; any fault makes the verdict ``unknown``."""
    details: Sequence[str] = ()
    """More about the faults, for people."""
    score: float | None = None
    """Raw distance; NaN if the model's answer was not finite, None if there was none."""
    image: ImageU8 | None = None
    """The model's input, ``[height, width, 3]`` uint8 BGR."""
    evidence: ImageU8 | None = None
    """The same area at the camera's resolution; the whole frame if that area does not fit into it."""
    ignored: ImageU8 | None = None
    """``[height, width]`` uint8, above 0 where that area is ignored; None if nothing is."""
    anomaly_map: npt.NDArray[np.float32] | None = None
    """``[h, w]`` smoothed raw distance over the same area; its maximum is the score."""
    shown_map: npt.NDArray[np.float32] | None = None
    """``[h, w]``, the map to show, with the same maximum; None where the graph gives none before smoothing."""
    area: Region | None = None
    """The same area in pixels of the frame."""


def unscored(captured: Captured, reason: Reason, detail: str) -> Observation:
    """The observation of a frame that was not scored, with the reason."""
    return Observation(faults=(reason,), details=(detail,), evidence=captured.frame.image_bgr)


def make_result(
    captured: Captured,
    observation: Observation,
    *,
    camera: str,
    model: str,
    threshold: float,
    review_band: float = 0.0,
    now_s: float,
    due_s: float | None = None,
    number: int | None = None,
    sequence: SequenceFinding | None = None,
) -> Result:
    """Make the result of one part.

    Args:
        captured: its frame.
        observation: what was found about the frame.
        camera: name of the camera.
        model: first 12 digits of the package's SHA-256.
        threshold: raw distance; a higher score is a defect.
        review_band: share of the threshold to either side in which the verdict is left to a person.
        now_s: the present time, seconds on the monotonic clock of the frames.
        due_s: the part's deadline on the same clock; None: it has none.
        number: the part's own number; None: it has none.
        sequence: its place among the parts before it; None: the parts have neither numbers nor names.
    """
    frame, score = captured.frame, observation.score
    verdict, reasons = _decide(score, threshold, review_band, observation.faults)
    result = mark_late(
        Result(
            camera=camera,
            sequence=captured.sequence,
            part_id=frame.part_id,
            source=frame.source,
            captured=frame.captured_utc,
            verdict=verdict.value,
            reasons=tuple(reason.value for reason in reasons),
            detail="; ".join(observation.details) or None,
            score=score if score is not None and math.isfinite(score) else None,
            threshold=threshold,
            latency_ms=round(1000 * (now_s - frame.captured_monotonic_s), 3),
            label=frame.label,
            model=model,
            regions=_regions(observation, threshold),
        ),
        now_s=now_s,
        due_s=due_s,
    )
    if sequence is None:
        return result
    return msgspec.structs.replace(
        result,
        part_number=number,
        parts_missing=sequence.missing,
        duplicate=sequence.kind is SequenceKind.DUPLICATE,
        detail="; ".join(filter(None, (result.detail, sequence.describe(number)))) or None,
    )


def mark_late(result: Result, *, now_s: float, due_s: float | None) -> Result:
    """The result as it is valid now: from its deadline on it is ``unknown`` and late; before, it is unchanged.

    Args:
        result: of a part.
        now_s: the present time, seconds on the monotonic clock.
        due_s: the part's deadline on the same clock; None: it has none.
    """
    if due_s is None or now_s < due_s or result.late:
        return result
    words = f"{1000 * (now_s - due_s):.1f} ms after its deadline"
    if result.verdict != Verdict.UNKNOWN.value:
        words += f"; it would have been {result.verdict}"
    others = tuple(reason for reason in result.reasons if reason != Reason.LATE.value)
    return msgspec.structs.replace(
        result,
        verdict=Verdict.UNKNOWN.value,
        reasons=(Reason.LATE.value, *others),
        detail="; ".join(filter(None, (words, result.detail))),
        late=True,
    )


def with_evidence(
    result: Result, captured: Captured, observation: Observation, *, due_s: float | None = None
) -> Inspected:
    """A result together with what it was made from."""
    captured.frame.passes(Hop.VERDICT)
    return Inspected(
        result=result,
        image=observation.evidence,
        anomaly_map=observation.anomaly_map,
        shown_map=observation.shown_map,
        ignored=observation.ignored,
        due_monotonic_s=due_s,
        origin=captured.frame.origin,
        captured_monotonic_s=captured.frame.captured_monotonic_s,
        passed=captured.frame.passed,
    )


def _regions(observation: Observation, threshold: float) -> tuple[AnomalyRegion, ...]:
    smoothed, shown = observation.anomaly_map, observation.shown_map
    if smoothed is None or observation.area is None:
        return ()
    return find_regions(smoothed if shown is None else shown, threshold, observation.area, smoothed)


def _decide(
    score: float | None, threshold: float, review_band: float, faults: Sequence[Reason]
) -> tuple[Verdict, tuple[Reason, ...]]:
    reasons = list(faults)
    if score is None:
        if not reasons:
            reasons.append(Reason.NOT_SCORED)
    elif not (math.isfinite(score) and math.isfinite(threshold)):
        reasons.append(Reason.SCORE_NOT_FINITE)
    if reasons or score is None:
        return Verdict.UNKNOWN, tuple(reasons)
    if review_band > 0 and abs(score - threshold) <= review_band * abs(threshold):
        return Verdict.UNKNOWN, (Reason.REVIEW_BAND,)
    if score > threshold:
        return Verdict.FAIL, (Reason.ABOVE_THRESHOLD,)
    return Verdict.PASS, ()
