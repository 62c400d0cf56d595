"""Embeddings of images by a network in torch."""

from __future__ import annotations

import torch

from edgeflame.images import ImageU8
from edgeflame.tensors import F32
from fitting.embeddings import MAX_CACHE_BYTES, Embeddings
from fitting.imageset import ImageSet
from trainer.backbone import EmbeddingNetwork
from trainer.device import rgb_tensor, without_tf32


def embed(network: EmbeddingNetwork, rgb: torch.Tensor) -> F32:
    """Embeddings ``[N, P, C]`` float32 of RGB images ``[N, 3, H, W]``, positions row by row."""
    with torch.inference_mode(), without_tf32(rgb.device):
        maps = network(rgb)
    embeddings: F32 = maps.permute(0, 2, 3, 1).flatten(1, 2).float().cpu().numpy()
    return embeddings


def network_embeddings(
    network: EmbeddingNetwork, images: ImageSet, *, device: torch.device, max_cache_bytes: int = MAX_CACHE_BYTES
) -> Embeddings:
    """Embeddings of an image set by a network that is on ``device`` and in evaluation mode.

    Raises:
        ConfigError: the embeddings are too wide for their statistics.
    """

    def embed_images(batch: ImageU8) -> F32:
        return embed(network, rgb_tensor(batch, device))

    return Embeddings(
        embed_images, images, grid=network.grid, num_channels=network.num_channels, max_cache_bytes=max_cache_bytes
    )
