"""The embedding network: a timm feature network, its maps on one grid (FLAME Eq. 13, 19).

Axes: N images, C embedding channels, h x w the patch grid (P = h * w positions).
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing
from edgeflame.log import EventLog
from edgeflame.methods import MOMENT_BUDGET_BYTES, Backbone
from edgeflame.package import WeightsOrigin

log = EventLog("backbone")

LITE_PREFIX = "tf_efficientnet_lite"
LITE_MEAN, LITE_STD = 127.0, 128.0
"""The Lite family was trained on (x - 127) / 128; timm's own configuration says 127.5."""


class EmbeddingNetwork(nn.Module):
    """RGB images to patch embeddings; normalisation is inside, so that an export carries it along.

    Stage maps are resized (bilinear, half-pixel centres, no antialias) to the finest chosen grid and concatenated
    over channels. Each embedding is then averaged with its neighbours (as in PatchCore, arXiv 2106.08265): a part
    that lies a few pixels off matters less. An embedding that is too wide for its statistics is reduced by a random
    semi-orthogonal projection, which the configuration fixes. Built without weights: :func:`build_network` loads them.

    Attributes:
        grid: h and w for the input size it was built for.
        num_channels: C.
        num_tapped_channels: of the maps together; more than C where they are projected.

    Raises:
        ConfigError: timm does not know the network, or it lacks one of the stages.
    """

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, channels, reductions = _feature_network(backbone, preprocessing)
        self._neighbourhood = backbone.neighbourhood
        finest = min(reductions)
        if preprocessing.height % finest or preprocessing.width % finest:
            raise ConfigError(
                f"backbone {backbone.name} looks at patches of {finest} pixels: input.height and input.width must be "
                f"multiples of {math.lcm(finest, 32)}, not {preprocessing.height} and {preprocessing.width}"
            )
        self.grid = (preprocessing.height // finest, preprocessing.width // finest)
        self.num_tapped_channels = sum(channels)
        self.num_channels = _num_kept(backbone, self.num_tapped_channels, self.grid[0] * self.grid[1])
        self._num_projections = 0
        if self.num_channels < self.num_tapped_channels:
            self._num_projections = len(channels)
            projection = projection_matrix(self.num_tapped_channels, self.num_channels, backbone.projection_seed)
            # Made anew from the configuration, never exchanged.
            for number, part in enumerate(torch.split(projection, channels, dim=1)):
                self.register_buffer(f"projection_{number}", part[:, :, None, None].contiguous(), persistent=False)
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
        stages = [self.on_grid(stage) for stage in self.stage_maps(rgb)]
        return torch.stack(stages).sum(dim=0) if self.sums_stages else torch.cat(stages, dim=1)

    @property
    def sums_stages(self) -> bool:
        """Embeddings are the sum of the stages on the grid, not their concatenation over channels."""
        return self._num_projections > 0

    def stage_maps(self, rgb: Tensor) -> list[Tensor]:
        """The maps of the chosen stages, each ``[N, C_s, h_s, w_s]``, for ``rgb`` as in forward."""
        maps: list[Tensor] = self.network((rgb - self.mean) / self.std)
        if not self._num_projections:
            return maps
        # Before they are resized: projecting and resizing commute, and this way the wide map is never made.
        return [functional.conv2d(stage, self.get_buffer(f"projection_{number}")) for number, stage in enumerate(maps)]

    def on_grid(self, stage: Tensor) -> Tensor:
        """A stage's map, resized to the grid and averaged with its neighbours: ``[N, C_s, h, w]``.

        Channel by channel, linear, and rows apart from columns: an export may write it as two matrix products.
        """
        if stage.shape[-2:] != self.grid:
            stage = functional.interpolate(stage, size=self.grid, mode="bilinear", align_corners=False, antialias=False)
        side = self._neighbourhood
        if side == 1:
            return stage
        # At the border the mean is over the neighbours there are.
        return functional.avg_pool2d(stage, side, stride=1, padding=side // 2, count_include_pad=False)


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
    log.info(
        "backbone",
        name=backbone.name,
        taps=str(backbone.taps),
        channels=network.num_channels,
        tapped_channels=network.num_tapped_channels,
        weights=origin.source,
    )
    network.eval()
    return network.to(memory_format=torch.channels_last), origin


def projection_matrix(num_in: int, num_out: int, seed: int) -> Tensor:
    """A random matrix with orthonormal rows, ``[num_out, num_in]`` float32; the same for the same arguments.

    The Q factor of a Gaussian matrix, its signs fixed by R's diagonal, is uniform over such matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(num_in, num_out, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    projection: Tensor = (q * r.diagonal().sign()).T.float()
    return projection


def _num_kept(backbone: Backbone, num_channels: int, positions: int) -> int:
    if backbone.channels == "all":
        return num_channels
    if backbone.channels == "auto":
        return min(num_channels, math.isqrt(MOMENT_BUDGET_BYTES // (8 * positions)))
    if backbone.channels > num_channels:
        raise ConfigError(
            f"backbone.channels is {backbone.channels}, but {backbone.taps} of {backbone.name} have {num_channels}"
        )
    return backbone.channels


def _feature_network(backbone: Backbone, preprocessing: Preprocessing) -> tuple[nn.Module, list[int], list[int]]:
    """A network that gives the tapped maps, their channels, and by how much each is smaller than the input."""
    if not timm.is_model(backbone.name):
        near = ", ".join(timm.list_models(f"*{backbone.name}*")[:5]) or "tf_efficientnet_lite0, resnet18"
        raise ConfigError(f"unknown backbone {backbone.name!r}; timm knows for instance {near}")
    taps = backbone.taps
    if taps.layers:
        blocks = BlockFeatures(backbone.name, taps.layers)
        return blocks, blocks.channels, blocks.reductions
    # A transformer's positions are those of one input size.
    fixed = getattr(timm.get_pretrained_cfg(backbone.name), "fixed_input_size", False)
    size: dict[str, Any] = {"img_size": (preprocessing.height, preprocessing.width)} if fixed else {}
    try:
        network = timm.create_model(
            backbone.name, features_only=True, out_indices=taps.stages, pretrained=False, **size
        )
    except (AssertionError, IndexError, ValueError, RuntimeError) as exc:
        raise ConfigError(f"backbone {backbone.name} has no feature stages {list(taps.stages)} ({exc})") from exc
    assert isinstance(network, nn.Module)
    _drop_unused_stages(network, max(taps.stages))
    info: Any = network.feature_info
    return network, [int(count) for count in info.channels()], [int(factor) for factor in info.reduction()]


class BlockFeatures(nn.Module):
    """Maps after single blocks of a timm EfficientNet, counted through all its stages from 0; the rest is dropped.

    timm's own feature networks give the ends of stages only; B5's layer 20 is the first block of its fifth. Tensors
    have timm's names.

    Attributes:
        channels: of each map.
        reductions: input size over map size.

    Raises:
        ConfigError: not an EfficientNet, or it has fewer blocks.
    """

    def __init__(self, name: str, layers: tuple[int, ...]) -> None:
        super().__init__()
        full: Any = timm.create_model(name, pretrained=False)
        stages = getattr(full, "blocks", None)
        if not hasattr(full, "conv_stem") or not isinstance(stages, nn.Sequential):
            raise ConfigError(f"backbone.layers are counted in EfficientNets; {name} is none, give backbone.stages")
        depths = [len(stage) for stage in stages]  # type: ignore[arg-type]  # a Sequential of Sequentials
        if layers[-1] >= sum(depths):
            raise ConfigError(f"{name} has blocks 0 to {sum(depths) - 1}, not {layers[-1]}")
        self.conv_stem: nn.Module = full.conv_stem
        self.bn1: nn.Module = full.bn1
        self.blocks = nn.Sequential()
        left = layers[-1] + 1
        for stage, depth in zip(stages, depths, strict=True):
            if left > 0:
                self.blocks.append(stage[:left])  # type: ignore[index]  # see above
            left -= depth
        self._layers = layers
        self.eval()
        side = 64
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, side, side))
        self.channels = [int(one.shape[1]) for one in maps]
        self.reductions = [side // int(one.shape[2]) for one in maps]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images ``[N, 3, H, W]`` to the maps."""
        x = self.bn1(self.conv_stem(x))
        maps: list[Tensor] = []
        number = 0
        for stage in self.blocks:
            for block in stage:  # type: ignore[attr-defined]  # see above
                x = block(x)
                if number in self._layers:
                    maps.append(x)
                number += 1
        return maps


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
