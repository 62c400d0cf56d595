"""What sites and aggregator exchange in a round: model weights, memories of prototypes (FedDyMem), or heads.

An :class:`Exchange` says what is particular about one kind of update at the aggregator: how large it may be, how it is
checked, and how far the result has moved. How updates are combined is decided by a strategy
(:mod:`aggregator.strategies`); everything else treats an update as a file. ``EXCHANGES`` has one for each
:data:`edgeflame.methods.ExchangeKind`; another kind of update is another class here.

Weights are read tensor by tensor, in blocks: the memory needed does not grow with the size of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeflame.errors import DataError, NumericalError
from edgeflame.methods import ExchangeKind, Learning
from edgeflame.mqtt.messages import RefusalReason
from edgeflame.statistics.head import SPACE_KEY
from edgeflame.statistics.memory import MAX_CHANNELS, NUMBERS_MEASURED, NUMBERS_PER_PROTOTYPE, read_bank
from edgeflame.tensors import TensorFile, schema_difference

COUNT_TOLERANCE = 1e-4
"""Relative tolerance of effective counts, which travel as float32."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Whether an upload counts.

    Attributes:
        reason: why it does not; None if it does.
        detail: the reason in words.
        relative_change: the distance to the base model over the base model's norm.
        decoded: SHA-256 of the decoded update in the store, if it came encoded.
    """

    reason: RefusalReason | None = None
    detail: str = ""
    relative_change: float = 0.0
    decoded: str | None = None

    @property
    def is_valid(self) -> bool:
        return self.reason is None


class UpdateBounds(Protocol):
    """What limits an update; see :class:`aggregator.config.AggregateConfig`."""

    @property
    def max_relative_change(self) -> float: ...

    @property
    def learning(self) -> Learning: ...


class Exchange(Protocol):
    """One kind of update, at the aggregator."""

    compressible: bool
    """Whether sites may send updates in another codec than ``raw``."""
    has_statistics_phase: bool
    """Whether the statistics of all sites may be pooled after the last round."""

    def max_update_bytes(self, initial_bytes: int, learning: Learning) -> int:
        """The largest expected size of an update; ``initial_bytes`` is the size of the initial model or memory."""
        ...

    def validate_initial(self, path: Path) -> ValidationResult:
        """Whether a run can start from a file."""
        ...

    def validate_update(self, path: Path, base: Path, *, num_samples: int, bounds: UpdateBounds) -> ValidationResult:
        """Whether a site's update, in codec ``raw``, can be aggregated.

        Args:
            path: the update.
            base: the model or memory that the round started from.
            num_samples: images that the site says it has.
            bounds: the run's limits.
        """
        ...

    def relative_change(self, base: Path, result: Path) -> float | None:
        """How far a round has moved what it started from, in units of its size; None if that is not defined."""
        ...


class WeightsExchange:
    """Sites send models, in safetensors: the same tensors as the base model's, with other values."""

    compressible = True
    has_statistics_phase = True

    def max_update_bytes(self, initial_bytes: int, learning: Learning) -> int:
        del learning
        return initial_bytes

    def validate_initial(self, path: Path) -> ValidationResult:
        """A file of tensors that are all finite."""
        try:
            with TensorFile(path) as model:
                for name, spec in model.schema.items():
                    for block in model.blocks(name):
                        if spec.is_float and not np.isfinite(block).all():
                            return _not_finite(name)
        except DataError as exc:
            return _unreadable(exc, path)
        return ValidationResult()

    def validate_update(self, path: Path, base: Path, *, num_samples: int, bounds: UpdateBounds) -> ValidationResult:
        del num_samples
        return validate_weights(path, base, max_relative_change=bounds.max_relative_change)

    def relative_change(self, base: Path, result: Path) -> float | None:
        """The distance over the base model's norm; None if their tensors differ in kind."""
        compared = validate_weights(result, base, max_relative_change=math.inf)
        return compared.relative_change if compared.is_valid else None


def validate_weights(path: Path, base: Path, *, max_relative_change: float) -> ValidationResult:
    """Whether a model fits its base model: the same schema, finite, and not further away than allowed."""
    try:
        with TensorFile(base) as before, TensorFile(path) as after:
            if difference := schema_difference(before.schema, after.schema):
                return ValidationResult(reason="schema", detail=difference)
            change = norm = 0.0
            for name, spec in after.schema.items():
                if not spec.is_float:
                    continue
                for old, new in zip(before.blocks(name), after.blocks(name), strict=True):
                    values = new.astype(np.float64)
                    if not np.isfinite(values).all():
                        return _not_finite(name)
                    if name.endswith(".running_var") and (values < 0).any():
                        # Its root is taken: every score of the model would be NaN.
                        return ValidationResult(
                            reason="schema", detail=f"tensor {name!r}, a variance, holds negative values"
                        )
                    reference = old.astype(np.float64)
                    norm += float(np.dot(reference, reference))
                    values -= reference
                    # Near the top of float64 the square overflows to infinity, which is beyond any bound.
                    with np.errstate(over="ignore"):
                        change += float(np.dot(values, values))
    except DataError as exc:
        return _unreadable(exc, path)
    # A base of zeros has no scale of its own; then the bound is absolute.
    relative = math.sqrt(change) / (math.sqrt(norm) or 1.0)
    if not relative <= max_relative_change:
        detail = f"{relative:.3g} times the base model's norm away from it; {max_relative_change:g} is allowed"
        return ValidationResult(reason="norm", detail=detail, relative_change=relative)
    return ValidationResult(relative_change=relative)


class HeadExchange(WeightsExchange):
    """Sites send heads for marked defects: few tensors, that must be of the same embeddings."""

    def validate_update(self, path: Path, base: Path, *, num_samples: int, bounds: UpdateBounds) -> ValidationResult:
        try:
            with TensorFile(base) as before, TensorFile(path) as after:
                wanted, found = (one.metadata.get(SPACE_KEY, "") for one in (before, after))
        except DataError as exc:
            return _unreadable(exc, path)
        if found != wanted:
            detail = f"a head of the embeddings {found[:12]}; this run's are {wanted[:12]}: another backbone?"
            return ValidationResult(reason="space", detail=detail)
        return super().validate_update(path, base, num_samples=num_samples, bounds=bounds)


class MemoryExchange:
    """Sites send memory banks (:mod:`edgeflame.statistics.memory`), and no weights."""

    # A memory is small already, and pools what the statistics phase would pool.
    compressible = False
    has_statistics_phase = False

    def max_update_bytes(self, initial_bytes: int, learning: Learning) -> int:
        """From the number of prototypes: a run starts from an empty memory, whose size tells nothing."""
        del initial_bytes
        memory = learning.memory
        size = memory.prototypes * 4 * (MAX_CHANNELS + NUMBERS_PER_PROTOTYPE)
        return size + (memory.global_prototypes * 4 * NUMBERS_MEASURED if memory.measure_spreads else 0)

    def validate_initial(self, path: Path) -> ValidationResult:
        """A memory bank, and an empty one, since no site has learnt yet."""
        try:
            bank = read_bank(path)
        except (DataError, NumericalError) as exc:
            return _unreadable(exc, path)
        if len(bank):
            detail = f"an initial memory is empty; this one has {len(bank)} prototypes"
            return ValidationResult(reason="schema", detail=detail)
        return ValidationResult()

    def validate_update(self, path: Path, base: Path, *, num_samples: int, bounds: UpdateBounds) -> ValidationResult:
        """A memory of the run's embeddings, within bounds and above the privacy floor."""
        try:
            bank = read_bank(path)
        except (DataError, NumericalError) as exc:
            return _unreadable(exc, path)
        before, settings = read_bank(base), bounds.learning.memory
        if bank.space != before.space:
            detail = (
                f"a memory of the embeddings {bank.space[:12]}; this run's are {before.space[:12]}: another backbone?"
            )
            return ValidationResult(reason="space", detail=detail)
        if bank.num_channels != before.num_channels or not 1 <= len(bank) <= settings.prototypes:
            detail = (
                f"{len(bank)} prototypes of {bank.num_channels} channels; expected 1 to {settings.prototypes} of "
                f"{before.num_channels}"
            )
            return ValidationResult(reason="schema", detail=detail)
        if bank.count != num_samples:
            detail = f"a memory of {bank.count} images; {num_samples} were offered"
            return ValidationResult(reason="samples", detail=detail)
        for name, values, least in (
            ("patches", bank.effective_patches, settings.min_group),
            ("images", bank.effective_images, settings.min_images),
        ):
            if float(values.min()) < least * (1 - COUNT_TOLERANCE):
                detail = f"a prototype is worth {values.min():.3g} {name}; the privacy floor is {least:g}"
                return ValidationResult(reason="floor", detail=detail)
        if bank.measured is not None and len(bank.measured) != len(before):
            detail = f"spreads measured of {len(bank.measured)} prototypes; the round began with {len(before)}"
            return ValidationResult(reason="schema", detail=detail)
        if not len(before):
            return ValidationResult()
        size, reference = (
            float(np.sqrt(np.square(one.prototypes.astype(np.float64)).mean())) for one in (bank, before)
        )
        most = 1 + bounds.max_relative_change
        if not size <= most * reference:
            detail = f"prototypes {size / reference:.3g} times as long as the fleet's; {most:g} are allowed"
            return ValidationResult(reason="norm", detail=detail)
        return ValidationResult()

    def relative_change(self, base: Path, result: Path) -> float | None:
        """How far the prototypes are from the nearest of the base, root mean square, in units of the root mean square
        distance of the base's prototypes from their mean; None where the base has fewer than two.
        """
        old, new = read_bank(base), read_bank(result)
        if len(old) < 2:
            return None
        before, after = old.prototypes.astype(np.float64), new.prototypes.astype(np.float64)
        centre = before.mean(axis=0)
        before, after = before - centre, after - centre
        spread = float(np.square(before).sum(axis=1).mean())
        squared = np.square(after).sum(axis=1)[:, None] + np.square(before).sum(axis=1) - 2 * after @ before.T
        nearest = np.clip(squared, 0, None).min(axis=1)
        return float(np.sqrt(new.weights.astype(np.float64) @ nearest / spread)) if spread > 0 else None


def message_without_path(error: DataError | NumericalError, path: Path) -> str:
    """What is wrong with a file, for the site to read, without where the aggregator keeps it."""
    return str(error).removeprefix(f"{path}: ")


def _not_finite(tensor: str) -> ValidationResult:
    return ValidationResult(reason="not_finite", detail=f"tensor {tensor!r} holds NaN or infinite values")


def _unreadable(error: DataError | NumericalError, path: Path) -> ValidationResult:
    reason: RefusalReason = "not_finite" if isinstance(error, NumericalError) else "not_tensors"
    return ValidationResult(reason=reason, detail=message_without_path(error, path))


WEIGHTS: Exchange = WeightsExchange()
MEMORY: Exchange = MemoryExchange()
HEAD: Exchange = HeadExchange()

EXCHANGES: dict[ExchangeKind, Exchange] = {
    "weights": WEIGHTS,
    # SCAFFOLD's control variates are tensors that travel with the model.
    "controls": WEIGHTS,
    "memory": MEMORY,
    "head": HEAD,
}
