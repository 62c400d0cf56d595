"""How much the patches of each prototype differ from it.

Where good parts vary much, a large distance is no defect, and where they hardly vary a small one is: distances are
divided by the root of the prototype's spread. It is relative to the mean of all, so that sites whose metrics differ a
little can exchange it.

Axes: n patches, M prototypes, C embedding channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgeflame.tensors import F32
from trainer.feddymem.learning import PatchSample
from trainer.feddymem.metric import MemoryGenerator, Whitening, aligned_tensor, comparable, nearest_index

PRIOR_PATCHES = 30.0
"""How many patches what is known beforehand of a prototype's spread is worth."""

PATCHES_AT_ONCE = 1 << 14


def nearest_prototypes(
    patches: PatchSample, prototypes: F32, places: F32, whitening: Whitening, generator: MemoryGenerator
) -> Tensor:
    """The index of the nearest of ``prototypes [M, C]`` at ``places [M, 2]`` for each patch, ``[n]`` int64."""
    known = _points(prototypes, places, whitening, generator)
    return nearest_index(comparable(whitening, generator, patches.values, patches.places), known)


def measured_spreads(
    patches: PatchSample,
    prototypes: F32,
    places: F32,
    prototype_of: Tensor,
    whitening: Whitening,
    generator: MemoryGenerator,
    *,
    prior: F32,
) -> F32:
    """The mean squared distance of each prototype's patches to it, over that of all patches to theirs.

    Args:
        patches: of all images.
        prototypes: ``[M, C]``.
        places: ``[M, 2]``.
        prototype_of: ``[n]`` int64, the prototype of each patch.
        whitening: with ``generator``, the metric.
        generator: the site's own.
        prior: ``[M]``, what is known beforehand; it counts as ``PRIOR_PATCHES`` patches.

    Returns:
        ``[M]`` float32, > 0.
    """
    points = comparable(whitening, generator, patches.values, patches.places)
    index = prototype_of.to(points.device)
    known = _points(prototypes, places, whitening, generator)
    parts = zip(torch.split(points, PATCHES_AT_ONCE), torch.split(index, PATCHES_AT_ONCE), strict=True)
    squared = torch.cat([(rows - known[at]).square().sum(dim=1) for rows, at in parts]).cpu()
    counts = np.bincount(prototype_of.cpu().numpy(), minlength=len(prototypes))
    sums = np.bincount(prototype_of.cpu().numpy(), weights=squared.double().numpy(), minlength=len(prototypes))
    mean = float(sums.sum() / counts.sum()) or 1.0
    spreads: F32 = ((sums / mean + PRIOR_PATCHES * prior) / (counts + PRIOR_PATCHES)).astype(np.float32)
    return spreads


def _points(prototypes: F32, places: F32, whitening: Whitening, generator: MemoryGenerator) -> Tensor:
    device = whitening.matrix.device
    values, at = (aligned_tensor(np.ascontiguousarray(one)).to(device) for one in (prototypes, places))
    return comparable(whitening, generator, values, at)
