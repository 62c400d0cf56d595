"""Vision transformers as backbones: patches as the grid, weights of another size, one graph that computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from edge.runtimes.load import open_runtime
from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing
from edgeflame.methods import Backbone
from edgeflame.statistics.gaussian import fit_gaussian, smooth_maps
from edgeflame.statistics.moments import MomentAccumulator
from export.network import scoring_graph
from trainer.backbone import build_network
from trainer.device import rgb_tensor
from trainer.embedding import embed

SMALL = Preprocessing(height=64, width=96)
NAME = "vit_tiny_patch16_224"


def test_the_graph_of_a_transformer_scores_as_torch_does() -> None:
    network, _ = build_network(Backbone(name=NAME, stages=(2, 4), weights="random"), SMALL, seed=3)
    assert (network.grid, network.num_channels) == ((4, 6), 384)
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    embeddings = embed(network, rgb_tensor(images, torch.device("cpu")))
    accumulator = MomentAccumulator()
    accumulator.add(embeddings[:10])
    statistics = fit_gaussian(accumulator.moments(), grid=network.grid, rank=4, ridge=0.3, radius=1).as_stored()
    graph = scoring_graph(network, statistics, preprocessing=SMALL, smoothing_sigma=1.0, metadata={})
    scored = open_runtime(graph, device="cpu", num_threads=1).score(images[10:])
    expected = smooth_maps(statistics.distances(embeddings[10:].astype(np.float64)).reshape(-1, *network.grid), 1.0)
    np.testing.assert_allclose(scored.scores, expected.max(axis=(1, 2)), rtol=5e-3)
    np.testing.assert_allclose(scored.maps, expected, rtol=5e-3)


def test_weights_of_a_transformer_fit_another_input_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(NAME, pretrained=False)
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(whole.state_dict(), path)
    backbone = Backbone(name=NAME, stages=(2,), weights=str(path))
    network, origin = build_network(backbone, Preprocessing(height=224, width=224), seed=0)
    assert origin.source == "file vit.safetensors"
    rgb = torch.rand(1, 3, 224, 224) * 255
    with torch.no_grad():
        own = network.stage_maps(rgb)[0]
        theirs = whole.forward_intermediates((rgb - network.mean) / network.std, indices=[2], intermediates_only=True)[
            0
        ]
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    # At another size only the positions' embedding is resampled.
    small, _ = build_network(backbone, SMALL, seed=0)
    assert small.grid == (4, 6)
    weights = small.network.state_dict()
    torch.testing.assert_close(weights["model.patch_embed.proj.weight"], whole.patch_embed.proj.weight.detach())
    assert weights["model.pos_embed"].shape[1] == 1 + 4 * 6


def test_an_input_that_is_no_multiple_of_the_patches_is_refused() -> None:
    backbone = Backbone(name="vit_small_patch14_dinov2", stages=(2,), weights="random")
    with pytest.raises(ConfigError, match=r"patches of 14 pixels.*multiples of 224"):
        build_network(backbone, Preprocessing(height=256, width=256), seed=0)
