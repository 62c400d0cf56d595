"""The result of one part: verdict and reasons, and the evidence that goes with it. Values only.

A part passes only if it was seen, scored, and scored as good. A defect gives ``fail``, any fault gives ``unknown``,
both with their reasons. :mod:`edge.verdict` makes the verdict.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.images import ImageU8
from edgeflame.log import printable_json


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
    """The frame has another size than it should have, than the model was made of, or than the camera's first."""
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
    """Parts come faster than they are inspected, for longer than their images can be kept."""
    TRIGGER_UNCLEAR = "trigger_unclear"
    """The trigger does not say which part it is, or when it was there."""


After = Literal["keep", "move", "delete"]


@dataclass(frozen=True, kw_only=True)
class FileOrigin:
    """The file of a watched folder that a frame was read from; recorded in the same transaction as the result."""

    folder: str
    """Absolute path."""
    name: str
    """Relative to the folder, with slashes."""
    size: int
    mtime_ns: int
    after: After = "keep"
    """What to do with the file once the result is on the disk."""


class AnomalyRegion(msgspec.Struct, frozen=True, kw_only=True):
    """One connected region of a part that looks like no good part."""

    outline: tuple[tuple[int, int], ...]
    """Corners of the polygon around it, x and y in pixels of the camera's frame, without holes."""
    area_px: int
    """Its area in pixels of the camera's frame, holes left out."""
    peak: float
    """Raw distance at its highest cell; the highest of all regions is the part's score."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``edgeflame inspect --json``."""

    sequence: int
    """Place in the order of capture, from 0; a gap is a dropped frame."""
    part_id: str
    source: str
    captured: dt.datetime
    """UTC."""
    verdict: str
    """``pass``, ``fail`` or ``unknown``."""
    reasons: tuple[str, ...]
    """Why it was not passed; words of :class:`edge.result.Reason`."""
    detail: str | None
    """What happened, for people, where a fault has more to say."""
    score: float | None
    """Raw distance; null if there is none or it is not finite."""
    threshold: float
    """Raw distance above which the part fails."""
    latency_ms: float
    """From capture to verdict."""
    label: str | None
    """``good`` or the defect, where the source knows the truth."""
    model: str
    """First 12 digits of the package's SHA-256."""
    camera: str = ""
    """Which of the daemon's cameras saw it; empty in results of older versions."""
    part_number: int | None = None
    """The part's own number in the order of parts; null if it has none."""
    parts_missing: int = 0
    """Number of parts missing between the one before and this one, by their numbers."""
    duplicate: bool = False
    """A part with this number or name has come before. Of several results for one part the worst counts."""
    late: bool = False
    """The deadline had passed; the verdict is then ``unknown``, whatever the score."""

    golden: bool = False
    """A golden part of a self-test; it does not count as production."""

    trial: bool = False
    """The verdict of a model on trial, which nobody has said may decide; the PLC is told ``unknown``."""

    regions: tuple[AnomalyRegion, ...] = ()
    """Where it is above the threshold, the highest first, 20 at most; empty if it is not, or has no score."""

    @property
    def is_right(self) -> bool | None:
        """Whether the verdict agrees with the label; None without a label or with the verdict ``unknown``."""
        if self.label is None or self.verdict == "unknown":
            return None
        return (self.verdict == "pass") == (self.label == "good")

    @property
    def ratio(self) -> float | None:
        """Score over threshold: 1 is at the threshold; None without a score."""
        return None if self.score is None else self.score / self.threshold

    @property
    def part_file_name(self) -> str:
        """The part's id made safe for use in a file name: its last 60 characters at most."""
        return re.sub(r"[^A-Za-z0-9_.]+", "_", self.part_id)[-60:]


class Hop(enum.Enum):
    """Where a frame passes between the camera and the disk, in this order."""

    RECEIVED = "received"
    """Out of the camera's process, where a process of its own reads the camera."""
    QUEUED = "queued"
    TAKEN = "taken"
    """Out of the queue, to be observed."""
    RESIZED = "resized"
    """Cropped and resized."""
    SCORED = "scored"
    """The model's answer is there, and the checks of the image."""
    VERDICT = "verdict"
    """Its turn has come, after the frames before it, and the verdict is made."""
    STORED = "stored"
    """The result is on the disk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspected:
    """A result with its evidence."""

    result: Result
    image: ImageU8 | None
    """``[height, width, 3]`` uint8 BGR: the area the model saw, at the camera's resolution; the whole frame if that
    area does not fit into it, None if there is no frame."""
    anomaly_map: npt.NDArray[np.float32] | None
    """``[h, w]`` smoothed raw distance there, its maximum the score, 0 where it is ignored; or None."""
    shown_map: npt.NDArray[np.float32] | None = None
    """The sharper map for pictures, :func:`edgeflame.statistics.maps.shown_maps`; None where the graph gives none."""
    ignored: ImageU8 | None = None
    """``[height, width]`` uint8 over the same area, 255 where it is ignored; None if nothing is."""
    due_monotonic_s: float | None = None
    """The part's deadline, seconds on the monotonic clock; None: it has none."""
    origin: FileOrigin | None = None
    """The file of a watched folder that the frame was read from."""
    captured_monotonic_s: float | None = None
    """When the frame was captured, seconds on the monotonic clock."""
    passed: Mapping[Hop, float] = field(default_factory=dict)
    """When the frame passed each hop, on the same clock."""


def json_line(result: Result) -> bytes:
    """The result as one line of JSON, with its newline."""
    return printable_json(msgspec.json.encode(result)) + b"\n"
