"""Pooling the statistics of all sites without an image.

Pooling works position by position. With n = sum of n_i, the mean is m = sum of (n_i / n) m_i and the covariance is
``sum of (n_i - 1)/(n - 1) S_i + n_i/(n - 1) (m_i - m)(m_i - m)'``. As a prior, the covariance is the mean of S_i with
the weights :func:`edgeflame.statistics.shared.shared_weight`: what differs between the sites' cameras is not in it, and
no site dominates. How much scores vary is the median of what the sites say. Only a block of positions of one site is in
memory at a time. The errors of the parts add by the triangle inequality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgeflame.errors import DataError
from edgeflame.statistics.shared import (
    StatisticsBlock,
    StatisticsFile,
    StatisticsHeader,
    Truncation,
    header_difference,
    pool_deviations,
    position_blocks,
    shared_weight,
    write_blocks,
)


def pool_statistics(paths: Mapping[str, Path], out: Path, *, rank: int, as_prior: bool = False) -> Truncation:
    """Pool the blobs of sites, in sorted order of their names: the same blobs give the same bytes.

    Args:
        paths: verified blobs, by site.
        out: where to write the pooled blob, of the same form.
        rank: K of the pooled blob, for ``low_rank``.
        as_prior: whether each site's covariance stays about its own mean.

    Raises:
        DataError: no blobs, or they cannot be pooled: other embeddings, or of another model.
        StorageError: a file cannot be read or written.
    """
    files: list[StatisticsFile] = []
    try:
        for site in sorted(paths):
            files.append(StatisticsFile(paths[site]))
            if reason := header_difference(files[0].header, files[-1].header):
                raise DataError(f"the statistics of {site} cannot be pooled: {reason}")
        if not files:
            raise DataError("no statistics to pool")
        first = files[0].header
        count = sum(file.header.count for file in files)
        header = StatisticsHeader(
            form=first.form,
            grid=first.grid,
            num_channels=first.num_channels,
            rank=0 if first.form == "moments" else min(rank, first.num_channels - 1, count - 1),
            count=count,
            model=first.model,
            sites={site: file.header.count for site, file in zip(sorted(paths), files, strict=True)},
            centre="site" if as_prior else msgspec.UNSET,
            spread=pool_deviations([one for file in files if (one := file.header.spread) is not msgspec.UNSET]),
        )
        pool = _pool_block_as_prior if as_prior else _pool_block
        return write_blocks(out, header, (pool(files, count, at) for at in position_blocks(header)))
    finally:
        for file in files:
            file.close()


def _pool_block(files: Sequence[StatisticsFile], count: int, at: slice) -> StatisticsBlock:
    header = files[0].header
    size, channels = at.stop - at.start, header.num_channels
    means = [file.mean(at) for file in files]
    mean = np.zeros((size, channels))
    for file, own in zip(files, means, strict=True):
        mean += file.header.count / count * own
    covariance = np.zeros((size, channels, channels))
    error, bound = np.zeros(size), np.zeros(size)
    for file, own in zip(files, means, strict=True):
        block, step = file.block(at), own - mean
        within = (file.header.count - 1) / (count - 1)
        covariance += within * block.covariance
        covariance += file.header.count / (count - 1) * step[:, :, None] * step[:, None, :]
        error += within * block.error
        bound += within * block.bound
    return StatisticsBlock(mean=mean, covariance=covariance, error=error, bound=bound)


def _pool_block_as_prior(files: Sequence[StatisticsFile], count: int, at: slice) -> StatisticsBlock:
    weights = [shared_weight(file.header.count) for file in files]
    size, channels = at.stop - at.start, files[0].header.num_channels
    mean, covariance = np.zeros((size, channels)), np.zeros((size, channels, channels))
    error, bound = np.zeros(size), np.zeros(size)
    for file, weight in zip(files, weights, strict=True):
        block, share = file.block(at), weight / sum(weights)
        mean += file.header.count / count * block.mean
        covariance += share * block.covariance
        error += share * block.error
        bound += share * block.bound
    return StatisticsBlock(mean=mean, covariance=covariance, error=error, bound=bound)
