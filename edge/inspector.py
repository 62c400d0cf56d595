"""From a captured frame to its result: pre-processing, health, score, verdict. No I/O of its own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge.capture import Captured
from edge.config import InspectConfig
from edge.health import ImageHealth
from edge.lanes import Looker
from edge.results import Inspected, Result
from edge.runtimes import Runtime
from edge.sources import Frame
from edge.status import DEFAULT_CAMERA
from edge.verdict import Reason, decide
from edge.view import View
from edgeflame.errors import DataError, PackageError, RuntimeUnavailableError
from edgeflame.images import ImageU8
from edgeflame.package import Package


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """What one frame shows by itself."""

    image: ImageU8 | None
    """The model's input, ``[height, width, 3]`` uint8 BGR."""
    evidence: ImageU8 | None
    """The same area as the camera gave it."""
    ignored: ImageU8 | None
    """Above 0 where that area is not judged; None where all of it is."""
    faults: Sequence[Reason]
    details: Sequence[str]
    score: float | None
    """NaN where the map is not finite; None where there is none."""
    anomaly_map: npt.NDArray[np.float32] | None


class Inspector:
    """One package on one runtime with one set of rules.

    Args:
        package: the model.
        runtime: runs its graph.
        config: the rules.
        camera: its name, for the results.
        product: its name; the package's own unless given.
        lanes: images worth looking at side by side; see :mod:`edge.lanes`.
        shared: runs the graph while other images are looked at; None: ``runtime`` then as well. Both may be used by
            several threads at once, if there are several lanes.
        is_live: whether the images come from a camera; then one that repeats itself is frozen.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        package: Package,
        runtime: Runtime,
        config: InspectConfig,
        *,
        camera: str = DEFAULT_CAMERA,
        product: str | None = None,
        lanes: int = 1,
        shared: Runtime | None = None,
        is_live: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        threshold = config.verdict.threshold
        self._own_threshold = package.manifest.threshold.value if threshold is None else threshold
        self.threshold = self._own_threshold
        self.model_id = package.sha256[:12]
        self.product = package.manifest.product if product is None else product
        self._camera = camera
        self._is_live = is_live
        self.provider = runtime.provider
        self._view = View(config.view, package.manifest.learning.input, package.manifest.grid)
        self.lanes = lanes
        self._runtime = runtime
        self._shared = shared
        self._counting = threading.Lock()
        self._num_looking = 0
        self._config = config
        self._clock = clock
        references = [reference.image(package.manifest.learning.input) for reference in package.references]
        self.package = package
        self.precision = runtime.precision
        self._health = ImageHealth(config.health, references, is_live=is_live, frame=config.view.frame)
        self._rehearsal = ImageHealth(config.health, references, is_live=False, frame=config.view.frame)

    def warm_up(self) -> None:
        """Score a grey image, so that the first part does not pay for the runtime's allocations."""
        for runtime in (self._runtime,) if self._shared is None else (self._runtime, self._shared):
            runtime.score(np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8))

    def set_threshold(self, value: float | None) -> None:
        """Another threshold from the next frame on; None for the configuration's or the package's."""
        self.threshold = self._own_threshold if value is None else value

    def reconfigured(self, config: InspectConfig) -> Inspector:
        """The same model on the same runtime with other rules, and the threshold of these."""
        return Inspector(
            self.package,
            self._runtime,
            config,
            camera=self._camera,
            product=self.product,
            lanes=self.lanes,
            shared=self._shared,
            is_live=self._is_live,
            clock=self._clock,
        )

    @property
    def looker(self) -> Looker | None:
        """Itself, where looking at several images side by side is worth it."""
        return self if self.lanes > 1 else None

    def look(self, captured: Captured) -> Look:
        """What one frame shows, whatever came before it; on any thread, several at once."""
        with self._counting:
            self._num_looking += 1
            is_alone = self._num_looking == 1
        try:
            return self._look(captured.frame, self._runtime if is_alone or self._shared is None else self._shared)
        finally:
            with self._counting:
                self._num_looking -= 1

    def inspect(self, captured: Captured) -> Inspected:
        """Judge one frame. Whatever goes wrong with it is in the result, and never a pass."""
        ahead = captured.ahead
        look: Look = ahead.found.result() if ahead is not None and ahead.looker is self else self.look(captured)
        return self._told(captured, look, self._health)

    def rehearse(self, captured: Captured) -> Inspected:
        """Judge a photograph: a frame that may come twice and be of another size than the camera's."""
        return self._told(captured, self.look(captured), self._rehearsal)

    def _told(self, captured: Captured, look: Look, health: ImageHealth) -> Inspected:
        frame = captured.frame
        faults, details = [*look.faults], [*look.details]
        if frame.image_bgr is not None and health.is_wrong_size(frame.image_bgr):
            faults.insert(0, Reason.WRONG_SIZE)
            details.insert(0, f"the frame has {frame.image_bgr.shape[1]}x{frame.image_bgr.shape[0]} pixels")
        if look.image is not None and health.is_frozen(look.image):
            faults.append(Reason.FROZEN)
        decision = decide(
            score=look.score, threshold=self.threshold, review_band=self._config.verdict.review_band, faults=faults
        )
        result = Result(
            camera=self._camera,
            sequence=captured.sequence,
            part_id=frame.part_id,
            source=frame.source,
            captured=frame.captured_utc,
            verdict=decision.verdict.value,
            reasons=tuple(reason.value for reason in decision.reasons),
            detail="; ".join(details) or None,
            score=look.score if look.score is not None and math.isfinite(look.score) else None,
            threshold=self.threshold,
            latency_ms=round(1000 * (self._clock() - frame.captured_monotonic_s), 3),
            label=frame.label,
            model=self.model_id,
        )
        return Inspected(
            result=result,
            image=look.evidence,
            anomaly_map=look.anomaly_map,
            ignored=look.ignored,
            origin=frame.origin,
        )

    def _look(self, frame: Frame, runtime: Runtime) -> Look:
        faults: list[Reason] = []
        details: list[str] = []
        image = evidence = view = anomaly_map = score = None
        if frame.image_bgr is None:
            faults.append(frame.fault or Reason.UNREADABLE)
            details.append(frame.error or "the source gave no image")
        else:
            evidence = frame.image_bgr
            try:
                view = self._view.fit(height=evidence.shape[0], width=evidence.shape[1])
                image = self._view.preprocessing.apply(frame.image_bgr)
                evidence = self._view.preprocessing.crop(frame.image_bgr)
            except DataError as exc:
                faults.append(Reason.UNFIT_IMAGE)
                details.append(str(exc))
        if image is not None and view is not None:
            faults.extend(self._health.faults(image))
            try:
                scores, maps = runtime.score(image[None])
            except (DataError, PackageError, RuntimeUnavailableError) as exc:
                faults.append(Reason.RUNTIME_FAILED)
                details.append(str(exc))
            else:
                anomaly_map = view.mask(maps[0])
                if not (np.isfinite(scores[0]) and np.isfinite(maps[0]).all()):
                    # Also where it is not judged: a model that gives no numbers there is broken.
                    score = math.nan
                else:
                    score = float(scores[0]) if view.judged is None else float(anomaly_map.max())
        return Look(
            image=image,
            evidence=evidence,
            ignored=None if view is None else view.ignored,
            faults=faults,
            details=details,
            score=score,
            anomaly_map=anomaly_map,
        )
