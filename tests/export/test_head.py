"""A head in the graph against its definition in float64, in a package, and what is no head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgeflame.errors import DataError, EdgeFlameError, PackageError
from edgeflame.package import HEAD_MEMBER, Package, read_package, write_package
from edgeflame.scoring_graph import UNSMOOTHED, with_unsmoothed_map
from edgeflame.statistics.gaussian import smooth_maps
from edgeflame.statistics.head import LIMIT, DefectHead, decode_head, encode_head, max_head_bytes, pooled_cells
from export.builder import fold_constants
from export.graph import complete_graph, cut_embedding_graph
from export.network import scoring_graph
from export.precision import with_precision
from tests.support.small_package import (
    GRID,
    PREPROCESSING,
    bad_image,
    embed,
    good_image,
    random_gaussian,
    small_network,
)

# PyTorch exports the network of the small package.
pytestmark = pytest.mark.timeout(600)

IMAGES = np.stack([good_image(1), bad_image(2), good_image(3)])
CHANNELS = 6
STATISTICS = random_gaussian(
    grid=(GRID, GRID), channels=CHANNELS, rank=3, mean=embed(small_network(), IMAGES[:1])[0] + 0.1
)


def head(pool: int = 2, *, scale: float = 0.3, seed: int = 0) -> DefectHead:
    rng = np.random.default_rng(seed)
    cells = (GRID // pool) ** 2
    weights = rng.normal(0, 1, (CHANNELS, 5)).astype(np.float32)
    usual = pooled_cells(embed(small_network(), IMAGES[:1]), grid=(GRID, GRID), pool=pool)[0]
    return DefectHead(
        grid=(GRID, GRID),
        pool=pool,
        top=max(1, cells // 5),
        weights=weights,
        bias=(rng.normal(0, 0.1, (cells, 5)) - usual @ weights).astype(np.float32),
        out=(scale * rng.uniform(0.5, 1, 5)).astype(np.float32),
        offset=-0.2,
    )


@pytest.fixture(scope="module")
def embedding_graph() -> bytes:
    whole = scoring_graph(small_network(), STATISTICS, preprocessing=PREPROCESSING, smoothing_sigma=1.0, metadata={})
    return cut_embedding_graph(whole, num_positions=GRID * GRID, num_channels=CHANNELS)


def run(graph: bytes, images: np.ndarray = IMAGES) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(with_unsmoothed_map(graph), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(["score", "anomaly_map", UNSMOOTHED], {"image": images})
    return found


def with_head(embedding_graph: bytes, one: DefectHead | None) -> bytes:
    return complete_graph(embedding_graph, STATISTICS, smoothing_sigma=1.0, metadata={}, head=one)


@pytest.mark.parametrize("pool", [1, 2, 4])
@pytest.mark.parametrize("images", [1, 3])
def test_the_graph_agrees_with_float64(embedding_graph: bytes, pool: int, images: int) -> None:
    one = head(pool)
    scores, maps, unsmoothed = run(with_head(embedding_graph, one), IMAGES[:images])
    embeddings = embed(small_network(), IMAGES[:images]).astype(np.float64)
    factors = np.exp(one.log_factors(embeddings))
    assert np.ptp(factors) > 0.01 or images == 1
    expected = STATISTICS.distances(embeddings).reshape(-1, GRID, GRID) * factors[:, None, None]
    np.testing.assert_allclose(unsmoothed, expected, rtol=1e-4)
    np.testing.assert_allclose(maps, smooth_maps(expected, 1.0), rtol=1e-4)
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))


def test_no_head_is_the_graph_as_it_was(embedding_graph: bytes) -> None:
    names = [node.op_type for node in onnx.load_from_string(with_head(embedding_graph, None)).graph.node]
    assert "TopK" not in names
    plain = scoring_graph(small_network(), STATISTICS, preprocessing=PREPROCESSING, smoothing_sigma=1.0, metadata={})
    np.testing.assert_array_equal(run(with_head(embedding_graph, None))[0], run(plain)[0])


def test_no_head_moves_a_score_beyond_its_bound(embedding_graph: bytes) -> None:
    plain = run(with_head(embedding_graph, None))[0]
    wild = run(with_head(embedding_graph, head(scale=1000.0)))[0]
    assert (wild <= plain * np.exp(LIMIT) * 1.001).all()
    assert (wild >= plain * np.exp(-LIMIT) * 0.999).all()


def test_other_precisions_and_folded_constants_keep_it(embedding_graph: bytes) -> None:
    graph = with_head(embedding_graph, head())
    np.testing.assert_allclose(run(fold_constants(graph))[0], run(graph)[0], rtol=1e-6)
    halved = with_precision(onnx.load_from_string(graph), "fp16").SerializeToString()
    np.testing.assert_allclose(run(halved)[0], run(graph)[0], rtol=0.1)


def test_a_head_of_other_embeddings_is_refused(embedding_graph: bytes) -> None:
    one = head()
    with pytest.raises(DataError, match="the head is for 5 channels"):
        with_head(embedding_graph, replace(one, weights=one.weights[:5]))


def test_a_package_keeps_it(tmp_path: Path, package: Package) -> None:
    grid, channels = package.manifest.grid, package.manifest.num_channels
    one = head(2)
    assert (one.grid, one.num_channels) == (grid, channels)
    out = tmp_path / "with.edgeflame"
    write_package(
        out, manifest=package.manifest, model_onnx=package.model_onnx, statistics=package.statistics, head=one
    )
    again = read_package(out)
    assert again.head is not None
    assert encode_head(again.head) == encode_head(one)
    assert HEAD_MEMBER in again.manifest.sha256
    assert len(encode_head(one)) <= max_head_bytes(GRID * GRID, channels)
    odd = replace(one, weights=one.weights[:4])
    write_package(
        out, manifest=package.manifest, model_onnx=package.model_onnx, statistics=package.statistics, head=odd
    )
    with pytest.raises(PackageError, match="not for the embeddings"):
        read_package(out)


@pytest.mark.parametrize(
    "change", [{"pool": 3}, {"top": 99}, {"offset": float("nan")}, {"out": np.zeros(4, np.float32)}]
)
def test_what_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(EdgeFlameError):
        replace(head(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [0, 3, 8, 60, -1])
def test_damaged_bytes_are_no_head(cut: int) -> None:
    with pytest.raises(EdgeFlameError):
        decode_head(encode_head(head())[:cut])
