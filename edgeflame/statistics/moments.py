"""Streaming moments per position: what Gaussian statistics are made of, and what merges exactly between sites.

Axes: N images, P = grid height x grid width positions, C embedding channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeflame.cpus import usable_cpus
from edgeflame.errors import DataError, NumericalError
from edgeflame.tensors import F32, F64

ALL_POSITIONS = slice(None)

MAX_WORKERS = 8
"""Threads for the statistics; beyond that memory bandwidth is the limit."""

POSITIONS_PER_BLOCK = 32
"""Positions worked on at a time: their C x C matrices stay in the processor's cache (3 MB in float32 at C = 152)."""


class MomentAccumulator:
    """Count, sum and sum of outer products per position, one batch after another.

    Memory is P x C x C float64 and does not depend on the number of images. Sums are taken about the first
    batch's mean, so that a large offset does not eat the precision; products are taken in float32 and summed in
    float64.

    Args:
        start: moments to go on from; they are copied.
    """

    def __init__(self, start: Moments | None = None) -> None:
        self._count = start.count if start else 0
        self._shift: F32 | None = start.shift.astype(np.float32) if start else None
        self._total: F64 | None = start.total.copy() if start else None
        self._outer: F64 | None = start.outer.copy() if start else None
        if start and not np.array_equal(start.shift, start.shift.astype(np.float32)):
            moved = start.about(start.shift.astype(np.float32).astype(np.float64))
            self._total, self._outer = moved.total, moved.outer

    @property
    def count(self) -> int:
        """Images that are in."""
        return self._count

    def add(self, embeddings: F32) -> None:
        """Add a batch.

        Args:
            embeddings: ``[N, P, C]`` float32.

        Raises:
            NumericalError: a value is NaN or infinite.
            DataError: the shape differs from earlier batches.
        """
        self._accumulate(embeddings, sign=1)

    def remove(self, embeddings: F32) -> None:
        """Take a batch out again, for instance to leave one fold out of the whole.

        Args:
            embeddings: ``[N, P, C]`` float32, added earlier.

        Raises:
            NumericalError: a value is NaN or infinite.
            DataError: the shape differs, or more images would be taken out than are in.
        """
        if embeddings.shape[0] > self._count:
            raise DataError(f"cannot remove {embeddings.shape[0]} images from statistics of {self._count}")
        self._accumulate(embeddings, sign=-1)

    def moments(self) -> Moments:
        """What was accumulated so far; shares memory with the accumulator.

        Raises:
            DataError: nothing was added.
        """
        if self._shift is None or self._total is None or self._outer is None or self._count == 0:
            raise DataError("no images were added to the statistics")
        return Moments(count=self._count, shift=self._shift.astype(np.float64), total=self._total, outer=self._outer)

    def _accumulate(self, embeddings: F32, *, sign: int) -> None:
        if embeddings.ndim != 3:
            raise DataError(f"expected embeddings [N, P, C], got {list(embeddings.shape)}")
        require_finite(embeddings)
        if self._shift is None:
            self._shift = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
            num_positions, num_channels = embeddings.shape[1:]
            self._total = np.zeros((num_positions, num_channels))
            self._outer = np.zeros((num_positions, num_channels, num_channels))
        shift, total, outer = self._shift, self._total, self._outer
        assert total is not None
        assert outer is not None
        if embeddings.shape[1:] != shift.shape:
            raise DataError(f"expected embeddings of {list(shift.shape)} per image, got {list(embeddings.shape[1:])}")

        def block(at: slice) -> None:
            centred = np.ascontiguousarray((embeddings[:, at] - shift[at]).transpose(1, 0, 2))  # [block, N, C]
            total[at] += sign * centred.sum(axis=1, dtype=np.float64)
            products = np.matmul(centred.transpose(0, 2, 1), centred)
            if sign > 0:
                outer[at] += products
            else:
                outer[at] -= products

        map_position_blocks(shift.shape[0], block)
        self._count += sign * embeddings.shape[0]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Raw moments about a shift; the moments of two data sets merge exactly.

    Attributes:
        count: number of images N.
        shift: ``[P, C]`` the point about which sums were taken.
        total: ``[P, C]`` sum of (x - shift).
        outer: ``[P, C, C]`` sum of (x - shift)(x - shift)'.
    """

    count: int
    shift: F64
    total: F64
    outer: F64

    @property
    def mean(self) -> F64:
        """``[P, C]``."""
        return self.shift + self.total / self.count

    def covariance(self, at: slice = ALL_POSITIONS) -> F64:
        """Sample covariance ``[P, C, C]`` with 1/(N - 1), of some positions if ``at`` says which.

        Raises:
            DataError: fewer than two images.
        """
        if self.count < 2:
            raise DataError(f"statistics need at least 2 images, got {self.count}")
        offset = self.total[at] / self.count
        covariance = -self.count * offset[:, :, None] * offset[:, None, :]
        covariance += self.outer[at]
        covariance /= self.count - 1
        return covariance

    def about(self, shift: F64) -> Moments:
        """The same moments about another point."""
        step = self.shift - shift
        cross = self.total[:, :, None] * step[:, None, :]
        outer = self.outer + cross + cross.transpose(0, 2, 1)
        outer += self.count * step[:, :, None] * step[:, None, :]
        return Moments(count=self.count, shift=shift, total=self.total + self.count * step, outer=outer)


def map_position_blocks(num_positions: int, work: Callable[[slice], None], *, size: int = POSITIONS_PER_BLOCK) -> None:
    """Call ``work`` on blocks of ``size`` positions, on all cores.

    Thousands of small matrices gain nothing from a BLAS that splits each over threads, and lose a hundredfold
    to its locking when the machine is busy; so each block runs with one BLAS thread, blocks side by side.
    """
    blocks = [slice(start, min(start + size, num_positions)) for start in range(0, num_positions, size)]
    workers = min(len(blocks), usable_cpus(), MAX_WORKERS)
    with one_blas_thread():
        if workers < 2:
            for block in blocks:
                work(block)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="statistics") as pool:
            for _ in pool.map(work, blocks):
                pass


def require_finite(embeddings: npt.NDArray[np.floating[Any]]) -> None:
    """Raise NumericalError if an embedding holds NaN or infinite values: a fault is never a pass."""
    if not np.isfinite(embeddings).all():
        raise NumericalError("an embedding holds NaN or infinite values")


def one_blas_thread() -> AbstractContextManager[object]:
    """Many small products gain nothing from a BLAS that splits each over threads, and lose much on a busy machine."""
    controller = _blas_controller()
    return nullcontext() if controller is None else controller.limit(limits=1, user_api="blas")


@functools.cache
def _blas_controller() -> Any:
    # Without it (a bare installation, which fits nothing) BLAS keeps its own threads.
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()
