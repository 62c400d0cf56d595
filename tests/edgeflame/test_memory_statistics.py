"""Memories: the bank that travels, the statistics in a package, and hostile bytes in place of either."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeflame.errors import DataError, EdgeFlameError, NumericalError, PackageError
from edgeflame.package import read_package, write_package
from edgeflame.statistics.codec import decode_statistics, encode_statistics
from edgeflame.statistics.memory import METADATA_KEY, MemoryBank, MemoryStatistics, empty_bank, read_bank, write_bank
from tests.support.small_package import small_manifest

SPACE = "a" * 64
again = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bank(size: int = 4, channels: int = 3, seed: int = 0, *, placed: bool = False) -> MemoryBank:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1, size)
    return MemoryBank(
        prototypes=rng.normal(size=(size, channels)).astype(np.float32),
        weights=(weights / weights.sum()).astype(np.float32),
        effective_patches=rng.uniform(32, 90, size).astype(np.float32),
        effective_images=rng.uniform(4, 9, size).astype(np.float32),
        count=20,
        space=SPACE,
        places=rng.uniform(0, 1, (size, 2)).astype(np.float32) if placed else None,
        spreads=rng.uniform(0.3, 3, size).astype(np.float32) if placed else None,
    )


def memory(size: int = 5, channels: int = 4, seed: int = 0, *, placed: bool = False) -> MemoryStatistics:
    rng = np.random.default_rng(seed)
    return MemoryStatistics(
        grid=(2, 3),
        count=11,
        prototypes=rng.normal(3, 1, size=(size, channels)).astype(np.float32),
        transform=(np.eye(channels) + 0.3 * rng.normal(size=(channels, channels))).astype(np.float32),
        centre=np.full(channels, 3, dtype=np.float32),
        num_global=size // 2,
        places=rng.uniform(0, 1, (size, 2)).astype(np.float32) if placed else None,
        spreads=rng.uniform(0.3, 3, size).astype(np.float32) if placed else None,
        position_weight=1.5 if placed else 0.0,
    )


@again
@given(size=st.integers(1, 40), channels=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_bank_comes_back_as_it_was_and_has_one_form(size: int, channels: int, seed: int, tmp_path: Path) -> None:
    one = bank(size, channels, seed)
    write_bank(tmp_path / "one", one)
    back = read_bank(tmp_path / "one")
    write_bank(tmp_path / "two", back)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (back.count, back.space, len(back)) == (20, SPACE, size)
    for name in ("prototypes", "weights", "effective_patches", "effective_images"):
        np.testing.assert_array_equal(getattr(back, name), getattr(one, name))


def test_an_empty_bank_travels_too(tmp_path: Path) -> None:
    write_bank(tmp_path / "empty", empty_bank(7, SPACE))
    back = read_bank(tmp_path / "empty")
    assert (len(back), back.num_channels, back.count) == (0, 7, 0)


def test_a_bank_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    write_bank(path, bank())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_bank(path)


@again
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_bank_with_any_byte_changed_is_a_bank_or_refused(position: int, value: int, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    write_bank(path, bank())
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(EdgeFlameError):
        assert np.isfinite(read_bank(path).prototypes).all()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prototypes": np.full((4, 3), np.nan, np.float32)}, NumericalError),
        ({"weights": np.array([0.5, 0.5, 0.5, 0.5], np.float32)}, DataError),
        ({"weights": np.array([-0.5, 0.5, 0.5, 0.5], np.float32)}, NumericalError),
        ({"effective_patches": np.zeros(4, np.float32)}, NumericalError),
        ({"effective_images": np.full(4, np.inf, np.float32)}, NumericalError),
        ({"weights": np.ones(3, np.float32) / 3}, DataError),
        ({"count": 0}, DataError),
    ],
)
def test_impossible_banks_are_refused(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        replace(bank(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "header",
    [b"", b"{}", b'{"count":-1,"space":"%s"}' % (b"a" * 64), b'{"count":20,"space":"x"}', b'{"count":20,"more":1}'],
)
def test_impossible_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    write_bank(path, bank())
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata={METADATA_KEY: header.decode()})
    with pytest.raises(DataError, match="not a memory bank"):
        read_bank(path)


def test_tensors_that_are_no_bank_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    header = msgspec.json.encode({"count": 20, "space": SPACE}).decode()
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, path, metadata={METADATA_KEY: header})
    with pytest.raises(DataError, match="its tensors are weight"):
        read_bank(path)


@again
@given(size=st.integers(1, 20), channels=st.integers(1, 8), seed=st.integers(0, 99), placed=st.booleans())
def test_distances_are_those_to_the_nearest_prototype(size: int, channels: int, seed: int, placed: bool) -> None:
    statistics = memory(size, channels, seed, placed=placed)
    embeddings = np.random.default_rng(seed + 1).normal(3, 2, size=(2, 6, channels))
    transform = statistics.transform.astype(np.float64)
    expected = np.empty((2, 6))
    for n in range(2):
        for p in range(6):
            steps = (embeddings[n, p] - statistics.prototypes.astype(np.float64)) @ transform.T
            squared = np.square(steps).sum(axis=1)
            if placed:
                assert statistics.places is not None
                assert statistics.spreads is not None
                at = np.array([(p // 3 + 0.5) / 2, (p % 3 + 0.5) / 3])
                squared += 1.5**2 * channels * np.square(at - statistics.places).sum(axis=1)
                squared /= statistics.spreads
            expected[n, p] = np.sqrt(squared.min())
    np.testing.assert_allclose(statistics.distances(embeddings), expected, rtol=1e-9, atol=1e-6)
    single = statistics.distances(embeddings.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=5e-3)


def test_a_prototype_is_at_distance_zero_and_a_fault_is_no_pass() -> None:
    statistics = memory()
    at = np.broadcast_to(statistics.prototypes[1], (1, 6, 4)).astype(np.float64)
    np.testing.assert_allclose(statistics.distances(at), 0, atol=1e-6)
    broken = at.copy()
    broken[0, 3, 2] = np.nan
    with pytest.raises(NumericalError):
        statistics.distances(broken)


def test_a_placed_bank_comes_back_in_half_the_bytes_and_has_one_form(tmp_path: Path) -> None:
    one = replace(bank(200, 64, placed=True), measured=np.float32([[0, 1], [40, 2.5], [1e6, 0.25]]))
    write_bank(tmp_path / "one", one)
    back = read_bank(tmp_path / "one")
    write_bank(tmp_path / "two", back)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    np.testing.assert_allclose(back.prototypes, one.prototypes, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(back.measured, one.measured)  # type: ignore[arg-type]
    for name in ("weights", "effective_patches", "effective_images", "places", "spreads"):
        np.testing.assert_array_equal(getattr(back, name), getattr(one, name))
    assert (tmp_path / "one").stat().st_size < 200 * (2 * 64 + 4 * 6) + 1000
    # What float16 cannot hold stays as it is.
    far = replace(one, prototypes=np.full((200, 64), 1e5, np.float32))
    write_bank(tmp_path / "far", far)
    np.testing.assert_array_equal(read_bank(tmp_path / "far").prototypes, far.prototypes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"places": None}, DataError),
        ({"places": np.full((4, 2), 1.5, np.float32)}, DataError),
        ({"places": np.full((4, 2), np.nan, np.float32)}, NumericalError),
        ({"places": np.zeros((4, 3), np.float32)}, DataError),
        ({"spreads": np.zeros(4, np.float32)}, NumericalError),
        ({"spreads": np.ones(3, np.float32)}, DataError),
        ({"measured": np.ones((4, 3), np.float32)}, DataError),
        ({"measured": np.full((4, 2), np.nan, np.float32)}, NumericalError),
        ({"measured": np.zeros((4, 2), np.float32)}, NumericalError),
        ({"measured": np.full((4, 2), -1, np.float32)}, NumericalError),
        ({"measured": np.ones((4, 2), np.float32), "places": None, "spreads": None}, DataError),
    ],
)
def test_impossible_places_and_spreads_are_refused(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        replace(bank(placed=True), **changes)  # type: ignore[arg-type]


def test_half_of_what_a_placed_bank_needs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    write_bank(path, bank(placed=True))
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    del tensors["spreads"]
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    with pytest.raises(DataError, match="not a memory bank"):
        read_bank(path)


@pytest.mark.parametrize("placed", [False, True])
def test_a_package_holds_a_memory(tmp_path: Path, placed: bool) -> None:
    statistics = memory(placed=placed)
    manifest = small_manifest(statistics, threshold=2.0)
    write_package(tmp_path / "m.edgeflame", manifest=manifest, model_onnx=b"onnx", statistics=statistics)
    package = read_package(tmp_path / "m.edgeflame")
    assert package.manifest.size_in_words == "5 prototypes"
    assert isinstance(package.statistics, MemoryStatistics)
    assert package.statistics.num_global == 2
    for name in ("prototypes", "transform", "centre"):
        np.testing.assert_array_equal(getattr(package.statistics, name), getattr(statistics, name))
    assert package.statistics.position_weight == statistics.position_weight
    if placed:
        np.testing.assert_array_equal(package.statistics.places, statistics.places)
        np.testing.assert_array_equal(package.statistics.spreads, statistics.spreads)
    # A manifest that describes other statistics than are there.
    wrong = msgspec.structs.replace(manifest, num_prototypes=4)
    write_package(tmp_path / "m.edgeflame", manifest=wrong, model_onnx=b"onnx", statistics=statistics)
    with pytest.raises(PackageError, match="not those the manifest describes"):
        read_package(tmp_path / "m.edgeflame")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transform", np.zeros((4, 4))),
        ("transform", np.eye(3)),
        ("centre", np.full(4, np.inf)),
        ("prototypes", np.ones(4)),
    ],
)
def test_hostile_memories_are_refused(name: str, value: np.ndarray) -> None:
    data = encode_statistics(memory())
    metadata = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = {**safetensors.numpy.load(data), name: value.astype(np.float32)}
    with pytest.raises((DataError, NumericalError)):
        decode_statistics(safetensors.numpy.save(tensors, metadata=metadata))


@pytest.mark.parametrize(
    "header", ["", "{}", '{"count":0,"num_global":0,"grid":[2,3]}', '{"count":3,"num_global":9,"grid":[2,3]}']
)
def test_hostile_headers_of_memories_are_refused(header: str) -> None:
    tensors = safetensors.numpy.load(encode_statistics(memory()))
    with pytest.raises(DataError):
        decode_statistics(safetensors.numpy.save(tensors, metadata={"memory": header}))
