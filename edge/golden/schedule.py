"""When the next self-test is due. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence


def last_due(times: Sequence[dt.time], now: dt.datetime) -> dt.datetime | None:
    """The latest moment not after ``now`` (local time, aware) at which a test was due; None without times."""
    moments = [
        dt.datetime.combine(now.date() - dt.timedelta(days=back), time, now.tzinfo) for back in (0, 1) for time in times
    ]
    return max((moment for moment in moments if moment <= now), default=None)


def is_due(times: Sequence[dt.time], last_test: dt.datetime | None, now: dt.datetime) -> bool:
    """Whether a test is due that has not been made; one that was missed while the daemon was off is.

    A last test in the future, before the clock was set back, counts as made now: the next time of the day comes.
    """
    due = last_due(times, now)
    return due is not None and (last_test is None or last_test < due)
