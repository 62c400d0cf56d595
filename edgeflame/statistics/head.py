"""A head that knows marked defects: from an image's embeddings to a factor for all of its distances.

Axes: N images, P = grid height x grid width positions, Q cells of ``pool`` x ``pool`` positions each, C embedding
channels, H hidden units::

    cell    = mean of the embeddings of its positions                                   [N, Q, C]
    hidden  = max(0, cell @ weights + bias)        the bias is each cell's own          [N, Q, H]
    logit   = hidden @ out                                                              [N, Q]
    factor  = exp(clip(mean of the ``top`` largest logits + offset, -LIMIT, LIMIT))     [N]

Distances, map and score of an image are multiplied by its factor: above 1 it looks more like what was marked as bad
than good parts do, below 1 less. Without marks there is no head, and the factor is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from edgeflame.errors import DataError, NumericalError
from edgeflame.tensors import F32, decoding

LIMIT = 1.5
"""Bound of the factor's logarithm: no head can make a score more than 4.5 times as large, or as small."""

SPACE_KEY = "space"
"""In the metadata of a head that travels: SHA-256 of what decides on the embeddings."""

MARKED_BAD, MARKS_LEFT_OUT, HEAD_WEIGHT, NO_HEAD = "num_marked_bad", "num_marks_left_out", "head_weight", "no_head"
"""Names of figures that sites report: photographs marked bad and used, marks that were not, with what weight the
fleet's head counts at the site (0: not at all), and why it does not."""

MAX_HIDDEN = 64
MAX_POOL = 8
_KEY = "defect_head"


@dataclass(frozen=True, kw_only=True)
class DefectHead:
    """A head, as the module's text describes it.

    Attributes:
        grid: height and width of the patch grid; multiples of ``pool``.
        pool: positions of a cell along each axis.
        top: how many of the largest logits are averaged.
        weights: ``[C, H]`` float32.
        bias: ``[Q, H]`` float32, cells row by row.
        out: ``[H]`` float32.
        offset: added to the mean logit.
    """

    grid: tuple[int, int]
    pool: int
    top: int
    weights: F32
    bias: F32
    out: F32
    offset: float

    def __post_init__(self) -> None:
        channels, hidden = self.weights.shape
        if not (1 <= self.pool <= MAX_POOL and all(side > 0 and side % self.pool == 0 for side in self.grid)):
            raise DataError(f"head: cells of {self.pool} positions do not divide a grid of {list(self.grid)}")
        cells = self.num_cells
        if not (1 <= hidden <= MAX_HIDDEN and self.bias.shape == (cells, hidden) and self.out.shape == (hidden,)):
            raise DataError(
                f"head: weights {[channels, hidden]}, bias {list(self.bias.shape)}, out {list(self.out.shape)} for "
                f"{cells} cells do not go together"
            )
        if not 1 <= self.top <= cells:
            raise DataError(f"head: the {self.top} largest of {cells} logits")
        if not all(np.isfinite(one).all() for one in (self.weights, self.bias, self.out, self.offset)):
            raise NumericalError("head: it holds NaN or infinite values")

    @property
    def num_channels(self) -> int:
        return int(self.weights.shape[0])

    @property
    def num_cells(self) -> int:
        """Q."""
        return (self.grid[0] // self.pool) * (self.grid[1] // self.pool)

    def log_factors(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Logarithms ``[N]`` of the factors of embeddings ``[N, P, C]``, of the same type."""
        return self.log_factors_of_cells(pooled_cells(embeddings, grid=self.grid, pool=self.pool))

    def log_factors_of_cells(self, cells: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Logarithms ``[N]`` of the factors of cells ``[N, Q, C]``, of the same type."""
        dtype = cells.dtype
        hidden = np.maximum(cells @ self.weights.astype(dtype) + self.bias.astype(dtype), 0)
        logits = hidden @ self.out.astype(dtype)
        logs: npt.NDArray[np.floating] = np.clip(
            top_mean(logits, self.top) + np.asarray(self.offset, dtype), -LIMIT, LIMIT
        )
        return logs


def pooled_cells(embeddings: npt.NDArray[np.floating], *, grid: tuple[int, int], pool: int) -> npt.NDArray[np.floating]:
    """Means ``[N, Q, C]`` over cells of ``pool`` x ``pool`` of the positions of ``[N, P, C]``."""
    height, width = grid[0] // pool, grid[1] // pool
    num_images, _, channels = embeddings.shape
    blocks = embeddings.reshape(num_images, height, pool, width, pool, channels)
    means: npt.NDArray[np.floating] = blocks.mean(axis=(2, 4)).reshape(num_images, height * width, channels)
    return means


def top_mean(logits: npt.NDArray[np.floating], top: int) -> npt.NDArray[np.floating]:
    """The mean of the ``top`` largest of each row: ``[N, Q]`` to ``[N]``."""
    largest = np.partition(logits, logits.shape[1] - top, axis=1)[:, logits.shape[1] - top :]
    means: npt.NDArray[np.floating] = largest.mean(axis=1)
    return means


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    grid: tuple[int, int]
    pool: int
    top: int
    offset: float


def max_head_bytes(num_positions: int, num_channels: int) -> int:
    """The size of the largest file of a head for so many positions and channels."""
    return 4 * MAX_HIDDEN * (num_positions + num_channels + 1) + (64 << 10)


def encode_head(head: DefectHead) -> bytes:
    """A head as safetensors."""
    header = _Header(grid=head.grid, pool=head.pool, top=head.top, offset=head.offset)
    tensors = {name: np.ascontiguousarray(getattr(head, name)) for name in ("weights", "bias", "out")}
    return safetensors.numpy.save(tensors, metadata={_KEY: msgspec.json.encode(header).decode()})


def decode_head(data: bytes) -> DefectHead:
    """Read what :func:`encode_head` wrote.

    Raises:
        DataError: no head, cut short, or of impossible shape.
        NumericalError: values that cannot be.
    """
    with decoding("a head"):
        described = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header = msgspec.json.decode(described["__metadata__"][_KEY], type=_Header)
        tensors = safetensors.numpy.load(data)
        if {array.dtype for array in tensors.values()} != {np.dtype(np.float32)}:
            raise DataError("not a head (values of another type than float32)")
        return DefectHead(
            grid=header.grid,
            pool=header.pool,
            top=header.top,
            offset=header.offset,
            weights=tensors["weights"],
            bias=tensors["bias"],
            out=tensors["out"],
        )
