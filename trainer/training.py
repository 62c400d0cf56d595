"""The one training loop: epochs over a site's images, whatever the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeflame.errors import NumericalError
from edgeflame.log import EventLog, Progress, no_progress
from edgeflame.methods import METHODS, Learning
from fitting.imageset import ImageSet
from trainer.backbone import EmbeddingNetwork
from trainer.device import Autocast, autocast_for, reproducible, rgb_tensor
from trainer.model import SiteModel
from trainer.objectives import OBJECTIVES
from trainer.objectives.interface import TOTAL, LocalObjective, ObjectiveContext, ObjectiveResult, TrainingBatch

log = EventLog("training")


CHECK_STEPS = 16
"""Steps between checks that the loss is finite. A check waits for the GPU, which otherwise works on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """How a training went.

    Attributes:
        epochs: mean of each loss term in each epoch.
        num_forward: images sent through the network in training.
        num_teacher_forward: images sent through frozen teachers.
        num_steps: optimiser steps.
        ending: what the objective leaves behind.
    """

    epochs: tuple[dict[str, float], ...]
    num_forward: int
    num_teacher_forward: int
    num_steps: int
    ending: ObjectiveResult

    def metrics(self) -> dict[str, float]:
        """Figures of the last epoch, and counts."""
        last = self.epochs[-1] if self.epochs else {}
        return {
            **last,
            "num_forward": float(self.num_forward),
            "num_teacher_forward": float(self.num_teacher_forward),
        }

    def details(self) -> dict[str, Any]:
        """All of it, for the package's provenance."""
        return {"epochs": list(self.epochs), **self.metrics()}


def train(
    model: SiteModel,
    images: ImageSet,
    learning: Learning,
    *,
    seed: int,
    global_network: EmbeddingNetwork | None = None,
    historical_network: EmbeddingNetwork | None = None,
    private: Mapping[str, Tensor] | None = None,
    progress: Progress = no_progress,
) -> TrainingRun:
    """Train ``model`` in place, its extra tensors included; the optimiser starts afresh.

    By default the backbone's batch norm keeps its statistics: a site's images are few and alike. The same arguments
    give the same weights on the same machine; on a GPU as far as torch has deterministic kernels.

    Args:
        model: on the device to train on.
        images: the site's good images.
        learning: ``method`` and ``training`` are used.
        seed: of the order of images and of the noise.
        global_network: a teacher, the model every site started from.
        historical_network: the other teacher, the site's own last model; None in its first round.
        private: what the objective kept at this site in its last round.
        progress: counts images over all epochs.

    Raises:
        NumericalError: a loss is not finite.
    """
    training = learning.training
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    setting = ObjectiveContext(
        model=model,
        training=training,
        generator=generator,
        global_network=global_network,
        historical_network=historical_network,
        private=private or {},
        autocast=(autocast := autocast_for(training.precision, device)),
    )
    name = METHODS[learning.method].objective
    assert name is not None, f"{learning.method} trains nothing"
    objective = OBJECTIVES[name](setting)
    parameters: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters())},
        {"params": list(model.discriminator.parameters()), "lr": training.discriminator_learning_rate},
    ]
    optimiser = torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    model.requires_grad_(True)
    model.backbone.train(training.batch_norm != "frozen")
    model.discriminator.train()
    epochs: list[dict[str, float]] = []
    num_forward = num_steps = 0
    with reproducible(device):
        for epoch in range(training.epochs):
            means = _EpochMeans(len(images))
            shuffled = torch.randperm(len(images), generator=order).tolist()
            for start in range(0, len(images), training.batch_size):
                indices = shuffled[start : start + training.batch_size]
                losses = _train_step(
                    model, objective, optimiser, indices, rgb_tensor(images.batch(indices), device), autocast
                )
                num_steps += 1
                means.add(losses, len(indices))
                if num_steps % CHECK_STEPS == 0:
                    means.require_finite(epoch + 1)
                num_forward += len(indices)
                progress(num_forward, training.epochs * len(images), f"epoch {epoch + 1}")
            objective.after_epoch()
            means.require_finite(epoch + 1)
            epochs.append(means.values())
            log.info("epoch", number=epoch + 1, of=training.epochs, **epochs[-1])
    model.eval()
    model.requires_grad_(False)
    ending = objective.finish(num_steps)
    model.extra_tensors = {name: tensor.detach().cpu() for name, tensor in ending.extra_tensors.items()}
    return TrainingRun(
        epochs=tuple(epochs),
        num_forward=num_forward,
        num_teacher_forward=objective.num_teacher_forward,
        num_steps=num_steps,
        ending=ending,
    )


def _train_step(
    model: SiteModel,
    objective: LocalObjective,
    optimiser: torch.optim.Optimizer,
    indices: list[int],
    rgb: Tensor,
    autocast: Autocast,
) -> dict[str, Tensor]:
    with autocast():
        embeddings = model.backbone(rgb)
    losses = objective.losses(TrainingBatch(indices=indices, rgb=rgb, embeddings=embeddings.float()))
    optimiser.zero_grad(set_to_none=True)
    losses[TOTAL].backward()  # type: ignore[no-untyped-call]
    objective.correct_gradients()
    optimiser.step()
    return losses


class _EpochMeans:
    """Loss terms of an epoch; they stay on their device until :meth:`values`."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self._terms: dict[str, list[Tensor]] = {}
        self._counts: list[int] = []

    def add(self, losses: Mapping[str, Tensor], count: int) -> None:
        for name, value in losses.items():
            self._terms.setdefault(name, []).append(value.detach())
        self._counts.append(count)

    def require_finite(self, epoch: int) -> None:
        totals = torch.stack(self._terms[TOTAL][-CHECK_STEPS:]).cpu()
        wrong = totals[~torch.isfinite(totals)]
        if len(wrong):
            raise NumericalError(
                f"the loss became {wrong[0].item()} in epoch {epoch}; try a lower training.learning_rate"
            )

    def values(self) -> dict[str, float]:
        counts = torch.tensor(self._counts, dtype=torch.float64)
        return {
            name: float(torch.stack(values).cpu().double() @ counts) / self._num_images
            for name, values in self._terms.items()
        }
