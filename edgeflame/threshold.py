"""The threshold in a package: where good ends, and what false-reject rate that promises with which confidence."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from edgeflame.bounds import NotNegativeCount
from edgeflame.errors import NumericalError
from edgeflame.methods import RejectUnit

MAX_THRESHOLD = 1e12
"""As in a line's configuration. Scores of parts are tens, of other pictures thousands; above this every part passes."""


class ThresholdPromise(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold that was not taken, with the promise it would have kept."""

    false_reject_rate: float
    value: float | None
    """The threshold; None where there were too few parts to promise this."""
    expected_false_reject_rate: float | None


class LabelledDefects(msgspec.Struct, frozen=True, kw_only=True):
    """What labelled defects said about a threshold, see ``fitting.expected_cost``."""

    cost_of_miss: float
    """What a missed defective part costs, in rejected good ones."""
    num_groups: int
    num_images: int
    missed: float
    """Share of them that the threshold passes."""
    least_cost_at: float
    """The threshold of least cost, had good parts not bounded it ..."""
    least_cost_rejected: float
    """... the share of good ones that it rejects ..."""
    least_cost_missed: float
    """... and of the labelled defects that it passes."""
    interval: tuple[float, float]
    """Where it lies, with the threshold's confidence (bootstrap over parts)."""

    @property
    def too_few(self) -> bool:
        """Whether so few were labelled that they could not move the threshold."""
        return self.num_groups + 1 <= self.cost_of_miss

    def describe(self, threshold: float) -> str:
        """What came of them, a sentence without a full stop."""
        text = (
            f"of {self.num_groups} labelled defective parts ({self.num_images} images) it misses {self.missed:.1%}; a "
            f"miss counts as {self.cost_of_miss:g} false rejects"
        )
        if self.too_few:
            return f"{text}: so few labelled defects do not move the threshold of the good parts"
        low, high = self.interval
        text += f"; the least cost lies at {self.least_cost_at:.4g} (interval {low:.4g} to {high:.4g})"
        if self.least_cost_at < threshold:
            rate = min(0.99, math.ceil(self.least_cost_rejected * 100) / 100)
            text += (
                f", where {self.least_cost_rejected:.1%} of the good are rejected and {self.least_cost_missed:.1%} of "
                f"the defects missed: --false-reject-rate {rate:g} allows it"
            )
        return text


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """Where good ends, and what that promises.

    ``value`` is set by scores of good images that the statistics had not seen. Of such good units
    ``expected_false_reject_rate`` score above it, and with the stated confidence no more than ``false_reject_rate``.
    """

    value: float
    false_reject_rate: float
    """What is promised: an upper bound."""
    confidence: float
    num_groups: NotNegativeCount
    num_images: NotNegativeCount
    groups_known: bool
    requested_false_reject_rate: float
    """What was asked for, in the sense of ``chosen_by``."""
    unit: RejectUnit = "part"
    """What the rates count."""
    expected_false_reject_rate: float | None = None
    """Share of the good units at hand that score above ``value``: what to expect, where the promise is the worst."""
    num_other_parts: int = 0
    """Parts that the spread of scores at other sites counted as in what is to be expected."""
    num_left_out: int = 0
    """Images that looked defective and were left out; the promise is about good parts like the others."""
    chosen_by: Literal["promise", "expected", "f1", "cost"] = "promise"
    """``promise``: the rate asked for is not exceeded, if there are parts enough. ``expected``: it is what is to be
    expected. ``f1``: the highest F1 on labelled images. ``cost``: the least expected cost of rejected good and missed
    labelled parts, no lower than the good parts allow. But for ``promise``, the promise is what it happens to keep."""
    labelled: LabelledDefects | None = None
    """The labelled defects that ``cost`` rests on."""
    with_more_parts: tuple[int, float] | None = None
    """A larger number of parts, and what could about be promised if as large a share of theirs were rejected."""
    others: tuple[ThresholdPromise, ...] = ()
    """What other promises would have cost or brought, in rising order of their rates."""

    def __post_init__(self) -> None:
        # Against NaN every comparison is false: such a threshold would pass every part.
        if not (math.isfinite(self.value) and self.value > 0):
            raise NumericalError(f"a threshold must be a finite number above 0, not {self.value}")
        if self.value > MAX_THRESHOLD:
            raise NumericalError(f"a threshold must be at most {MAX_THRESHOLD:g}, not {self.value}: it rejects nothing")
        for name in ("false_reject_rate", "confidence", "requested_false_reject_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise NumericalError(f"a threshold's {name} must be in 0..1, not {getattr(self, name)}")

    def promise(self) -> str:
        """What to expect and the promise, in a sentence without a full stop, as all commands print it."""
        expected = self.expected_false_reject_rate
        if self.chosen_by == "expected" and expected is not None:
            usual = f"about {expected:.1%} of good" if expected > 0 else "none of these good"
            by = ", if scores spread as elsewhere" if self.num_other_parts else ""
            return (
                f"{usual} {self.unit}s rejected{by}; at most {self.false_reject_rate:.1%} with "
                f"{self.confidence:.0%} confidence, from {self.basis()}"
            )
        text = (
            f"at most {self.false_reject_rate:.2%} of good {self.unit}s rejected, with {self.confidence:.0%} "
            f"confidence, from {self.basis()}"
        )
        return text if expected is None else f"{text}; expected {expected:.2%}"

    def basis(self) -> str:
        """What the promise rests on."""
        if not self.groups_known and self.num_groups == self.num_images:
            return f"{self.num_groups} images, each taken for a part of its own"
        if not self.groups_known:
            return f"{self.num_groups} parts ({self.num_images} images, told apart by their looks)"
        return f"{self.num_groups} parts ({self.num_images} images)"

    def caveats(self) -> list[str]:
        """What limits the promise, a sentence without a full stop each."""
        notes = []
        if self.chosen_by == "promise" and self.false_reject_rate > self.requested_false_reject_rate:
            notes.append(f"{self.requested_false_reject_rate:.2%} was asked for; that takes more parts than there are")
        if self.with_more_parts is not None:
            notes.append("{} parts would promise about {:.1%}".format(*self.with_more_parts))
        if self.num_left_out:
            worst = self.false_reject_rate + self.num_left_out / (self.num_left_out + self.num_images)
            notes.append(
                f"{self.num_left_out} images were left out as suspects; had they all been good, the promise would be "
                f"{min(1.0, worst):.2%}"
            )
        if self.labelled is not None:
            notes.append(self.labelled.describe(self.value))
        return notes
