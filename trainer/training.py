"""The one training loop: epochs over a site's images, whatever the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgeflame.console import EventLog, Progress, no_progress
from edgeflame.errors import NumericalError
from edgeflame.learning import METHODS, Learning
from trainer.backbone import EmbeddingNetwork
from trainer.imageset import ImageSet, rgb_tensor
from trainer.model import SiteModel
from trainer.objectives import OBJECTIVES, TOTAL, Setting, Step

log = EventLog("training")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """How a training went.

    Attributes:
        epochs: mean of each loss term in each epoch.
        num_forward: images sent through the network in training.
        num_teacher_forward: images sent through frozen teachers.
        num_steps: optimiser steps.
    """

    epochs: tuple[dict[str, float], ...]
    num_forward: int
    num_teacher_forward: int
    num_steps: int

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
    progress: Progress = no_progress,
) -> TrainingRun:
    """Train ``model`` in place; the optimiser starts afresh.

    Batch norm of the backbone keeps its statistics: a site's images are too few and too alike to estimate them.
    The same arguments give the same weights on the same machine.

    Args:
        model: on the device to train on.
        images: the site's good images.
        learning: ``method`` and ``training`` are used.
        seed: of order and noise.
        global_network: FLAME's teacher, the model every site started from.
        historical_network: FLAME's other teacher, None in a site's first round.
        progress: counts images over all epochs.

    Raises:
        NumericalError: a loss is not finite.
    """
    training = learning.training
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    setting = Setting(
        model=model,
        training=training,
        generator=generator,
        global_network=global_network,
        historical_network=historical_network,
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
    model.backbone.eval()
    model.discriminator.train()
    epochs: list[dict[str, float]] = []
    num_forward = num_steps = 0
    for epoch in range(training.epochs):
        sums: dict[str, float] = {}
        shuffled = torch.randperm(len(images), generator=order).tolist()
        for start in range(0, len(images), training.batch_size):
            indices = shuffled[start : start + training.batch_size]
            rgb = rgb_tensor(images.batch(indices), device)
            losses = objective.losses(Step(indices=indices, rgb=rgb, embeddings=model.backbone(rgb)))
            if not torch.isfinite(losses[TOTAL]):
                msg = f"the loss became {losses[TOTAL].item()} in epoch {epoch + 1}; try a lower training.learning_rate"
                raise NumericalError(msg)
            optimiser.zero_grad(set_to_none=True)
            losses[TOTAL].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            num_steps += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(indices)
            num_forward += len(indices)
            progress(num_forward, training.epochs * len(images), f"epoch {epoch + 1}")
        epochs.append({name: value / len(images) for name, value in sums.items()})
        log.info("epoch", number=epoch + 1, of=training.epochs, **epochs[-1])
    model.eval()
    model.requires_grad_(False)
    return TrainingRun(
        epochs=tuple(epochs),
        num_forward=num_forward,
        num_teacher_forward=objective.num_teacher_forward,
        num_steps=num_steps,
    )
