"""FLAME (Eq. 19-21): FADE plus mu times a distillation between the global and the site's last model.

A site's first round has no history and is FADE alone. The paper compares embeddings by Kullback-Leibler divergence
without saying of which distributions; here they are softmax over the channels of each patch.

Axes: B batch, C embedding channels, h x w the patch grid.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trainer.objectives.fade import add_loss_term, fade
from trainer.objectives.interface import LocalObjective, ObjectiveContext, Teacher, TrainingBatch


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


def flame(setting: ObjectiveContext) -> LocalObjective:
    """FADE plus the distillation term; FADE alone where either teacher is missing."""
    own = fade(setting)
    if setting.global_network is None or setting.historical_network is None:
        return own
    training = setting.training
    towards = Teacher(setting.global_network, log_probabilities, autocast=setting.autocast)
    away = Teacher(setting.historical_network, log_probabilities, autocast=setting.autocast)

    def losses(step: TrainingBatch) -> dict[str, Tensor]:
        distillation = distillation_loss(
            step.embeddings,
            towards.answers(step.indices, step.rgb),
            away.answers(step.indices, step.rgb),
            training.temperature,
        )
        return add_loss_term(own.losses(step), "distillation", distillation, training.distillation_weight)

    return LocalObjective(losses=losses, teachers=(towards, away))


def log_probabilities(embeddings: Tensor) -> Tensor:
    """Softmax over channels, its logarithm: ``[B, C, h, w]``."""
    return functional.log_softmax(embeddings, dim=1)
