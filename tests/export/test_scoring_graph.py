"""The exported graph against the network and a float64 reference, and its contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgeflame.errors import DataError, NumericalError
from edgeflame.images import Preprocessing
from edgeflame.methods import Backbone
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import LowRankGaussian, smooth_maps
from edgeflame.statistics.memory import MemoryStatistics
from export.builder import fold_constants
from export.distances import MAX_ERROR, single_product_error, takes_one_product
from export.graph import complete_graph
from export.network import scoring_graph
from tests.support.small_package import (
    GRID,
    PREPROCESSING,
    SIZE,
    bad_image,
    embed,
    good_image,
    memory_statistics,
    random_gaussian,
    small_embedding_graph,
    small_network,
)

IMAGES = np.stack([good_image(1), bad_image(2), good_image(3)])

RELATIVE_TOLERANCE = 1e-4
"""Float32 against float64; 1e-5 is typical."""


def export(network: object, statistics: PackageStatistics, **options: object) -> bytes:
    arguments = {"preprocessing": PREPROCESSING, "smoothing_sigma": 1.0, "metadata": {"key": "value"}, **options}
    return scoring_graph(network, statistics, **arguments)  # type: ignore[arg-type]


def small_graph(
    statistics: PackageStatistics, *, smoothing_sigma: float = 1.0, network: Callable[[], object] = small_network
) -> bytes:
    """The same for the small network or another on such images, which is exported once for all tests."""
    base = small_embedding_graph(network)
    return complete_graph(base, statistics, smoothing_sigma=smoothing_sigma, metadata={"key": "value"})


def run(graph: bytes, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    scores, maps = session.run(["score", "anomaly_map"], {"image": images})
    return scores, maps


def reference(network: object, statistics: LowRankGaussian, images: np.ndarray, sigma: float) -> np.ndarray:
    distances = statistics.distances(embed(network, images).astype(np.float64))
    return smooth_maps(distances.reshape(-1, *statistics.grid), sigma)


def small_statistics(rank: int = 3) -> LowRankGaussian:
    mean = embed(small_network(), IMAGES[:1])[0] + 0.1
    return random_gaussian(grid=(GRID, GRID), channels=6, rank=rank, mean=mean)


@pytest.fixture(scope="module")
def graph() -> bytes:
    return export(small_network(), small_statistics())


@pytest.mark.parametrize("batch", [1, 3])
def test_it_agrees_with_a_float64_reference(graph: bytes, batch: int) -> None:
    scores, maps = run(graph, IMAGES[:batch])
    expected = reference(small_network(), small_statistics(), IMAGES[:batch], sigma=1.0)
    np.testing.assert_allclose(maps, expected, rtol=RELATIVE_TOLERANCE)
    np.testing.assert_allclose(scores, expected.max(axis=(1, 2)), rtol=RELATIVE_TOLERANCE)
    assert scores.dtype == maps.dtype == np.float32


@pytest.mark.parametrize(("rank", "sigma"), [(0, 0.0), (5, 2.0)])
def test_any_rank_and_smoothing(rank: int, sigma: float) -> None:
    statistics = small_statistics(rank)
    _, maps = run(small_graph(statistics, smoothing_sigma=sigma), IMAGES)
    np.testing.assert_allclose(
        maps, reference(small_network(), statistics, IMAGES, sigma), rtol=RELATIVE_TOLERANCE, atol=1e-5
    )


@pytest.mark.parametrize(
    "backbone",
    [
        Backbone(weights="random"),
        Backbone(name="resnet18", weights="random", channels=40),
        Backbone(name="test_efficientnet", layers=(1, 2, 3), weights="random", channels=30),
    ],
    ids=["lite", "projected", "blocks"],
)
def test_the_trained_network_and_the_exported_one_agree(backbone: Backbone) -> None:
    """Each family's normalisation, taps and projection are inside the graph."""
    from trainer.backbone import build_network

    preprocessing = Preprocessing(height=64, width=96)
    network, _ = build_network(backbone, preprocessing, seed=1)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    embeddings = embed(network, images)
    statistics = random_gaussian(
        grid=network.grid, channels=network.num_channels, rank=24, mean=embeddings[0] + 0.1 * embeddings[1]
    )
    graph = export(network, statistics, preprocessing=preprocessing)
    expected = reference(network, statistics, images, sigma=1.0)
    for batch in (1, 3):
        np.testing.assert_allclose(run(graph, images[:batch])[1], expected[:batch], rtol=1e-3)


@pytest.mark.parametrize(("stages", "neighbourhood"), [((1, 2), 1), ((0, 1, 3), 5)])
def test_a_staged_network_gives_what_it_gives_as_a_whole(stages: tuple[int, ...], neighbourhood: int) -> None:
    """Resizing and averaging written as products with matrices, on a grid that is not square."""
    from trainer.backbone import build_network

    preprocessing = Preprocessing(height=64, width=96)
    backbone = Backbone(name="test_efficientnet", stages=stages, weights="random", neighbourhood=neighbourhood)
    network, _ = build_network(backbone, preprocessing, seed=1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, rgb: Tensor) -> Tensor:
            return self.inner(rgb)

    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    mean = embed(network, images)[0]
    statistics = random_gaussian(grid=network.grid, channels=network.num_channels, rank=0, mean=1.01 * mean)
    staged, whole = (
        export(one, statistics, preprocessing=preprocessing, smoothing_sigma=0.0) for one in (network, Whole())
    )
    for batch in (1, 3):
        expected = run(whole, images[:batch])[1]
        np.testing.assert_allclose(run(staged, images[:batch])[1], expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_its_contract(graph: bytes) -> None:
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model, full_check=True)

    def shape(value: onnx.ValueInfoProto) -> list[object]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    (image,), (score, anomaly_map) = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type, shape(image)) == ("image", 2, ["N", SIZE, SIZE, 3])
    assert (score.name, score.type.tensor_type.elem_type, shape(score)) == ("score", 1, ["N"])
    assert (anomaly_map.name, shape(anomaly_map)) == ("anomaly_map", ["N", GRID, GRID])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"key": "value"}


def test_it_carries_no_trace_of_the_machine_that_made_it(graph: bytes) -> None:
    for trace in (str(Path.home()), str(Path(__file__).parent), ".py", "site-packages"):
        assert trace.encode() not in graph


def test_the_basis_is_stored_in_float16_and_widened_once_at_load(graph: bytes, tmp_path: Path) -> None:
    stored = {entry.name: entry.data_type for entry in onnx.load_from_string(graph).graph.initializer}
    assert stored["edgeflame.basis_float16"] == onnx.TensorProto.FLOAT16
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    assert [node.name for node in optimised.node if node.op_type == "Cast"] == ["edgeflame.pixels"]
    assert not any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in optimised.initializer)


class NotANumber(nn.Module):
    """Its embeddings are NaN where an image is black."""

    def forward(self, rgb: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(rgb, SIZE // GRID)
        return torch.cat([torch.sqrt(mean - 1.0), mean], dim=1)


class Infinite(nn.Module):
    """They are infinite where it is white."""

    def forward(self, rgb: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(rgb, SIZE // GRID)
        return torch.cat([1.0 / (255.0 - mean), mean], dim=1)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize(("network", "pixel"), [(NotANumber, 0), (Infinite, 255)], ids=["nan", "inf"])
def test_a_fault_at_one_position_makes_score_and_map_nan(sigma: float, network: type[nn.Module], pixel: int) -> None:
    images = np.full((2, SIZE, SIZE, 3), 128, dtype=np.uint8)
    images[1, 24:32, 40:48] = pixel  # one cell, away from where a maximum begins
    statistics = random_gaussian(grid=(GRID, GRID), channels=6, rank=2)
    scores, maps = run(small_graph(statistics, smoothing_sigma=sigma, network=network), images)
    assert np.isfinite(scores[0])
    assert np.isfinite(maps[0]).all()
    assert np.isnan(scores[1])
    assert np.isnan(maps[1]).all()


def conditioned(ratio: float) -> LowRankGaussian:
    """Statistics with the given ratio of largest to residual variance, about embeddings along that direction."""
    plain = small_statistics(2)
    eigenvalues = np.full_like(plain.eigenvalues, 3.0)
    eigenvalues[:, 0] = ratio
    # Half a deviation along the leading eigenvector and nothing else: where a difference loses the most digits.
    mean = embed(small_network(), IMAGES[:1])[0] - np.float32(0.5 * np.sqrt(ratio)) * plain.basis[:, :, 0]
    return LowRankGaussian(
        grid=plain.grid,
        count=9,
        ridge=1e-6,
        mean=mean,
        basis=plain.basis,
        eigenvalues=eigenvalues,
        residual=np.ones_like(plain.residual),
    )


@pytest.mark.parametrize(("ratio", "one_product"), [(50.0, True), (900.0, True), (1100.0, False), (1e6, False)])
def test_one_product_only_where_it_is_exact_enough(ratio: float, one_product: bool) -> None:
    statistics = conditioned(ratio)
    assert takes_one_product(statistics) == one_product
    graph = small_graph(statistics, smoothing_sigma=0.0)
    products = [node.name for node in onnx.load_from_string(graph).graph.node if node.op_type == "MatMul"]
    assert ("edgeflame.whitened_basis" in products) == one_product
    _, maps = run(graph, IMAGES[:1])
    expected = reference(small_network(), statistics, IMAGES[:1], sigma=0.0)
    allowed = single_product_error(statistics) if one_product else RELATIVE_TOLERANCE
    assert allowed <= MAX_ERROR
    np.testing.assert_allclose(maps, expected, rtol=allowed)


def test_an_eigenvalue_near_the_residual_variance_takes_two_products() -> None:
    statistics = conditioned(50.0)
    statistics.eigenvalues[0, 1] = 1.02 * statistics.residual[0]
    assert not takes_one_product(statistics)
    _, maps = run(small_graph(statistics), IMAGES)
    np.testing.assert_allclose(maps, reference(small_network(), statistics, IMAGES, sigma=1.0), rtol=RELATIVE_TOLERANCE)


def test_folded_constants_change_no_score(graph: bytes) -> None:
    folded = fold_constants(graph)
    model = onnx.load_from_string(folded)
    onnx.checker.check_model(model, full_check=True)
    constants = {entry.name for entry in model.graph.initializer}
    own = [node for node in model.graph.node if node.name.startswith("edgeflame.")]
    assert own
    assert not any(constants.issuperset(node.input) for node in own)
    assert "edgeflame.basis_float16" not in constants
    np.testing.assert_allclose(run(folded, IMAGES)[1], run(graph, IMAGES)[1], rtol=1e-5)


def test_statistics_of_another_network_are_refused() -> None:
    with pytest.raises(DataError, match=r"6 channels at 64 positions, the statistics describe 5 on a grid of 8 x 8"):
        export(small_network(), random_gaussian(grid=(GRID, GRID), channels=5, rank=2))


def test_a_broken_weight_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU6())
    with torch.no_grad():
        network[0].bias[0] = torch.nan
    with pytest.raises(NumericalError, match=r"0\.bias"):
        export(network, small_statistics())


def test_the_network_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export(network, small_statistics())
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def slow_memory_maps(statistics: MemoryStatistics, images: np.ndarray) -> np.ndarray:
    embeddings = embed(small_network(), images).astype(np.float64)
    steps = embeddings[:, :, None] - statistics.prototypes.astype(np.float64)
    squared = np.square(steps @ statistics.transform.astype(np.float64).T).sum(axis=3)
    if statistics.places is not None and statistics.spreads is not None:
        at = np.array([[(row + 0.5) / GRID, (column + 0.5) / GRID] for row in range(GRID) for column in range(GRID)])
        apart = np.square(at[:, None] - statistics.places).sum(axis=2)
        squared = (squared + statistics.position_weight**2 * 6 * apart) / statistics.spreads
    distances = np.sqrt(squared.min(axis=2))
    return smooth_maps(distances.reshape(-1, GRID, GRID), 1.0)


@pytest.mark.parametrize("size", [1, 9])
def test_a_memory_head_agrees_with_a_slow_float64_reference_and_with_torch(size: int) -> None:
    statistics = memory_statistics(size)
    scores, maps = run(small_graph(statistics), IMAGES)
    expected = slow_memory_maps(statistics, IMAGES)
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores, expected.max(axis=(1, 2)), rtol=1e-3, atol=1e-3)
    rows = torch.from_numpy(embed(small_network(), IMAGES)).double()
    transform = torch.from_numpy(statistics.transform).double()
    known = torch.from_numpy(statistics.prototypes).double()
    in_torch = torch.cdist(rows @ transform.T, known @ transform.T).min(dim=2).values.numpy()
    np.testing.assert_allclose(maps, smooth_maps(in_torch.reshape(-1, GRID, GRID), 1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("folded", [False, True])
def test_a_memory_with_places_and_spreads_agrees_with_a_slow_float64_reference(folded: bool) -> None:
    statistics = memory_statistics(placed=True)
    graph = small_graph(statistics)
    scores, maps = run(fold_constants(graph) if folded else graph, IMAGES)
    expected = slow_memory_maps(statistics, IMAGES)
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores, expected.max(axis=(1, 2)), rtol=1e-3, atol=1e-3)
    plain = run(small_graph(memory_statistics()), IMAGES)[1]
    assert np.abs(plain - maps).max() > 0.1, "places and spreads count"


class Broken(nn.Module):
    """Its embeddings are all NaN."""

    def forward(self, rgb: Tensor) -> Tensor:
        embeddings: Tensor = small_network()(rgb)  # type: ignore[operator]
        return torch.where(embeddings > 1e9, embeddings, torch.log(embeddings - 1000))


@pytest.mark.parametrize("placed", [False, True])
def test_a_fault_is_no_pass_for_a_memory_either(placed: bool) -> None:
    scores, maps = run(small_graph(memory_statistics(placed=placed), network=Broken), IMAGES[:1])
    assert np.isnan(maps).all()
    assert np.isnan(scores).all()
