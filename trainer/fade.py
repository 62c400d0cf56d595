"""FADE: adapting the backbone by telling its embeddings from noised ones (FLAME paper, Eq. 14-16).

Axes: B batch, C embedding channels, h x w the patch grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAKY_SLOPE = 0.2
"""As in SimpleNet (arXiv 2303.15140), whose discriminator this is."""


class Discriminator(nn.Module):
    """Normality of each patch: a two-layer perceptron per position, as 1 x 1 convolutions."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(num_channels, num_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(num_channels)
        self.score = nn.Conv2d(num_channels, 1, kernel_size=1, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Score patches: ``[B, C, h, w]`` to ``[B, 1, h, w]``, higher where more normal."""
        scores: Tensor = self.score(functional.leaky_relu(self.norm(self.hidden(embeddings)), LEAKY_SLOPE))
        return scores


def add_noise(
    embeddings: Tensor, *, std: float, scale: Literal["relative", "absolute"], generator: torch.Generator
) -> Tensor:
    """Eq. 14: E- = E + eps, eps ~ N(0, sigma^2).

    The paper's sigma is absolute (0.015). Embeddings of different backbones differ in scale by orders of
    magnitude, so by default sigma is in units of each channel's standard deviation in the batch (a constant to
    the gradient).

    Args:
        embeddings: ``[B, C, h, w]``.
        std: sigma.
        scale: what sigma's unit is.
        generator: of the noise, on the embeddings' device.

    Returns:
        ``[B, C, h, w]``; the gradient reaches ``embeddings``.
    """
    # Drawn in the order of the axes, whatever the memory layout, so that a seed means one thing.
    noise = torch.randn(embeddings.shape, generator=generator, device=embeddings.device, dtype=embeddings.dtype)
    if scale == "relative":
        noise = noise * embeddings.detach().std(dim=(0, 2, 3), keepdim=True)
    return embeddings + std * noise


def fade_loss(good: Tensor, noisy: Tensor, margin: float) -> Tensor:
    """Eq. 16 in the form that does what its text says, averaged over patches.

    ``max(0, th+ - D(E)) + max(0, -th- + D(E-))`` with th+ = margin and th- = -margin, as in SimpleNet. Printed,
    Eq. 16 together with Eq. 15 pushes both terms the same way.

    Args:
        good: D(E) ``[B, 1, h, w]``.
        noisy: D(E-) ``[B, 1, h, w]``.
        margin: th+.
    """
    return functional.relu(margin - good).mean() + functional.relu(margin + noisy).mean()
