"""A frame on its way from a source to its verdict: values, and the interfaces of what gives frames and triggers.

Every source gives frames, one a part, the unreadable ones among them. A trigger says that a part is in front of the
camera; every transport of triggers gives them in the same form.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge.result import FileOrigin, Reason
from edgeflame.images import ImageU8


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """One part, announced."""

    part_id: str | None
    """Its name; None where the trigger has none."""
    number: int | None = None
    """Its number in the order of parts, where the trigger has one."""
    at_s: float
    """When it was there, on our monotonic clock."""
    at_utc: dt.datetime
    fault: Reason | None = None
    """Why no image can be its image; then it gets ``unknown`` and none is looked for."""
    detail: str | None = None
    """More about the fault, for people."""


AcceptTrigger = Callable[[Trigger], None]
"""Takes triggers, from any thread, in microseconds."""


class TriggerSource(Protocol):
    """Where triggers come from. It is opened once, and closed once; an outage never ends it."""

    @property
    def name(self) -> str:
        """What to call it in messages; without passwords."""
        ...

    def open(self, accept: AcceptTrigger) -> None:
        """Begin; ``accept`` gets every trigger."""
        ...

    def problem(self) -> str | None:
        """Why no trigger can come at present; None if they can."""
        ...

    def close(self) -> None:
        """End; no trigger comes after it."""
        ...


def trigger_now(
    part_id: str | None, number: int | None = None, *, fault: Reason | None = None, detail: str | None = None
) -> Trigger:
    """A trigger that came this moment."""
    return Trigger(
        part_id=part_id,
        number=number,
        at_s=time.monotonic(),
        at_utc=dt.datetime.now(dt.timezone.utc),
        fault=fault,
        detail=detail,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One image of one part, or the reason why there is none."""

    part_id: str
    """Empty where the source has no name for it; :class:`edge.capture.Capture` names it by its place."""
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
            DataError: the source cannot be opened, or breaks; a live one may be read again.
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prefetched:
    """What is being found out about a frame ahead of its turn; see :mod:`edge.capture`."""

    observer: object
    """What observes it."""
    found: Future[Any]
    """What it finds, or raises."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """A frame and its place in the order of capture; a gap in the numbers is a dropped frame."""

    sequence: int
    frame: Frame
    prefetched: Prefetched | None = None
