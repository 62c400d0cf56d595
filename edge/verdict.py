"""The verdict on one part: a pure function of its score and of what went wrong on the way.

A part passes only if it was seen, scored, and scored as good. Whatever else happens it is not passed: a defect
gives ``fail``, a fault gives ``unknown``, with the reasons.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass


class Verdict(str, enum.Enum):
    """What to do with the part: let it go on, take it out, or have a person look."""

    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    UNKNOWN = "unknown"


class Reason(str, enum.Enum):
    """Why a part was not passed; stable words for programs. More than one may apply."""

    ABOVE_THRESHOLD = "above_threshold"
    REVIEW_BAND = "review_band"
    """Too near the threshold to decide without a person."""
    NOT_SCORED = "not_scored"
    SCORE_NOT_FINITE = "score_not_finite"
    """NaN or infinite: something broke inside the model."""
    UNREADABLE = "unreadable"
    """The source had no usable image of the part."""
    UNFIT_IMAGE = "unfit_image"
    """The image does not fit the model's region of interest or input."""
    RUNTIME_FAILED = "runtime_failed"
    TOO_DARK = "too_dark"
    TOO_BRIGHT = "too_bright"
    BLANK = "blank"
    OUT_OF_FOCUS = "out_of_focus"
    """Far less sharp than the good parts the model was made of."""
    WRONG_SIZE = "wrong_size"
    """The frame has another size than it should have, or than the camera's first one had."""
    SHIFTED = "shifted"
    """The camera no longer looks where it looked when the model was made."""
    COLOUR_LOST = "colour_lost"
    """Grey, where good parts have colours."""
    COLOUR_SWAPPED = "colour_swapped"
    """Red and blue are exchanged."""
    FROZEN = "frozen"
    """The camera gives the same picture again and again, to the last bit."""
    NO_IMAGE = "no_image"
    """The part was announced, and no image was captured while it was there."""
    STALE = "stale"
    """The image was captured too long ago."""
    LATE = "late"
    """The part's deadline passed before there was a verdict."""
    MODEL_NOT_READY = "model_not_ready"
    """There is no model, or it is still busy with an earlier part."""
    OVERRUN = "overrun"
    """Parts come faster than they are judged, for longer than their images can wait."""
    TRIGGER_UNCLEAR = "trigger_unclear"
    """The trigger does not say which part it is, or when it was there."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict and its reasons; a pass has none."""

    verdict: Verdict
    reasons: tuple[Reason, ...]


def decide(
    *, score: float | None, threshold: float, review_band: float = 0.0, faults: Sequence[Reason] = ()
) -> Decision:
    """Judge one part.

    Args:
        score: raw distance; None if it could not be had.
        threshold: raw distance; a higher score is a defect.
        review_band: share of the threshold to either side in which the verdict is left to a person.
        faults: what went wrong before scoring; any makes the verdict ``unknown``.

    Returns:
        ``unknown`` on any fault or a score that is no finite number, ``fail`` above the threshold, else ``pass``.
    """
    reasons = list(faults)
    if score is None:
        if not reasons:
            reasons.append(Reason.NOT_SCORED)
    elif not (math.isfinite(score) and math.isfinite(threshold)):
        reasons.append(Reason.SCORE_NOT_FINITE)
    if reasons or score is None:
        return Decision(verdict=Verdict.UNKNOWN, reasons=tuple(reasons))
    if review_band > 0 and abs(score - threshold) <= review_band * abs(threshold):
        return Decision(verdict=Verdict.UNKNOWN, reasons=(Reason.REVIEW_BAND,))
    if score > threshold:
        return Decision(verdict=Verdict.FAIL, reasons=(Reason.ABOVE_THRESHOLD,))
    return Decision(verdict=Verdict.PASS, reasons=())
