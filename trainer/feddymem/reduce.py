"""Memory-reduce: from a site's dynamic memory to the few averages that may leave it.

Axes: n patches, B entries of the memory, M groups, N images, C embedding channels.

Every vector that is sent is a weighted average of patches whose weights are known exactly: the patches of the last
assignment are averaged within each entry, and the entries within each group, with weights n_j exp(-d_j^2 / T). So the
privacy floor can be stated exactly too, in effective counts 1 / sum of w^2: of patches, and of images (with an image's
weight the sum over its patches). A group below either floor is merged into its nearest neighbour.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgeflame.errors import DataError
from edgeflame.statistics.memory import MemoryBank
from edgeflame.tensors import F32, F64
from trainer.feddymem.learning import PatchSample
from trainer.feddymem.metric import (
    MemoryGenerator,
    Whitening,
    aligned_tensor,
    comparable,
    grouped,
    means_of_groups,
    squared_distances,
)

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PrivacyFloor:
    """What an average needs before it may be sent: effective numbers of patches and of images."""

    patches: float
    images: float


NO_FLOOR = PrivacyFloor(patches=0, images=0)
"""For averages that stay at the site."""


@dataclass(frozen=True, kw_only=True)
class EntryContents:
    """What the entries of a memory hold after an assignment.

    Attributes:
        means: ``[B, C]`` float32, the average of each entry's patches.
        places: ``[B, 2]`` float32, the average of their places.
        rows: ``[n]`` int64, the row of the entry of each patch.
        counts: ``[B, N]`` float64, how many of them are from which image; no row is empty.
    """

    means: F32
    places: F32
    counts: F64
    rows: torch.Tensor

    @functools.cached_property
    def vectors(self) -> F64:
        """Means and places side by side, ``[B, C + 2]``."""
        return np.concatenate([self.means, self.places], axis=1, dtype=np.float64)

    @functools.cached_property
    def sizes(self) -> F64:
        """Patches of each entry, ``[B]``."""
        sizes: F64 = self.counts.sum(axis=1)
        return sizes


def entry_contents(patches: PatchSample, entry_of: torch.Tensor) -> EntryContents:
    """Entries of an assignment; those without a patch are left out.

    Args:
        patches: of all images.
        entry_of: ``[n]`` int64, the entry each is assigned to.
    """
    found, rows = torch.unique(entry_of.cpu(), return_inverse=True)
    num_images = patches.num_images
    counts = torch.bincount(rows * num_images + patches.image_of.cpu(), minlength=len(found) * num_images)
    means, places = (
        means_of_groups(one.cpu(), rows, len(found), empty=torch.zeros(len(found), one.shape[1])).numpy()
        for one in (patches.values, patches.places)
    )
    return EntryContents(
        means=means, places=places, counts=counts.reshape(len(found), num_images).double().numpy(), rows=rows
    )


@dataclass(frozen=True, kw_only=True)
class ReducedMemory:
    """What a memory was reduced to.

    Attributes:
        bank: the averages; without spreads.
        prototype_of: ``[n]`` int64, the one that each patch went into.
    """

    bank: MemoryBank
    prototype_of: torch.Tensor


def reduce_memory(
    contents: EntryContents,
    whitening: Whitening,
    generator: MemoryGenerator,
    *,
    size: int,
    temperature: float,
    floor: PrivacyFloor,
    count: int,
    space: str,
) -> ReducedMemory:
    """Reduce a memory to at most ``size`` averages, each above the floor.

    Args:
        contents: of the memory's entries.
        whitening: with ``generator``, the metric of groups and weights.
        generator: the site's own.
        size: M.
        temperature: T, in units of the mean squared distance of an entry to its group's centre.
        floor: the privacy floor.
        count: number of the site's images.
        space: id of the embedding space.

    Raises:
        DataError: not even the average of everything is above the floor.
    """
    device, sizes = whitening.matrix.device, torch.from_numpy(contents.sizes)
    values, places = (aligned_tensor(one).to(device) for one in (contents.means, contents.places))
    points = comparable(whitening, generator, values, places)
    group_of = grouped(points, sizes, size)
    found, group_of = torch.unique(group_of, return_inverse=True)
    centres = means_of_groups(points, group_of, len(found), sizes, empty=points[: len(found)])
    # Squared distances of all entries to all centres: groups that are merged need those of their new centre.
    distance = squared_distances(points, centres).double().cpu().numpy()
    own = distance[np.arange(len(distance)), group_of.numpy()]
    scale = float(own[own > 0].mean()) if (own > 0).any() else float(distance.mean()) or 1.0
    in_metric = points.double().cpu().numpy()
    made = [
        _Group(contents, in_metric, np.flatnonzero(group_of.numpy() == m), distance[:, m] / scale, temperature)
        for m in range(len(found))
    ]
    groups = _merge_below_floor(floor, made)
    order = np.lexsort(np.stack([group.average for group in groups]).T[::-1])
    ordered = [groups[index] for index in order]
    total = contents.sizes.sum()
    prototype_of_entry = np.empty(len(contents.means), dtype=np.int64)
    for number, group in enumerate(ordered):
        prototype_of_entry[group.members] = number
    averages = np.stack([group.average for group in ordered]).astype(np.float32)
    with_places = whitening.place_scale > 0
    return ReducedMemory(
        bank=MemoryBank(
            prototypes=averages[:, :-2],
            weights=np.array([group.num_patches / total for group in ordered], dtype=np.float32),
            effective_patches=np.array([group.effective_patches for group in ordered], dtype=np.float32),
            effective_images=np.array([group.effective_images for group in ordered], dtype=np.float32),
            count=count,
            space=space,
            places=np.clip(averages[:, -2:], 0, 1) if with_places else None,
            spreads=np.ones(len(ordered), dtype=np.float32) if with_places else None,
        ),
        prototype_of=torch.from_numpy(prototype_of_entry)[contents.rows],
    )


class _Group:
    """Entries that become one vector.

    Args:
        contents: of all entries.
        points: ``[B, D]``, all entries in the metric.
        members: the group's entries.
        distance: ``[B]``, squared, of all entries to the group's centre, in units of the temperature's scale.
        temperature: T.
    """

    def __init__(self, contents: EntryContents, points: F64, members: I64, distance: F64, temperature: float) -> None:
        self.members = members
        self._contents, self._points, self._distance, self._temperature = contents, points, distance, temperature
        sizes = contents.sizes[members]
        # Relative to the nearest, or all weights of a far group would underflow.
        exponent = (distance[members] - distance[members].min()) / temperature
        weights = sizes * np.exp(-exponent)
        weights /= weights.sum()
        # The embedding, and after it the place.
        self.average: F64 = weights @ contents.vectors[members]
        self.point: F64 = weights @ points[members]
        self.num_patches = float(sizes.sum())
        by_image = (weights / sizes) @ contents.counts[members]
        self.effective_patches = float(1 / (np.square(weights) / sizes).sum())
        self.effective_images = float(1 / np.square(by_image).sum())

    def with_members_of(self, other: _Group) -> _Group:
        members = np.sort(np.concatenate([self.members, other.members]))
        return _Group(self._contents, self._points, members, self._distance, self._temperature)

    def with_plain_weights(self) -> _Group:
        """The same entries, each patch weighted alike."""
        return _Group(self._contents, self._points, self.members, np.zeros(len(self._points)), 1.0)

    def reaches(self, floor: PrivacyFloor) -> bool:
        # Equally weighted patches are worth exactly their number, but for rounding.
        return self.shortfall(floor) >= 1 - 1e-9

    def shortfall(self, floor: PrivacyFloor) -> float:
        """Effective counts over the floor's, the lower of the two; 1 at the floor."""
        return min(
            self.effective_patches / floor.patches if floor.patches else 1.0,
            self.effective_images / floor.images if floor.images else 1.0,
        )


def _merge_below_floor(floor: PrivacyFloor, groups: list[_Group]) -> list[_Group]:
    """Merge groups below the floor into their nearest neighbours until none is below; the farthest below first."""
    while True:
        below = [index for index, group in enumerate(groups) if not group.reaches(floor)]
        if not below:
            return groups
        if len(groups) == 1:
            # Weights that favour what lies near the seed are worth fewer patches than plain ones.
            group = groups[0].with_plain_weights()
            if group.reaches(floor):
                return [group]
            raise DataError(
                f"the privacy floor allows nothing to be sent: the average of all patches is worth "
                f"{group.effective_patches:.0f} patches of {group.effective_images:.1f} images, "
                f"{floor.patches:g} of {floor.images:g} are needed; more images, or a lower memory.min_group and "
                f"memory.min_images"
            )
        worst = groups.pop(min(below, key=lambda index: (groups[index].shortfall(floor), index)))
        points = np.stack([group.point for group in groups])
        neighbour = int(np.square(points - worst.point).sum(axis=1).argmin())
        groups[neighbour] = groups[neighbour].with_members_of(worst)
