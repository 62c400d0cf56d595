"""Reference images: chosen over the whole set, and scored without exporter or runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeflame.dataset import open_dataset
from edgeflame.images import Preprocessing, write_image
from edgeflame.methods import Backbone
from edgeflame.statistics.gaussian import smooth_maps
from fitting.imageset import ImageSet
from fitting.packaging import choose_references, score_references
from tests.support.small_package import embed, good_image, random_gaussian
from trainer.backbone import build_network
from trainer.embedding import TorchEmbedder

PREPROCESSING = Preprocessing(height=64, width=64)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("good")
    for index in range(7):
        write_image(folder / f"{index}.png", good_image(index))
    return ImageSet(open_dataset(folder).train, PREPROCESSING)


def test_they_are_spread_over_the_set(images: ImageSet) -> None:
    np.testing.assert_array_equal(choose_references(images, 3), images.batch([0, 3, 6]))
    assert len(choose_references(images, 20)) == 7


def test_none_is_a_choice(images: ImageSet) -> None:
    none = choose_references(images, 0)
    assert none.shape == (0, 64, 64, 3)
    network, _ = build_network(Backbone(weights="random", stages=(1, 2)), PREPROCESSING, seed=0)
    statistics = random_gaussian(grid=network.grid, channels=network.num_channels, rank=2)
    assert score_references(TorchEmbedder(network), statistics, none, smoothing_sigma=1.0) == ()


def test_their_scores_are_the_networks_own(images: ImageSet, tmp_path: Path) -> None:
    network, _ = build_network(Backbone(weights="random", stages=(1, 2)), PREPROCESSING, seed=0)
    chosen = choose_references(images, 2)
    embeddings = embed(network, chosen)
    statistics = random_gaussian(
        grid=network.grid, channels=network.num_channels, rank=2, mean=embeddings.mean(axis=0) + 0.1
    )
    references = score_references(TorchEmbedder(network), statistics, chosen, smoothing_sigma=1.0)
    distances = statistics.distances(embeddings.astype(np.float64)).reshape(-1, *network.grid)
    for reference, image, expected in zip(references, chosen, smooth_maps(distances, 1.0), strict=True):
        np.testing.assert_array_equal(reference.image(PREPROCESSING), image)
        assert reference.expected.score == reference.expected.map_max == pytest.approx(expected.max(), rel=1e-5)
        assert reference.expected.map_mean == pytest.approx(expected.mean(), rel=1e-5)
