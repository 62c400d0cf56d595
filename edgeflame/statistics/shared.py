"""Statistics that are shared: the blob that a site sends of its own, and the one that is pooled of all.

Axes: P = grid height x grid width positions, C embedding channels, K rank.

A blob is a canonical safetensors file in one of two forms:

    moments    ``mean [P, C]`` and ``covariance [P, C (C + 1) / 2]`` (its upper triangle, row by row), float32. What
               is pooled of these is what the pooled images would give, to float32's precision.
    low_rank   ``mean [P, C]``, ``basis [P, C, K]`` (float16), ``eigenvalues [P, K]``, ``residual [P]`` and
               ``error [P]``: the Frobenius norm of what the cut to K columns changed the covariance by.

How large an error of a part can be, its spectrum tells without trust in its sender: the C - K eigenvalues that were
cut lie between 0 and the smallest that was kept, and their mean is the residual s2. The sum of the squares of their
deviations from s2 is largest when each is at one end: (C - K) s2 (l_K - s2). Rounding the basis to float16 adds at
most ``ROUNDING`` times the sum of (l_j - s2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgeflame.errors import DataError, NumericalError
from edgeflame.state import atomic_writer
from edgeflame.statistics.moments import POSITIONS_PER_BLOCK, Moments
from edgeflame.tensors import F16, F64, Schema, TensorFile, TensorSpec, TensorWriter

StatisticsForm = Literal["moments", "low_rank"]

METADATA_KEY = "edgeflame.statistics"

ROUNDING = 2 * 2.0**-11 + 2.0**-22
"""An entry of the basis is off by up to 2^-11 of itself, so a column u of unit length by d with |d| <= 2^-11, and uu'
by |du' + ud' + dd'|."""

MAX_SHARED_WEIGHT = 200
"""The most that one site's covariance weighs in a prior, in images."""

MAX_DEVIATION = 3.0
"""Of the logarithms of scores; good parts' vary by some tenths."""
MIN_SPREAD_SITES = 3
"""Of fewer sites a single one could set the median."""

MAX_COUNT = 1_000_000_000
MAX_CELLS = 1 << 20
MAX_CHANNELS = 1 << 14
TOLERANCE = 1e-3
"""Relative tolerance for values that went through float32 and a basis in float16."""


class ScoreDeviation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much the scores of a site's good parts vary, by statistics of its own that had not seen them."""

    deviation: Annotated[float, Meta(ge=0, le=MAX_DEVIATION)]
    """Standard deviation of the scores' logarithms, as measured."""
    num_parts: Annotated[int, Meta(ge=2, le=MAX_COUNT)]
    """Parts behind it."""

    @property
    def unbiased(self) -> float:
        """The deviation of which, of so few parts, half of all sites would measure less (Wilson and Hilferty 1931)."""
        return float(self.deviation / (1 - 2 / (9 * (self.num_parts - 1))) ** 1.5)


def pool_deviations(sites: Sequence[ScoreDeviation]) -> ScoreDeviation | msgspec.UnsetType:
    """The median of the sites', so that no few of them can move everybody's threshold; unset of too few."""
    if len(sites) < MIN_SPREAD_SITES:
        return msgspec.UNSET
    return ScoreDeviation(
        deviation=float(np.median([one.unbiased for one in sites])), num_parts=sum(one.num_parts for one in sites)
    )


class StatisticsHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a blob says of itself."""

    form: StatisticsForm
    grid: tuple[int, int]
    num_channels: int
    rank: int
    """K; 0 for moments."""
    count: int
    """Images behind it."""
    model: str
    """SHA-256 of the model whose embeddings these are: other models have other spaces."""
    sites: dict[str, int] = {}
    """In a pooled blob: whose images are in it, and how many of each."""
    centre: Literal["site"] | msgspec.UnsetType = msgspec.UNSET
    """In a pooled blob: ``site`` where the covariance is of each site's images about their own mean, unset where it is
    about the mean of all."""
    spread: ScoreDeviation | msgspec.UnsetType = msgspec.UNSET
    """How much scores vary; in a pooled blob of :func:`pool_deviations`. Unset where that is not known."""

    def __post_init__(self) -> None:
        height, width = self.grid
        limits = (
            (height >= 1 and width >= 1 and height * width <= MAX_CELLS, "grid", f"{height}x{width}"),
            (1 <= self.num_channels <= MAX_CHANNELS, "number of channels", self.num_channels),
            (0 <= self.rank < self.num_channels, "rank", self.rank),
            (self.form == "low_rank" or self.rank == 0, "rank of moments", self.rank),
            (2 <= self.count <= MAX_COUNT, "number of images", self.count),
        )
        for holds, name, value in limits:
            if not holds:
                raise DataError(f"shared statistics: an impossible {name} ({value})")

    @property
    def num_positions(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def embedding(self) -> str:
        """What must agree for two blobs to be pooled, in words."""
        height, width = self.grid
        return f"{self.num_channels} channels on a grid of {height}x{width}, as {self.form}"

    def schema(self) -> Schema:
        """The tensors of such a blob."""
        p, c, k = self.num_positions, self.num_channels, self.rank
        if self.form == "moments":
            shapes: dict[str, tuple[int, ...]] = {"covariance": (p, c * (c + 1) // 2), "mean": (p, c)}
        else:
            shapes = {"basis": (p, c, k), "eigenvalues": (p, k), "error": (p,), "mean": (p, c), "residual": (p,)}
        return {
            name: TensorSpec(dtype="F16" if name == "basis" else "F32", shape=shape) for name, shape in shapes.items()
        }


@dataclass(frozen=True, kw_only=True)
class StatisticsBlock:
    """Some positions of a blob, in float64.

    Attributes:
        mean: ``[B, C]``.
        covariance: ``[B, C, C]``, with 1/(n - 1), without ridge.
        error: ``[B]`` how far it may be from the images' own covariance by what its makers measured.
        bound: ``[B]`` the same by the spectrum alone. Both are Frobenius norms.
    """

    mean: F64
    covariance: F64
    error: F64
    bound: F64


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """What cutting to a rank did, relative to the Frobenius norm of each position's covariance.

    Mean and maximum over the positions: ``measured`` adds up what the makers of the parts measured, ``bound`` what
    their spectra allow at most. All are 0 for moments.
    """

    measured_mean: float
    measured_max: float
    bound_mean: float
    bound_max: float

    def figures(self) -> dict[str, float]:
        """The four figures by name, for the ledger."""
        return {
            "measured_mean": self.measured_mean,
            "measured_max": self.measured_max,
            "bound_mean": self.bound_mean,
            "bound_max": self.bound_max,
        }


class StatisticsFile:
    """A blob, open for reading; a context manager. :meth:`verify` before anything is believed.

    Raises:
        DataError: not such a blob, or cut short.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = TensorFile(path)
        try:
            self.header = self._read_header(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._tensors.__exit__(None, None, None)

    def mean(self, at: slice) -> F64:
        """``[B, C]`` of some positions."""
        return self._read("mean", at)

    def block(self, at: slice) -> StatisticsBlock:
        """Some positions."""
        size, channels = at.stop - at.start, self.header.num_channels
        mean = self.mean(at)
        if self.header.form == "moments":
            covariance = np.zeros((size, channels, channels))
            rows, columns = np.triu_indices(channels)
            packed = self._read("covariance", at)
            covariance[:, rows, columns] = packed
            covariance[:, columns, rows] = packed
            return StatisticsBlock(mean=mean, covariance=covariance, error=np.zeros(size), bound=np.zeros(size))
        basis, eigenvalues, residual = (self._read(name, at) for name in ("basis", "eigenvalues", "residual"))
        above = eigenvalues - residual[:, None]
        covariance = (basis * above[:, None, :]) @ basis.transpose(0, 2, 1)
        covariance[:, range(channels), range(channels)] += residual[:, None]
        bound = _spectral_bound(eigenvalues, residual, channels)
        return StatisticsBlock(mean=mean, covariance=covariance, error=self._read("error", at), bound=bound)

    def verify(self) -> None:
        """Whether the values can be statistics of images at all.

        Raises:
            NumericalError: values that are not finite, or that no covariance has.
        """
        varies = False
        for at in position_blocks(self.header):
            for name in self.header.schema():
                if not np.isfinite(self._read(name, at)).all():
                    raise NumericalError(f"tensor {name!r} holds NaN or infinite values")
            varies |= self._verify_moments(at) if self.header.form == "moments" else self._verify_low_rank(at)
        if not varies:
            raise NumericalError("nothing varies between the images")

    def _verify_moments(self, at: slice) -> bool:
        covariance = self.block(at).covariance
        diagonal = np.einsum("bii->bi", covariance)
        if (diagonal < 0).any():
            raise NumericalError("a variance is negative")
        mean_variance = diagonal.mean(axis=1)
        # Rounded to float32, a covariance of few images may be a hair off; a forged one is far off.
        slack = TOLERANCE * mean_variance + np.finfo(np.float32).tiny
        try:
            np.linalg.cholesky(covariance + slack[:, None, None] * np.eye(self.header.num_channels))
        except np.linalg.LinAlgError as exc:
            raise NumericalError("a covariance is not positive semi-definite") from exc
        return bool((mean_variance > 0).any())

    def _verify_low_rank(self, at: slice) -> bool:
        basis, eigenvalues, residual, error = (
            self._read(name, at) for name in ("basis", "eigenvalues", "residual", "error")
        )
        if (eigenvalues < 0).any() or (residual < 0).any() or (error < 0).any():
            raise NumericalError("a variance or an error is negative")
        falling = np.concatenate([eigenvalues, residual[:, None]], axis=1)
        if (falling[:, 1:] > falling[:, :-1] * (1 + TOLERANCE)).any():
            raise NumericalError("the eigenvalues do not fall towards the residual variance")
        gram = basis.transpose(0, 2, 1) @ basis
        if (np.abs(gram - np.eye(self.header.rank)) > 0.01).any():
            raise NumericalError("the basis is not orthonormal")
        # In a pooled blob the parts' errors are in it as well, and nothing of it bounds those.
        bound = _spectral_bound(eigenvalues, residual, self.header.num_channels)
        if not self.header.sites and (error > bound + TOLERANCE * (bound + residual)).any():
            raise NumericalError("the truncation error is larger than the eigenvalues allow")
        return bool(falling.any())

    def _read(self, name: str, at: slice) -> F64:
        shape = self._tensors.schema[name].shape[1:]
        row = int(np.prod(shape, dtype=np.int64))
        values = self._tensors.read(name, at.start * row, at.stop * row).astype(np.float64)
        read: F64 = values.reshape(at.stop - at.start, *shape)
        return read

    def _read_header(self, path: Path) -> StatisticsHeader:
        try:
            header = msgspec.json.decode(self._tensors.metadata.get(METADATA_KEY, ""), type=StatisticsHeader)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise DataError(f"{path}: not shared statistics ({exc})") from exc
        found, expected = self._tensors.schema, header.schema()
        if dict(found) != dict(expected):
            raise DataError(f"{path}: its tensors are not those of statistics of {header.embedding}")
        return header


def write_site_statistics(
    path: Path,
    moments: Moments,
    *,
    grid: tuple[int, int],
    model: str,
    form: StatisticsForm,
    rank: int,
    spread: ScoreDeviation | msgspec.UnsetType = msgspec.UNSET,
) -> Truncation:
    """A site's own statistics, whole or not at all.

    Args:
        path: of the blob.
        moments: of its images.
        grid: height and width of the patch grid.
        model: SHA-256 of the model whose embeddings these are.
        form: ``moments`` or ``low_rank``.
        rank: K, for ``low_rank``; lowered to what the images and channels allow.
        spread: how much the scores of its good parts vary, where that is known.

    Raises:
        DataError: fewer than two images.
        StorageError: it cannot be written.
    """
    channels = moments.shift.shape[1]
    rank = 0 if form == "moments" else min(rank, channels - 1, moments.count - 1)
    header = StatisticsHeader(
        form=form,
        grid=grid,
        num_channels=channels,
        rank=rank,
        count=moments.count,
        model=model,
        spread=spread,
    )

    def blocks() -> Iterator[StatisticsBlock]:
        for at in position_blocks(header):
            none = np.zeros(at.stop - at.start)
            yield StatisticsBlock(mean=moments.mean[at], covariance=moments.covariance(at), error=none, bound=none)

    return write_blocks(path, header, blocks())


def header_difference(first: StatisticsHeader, second: StatisticsHeader) -> str | None:
    """Why two blobs cannot be pooled, in words; None if they can."""
    if first.model != second.model:
        return f"they are of the embeddings of model {second.model[:12]}, not of {first.model[:12]}"
    if first.embedding != second.embedding:
        return f"they are of {second.embedding}; the others' are of {first.embedding}"
    return None


def read_moments(path: Path) -> tuple[Moments, StatisticsHeader]:
    """A blob as moments, to go on calculating with: ``P C^2`` numbers in float64.

    Raises:
        DataError, NumericalError: not such a blob, or impossible values.
        StorageError: it cannot be read.
    """
    with StatisticsFile(path) as file:
        file.verify()
        header = file.header
        mean = np.empty((header.num_positions, header.num_channels))
        outer = np.empty((header.num_positions, header.num_channels, header.num_channels))
        for at in position_blocks(header):
            block = file.block(at)
            mean[at], outer[at] = block.mean, block.covariance * (header.count - 1)
    return Moments(count=header.count, shift=mean, total=np.zeros_like(mean), outer=outer), header


def position_blocks(header: StatisticsHeader) -> Iterator[slice]:
    """All positions, ``POSITIONS_PER_BLOCK`` at a time."""
    for start in range(0, header.num_positions, POSITIONS_PER_BLOCK):
        yield slice(start, min(start + POSITIONS_PER_BLOCK, header.num_positions))


def write_blocks(path: Path, header: StatisticsHeader, blocks: Iterable[StatisticsBlock]) -> Truncation:
    """Write a blob from its positions, whole or not at all; those of ``low_rank`` are cut to the header's rank here.

    Raises:
        StorageError: it cannot be written.
    """
    low_rank = header.form == "low_rank"
    rows, columns = np.triu_indices(header.num_channels)
    rest: dict[str, list[F64]] = {name: [] for name in header.schema() if name not in ("basis", "covariance")}
    measured: list[F64] = []
    bounds: list[F64] = []
    with atomic_writer(path) as stream:
        writer = TensorWriter(stream, header.schema(), {METADATA_KEY: msgspec.json.encode(header).decode()})
        # The one large tensor is the first by name; the others fit in memory until it is written.
        for block in blocks:
            error, bound = block.error, block.bound
            if low_rank:
                basis, eigenvalues, residual, own = _truncate(block.covariance, header.rank)
                writer.write(basis)
                error, bound = error + own, bound + own
                for name, values in (("eigenvalues", eigenvalues), ("residual", residual), ("error", error)):
                    rest[name].append(values)
            else:
                writer.write(block.covariance[:, rows, columns].astype(np.float32))
            rest["mean"].append(block.mean)
            norm = np.sqrt(np.square(block.covariance).sum(axis=(1, 2)))
            measured.append(np.divide(error, norm, out=np.zeros_like(error), where=norm > 0))
            bounds.append(np.divide(bound, norm, out=np.zeros_like(bound), where=norm > 0))
        for name in sorted(rest):
            writer.write(np.concatenate(rest[name]).astype(np.float32))
    errors, limits = np.concatenate(measured), np.concatenate(bounds)
    return Truncation(
        measured_mean=float(errors.mean()),
        measured_max=float(errors.max()),
        bound_mean=float(limits.mean()),
        bound_max=float(limits.max()),
    )


def _truncate(covariance: F64, rank: int) -> tuple[F16, F64, F64, F64]:
    """Basis (rounded to float16), eigenvalues, residual and error of the cut."""
    values, vectors = np.linalg.eigh(covariance)  # ascending
    values = np.clip(values[:, ::-1], 0.0, None)
    basis = vectors[:, :, ::-1][:, :, :rank].astype(np.float16)
    eigenvalues, residual = values[:, :rank], values[:, rank:].mean(axis=1)
    deviation = np.sqrt(np.square(values[:, rank:] - residual[:, None]).sum(axis=1))
    error = deviation + ROUNDING * (eigenvalues - residual[:, None]).sum(axis=1)
    return basis, eigenvalues, residual, error


def _spectral_bound(eigenvalues: F64, residual: F64, channels: int) -> F64:
    """The largest error a cut can have made that left these: see the module."""
    num_cut = channels - eigenvalues.shape[1]
    if not eigenvalues.shape[1]:
        # Nothing was kept, so nothing but the trace bounds what was cut: all of it in one direction.
        all_in_one: F64 = np.sqrt(num_cut * (num_cut - 1.0)) * residual
        return all_in_one
    smallest = np.maximum(eigenvalues[:, -1], residual)
    rounding = ROUNDING * (eigenvalues - residual[:, None]).clip(0).sum(axis=1)
    # Neither can more than the trace lie in one direction.
    spread = np.minimum(num_cut * residual * (smallest - residual), num_cut * (num_cut - 1.0) * residual**2)
    bound: F64 = np.sqrt(spread) + rounding
    return bound


def shared_weight(count: int) -> int:
    """What the covariance of a site's ``count`` images weighs in a prior."""
    return min(count - 1, MAX_SHARED_WEIGHT)
