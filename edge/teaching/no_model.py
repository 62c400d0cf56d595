"""A camera without a product yet: it shows its pictures, and every part is ``unknown``."""

from __future__ import annotations

import time
from typing import final

from edge.config import InspectConfig
from edge.frame import Captured
from edge.inspector import FrameObserver
from edge.result import Inspected, Reason
from edge.status import DEFAULT_CAMERA
from edge.verdict import Observation, make_result, unscored, with_evidence

NO_PRODUCT = ""
"""Name of the product of a camera that has none."""


@final
class NoModel:
    """Implements :class:`edge.inspector.InspectorProtocol` where there is nothing to inspect with.

    Args:
        camera: the camera's name.
    """

    product = NO_PRODUCT
    model_id = ""
    threshold = 1.0
    review_band = 0.0
    provider = "no model"
    is_trial = False
    observer: FrameObserver | None = None

    def __init__(self, camera: str = DEFAULT_CAMERA) -> None:
        self._camera = camera

    def set_threshold(self, value: float | None) -> None:
        """There is none."""

    def reconfigured(self, config: InspectConfig) -> NoModel:
        """The same."""
        del config
        return self

    def inspect(self, captured: Captured) -> Observation:
        """The picture, without a score."""
        frame = captured.frame
        if frame.image_bgr is None:
            return unscored(captured, frame.fault or Reason.UNREADABLE, frame.error or "the source gave no image")
        return unscored(captured, Reason.MODEL_NOT_READY, "no product has been taught yet")

    def inspect_photograph(self, captured: Captured) -> Inspected:
        """The same of a photograph."""
        observation = self.inspect(captured)
        result = make_result(
            captured,
            observation,
            camera=self._camera,
            model=self.model_id,
            threshold=self.threshold,
            now_s=time.monotonic(),
        )
        return with_evidence(result, captured, observation)
