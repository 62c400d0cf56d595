"""The interface of all runtimes, and checks that a graph and a batch fit."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, PackageError
from edgeflame.images import ImageU8
from edgeflame.package import Manifest
from edgeflame.statistics.maps import shown_maps


class Scores(NamedTuple):
    """The graph's outputs for a batch of N images."""

    scores: npt.NDArray[np.float32]
    """``[N]`` raw distance, the maximum of the map; NaN if something inside the graph went wrong."""
    maps: npt.NDArray[np.float32]
    """``[N, h, w]`` raw distance at every cell of the patch grid, smoothed."""
    unsmoothed: npt.NDArray[np.float32] | None = None
    """The same before smoothing; None where the graph does not give it."""

    def scores_and_shown(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The scores, and the maps to show and to measure by pixel: :func:`edgeflame.statistics.maps.shown_maps`."""
        return self.scores, self.maps if self.unsmoothed is None else shown_maps(self.unsmoothed, self.scores)


class Runtime(Protocol):
    """A loaded scoring graph."""

    @property
    def provider(self) -> str:
        """Name of what computes it in fact, for instance ``CPUExecutionProvider``."""
        ...

    @property
    def precision(self) -> str:
        """Precision of the graph: ``fp32`` unless its metadata name another."""
        ...

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of its input, pixels."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of its anomaly maps, cells."""
        ...

    def score(self, batch: ImageU8) -> Scores:
        """Score pre-processed images. The returned arrays belong to the caller.

        Args:
            batch: ``[N, H, W, 3]`` uint8, BGR, N >= 1.

        Raises:
            DataError: the batch has another shape or type.
            RuntimeUnavailableError: the runtime failed, for instance out of memory.
        """
        ...


def check_runtime_fits(runtime: Runtime, manifest: Manifest) -> None:
    """Check that a package's graph is the one that its manifest describes.

    Raises:
        PackageError: input size or grid differ.
    """
    expected = manifest.learning.input
    if runtime.input_size != (expected.height, expected.width) or runtime.grid != manifest.grid:
        raise PackageError(
            f"the package's graph takes {_size(runtime.input_size)} images and gives {_size(runtime.grid)} maps, its "
            f"manifest says {_size((expected.height, expected.width))} and {_size(manifest.grid)}"
        )


def check_batch(batch: ImageU8, input_size: tuple[int, int]) -> None:
    """Check that a batch has the graph's input size; images are not resized here.

    Raises:
        DataError: wrong type or shape.
    """
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[0] < 1 or batch.shape[1:] != (*input_size, 3):
        raise DataError(
            f"expected uint8 images [N, {input_size[0]}, {input_size[1]}, 3], got {batch.dtype} {list(batch.shape)}"
        )


def _size(height_width: tuple[int, int]) -> str:
    return f"{height_width[1]}x{height_width[0]}"
