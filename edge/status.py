"""What one camera's line is doing now, for everyone who asks: the page, metrics, the broker, a command."""

from __future__ import annotations

import msgspec

from edge.drift.monitor import DriftStatus
from edge.golden.report import GoldenStatus
from edge.parts.counts import PartCounts
from edgeflame.releases.messages import ProductModels

DEFAULT_CAMERA = "camera"
"""Name of the one camera of a daemon whose configuration names none."""


class CameraStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One camera of a daemon."""

    camera: str
    source: str
    """Without passwords."""
    product: str
    model: str
    """First 12 digits of the package's SHA-256."""
    provider: str
    """What runs the model."""
    threshold: float
    threshold_set: bool = False
    """It was set by command, and is not that of the configuration or the package."""
    paused: bool = False
    ended: bool = False
    """Its source has come to its end."""
    problem: str | None = None
    """Why no parts come from it; None while they do."""
    parts: int = 0
    """Judged since the start."""
    dropped: dict[str, int] = {}
    """Frames never looked at, by reason."""
    drift: DriftStatus | None = None
    """None where drift is not watched."""
    golden: GoldenStatus | None = None
    not_ready: tuple[str, ...] = ()
    """What else speaks against its verdicts: a failed self-test."""
    models: ProductModels | None = None
    """Its product's models, where they come from the fleet: what runs, is tried, and may be gone back to."""
    counts: PartCounts = msgspec.field(default_factory=PartCounts)
    """What became of its parts."""
    trigger_up: bool | None = None
    """Whether its parts can be announced; None where every frame is one."""
