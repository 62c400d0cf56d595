"""Folds, cross-fitting, and what it chooses."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflame.errors import ConfigError, DataError, NumericalError
from edgeflame.images import Preprocessing
from edgeflame.methods import Backbone, Learning
from edgeflame.statistics.gaussian import fit_gaussian
from edgeflame.statistics.moments import MomentAccumulator
from fitting.crossfit import (
    LEAST_GAIN,
    RADII,
    automatic_ridge,
    cross_fit,
    image_scores,
    make_folds,
    require_enough,
    score_maps,
)
from fitting.imageset import ImageSet
from fitting.threshold import set_threshold
from trainer import embedding as embedding_module
from trainer.backbone import EmbeddingNetwork, build_network
from trainer.device import rgb_tensor
from trainer.embedding import embed, network_embeddings

CPU = torch.device("cpu")


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=30), num_folds=st.integers(2, 8), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_folds_hold_whole_parts_and_are_about_equal(sizes: list[int], num_folds: int, seed: int) -> None:
    groups = [f"part {number}" for number, size in enumerate(sizes) for _ in range(size)]
    folds = make_folds(groups, num_folds, seed)
    assert sorted(index for fold in folds for index in fold) == list(range(len(groups)))
    assert len(folds) == min(num_folds, len(sizes))
    where = {group: number for number, fold in enumerate(folds) for group in (groups[i] for i in fold)}
    assert all(where[groups[index]] == number for number, fold in enumerate(folds) for index in fold)
    lengths = Counter(where[group] for group in groups)
    assert max(lengths.values()) - min(lengths.values()) <= max(sizes)
    assert folds == make_folds(groups, num_folds, seed)


@pytest.fixture(scope="module")
def network(small_learning: Learning) -> EmbeddingNetwork:
    return build_network(small_learning.backbone, small_learning.input, seed=0)[0]


@pytest.mark.parametrize("max_cache_bytes", [0, 300_000, 1 << 30])
def test_held_out_scores_are_those_of_statistics_without_the_part(
    network: EmbeddingNetwork, images: ImageSet, small_learning: Learning, max_cache_bytes: int
) -> None:
    """Against the long way: for each fold, statistics of the other images from nothing."""
    embeddings = network_embeddings(network, images, max_cache_bytes=max_cache_bytes)
    result = cross_fit(embeddings, images.groups, small_learning)
    everything = embed(network, rgb_tensor(images.batch(range(len(images))), CPU))
    expected = np.zeros(len(images))
    for fold in make_folds(images.groups, small_learning.calibration.folds, small_learning.seed):
        accumulator = MomentAccumulator()
        accumulator.add(np.delete(everything, fold, axis=0))
        gaussian = fit_gaussian(
            accumulator.moments(),
            grid=network.grid,
            rank=6,
            ridge=small_learning.scoring.ridge,
            radius=result.radius,
        ).as_stored()
        expected[fold] = image_scores(score_maps(gaussian, everything[fold], small_learning.scoring))
    np.testing.assert_allclose(result.held_out.scores, expected, rtol=5e-3)
    assert result.statistics.count == len(images)
    assert result.statistics.rank == 6
    passes = embeddings.num_forward / len(images)
    assert passes == 1 if max_cache_bytes == 1 << 30 else 1 < passes <= 4


def test_what_was_seen_scores_lower_than_what_was_not(
    network: EmbeddingNetwork, images: ImageSet, small_learning: Learning
) -> None:
    embeddings = network_embeddings(network, images)
    result = cross_fit(embeddings, images.groups, small_learning)
    _, everything = next(embeddings.batches(range(len(images))))
    seen = image_scores(score_maps(result.statistics, everything, small_learning.scoring))
    assert np.median(seen) < np.median(result.held_out.scores)


def test_the_statistics_are_as_a_package_stores_them(
    network: EmbeddingNetwork, images: ImageSet, small_learning: Learning
) -> None:
    statistics = cross_fit(network_embeddings(network, images), images.groups, small_learning).statistics
    np.testing.assert_array_equal(statistics.basis, statistics.basis.astype(np.float16).astype(np.float32))


def test_the_wider_radius_is_taken_where_it_accepts_clearly_less(
    network: EmbeddingNetwork, images: ImageSet, small_learning: Learning
) -> None:
    """Against the long way: the volume at the threshold that each radius would have by itself."""
    embeddings = network_embeddings(network, images)
    result = cross_fit(embeddings, images.groups, small_learning)
    everything = embed(network, rgb_tensor(images.batch(range(len(images))), CPU))
    volumes, alone = {}, {}
    for radius in RADII:
        scoring = msgspec.structs.replace(small_learning.scoring, pooling_radius=radius)
        alone[radius] = cross_fit(embeddings, images.groups, msgspec.structs.replace(small_learning, scoring=scoring))
        assert alone[radius].radius == radius
        log_determinant = 0.0
        for fold in make_folds(images.groups, small_learning.calibration.folds, small_learning.seed):
            accumulator = MomentAccumulator()
            accumulator.add(np.delete(everything, fold, axis=0))
            gaussian = fit_gaussian(accumulator.moments(), grid=network.grid, rank=6, ridge=0.01, radius=radius)
            log_determinant += gaussian.mean_log_determinant * len(fold) / len(images)
        threshold = set_threshold(
            alone[radius].held_out.scores, images.groups, small_learning.calibration, groups_known=True
        )
        volumes[radius] = np.log(threshold.value) + 0.5 * log_determinant / network.num_channels
        assert result.volumes[radius] == pytest.approx(volumes[radius], abs=2e-2)
    gain = volumes[0] - volumes[1]
    assert abs(gain - LEAST_GAIN) > 0.02  # else the two ways may differ
    best = int(gain > LEAST_GAIN)
    assert result.radius == best
    np.testing.assert_allclose(result.held_out.scores, alone[best].held_out.scores, rtol=1e-6)


def test_few_images_get_much_ridge() -> None:
    assert [automatic_ridge(count) for count in (5, 40, 120, 400, 10_000)] == [0.3, 0.3, 0.1, 0.03, 0.03]


def test_rank_and_ridge_go_by_the_number_of_images_where_they_are_left_open(
    network: EmbeddingNetwork, images: ImageSet, small_learning: Learning
) -> None:
    scoring = msgspec.structs.replace(small_learning.scoring, rank="auto", ridge="auto", max_rank=7)
    statistics = cross_fit(
        network_embeddings(network, images),
        images.groups,
        msgspec.structs.replace(small_learning, scoring=scoring),
    ).statistics
    assert (statistics.rank, statistics.ridge) == (7, automatic_ridge(len(images)))


def test_too_few_images_or_parts_are_refused() -> None:
    require_enough(4, 2)
    for num_images, num_groups in ((3, 3), (0, 0), (50, 1)):
        with pytest.raises(DataError, match=f"got {num_images} of {num_groups}"):
            require_enough(num_images, num_groups)


def test_one_part_that_holds_nearly_all_images_is_refused(
    network: EmbeddingNetwork, images: ImageSet, small_learning: Learning
) -> None:
    groups = ["one"] * (len(images) - 1) + ["other"]
    with pytest.raises(DataError, match="one part holds nearly all"):
        cross_fit(network_embeddings(network, images), groups, small_learning)


def test_embeddings_too_wide_for_their_moments_are_refused_before_any_work(images: ImageSet) -> None:
    wide = Backbone(name="resnet18", channels="all", weights="random")
    network = build_network(wide, Preprocessing(height=1024, width=1024), seed=0)[0]
    with pytest.raises(ConfigError, match=r"backbone\.channels at auto.*a smaller input"):
        network_embeddings(network, images)


def test_a_network_that_gives_no_numbers_is_named_with_the_image(
    network: EmbeddingNetwork, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_network: object, rgb: torch.Tensor) -> Any:
        values = embed(network, rgb).copy()
        values[1, 0, 0] = np.nan
        return values

    monkeypatch.setattr(embedding_module, "embed", broken)
    with pytest.raises(NumericalError, match=images.records[1].name):
        list(network_embeddings(network, images).batches(range(3)))


def test_batches_keep_the_order_asked_for(network: EmbeddingNetwork, images: ImageSet) -> None:
    embeddings = network_embeddings(network, images)
    straight = np.concatenate([batch for _, batch in embeddings.batches(range(10))])
    order = [7, 2, 2, 9]
    ((indices, mixed),) = embeddings.batches(order)
    assert indices == order
    np.testing.assert_array_equal(mixed, straight[order])


def test_image_sets_read_again_what_does_not_fit_their_cache(images: ImageSet) -> None:
    bounded = ImageSet(images.records, images.preprocessing, max_cache_bytes=3 * 64 * 64 * 3)
    np.testing.assert_array_equal(bounded.batch([0, 10, 20]), images.batch([0, 10, 20]))
    assert len(cast("SimpleNamespace", bounded)._cache) == 3
