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


FORWARD_SIZE = 8
"""Images embedded at a time; small batches stay in a CPU's cache, and are up to twice as fast as large ones."""


class TorchEmbedder:
    """A network in torch, on the device where it is; implements :class:`fitting.embeddings.Embedder`.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: EmbeddingNetwork) -> None:
        self._network = network
        self.grid = network.grid
        self.num_channels = network.num_channels
        self.num_tapped_channels = network.num_tapped_channels
        self.forward_size = FORWARD_SIZE

    def embed(self, images: ImageU8) -> F32:
        device = next(self._network.parameters()).device
        return embed(self._network, rgb_tensor(images, device))


def network_embeddings(
    network: EmbeddingNetwork, images: ImageSet, *, max_cache_bytes: int = MAX_CACHE_BYTES
) -> Embeddings:
    """Embeddings of an image set by a network that is in evaluation mode.

    Raises:
        ConfigError: the embeddings are too wide for their statistics.
    """
    return Embeddings(TorchEmbedder(network), images, max_cache_bytes=max_cache_bytes)
