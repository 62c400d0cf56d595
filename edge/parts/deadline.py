"""One verdict a part, by its deadline, whatever the model does. Pure.

Theory of operation
-------------------
The line's thread has one part in hand at a time, and it alone decides: it waits for the model's answer or the part's
deadline, whichever comes first, and what it sees first is the verdict. The model works on a thread of its own, on one
image at a time, and cannot be interrupted, so an answer may come when its part has long been decided; such an answer
frees the model and does nothing else.

    in hand         the model       what happens
    --              free            ``take`` gives the image to the model
    --              busy            ``take`` waits: the model is still at an earlier part, decided without it
    waiting         its answer      to the earlier part: too late. The model is free and gets the part in hand
    being scored    its answer      before the deadline: the verdict. At it or after: late
    any             no answer       at the deadline: late

A part whose deadline has passed when it is taken is late without being scored: the model's time is for those that can
still be told in time.
"""

from __future__ import annotations

import enum


class Step(str, enum.Enum):
    """What to do now."""

    SCORE = "score"
    """Give the part in hand to the model."""
    WAIT = "wait"
    """For the model's answer or the deadline."""
    DECIDE = "decide"
    """The answer that has come is the verdict on the part in hand, which is done with."""
    LATE = "late"
    """The part in hand is late, and done with."""


class Deadline:
    """Between one model and the parts that come one after the other; used by one thread.

    Keys name parts and are used once.
    """

    def __init__(self) -> None:
        self._in_hand: int | None = None
        self._due = 0.0
        self._at_model: int | None = None

    @property
    def at_model(self) -> int | None:
        """The part the model is working on, decided or not."""
        return self._at_model

    def take(self, key: int, due: float, now: float) -> Step:
        """A part comes: ``SCORE``, ``WAIT`` or ``LATE``."""
        assert self._in_hand is None
        if now >= due:
            return Step.LATE
        self._in_hand, self._due = key, due
        if self._at_model is not None:
            return Step.WAIT
        self._at_model = key
        return Step.SCORE

    def answered(self, key: int, now: float) -> Step:
        """The model answers: ``DECIDE`` or ``LATE`` on the part in hand, ``SCORE`` it, or ``WAIT`` where none is."""
        assert self._at_model == key
        self._at_model = None
        if self._in_hand is None:
            return Step.WAIT
        if now >= self._due:
            self._in_hand = None
            return Step.LATE
        if self._in_hand == key:
            self._in_hand = None
            return Step.DECIDE
        self._at_model = self._in_hand
        return Step.SCORE

    def passed(self, now: float) -> Step:
        """Time has passed without an answer: ``WAIT`` or ``LATE``."""
        if self._in_hand is None or now < self._due:
            return Step.WAIT
        self._in_hand = None
        return Step.LATE
