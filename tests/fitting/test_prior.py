"""Other sites' statistics as a prior: what is added, what is taken out, and how far a site leans on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from aggregator.pooling import pool_statistics
from edgeflame.errors import DataError
from edgeflame.methods import Calibration, Learning, Scoring
from edgeflame.package import read_package
from edgeflame.statistics.codec import encode_statistics
from edgeflame.statistics.gaussian import fit_gaussian
from edgeflame.statistics.moments import MomentAccumulator, Moments
from edgeflame.statistics.shared import MAX_SHARED_WEIGHT, read_moments, shared_weight, write_site_statistics
from edgeflame.tensors import F32, F64
from fitting.crossfit import automatic_ridge, cross_fit, make_folds
from fitting.embeddings import Embeddings
from fitting.prior import FleetPrior, PriorWeights, choose_weights
from tests.support.commands import edgeflame, error_of

GRID, C = (6, 8), 12
P = GRID[0] * GRID[1]


class StoredEmbeddings:
    """Embeddings ``[N, P, C]`` that are at hand, for what asks :class:`fitting.embeddings.Embeddings` for them."""

    grid, num_channels = GRID, C

    def __init__(self, values: F32) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], F32]]:
        for start in range(0, len(indices), 16):
            chosen = list(indices[start : start + 16])
            yield chosen, self._values[chosen]


def stored(values: F32) -> Embeddings:
    return cast("Embeddings", StoredEmbeddings(values))


def photographs(count: int, seed: int, *, shape: int = 0, camera: int | None = None) -> F32:
    """``[count, P, C]`` of a site, that vary as all do whose ``shape`` is the same, about the mean of the ``camera``.

    By default the camera is the site's own.
    """
    rng = np.random.default_rng(seed)
    mean = np.random.default_rng(500 + (seed if camera is None else camera)).normal(size=(P, C))
    turn = np.linalg.qr(np.random.default_rng(1000 + shape).normal(size=(P, C, C)))[0]
    varied = np.einsum("npc,pdc->npd", rng.normal(size=(count, P, C)) * 0.6 ** np.arange(C), turn)
    return (varied + 5 * mean).astype(np.float32)


def moments(values: F32) -> Moments:
    accumulator = MomentAccumulator()
    accumulator.add(values)
    return accumulator.moments()


def prior_of(values: F32, **more: Any) -> FleetPrior:
    covariance = moments(values).covariance().astype(np.float32)
    mean = values.mean(axis=0)
    return FleetPrior(grid=GRID, mean=mean, covariance=covariance, num_images=len(values), **more)


def covariances(values: F32) -> F64:
    return np.stack([np.cov(values[:, p].astype(np.float64), rowvar=False) for p in range(P)])


def weight_of(own: F32, prior: FleetPrior) -> int:
    folds = make_folds([str(index) for index in range(len(own))], 5, 0)
    return choose_weights(stored(own), folds, prior, ridge=automatic_ridge).weight


def test_a_prior_counts_as_so_many_photographs() -> None:
    own, others = photographs(6, 1), photographs(50, 2)
    added = prior_of(others).added_to(moments(own), PriorWeights(weight=20))
    expected = (20 * covariances(others) + 5 * covariances(own)) / 25
    np.testing.assert_allclose(added.covariance(), expected, atol=1e-5)
    np.testing.assert_allclose(added.mean, own.mean(axis=0, dtype=np.float64), atol=1e-5)
    assert added.count == 26
    plain = moments(own)
    assert prior_of(others).added_to(plain, PriorWeights(weight=0)) is plain


def test_with_a_weight_for_the_mean_it_is_as_if_so_many_photographs_were_there() -> None:
    own, others = photographs(6, 1), photographs(20, 2)
    # Of 20 photographs the covariance has 19 degrees of freedom.
    added = prior_of(others).added_to(moments(own), PriorWeights(weight=19, mean_weight=20))
    both = np.concatenate([own, others])
    np.testing.assert_allclose(added.mean, both.mean(axis=0, dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose(added.covariance(), 25 / 24 * covariances(both), rtol=1e-4, atol=1e-4)


def test_a_package_is_a_prior_of_what_its_statistics_say() -> None:
    own = moments(photographs(40, 1))
    prior = FleetPrior.of_statistics(fit_gaussian(own, grid=GRID, rank=C - 1), {"file": "a"})
    np.testing.assert_allclose(prior.covariance, own.covariance(), atol=1e-4)
    assert (prior.num_images, prior.source) == (40, {"file": "a"})


def test_few_photographs_lean_on_the_fleet_and_many_on_themselves() -> None:
    prior = prior_of(photographs(700, 2))
    few, many = weight_of(photographs(5, 1), prior), weight_of(photographs(300, 1), prior)
    assert few >= 40
    assert few / (few + 4) > 0.9 > many / (many + 299)


def test_a_site_with_another_camera_keeps_its_mean_and_one_with_the_same_does_not() -> None:
    prior = prior_of(photographs(700, 2))
    folds = make_folds(list("abcde"), 5, 0)
    other = choose_weights(stored(photographs(5, 1)), folds, prior, ridge=automatic_ridge)
    assert other.weight >= 40
    assert other.mean_weight == 0
    same = choose_weights(stored(photographs(5, 1, camera=2)), folds, prior, ridge=automatic_ridge)
    assert same.mean_weight >= 10


def test_a_site_that_varies_otherwise_is_left_alone() -> None:
    prior = prior_of(photographs(700, 2, shape=0))
    for count in (40, 300):
        assert weight_of(photographs(count, 1, shape=1), prior) <= 5


def test_a_prior_is_no_stronger_than_what_is_behind_it() -> None:
    assert weight_of(photographs(5, 1), prior_of(photographs(12, 2))) <= 12


def test_photographs_of_one_part_are_held_out_together() -> None:
    """Copies would make a site look as if it knew itself well."""
    parts = photographs(5, 1)
    noise = np.random.default_rng(0).normal(scale=1e-3, size=(20, P, C))
    copies = (np.repeat(parts, 4, axis=0) + noise).astype(np.float32)
    groups = [str(index // 4) for index in range(20)]
    prior = prior_of(photographs(700, 2))
    by_part = choose_weights(stored(copies), make_folds(groups, 5, 0), prior, ridge=automatic_ridge)
    assert by_part.weight >= 40


def test_own_photographs_are_taken_out_of_a_fleets_prior(tmp_path: Path) -> None:
    sites = {"a": photographs(6, 1), "b": photographs(30, 2), "c": photographs(9, 3)}
    for name, values in sites.items():
        write_site_statistics(tmp_path / name, moments(values), grid=GRID, model="a" * 64, form="moments", rank=0)
    pool_statistics({name: tmp_path / name for name in sites}, tmp_path / "pooled", rank=0, as_prior=True)
    pooled, header = read_moments(tmp_path / "pooled")
    assert header.centre == "site"
    weighted = {name: (len(values) - 1) * covariances(values) for name, values in sites.items()}
    np.testing.assert_allclose(pooled.covariance(), sum(weighted.values()) / 42, atol=1e-5)

    prior = FleetPrior.of_fleet(pooled, header, num_own=6)
    others = prior.without(moments(sites["a"]))
    assert others is not None
    assert others.num_images == 39
    np.testing.assert_allclose(others.covariance, (weighted["b"] + weighted["c"]) / 37, atol=1e-4)
    both = np.concatenate([sites["b"], sites["c"]])
    np.testing.assert_allclose(others.mean, both.mean(axis=0), atol=1e-4)
    # Whoever did not contribute has nothing to take out; whoever is alone has no prior.
    stranger = FleetPrior.of_fleet(pooled, header, num_own=0)
    assert stranger.without(moments(photographs(5, 9))) is stranger
    pool_statistics({"a": tmp_path / "a"}, tmp_path / "lonely", rank=0, as_prior=True)
    assert FleetPrior.of_fleet(*read_moments(tmp_path / "lonely"), num_own=6).without(moments(sites["a"])) is None


def test_no_site_dominates_a_prior(tmp_path: Path) -> None:
    sites = {"large": photographs(1000, 1, shape=1), "small": photographs(100, 2)}
    for name, values in sites.items():
        write_site_statistics(tmp_path / name, moments(values), grid=GRID, model="a" * 64, form="moments", rank=0)
    pool_statistics({name: tmp_path / name for name in sites}, tmp_path / "pooled", rank=0, as_prior=True)
    share = MAX_SHARED_WEIGHT / (MAX_SHARED_WEIGHT + 99)
    expected = share * covariances(sites["large"]) + (1 - share) * covariances(sites["small"])
    np.testing.assert_allclose(read_moments(tmp_path / "pooled")[0].covariance(), expected, atol=1e-4)
    assert shared_weight(2) == 1


def learning() -> Learning:
    return Learning(scoring=Scoring(smoothing_sigma=1.0, pooling_radius=0), calibration=Calibration(folds=5))


def test_statistics_with_a_prior_tell_defects_that_those_without_cannot() -> None:
    own, prior = photographs(105, 1), prior_of(photographs(700, 2))
    few, good = own[:5], own[5:]
    # A defect is small, in a direction in which good parts vary little.
    turn = np.linalg.qr(np.random.default_rng(1000).normal(size=(P, C, C)))[0]
    bad = good.copy()
    bad[:, 20] += (0.5 * turn[20, :, 6]).astype(np.float32)
    groups = list("abcde")
    shares = []
    for given in (None, prior):
        fitted = cross_fit(stored(few), groups, learning(), pooled=given)
        limit = np.quantile(fitted.statistics.distances(good)[:, 20], 0.95)
        shares.append(float((fitted.statistics.distances(bad)[:, 20] > limit).mean()))
        assert fitted.statistics.count == 5
    assert shares[1] > 0.9 > 0.4 > shares[0]


def test_held_out_scores_are_those_of_new_parts() -> None:
    """The prior holds none of the parts, and each fold is left out of the rest."""
    own = photographs(210, 1)
    few = own[:10]
    prior = prior_of(photographs(700, 2))
    fitted = cross_fit(stored(few), [str(index) for index in range(10)], learning(), pooled=prior)
    new = fitted.statistics.distances(own[10:]).reshape(-1, *GRID)
    typical = float(np.median(new.max(axis=(1, 2))))
    unsmoothed = float(np.median(fitted.statistics.distances(few).reshape(-1, *GRID).max(axis=(1, 2))))
    assert unsmoothed < typical
    sharp = Learning(scoring=Scoring(smoothing_sigma=0, pooling_radius=0))
    exact = cross_fit(
        stored(few),
        [str(index) for index in range(10)],
        sharp,
        pooled=prior,
    )
    assert float(np.median(exact.held_out.scores)) == pytest.approx(typical, rel=0.15)


def test_a_prior_that_does_not_fit_changes_nothing() -> None:
    own, groups = photographs(300, 1), [str(index) for index in range(300)]
    prior = prior_of(photographs(700, 2, shape=1))
    with_prior = cross_fit(stored(own), groups, learning(), pooled=prior)
    assert with_prior.prior is not None
    assert with_prior.prior.chosen.weight == 0
    assert "does not fit" in with_prior.prior.in_words()
    alone = cross_fit(stored(own), groups, learning())
    assert encode_statistics(with_prior.statistics) == encode_statistics(alone.statistics)
    np.testing.assert_array_equal(with_prior.held_out.scores, alone.held_out.scores)


def test_a_prior_of_other_embeddings_is_refused() -> None:
    other = FleetPrior(
        grid=(4, 12), mean=np.zeros((48, C), np.float32), covariance=np.zeros((48, C, C), np.float32), num_images=9
    )
    with pytest.raises(DataError, match=r"12 channels on a grid of 4x12, these embeddings have 12 on 6x8"):
        cross_fit(stored(photographs(6, 1)), list("abcdef"), learning(), pooled=other)


SETTINGS = """
[backbone]
name = "test_efficientnet"
stages = [1, 2]
weights = "random"
[input]
height = 64
width = 64
resize = "area"
[scoring]
rank = 6
"""


@pytest.fixture(scope="module")
def elsewhere(parts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "learning.toml").write_text(SETTINGS)
    result = edgeflame(
        "fit", "--data", parts_folder, "--out", folder / "p.edgeflame", "--config", folder / "learning.toml"
    )
    assert result.exit_code == 0, result.output
    return folder / "p.edgeflame"


@pytest.mark.timeout(300)
def test_the_command_leans_on_a_package(elsewhere: Path, parts_folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for image in sorted((parts_folder / "train" / "good").iterdir())[::4][:5]:
        (few / image.name).symlink_to(image.resolve())
    result = edgeflame("fit", "--data", few, "--out", tmp_path / "m.edgeflame", "--prior", elsewhere)
    assert result.exit_code == 0, result.output
    assert "leans on 24 images of others, which count as" in result.output
    manifest = read_package(tmp_path / "m.edgeflame").manifest
    told = manifest.provenance["statistics"]["prior"]
    assert (told["file"], told["images_of_others"], told["own_images"]) == ("p.edgeflame", 24, 5)
    assert manifest.num_images == 5
    assert manifest.learning.input.resized_by == "area"
    assert manifest.weights == read_package(elsewhere).manifest.weights


def test_the_command_refuses_what_is_no_prior(elsewhere: Path, parts_folder: Path, tmp_path: Path) -> None:
    options = ("fit", "--data", parts_folder, "--out", tmp_path / "m.edgeflame")
    both = edgeflame(*options, "--prior", elsewhere, "--backbone-from", elsewhere)
    assert "--prior takes the backbone of its package" in str(error_of(both))
    (tmp_path / "junk.edgeflame").write_bytes(b"junk")
    assert "junk.edgeflame" in str(error_of(edgeflame(*options, "--prior", tmp_path / "junk.edgeflame")))
    size = edgeflame(*options, "--prior", elsewhere, "--size", 96)
    assert "input.height is 96, but the backbone of p.edgeflame is made for 64" in str(error_of(size))
    assert not (tmp_path / "m.edgeflame").exists()
