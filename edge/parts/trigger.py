"""What says that a part is in front of the camera: values, and what every transport of triggers is."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge.verdict import Reason


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """One part, announced."""

    part_id: str | None
    """Its name; None where the trigger has none."""
    number: int | None = None
    """Its number in the order of parts, where the trigger has one."""
    at_s: float
    """When it was there, on our monotonic clock."""
    at_utc: dt.datetime
    fault: Reason | None = None
    """Why no image can be its image; then it gets ``unknown`` and none is looked for."""
    detail: str | None = None
    """More about the fault, for people."""


AcceptTrigger = Callable[[Trigger], None]
"""Takes triggers, from any thread, in microseconds."""


class TriggerSource(Protocol):
    """Where triggers come from. It is opened once, and closed once; an outage never ends it."""

    @property
    def name(self) -> str:
        """What to call it in messages; without passwords."""
        ...

    def open(self, accept: AcceptTrigger) -> None:
        """Begin; ``accept`` gets every trigger."""
        ...

    def problem(self) -> str | None:
        """Why no trigger can come at present; None if they can."""
        ...

    def close(self) -> None:
        """End; no trigger comes after it."""
        ...


def trigger_now(
    part_id: str | None, number: int | None = None, *, fault: Reason | None = None, detail: str | None = None
) -> Trigger:
    """A trigger that came this moment."""
    return Trigger(
        part_id=part_id,
        number=number,
        at_s=time.monotonic(),
        at_utc=dt.datetime.now(dt.timezone.utc),
        fault=fault,
        detail=detail,
    )
