"""The inspector: makes an observation of a captured frame (pre-processing, image health, score). No I/O but packages.

What depends on one frame alone may be computed ahead of the frame's turn, on any thread (:meth:`Inspector.observe`);
checks against the frames before it, a frozen camera or a changed size, are made in its turn. Whatever goes wrong is
noted as a fault, and :mod:`edge.verdict` never makes a pass of an observation with faults. :class:`InspectorLoader`
opens a package file as an inspector: signature, runtime, parity with the reference images, warm-up.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge.config import InspectConfig
from edge.frame import Captured, Frame
from edge.health import ImageHealth
from edge.result import Hop, Inspected, Reason
from edge.runtimes.interface import Runtime, check_runtime_fits
from edge.runtimes.load import TOLERANCES, LineDevice, open_for_line, open_runtime, require_parity
from edge.runtimes.trial import TriedGraphs, try_graph
from edge.status import DEFAULT_CAMERA
from edge.verdict import Observation, make_result, with_evidence
from edge.view import View
from edgeflame.cpus import usable_cpus
from edgeflame.dataset import BITS_ADVICE
from edgeflame.errors import DataError, PackageError, RuntimeUnavailableError
from edgeflame.images import LITTLE_USED, ImageU8, ImageU16, share_of_range
from edgeflame.log import EventLog
from edgeflame.onnx_session import CPU
from edgeflame.package import Package, PackageHead, read_package
from edgeflame.signing import verify_signature
from edgeflame.statistics.maps import shown_maps
from edgeflame.tensorrt import TENSORRT_KINDS


class FrameObserver(Protocol):
    """Observes frames ahead of their turn."""

    @property
    def num_parallel(self) -> int:
        """How many frames it observes at the same time with profit."""
        ...

    def observe(self, captured: Captured, *, beside_others: bool = False) -> Any:
        """Observe a frame by itself; any thread may call it, several at once.

        Args:
            captured: the frame.
            beside_others: whether other frames are observed at the same time, each on a share of the cores.
        """
        ...


class InspectorProtocol(Protocol):
    """Inspects frames, one at a time; :class:`Inspector` implements it."""

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
    def review_band(self) -> float:
        """Share of the threshold to either side in which the verdict is left to a person."""
        ...

    @property
    def provider(self) -> str:
        """The runtime that computes the scores, as a name for people."""
        ...

    @property
    def is_trial(self) -> bool:
        """Whether its verdicts are a trial's, of a model that nobody has said may decide; results are marked so."""
        ...

    @property
    def observer(self) -> FrameObserver | None:
        """Observes frames ahead of their turn; None where that brings nothing."""
        ...

    def set_threshold(self, value: float | None) -> None:
        """Set the threshold from the next frame on, raw distance; None: the initial one. Not during a frame."""
        ...

    def reconfigured(self, config: InspectConfig) -> InspectorProtocol:
        """A new inspector of the same model with another configuration; this one may be in use meanwhile."""
        ...

    def inspect(self, captured: Captured) -> Observation:
        """Observe a frame in its turn. Whatever goes wrong is noted as a fault; nothing is raised for a bad image."""
        ...

    def inspect_photograph(self, captured: Captured) -> Inspected:
        """Inspect a photograph that does not come from the camera; the checks across frames ignore it."""
        ...


log = EventLog("inspect")

IMAGES_FOR_RANGE = 3
"""Number of images of 16 bits after which a line says that they use little of their range."""


class Inspector:
    """One package on one runtime with one set of rules.

    Args:
        package: the model.
        runtime: runs its graph.
        config: threshold, image quality and region of interest.
        camera: the camera's name, for the results.
        product: the product's name; None: the package's own.
        num_parallel: number of images observed at the same time; see :mod:`edge.capture`.
        shared: runs the graph while other images are observed; None: ``runtime`` does. If ``num_parallel`` is above 1,
            several threads may use both at once.
        is_live: whether the images come from a camera; then one that repeats itself is frozen.
        is_trial: whether its verdicts are a trial's.
    """

    def __init__(
        self,
        package: Package,
        runtime: Runtime,
        config: InspectConfig,
        *,
        camera: str = DEFAULT_CAMERA,
        product: str | None = None,
        num_parallel: int = 1,
        shared: Runtime | None = None,
        is_live: bool = False,
        is_trial: bool = False,
    ) -> None:
        self.is_trial = is_trial
        threshold = config.verdict.threshold
        self._own_threshold = package.manifest.threshold.value if threshold is None else threshold
        self.threshold = self._own_threshold
        self.review_band = config.verdict.review_band
        self.model_id = package.sha256[:12]
        self.product = package.manifest.product if product is None else product
        self._camera = camera
        self._is_live = is_live
        self.provider = runtime.provider
        self._view = View(config.roi, package.manifest.learning.input, package.manifest.grid)
        self.num_parallel = num_parallel
        self._runtime = runtime
        self._shared = shared
        self._counting = threading.Lock()
        self._range_used: list[float] = []
        self._config = config
        references = [reference.image(package.manifest.learning.input) for reference in package.references]
        self.package = package
        self.precision = runtime.precision
        health = partial(
            ImageHealth,
            config.image_quality,
            references,
            frame=config.roi.frame,
            made_of=package.manifest.frames,
            is_strict=config.image_quality.frame_size == "model" and config.roi.frame is None and not config.roi.crop,
        )
        self._health, self._photograph_health = health(is_live=is_live), health(is_live=False)

    def warm_up(self) -> None:
        """Score a grey image, so that the first part does not pay for the runtime's allocations."""
        for runtime in (self._runtime,) if self._shared is None else (self._runtime, self._shared):
            runtime.score(np.full((1, *runtime.input_size, 3), 127, dtype=np.uint8))

    def set_threshold(self, value: float | None) -> None:
        """Set the threshold from the next frame on, raw distance; None: the configuration's or the package's."""
        self.threshold = self._own_threshold if value is None else value

    def reconfigured(self, config: InspectConfig) -> Inspector:
        """A new inspector of the same model on the same runtime with another configuration, and its threshold."""
        return Inspector(
            self.package,
            self._runtime,
            config,
            camera=self._camera,
            product=self.product,
            num_parallel=self.num_parallel,
            shared=self._shared,
            is_live=self._is_live,
            is_trial=self.is_trial,
        )

    def on_trial(self) -> Inspector:
        """The same on the same runtime, for a trial."""
        self_again = self.reconfigured(self._config)
        self_again.is_trial = True
        return self_again

    @property
    def observer(self) -> FrameObserver | None:
        """Itself if it observes several images at the same time, else None."""
        return self if self.num_parallel > 1 else None

    def observe(self, captured: Captured, *, beside_others: bool = False) -> Observation:
        """As :meth:`FrameObserver.observe`."""
        runtime = self._runtime if self._shared is None or not beside_others else self._shared
        return self._observe(captured.frame, runtime)

    def inspect(self, captured: Captured) -> Observation:
        """Observe a frame in its turn, or take what was found ahead of it, and add the checks across frames."""
        ahead = captured.prefetched
        observation: Observation = (
            ahead.found.result() if ahead is not None and ahead.observer is self else self.observe(captured)
        )
        return _in_order(captured, observation, self._health)

    def inspect_photograph(self, captured: Captured) -> Inspected:
        """Inspect a photograph: a frame that may come twice and have another size than the camera's."""
        observation = _in_order(captured, self.observe(captured), self._photograph_health)
        result = make_result(
            captured,
            observation,
            camera=self._camera,
            model=self.model_id,
            threshold=self.threshold,
            review_band=self.review_band,
            now_s=time.monotonic(),
        )
        return with_evidence(result, captured, observation)

    def _observe(self, frame: Frame, runtime: Runtime) -> Observation:
        faults: list[Reason] = []
        details: list[str] = []
        image = evidence = view = area = anomaly_map = shown_map = score = None
        samples = frame.samples
        if samples is None:
            faults.append(frame.fault or Reason.UNREADABLE)
            details.append(frame.error or "the source gave no image")
        else:
            evidence = frame.image_bgr
            try:
                view = self._view.fit(height=samples.shape[0], width=samples.shape[1])
                image = self._view.preprocessing.apply(samples)
                evidence = self._view.preprocessing.picture(samples)
                frame.passes(Hop.RESIZED)
                self._note_range(samples)
                area = self._view.area(height=samples.shape[0], width=samples.shape[1])
            except DataError as exc:
                faults.append(Reason.UNFIT_IMAGE)
                details.append(str(exc))
        if image is not None and view is not None:
            faults.extend(self._health.faults(image))
            try:
                scores, maps, unsmoothed = runtime.score(image[None])
                frame.passes(Hop.SCORED)
            except (DataError, PackageError, RuntimeUnavailableError) as exc:
                faults.append(Reason.RUNTIME_FAILED)
                details.append(str(exc))
            else:
                anomaly_map = view.mask(maps[0])
                if not (np.isfinite(scores[0]) and np.isfinite(maps[0]).all()):
                    # Ignored areas count here as well: a model that gives no finite numbers there is broken.
                    score = math.nan
                else:
                    score = float(scores[0]) if view.judged is None else float(anomaly_map.max())
                if unsmoothed is not None:
                    shown_map = shown_maps(unsmoothed, np.array([score], np.float32), view.judged)[0]
        return Observation(
            image=image,
            evidence=evidence,
            ignored=None if view is None else view.ignored,
            faults=faults,
            details=details,
            score=score,
            anomaly_map=anomaly_map,
            shown_map=shown_map,
            area=area,
        )

    def _note_range(self, samples: ImageU8 | ImageU16) -> None:
        """Warn once if the first images of 16 bits use little of their range."""
        if samples.dtype == np.uint16 and len(self._range_used) < IMAGES_FOR_RANGE:
            with self._counting:
                self._range_used.append(share_of_range(samples, self._view.preprocessing.sample_bits))
                is_little = len(self._range_used) == IMAGES_FOR_RANGE and max(self._range_used) <= LITTLE_USED
            if is_little:
                log.warning("little_of_range_used", camera=self._camera, most=max(self._range_used), advice=BITS_ADVICE)


def _in_order(captured: Captured, observation: Observation, health: ImageHealth) -> Observation:
    """The observation with the checks across frames added: another size, the very same picture again."""
    frame, faults, details = captured.frame, [*observation.faults], [*observation.details]
    if frame.image_bgr is not None and (wrong := health.size_fault(frame.image_bgr)) is not None:
        faults.insert(0, Reason.WRONG_SIZE)
        details.insert(0, wrong)
    if observation.image is not None and health.is_frozen(observation.image):
        faults.append(Reason.FROZEN)
    return replace(observation, faults=faults, details=details)


MAX_PARALLEL = 4
"""Most images observed at the same time, since each needs memory for activations; more cores are shared among them."""


class InspectorLoader:
    """Opens packages as inspectors, with the daemon's settings for runtimes and signatures.

    Args:
        device: what runs models.
        engines: folder of built TensorRT engines.
        num_threads: CPU threads for one image; None: as many as there are cores to use.
        public_key: file of the key that must have signed every package; None: signatures are not required.
        state: the line's state folder, where graphs that have been tried are remembered; None: they are not.
    """

    def __init__(
        self,
        *,
        device: LineDevice = "auto",
        engines: Path | None = None,
        num_threads: int | None = None,
        public_key: Path | None = None,
        state: Path | None = None,
    ) -> None:
        self._device = device
        self._engines = engines
        self._num_threads = num_threads
        self._public_key = public_key
        self._packages: dict[Path, Package] = {}
        self._tried = TriedGraphs(state)
        self._lock = threading.Lock()

    def share_cores(self, num_cameras: int) -> None:
        """Divide the cores among cameras, which inspect at the same time; an explicit ``num_threads`` is kept."""
        if self._num_threads is None and num_cameras > 1:
            self._num_threads = max(1, usable_cpus() // num_cameras)

    def package(self, file: Path) -> Package:
        """A package, read once and then kept until :meth:`forget`.

        Raises:
            PackageError: it cannot be read, or it is not signed with the required key.
        """
        with self._lock:
            package = self._packages.get(file)
            if package is None:
                package = read_package(file, accept=partial(self._verify, file))
                self._packages[file] = package
            return package

    def _verify(self, file: Path, head: PackageHead) -> None:
        if self._public_key is not None:
            log.info("signature_verified", file=file.name, key=verify_signature(head, self._public_key))

    def forget(self) -> None:
        """Forget all packages, so that files changed meanwhile are read again."""
        with self._lock:
            self._packages.clear()

    def open(
        self, file: Path, settings: InspectConfig, *, camera: str, product: str | None = None, is_live: bool
    ) -> Inspector:
        """A warmed-up inspector for one camera, with a runtime of its own, checked on the package's reference images.

        Args:
            file: the package.
            settings: the camera's configuration.
            camera: the camera's name.
            product: the product's name; None: the package's own.
            is_live: whether the images come from a camera.

        Raises:
            EdgeFlameError: the package cannot be used here; the message says why.
        """
        package = self.package(file)
        self._try(package)
        runtime, candidates = open_for_line(
            package, device=self._device, engines=self._engines, num_threads=self._num_threads
        )
        check_runtime_fits(runtime, package.manifest)
        if package.references:
            worst = candidates[0].worst_difference if candidates else require_parity(runtime, package).worst
            log.info("parity", images=len(package.references), worst=worst, tolerance=TOLERANCES[runtime.precision])
        else:
            log.warning("parity_unchecked", reason="the package holds no reference images")
        num_parallel, shared = self._parallel(package, runtime)
        inspector = Inspector(
            package,
            runtime,
            settings,
            camera=camera,
            product=product,
            num_parallel=num_parallel,
            shared=shared,
            is_live=is_live,
        )
        inspector.warm_up()
        return inspector

    def _try(self, package: Package) -> None:
        with self._lock:
            # Engines are made of a graph on this machine, and may run where ONNX Runtime is not installed.
            if self._device not in TENSORRT_KINDS and package.sha256 not in self._tried:
                try_graph(package.model_onnx)
                self._tried.add(package.sha256)

    def _parallel(self, package: Package, runtime: Runtime) -> tuple[int, Runtime | None]:
        """Number of images observed at once, and the runtime for them, which divides the CPU threads among them.

        ``(1, None)`` on other devices than the CPU, or with one thread.
        """
        threads = self._num_threads or usable_cpus()
        num_parallel = min(threads, MAX_PARALLEL)
        if runtime.provider != CPU or num_parallel == 1:
            return 1, None
        shared = open_runtime(package.model_onnx, device="cpu", num_threads=threads // num_parallel)
        if package.references:
            require_parity(shared, package)
        return num_parallel, shared
