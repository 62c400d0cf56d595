"""From a package file to an inspector that may judge: signature, runtime, parity, warm-up."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from edge.choice import LineDevice, open_for_line
from edge.config import InspectConfig
from edge.inspector import Inspector
from edge.parity import require_parity
from edge.runtimes import Runtime, check_runtime_fits, open_runtime
from edge.runtimes.onnx_runtime import CPU
from edgeflame.console import EventLog
from edgeflame.package import Package, read_package
from edgeflame.signing import verify_signature

log = EventLog("inspect")

MAX_LANES = 4
"""Each holds an image and the model's activations; on more cores, each lane has several."""


class Loader:
    """Opens packages the way this daemon was told to.

    Args:
        device: what runs models.
        engines: folder of engines.
        num_threads: of the CPU for one image; None: as many as there are cores.
        public_key: file of the key that must have signed a package; None: none need be signed.
    """

    def __init__(
        self,
        *,
        device: LineDevice = "auto",
        engines: Path | None = None,
        num_threads: int | None = None,
        public_key: Path | None = None,
    ) -> None:
        self._device = device
        self._engines = engines
        self._num_threads = num_threads
        self._public_key = public_key
        self._packages: dict[Path, Package] = {}
        self._lock = threading.Lock()

    def share_cores(self, num_cameras: int) -> None:
        """Several cameras judge at the same time: give each its share of the cores, unless a number was asked for."""
        if self._num_threads is None and num_cameras > 1:
            self._num_threads = max(1, (os.cpu_count() or 1) // num_cameras)

    def package(self, file: Path) -> Package:
        """A package, read once and then remembered until :meth:`forget`.

        Raises:
            PackageError: it cannot be read, or the signature is not the one that must be there.
        """
        with self._lock:
            package = self._packages.get(file)
            if package is None:
                package = read_package(file)
                if self._public_key is not None:
                    log.info("signature_verified", file=file.name, key=verify_signature(package, self._public_key))
                self._packages[file] = package
            return package

    def forget(self) -> None:
        """Read files anew from now on; those that were changed meanwhile."""
        with self._lock:
            self._packages.clear()

    def open(
        self, file: Path, settings: InspectConfig, *, camera: str, product: str | None = None, is_live: bool
    ) -> Inspector:
        """An inspector of one camera, with a runtime of its own, held to the package's reference images and warm.

        Args:
            file: the package.
            settings: the camera's.
            camera: its name.
            product: its name; the package's own unless given.
            is_live: whether the images come from a camera.

        Raises:
            EdgeFlameError: it may not judge here, and why.
        """
        package = self.package(file)
        runtime, _ = open_for_line(package, device=self._device, engines=self._engines, num_threads=self._num_threads)
        check_runtime_fits(runtime, package.manifest)
        if package.references:
            parity = require_parity(runtime, package)
            log.info("parity", images=parity.num_images, worst=parity.worst, tolerance=parity.tolerance)
        else:
            log.warning("parity_unchecked", reason="the package holds no reference images")
        lanes, shared = self._lanes(package, runtime)
        inspector = Inspector(
            package,
            runtime,
            settings,
            camera=camera,
            product=product,
            lanes=lanes,
            shared=shared,
            is_live=is_live,
        )
        inspector.warm_up()
        return inspector

    def _lanes(self, package: Package, runtime: Runtime) -> tuple[int, Runtime | None]:
        """On the CPU, as many lanes as it has threads for us, and a runtime whose images share these threads."""
        threads = self._num_threads or os.cpu_count() or 1
        lanes = min(threads, MAX_LANES)
        if runtime.provider != CPU or lanes == 1:
            return 1, None
        shared = open_runtime(package.model_onnx, device="cpu", num_threads=threads // lanes)
        if package.references:
            require_parity(shared, package)
        return lanes, shared
