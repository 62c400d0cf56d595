"""PaDiM, PatchCore and CS-Flow from anomalib, with our backbone's weights where its API takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.data import prepare_site_data
from aggregator.simulation.run import METRICS_FILE
from edgeflame.dataset import open_dataset
from edgeflame.images import ImageU8
from edgeflame.log import no_progress
from edgeflame.methods import Backbone, Learning
from edgeflame.state import write_json
from edgeflame.tensors import F32
from fitting.evaluation import ScoreFunction, evaluate
from fitting.imageset import ImageSet
from trainer.backbone import build_network
from trainer.device import pick_device, rgb_tensor
from trainer.measuring import measure_answer

PEERS = ("padim", "patchcore", "csflow")
CORESET = 0.1
"""PatchCore's share of embeddings kept, anomalib's default."""
CSFLOW_EPOCHS = 240
"""Epochs by anomalib's default."""
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BATCH = 16


def measure_peer(name: str, config: SimulationConfig, out: Path) -> None:
    """Fit a peer to all the training images of a one-site simulation, and measure it on its test part."""
    out.mkdir(parents=True, exist_ok=True)
    layout = prepare_site_data(config, out, no_progress)
    learning = config.fleet.learning
    records = [record for site in layout.sites for record in open_dataset(out / site.data).train]
    score = fit_peer(name, ImageSet(records, learning.input), learning)
    test = open_dataset(out / layout.common)
    answer = measure_answer(name, evaluate(score, test, learning.input, threshold=0.0, num_resamples=0))
    one = {"figures": answer.figures, "classes": answer.classes}
    write_json(out / METRICS_FILE, {"rounds": [], "sites": {"all": one}})


def fit_peer(name: str, images: ImageSet, learning: Learning) -> ScoreFunction:
    """Fit a peer to good images; what scores others."""
    seed = learning.seed
    torch.manual_seed(seed)
    device = pick_device("auto")
    batches = [
        rgb_tensor(images.batch(range(start, min(start + BATCH, len(images)))), device)
        for start in range(0, len(images), BATCH)
    ]
    fitted: Any
    if name == "csflow":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        fitted = _csflow([_normal(rgb, mean, std) for rgb in batches], (learning.input.height, learning.input.width))
    else:
        fitted, mean, std = _with_our_weights(name, learning.backbone, learning.input, seed)
        fitted.to(device).train()
        # Only the memory is filled: the backbone stays in evaluation mode, as anomalib keeps it.
        fitted.feature_extractor.eval()
        with torch.no_grad():
            for rgb in batches:
                fitted(_normal(rgb, mean, std))
        if name == "padim":
            fitted.fit()
        else:
            fitted.subsample_embedding(CORESET)
    fitted.eval()

    def score(batch: ImageU8) -> tuple[F32, F32]:
        with torch.no_grad():
            result = fitted(_normal(rgb_tensor(batch, device), mean, std))
        maps = result.anomaly_map.reshape(len(batch), *result.anomaly_map.shape[-2:])
        return np.asarray(result.pred_score.reshape(-1).cpu()), np.asarray(maps.float().cpu())

    return score


def _with_our_weights(
    name: str, backbone: Backbone, preprocessing: Any, seed: int
) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    ours, _ = build_network(backbone, preprocessing, seed=seed)
    stages = timm_modules(backbone)
    common = {"backbone": backbone.name, "layers": stages, "pre_trained": False}
    model = PadimModel(**common, n_features=ours.num_channels) if name == "padim" else PatchcoreModel(**common)
    theirs = model.feature_extractor.feature_extractor
    weights = ours.network.state_dict()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    # Ours ends with the last stage that is used; whatever else theirs has, it does not use.
    last = max(int(stage.split(".")[1]) for stage in stages) if stages[0].startswith("blocks.") else None
    used = [key for key in missing if last is None or not _after(key, last)]
    if unexpected or used:
        raise RuntimeError(
            f"{backbone.name}: anomalib's network has other tensors than ours, for instance {(unexpected + used)[0]}"
        )
    mean, std = (tuple(one.flatten().tolist()) for one in (ours.mean, ours.std))
    return model, mean, std


def timm_modules(backbone: Backbone) -> list[str]:
    """The names anomalib has for the stages."""
    import timm

    info = timm.create_model(backbone.name, features_only=True, pretrained=False).feature_info.info
    if backbone.taps.layers:
        raise RuntimeError(f"anomalib takes ends of stages; for {backbone.name} give backbone.stages")
    return [info[stage]["module"] for stage in backbone.taps.stages]


def _after(key: str, last_block: int) -> bool:
    parts = key.split(".")
    return parts[0] == "blocks" and int(parts[1]) > last_block


def _csflow(batches: list[Tensor], size: tuple[int, int]) -> Any:
    from anomalib.models.image.csflow.loss import CsFlowLoss
    from anomalib.models.image.csflow.torch_model import CsFlowModel

    # Its extractor is torchvision's EfficientNet-B5, whose weights it downloads.
    model = CsFlowModel(input_size=size, cross_conv_hidden_channels=1024).to(batches[0].device)
    # Optimiser and clipping as in anomalib's Lightning module.
    optimiser = torch.optim.Adam(model.graph.parameters(), lr=2e-4, eps=1e-4, weight_decay=1e-5, betas=(0.5, 0.9))
    model.train()
    model.feature_extractor.eval()
    for _ in range(CSFLOW_EPOCHS):
        for batch in batches:
            optimiser.zero_grad()
            CsFlowLoss()(*model(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.graph.parameters(), 1.0)
            optimiser.step()
    return model


def _normal(rgb: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    like = {"device": rgb.device}
    return (rgb - torch.tensor(mean, **like).reshape(1, 3, 1, 1)) / torch.tensor(std, **like).reshape(1, 3, 1, 1)
