"""FedProx (Li et al. 2020, arXiv 1812.06127; FLAME paper Eq. 9): FADE held near the round's global model.

The local function is ``h(w) = F(w) + mu/2 |w - w_global|^2`` over all trained parameters. The gradient of that is
``grad F + mu (w - w_global)``; Eq. 10 of the FLAME paper takes the gradient of ``h``, which holds the second part
already, and adds it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives.fade import add_loss_term, fade
from trainer.objectives.interface import LocalObjective, ObjectiveContext, TrainingBatch


def fedprox(setting: ObjectiveContext) -> LocalObjective:
    """FADE and the proximal term."""
    own = fade(setting)
    parameters = list(setting.model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]

    def losses(step: TrainingBatch) -> dict[str, Tensor]:
        squares = [(now - then).square().sum() for now, then in zip(parameters, start, strict=True)]
        return add_loss_term(
            own.losses(step), "distance_squared", torch.stack(squares).sum(), setting.training.proximal_weight / 2
        )

    return LocalObjective(losses=losses)
