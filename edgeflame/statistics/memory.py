"""Memories of normal patches: the bank that FedDyMem's sites exchange, and a package's statistics made of it.

Axes: N images, P = grid height x grid width positions, C embedding channels, M prototypes.

A bank holds averages of normal patches, what FedDyMem's sites exchange instead of weights. Each may say where in the
picture its patches lie (its place) and how much they differ (its spread). A bank is a canonical safetensors file: the
same bank has the same bytes. It is small (330 kB at 1024 x 152), so it is read whole, after its header has been found
plausible.

As a package's statistics a memory scores a patch by its distance to the nearest prototype. With the transform T (a
site's memory generator after whitening), y = T (x - c), q_m = T (p_m - c), the patch's place r, the prototypes' places
r_m and spreads s_m, and w the position weight::

    distance^2 = min over m of (|y - q_m|^2 + w^2 C |r - r_m|^2) / s_m
               = |y|^2 + min over m of ((1/s_m - 1) |y|^2 - 2 y' q_m / s_m + b_m(r))

a Mahalanobis distance to the nearest prototype, in one product and a minimum; b_m(r) is the same for all pictures.
Without places and spreads, w is 0 and s_m is 1. |y|^2 is added after the minimum, so that a NaN in any channel makes
the distance NaN, whatever a runtime's minimum does with NaNs. The difference cancels: in float32 it is off by about
1e-7 (|y| + |q|)^2, which may be negative where a patch *is* a prototype. Its magnitude is taken then; a clamp would
hide a NaN on some runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame.errors import DataError, NumericalError
from edgeflame.state import atomic_writer
from edgeflame.statistics.moments import require_finite
from edgeflame.tensors import F32, TensorFile, TensorSpec, TensorWriter

METADATA_KEY = "edgeflame.memory"

MAX_PROTOTYPES = 1 << 16
MAX_CHANNELS = 1 << 14

NUMBERS_PER_PROTOTYPE = 6
"""In a bank, beside its channels: weight, two effective counts, place and spread."""

NUMBERS_MEASURED = 2
"""In a site's bank, for each of the fleet's prototypes: patches and their spread."""

SUM_TOLERANCE = 1e-3
"""How far the weights' sum may be from 1: they are float32."""


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
    space: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


@dataclass(frozen=True, kw_only=True)
class MemoryBank:
    """Prototypes of normal patches; none of them is a patch.

    Attributes:
        prototypes: ``[M, C]`` float32, weighted averages of embeddings of the frozen backbone.
        weights: ``[M]`` float32, the share of all patches that each stands for; they sum to 1.
        effective_patches: ``[M]`` float32, 1 / sum of w^2 over the patches' weights in the average: how many equally
            weighted patches it is worth.
        effective_images: ``[M]`` float32, the same over the images the patches are from.
        count: number of images behind the bank; 0 if it is empty.
        space: SHA-256 of what made the embeddings; other backbones have other spaces.
        places: ``[M, 2]`` float32, the mean row and column of the patches of each, as shares of the picture's height
            and width; None if it carries none.
        spreads: ``[M]`` float32, the mean squared distance of each one's patches to it, over that of all patches to
            theirs; there if and only if ``places`` are.
        measured: ``[B, 2]`` float32. In what a site sends, of each of the B prototypes of the memory that the round
            began with: how many of the site's patches are nearest to it, and their spread about it; 0 and 1 where they
            are too few to be told. In the fleet's memory, of its own M prototypes by all sites. None: not measured;
            it takes places.

    Raises:
        DataError: shapes that do not fit one another, a sum of weights that is not 1, or places outside the picture.
        NumericalError: values that are not finite, or not positive where they must be.
    """

    prototypes: F32
    weights: F32
    effective_patches: F32
    effective_images: F32
    count: int
    space: str
    places: F32 | None = None
    spreads: F32 | None = None
    measured: F32 | None = None

    def __post_init__(self) -> None:
        size = len(self.prototypes)
        if self.prototypes.ndim != 2 or not 1 <= self.num_channels <= MAX_CHANNELS or size > MAX_PROTOTYPES:
            raise DataError(f"memory bank: impossible prototypes {list(self.prototypes.shape)}")
        for name in ("weights", "effective_patches", "effective_images"):
            values = getattr(self, name)
            if values.shape != (size,):
                raise DataError(f"memory bank: {name} should be [{size}], is {list(values.shape)}")
            if not (np.isfinite(values) & (values > 0)).all():
                raise NumericalError(f"memory bank: {name} must be finite and above 0")
        if not np.isfinite(self.prototypes).all():
            raise NumericalError("memory bank: the prototypes hold NaN or infinite values")
        _check_places("memory bank", size, self.places, self.spreads)
        if self.measured is not None:
            _check_measured(self.measured, has_places=self.places is not None)
        if (size > 0) != (self.count > 0):
            raise DataError(f"memory bank: {size} prototypes of {self.count} images")
        if size and abs(float(self.weights.sum(dtype=np.float64)) - 1) > SUM_TOLERANCE:
            raise DataError(f"memory bank: the weights sum to {self.weights.sum():g}, not to 1")

    def __len__(self) -> int:
        return len(self.prototypes)

    @property
    def num_channels(self) -> int:
        return int(self.prototypes.shape[-1])


def empty_bank(num_channels: int, space: str) -> MemoryBank:
    """What a run starts from."""
    none = np.zeros(0, dtype=np.float32)
    return MemoryBank(
        prototypes=np.zeros((0, num_channels), dtype=np.float32),
        weights=none,
        effective_patches=none,
        effective_images=none,
        count=0,
        space=space,
    )


def write_bank(path: Path, bank: MemoryBank) -> None:
    """Write a bank, whole or not at all.

    Prototypes with places are rounded to float16, 1/2000 of their value, which is far below their spreads; where
    float16 cannot hold them they stay float32.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = _tensors(bank)
    schema = {
        name: TensorSpec(dtype="F16" if values.dtype == np.float16 else "F32", shape=values.shape)
        for name, values in tensors.items()
    }
    header = msgspec.json.encode(_Header(count=bank.count, space=bank.space)).decode()
    with atomic_writer(path) as stream:
        writer = TensorWriter(stream, schema, {METADATA_KEY: header})
        for name in sorted(tensors):
            writer.write(tensors[name])


def read_bank(path: Path) -> MemoryBank:
    """Read a bank, from whomever it came.

    Raises:
        DataError: not a bank, cut short, or of impossible shape.
        NumericalError: impossible values.
        StorageError: the file cannot be read.
    """
    with TensorFile(path) as file:
        try:
            header = msgspec.json.decode(file.metadata.get(METADATA_KEY, ""), type=_Header)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise DataError(f"{path}: not a memory bank ({exc})") from exc
        expected = dict(_PLAIN_TENSORS)
        if _PLACED_TENSORS.keys() & file.schema.keys():
            expected |= _PLACED_TENSORS
            if _MEASURED in file.schema:
                expected[_MEASURED] = 2
        kinds = {name: {"F32", "F16"} if name == "prototypes" and len(expected) > len(_PLAIN_TENSORS) else {"F32"}
                 for name in expected}  # fmt: skip
        found = {name: len(spec.shape) for name, spec in file.schema.items() if spec.dtype in kinds.get(name, ())}
        if found != expected or len(file.schema) != len(expected):
            raise DataError(f"{path}: not a memory bank (its tensors are {', '.join(sorted(file.schema))[:200]})")
        # Shapes are checked against the file's size when it is opened, so nothing larger than it is allocated.
        tensors = {name: file.read(name).astype(np.float32).reshape(file.schema[name].shape) for name in expected}
    return MemoryBank(count=header.count, space=header.space, **tensors)


_PLAIN_TENSORS = {"prototypes": 2, "weights": 1, "effective_patches": 1, "effective_images": 1}
_PLACED_TENSORS = {"places": 2, "spreads": 1}
_MEASURED = "measured"
"""Dimensions of a bank's tensors, by name. Banks of earlier versions have no places and no spreads, or measure none."""


def _tensors(bank: MemoryBank) -> dict[str, npt.NDArray[np.floating]]:
    names = (
        *_PLAIN_TENSORS,
        *(() if bank.places is None else _PLACED_TENSORS),
        *(() if bank.measured is None else (_MEASURED,)),
    )
    tensors: dict[str, npt.NDArray[np.floating]] = {
        name: np.ascontiguousarray(getattr(bank, name), dtype=np.float32) for name in names
    }
    if bank.places is not None and np.abs(bank.prototypes).max(initial=0) < np.finfo(np.float16).max:
        tensors["prototypes"] = tensors["prototypes"].astype(np.float16)
    return tensors


def _check_places(what: str, size: int, places: F32 | None, spreads: F32 | None) -> None:
    """Places and spreads of ``size`` prototypes: both or neither, and possible values."""
    if places is None or spreads is None:
        if places is not None or spreads is not None:
            raise DataError(f"{what}: places and spreads come together")
        return
    for name, values, shape in (("places", places, (size, 2)), ("spreads", spreads, (size,))):
        if values.shape != shape:
            raise DataError(f"{what}: {name} should be {list(shape)}, is {list(values.shape)}")
        if not np.isfinite(values).all():
            raise NumericalError(f"{what}: {name} hold NaN or infinite values")
    if not ((places >= 0) & (places <= 1)).all():
        raise DataError(f"{what}: places lie outside the picture")
    if not (spreads > 0).all():
        raise NumericalError(f"{what}: spreads must be above 0")


def _check_measured(measured: F32, *, has_places: bool) -> None:
    if not has_places:
        raise DataError("memory bank: spreads are measured of prototypes with places")
    if measured.ndim != 2 or measured.shape[1] != NUMBERS_MEASURED or len(measured) > MAX_PROTOTYPES:
        raise DataError(f"memory bank: measured should be [B, {NUMBERS_MEASURED}], is {list(measured.shape)}")
    if not (np.isfinite(measured).all() and (measured[:, 0] >= 0).all() and (measured[:, 1] > 0).all()):
        raise NumericalError("memory bank: measured holds what is no number of patches, or no spread")


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """Prototypes and the metric that they are compared in.

    Attributes:
        grid: height and width of the patch grid; P is their product.
        count: number of images behind it.
        prototypes: ``[M, C]`` float32.
        transform: ``[C, C]`` float32.
        centre: ``[C]`` float32; subtracted first, so that float32 suffices.
        num_global: how many of the prototypes, the last ones, are the fleet's; the others are the site's own.
        places: ``[M, 2]`` float32, row and column of each prototype as shares of the picture's height and width; None
            where position counts for nothing.
        spreads: ``[M]`` float32, what squared distances to each are divided by; there if and only if ``places`` are.
        position_weight: w above.
    """

    grid: tuple[int, int]
    count: int
    prototypes: F32
    transform: F32
    centre: F32
    num_global: int = 0
    places: F32 | None = None
    spreads: F32 | None = None
    position_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.prototypes.ndim != 2 or not 1 <= len(self.prototypes) <= MAX_PROTOTYPES:
            raise DataError(f"memory: impossible prototypes {list(self.prototypes.shape)}")
        channels = self.num_channels
        for name, shape in {"transform": (channels, channels), "centre": (channels,)}.items():
            if getattr(self, name).shape != shape:
                raise DataError(f"memory: {name} should be {list(shape)}, is {list(getattr(self, name).shape)}")
        if min(self.grid) < 1 or self.count < 1 or not 0 <= self.num_global <= len(self.prototypes):
            raise DataError(
                f"memory: impossible grid {self.grid}, count {self.count} or global prototypes {self.num_global}"
            )
        _check_places("memory", len(self.prototypes), self.places, self.spreads)
        if not 0 <= self.position_weight < np.inf or (self.places is None and self.position_weight > 0):
            raise DataError(f"memory: impossible position weight {self.position_weight:g}")
        for name in ("prototypes", "transform", "centre"):
            if not np.isfinite(getattr(self, name)).all():
                raise NumericalError(f"memory: {name} holds NaN or infinite values")
        if not self.transform.any():
            # All distances would be zero: everything would pass.
            raise NumericalError("memory: the transform is zero")

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

    def scales(self) -> npt.NDArray[np.float64]:
        """1/s: what squared distances to each prototype are multiplied by, ``[M]``."""
        return np.ones(len(self.prototypes)) if self.spreads is None else 1 / self.spreads.astype(np.float64)

    def place_terms(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """b, in two factors, so that a graph need not hold all of it: ``[P, 4] @ [4, M]`` is ``[P, M]``.

        b_m(r) = (|q_m|^2 + w^2 C |r - r_m|^2) / s_m, with columns 1, row, column and |r|^2 of each position.
        """
        strength = self.position_weight**2 * self.num_channels
        places = np.zeros((len(self.prototypes), 2)) if self.places is None else self.places.astype(np.float64)
        at = grid_places(self.grid).astype(np.float64)
        columns = np.column_stack([np.ones(len(at)), at, np.square(at).sum(axis=1)])
        norms = np.square(self.projected()).sum(axis=1)
        rows = np.stack(
            [
                norms + strength * np.square(places).sum(axis=1),
                *(-2 * strength * places.T),
                np.full(len(places), strength),
            ]
        )
        return columns, rows * self.scales()

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
        scales = self.scales()
        columns, rows = self.place_terms()
        terms = (columns @ rows).astype(dtype)  # [P, M]
        # The last row is for |y|^2, which is appended to y.
        factors = np.vstack([-2 * self.projected().T * scales, scales - 1]).astype(dtype)
        transform, centre = self.transform.T.astype(dtype), self.centre.astype(dtype)
        squared = np.empty(embeddings.shape[:2], dtype=dtype)
        for index, image in enumerate(embeddings):
            own = (image - centre) @ transform  # [P, C]
            norms = np.square(own).sum(axis=1)
            squared[index] = (np.column_stack([own, norms]) @ factors + terms).min(axis=1) + norms
        distances: npt.NDArray[np.floating] = np.sqrt(np.abs(squared))
        return distances


def grid_places(grid: tuple[int, int]) -> F32:
    """Row and column of every position of a grid, as shares of its height and width: ``[P, 2]``, row by row."""
    rows, columns = ((np.arange(size, dtype=np.float32) + 0.5) / np.float32(size) for size in grid)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
