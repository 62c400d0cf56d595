"""The places where models judge: a daemon's cameras, by product."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, final

import msgspec

from edge.cameras import Cameras
from edge.inspector import Inspector
from edge.judge import Judge
from edge.models.shadow import Second, slowdown_of
from edge.runtimes import Runtime, check_runtime_fits, open_runtime
from edgeflame.errors import PackageError
from edgeflame.package import Package, read_package


class Configured(msgspec.Struct, frozen=True, kw_only=True):
    """A product as the configuration has it."""

    name: str
    """In the configuration."""
    product: str
    """In its packages, and in the fleet."""
    file: str
    sha256: str


class Seats(Protocol):
    """Where models are put; for tests of what decides about them."""

    def open(self, name: str, file: Path, sha256: str) -> Mapping[str, Judge]:
        """A warm judge for every camera that has the product now, or for one if none has, held to the package's
        reference images.

        Raises:
            EdgeFlameError: it may not judge here.
        """
        ...

    def use(self, name: str, file: Path, judges: Mapping[str, Judge]) -> Mapping[str, Judge]:
        """Have these judge from the next part on, wherever the product is judged now or later; those before them.

        Raises:
            EdgeFlameError: a camera's part in hand does not come to an end.
        """
        ...

    def strays(self, name: str, sha256: str) -> bool:
        """Whether a camera judges the product with another package."""
        ...

    def open_second(self, name: str, file: Path, present: Path) -> Second:
        """A package for a shadow run beside another; on the thread that will run it.

        Raises:
            EdgeFlameError: it cannot be opened.
        """
        ...


@final
class CameraSeats:
    """The real ones.

    Args:
        cameras: of the daemon.
    """

    def __init__(self, cameras: Cameras) -> None:
        self._cameras = cameras

    def open(self, name: str, file: Path, sha256: str) -> Mapping[str, Judge]:
        lines = [line for line in self._cameras.lines if line.judge.product == name] or self._cameras.lines[:1]
        judges = {line.name: self._cameras.try_package(line.name, name, file) for line in lines}
        if any(not sha256.startswith(judge.model_id) for judge in judges.values()):
            msg = f"{file}: it is another package now than the one that was checked ({sha256[:12]})"
            raise PackageError(msg)
        return judges

    def use(self, name: str, file: Path, judges: Mapping[str, Judge]) -> Mapping[str, Judge]:
        return self._cameras.put_package(name, file, judges)

    def strays(self, name: str, sha256: str) -> bool:
        return any(
            line.judge.product == name and not sha256.startswith(line.judge.model_id) for line in self._cameras.lines
        )

    def open_second(self, name: str, file: Path, present: Path) -> Second:
        package = read_package(file)
        runtime = _single_threaded(package)
        judges = {
            line.name: Inspector(package, runtime, self._cameras.settings(line.name), camera=line.name, product=name)
            for line in self._cameras.lines
        }
        return Second(judges=judges, slowdown=slowdown_of(runtime, _single_threaded(read_package(present))))


def _single_threaded(package: Package) -> Runtime:
    """On the CPU, whatever the line computes on: a shadow takes nothing from it."""
    runtime = open_runtime(package.model_onnx, device="cpu", num_threads=1)
    check_runtime_fits(runtime, package.manifest)
    return runtime
