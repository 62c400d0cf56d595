"""The graphs that are timed: ours in several forms, their backbones alone, and anomalib's PaDiM.

Weights of the default backbone are its installed ImageNet weights; all statistics are random, which changes no time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from boards.dataset import BoardStream
from edgeflame.errors import MissingDependencyError
from edgeflame.images import ImageU8, Preprocessing
from edgeflame.methods import Backbone
from edgeflame.statistics.gaussian import LowRankGaussian
from export.network import scoring_graph
from export.precision import backbone_model, with_precision
from trainer.backbone import build_network

SIDE, RANK = 256, 24
PREPROCESSING = Preprocessing(height=SIDE, width=SIDE)

OURS, OURS_INT8, BACKBONE = "EdgeFlame", "EdgeFlame int8", "backbone alone"
OURS_COARSE, BACKBONE_COARSE = "EdgeFlame, stage 3 alone", "stage 3's backbone alone"
PADIM, PADIM_SAME = "anomalib PaDiM, ResNet18 (default)", "anomalib PaDiM, our backbone"
"""The models' names in the tables."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A graph on disk. ``bgr``: it takes camera bytes; else normalised float32 RGB planes."""

    name: str
    path: Path
    bgr: bool


def make_models(folder: Path, images: ImageU8, *, anomalib: bool) -> list[Model]:
    """Write all graphs into a folder.

    Args:
        folder: for the files.
        images: ``[N, SIDE, SIDE, 3]``, to calibrate int8 on.
        anomalib: whether to write anomalib's models too; it has to be installed.
    """
    ours = _our_graph(Backbone(), sigma=2.0)
    coarse = _our_graph(Backbone(stages=(3,)), sigma=1.0)
    int8 = with_precision(onnx.load_from_string(ours), "int8", calibration=images).SerializeToString()
    data = {
        BACKBONE: backbone_model(ours),
        OURS: ours,
        OURS_INT8: int8,
        BACKBONE_COARSE: backbone_model(coarse),
        OURS_COARSE: coarse,
    }
    models = []
    for index, (name, content) in enumerate(data.items()):
        path = folder / f"{index}.onnx"
        path.write_bytes(content)
        models.append(Model(name=name, path=path, bgr=True))
    if anomalib:
        plain = {PADIM: ("resnet18", ["layer1", "layer2", "layer3"], None)}
        plain[PADIM_SAME] = ("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], 152)
        for name, (backbone, layers, channels) in plain.items():
            path = folder / f"{backbone}.onnx"
            _export_padim(path, backbone, layers, channels)
            models.append(Model(name=name, path=path, bgr=False))
    return models


def _our_graph(backbone: Backbone, *, sigma: float) -> bytes:
    try:
        network, _ = build_network(backbone, PREPROCESSING, seed=0)
    except MissingDependencyError:
        network, _ = build_network(Backbone(stages=backbone.stages, weights="random"), PREPROCESSING, seed=0)
    positions, channels = network.grid[0] * network.grid[1], network.num_channels
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(positions, channels, RANK)))[0]
    statistics = LowRankGaussian(
        grid=network.grid,
        count=100,
        ridge=0.01,
        mean=rng.normal(size=(positions, channels)).astype(np.float32),
        basis=np.ascontiguousarray(basis, dtype=np.float32),
        eigenvalues=np.tile(np.geomspace(10, 1, RANK, dtype=np.float32), (positions, 1)),
        residual=np.full(positions, 0.1, dtype=np.float32),
    )
    return scoring_graph(network, statistics, preprocessing=PREPROCESSING, smoothing_sigma=sigma, metadata={})


def _export_padim(path: Path, backbone: str, layers: list[str], num_channels: int | None) -> None:
    """Anomalib's own model, exported as anomalib does: raw score and map from a normalised image."""
    import torch
    from anomalib.models.image.padim.torch_model import PadimModel

    model = PadimModel(backbone=backbone, layers=layers, pre_trained=False, n_features=num_channels).eval()
    example = torch.zeros(1, 3, SIDE, SIDE)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = model.feature_extractor(example)
        positions = features[layers[0]].shape[-2] * features[layers[0]].shape[-1]
        kept = model.n_features
        model.gaussian.mean = torch.randn(kept, positions)
        model.gaussian.inv_covariance = torch.eye(kept).repeat(positions, 1, 1)
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def calibration_images(count: int = 16) -> ImageU8:
    """Photographs of generated boards."""
    stream = BoardStream(texture="warm_wood", defect_rate=0.0, image_size=SIDE)
    return np.stack([PREPROCESSING.apply(stream.part(index).image_bgr) for index in range(count)])
