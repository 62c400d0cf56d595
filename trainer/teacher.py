"""Frozen networks that a model in training is compared with, each image embedded once a round.

During a round the teachers do not change and images are not augmented, so what they say of an image is the same in
every epoch: of ``3 E`` forward passes of a round of ``E`` epochs with two teachers, ``E + 2`` remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.backbone import EmbeddingNetwork
from trainer.precision import Autocast, full_precision

MAX_CACHE_BYTES = 1 << 29
"""Kept per teacher: 862 images at the default 1024 x 152. The rest is computed again in every epoch."""


class Teacher:
    """A frozen network's answers, computed once per image and kept within a memory budget, on its device.

    Attributes:
        num_forward: images sent through the network so far.
    """

    def __init__(
        self,
        network: EmbeddingNetwork,
        answer: Callable[[Tensor], Tensor],
        *,
        autocast: Autocast = full_precision,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        """Compute nothing yet.

        Args:
            network: is set to evaluation, and never trained.
            answer: makes of embeddings ``[B, C, h, w]`` float32 what is asked for and kept, ``[B, ...]``.
            autocast: how the network is run.
            max_cache_bytes: of all answers kept.
        """
        self.num_forward = 0
        self._network = network.eval().requires_grad_(False)
        self._answer = answer
        self._autocast = autocast
        self._room_bytes = max_cache_bytes
        self._cache: dict[int, Tensor] = {}

    def answers(self, indices: Sequence[int], rgb: Tensor) -> Tensor:
        """Of the images ``indices``, which ``rgb [B, 3, H, W]`` shows: ``[B, ...]``."""
        missing = [position for position, index in enumerate(indices) if index not in self._cache]
        computed: dict[int, Tensor] = {}
        if missing:
            self.num_forward += len(missing)
            with torch.no_grad():
                with self._autocast():
                    embeddings = self._network(rgb[missing])
                fresh = self._answer(embeddings.float())
            computed = {indices[position]: fresh[row] for row, position in enumerate(missing)}
        found = torch.stack([computed[index] if index in computed else self._cache[index] for index in indices])
        for index, value in computed.items():
            size_bytes = value.numel() * value.element_size()
            if size_bytes <= self._room_bytes:
                self._room_bytes -= size_bytes
                self._cache[index] = value.clone()  # a view would keep the whole batch alive
        return found
