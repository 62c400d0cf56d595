"""Results made up for tests of what happens to them."""

from __future__ import annotations

import datetime as dt
import time

import msgspec

from edge.frame import Captured
from edge.inspector import InspectorProtocol
from edge.result import Inspected, Result
from edge.verdict import make_result, with_evidence


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


def judge(inspector: InspectorProtocol, captured: Captured) -> Inspected:
    """Inspect a part that has neither deadline nor number; its result and its evidence."""
    observation = inspector.inspect(captured)
    made = make_result(
        captured,
        observation,
        camera="camera",
        model=inspector.model_id,
        threshold=inspector.threshold,
        review_band=inspector.review_band,
        now_s=time.monotonic(),
    )
    return with_evidence(made, captured, observation)
