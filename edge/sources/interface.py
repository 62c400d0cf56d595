"""What every source gives: frames, one a part, the unreadable ones among them."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edge.parts.trigger import Trigger
from edge.verdict import Reason
from edgeflame.images import ImageU8

After = Literal["keep", "move", "delete"]


@dataclass(frozen=True, kw_only=True)
class FileOrigin:
    """The file that a frame was read from, where that must be remembered: in the same transaction as its result."""

    folder: str
    """Absolute."""
    name: str
    """Relative to the folder, with slashes."""
    size: int
    mtime_ns: int
    after: After = "keep"
    """What is to become of it when the result is kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One image of one part, or the reason why there is none."""

    part_id: str
    source: str
    """The file, or the camera or stream; without passwords."""
    image_bgr: ImageU8 | None
    """``[height, width, 3]`` uint8 as the source gave it; None with an ``error``."""
    error: str | None = None
    captured_monotonic_s: float
    captured_utc: dt.datetime
    label: str | None = None
    """``good`` or the defect, where the source knows the truth."""
    mask: ImageU8 | None = None
    """``[height, width]`` uint8, 255 on the defect, where the source knows it."""
    missed: Mapping[str, int] = field(default_factory=dict)
    """Frames that the source lost just before this one, by reason."""
    origin: FileOrigin | None = None
    trigger: Trigger | None = None
    """What announced the part; None where every frame is one."""
    fault: Reason | None = None
    """Why there is no image, where it is more than an unreadable one."""


class Source(Protocol):
    """A sequence of frames, read once, by one thread."""

    @property
    def name(self) -> str:
        """What to call it in messages; without passwords."""
        ...

    @property
    def is_live(self) -> bool:
        """Whether parts pass whether or not we look: then late frames are dropped, not waited for."""
        ...

    @property
    def is_endless(self) -> bool:
        """Whether it ends only when it is stopped, so that stopping it is no interruption."""
        ...

    @property
    def num_frames(self) -> int | None:
        """How many frames it will give, where that is known."""
        ...

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames until the source ends or ``stop`` is set.

        Raises:
            DataError: the source cannot be opened.
            MissingDependencyError: what reads it is not installed.
        """
        ...


def make_frame(
    *,
    part_id: str,
    source: str,
    image_bgr: ImageU8 | None = None,
    error: str | None = None,
    label: str | None = None,
    mask: ImageU8 | None = None,
    missed: Mapping[str, int] | None = None,
    origin: FileOrigin | None = None,
    captured_monotonic_s: float | None = None,
    captured_utc: dt.datetime | None = None,
) -> Frame:
    """A frame, captured now unless said otherwise."""
    return Frame(
        part_id=part_id,
        source=source,
        image_bgr=image_bgr,
        error=error,
        captured_monotonic_s=time.monotonic() if captured_monotonic_s is None else captured_monotonic_s,
        captured_utc=captured_utc or dt.datetime.now(dt.timezone.utc),
        label=label,
        mask=mask,
        missed=missed or {},
        origin=origin,
    )
