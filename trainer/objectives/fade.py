"""FADE alone (FLAME paper, Eq. 14-16): what every method here builds on."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.fade import add_noise, fade_loss
from trainer.objectives.interface import TOTAL, LocalObjective, Setting, Step


def fade(setting: Setting) -> LocalObjective:
    """Tell embeddings from noised ones."""
    training = setting.training

    def losses(step: Step) -> dict[str, Tensor]:
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


def with_term(losses: dict[str, Tensor], name: str, term: Tensor, weight: float) -> dict[str, Tensor]:
    """FADE's losses with a further term added to the total, and both reported."""
    return {**losses, TOTAL: losses[TOTAL] + weight * term, "fade": losses[TOTAL].detach(), name: term.detach()}
