"""Statistics that are shared: pooling against the pooled images, errors against their bounds, and hostile bytes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from aggregator.pooling import pool_statistics
from edgeflame.errors import DataError, EdgeFlameError, NumericalError
from edgeflame.statistics.moments import MomentAccumulator, Moments
from edgeflame.statistics.shared import (
    METADATA_KEY,
    ScoreDeviation,
    StatisticsFile,
    StatisticsHeader,
    Truncation,
    read_moments,
    write_site_statistics,
)

GRID, C = (2, 3), 7
MODEL = "a" * 64
F32 = npt.NDArray[np.float32]

again = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def images(count: int, seed: int, *, decay: float = 0.5, offset: float = 3.0) -> F32:
    """``[count, P, C]`` with a falling spectrum, other directions at each position, about a mean of the seed's own."""
    rng = np.random.default_rng(seed)
    positions = GRID[0] * GRID[1]
    scales = decay ** np.arange(C)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(positions, C, C)))[0]
    samples = np.einsum("npc,pdc->npd", rng.normal(size=(count, positions, C)) * scales, turn)
    return (samples + offset * rng.normal(size=(positions, C))).astype(np.float32)


def moments(embeddings: F32) -> Moments:
    accumulator = MomentAccumulator()
    accumulator.add(embeddings)
    return accumulator.moments()


def write(path: Path, embeddings: F32, *, form: str, rank: int = 3, model: str = MODEL) -> Truncation:
    return write_site_statistics(path, moments(embeddings), grid=GRID, model=model, form=form, rank=rank)  # type: ignore[arg-type]


def exact(parts: list[F32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and covariance of all images, slowly and in float64."""
    whole = np.concatenate(parts).astype(np.float64)
    covariance = np.stack([np.cov(whole[:, p], rowvar=False) for p in range(whole.shape[1])])
    return whole.mean(axis=0), covariance


@again
@given(counts=st.lists(st.integers(2, 12), min_size=1, max_size=5), offset=st.sampled_from([0.0, 3.0, 1000.0]))
def test_pooled_moments_are_those_of_the_pooled_images(counts: list[int], offset: float, tmp_path: Path) -> None:
    parts = [images(count, seed, offset=offset) for seed, count in enumerate(counts)]
    paths = {f"site-{index}": tmp_path / f"{index}.safetensors" for index in range(len(parts))}
    for path, part in zip(paths.values(), parts, strict=True):
        write(path, part, form="moments")
    truncation = pool_statistics(paths, tmp_path / "pooled", rank=0)
    mean, covariance = exact(parts)
    pooled, header = read_moments(tmp_path / "pooled")
    assert header.count == sum(counts)
    assert header.sites == {f"site-{index}": count for index, count in enumerate(counts)}
    assert truncation.bound_max == truncation.measured_max == 0
    # Sums are kept about a float32 mean, whose rounding is relative to the largest of a position's values.
    np.testing.assert_allclose(pooled.mean, mean, rtol=1e-6, atol=1e-5 + 1e-7 * np.abs(mean).max())
    # The means that are subtracted are float32: what is left of them is relative to their size.
    scale = np.abs(covariance).max()
    np.testing.assert_allclose(pooled.covariance(), covariance, atol=2e-6 * scale + 1e-6 * offset)


@again
@given(
    counts=st.lists(st.integers(3, 30), min_size=1, max_size=4),
    rank=st.integers(0, C - 1),
    decay=st.sampled_from([0.3, 0.7, 1.0]),
)
def test_a_truncated_covariance_is_off_by_no_more_than_is_said(
    counts: list[int], rank: int, decay: float, tmp_path: Path
) -> None:
    parts = [images(count, seed, decay=decay) for seed, count in enumerate(counts)]
    paths = {f"site-{index}": tmp_path / f"{index}.safetensors" for index in range(len(parts))}
    for path, part in zip(paths.values(), parts, strict=True):
        write(path, part, form="low_rank", rank=rank)
        with StatisticsFile(path) as file:
            file.verify()
    truncation = pool_statistics(paths, tmp_path / "pooled", rank=rank)
    mean, covariance = exact(parts)
    pooled, _ = read_moments(tmp_path / "pooled")
    np.testing.assert_allclose(pooled.mean, mean, rtol=1e-6, atol=1e-6)
    error = np.linalg.norm(pooled.covariance() - covariance, axis=(1, 2)) / np.linalg.norm(covariance, axis=(1, 2))
    slack = 1e-4
    assert error.max() <= truncation.measured_max * (1 + slack) + slack
    assert error.mean() <= truncation.measured_mean * (1 + slack) + slack
    assert truncation.measured_max <= truncation.bound_max * (1 + slack) + slack


def test_what_no_site_truncates_is_pooled_to_the_precision_of_the_basis(tmp_path: Path) -> None:
    parts = [images(3, seed) for seed in range(2)]
    paths = {str(index): tmp_path / str(index) for index in range(2)}
    for path, part in zip(paths.values(), parts, strict=True):
        write(path, part, form="low_rank", rank=C - 1)
    truncation = pool_statistics(paths, tmp_path / "pooled", rank=C - 1)
    covariance = exact(parts)[1]
    error = np.linalg.norm(read_moments(tmp_path / "pooled")[0].covariance() - covariance, axis=(1, 2))
    assert (error / np.linalg.norm(covariance, axis=(1, 2))).max() < 2e-3
    assert truncation.bound_max < 0.02


def test_the_same_parts_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in "cab"}
    for seed, path in enumerate(paths.values()):
        write(path, images(9, seed), form="low_rank")
    pool_statistics(paths, tmp_path / "one", rank=4)
    pool_statistics(dict(sorted(paths.items())), tmp_path / "two", rank=4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_fleets_spread_of_scores_is_the_median_of_its_sites(tmp_path: Path) -> None:
    told = {"a": 0.2, "b": 0.3, "c": 0.25, "liar": 3.0}
    for seed, (site, deviation) in enumerate(told.items()):
        write_site_statistics(
            tmp_path / site,
            moments(images(9, seed)),
            grid=GRID,
            model=MODEL,
            form="moments",
            rank=0,
            spread=ScoreDeviation(deviation=deviation, num_parts=9),
        )
    write(tmp_path / "older", images(9, 9), form="moments")

    def pooled(*sites: str) -> StatisticsHeader:
        pool_statistics({site: tmp_path / site for site in sites}, tmp_path / "out", rank=0, as_prior=True)
        return read_moments(tmp_path / "out")[1]

    assert pooled("a", "b", "older").spread is msgspec.UNSET
    spread = pooled("a", "b", "c", "older", "liar").spread
    assert isinstance(spread, ScoreDeviation)
    # Of nine parts half of all sites measure less than 0.957 of the true deviation: the median of chi-square.
    assert spread.deviation == pytest.approx(np.median([0.2, 0.3, 0.25, 3.0]) / np.sqrt(chi2.median(8) / 8), rel=1e-3)
    assert spread.num_parts == 36


def test_other_embeddings_are_not_pooled(tmp_path: Path) -> None:
    write(tmp_path / "a", images(5, 0), form="moments")
    write(tmp_path / "b", images(5, 0), form="moments", model="b" * 64)
    write(tmp_path / "c", images(5, 0), form="low_rank")
    with pytest.raises(DataError, match="b cannot be pooled: they are of the embeddings of model bbbbbbbbbbbb"):
        pool_statistics({name: tmp_path / name for name in "ab"}, tmp_path / "out", rank=3)
    with pytest.raises(DataError, match="they are of 7 channels on a grid of 2x3, as low_rank; the others' are of"):
        pool_statistics({name: tmp_path / name for name in "ac"}, tmp_path / "out", rank=3)
    with pytest.raises(DataError, match="no statistics"):
        pool_statistics({}, tmp_path / "out", rank=3)


def forged(path: Path, form: str, name: str, value: float | F32, at: tuple[int, ...] = (0,)) -> Path:
    """A blob with something else in one of its tensors."""
    write(path, images(9, 1), form=form)
    tensors = safetensors.numpy.load_file(path)
    tensors[name][at] = value
    with safetensors.safe_open(path, framework="numpy") as stream:
        safetensors.numpy.save_file(tensors, path, metadata=stream.metadata())
    return path


@pytest.mark.parametrize(
    ("form", "name", "value", "complaint"),
    [
        ("moments", "mean", np.nan, "NaN"),
        ("moments", "covariance", -1.0, "a variance is negative"),
        ("low_rank", "eigenvalues", -1.0, "negative"),
        ("low_rank", "residual", 50.0, "do not fall"),
        ("low_rank", "basis", 0.5, "not orthonormal"),
        ("low_rank", "error", 100.0, "larger than the eigenvalues allow"),
        ("low_rank", "residual", np.inf, "NaN or infinite"),
    ],
)
def test_impossible_values_are_refused(form: str, name: str, value: float, complaint: str, tmp_path: Path) -> None:
    with StatisticsFile(forged(tmp_path / "blob", form, name, value)) as file, pytest.raises(NumericalError) as info:
        file.verify()
    assert complaint in str(info.value)


def test_a_covariance_that_is_none_is_refused(tmp_path: Path) -> None:
    # Off the diagonal, larger than both variances together.
    path = forged(tmp_path / "blob", "moments", "covariance", 50.0, (2, 1))
    with StatisticsFile(path) as file, pytest.raises(NumericalError, match="not positive semi-definite"):
        file.verify()
    path = tmp_path / "same"
    write(path, np.ones((4, 6, C), dtype=np.float32), form="moments")
    with StatisticsFile(path) as file, pytest.raises(NumericalError, match="nothing varies"):
        file.verify()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_channels": 8},
        {"grid": (0, 6)},
        {"grid": (1 << 20, 1 << 20)},
        {"count": 1},
        {"rank": 7},
        {"form": "pickle"},
        {"surprise": 1},
        {"spread": {"deviation": -0.1, "num_parts": 5}},
        {"spread": {"deviation": 9.0, "num_parts": 5}},
        {"spread": {"deviation": 0.2, "num_parts": 1}},
    ],
)
def test_headers_that_cannot_be_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "blob"
    write(path, images(9, 1), form="low_rank")
    tensors = safetensors.numpy.load_file(path)
    with StatisticsFile(path) as file:
        header = {**msgspec.to_builtins(file.header), **changes}
    safetensors.numpy.save_file(tensors, path, metadata={METADATA_KEY: msgspec.json.encode(header).decode()})
    with pytest.raises(DataError):
        StatisticsFile(path)


def test_a_blob_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    write(path, images(5, 0), form="low_rank", rank=1)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(EdgeFlameError):
            read_moments(path)


def test_a_header_says_what_its_tensors_are() -> None:
    header = StatisticsHeader(form="moments", grid=GRID, num_channels=C, rank=0, count=3, model=MODEL)
    assert {name: spec.shape for name, spec in header.schema().items()} == {"covariance": (6, 28), "mean": (6, 7)}
    with pytest.raises(DataError, match="rank of moments"):
        StatisticsHeader(form="moments", grid=GRID, num_channels=C, rank=2, count=3, model=MODEL)
