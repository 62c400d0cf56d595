"""Aggregation of models block by block, for rules that combine each value by itself.

A *block strategy* sees one block of one tensor at a time, from every site in sorted order, and knows nothing of files.
Models are read in blocks from verified blobs on disk, so the memory needed does not depend on the number of sites, and
on the size of the model only by one block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from aggregator.strategies.interface import Contribution, RoundInputs, Strategy
from edgeflame.state import storage_errors
from edgeflame.tensors import BLOCK_ELEMENTS, DTYPES, F64, Array, TensorFile, TensorSpec, TensorWriter, block_ranges

MIN_BLOCK_ELEMENTS = 4096
"""16 kB in float32: smaller reads would cost more than they spare."""


class BlockStrategy(Protocol):
    """A rule that works block by block."""

    def combine(self, name: str, base: F64, updates: Iterable[tuple[Contribution, F64]]) -> F64:
        """The new values of a block.

        Args:
            name: the tensor's name.
            base: ``[elements]``, the round's base model.
            updates: for each site, in sorted site order, its ``[elements]``. An iterator that reads as it goes, once:
                a rule that takes one at a time holds one at a time.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BlockwiseStrategy:
    """Aggregates models by a block strategy, into a file with the base model's tensors and metadata.

    Attributes:
        rule: combines blocks.
        holds_all_sites: it needs a block of every site at once, and gets smaller ones the more sites there are, so
            that what is held of all sites together does not grow with their number.
    """

    rule: BlockStrategy
    holds_all_sites: bool = False

    def aggregate(self, base: Path, contributions: tuple[Contribution, ...], out: Path) -> None:
        elements = BLOCK_ELEMENTS
        if self.holds_all_sites:
            elements = max(MIN_BLOCK_ELEMENTS, BLOCK_ELEMENTS // len(contributions))
        with contextlib.ExitStack() as stack:
            before = stack.enter_context(TensorFile(base))
            updates = [(c, stack.enter_context(TensorFile(c.path))) for c in contributions]
            stack.enter_context(storage_errors(out, "write"))
            writer = TensorWriter(stack.enter_context(out.open("wb")), before.schema, before.metadata)
            for name, spec in before.schema.items():
                for start, stop in block_ranges(spec, elements):
                    old = before.read(name, start, stop).astype(np.float64)
                    blocks = ((c, file.read(name, start, stop).astype(np.float64)) for c, file in updates)
                    writer.write(_cast_to_dtype(self.rule.combine(name, old, blocks), spec))


def blockwise(
    build: Callable[[RoundInputs], BlockStrategy], *, holds_all_sites: bool = False
) -> Callable[[RoundInputs], Strategy]:
    """A builder of :class:`BlockwiseStrategy` from the builder of its block strategy."""
    return lambda inputs: BlockwiseStrategy(rule=build(inputs), holds_all_sites=holds_all_sites)


def _cast_to_dtype(values: F64, spec: TensorSpec) -> Array:
    if spec.dtype == "BOOL":
        return values >= 0.5
    # Counters such as a batch norm's number of batches are averaged and rounded.
    rounded = values if spec.is_float else np.rint(values)
    result: Array = rounded.astype(DTYPES[spec.dtype])
    return result
