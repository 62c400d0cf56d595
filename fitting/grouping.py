"""Which photographs show one part, where nobody has said so: those whose fine structure is far more alike than others'.

Two photographs of one part share its scratches, grain and dirt, whatever the light; two parts share their shape, which
is taken out first. From each embedding the mean over all images at its position is subtracted, and the mean over its
neighbourhood in the image; its channels are whitened. What remains of two images is compared by its cosine. Between
different parts that scatters about zero, more widely where parts vary in few ways, such as their pose; photographs are
taken for one part where their cosine stands out of that scatter. Groups are whatever hangs together, so that they err
towards being too large: parts taken for one make a promise weaker, one taken for several makes it untrue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeflame.log import EventLog
from edgeflame.tensors import F32
from fitting.embeddings import Embeddings

log = EventLog("grouping")

LEAST_COSINE = 0.3
"""Photographs less alike are never taken for one part's."""

LEAST_DEVIATIONS = 6.0
"""Of the cosines' robust standard deviation above their median: nor are these. Of 35 to 176 photographs of 6 to 30
magnetic tiles it finds the tiles but for one to three that fall apart; toy figures and boards stay single. Cells of
monocrystalline modules that differ in little but brightness are partly taken for one."""

NEIGHBOURHOOD = 5
"""Side, in cells, of the square whose mean is taken out."""

SKETCH_SIZE = 8192
"""Numbers that are kept of each image. Cosines of such random projections are off by 0.01."""

MAX_SHARE = 0.5
"""Of all images that one part may hold; where one would hold more, nothing was told apart."""

MIN_IMAGES = 8
"""With fewer, the scatter between parts cannot be told."""


def find_parts(embeddings: Embeddings) -> list[str]:
    """The part that each image shows, by what the images look like.

    Returns:
        A name for each image, the same for images that are taken for one part: that of the first of them.

    Raises:
        NumericalError: an embedding is not finite.
    """
    names = embeddings.images.groups
    if len(embeddings) < MIN_IMAGES:
        return names
    found = [names[first] for first in linked(_sketches(embeddings))]
    largest = max(Counter(found).values())
    if largest > MAX_SHARE * len(found):
        log.warning("parts_not_told_apart", images=len(found), largest_group=largest, taken_for="each for its own part")
        return names
    return found


def linked(sketches: F32) -> list[int]:
    """For each of ``sketches [N, S]`` the first of those it hangs together with."""
    norms = np.linalg.norm(sketches, axis=1, keepdims=True)
    cosines = (sketches / np.maximum(norms, np.finfo(np.float32).tiny)) @ sketches.T / np.maximum(norms.T, 1e-30)
    between = cosines[np.triu_indices(len(cosines), 1)]
    median = np.median(between)
    deviation = 1.4826 * np.median(np.abs(between - median))
    alike = cosines >= max(LEAST_COSINE, float(median + LEAST_DEVIATIONS * deviation))
    first = np.full(len(alike), -1)
    for start in range(len(alike)):
        reached = np.zeros(len(alike), dtype=bool)
        edge = np.array([start] if first[start] < 0 else [], dtype=np.intp)
        while len(edge):
            reached[edge] = True
            edge = np.flatnonzero(alike[edge].any(axis=0) & ~reached)
        first[reached] = start
    return [int(one) for one in first]


def _sketches(embeddings: Embeddings) -> F32:
    """Random projections ``[N, S]`` of the images' whitened fine structure."""
    everything = range(len(embeddings))
    mean = np.zeros((embeddings.grid[0] * embeddings.grid[1], embeddings.num_channels))
    for _, batch in embeddings.batches(everything):
        mean += batch.sum(axis=0, dtype=np.float64)
    mean /= len(embeddings)
    rng = np.random.default_rng(0)
    bucket = rng.integers(0, SKETCH_SIZE, mean.size)
    sign = rng.choice(np.array([-1, 1], dtype=np.float32), mean.size)
    whitening: F32 | None = None
    sketches = np.empty((len(embeddings), SKETCH_SIZE), dtype=np.float32)
    for indices, batch in embeddings.batches(everything):
        fine = _without_neighbourhood((batch - mean).astype(np.float32), embeddings.grid)
        if whitening is None:
            whitening = _whitening(fine)
        for index, one in zip(indices, fine @ whitening, strict=True):
            sketches[index] = np.bincount(bucket, weights=one.ravel() * sign, minlength=SKETCH_SIZE)
    return sketches


def _without_neighbourhood(values: F32, grid: tuple[int, int]) -> F32:
    """``[N, P, C]`` less the mean over each position's neighbourhood."""
    maps = values.reshape(len(values), *grid, -1)
    smooth = maps
    for axis in (1, 2):
        # At the border the outermost cells count several times.
        at = np.clip(np.arange(grid[axis - 1] + NEIGHBOURHOOD - 1) - NEIGHBOURHOOD // 2, 0, grid[axis - 1] - 1)
        around = np.lib.stride_tricks.sliding_window_view(smooth.take(at, axis=axis), NEIGHBOURHOOD, axis=axis)
        smooth = around.mean(axis=-1, dtype=np.float32)
    return np.asarray(maps - smooth, dtype=np.float32).reshape(values.shape)


def _whitening(values: F32) -> F32:
    """``[C, C]``: makes the channels of ``[N, P, C]`` uncorrelated and alike in size."""
    covariance: npt.NDArray[np.float64] = np.cov(values.reshape(-1, values.shape[2]), rowvar=False)
    variances, vectors = np.linalg.eigh(covariance)
    floor = max(0.05 * float(variances.mean()), np.finfo(np.float64).tiny)
    whitening: F32 = (vectors / np.sqrt(np.clip(variances, 0, None) + floor)).astype(np.float32)
    return whitening


def largest_groups(groups: Sequence[str], count: int = 3) -> list[list[int]]:
    """Image indices of the largest groups of more than one image, the largest first."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    several = [indices for indices in members.values() if len(indices) > 1]
    return sorted(several, key=lambda indices: (-len(indices), indices))[:count]
