"""What a site minimises: one entry in ``OBJECTIVES`` each.

A method is an objective here and, in a federation, a rule of the aggregator; the training loop knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgeflame.learning import Training
from trainer.backbone import EmbeddingNetwork
from trainer.fade import add_noise, fade_loss
from trainer.flame import Teacher, distillation_loss
from trainer.model import SiteModel

TOTAL = "loss"
"""The term that is minimised; others are reported."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch.

    Attributes:
        indices: which images; an index means the same image in every epoch.
        rgb: ``[B, 3, H, W]`` float32, 0..255.
        embeddings: ``[B, C, h, w]`` of the network in training.
    """

    indices: Sequence[int]
    rgb: Tensor
    embeddings: Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an objective may build on.

    Attributes:
        model: the one in training.
        training: its configuration.
        generator: of random numbers, on the model's device.
        global_network: the backbone every site started the round from.
        historical_network: the site's own of the last round it trained in; None in its first.
    """

    model: SiteModel
    training: Training
    generator: torch.Generator
    global_network: EmbeddingNetwork | None = None
    historical_network: EmbeddingNetwork | None = None


class LocalObjective(Protocol):
    """A loss over batches."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Scalar terms by name; ``loss`` is the one to minimise."""
        ...

    @property
    def num_teacher_forward(self) -> int:
        """Images sent through frozen networks so far."""
        ...


class Fade:
    """FADE (Eq. 14-16)."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    num_teacher_forward = 0

    def losses(self, step: Step) -> dict[str, Tensor]:
        training = self._setting.training
        noisy = add_noise(
            step.embeddings, std=training.noise_std, scale=training.noise_scale, generator=self._setting.generator
        )
        # One pass over both: with a batch each, batch norm would hide the noise's extra variance.
        scores = self._setting.model.discriminator(torch.cat([step.embeddings, noisy]))
        good, bad = scores.chunk(2)
        return {
            TOTAL: fade_loss(good, bad, training.margin),
            "separated": ((good > 0).float().mean() + (bad < 0).float().mean()).detach() / 2,
        }


class Flame:
    """FLAME: FADE plus mu times the distillation (Eq. 21). A site's first round has no history and is FADE alone."""

    def __init__(self, setting: Setting) -> None:
        self._fade = Fade(setting)
        self._training = setting.training
        self._teachers: tuple[Teacher, Teacher] | None = None
        if setting.global_network is not None and setting.historical_network is not None:
            self._teachers = (Teacher(setting.global_network), Teacher(setting.historical_network))

    @property
    def num_teacher_forward(self) -> int:
        return sum(teacher.num_forward for teacher in self._teachers or ())

    def losses(self, step: Step) -> dict[str, Tensor]:
        losses = self._fade.losses(step)
        if self._teachers is None:
            return losses
        towards, away = (teacher.log_probabilities(step.indices, step.rgb) for teacher in self._teachers)
        distillation = distillation_loss(step.embeddings, towards, away, self._training.temperature)
        return {
            **losses,
            TOTAL: losses[TOTAL] + self._training.distillation_weight * distillation,
            "fade": losses[TOTAL].detach(),
            "distillation": distillation.detach(),
        }


OBJECTIVES: dict[str, Callable[[Setting], LocalObjective]] = {
    "fade": Fade,
    "flame": Flame,
}
"""By the name that ``edgeflame.learning.METHODS`` uses."""
