"""FADE alone (FLAME paper, Eq. 14-16), what every method here builds on: the backbone learns to tell its embeddings
from noised ones.

Axes: B batch, C embedding channels, h x w the patch grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from trainer.objectives.interface import TOTAL, LocalObjective, ObjectiveContext, TrainingBatch


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


def fade(setting: ObjectiveContext) -> LocalObjective:
    """The loss by which the discriminator tells embeddings from noised ones."""
    training = setting.training

    def losses(step: TrainingBatch) -> dict[str, Tensor]:
        noisy = add_noise(
            step.embeddings, std=training.noise_std, scale=training.noise_scale, generator=setting.generator
        )
        # One pass over both: with a batch each, batch norm would hide the noise's extra variance.
        scores = setting.model.discriminator(torch.cat([step.embeddings, noisy]))
        good, bad = scores.chunk(2)
        return {
            TOTAL: fade_loss(good, bad, training.margin),
            "separated": ((good > 0).float().mean() + (bad < 0).float().mean()).detach() / 2,
        }

    return LocalObjective(losses=losses)


def add_loss_term(losses: dict[str, Tensor], name: str, term: Tensor, weight: float) -> dict[str, Tensor]:
    """FADE's losses with a further term added to the total, and both reported."""
    return {**losses, TOTAL: losses[TOTAL] + weight * term, "fade": losses[TOTAL].detach(), name: term.detach()}
