"""What the line says about one part, and how it is written down."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from edge.sources.interface import FileOrigin
from edgeflame.images import ImageU8


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
    """Why it was not passed; words of :class:`edge.verdict.Reason`."""
    detail: str | None
    """What happened, for people, where a fault has more to say."""
    score: float | None
    """Raw distance; null where there is none or it is no finite number."""
    threshold: float
    latency_ms: float
    """From capture to verdict."""
    label: str | None
    """``good`` or the defect, where the source knows the truth."""
    model: str
    """First 12 digits of the package's SHA-256."""
    camera: str = ""
    """Which of the daemon's cameras saw it; empty in results of older versions."""
    part_number: int | None = None
    """The part's own number in the order of parts, where it has one."""
    parts_missing: int = 0
    """Parts that should have come between the one before and this one, by their numbers, and did not."""
    duplicate: bool = False
    """A part with this number or name has come before. Of several results for one part the worst is to be believed."""
    late: bool = False
    """The deadline had passed; the verdict is then ``unknown``, whatever the score."""

    golden: bool = False
    """A golden part of the line's self-test: no part of the production."""

    @property
    def is_right(self) -> bool | None:
        """Whether the verdict agrees with the truth; None where either is not known."""
        if self.label is None or self.verdict == "unknown":
            return None
        return (self.verdict == "pass") == (self.label == "good")


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspected:
    """A result with its evidence."""

    result: Result
    image: ImageU8 | None
    """``[height, width, 3]`` uint8 BGR: the area the model saw, as sharp as the camera gave it; the whole frame
    where that area does not fit into it, None where there is no frame."""
    anomaly_map: npt.NDArray[np.float32] | None
    """``[h, w]`` raw distance over the same area, 0 where nothing is judged; or None."""
    ignored: ImageU8 | None = None
    """``[height, width]`` uint8 over the same area, 255 where nothing is judged; None where all is."""
    due_monotonic_s: float | None = None
    """Until when the verdict is of use, on the monotonic clock; None: for good."""
    origin: FileOrigin | None = None
    """The file of a watched folder that it was read from."""


def json_line(result: Result) -> bytes:
    """One line, with its line end."""
    return msgspec.json.encode(result) + b"\n"
