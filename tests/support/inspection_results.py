"""Results made up for tests of what happens to them."""

from __future__ import annotations

import datetime as dt

import msgspec

from edge.result import Inspected, Result


def result(sequence: int, verdict: str = "fail", part_id: str = "part") -> Result:
    return Result(
        sequence=sequence, part_id=part_id, source="s", verdict=verdict, reasons=(), detail=None, score=2.0,
        captured=dt.datetime(2026, 1, 2, 3, 4, 5, sequence, tzinfo=dt.timezone.utc),
        threshold=1.0, latency_ms=1.0, label=None, model="0" * 12, camera="camera",
    )  # fmt: skip


def body(sequence: int, verdict: str = "fail") -> bytes:
    return msgspec.json.encode(result(sequence, verdict))


def inspected(sequence: int, verdict: str = "fail") -> Inspected:
    return Inspected(result=result(sequence, verdict), image=None, anomaly_map=None)
