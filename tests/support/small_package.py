"""A model small enough for tests: block means of a 64x64 image instead of a backbone, in a real package."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeflame.images import ImageU8, Preprocessing, write_image
from edgeflame.methods import Learning, Scoring
from edgeflame.package import Manifest, Package, WeightsOrigin, new_manifest, write_package
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.statistics.memory import MemoryStatistics
from edgeflame.threshold import Threshold

SIZE, GRID = 64, 8
PREPROCESSING = Preprocessing(height=SIZE, width=SIZE)
LEARNING = Learning(input=PREPROCESSING, scoring=Scoring(smoothing_sigma=1.0))


def good_image(seed: int, size: int = SIZE) -> ImageU8:
    """Noise about a grey ramp."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(90, 160, size)[None, :, None]
    return np.clip(ramp + rng.normal(0, 2, (size, size, 3)), 0, 255).astype(np.uint8)


def bad_image(seed: int, size: int = SIZE) -> ImageU8:
    """The same with a dark hole."""
    image = good_image(seed, size)
    image[size // 4 : size // 2, size // 4 : size // 2] //= 8
    return image


def small_network() -> object:
    """``[N, 3, 64, 64]`` to ``[N, 6, 8, 8]``: mean and spread of each block."""
    import torch
    from torch import Tensor, nn

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(SIZE // GRID)

        def forward(self, rgb: Tensor) -> Tensor:
            x = rgb / 64.0
            mean = self.pool(x)
            return torch.cat([mean, torch.sqrt(torch.relu(self.pool(x * x) - mean * mean) + 0.01)], dim=1)

    return Blocks().eval()


@cache
def small_embedding_graph(network: Callable[[], object] = small_network) -> bytes:
    """What PyTorch's export, which takes a second, makes of a network for images as the small package takes."""
    from export.network import embedding_graph_of

    return embedding_graph_of(network(), PREPROCESSING)  # type: ignore[arg-type]


def embed(network: object, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """``[N, H, W, 3]`` BGR to embeddings ``[N, P, C]``."""
    import torch

    rgb = torch.from_numpy(np.ascontiguousarray(images[..., ::-1].transpose(0, 3, 1, 2))).float()
    with torch.no_grad():
        maps = network(rgb).numpy()  # type: ignore[operator]
    return np.ascontiguousarray(maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1))


def random_gaussian(
    *, grid: tuple[int, int], channels: int, rank: int, mean: npt.NDArray[np.floating] | None = None, seed: int = 0
) -> LowRankGaussian:
    """Statistics of no images in particular, with eigenvalues from 0.5 to 30 and residuals near 0.1."""
    rng = np.random.default_rng(seed)
    positions = grid[0] * grid[1]
    basis = np.linalg.qr(rng.normal(size=(positions, channels, max(rank, 1))))[0][:, :, :rank]
    return LowRankGaussian(
        grid=grid,
        count=100,
        ridge=0.01,
        mean=(rng.normal(size=(positions, channels)) if mean is None else mean).astype(np.float32),
        # As a package holds it.
        basis=np.ascontiguousarray(basis).astype(np.float16).astype(np.float32),
        eigenvalues=-np.sort(-rng.uniform(0.5, 30, (positions, rank)), axis=1).astype(np.float32),
        residual=rng.uniform(0.05, 0.2, positions).astype(np.float32),
    )


def write_small_package(path: Path, *, ridge: float = 0.01) -> Path:
    """A package whose threshold lies between good and bad images."""
    from edgeflame.statistics.gaussian import smooth_maps
    from export.graph import complete_graph

    good = embed(small_network(), np.stack([good_image(seed) for seed in range(40)]))
    mean = good.mean(axis=0)
    statistics = LowRankGaussian(
        grid=(GRID, GRID),
        count=len(good),
        ridge=ridge,
        mean=mean,
        basis=np.tile(np.eye(good.shape[2], 2, dtype=np.float32), (GRID * GRID, 1, 1)),
        eigenvalues=good.var(axis=0)[:, :2],
        residual=good.var(axis=0)[:, 2:].mean(axis=1),
    )
    maps = smooth_maps(statistics.distances(good).reshape(-1, GRID, GRID), LEARNING.scoring.smoothing_sigma)
    sigma = LEARNING.scoring.smoothing_sigma
    graph = complete_graph(small_embedding_graph(), statistics, smoothing_sigma=sigma, metadata={})
    manifest = small_manifest(statistics, threshold=5 * float(maps.max()))
    write_package(path, manifest=manifest, model_onnx=graph, statistics=statistics)
    return path


def with_references(package: Package, path: Path, count: int = 3) -> Path:
    """The small package once more, with reference images scored by the network itself."""
    from edgeflame.package import make_references
    from edgeflame.statistics.gaussian import smooth_maps

    images = np.stack([good_image(seed) for seed in range(count)])
    distances = package.statistics.distances(embed(small_network(), images).astype(np.float64))
    unsmoothed = distances.reshape(-1, GRID, GRID)
    write_package(
        path,
        manifest=package.manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=make_references(images, smooth_maps(unsmoothed, LEARNING.scoring.smoothing_sigma), unsmoothed),
    )
    return path


def small_manifest(statistics: LowRankGaussian, *, threshold: float) -> Manifest:
    return new_manifest(
        product="test piece",
        site=None,
        created="2026-01-02T03:04:05Z",
        learning=LEARNING,
        weights=WeightsOrigin(source="none", sha256="0" * 64),
        statistics=statistics,
        threshold=Threshold(
            value=threshold,
            false_reject_rate=0.08,
            confidence=0.95,
            num_groups=40,
            num_images=40,
            groups_known=True,
            requested_false_reject_rate=0.01,
        ),
        provenance={"kind": "test"},
    )


def memory_statistics(size: int = 9, *, placed: bool = False) -> MemoryStatistics:
    """Prototypes among the images' own embeddings, in a metric that is not the plain one."""
    rng = np.random.default_rng(4)
    embeddings = embed(small_network(), np.stack([good_image(1), bad_image(2), good_image(3)])).reshape(-1, 6)
    return MemoryStatistics(
        grid=(GRID, GRID),
        count=3,
        prototypes=rng.permutation(embeddings)[:size],
        transform=(np.eye(6) + 0.2 * rng.normal(size=(6, 6))).astype(np.float32),
        centre=embeddings.mean(axis=0),
        places=rng.uniform(0, 1, (size, 2)).astype(np.float32) if placed else None,
        spreads=rng.uniform(0.3, 3, size).astype(np.float32) if placed else None,
        position_weight=4.0 if placed else 0.0,
    )


def write_images(folder: Path, *, good: int = 3, bad: int = 2) -> Path:
    """``good/`` and ``hole/`` as in a test folder of the MVTec layout."""
    for name, make, count in (("good", good_image, good), ("hole", bad_image, bad)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            write_image(folder / name / f"{index}.png", make(1000 + index, 96))
    return folder
