"""The embedding network: a timm feature network, its maps on one grid (FLAME Eq. 13, 19).

Axes: N images, C embedding channels, h x w the patch grid (P = h * w positions).
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflame.console import EventLog
from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing
from edgeflame.learning import Backbone
from edgeflame.package import WeightsOrigin

log = EventLog("backbone")

LITE_PREFIX = "tf_efficientnet_lite"
LITE_MEAN, LITE_STD = 127.0, 128.0
"""The Lite family was trained on (x - 127) / 128; timm's own configuration says 127.5."""


class EmbeddingNetwork(nn.Module):
    """RGB images to patch embeddings; normalisation is inside, so that an export carries it along.

    Stage maps are resized (bilinear, half-pixel centres, no antialias) to the finest chosen grid and concatenated
    over channels. Each embedding is then averaged with its neighbours (as in PatchCore, arXiv 2106.08265): a part
    that lies a few pixels off matters less. Built without weights: :func:`build_network` loads them.

    Attributes:
        grid: h and w for the input size it was built for.
        num_channels: C.

    Raises:
        ConfigError: timm does not know the network, or it lacks one of the stages.
    """

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = _feature_network(backbone)
        self._neighbourhood = backbone.neighbourhood
        stages: Any = self.network.feature_info
        finest = min(stages.reduction())
        self.grid = (preprocessing.height // finest, preprocessing.width // finest)
        self.num_channels = int(sum(stages.channels()))
        mean, std = _normalisation(backbone.name)
        # Constants of the architecture, not weights: they are never exchanged.
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, rgb: Tensor) -> Tensor:
        """Embed images.

        Args:
            rgb: ``[N, 3, H, W]`` float32, 0..255.

        Returns:
            ``[N, C, h, w]`` float32.
        """
        maps = self.network((rgb - self.mean) / self.std)
        size = max((stage.shape[-2:] for stage in maps), key=lambda shape: shape[0] * shape[1])
        resized = [
            stage
            if stage.shape[-2:] == size
            else functional.interpolate(stage, size=size, mode="bilinear", align_corners=False, antialias=False)
            for stage in maps
        ]
        embeddings = torch.cat(resized, dim=1)
        side = self._neighbourhood
        if side == 1:
            return embeddings
        # At the border the mean is over the neighbours there are.
        return functional.avg_pool2d(embeddings, side, stride=1, padding=side // 2, count_include_pad=False)


def build_network(
    backbone: Backbone, preprocessing: Preprocessing, *, seed: int
) -> tuple[EmbeddingNetwork, WeightsOrigin]:
    """The network with the weights that ``backbone.weights`` asks for, and where they came from.

    Args:
        backbone: which network and weights.
        preprocessing: the input size.
        seed: of random weights, if those were asked for.

    Raises:
        ConfigError: the network is unknown.
        DataError: a weights file cannot be read or does not fit.
        MissingDependencyError: no weights can be had.
    """
    from trainer.weights import load_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = EmbeddingNetwork(backbone, preprocessing)
    origin = load_weights(network.network, backbone)
    log.info("backbone", name=backbone.name, stages=list(backbone.stages), weights=origin.source)
    network.eval()
    return network.to(memory_format=torch.channels_last), origin


def _feature_network(backbone: Backbone) -> nn.Module:
    if not timm.is_model(backbone.name):
        near = ", ".join(timm.list_models(f"*{backbone.name}*")[:5]) or "tf_efficientnet_lite0, resnet18"
        msg = f"unknown backbone {backbone.name!r}; timm knows for instance {near}"
        raise ConfigError(msg)
    try:
        network = timm.create_model(backbone.name, features_only=True, out_indices=backbone.stages, pretrained=False)
    except (AssertionError, IndexError, ValueError, RuntimeError) as exc:
        msg = f"backbone {backbone.name} has no feature stages {list(backbone.stages)} ({exc})"
        raise ConfigError(msg) from exc
    assert isinstance(network, nn.Module)
    _drop_unused_stages(network, max(backbone.stages))
    return network


def _drop_unused_stages(network: nn.Module, last_stage: int) -> None:
    # timm prunes residual networks itself, but runs EfficientNet's later blocks only to discard them.
    blocks = getattr(network, "blocks", None)
    info = getattr(network, "feature_info", None)
    if not isinstance(blocks, nn.Sequential) or info is None:
        return
    module = info.info[last_stage]["module"]
    if module.startswith("blocks."):
        network.blocks = blocks[: int(module.split(".")[1]) + 1]


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the input, in units of 0..255."""
    if name.startswith(LITE_PREFIX):
        return (LITE_MEAN,) * 3, (LITE_STD,) * 3
    config: Any = timm.get_pretrained_cfg(name)
    return tuple(255.0 * value for value in config.mean), tuple(255.0 * value for value in config.std)
