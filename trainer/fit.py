"""Fitting one site's model in torch: :func:`fitting.fit.fit` with the learner of its method."""

from __future__ import annotations

from typing import Any

import torch

from edgeflame.dataset import Dataset
from edgeflame.methods import Learning
from fitting.fit import FittedModel
from fitting.fit import fit as fit_with
from trainer.device import keep_freed_memory
from trainer.exchange import TrainedModel, open_learner


def fit(
    dataset: Dataset, learning: Learning, *, device: torch.device | None = None, **options: Any
) -> FittedModel[TrainedModel]:
    """Fit a model from the good training images of a data set; its network is then on the CPU.

    Args:
        dataset: its good training images are used.
        learning: the settings.
        device: to train on; the CPU by default.
        options: those of :func:`fitting.fit.fit`, which also says what this raises.
    """
    keep_freed_memory()
    fitted = fit_with(dataset, learning, open_learner(learning, device or torch.device("cpu")), **options)
    fitted.model.network.cpu()
    return fitted
