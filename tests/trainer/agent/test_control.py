"""Shift plans: when a site may train."""

from __future__ import annotations

from datetime import datetime

import pytest

from edgeflame.errors import UsageError
from trainer.agent.control import parse_schedule

# 2026-01-05 is a Monday.
CASES = [
    ("mon-fri 22:00-06:00", "2026-01-05T22:00", True),
    ("mon-fri 22:00-06:00", "2026-01-05T21:59", False),
    ("mon-fri 22:00-06:00", "2026-01-05T05:59", False),
    ("mon-fri 22:00-06:00", "2026-01-06T05:59", True),
    ("mon-fri 22:00-06:00", "2026-01-06T06:00", False),
    ("mon-fri 22:00-06:00", "2026-01-10T05:00", True),
    ("mon-fri 22:00-06:00", "2026-01-10T23:00", False),
    ("mon-fri 22:00-06:00, sat-sun", "2026-01-10T23:00", True),
    ("sat-sun", "2026-01-12T00:00", False),
    ("12:00-12:30", "2026-01-07T12:29", True),
    ("12:00-12:30", "2026-01-07T12:30", False),
    ("fri-mon 00:00-24:00", "2026-01-05T23:59", True),
    ("fri-mon 00:00-24:00", "2026-01-06T00:00", False),
    ("Sun 20:00-04:00", "2026-01-12T03:00", True),
    ("00:00-00:00", "2026-01-07T13:00", True),
]


@pytest.mark.parametrize(("text", "moment", "is_open"), CASES)
def test_windows(text: str, moment: str, is_open: bool) -> None:
    assert parse_schedule(text).is_open(datetime.fromisoformat(moment)) is is_open


@pytest.mark.parametrize("text", ["", ",", "never", "mon-xyz", "25:00-26:00", "10:60-11:00", "10:00", "mon10:00-11:00"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="schedule"):
        parse_schedule(text)
