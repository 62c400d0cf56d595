"""Gaps and repetitions in the parts' own numbers and names. Pure.

Theory of operation
-------------------
Parts that carry a number are expected to come in its order, one by one. ``last`` is the highest number so far, in the
direction in which they run:

    the next number             as it should be
    a jump ahead                the numbers between are missing: parts passed that were not seen
    one that was seen lately    a duplicate: either a message came twice, or two parts carry one number
    one behind, not seen        out of order: it was counted as missing when it was jumped over
    a jump by more than a bound the numbering began anew; how many parts are missing cannot be known

With ``wrap`` the numbers run from its first to its last and round again, as a PLC's counters do; the shorter way round
then decides between ahead and behind. Without it, a number far behind means that the numbering began anew.

Of parts with a name and no number, duplicates are noticed, but not missing ones.
"""

from __future__ import annotations

import collections
import enum
from dataclasses import dataclass

from edge.config.inspection import PartsConfig, TriggerConfig
from edgeflame.errors import ConfigError


class SequenceKind(str, enum.Enum):
    """How a part follows the ones before it."""

    FIRST = "first"
    """The first part with a number; there is nothing to compare it with."""
    NEXT = "next"
    GAP = "gap"
    DUPLICATE = "duplicate"
    OUT_OF_ORDER = "out_of_order"
    RESTART = "restart"
    """The numbering began anew."""


@dataclass(frozen=True, kw_only=True)
class SequenceFinding:
    """One part's place among the others."""

    kind: SequenceKind
    missing: int = 0
    """Number of parts missing between the one before and this one."""
    last: int | None = None
    """The highest number before this part; None: there was none."""

    def describe(self, number: int | None) -> str | None:
        """The finding in words, for the part with this number; None if there is nothing unusual."""
        match self.kind:
            case SequenceKind.GAP:
                return f"{self.missing} parts missing between {self.last} and {number}"
            case SequenceKind.DUPLICATE:
                return "a part of this number or name has come before"
            case SequenceKind.OUT_OF_ORDER:
                return f"out of order: it comes after {self.last}"
            case SequenceKind.RESTART:
                return f"the numbering began anew after {self.last}; how many parts are missing is not known"
            case _:
                return None


@dataclass(frozen=True, kw_only=True)
class NumberRange:
    """Numbers run from ``first`` to ``last`` and round again."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


class SequenceCheck:
    """Follows the parts of one camera.

    Args:
        wrap: range in which numbers run round; None: they only rise.
        max_gap: a jump ahead, or behind, by more parts than this means that the numbering began anew.
        remembered: number of past numbers or names among which duplicates are noticed. With ``wrap`` at most half of
            its numbers.
    """

    def __init__(self, *, wrap: NumberRange | None = None, max_gap: int = 1000, remembered: int = 1000) -> None:
        self._wrap = wrap
        self._max_gap = max_gap if wrap is None else min(max_gap, (wrap.size - 1) // 2)
        self._remembered = remembered if wrap is None else min(remembered, self._max_gap)
        self._last: int | None = None
        # The newest at the end. A number and a name are never equal, so they share it.
        self._seen: collections.OrderedDict[int | str, None] = collections.OrderedDict()

    @property
    def last(self) -> int | None:
        """The highest number so far."""
        return self._last

    def check(self, part_id: str | None, number: int | None) -> SequenceFinding:
        """Add the next part and return its place among the others.

        Args:
            part_id: the part's own name; None: it has none.
            number: the part's number; None: it has none. One outside ``wrap`` is ignored.
        """
        if number is not None and self._wrap is not None and not self._wrap.first <= number <= self._wrap.last:
            number = None
        if number is None:
            return self._check_name(part_id)
        last, was_seen = self._last, number in self._seen
        if last is None:
            finding = SequenceFinding(kind=SequenceKind.FIRST)
        else:
            ahead = self._ahead(number, last)
            if ahead == 0 or (was_seen and ahead < 0):
                finding = SequenceFinding(kind=SequenceKind.DUPLICATE, last=last)
            elif abs(ahead) > self._max_gap:
                finding = SequenceFinding(kind=SequenceKind.RESTART, last=last)
                self._seen.clear()
            elif ahead < 0:
                finding = SequenceFinding(kind=SequenceKind.OUT_OF_ORDER, last=last)
            else:
                finding = SequenceFinding(
                    kind=SequenceKind.GAP if ahead > 1 else SequenceKind.NEXT, missing=ahead - 1, last=last
                )
        if finding.kind not in (SequenceKind.DUPLICATE, SequenceKind.OUT_OF_ORDER):
            self._last = number
        self._remember(number)
        return finding

    def _check_name(self, part_id: str | None) -> SequenceFinding:
        if part_id is None:
            return SequenceFinding(kind=SequenceKind.NEXT, last=self._last)
        kind = SequenceKind.DUPLICATE if part_id in self._seen else SequenceKind.NEXT
        self._remember(part_id)
        return SequenceFinding(kind=kind, last=self._last)

    def _ahead(self, number: int, last: int) -> int:
        """How far a number is ahead of the last one; negative if it is behind."""
        if self._wrap is None:
            return number - last
        ahead = (number - last) % self._wrap.size
        return ahead - self._wrap.size if ahead > self._wrap.size // 2 else ahead

    def _remember(self, key: int | str) -> None:
        self._seen[key] = None
        self._seen.move_to_end(key)
        while len(self._seen) > self._remembered:
            self._seen.popitem(last=False)


def number_range(trigger: TriggerConfig, parts: PartsConfig) -> NumberRange | None:
    """The range in which the parts' numbers run round; None: they only rise."""
    if parts.wrap is not None:
        return NumberRange(first=parts.wrap[0], last=parts.wrap[1])
    if trigger.modbus is not None and trigger.modbus.is_counter:
        return NumberRange(first=0, last=(1 << 16 * trigger.modbus.words) - 1)
    return None


def check_parts(trigger: TriggerConfig, parts: PartsConfig) -> None:
    """Check that the two sections agree.

    Raises:
        ConfigError: no image could come before the deadline.
    """
    if trigger.is_on and parts.deadline_ms is not None and parts.deadline_ms <= trigger.delay_ms:
        raise ConfigError(
            f"parts.deadline_ms must be more than trigger.delay_ms, before which no image is taken; they are "
            f"{parts.deadline_ms:g} and {trigger.delay_ms:g}"
        )
