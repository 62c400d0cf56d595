"""Section ``[drift]`` of the inspection's configuration."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeflame.errors import ConfigError


class DriftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How soon a line that changes is spoken of, and how seldom one that does not."""

    enabled: bool = True
    """Watched wherever there is a state folder."""
    false_alarms_per_year: float = 1.0
    """Of one camera with one model, all its streams together, on a line where nothing changes. An upper bound."""
    parts_per_year: float = 2_000_000.0
    """What a year is: a part every four seconds in one shift has 1.8 million. Ten times as many delay an alarm by a
    sixth."""
    tolerance: float = 0.1
    """How far the typical part may move among the reference's parts without being spoken of, in ranks: 0.1 is from the
    middle to where 60% lie below, about 0.35 of their standard deviation."""
    alike: float = 20.0
    """Parts in a row that are alike, because neighbours on a line are: 1 where each is independent. Alarms come later
    in the same measure."""
    learn: int = 2000
    """Parts that a reference is learnt from where the package has none, and after `relearn`."""
    reference: Literal["auto", "line"] = "auto"
    """``auto``: the package's where it has one; ``line``: always learnt from the first parts."""
    max_per_s: float = 10.0
    """Parts looked at per second; of a faster line, some. Bounds the time it takes."""

    def __post_init__(self) -> None:
        rules = (
            (self.false_alarms_per_year > 0, "drift.false_alarms_per_year must be > 0", self.false_alarms_per_year),
            (self.parts_per_year >= 1000, "drift.parts_per_year must be at least 1000", self.parts_per_year),
            (0.01 <= self.tolerance <= 0.4, "drift.tolerance must be 0.01..0.4", self.tolerance),
            (1 <= self.alike <= 10_000, "drift.alike must be 1..10000", self.alike),
            (50 <= self.learn <= 20_000, "drift.learn must be 50..20000", self.learn),
            (self.max_per_s > 0, "drift.max_per_s must be > 0", self.max_per_s),
        )
        for holds, rule, value in rules:
            if not holds:
                msg = f"{rule}, not {value}"
                raise ConfigError(msg)
        if self.parts_per_alarm < 100:
            msg = "drift: false_alarms_per_year is more than one in a hundred of parts_per_year"
            raise ConfigError(msg)

    @property
    def parts_per_alarm(self) -> float:
        """Mean number of parts between false alarms: the average run length."""
        return self.parts_per_year / self.false_alarms_per_year
