"""What a local objective is: a loss over batches, and what it may do around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeflame.learning import Training
from trainer.backbone import EmbeddingNetwork
from trainer.model import SiteModel
from trainer.precision import Autocast, full_precision
from trainer.teacher import Teacher

TOTAL = "loss"
"""The term that is minimised; others are reported."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch.

    Attributes:
        indices: which images; an index means the same image in every epoch.
        rgb: ``[B, 3, H, W]`` float32, 0..255.
        embeddings: ``[B, C, h, w]`` float32 of the network in training.
    """

    indices: Sequence[int]
    rgb: Tensor
    embeddings: Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an objective may build on.

    Attributes:
        model: the one in training; as long as no step was taken, the one every site started the round from.
        training: its configuration.
        generator: of random numbers, on the model's device.
        global_network: the backbone every site started the round from, frozen.
        historical_network: the site's own of the last round it trained in; None in its first.
        private: what the objective kept at this site in the last round that counted; empty in its first.
        autocast: how networks are run, the one in training and frozen ones alike.
    """

    model: SiteModel
    training: Training
    generator: torch.Generator
    global_network: EmbeddingNetwork | None = None
    historical_network: EmbeddingNetwork | None = None
    private: Mapping[str, Tensor] = field(default_factory=dict)
    autocast: Autocast = full_precision


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What an objective leaves behind when a training ends, tensors by name.

    Attributes:
        travelling: sent along with the model; the same names and shapes as ``SiteModel.travelling``.
        private: kept at the site for its next round, never sent.
    """

    travelling: Mapping[str, Tensor] = field(default_factory=dict)
    private: Mapping[str, Tensor] = field(default_factory=dict)


def _nothing() -> None:
    pass


def _leave_nothing(num_steps: int) -> Ending:
    del num_steps
    return Ending()


@dataclass(frozen=True, kw_only=True)
class LocalObjective:
    """What a site minimises; all but the loss is optional.

    Attributes:
        losses: scalar terms by name; ``loss`` is the one to minimise.
        correct_gradients: called when the gradients are there, before the optimiser's step.
        after_epoch: called after every epoch.
        finish: called once after the last step, with the number of steps.
        teachers: frozen networks it asks, for the count of forward passes.
    """

    losses: Callable[[Step], dict[str, Tensor]]
    correct_gradients: Callable[[], None] = _nothing
    after_epoch: Callable[[], None] = _nothing
    finish: Callable[[int], Ending] = _leave_nothing
    teachers: tuple[Teacher, ...] = ()

    @property
    def num_teacher_forward(self) -> int:
        """Images sent through frozen networks so far."""
        return sum(teacher.num_forward for teacher in self.teachers)


Objective = Callable[[Setting], LocalObjective]
"""An entry of the registry: makes the objective of one training."""
