"""Moments, the low-rank Gaussian, its distances and merging, against slow float64 references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeflame.errors import DataError, NumericalError
from edgeflame.statistics.codec import decode_statistics, encode_statistics
from edgeflame.statistics.gaussian import (
    LowRankGaussian,
    fit_gaussian,
    smooth_maps,
    smoothing_matrix,
)
from edgeflame.statistics.moments import MomentAccumulator, Moments

F32 = npt.NDArray[np.float32]
GRID = (3, 4)
P, C = 12, 10


def embeddings(count: int, seed: int = 0, *, channels: int = C, offset: float = 5.0) -> F32:
    """Correlated channels with variances over three decades, about a mean far from zero."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(P, channels, channels)) * np.geomspace(3, 0.05, channels)
    values = np.einsum("npk,pck->npc", rng.normal(size=(count, P, channels)), mixing) + offset
    return values.astype(np.float32)


def accumulate(data: F32, batch: int = 7) -> Moments:
    accumulator = MomentAccumulator()
    for start in range(0, len(data), batch):
        accumulator.add(data[start : start + batch])
    return accumulator.moments()


def cholesky_distances(train: F32, ridge_variance: float, query: F32) -> npt.NDArray[np.float64]:
    """The full form: |L^-1 (x - mu)| with LL' = covariance + ridge, float64 throughout."""
    distances = np.zeros((len(query), P))
    for position in range(P):
        own = train[:, position].astype(np.float64)
        covariance = np.cov(own, rowvar=False) + ridge_variance * np.eye(own.shape[1])
        lower = np.linalg.cholesky(covariance)
        delta = query[:, position].astype(np.float64) - own.mean(axis=0)
        distances[:, position] = np.linalg.norm(np.linalg.solve(lower, delta.T), axis=0)
    return distances


def test_moments_give_numpys_mean_and_covariance() -> None:
    data = embeddings(40)
    moments = accumulate(data)
    np.testing.assert_allclose(moments.mean, data.astype(np.float64).mean(axis=0), atol=1e-5)
    for position in range(P):
        expected = np.cov(data[:, position].astype(np.float64), rowvar=False)
        np.testing.assert_allclose(moments.covariance()[position], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(moments.covariance(slice(3, 5)), moments.covariance()[3:5])


def test_a_large_offset_does_not_eat_the_precision() -> None:
    data = embeddings(60, offset=3000.0)
    expected = np.cov(data[:, 0].astype(np.float64), rowvar=False)
    np.testing.assert_allclose(accumulate(data).covariance()[0], expected, rtol=1e-3, atol=1e-4)


def test_more_positions_than_one_block_are_all_counted() -> None:
    data = np.random.default_rng(1).normal(size=(9, 100, 3)).astype(np.float32)
    covariance = accumulate(data).covariance()
    for position in (0, 31, 32, 63, 64, 99):
        np.testing.assert_allclose(covariance[position], np.cov(data[:, position], rowvar=False), rtol=1e-4, atol=1e-5)


def test_removing_a_batch_leaves_the_rest() -> None:
    data = embeddings(50)
    whole = accumulate(data)
    before = whole.outer.copy()
    accumulator = MomentAccumulator(whole)
    accumulator.remove(data[30:])
    np.testing.assert_array_equal(whole.outer, before)
    rest = accumulator.moments()
    assert rest.count == 30
    np.testing.assert_allclose(rest.mean, accumulate(data[:30]).mean, atol=1e-5)
    np.testing.assert_allclose(rest.covariance(), accumulate(data[:30]).covariance(), atol=2e-4)


def test_an_accumulator_may_start_about_any_point() -> None:
    data = embeddings(20)
    odd = accumulate(data).about(np.full((P, C), 1 / 3))
    accumulator = MomentAccumulator(odd)
    accumulator.add(embeddings(10, seed=1))
    pooled = np.concatenate([data, embeddings(10, seed=1)])
    np.testing.assert_allclose(accumulator.moments().covariance(), accumulate(pooled).covariance(), atol=1e-4)


def test_bad_moments_are_refused() -> None:
    accumulator = MomentAccumulator()
    with pytest.raises(DataError, match="no images"):
        accumulator.moments()
    with pytest.raises(DataError, match=r"\[N, P, C\]"):
        accumulator.add(np.zeros((3, 4), dtype=np.float32))
    accumulator.add(embeddings(1))
    with pytest.raises(DataError, match="at least 2"):
        fit_gaussian(accumulator.moments(), grid=GRID, rank=2)
    with pytest.raises(DataError, match="per image"):
        accumulator.add(embeddings(2)[:, :5])
    with pytest.raises(DataError, match="cannot remove"):
        accumulator.remove(embeddings(2))
    broken = embeddings(2)
    broken[1, 3, 2] = np.nan
    with pytest.raises(NumericalError, match="NaN"):
        accumulator.add(broken)


def test_without_truncation_distances_are_those_of_the_full_covariance() -> None:
    train, query = embeddings(200), embeddings(15, seed=5)
    gaussian = fit_gaussian(accumulate(train), grid=GRID, rank=C - 1, ridge=0.01)
    expected = cholesky_distances(train, gaussian.ridge_variance, query)
    np.testing.assert_allclose(gaussian.distances(query), expected, rtol=1e-3)
    np.testing.assert_allclose(gaussian.distances(query.astype(np.float64)), expected, rtol=1e-3)


def test_with_fewer_images_than_channels_rank_n_minus_1_is_exact() -> None:
    train, query = embeddings(6), embeddings(15, seed=5)
    gaussian = fit_gaussian(accumulate(train), grid=GRID, rank=100, ridge=0.05)
    assert gaussian.rank == 5
    assert gaussian.residual.max() < 1e-5 * gaussian.mean_variance
    expected = cholesky_distances(train, gaussian.ridge_variance, query)
    np.testing.assert_allclose(gaussian.distances(query.astype(np.float64)), expected, rtol=2e-3)


def test_a_truncated_gaussian_is_its_own_dense_covariance() -> None:
    gaussian = fit_gaussian(accumulate(embeddings(80)), grid=GRID, rank=3)
    query = embeddings(6, seed=8)
    eigenvalues, residual = gaussian.variances()
    for position in range(P):
        basis = gaussian.basis[position].astype(np.float64)
        dense = basis @ np.diag(eigenvalues[position] - residual[position]) @ basis.T
        dense += residual[position] * np.eye(C)
        delta = (query[:, position] - gaussian.mean[position]).astype(np.float64)
        expected = np.sqrt(np.einsum("nc,cd,nd->n", delta, np.linalg.inv(dense), delta))
        np.testing.assert_allclose(gaussian.distances(query)[:, position], expected, rtol=1e-3)


def test_truncation_keeps_the_mean_variance() -> None:
    gaussian = fit_gaussian(accumulate(embeddings(80)), grid=GRID, rank=8)
    for rank in (0, 1, 5):
        assert gaussian.truncated(rank).mean_variance == pytest.approx(gaussian.mean_variance, rel=1e-5)
        direct = fit_gaussian(accumulate(embeddings(80)), grid=GRID, rank=rank)
        np.testing.assert_allclose(gaussian.truncated(rank).residual, direct.residual, rtol=1e-4)
    assert gaussian.truncated(50) is gaussian


def test_a_basis_in_float16_changes_next_to_nothing() -> None:
    """The worst case of the document this guards: eigenvalues a million times the residual."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(P, 64, 8)))[0].astype(np.float32)
    gaussian = LowRankGaussian(
        grid=GRID,
        count=100,
        ridge=1e-9,
        mean=np.zeros((P, 64), np.float32),
        basis=basis,
        eigenvalues=np.full((P, 8), 1e6, np.float32),
        residual=np.ones(P, np.float32),
    )
    along = np.einsum("npk,pck->npc", rng.normal(size=(20, P, 8)), basis) * 1e3
    query = (along + 10 * rng.normal(size=(20, P, 64))).astype(np.float32)
    exact = gaussian.distances(query.astype(np.float64))
    stored = decode_statistics(encode_statistics(gaussian))
    np.testing.assert_array_equal(stored.basis, gaussian.as_stored().basis)
    np.testing.assert_array_equal(stored.distances(query), gaussian.as_stored().distances(query))
    np.testing.assert_allclose(gaussian.as_stored().distances(query), exact, rtol=0.02)


@given(
    query=hnp.arrays(np.float32, (2, P, C), elements=st.floats(-1e4, 1e4, width=32)),
    rank=st.integers(0, C - 1),
    ridge=st.floats(1e-6, 1.0),
)
@settings(max_examples=50, deadline=None)
def test_distances_are_never_negative_and_always_finite(query: F32, rank: int, ridge: float) -> None:
    gaussian = replace(NARROW.truncated(rank).as_stored(), ridge=ridge)
    distances = gaussian.distances(query)
    assert np.isfinite(distances).all()
    assert (distances >= 0).all()


NARROW = fit_gaussian(accumulate(embeddings(30)), grid=GRID, rank=C - 1)


def test_a_fault_is_never_a_pass() -> None:
    query = embeddings(2)
    query[0, 0, 0] = np.inf
    with pytest.raises(NumericalError, match="NaN or infinite"):
        NARROW.distances(query)


@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_pooled_statistics_are_those_of_all_embeddings_within_the_radius(radius: int) -> None:
    """Against the long way: the neighbours' embeddings, put together and given to numpy."""
    data = embeddings(9) + np.linspace(-4, 4, P)[None, :, None].astype(np.float32)
    height, width = GRID
    gaussian = fit_gaussian(accumulate(data), grid=GRID, rank=C - 1, radius=radius)
    for position in range(P):
        y, x = divmod(position, width)
        near = [
            v * width + u
            for v in range(max(0, y - radius), min(height, y + radius + 1))
            for u in range(max(0, x - radius), min(width, x + radius + 1))
        ]
        together = data[:, near].reshape(-1, C).astype(np.float64)
        np.testing.assert_allclose(gaussian.mean[position], together.mean(axis=0), rtol=1e-5)
        scatter = np.cov(together, rowvar=False, bias=True) * len(data) / (len(data) - 1)
        expected = np.linalg.eigvalsh(scatter)[::-1]
        rank = gaussian.rank
        np.testing.assert_allclose(gaussian.eigenvalues[position], expected[:rank], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(gaussian.residual[position], expected[rank:].mean(), rtol=1e-2, atol=1e-4)


def test_pooling_goes_on_across_blocks_of_rows_as_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = accumulate(embeddings(9))
    whole = fit_gaussian(moments, grid=GRID, rank=3, radius=1)
    monkeypatch.setattr("edgeflame.statistics.pooling.BLOCK_BYTES", 1)  # one row at a time
    by_rows = fit_gaussian(moments, grid=GRID, rank=3, radius=1)
    np.testing.assert_allclose(by_rows.distances(embeddings(4, 5)), whole.distances(embeddings(4, 5)), rtol=1e-5)


def test_pooled_moments_of_two_sites_are_those_of_all_images() -> None:
    first, second = embeddings(12, 1), embeddings(7, 2) + 1
    together = fit_gaussian(accumulate(np.concatenate([first, second])), grid=GRID, rank=5, radius=1)
    accumulator = MomentAccumulator(accumulate(first))
    accumulator.add(second)
    merged = fit_gaussian(accumulator.moments(), grid=GRID, rank=5, radius=1)
    query = embeddings(5, 9)
    np.testing.assert_allclose(merged.distances(query), together.distances(query), rtol=1e-4)


@pytest.mark.parametrize("radius", [0, 1])
def test_statistics_near_others_are_those_made_from_nothing(radius: int) -> None:
    data, query = embeddings(40, channels=24), embeddings(9, seed=99, channels=24)
    whole = fit_gaussian(accumulate(data), grid=GRID, rank=12, radius=radius)
    without = accumulate(data[4:])
    near = fit_gaussian(without, grid=GRID, rank=4, radius=radius, near=whole)
    expected = fit_gaussian(without, grid=GRID, rank=4, radius=radius)
    assert near.rank == 4
    np.testing.assert_allclose(near.distances(query), expected.distances(query), rtol=5e-3)


def test_a_position_that_never_varies_is_no_obstacle() -> None:
    data = embeddings(6)
    data[:, 0] = data[0, 0]
    gaussian = fit_gaussian(accumulate(data), grid=GRID, rank=3)
    near = fit_gaussian(accumulate(data[1:]), grid=GRID, rank=2, near=gaussian)
    assert np.isfinite(near.distances(embeddings(4, seed=5))).all()
    with pytest.raises(DataError, match="radius"):
        fit_gaussian(accumulate(data), grid=GRID, rank=3, radius=-1)


def test_the_log_determinant_is_that_of_the_full_covariance() -> None:
    data = embeddings(30)
    gaussian = fit_gaussian(accumulate(data), grid=GRID, rank=C - 1, ridge=0.1)
    covariances = [np.cov(data[:, p].astype(np.float64), rowvar=False) for p in range(P)]
    ridge = gaussian.ridge_variance * np.eye(C)
    expected = np.mean([np.linalg.slogdet(one + ridge)[1] for one in covariances])
    assert gaussian.mean_log_determinant == pytest.approx(expected, rel=1e-4)


def test_identical_images_are_refused() -> None:
    same = np.repeat(embeddings(1), 5, axis=0)
    with pytest.raises(NumericalError, match="nothing varies"):
        fit_gaussian(accumulate(same), grid=GRID, rank=2)
    with pytest.raises(DataError, match="negative"):
        fit_gaussian(accumulate(embeddings(5)), grid=GRID, rank=-1)


def test_smoothing_keeps_a_constant_and_spreads_a_peak() -> None:
    flat = np.full((1, 9, 7), 3.0, dtype=np.float32)
    np.testing.assert_allclose(smooth_maps(flat, 2.0), flat, rtol=1e-6)
    peak = np.zeros((1, 31, 31), dtype=np.float32)
    peak[0, 15, 15] = 1.0
    smoothed = smooth_maps(peak, 2.0)
    assert smoothed.sum() == pytest.approx(1.0, rel=1e-4)
    assert smoothed[0, 15, 15] == pytest.approx(1 / (2 * np.pi * 4), rel=0.01)
    np.testing.assert_array_equal(smooth_maps(peak, 0.0), peak)
    np.testing.assert_allclose(smoothing_matrix(8, 1.5).sum(axis=1), 1.0, rtol=1e-6)
