"""Refused messages in the log: a few are told, a flood is counted."""

from __future__ import annotations

import pytest

from edgeflame.log import EventLog
from edgeflame.mqtt.refusals import REFUSALS_AT_ONCE, REFUSALS_PER_S, RefusalLog


def test_a_flood_of_refused_messages_is_counted_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    refusals = RefusalLog(EventLog("models"))
    for number in range(1000):
        refusals.add("t" * 300, "no message", 1000 + number / 1000)
    assert len(caplog.records) == REFUSALS_AT_ONCE
    refusals.add("later", "no message", 1001 + 1 / REFUSALS_PER_S)
    assert caplog.records[-1].fields == {  # type: ignore[attr-defined]
        "topic": "later",
        "reason": "no message",
        "not_logged_before": 1000 - REFUSALS_AT_ONCE,
    }
    assert len(caplog.records[0].fields["topic"]) == 200  # type: ignore[attr-defined]
