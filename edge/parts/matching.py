"""Matches images with triggers. Pure: values and times in, matches out; no clock, no threads.

Theory of operation
-------------------
A trigger at the time ``at`` gets the first image that was captured between ``at + delay`` and ``at + delay + window``
and belongs to no other trigger. Both times are of one monotonic clock; an image's is that of its capture, not of its
arrival. Triggers are served in the order of their times, so of two that are close together the earlier one gets the
earlier image.

A trigger ends without an image when a later image than its window's has come, when nothing has come for ``ARRIVAL_S``
after its window, or at its deadline, if that is earlier. Every trigger ends exactly once.

An image that no trigger has claimed is dropped ``lookback`` after its capture; it is held for that long because its
trigger may reach us later than the image. Only few images are held at once, since they are large. The number of images
of parts that wait for the model is bounded as well: a further part keeps its turn and its result, but loses its image.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from edge.frame import Trigger
from edge.result import Reason

UNTRIGGERED = "untriggered"
"""Why a frame was dropped: it belongs to no trigger."""

ARRIVAL_S = 0.25
"""Longest time from an image's capture to its arrival here, seconds."""

IN_TIME_S = 0.01
"""How long before its deadline a part without an image ends, seconds, so that its verdict is out in time."""

MAX_HELD = 8
"""Most images that wait for a trigger."""

MAX_IMAGES = 8
"""Most images of parts that wait for the model."""

MAX_WAITING = 1000
"""Most parts that wait, with an image or without; further triggers are not taken."""

F = TypeVar("F")


@dataclass(frozen=True, kw_only=True)
class MatchWindow:
    """The times, from a part's trigger on, in which an image is taken for the part's; seconds."""

    delay_s: float
    window_s: float
    lookback_s: float = 0.25
    """How long after an image's capture its trigger may reach us."""
    deadline_s: float | None = None
    """Latest end of the part, with or without an image; None: no deadline."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Match(Generic[F]):
    """A trigger with its image, or with the reason why it has none."""

    trigger: Trigger
    image: F | None
    reason: Reason | None = None
    detail: str | None = None


class Matcher(Generic[F]):
    """Matches images with triggers.

    Args:
        window: see :class:`MatchWindow`.
        dropped: counts images that are dropped, by reason.
    """

    def __init__(self, window: MatchWindow, dropped: collections.Counter[str] | None = None) -> None:
        self._window = window
        self._pending: list[Trigger] = []
        self._held: collections.deque[tuple[float, F]] = collections.deque()
        self._ready: collections.deque[Match[F]] = collections.deque()
        self._num_ready_images = 0
        self._away: str | None = None
        self.dropped: collections.Counter[str] = collections.Counter() if dropped is None else dropped

    def add_trigger(self, trigger: Trigger, now: float) -> bool:
        """Add a trigger; returns False if too many parts wait and it was not taken."""
        if len(self._pending) + len(self._ready) >= MAX_WAITING:
            return False
        bisect.insort(self._pending, trigger, key=lambda pending: pending.at_s)
        self.advance(now)
        return True

    def add_image(self, image: F, captured_s: float, now: float) -> None:
        """Add an image; to be called in the order of capture."""
        self._away = None
        self._held.append((captured_s, image))
        self.advance(now)

    def camera_away(self, reason: str) -> None:
        """Record that the camera is away until the next image comes, for the details of parts without images."""
        self._away = reason

    def advance(self, now: float) -> None:
        """End triggers and drop images whose time is over at ``now``."""
        while self._pending and self._end(self._pending[0], now):
            self._pending.pop(0)
        while self._held and (len(self._held) > MAX_HELD or self._held[0][0] < now - self._window.lookback_s):
            self._held.popleft()
            self.dropped[UNTRIGGERED] += 1

    def close(self, reason: str) -> None:
        """End all triggers that wait: no image will come any more."""
        for trigger in self._pending:
            self._without_image(trigger, Reason.NO_IMAGE, reason)
        self._pending.clear()

    def matches(self) -> Iterator[Match[F]]:
        """Yield the triggers that have ended, in order, and remove each."""
        while self._ready:
            match = self._ready.popleft()
            self._num_ready_images -= match.image is not None
            yield match

    def wake_at(self) -> float | None:
        """When :meth:`advance` has to be called if nothing comes before; None: it need not be."""
        return self._gives_up_at(self._pending[0]) if self._pending else None

    @property
    def away(self) -> str | None:
        """Why the camera is away; None if it is not, or nothing is known of it yet."""
        return self._away

    @property
    def num_waiting(self) -> int:
        """Number of triggers that wait for an image, and of matches not yet taken."""
        return len(self._pending) + len(self._ready)

    def _end(self, trigger: Trigger, now: float) -> bool:
        if trigger.fault is not None:
            self._without_image(trigger, trigger.fault, trigger.detail)
            return True
        opens = trigger.at_s + self._window.delay_s
        closes = opens + self._window.window_s
        for index, (captured_s, image) in enumerate(self._held):
            if captured_s > closes:
                self._no_image(trigger)
                return True
            if captured_s >= opens:
                del self._held[index]
                self._with_image(trigger, image)
                return True
        if now >= self._gives_up_at(trigger):
            self._no_image(trigger)
            return True
        return False

    def _gives_up_at(self, trigger: Trigger) -> float:
        gives_up = trigger.at_s + self._window.delay_s + self._window.window_s + ARRIVAL_S
        if self._window.deadline_s is not None:
            gives_up = min(gives_up, trigger.at_s + self._window.deadline_s - IN_TIME_S)
        return gives_up

    def _with_image(self, trigger: Trigger, image: F) -> None:
        if self._num_ready_images >= MAX_IMAGES:
            self.dropped[Reason.OVERRUN.value] += 1
            self._without_image(
                trigger, Reason.OVERRUN, f"{MAX_IMAGES} parts were waiting for the model; its image was given up"
            )
            return
        self._num_ready_images += 1
        self._ready.append(Match(trigger=trigger, image=image))

    def _no_image(self, trigger: Trigger) -> None:
        delay, end = 1000 * self._window.delay_s, 1000 * (self._window.delay_s + self._window.window_s)
        detail = f"no image between {delay:g} and {end:g} ms after the trigger"
        if self._away is not None:
            detail += f"; the camera is away: {self._away}"
        self._without_image(trigger, Reason.NO_IMAGE, detail)

    def _without_image(self, trigger: Trigger, reason: Reason, detail: str | None) -> None:
        self._ready.append(Match(trigger=trigger, image=None, reason=reason, detail=detail))
