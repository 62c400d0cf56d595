"""A memory as a package's statistics: how far each patch is from the nearest prototype.

Axes: N images, P = grid height x grid width positions, C embedding channels, M prototypes.

With the transform T (a site's memory generator after whitening by the prototypes' covariance), y = T (x - c) and
q_m = T (p_m - c)::

    distance^2 = |y|^2 + min over m of (|q_m|^2 - 2 y' q_m)

which is a Mahalanobis distance to the nearest prototype, in one product and a minimum. |y|^2 is added after the
minimum, so that a NaN in any channel makes the distance NaN, whatever a runtime's minimum does with NaNs. The
difference cancels: in float32 it is off by about 1e-7 (|y| + |q|)^2, which may be negative where a patch *is* a
prototype. Its magnitude is taken then; a clamp would hide a NaN on some runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, NumericalError
from edgeflame.memory_bank import MAX_PROTOTYPES
from edgeflame.moments import F32, require_finite


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """Prototypes and the metric that they are compared in; the same at every position.

    Attributes:
        grid: height and width of the patch grid; P is their product.
        count: number of images behind it.
        prototypes: ``[M, C]`` float32.
        transform: ``[C, C]`` float32.
        centre: ``[C]`` float32; subtracted first, so that float32 suffices.
        num_global: how many of the prototypes, the last ones, are the fleet's; the others are the site's own.
    """

    grid: tuple[int, int]
    count: int
    prototypes: F32
    transform: F32
    centre: F32
    num_global: int = 0

    def __post_init__(self) -> None:
        if self.prototypes.ndim != 2 or not 1 <= len(self.prototypes) <= MAX_PROTOTYPES:
            msg = f"memory: impossible prototypes {list(self.prototypes.shape)}"
            raise DataError(msg)
        channels = self.num_channels
        for name, shape in {"transform": (channels, channels), "centre": (channels,)}.items():
            if getattr(self, name).shape != shape:
                msg = f"memory: {name} should be {list(shape)}, is {list(getattr(self, name).shape)}"
                raise DataError(msg)
        if min(self.grid) < 1 or self.count < 1 or not 0 <= self.num_global <= len(self.prototypes):
            msg = f"memory: impossible grid {self.grid}, count {self.count} or global prototypes {self.num_global}"
            raise DataError(msg)
        for name in ("prototypes", "transform", "centre"):
            if not np.isfinite(getattr(self, name)).all():
                msg = f"memory: {name} holds NaN or infinite values"
                raise NumericalError(msg)
        if not self.transform.any():
            # All distances would be zero: everything would pass.
            msg = "memory: the transform is zero"
            raise NumericalError(msg)

    @property
    def num_channels(self) -> int:
        return int(self.prototypes.shape[1])

    @property
    def num_prototypes(self) -> int:
        return len(self.prototypes)

    @property
    def rank(self) -> int:
        """Memories have none."""
        return 0

    def projected(self) -> npt.NDArray[np.float64]:
        """The prototypes in the metric: q ``[M, C]``."""
        centred = self.prototypes.astype(np.float64) - self.centre.astype(np.float64)
        projected: npt.NDArray[np.float64] = centred @ self.transform.astype(np.float64).T
        return projected

    def distances(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Distances to the nearest prototype.

        Args:
            embeddings: ``[N, P, C]`` float32, or float64 for a reference computed in float64 throughout.

        Returns:
            ``[N, P]`` of the same type, >= 0.

        Raises:
            NumericalError: an embedding holds NaN or infinite values: a fault is never a pass.
        """
        dtype = embeddings.dtype
        require_finite(embeddings)
        projected = self.projected()
        norms = np.square(projected).sum(axis=1).astype(dtype)
        factors, transform = (-2 * projected.T).astype(dtype), self.transform.T.astype(dtype)
        centre = self.centre.astype(dtype)
        squared = np.empty(embeddings.shape[:2], dtype=dtype)
        for index, image in enumerate(embeddings):
            own = (image - centre) @ transform  # [P, C]
            squared[index] = (own @ factors + norms).min(axis=1) + np.square(own).sum(axis=1)
        distances: npt.NDArray[np.floating] = np.sqrt(np.abs(squared))
        return distances
