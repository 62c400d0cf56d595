"""Embeddings of a site's images, each computed once and kept within a memory budget.

What computes them is handed in: a network in torch, or in ONNX Runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from edgeflame.errors import ConfigError, NumericalError
from edgeflame.images import ImageU8
from edgeflame.tensors import F32
from fitting.imageset import ImageSet


class Embedder(Protocol):
    """A frozen network, whatever runs it: torch, or ONNX Runtime."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the P positions."""
        ...

    @property
    def num_channels(self) -> int:
        """C."""
        ...

    @property
    def num_tapped_channels(self) -> int:
        """Channels of its maps before their projection."""
        ...

    @property
    def forward_size(self) -> int:
        """How many images it embeds at a time the fastest."""
        ...

    def embed(self, images: ImageU8) -> F32:
        """Images ``[N, height, width, 3]`` uint8 BGR to their embeddings ``[N, P, C]``, positions row by row."""
        ...


MAX_CACHE_BYTES = 1 << 30
"""Embeddings kept in memory: 1724 images at the default 1024 x 152. The rest is computed again when needed."""

MAX_MOMENT_BYTES = 4 << 30
"""Second moments of all positions (P x C x C float64); beyond it the embedding is too wide for this form."""

BATCH_SIZE = 64
"""Images handed on at a time; each batch costs one pass over the second moments, so these want to be large."""


class Embeddings:
    """Embeddings of an image set under a frozen network.

    Args:
        embedder: computes them.
        images: the image set.
        max_cache_bytes: of embeddings kept.

    Attributes:
        grid: rows and columns of the P positions.
        num_channels: C.
        num_tapped_channels: of the network's maps before their projection.
        num_forward: images embedded so far.

    Raises:
        ConfigError: the second moments of such embeddings would not fit ``MAX_MOMENT_BYTES``.
    """

    def __init__(
        self,
        embedder: Embedder,
        images: ImageSet,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        grid, num_channels = embedder.grid, embedder.num_channels
        positions = grid[0] * grid[1]
        needed = positions * num_channels**2 * 8
        if needed > MAX_MOMENT_BYTES:
            raise ConfigError(
                f"embeddings of {num_channels} channels on a {grid[0]}x{grid[1]} grid need "
                f"{needed / 2**30:.1f} GiB of statistics, more than {MAX_MOMENT_BYTES / 2**30:.0f}; "
                f"leave backbone.channels at auto, choose later or fewer stages, or a smaller input"
            )
        self.images = images
        self.grid = grid
        self.num_channels = num_channels
        self.num_tapped_channels = embedder.num_tapped_channels
        self.num_forward = 0
        self._embedder = embedder
        self._cache: dict[int, F32] = {}
        self._room = max_cache_bytes // (positions * num_channels * 4)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int]) -> Embeddings:
        """The embeddings of some of the images, in the given order; what is cached is shared, ``num_forward`` is 0."""
        part = copy.copy(self)
        part.images = self.images.subset(indices)
        part.num_forward = 0
        held = {new: self._cache[old] for new, old in enumerate(indices) if old in self._cache}
        part._cache = held  # noqa: SLF001 - of this very class
        return part

    def with_groups(self, groups: Sequence[str]) -> Embeddings:
        """The same embeddings, of photographs of these parts; what is computed is shared."""
        regrouped = copy.copy(self)
        regrouped.images = self.images.with_groups(groups)
        return regrouped

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], F32]]:
        """Embeddings of some images, in order.

        Yields:
            Indices and their embeddings ``[N, P, C]`` float32.

        Raises:
            NumericalError: the network gave NaN or infinite values.
        """
        for start in range(0, len(indices), BATCH_SIZE):
            chosen = list(indices[start : start + BATCH_SIZE])
            yield chosen, self._load_batch(chosen)

    def _load_batch(self, chosen: list[int]) -> F32:
        missing = [index for index in chosen if index not in self._cache]
        computed: dict[int, F32] = {}
        size = self._embedder.forward_size
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            computed.update(zip(part, self._compute(part), strict=True))
        batch = np.stack([computed[index] if index in computed else self._cache[index] for index in chosen])
        for index, embedding in computed.items():
            if len(self._cache) < self._room:
                self._cache[index] = embedding.copy()  # a view would keep its whole forward batch alive
        return batch

    def _compute(self, indices: list[int]) -> F32:
        self.num_forward += len(indices)
        embeddings = self._embedder.embed(self.images.batch(indices))
        if not np.isfinite(embeddings).all():
            names = ", ".join(
                self.images.records[index].name
                for index, one in zip(indices, embeddings, strict=True)
                if not np.isfinite(one).all()
            )
            raise NumericalError(f"the network gave NaN or infinite embeddings for {names}")
        return embeddings
