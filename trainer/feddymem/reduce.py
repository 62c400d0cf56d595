"""Memory-reduce: from a site's dynamic memory to the few averages that may leave it.

Axes: n patches, B entries of the memory, M groups, N images, C embedding channels.

Every vector that is sent is a weighted average of patches whose weights are known exactly: the patches of the last
assignment are averaged within each entry, and the entries within each group, with weights n_j exp(-d_j^2 / T). So the
privacy floor can be stated exactly too, in effective counts 1 / sum of w^2: of patches, and of images (with an image's
weight the sum over its patches). A group below either floor is merged into its nearest neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgeflame.errors import DataError
from edgeflame.statistics.memory import MemoryBank
from edgeflame.tensors import F32, F64
from trainer.feddymem.learning import (
    MemoryGenerator,
    Whitening,
    aligned_tensor,
    greedy_k_centre,
    nearest_index,
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
        counts: ``[B, N]`` float64, how many of them are from which image; no row is empty.
    """

    means: F32
    counts: F64

    @property
    def sizes(self) -> F64:
        """Patches of each entry, ``[B]``."""
        sizes: F64 = self.counts.sum(axis=1)
        return sizes


def entry_contents(
    patches: torch.Tensor, image_of: torch.Tensor, entry_of: torch.Tensor, num_images: int
) -> EntryContents:
    """Entries of an assignment; those without a patch are left out.

    Args:
        patches: ``[n, C]``.
        image_of: ``[n]`` int64, the image of each patch.
        entry_of: ``[n]`` int64, the entry each is assigned to.
        num_images: N.
    """
    rows, entries = torch.unique(entry_of.cpu(), return_inverse=True)
    sums = torch.zeros(len(rows), patches.shape[1], dtype=torch.float64)
    # On the CPU, where the order of additions is always the same.
    sums.index_add_(0, entries, patches.cpu().double())
    counts = torch.bincount(entries * num_images + image_of.cpu(), minlength=len(rows) * num_images)
    table = counts.reshape(len(rows), num_images).double()
    return EntryContents(means=(sums / table.sum(dim=1, keepdim=True)).float().numpy(), counts=table.numpy())


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
) -> MemoryBank:
    """Reduce a memory to at most ``size`` averages, each above the floor.

    Args:
        contents: of the memory's entries.
        whitening: with ``generator``, the metric of seeds and weights.
        generator: the site's own.
        size: M.
        temperature: T, in units of the mean squared distance of an entry to its seed.
        floor: the privacy floor.
        count: number of the site's images.
        space: id of the embedding space.

    Raises:
        DataError: not even the average of everything is above the floor.
    """
    device = whitening.matrix.device
    with torch.no_grad():
        points = generator(whitening(aligned_tensor(contents.means).to(device)))
        seeds = points[greedy_k_centre(points, size)]
        group_of = nearest_index(points, seeds).cpu().numpy()
        # Squared distances of all entries to all seeds: groups that are merged need those of their new seed.
        distance = squared_distances(points, seeds).double().cpu().numpy()
    scale = float(distance[np.arange(len(distance)), group_of].mean()) or 1.0
    made = [
        _Group(contents, np.flatnonzero(group_of == m), distance[:, m] / scale, temperature)
        for m in np.unique(group_of)
    ]
    groups = _merge_below_floor(floor, made, contents)
    order = np.lexsort(np.stack([group.average for group in groups]).T[::-1])
    ordered = [groups[index] for index in order]
    total = contents.sizes.sum()
    return MemoryBank(
        prototypes=np.stack([group.average for group in ordered]).astype(np.float32),
        weights=np.array([group.num_patches / total for group in ordered], dtype=np.float32),
        effective_patches=np.array([group.effective_patches for group in ordered], dtype=np.float32),
        effective_images=np.array([group.effective_images for group in ordered], dtype=np.float32),
        count=count,
        space=space,
    )


class _Group:
    """Entries that become one vector. ``distance``: of all entries to its seed, in units of the temperature's scale."""

    def __init__(self, contents: EntryContents, members: I64, distance: F64, temperature: float) -> None:
        self.members = members
        self._distance, self._temperature = distance, temperature
        sizes = contents.sizes[members]
        # Relative to the nearest, or all weights of a far group would underflow.
        exponent = (distance[members] - distance[members].min()) / temperature
        weights = sizes * np.exp(-exponent)
        weights /= weights.sum()
        self.average: F64 = weights @ contents.means[members].astype(np.float64)
        self.num_patches = float(sizes.sum())
        by_image = (weights / sizes) @ contents.counts[members]
        self.effective_patches = float(1 / (np.square(weights) / sizes).sum())
        self.effective_images = float(1 / np.square(by_image).sum())

    def with_members_of(self, other: _Group, contents: EntryContents) -> _Group:
        members = np.sort(np.concatenate([self.members, other.members]))
        return _Group(contents, members, self._distance, self._temperature)

    def reaches(self, floor: PrivacyFloor) -> bool:
        # Equally weighted patches are worth exactly their number, but for rounding.
        return self.shortfall(floor) >= 1 - 1e-9

    def shortfall(self, floor: PrivacyFloor) -> float:
        """Effective counts over the floor's, the lower of the two; 1 at the floor."""
        return min(
            self.effective_patches / floor.patches if floor.patches else 1.0,
            self.effective_images / floor.images if floor.images else 1.0,
        )


def _merge_below_floor(floor: PrivacyFloor, groups: list[_Group], contents: EntryContents) -> list[_Group]:
    """Merge groups below the floor into their nearest neighbours until none is below; the farthest below first."""
    while True:
        below = [index for index, group in enumerate(groups) if not group.reaches(floor)]
        if not below:
            return groups
        if len(groups) == 1:
            # Weights that favour what lies near the seed are worth fewer patches than plain ones.
            group = _Group(contents, groups[0].members, np.zeros(len(contents.means)), 1.0)
            if group.reaches(floor):
                return [group]
            raise DataError(
                f"the privacy floor allows nothing to be sent: the average of all patches is worth "
                f"{group.effective_patches:.0f} patches of {group.effective_images:.1f} images, "
                f"{floor.patches:g} of {floor.images:g} are needed; more images, or a lower memory.min_group and "
                f"memory.min_images"
            )
        worst = groups.pop(min(below, key=lambda index: (groups[index].shortfall(floor), index)))
        averages = np.stack([group.average for group in groups])
        neighbour = int(np.square(averages - worst.average).sum(axis=1).argmin())
        groups[neighbour] = groups[neighbour].with_members_of(worst, contents)
