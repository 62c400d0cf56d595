"""A bounded, seeded sample of a site's patches under the frozen backbone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeflame.console import Progress, no_progress
from trainer.embedding import Embeddings
from trainer.feddymem.metric import tensor_of


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches of a site's images.

    Attributes:
        values: ``[n, C]`` float32.
        image_of: ``[n]`` int64, which image each is from.
        num_images: N.
    """

    values: Tensor
    image_of: Tensor
    num_images: int

    def without(self, images: list[int]) -> Patches:
        """The patches of all images but some."""
        kept = ~torch.isin(self.image_of, torch.tensor(images, dtype=torch.int64))
        return Patches(
            values=self.values[kept.to(self.values.device)], image_of=self.image_of[kept], num_images=self.num_images
        )


def sample_patches(
    embeddings: Embeddings, *, max_patches: int, seed: int, device: torch.device, progress: Progress = no_progress
) -> Patches:
    """As many patches of each image as ``max_patches`` allows, at random positions.

    Args:
        embeddings: of the site's images.
        max_patches: of all images; at least one of each is taken.
        seed: of the choice.
        device: where they go.
        progress: counts images.
    """
    generator = np.random.default_rng(seed)
    num_images = len(embeddings)
    positions = embeddings.network.grid[0] * embeddings.network.grid[1]
    each = max(1, min(positions, max_patches // num_images))
    values = np.empty((num_images, each, embeddings.network.num_channels), dtype=np.float32)
    done = 0
    for indices, batch in embeddings.batches(range(num_images)):
        for index, image in zip(indices, batch, strict=True):
            chosen = np.sort(generator.choice(positions, size=each, replace=False))
            values[index] = image[chosen]
        done += len(indices)
        progress(done, num_images, "patches")
    return Patches(
        values=tensor_of(values.reshape(num_images * each, -1)).to(device),
        image_of=torch.arange(num_images).repeat_interleave(each),
        num_images=num_images,
    )
