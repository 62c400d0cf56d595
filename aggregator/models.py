"""Work on model files: is an update fit to count, and the aggregation of those that are.

Everything is read tensor by tensor, in blocks, from blobs on disk: memory does not depend on the number of sites,
and only as far as one block's on the size of the model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.config import AggregateConfig
from aggregator.strategies import STRATEGIES, rule_name
from aggregator.strategies.interface import BlockRule, BlockStrategy, Contribution, FileRule, RoundInputs
from edgeflame.errors import DataError, NumericalError
from edgeflame.messages import Reason
from edgeflame.statedir import storage_errors
from edgeflame.statistics_blob import StatisticsFile, difference
from edgeflame.tensors import (
    BLOCK_ELEMENTS,
    DTYPES,
    F64,
    Array,
    TensorFile,
    TensorSpec,
    TensorWriter,
    block_ranges,
    schema_difference,
)

MIN_BLOCK_ELEMENTS = 4096
"""16 kB in float32: smaller reads would cost more than they spare."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a model counts.

    Attributes:
        reason: why not; None if it does.
        detail: the reason in words.
        relative_change: the distance to the base model over the base model's norm.
        decoded: SHA-256 of the update in the store, if it came encoded.
    """

    reason: Reason | None = None
    detail: str = ""
    relative_change: float = 0.0
    decoded: str | None = None


def check_initial(path: Path) -> Verdict:
    """Whether a file can start a run: tensors, finite."""
    try:
        with TensorFile(path) as model:
            for name, spec in model.schema.items():
                for block in model.blocks(name):
                    if spec.is_float and not np.isfinite(block).all():
                        return Verdict(reason="not_finite", detail=f"tensor {name!r} holds NaN or infinite values")
    except DataError as exc:
        return Verdict(reason="not_tensors", detail=without_path(exc, path))
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
                    if name.endswith(".running_var") and (values < 0).any():
                        # Its root is taken: every score of the model would be NaN.
                        return Verdict(reason="schema", detail=f"tensor {name!r}, a variance, holds negative values")
                    reference = old.astype(np.float64)
                    norm += float(np.dot(reference, reference))
                    values -= reference
                    # Near the top of float64 the square overflows to infinity, which is beyond any bound.
                    with np.errstate(over="ignore"):
                        change += float(np.dot(values, values))
    except DataError as exc:
        return Verdict(reason="not_tensors", detail=without_path(exc, path))
    # A base of zeros has no scale of its own; then the bound is absolute.
    relative = math.sqrt(change) / (math.sqrt(norm) or 1.0)
    if not relative <= max_relative_change:
        detail = f"{relative:.3g} times the base model's norm away from it; {max_relative_change:g} is allowed"
        return Verdict(reason="norm", detail=detail, relative_change=relative)
    return Verdict(relative_change=relative)


def check_statistics(path: Path, *, model: str, num_samples: int, like: Path | None) -> Verdict:
    """Whether a site's statistics can be pooled.

    Args:
        path: the blob.
        model: SHA-256 of the final model, whose embeddings they must be of.
        num_samples: what the offer says.
        like: statistics that were accepted before, of which these must have the shape; None for the first.
    """
    try:
        with StatisticsFile(path) as blob:
            header = blob.header
            if header.model != model:
                detail = f"statistics of the embeddings of model {header.model[:12]}; the final model is {model[:12]}"
                return Verdict(reason="space", detail=detail)
            if header.count != num_samples or header.sites:
                detail = f"statistics of {header.count} images of {len(header.sites) or 1} sites; {num_samples} offered"
                return Verdict(reason="samples", detail=detail)
            if like is not None:
                with StatisticsFile(like) as other:
                    if reason := difference(other.header, header):
                        return Verdict(reason="schema", detail=reason)
            blob.verify()
    except DataError as exc:
        return Verdict(reason="not_tensors", detail=without_path(exc, path))
    except NumericalError as exc:
        return Verdict(reason="impossible", detail=str(exc))
    return Verdict()


def relative_change(base: Path, model: Path) -> float | None:
    """How far a model is from its base, in units of the base's norm; None if their tensors differ in kind."""
    verdict = check_update(model, base, max_relative_change=math.inf)
    return None if verdict.reason is not None else verdict.relative_change


def merge(
    config: AggregateConfig, base: Path, contributions: Iterable[Contribution], out: Path, *, num_members: int
) -> None:
    """Write the next global model by the configuration's rule, in canonical form, durably.

    The result depends on the set of contributions alone: sites are taken in sorted order, whatever theirs is here.

    Args:
        config: of the run.
        base: the round's base model.
        contributions: the accepted updates.
        out: where to write.
        num_members: sites of the run.

    Raises:
        DataError, StorageError: a blob on disk is not what was checked, or the disk fails.
    """
    ordered = tuple(sorted(contributions, key=lambda contribution: contribution.site))
    rule = STRATEGIES[rule_name(config.strategy, config.learning.method)]
    inputs = RoundInputs(config=config, contributions=ordered, num_members=num_members)
    match rule:
        case BlockRule():
            merge_blocks(rule.build(inputs), base, ordered, out, elements=_block_elements(rule, num_sites=len(ordered)))
        case FileRule():
            rule.build(inputs).merge_files(base, ordered, out)
            with storage_errors(out, "write"), out.open("rb+") as stream:
                os.fsync(stream.fileno())


def _block_elements(rule: BlockRule, *, num_sites: int) -> int:
    # So that what is held of all sites together does not grow with their number.
    return max(MIN_BLOCK_ELEMENTS, BLOCK_ELEMENTS // num_sites) if rule.holds_all_sites else BLOCK_ELEMENTS


def merge_blocks(
    strategy: BlockStrategy,
    base: Path,
    contributions: Sequence[Contribution],
    out: Path,
    *,
    elements: int = BLOCK_ELEMENTS,
) -> None:
    """Write what a block strategy makes of updates, with the base's tensors and metadata, durably.

    Args:
        strategy: the rule.
        base: the round's base model.
        contributions: in sorted site order.
        out: where to write.
        elements: of a block.

    Raises:
        DataError, StorageError: a blob on disk is not what was checked, or the disk fails.
    """
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(TensorFile(base))
        updates = [(c, stack.enter_context(TensorFile(c.path))) for c in contributions]
        stack.enter_context(storage_errors(out, "write"))
        stream = stack.enter_context(out.open("wb"))
        writer = TensorWriter(stream, before.schema, before.metadata)
        for name, spec in before.schema.items():
            for start, stop in block_ranges(spec, elements):
                old = before.read(name, start, stop).astype(np.float64)
                combined = strategy.combine(name, old, _blocks(updates, name, start, stop))
                writer.write(_as_type(combined, spec))
        stream.flush()
        os.fsync(stream.fileno())


def _blocks(
    updates: Sequence[tuple[Contribution, TensorFile]], name: str, start: int, stop: int
) -> Iterator[tuple[Contribution, F64]]:
    for contribution, file in updates:
        yield contribution, file.read(name, start, stop).astype(np.float64)


def _as_type(values: F64, spec: TensorSpec) -> Array:
    if spec.dtype == "BOOL":
        return values >= 0.5
    # Counters such as a batch norm's number of batches are averaged and rounded.
    rounded = values if spec.is_float else np.rint(values)
    result: Array = rounded.astype(DTYPES[spec.dtype])
    return result


def without_path(error: DataError, path: Path) -> str:
    """What is wrong with a file, for the site to read: not where the aggregator keeps it."""
    return str(error).removeprefix(f"{path}: ")
