"""What a local objective is: a loss over batches, and what it may do around them; and frozen teacher networks.

A teacher is a frozen network that the model in training is compared with, each image embedded once a round. During a
round the teachers do not change and images are not augmented, so their outputs for an image are the same in all epochs:
of ``3 E`` forward passes of a round of ``E`` epochs with two teachers, ``E + 2`` remain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeflame.methods import Training
from trainer.backbone import EmbeddingNetwork
from trainer.device import Autocast, full_precision
from trainer.model import SiteModel

MAX_TEACHER_CACHE_BYTES = 1 << 29
"""Kept per teacher: 862 images at the default 1024 x 152. The rest is computed again in every epoch."""


class Teacher:
    """A frozen network's outputs, computed once per image and kept within a memory budget, on its device.

    Attributes:
        num_forward: images sent through the network so far.
    """

    def __init__(
        self,
        network: EmbeddingNetwork,
        answer: Callable[[Tensor], Tensor],
        *,
        autocast: Autocast = full_precision,
        max_cache_bytes: int = MAX_TEACHER_CACHE_BYTES,
    ) -> None:
        """Compute nothing yet.

        Args:
            network: is set to evaluation, and never trained.
            answer: computes the outputs ``[B, ...]`` that are kept from embeddings ``[B, C, h, w]`` float32.
            autocast: how the network is run.
            max_cache_bytes: of all outputs kept.
        """
        self.num_forward = 0
        self._network = network.eval().requires_grad_(False)
        self._answer = answer
        self._autocast = autocast
        self._room_bytes = max_cache_bytes
        self._cache: dict[int, Tensor] = {}

    def answers(self, indices: Sequence[int], rgb: Tensor) -> Tensor:
        """The outputs ``[B, ...]`` for the images ``indices``, whose pixels are ``rgb [B, 3, H, W]``."""
        missing = [position for position, index in enumerate(indices) if index not in self._cache]
        computed: dict[int, Tensor] = {}
        if missing:
            self.num_forward += len(missing)
            with torch.no_grad():
                with self._autocast():
                    embeddings = self._network(rgb[missing])
                fresh = self._answer(embeddings.float())
            computed = {indices[position]: fresh[row] for row, position in enumerate(missing)}
        found = torch.stack([computed[index] if index in computed else self._cache[index] for index in indices])
        for index, value in computed.items():
            size_bytes = value.numel() * value.element_size()
            if size_bytes <= self._room_bytes:
                self._room_bytes -= size_bytes
                self._cache[index] = value.clone()  # a view would keep the whole batch alive
        return found


TOTAL = "loss"
"""The term that is minimised; others are reported."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
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
class ObjectiveContext:
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
class ObjectiveResult:
    """The tensors, by name, that an objective hands on when a training ends.

    Attributes:
        extra_tensors: sent along with the model; the same names and shapes as ``SiteModel.extra_tensors``.
        private: kept at the site for its next round, never sent.
    """

    extra_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    private: Mapping[str, Tensor] = field(default_factory=dict)


def _do_nothing() -> None:
    pass


def _empty_result(num_steps: int) -> ObjectiveResult:
    del num_steps
    return ObjectiveResult()


@dataclass(frozen=True, kw_only=True)
class LocalObjective:
    """What a site minimises; all but the loss is optional.

    Attributes:
        losses: scalar terms by name; ``loss`` is the one to minimise.
        correct_gradients: called when the gradients are there, before the optimiser's step.
        after_epoch: called after every epoch.
        finish: called once after the last step, with the number of steps.
        teachers: the frozen networks it uses; their forward passes are counted.
    """

    losses: Callable[[TrainingBatch], dict[str, Tensor]]
    correct_gradients: Callable[[], None] = _do_nothing
    after_epoch: Callable[[], None] = _do_nothing
    finish: Callable[[int], ObjectiveResult] = _empty_result
    teachers: tuple[Teacher, ...] = ()

    @property
    def num_teacher_forward(self) -> int:
        """Images sent through frozen networks so far."""
        return sum(teacher.num_forward for teacher in self.teachers)


ObjectiveFactory = Callable[[ObjectiveContext], LocalObjective]
"""An entry of the registry: makes the objective of one training."""
