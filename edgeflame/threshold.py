"""The threshold in a package, what it promises, and how that is said."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from edgeflame.errors import NumericalError

Unit = Literal["photograph", "part"]
"""What is rejected: each photograph by itself, or a part as soon as one of its photographs is."""


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold that was not taken, with the promise it would have kept."""

    false_reject_rate: float
    value: float | None
    """The threshold; None where there were too few parts to promise this."""
    expected_false_reject_rate: float | None


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """Where good ends, and what that promises.

    ``value`` is set by scores of good images that the statistics had not seen. With the stated confidence no more
    than ``false_reject_rate`` of good units will score above it.
    """

    value: float
    false_reject_rate: float
    """What is promised: an upper bound."""
    confidence: float
    num_groups: int
    num_images: int
    groups_known: bool
    requested_false_reject_rate: float
    """What was asked for; lower than ``false_reject_rate`` when there were too few parts to promise it."""
    unit: Unit = "part"
    """What the rates count."""
    expected_false_reject_rate: float | None = None
    """Share of the good units at hand that score above ``value``: what to expect, where the promise is the worst."""
    num_left_out: int = 0
    """Images that looked defective and were left out; the promise is about good parts like the others."""
    chosen_by: Literal["promise", "f1"] = "promise"
    """``f1``: the highest F1 on labelled images; the promise is then what this threshold happens to keep."""
    others: tuple[Promise, ...] = ()
    """What other promises would have cost or brought, in rising order of their rates."""

    def __post_init__(self) -> None:
        # Against NaN every comparison is false: such a threshold would pass every part.
        if not (math.isfinite(self.value) and self.value > 0):
            msg = f"a threshold must be a finite number above 0, not {self.value}"
            raise NumericalError(msg)

    def promise(self) -> str:
        """In a sentence without a full stop, as all commands say it."""
        text = (
            f"at most {self.false_reject_rate:.2%} of good {self.unit}s rejected, with {self.confidence:.0%} "
            f"confidence, from {self.basis()}"
        )
        if self.expected_false_reject_rate is not None:
            text += f"; expected {self.expected_false_reject_rate:.2%}"
        return text

    def basis(self) -> str:
        """What the promise rests on."""
        if not self.groups_known:
            return f"{self.num_groups} images, each taken for a part of its own"
        return f"{self.num_groups} parts ({self.num_images} images)"

    def caveats(self) -> list[str]:
        """What must be said beside the promise, a sentence without a full stop each."""
        notes = []
        if self.chosen_by == "promise" and self.false_reject_rate > self.requested_false_reject_rate:
            notes.append(f"{self.requested_false_reject_rate:.2%} was asked for; that takes more parts than there are")
        if self.num_left_out:
            worst = self.false_reject_rate + self.num_left_out / (self.num_left_out + self.num_images)
            notes.append(
                f"{self.num_left_out} images were left out as suspects; had they all been good, the promise would be "
                f"{min(1.0, worst):.2%}"
            )
        return notes
