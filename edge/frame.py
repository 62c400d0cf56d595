"""Frames and triggers: the values, and the interfaces of image sources and trigger sources.

A source yields one :class:`Frame` for each part, also for one whose image is unreadable. A :class:`Trigger` announces
that a part is in front of the camera; trigger sources of every transport give it in the same form. :class:`Captured` is
a frame with its place in the order of capture.
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

import numpy as np

from edge.result import FileOrigin, Hop, Reason
from edgeflame.images import ImageU8, ImageU16, printable_name, to_8_bit


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """The announcement of one part."""

    part_id: str | None
    """The part's name; None if the trigger has none."""
    number: int | None = None
    """The part's number in the order of parts; None if the trigger has none."""
    at_s: float
    """When the part was announced, seconds on our monotonic clock."""
    at_utc: dt.datetime
    fault: Reason | None = None
    """Why no image can be assigned to the part; it gets ``unknown`` then, and no image is looked for."""
    detail: str | None = None
    """More about the fault, for people."""


AcceptTrigger = Callable[[Trigger], None]
"""Called with each trigger, on any thread; must return within microseconds."""


class TriggerSource(Protocol):
    """A source of triggers; opened once and closed once. An outage does not end it: it connects again by itself."""

    @property
    def name(self) -> str:
        """What to call it in messages; without passwords."""
        ...

    def open(self, accept: AcceptTrigger) -> None:
        """Start; ``accept`` is called with every trigger."""
        ...

    def problem(self) -> str | None:
        """Why no trigger can come at present; None if there is no such problem."""
        ...

    def close(self) -> None:
        """End; ``accept`` is not called afterwards."""
        ...


def trigger_now(
    part_id: str | None, number: int | None = None, *, fault: Reason | None = None, detail: str | None = None
) -> Trigger:
    """A trigger with the present time."""
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
    """Empty if the source has no name for it; :class:`edge.capture.Capture` then names it by its sequence number."""
    source: str
    """Name of the file, camera or stream; without passwords."""
    image_bgr: ImageU8 | None
    """``[height, width, 3]`` uint8 as the source gave it; None with an ``error``."""
    deep_bgr: ImageU16 | None = None
    """The same with samples of 16 bits, where the source has them; ``image_bgr`` is scaled by their full range."""
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
    """What announced the part; None where every frame is a part."""
    fault: Reason | None = None
    """Why there is no image; None: it is unreadable (see ``error``), or there is one."""
    passed: dict[Hop, float] = field(default_factory=dict)
    """When it passed each hop on its way so far, seconds on the monotonic clock; see :mod:`edge.trace`."""

    def passes(self, hop: Hop) -> None:
        """Note that it passes a hop now; another model's look at it later changes nothing."""
        self.passed.setdefault(hop, time.monotonic())

    @property
    def samples(self) -> ImageU8 | ImageU16 | None:
        """The image as the source has it."""
        return self.image_bgr if self.deep_bgr is None else self.deep_bgr


class Source(Protocol):
    """A sequence of frames, read once, by one thread."""

    @property
    def name(self) -> str:
        """What to call it in messages; without passwords."""
        ...

    @property
    def is_live(self) -> bool:
        """Whether it is a camera or stream, which does not wait for us: frames that come too fast may be dropped."""
        ...

    @property
    def is_endless(self) -> bool:
        """Whether it ends only when it is stopped; its end otherwise is a failure, after which it is opened again."""
        ...

    @property
    def num_frames(self) -> int | None:
        """Number of frames it will yield; None if unknown."""
        ...

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames until the source ends or ``stop`` is set.

        Raises:
            DataError: the source cannot be opened, or breaks; ``frames`` of a live source may be called again.
            MissingDependencyError: the package that reads it is not installed.
        """
        ...


def make_frame(
    *,
    part_id: str,
    source: str,
    image_bgr: ImageU8 | ImageU16 | None = None,
    error: str | None = None,
    label: str | None = None,
    mask: ImageU8 | None = None,
    missed: Mapping[str, int] | None = None,
    origin: FileOrigin | None = None,
    captured_monotonic_s: float | None = None,
    captured_utc: dt.datetime | None = None,
) -> Frame:
    """A frame; its capture times are the present ones unless given. File names in its texts are made printable."""
    return Frame(
        part_id=printable_name(part_id),
        source=printable_name(source),
        image_bgr=None if image_bgr is None else to_8_bit(image_bgr),
        deep_bgr=np.asarray(image_bgr, np.uint16) if image_bgr is not None and image_bgr.dtype == np.uint16 else None,
        error=None if error is None else printable_name(error),
        captured_monotonic_s=time.monotonic() if captured_monotonic_s is None else captured_monotonic_s,
        captured_utc=captured_utc or dt.datetime.now(dt.timezone.utc),
        label=label,
        mask=mask,
        missed=missed or {},
        origin=origin,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prefetched:
    """An observation of a frame ahead of its turn; see :mod:`edge.capture`."""

    observer: object
    """The observer that makes it."""
    found: Future[Any]
    """The observation, or the exception raised."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """A frame and its place in the order of capture; a gap in the numbers is a dropped frame."""

    sequence: int
    frame: Frame
    prefetched: Prefetched | None = None
