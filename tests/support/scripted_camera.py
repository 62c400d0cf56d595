"""A camera that gives parts when a test says so, and an inspector that blocks or fails as the test sets it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from edge.config import InspectConfig
from edge.frame import Captured, Frame, make_frame
from edge.result import Inspected
from edge.verdict import Observation
from tests.support.inspection_results import judge
from tests.support.small_package import good_image

IMAGE = good_image(0)


class Belt:
    """Parts that come when the test says so; each script is one life of the camera."""

    name = "belt"
    num_frames = None

    def __init__(self, *, is_live: bool = True, is_endless: bool = True) -> None:
        self.is_live, self.is_endless = is_live, is_endless
        self.coming: queue.SimpleQueue[Exception | str] = queue.SimpleQueue()
        self.given = 0

    def put(self, count: int = 1) -> None:
        for _ in range(count):
            self.coming.put("part")

    def fail(self, failure: Exception) -> None:
        self.coming.put(failure)

    def end(self) -> None:
        self.coming.put("end")

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        while not stop.is_set():
            try:
                what = self.coming.get(timeout=0.02)
            except queue.Empty:
                continue
            if isinstance(what, Exception):
                raise what
            if what == "end":
                return
            self.given += 1
            yield make_frame(part_id=f"p{self.given}", source=self.name, image_bgr=IMAGE)


class FakeInspector:
    """Passes every part; waits for ``gate`` if there is one, and fails the next ``failures`` times."""

    provider = "CPU"
    review_band = 0.0
    observer = None
    is_trial = False

    def __init__(self, product: str = "tile", failures: int = 0) -> None:
        self.product, self.model_id, self.threshold = product, product * 3, 1.0
        self.failures = failures
        self.gate: threading.Event | None = None

    def set_threshold(self, value: float | None) -> None:
        self.threshold = 1.0 if value is None else value

    def inspect_photograph(self, captured: Captured) -> Inspected:
        return judge(self, captured)

    def reconfigured(self, config: InspectConfig) -> FakeInspector:
        return FakeInspector(self.product)

    def inspect(self, captured: Captured) -> Observation:
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("a defect of ours")
        return Observation(score=0.5, evidence=captured.frame.image_bgr)
