"""Encoded updates: what they decode to, at what error and size; and bytes from anybody."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.numpy
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeflame.errors import DataError
from edgeflame.mqtt.messages import Codec
from edgeflame.tensors import BLOCK_ELEMENTS, TensorFile, canonicalise
from edgeflame.transfer import compression
from edgeflame.transfer.compression import decode_update, encode_update, usable_codec

CODECS: tuple[Codec, ...] = ("float16", "zstd", "float16_zstd")
LOSSY = ("float16", "float16_zstd")


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """In canonical form."""
    draft = path.with_name(path.name + ".draft")
    safetensors.numpy.save_file(tensors, draft, metadata={"origin": "x"})
    canonicalise(draft, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    generator = np.random.default_rng(0)
    base = {
        "weight": generator.normal(size=(BLOCK_ELEMENTS + 33,)).astype(np.float32),
        "half": generator.normal(size=(4, 3)).astype(np.float16),
        "same": np.ones(5, dtype=np.float64),
        "count": np.array(7, dtype=np.int64),
        "flag": np.array([True, False, True]),
        "empty": np.zeros((0, 3), dtype=np.float32),
    }
    update = {
        **base,
        "weight": base["weight"] + generator.normal(size=base["weight"].shape).astype(np.float32) * np.float32(1e-4),
        "half": base["half"] * np.float16(1.01),
        "count": np.array(12, dtype=np.int64),
        "flag": np.array([True, True, False]),
    }
    return save(tmp_path / "base", base), save(tmp_path / "update", update)


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_comes_back_at_the_error_that_was_said_in_fewer_bytes(
    tmp_path: Path, pair: tuple[Path, Path], codec: Codec
) -> None:
    base, update = pair
    error = encode_update(codec, base, update, tmp_path / "sent")
    decode_update(codec, base, tmp_path / "sent", tmp_path / "back")
    first, second = (safetensors.numpy.load_file(path) for path in (update, tmp_path / "back"))
    before = safetensors.numpy.load_file(base)
    with TensorFile(update) as a, TensorFile(tmp_path / "back") as b:
        assert (a.schema, a.metadata) == (b.schema, b.metadata)
    if codec in LOSSY:
        far = sum(np.square(second[n].astype(np.float64) - first[n]).sum() for n in ("weight", "half"))
        change = sum(np.square(first[n].astype(np.float64) - before[n]).sum() for n in ("weight", "half"))
        assert error == pytest.approx(np.sqrt(far / change), rel=1e-9)
        # The float32 weights themselves round at 6e-8 of 1, which is 6e-4 of this change.
        assert 0 < error < 1e-3
        np.testing.assert_array_equal(first["count"], second["count"])
        np.testing.assert_array_equal(first["flag"], second["flag"])
    else:
        assert error == 0
        assert (tmp_path / "back").read_bytes() == update.read_bytes()
    share = (tmp_path / "sent").stat().st_size / update.stat().st_size
    assert share < {"float16": 0.51, "zstd": 0.75, "float16_zstd": 0.5}[codec]
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".plain"} == set()


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_and_decoding_give_the_same_bytes_each_time(
    tmp_path: Path, pair: tuple[Path, Path], codec: Codec
) -> None:
    files = []
    for attempt in range(2):
        encode_update(codec, *pair, tmp_path / f"sent{attempt}")
        decode_update(codec, pair[0], tmp_path / f"sent{attempt}", tmp_path / f"back{attempt}")
        files.append([(tmp_path / f"{name}{attempt}").read_bytes() for name in ("sent", "back")])
    assert files[0] == files[1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(codec=st.sampled_from(CODECS), seed=st.integers(0, 2**32), cut=st.booleans())
def test_damaged_bytes_decode_or_raise_the_one_error(
    tmp_path_factory: pytest.TempPathFactory, codec: Codec, seed: int, cut: bool
) -> None:
    folder, chance = tmp_path_factory.mktemp("damage"), random.Random(seed)
    values = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    base = save(folder / "base", {"w": values, "n": np.array(3)})
    update = save(folder / "update", {"w": values + np.float32(0.01), "n": np.array(4)})
    encode_update(codec, base, update, folder / "sent")
    data = bytearray((folder / "sent").read_bytes())
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    (folder / "sent").write_bytes(data[: chance.randrange(len(data))] if cut else data)
    try:
        decode_update(codec, base, folder / "sent", folder / "back")
    except DataError:
        return
    with TensorFile(folder / "back") as back, TensorFile(base) as before:
        assert back.schema == before.schema


@pytest.mark.parametrize("codec", ["zstd", "float16_zstd"])
def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, pair: tuple[Path, Path], codec: Codec) -> None:
    bomb = tmp_path / "bomb"
    with bomb.open("wb") as stream, zstandard.ZstdCompressor(level=19).stream_writer(stream) as writer:
        for _ in range(100):
            writer.write(bytes(1 << 20))
    assert bomb.stat().st_size < 20_000
    largest = 0
    real = compression._inflate

    def watched(source: Path, target: Path, *, limit: int) -> None:
        nonlocal largest
        try:
            real(source, target, limit=limit)
        finally:
            largest = target.stat().st_size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_inflate", watched)
        with pytest.raises(DataError, match="inflates to more than"):
            decode_update(codec, pair[0], bomb, tmp_path / "back")
    assert largest < 12 << 20


def test_a_frame_that_wants_a_huge_window_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with (tmp_path / "wide").open("wb") as stream, compressor.stream_writer(stream) as writer:
        writer.write(random.Random(0).randbytes(1 << 20))
    with pytest.raises(DataError, match="not Zstandard data"):
        decode_update("zstd", pair[0], tmp_path / "wide", tmp_path / "back")


@pytest.mark.parametrize("scales", ["", "{}", '{"w":-1.0}', '{"w":1e999}', '{"w":1.0,"x":1.0}', "[" * 10_000])
def test_scales_are_numbers_for_the_float_tensors(tmp_path: Path, scales: str) -> None:
    base = save(tmp_path / "base", {"w": np.ones(3, dtype=np.float32)})
    safetensors.numpy.save_file({"w": np.ones(3, dtype=np.float16)}, tmp_path / "sent", metadata={"scales": scales})
    with pytest.raises(DataError, match="scales"):
        decode_update("float16", base, tmp_path / "sent", tmp_path / "back")


def test_an_update_that_is_not_finite_or_of_other_tensors_is_not_encoded(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"w": np.ones(3, dtype=np.float32)})
    for values in (np.array([1, np.nan, 1], dtype=np.float32), np.ones(4, dtype=np.float32)):
        update = save(tmp_path / "update", {"w": values})
        with pytest.raises(DataError):
            encode_update("float16", base, update, tmp_path / "sent")


def test_a_site_without_zstandard_sends_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [usable_codec(name) for name in get_args(Codec)] == list(get_args(Codec))
    assert usable_codec("codec of a later version") == "raw"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert [usable_codec(name) for name in ("raw", "float16", "zstd", "float16_zstd")] == [
        "raw",
        "float16",
        "raw",
        "float16",
    ]
