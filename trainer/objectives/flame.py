"""FLAME (Eq. 21): FADE plus mu times the distillation. A site's first round has no history and is FADE alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trainer.flame import distillation_loss
from trainer.objectives.fade import fade, with_term
from trainer.objectives.interface import LocalObjective, Setting, Step
from trainer.teacher import Teacher


def flame(setting: Setting) -> LocalObjective:
    """Towards the global model, away from the site's own of its last round."""
    own = fade(setting)
    if setting.global_network is None or setting.historical_network is None:
        return own
    training = setting.training
    towards = Teacher(setting.global_network, log_probabilities, autocast=setting.autocast)
    away = Teacher(setting.historical_network, log_probabilities, autocast=setting.autocast)

    def losses(step: Step) -> dict[str, Tensor]:
        distillation = distillation_loss(
            step.embeddings,
            towards.answers(step.indices, step.rgb),
            away.answers(step.indices, step.rgb),
            training.temperature,
        )
        return with_term(own.losses(step), "distillation", distillation, training.distillation_weight)

    return LocalObjective(losses=losses, teachers=(towards, away))


def log_probabilities(embeddings: Tensor) -> Tensor:
    """Softmax over channels, its logarithm: ``[B, C, h, w]``."""
    return functional.log_softmax(embeddings, dim=1)
