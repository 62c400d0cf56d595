"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378; FLAME paper Eq. 11-12): FADE with control variates.

A control variate estimates a gradient: ``c_i`` that of site i, ``c`` that of all. Each local step goes along
``g - c_i + c``, which takes out what is particular to the site. After K steps from x to y the site's new variate is
option II of the paper: the mean gradient it saw,

    c_i+ = c_i - c + (x - y) / (eta a_K)

With plain SGD ``a_K = K``. With momentum rho a gradient goes on to act, so the displacement is ``eta`` times a
weighted sum of gradients whose weights add up to ``a_K = sum_k (1 - rho^k) / (1 - rho)``; with ``K`` in its place
the variate would be several times too long. Discriminator and backbone have learning rates of their own.

``c`` travels with the global model under ``CONTROL_PREFIX``; in an update the same names hold ``c + (c_i+ - c_i)``,
which is ``(x - y) / (eta a_K)``, so that an update is base plus change in all its tensors. ``c_i`` never leaves the
site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from edgeflame.methods import CONTROL_PREFIX, accumulated_steps
from trainer.objectives.fade import fade
from trainer.objectives.interface import LocalObjective, ObjectiveContext, ObjectiveResult


def scaffold(setting: ObjectiveContext) -> LocalObjective:
    """FADE with corrected gradients."""
    training = setting.training

    def learning_rate(name: str) -> float:
        return training.discriminator_learning_rate if name.startswith("discriminator.") else training.learning_rate

    variates = ControlVariates(
        dict(setting.model.named_parameters()),
        shared=setting.model.extra_tensors,
        own=setting.private,
        learning_rate=learning_rate,
        momentum=training.momentum,
    )
    return LocalObjective(
        losses=fade(setting).losses, correct_gradients=variates.correct_gradients, finish=variates.finish
    )


class ControlVariates:
    """A round's control variates of one site.

    Args:
        parameters: in training, where the round starts.
        shared: ``c``, by ``CONTROL_PREFIX`` + name.
        own: ``c_i`` likewise; zeros for what is not there, as in a site's first round.
        learning_rate: of a parameter, by its name.
        momentum: of the optimiser.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        learning_rate: Callable[[str], float],
        momentum: float,
    ) -> None:
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._shared = shared
        self._own = own
        self._start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        # c - c_i
        self._corrections: dict[str, Tensor] = {}
        for name, start in self._start.items():
            correction = shared[CONTROL_PREFIX + name].to(start.device, copy=True)
            if (mine := own.get(CONTROL_PREFIX + name)) is not None:
                correction -= mine.to(start.device)
            self._corrections[name] = correction

    def correct_gradients(self) -> None:
        """Take out of the gradients what is particular to the site, and put in what is common to all."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(self._corrections[name])

    def finish(self, num_steps: int) -> ObjectiveResult:
        """What is sent, and the new ``c_i``. Without a step nothing was learnt of the gradients, and both stay."""
        if num_steps == 0:
            return ObjectiveResult(extra_tensors=self._shared, private=self._own)
        steps = accumulated_steps(num_steps, self._momentum)
        extra_tensors: dict[str, Tensor] = {}
        private: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            moved = (self._start[name] - parameter.detach()) / (self._learning_rate(name) * steps)
            extra_tensors[CONTROL_PREFIX + name] = moved
            private[CONTROL_PREFIX + name] = moved - self._corrections[name]
        return ObjectiveResult(extra_tensors=extra_tensors, private=private)
