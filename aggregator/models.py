"""Work on model files: is an update fit to count, and the aggregation of those that are.

Everything is read tensor by tensor, in blocks, from blobs on disk: memory does not depend on the number of sites,
and only as far as one block's on the size of the model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.strategies import Strategy
from edgeflame.errors import DataError
from edgeflame.messages import Reason
from edgeflame.statedir import storage_errors
from edgeflame.tensors import DTYPES, F64, Array, TensorFile, TensorSpec, TensorWriter, block_ranges, schema_difference


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a model counts.

    Attributes:
        reason: why not; None if it does.
        detail: the reason in words.
        relative_change: the distance to the base model over the base model's norm.
    """

    reason: Reason | None = None
    detail: str = ""
    relative_change: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """An accepted update. ``weight`` is its share of the round; a round's sum to 1."""

    site: str
    path: Path
    weight: float


def check_initial(path: Path) -> Verdict:
    """Whether a file can start a run: tensors, finite."""
    try:
        with TensorFile(path) as model:
            for name, spec in model.schema.items():
                for block in model.blocks(name):
                    if spec.is_float and not np.isfinite(block).all():
                        return Verdict(reason="not_finite", detail=f"tensor {name!r} holds NaN or infinite values")
    except DataError as exc:
        return Verdict(reason="not_tensors", detail=_without_path(exc, path))
    return Verdict()


def check_update(path: Path, base: Path, *, max_relative_change: float) -> Verdict:
    """Whether an update fits its base model: schema, finite, not further away than allowed."""
    try:
        with TensorFile(base) as before, TensorFile(path) as after:
            if difference := schema_difference(before.schema, after.schema):
                return Verdict(reason="schema", detail=difference)
            change = norm = 0.0
            for name, spec in after.schema.items():
                if not spec.is_float:
                    continue
                for old, new in zip(before.blocks(name), after.blocks(name), strict=True):
                    values = new.astype(np.float64)
                    if not np.isfinite(values).all():
                        return Verdict(reason="not_finite", detail=f"tensor {name!r} holds NaN or infinite values")
                    reference = old.astype(np.float64)
                    norm += float(np.dot(reference, reference))
                    values -= reference
                    # Near the top of float64 the square overflows to infinity, which is beyond any bound.
                    with np.errstate(over="ignore"):
                        change += float(np.dot(values, values))
    except DataError as exc:
        return Verdict(reason="not_tensors", detail=_without_path(exc, path))
    # A base of zeros has no scale of its own; then the bound is absolute.
    relative = math.sqrt(change) / (math.sqrt(norm) or 1.0)
    if not relative <= max_relative_change:
        detail = f"{relative:.3g} times the base model's norm away from it; {max_relative_change:g} is allowed"
        return Verdict(reason="norm", detail=detail, relative_change=relative)
    return Verdict(relative_change=relative)


def merge(strategy: Strategy, base: Path, contributions: Sequence[Contribution], out: Path) -> None:
    """Write the next global model, in canonical form and with the base's metadata, durably.

    The result depends on the set of contributions alone: sites are taken in sorted order, whatever theirs is here.

    Raises:
        DataError, StorageError: a blob on disk is not what was checked, or the disk fails.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.site)
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(TensorFile(base))
        updates = [(c.weight, stack.enter_context(TensorFile(c.path))) for c in ordered]
        stack.enter_context(storage_errors(out, "write"))
        stream = stack.enter_context(out.open("wb"))
        writer = TensorWriter(stream, before.schema, before.metadata)
        for name, spec in before.schema.items():
            for start, stop in block_ranges(spec):
                old = before.read(name, start, stop).astype(np.float64)
                combined = strategy.combine(old, _blocks(updates, name, start, stop))
                writer.write(_as_type(combined, spec))
        stream.flush()
        os.fsync(stream.fileno())


def _blocks(
    updates: Sequence[tuple[float, TensorFile]], name: str, start: int, stop: int
) -> Iterator[tuple[float, F64]]:
    for weight, file in updates:
        yield weight, file.read(name, start, stop).astype(np.float64)


def _as_type(values: F64, spec: TensorSpec) -> Array:
    if spec.dtype == "BOOL":
        return values >= 0.5
    # Counters such as a batch norm's number of batches are averaged and rounded.
    rounded = values if spec.is_float else np.rint(values)
    result: Array = rounded.astype(DTYPES[spec.dtype])
    return result


def _without_path(error: DataError, path: Path) -> str:
    # The site should read what is wrong, not where the aggregator keeps it.
    return str(error).removeprefix(f"{path}: ")
