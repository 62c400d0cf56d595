"""What turns a captured frame into a verdict, as the line's loop sees it; and those who look on."""

from __future__ import annotations

import time
from typing import Protocol

from edge.capture import Captured
from edge.config import InspectConfig
from edge.lanes import Looker
from edge.results import Inspected, Result
from edge.verdict import Reason, Verdict


class Judge(Protocol):
    """Judges frames, one at a time; :class:`edge.inspector.Inspector` is the real one."""

    @property
    def product(self) -> str:
        """Name of the product, as the configuration has it."""
        ...

    @property
    def model_id(self) -> str:
        """First 12 digits of the package's SHA-256."""
        ...

    @property
    def threshold(self) -> float:
        """Raw distance above which a part fails."""
        ...

    @property
    def provider(self) -> str:
        """What runs the model."""
        ...

    @property
    def looker(self) -> Looker | None:
        """Who can look at frames for it ahead of their turn; None where nobody can."""
        ...

    def set_threshold(self, value: float | None) -> None:
        """Another threshold from the next frame on; None for the one it began with. Never during a frame."""
        ...

    def reconfigured(self, config: InspectConfig) -> Judge:
        """The same model with other rules, and the threshold of these; this one may be in use meanwhile."""
        ...

    def inspect(self, captured: Captured) -> Inspected:
        """Judge one frame. Whatever goes wrong with it is in the result, and never a pass."""
        ...

    def rehearse(self, captured: Captured) -> Inspected:
        """Judge a photograph that does not come from the camera; leaves no trace in what is known of the camera."""
        ...


class Watcher(Protocol):
    """Looks on at every part after its verdict has been handed on: a shadow model, a drift monitor.

    It must never hold the line up: what takes longer than microseconds it does on a thread of its own.
    """

    def watch(self, captured: Captured, inspected: Inspected) -> None:
        """One part, on the line's thread."""
        ...


def not_judged(captured: Captured, judge: Judge, *, camera: str, reason: Reason, detail: str) -> Inspected:
    """An ``unknown`` for a part that a judge could not deal with."""
    frame = captured.frame
    result = Result(
        camera=camera,
        sequence=captured.sequence,
        part_id=frame.part_id,
        source=frame.source,
        captured=frame.captured_utc,
        verdict=Verdict.UNKNOWN.value,
        reasons=(reason.value,),
        detail=detail,
        score=None,
        threshold=judge.threshold,
        latency_ms=round(1000 * (time.monotonic() - frame.captured_monotonic_s), 3),
        label=frame.label,
        model=judge.model_id,
    )
    return Inspected(result=result, image=frame.image_bgr, anomaly_map=None, origin=frame.origin)
