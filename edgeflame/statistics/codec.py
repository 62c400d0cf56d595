"""A package's statistics as bytes, Gaussian or a memory, as safetensors; which, its one metadata key says."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from edgeflame.errors import DataError
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.statistics.memory import MemoryStatistics
from edgeflame.tensors import decoding

PackageStatistics = LowRankGaussian | MemoryStatistics
"""What a package may score with."""

_GAUSSIAN, _MEMORY = "low_rank_gaussian", "memory"
_DTYPES = {"F32", "F16"}
"""What :func:`encode_statistics` writes."""


class _GaussianHeader(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    ridge: float
    grid: tuple[int, int]


class _MemoryHeader(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    num_global: int
    grid: tuple[int, int]
    position_weight: float = 0.0


def encode_statistics(statistics: PackageStatistics) -> bytes:
    """Statistics as safetensors; a Gaussian's basis in float16, which :meth:`LowRankGaussian.distances` tolerates."""
    tensors: dict[str, npt.NDArray[Any]]
    header: _GaussianHeader | _MemoryHeader
    if isinstance(statistics, LowRankGaussian):
        kind = _GAUSSIAN
        header = _GaussianHeader(count=statistics.count, ridge=statistics.ridge, grid=statistics.grid)
        tensors = {
            "mean": statistics.mean,
            "basis": statistics.basis.astype(np.float16),
            "eigenvalues": statistics.eigenvalues,
            "residual": statistics.residual,
        }
    else:
        kind = _MEMORY
        header = _MemoryHeader(
            count=statistics.count,
            num_global=statistics.num_global,
            grid=statistics.grid,
            position_weight=statistics.position_weight,
        )
        names = ("prototypes", "transform", "centre", *(() if statistics.places is None else ("places", "spreads")))
        tensors = {name: getattr(statistics, name) for name in names}
    # safetensors writes the memory of an array as it lies there, strides or not.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    # One entry only: safetensors writes several in no fixed order, and the same model must give the same bytes.
    return safetensors.numpy.save(tensors, metadata={kind: msgspec.json.encode(header).decode()})


def decode_statistics(data: bytes) -> PackageStatistics:
    """Read what :func:`encode_statistics` wrote.

    Raises:
        DataError: not statistics, cut short, or of impossible shape.
        NumericalError: values that cannot be.
    """
    with decoding("a package's statistics"):
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.pop("__metadata__")
        kinds = {tensor["dtype"] for tensor in header.values()}
        if not kinds <= _DTYPES:
            # Of bytes, float32 would take four times the memory.
            raise DataError(f"not a package's statistics (values of {', '.join(sorted(kinds))})")
        tensors = {name: array.astype(np.float32) for name, array in safetensors.numpy.load(data).items()}
        if _MEMORY in metadata:
            memory = msgspec.json.decode(metadata[_MEMORY], type=_MemoryHeader)
            return MemoryStatistics(
                grid=memory.grid,
                count=memory.count,
                num_global=memory.num_global,
                prototypes=tensors["prototypes"],
                transform=tensors["transform"],
                centre=tensors["centre"],
                # Memories of earlier versions have neither.
                places=tensors.get("places"),
                spreads=tensors.get("spreads"),
                position_weight=memory.position_weight,
            )
        gaussian = msgspec.json.decode(metadata[_GAUSSIAN], type=_GaussianHeader)
        return LowRankGaussian(
            grid=gaussian.grid,
            count=gaussian.count,
            ridge=gaussian.ridge,
            mean=tensors["mean"],
            basis=tensors["basis"],
            eigenvalues=tensors["eigenvalues"],
            residual=tensors["residual"],
        )
