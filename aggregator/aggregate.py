"""Aggregation: the next global model from a round's accepted updates, by the configured strategy.

Models are read tensor by tensor, in blocks, from verified blobs on disk. Memory use does not depend on the number of
sites, and on the size of the model only by one block. Sites are taken in sorted order, so the result is bit-identical
whatever the order in which the updates arrived. Also: the weight of each update, and how far a model, or a memory
(FedDyMem), has moved from the base of its round.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aggregator.config import AggregateConfig
from aggregator.events import Round
from aggregator.strategies import STRATEGIES, resolve_strategy
from aggregator.strategies.interface import BlockRule, BlockStrategy, Contribution, FileRule, RoundInputs, Rule
from aggregator.validation import validate_update
from edgeflame.state import storage_errors
from edgeflame.statistics.memory import read_bank
from edgeflame.tensors import BLOCK_ELEMENTS, DTYPES, F64, Array, TensorFile, TensorSpec, TensorWriter, block_ranges


def update_weights(entry: Round, *, equal: bool = False) -> dict[str, float]:
    """The weight of each accepted update, its share of the round's samples (or ``equal``); they sum to 1."""
    if equal:
        return {site: 1 / len(entry.accepted) for site in sorted(entry.accepted)}
    total = sum(update.num_samples for update in entry.accepted.values())
    return {site: update.num_samples / total for site, update in sorted(entry.accepted.items())}


def round_contributions(entry: Round, config: AggregateConfig, path_of: Callable[[str], Path]) -> list[Contribution]:
    """The accepted updates of a round as a strategy gets them; ``path_of`` tells where a blob is by its SHA-256."""
    accepted = entry.accepted
    return [
        Contribution(
            site=site,
            path=path_of(accepted[site].decoded or accepted[site].sha256),
            weight=weight,
            num_samples=accepted[site].num_samples,
            num_steps=accepted[site].num_steps,
            relative_change=accepted[site].relative_change,
        )
        for site, weight in update_weights(entry, equal=configured_rule(config).equal_votes).items()
    ]


def configured_rule(config: AggregateConfig) -> Rule:
    return STRATEGIES[resolve_strategy(config.strategy, config.learning.method)]


MIN_BLOCK_ELEMENTS = 4096
"""16 kB in float32: smaller reads would cost more than they spare."""


def relative_model_change(base: Path, model: Path) -> float | None:
    """How far a model is from its base, in units of the base's norm; None if their tensors differ in kind."""
    verdict = validate_update(model, base, max_relative_change=math.inf)
    return None if verdict.reason is not None else verdict.relative_change


def aggregate_updates(
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
    rule = STRATEGIES[resolve_strategy(config.strategy, config.learning.method)]
    inputs = RoundInputs(config=config, contributions=ordered, num_members=num_members)
    match rule:
        case BlockRule():
            aggregate_blocks(
                rule.build(inputs), base, ordered, out, elements=_block_elements(rule, num_sites=len(ordered))
            )
        case FileRule():
            rule.build(inputs).merge_files(base, ordered, out)
            with storage_errors(out, "write"), out.open("rb+") as stream:
                os.fsync(stream.fileno())


def _block_elements(rule: BlockRule, *, num_sites: int) -> int:
    # So that what is held of all sites together does not grow with their number.
    return max(MIN_BLOCK_ELEMENTS, BLOCK_ELEMENTS // num_sites) if rule.holds_all_sites else BLOCK_ELEMENTS


def aggregate_blocks(
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
                combined = strategy.combine(name, old, _read_blocks(updates, name, start, stop))
                writer.write(_cast_to_dtype(combined, spec))
        stream.flush()
        os.fsync(stream.fileno())


def _read_blocks(
    updates: Sequence[tuple[Contribution, TensorFile]], name: str, start: int, stop: int
) -> Iterator[tuple[Contribution, F64]]:
    for contribution, file in updates:
        yield contribution, file.read(name, start, stop).astype(np.float64)


def _cast_to_dtype(values: F64, spec: TensorSpec) -> Array:
    if spec.dtype == "BOOL":
        return values >= 0.5
    # Counters such as a batch norm's number of batches are averaged and rounded.
    rounded = values if spec.is_float else np.rint(values)
    result: Array = rounded.astype(DTYPES[spec.dtype])
    return result


def relative_memory_change(base: Path, memory: Path) -> float | None:
    """How far the prototypes of a memory are from the nearest of its base, root mean square, in units of the root mean
    square distance of the base's prototypes from their mean; None where the base has fewer than two.
    """
    old, new = read_bank(base), read_bank(memory)
    if len(old) < 2:
        return None
    before, after = old.prototypes.astype(np.float64), new.prototypes.astype(np.float64)
    centre = before.mean(axis=0)
    before, after = before - centre, after - centre
    spread = float(np.square(before).sum(axis=1).mean())
    squared = np.square(after).sum(axis=1)[:, None] + np.square(before).sum(axis=1) - 2 * after @ before.T
    nearest = np.clip(squared, 0, None).min(axis=1)
    return float(np.sqrt(new.weights.astype(np.float64) @ nearest / spread)) if spread > 0 else None
