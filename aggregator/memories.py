"""Is a memory bank fit to count: FedDyMem's counterpart of the checks of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aggregator.config import AggregateConfig
from aggregator.models import Verdict
from edgeflame.errors import DataError, NumericalError
from edgeflame.memory_bank import MemoryBank, read_bank
from edgeflame.messages import Reason

ROUNDING = 1e-4
"""Of effective counts, which travel as float32."""


def check_initial_memory(path: Path) -> Verdict:
    """Whether a file can start a run: a memory bank, and an empty one, since no site has learnt yet."""
    bank = _read(path)
    if isinstance(bank, Verdict):
        return bank
    if len(bank):
        return Verdict(reason="schema", detail=f"an initial memory is empty; this one has {len(bank)} prototypes")
    return Verdict()


def check_memory(path: Path, base: Path, config: AggregateConfig, *, num_samples: int) -> Verdict:
    """Whether a site's memory can be merged: of the run's embeddings, within bounds, above the privacy floor."""
    bank, settings = _read(path), config.learning.memory
    if isinstance(bank, Verdict):
        return bank
    before = read_bank(base)
    if bank.space != before.space:
        detail = f"a memory of the embeddings {bank.space[:12]}; this run's are {before.space[:12]}: another backbone?"
        return Verdict(reason="space", detail=detail)
    if bank.num_channels != before.num_channels or not 1 <= len(bank) <= settings.prototypes:
        detail = (
            f"{len(bank)} prototypes of {bank.num_channels} channels; expected 1 to {settings.prototypes} of "
            f"{before.num_channels}"
        )
        return Verdict(reason="schema", detail=detail)
    if bank.count != num_samples:
        return Verdict(reason="samples", detail=f"a memory of {bank.count} images; {num_samples} were offered")
    for name, values, least in (
        ("patches", bank.effective_patches, settings.min_group),
        ("images", bank.effective_images, settings.min_images),
    ):
        if float(values.min()) < least * (1 - ROUNDING):
            detail = f"a prototype is worth {values.min():.3g} {name}; the privacy floor is {least:g}"
            return Verdict(reason="floor", detail=detail)
    if not len(before):
        return Verdict()
    size, reference = (float(np.sqrt(np.square(one.prototypes.astype(np.float64)).mean())) for one in (bank, before))
    most = 1 + config.max_relative_change
    if not size <= most * reference:
        detail = f"prototypes {size / reference:.3g} times as long as the fleet's; {most:g} are allowed"
        return Verdict(reason="norm", detail=detail)
    return Verdict()


def memory_change(base: Path, memory: Path) -> float | None:
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


def _read(path: Path) -> MemoryBank | Verdict:
    try:
        return read_bank(path)
    except DataError as exc:
        # The site should read what is wrong, not where the aggregator keeps it.
        return _refused("not_tensors", str(exc).removeprefix(f"{path}: "))
    except NumericalError as exc:
        return _refused("not_finite", str(exc))


def _refused(reason: Reason, detail: str) -> Verdict:
    return Verdict(reason=reason, detail=detail)
