"""FLAME's distillation between the global and the site's last model (FLAME paper, Eq. 19-21).

The paper compares embeddings by Kullback-Leibler divergence without saying of which distributions; here they are
softmax over the channels of each patch.

Axes: B batch, C embedding channels, h x w the patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainer.backbone import EmbeddingNetwork

MAX_CACHE_BYTES = 1 << 29
"""Kept per teacher: 862 images at the default 1024 x 152. The rest is computed again in every epoch."""


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum over channels of p (log p - log q): ``[B, C, h, w]`` each to ``[B, h, w]``."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def distillation_loss(local: Tensor, global_log_p: Tensor, historical_log_p: Tensor, temperature: float) -> Tensor:
    """Eq. 20: pull the local embedding towards the global model's and away from the site's last.

    ``-log(exp(a / tau) / (exp(b / tau) + exp(a / tau)))`` with a = KL(local || historical) and
    b = KL(local || global), averaged over patches and batch; computed as softplus((b - a) / tau), which neither
    overflows nor cancels.

    Args:
        local: embeddings ``[B, C, h, w]``.
        global_log_p: the global model's log-probabilities ``[B, C, h, w]``.
        historical_log_p: those of the site's model of its last round.
        temperature: tau.
    """
    log_p = functional.log_softmax(local, dim=1)
    to_history = kl_divergence(log_p, historical_log_p)
    to_global = kl_divergence(log_p, global_log_p)
    return functional.softplus((to_global - to_history) / temperature).mean()


class Teacher:
    """A frozen network's log-probabilities, computed once per image and kept within a memory budget.

    Attributes:
        num_forward: images sent through the network so far.
    """

    def __init__(self, network: EmbeddingNetwork, *, max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self.num_forward = 0
        self._network = network.eval().requires_grad_(False)
        positions = network.grid[0] * network.grid[1]
        self._room = max_cache_bytes // (positions * network.num_channels * 4)
        self._cache: dict[int, Tensor] = {}

    def log_probabilities(self, indices: Sequence[int], rgb: Tensor) -> Tensor:
        """Of the images ``indices``, which ``rgb [B, 3, H, W]`` shows: ``[B, C, h, w]``."""
        missing = [position for position, index in enumerate(indices) if index not in self._cache]
        computed: dict[int, Tensor] = {}
        if missing:
            self.num_forward += len(missing)
            with torch.no_grad():
                fresh = functional.log_softmax(self._network(rgb[missing]), dim=1).cpu()
            computed = {indices[position]: fresh[row] for row, position in enumerate(missing)}
        found = [computed[index] if index in computed else self._cache[index] for index in indices]
        for index, value in computed.items():
            if len(self._cache) < self._room:
                self._cache[index] = value.clone()
        return torch.stack(found).to(rgb.device)
