"""MOON (Li et al. 2021, arXiv 2103.16257): FADE plus a contrast between the global and the site's last model.

The representation of an image is the mean of its embeddings over all positions. A site's first round has no last
model and is FADE alone. The FLAME paper calls MOON's ``mu = 1.0`` a temperature; in MOON mu is the weight of the
contrast and tau its temperature, and so they are here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.objectives.fade import add_loss_term, fade
from trainer.objectives.interface import LocalObjective, ObjectiveContext, Teacher, TrainingBatch


def moon(setting: ObjectiveContext) -> LocalObjective:
    """FADE plus the contrast; FADE alone where either teacher is missing."""
    own = fade(setting)
    if setting.global_network is None or setting.historical_network is None:
        return own
    training = setting.training
    towards = Teacher(setting.global_network, mean_embedding, autocast=setting.autocast)
    away = Teacher(setting.historical_network, mean_embedding, autocast=setting.autocast)

    def losses(step: TrainingBatch) -> dict[str, Tensor]:
        contrast = contrastive_loss(
            mean_embedding(step.embeddings),
            towards.answers(step.indices, step.rgb),
            away.answers(step.indices, step.rgb),
            training.contrast_temperature,
        )
        return add_loss_term(own.losses(step), "contrast", contrast, training.contrast_weight)

    return LocalObjective(losses=losses, teachers=(towards, away))


def mean_embedding(embeddings: Tensor) -> Tensor:
    """An image's representation: ``[B, C, h, w]`` to ``[B, C]``."""
    return embeddings.mean(dim=(2, 3))


def contrastive_loss(local: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """``-log(exp(a / tau) / (exp(a / tau) + exp(b / tau)))``, a and b the cosines to positive and negative.

    Args:
        local: ``[B, C]``, of the model in training.
        positive: ``[B, C]``, of the global model.
        negative: ``[B, C]``, of the site's last model.
        temperature: tau.

    Returns:
        The mean over the batch.
    """
    similar = torch.stack(
        [functional.cosine_similarity(local, positive), functional.cosine_similarity(local, negative)]
    )
    return functional.softplus((similar[1] - similar[0]) / temperature).mean()
