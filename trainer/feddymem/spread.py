"""How much the patches of each prototype differ from it.

Where good parts vary much, a large distance is no defect, and where they hardly vary a small one is: distances are
divided by the root of the prototype's spread. It is relative to the mean of all, so that sites whose metrics differ a
little can exchange it.

Axes: n patches, M prototypes, C embedding channels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgeflame.statistics.memory import MemoryBank
from edgeflame.tensors import F32
from trainer.feddymem.learning import PatchSample
from trainer.feddymem.metric import MemoryGenerator, Whitening, aligned_tensor, comparable, nearest_index
from trainer.feddymem.reduce import PrivacyFloor

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
    prior_patches: F32 | float = PRIOR_PATCHES,
) -> F32:
    """The mean squared distance of each prototype's patches to it, over that of all patches to theirs.

    Args:
        patches: of all images.
        prototypes: ``[M, C]``.
        places: ``[M, 2]``.
        prototype_of: ``[n]`` int64, the prototype of each patch.
        whitening: with ``generator``, the metric.
        generator: the site's own.
        prior: ``[M]``, what is known beforehand.
        prior_patches: ``[M]``, how many patches that is worth.

    Returns:
        ``[M]`` float32, > 0.
    """
    counts, sums = _squared_distances(patches, prototypes, places, prototype_of, whitening, generator)
    mean = float(sums.sum() / counts.sum()) or 1.0
    spreads: F32 = ((sums / mean + prior_patches * prior) / (counts + prior_patches)).astype(np.float32)
    return spreads


def measured_of_fleet(
    patches: PatchSample, fleet: MemoryBank, whitening: Whitening, generator: MemoryGenerator, floor: PrivacyFloor
) -> F32:
    """How much a site's patches differ from each prototype of its fleet's memory, as in ``MemoryBank.measured``.

    Args:
        patches: of all images.
        fleet: M prototypes with places; there may be none.
        whitening: with ``generator``, the metric.
        generator: the site's own.
        floor: what is of fewer patches or images is not told.

    Returns:
        ``[M, 2]`` float32: number of patches, 0 below the floor, and spread, 1 there.
    """
    if not len(fleet) or fleet.places is None:
        return np.tile(np.array([[0, 1]], dtype=np.float32), (len(fleet), 1))
    nearest = nearest_prototypes(patches, fleet.prototypes, fleet.places, whitening, generator)
    counts, sums = _squared_distances(patches, fleet.prototypes, fleet.places, nearest, whitening, generator)
    mean = float(sums.sum() / counts.sum()) or 1.0
    pairs = np.unique(np.column_stack([nearest.cpu().numpy(), patches.image_of.cpu().numpy()]), axis=0)
    images = np.bincount(pairs[:, 0], minlength=len(fleet))
    told = (counts >= floor.patches) & (images >= floor.images) & (sums > 0)
    spreads = np.where(told, sums / mean / np.maximum(counts, 1), 1.0)
    return np.column_stack([np.where(told, counts, 0), spreads]).astype(np.float32)


def _squared_distances(
    patches: PatchSample,
    prototypes: F32,
    places: F32,
    prototype_of: Tensor,
    whitening: Whitening,
    generator: MemoryGenerator,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """For each prototype the number of its patches, and the sum of their squared distances to it."""
    points = comparable(whitening, generator, patches.values, patches.places)
    index = prototype_of.to(points.device)
    known = _points(prototypes, places, whitening, generator)
    parts = zip(torch.split(points, PATCHES_AT_ONCE), torch.split(index, PATCHES_AT_ONCE), strict=True)
    squared = torch.cat([(rows - known[at]).square().sum(dim=1) for rows, at in parts]).cpu()
    of = prototype_of.cpu().numpy()
    counts: npt.NDArray[np.int64] = np.bincount(of, minlength=len(prototypes))
    sums = np.bincount(of, weights=squared.double().numpy(), minlength=len(prototypes))
    return counts, sums.astype(np.float64)


def _points(prototypes: F32, places: F32, whitening: Whitening, generator: MemoryGenerator) -> Tensor:
    device = whitening.matrix.device
    values, at = (aligned_tensor(np.ascontiguousarray(one)).to(device) for one in (prototypes, places))
    return comparable(whitening, generator, values, at)
