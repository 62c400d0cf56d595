"""Tensor files, checks of updates, and the merge: against slow references, and against hostile files."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.config import AggregateConfig
from aggregator.exchanges import WEIGHTS, validate_weights
from aggregator.run import aggregate_updates
from aggregator.strategies import STRATEGIES
from aggregator.strategies.blocks import BlockwiseStrategy
from aggregator.strategies.interface import Contribution, RoundInputs, Rule
from edgeflame.errors import DataError
from edgeflame.tensors import BLOCK_ELEMENTS, TensorFile, TensorSpec, canonicalise, schema_difference

Tensors = dict[str, np.ndarray]


def model(seed: int = 0, **changes: np.ndarray) -> Tensors:
    generator = np.random.default_rng(seed)
    tensors = {
        "weight": generator.normal(size=(BLOCK_ELEMENTS + 17,)).astype(np.float32),
        "a.bias": generator.normal(size=(4, 3)).astype(np.float16),
        "z": generator.normal(size=()).astype(np.float64),
        "count": np.array([generator.integers(100)], dtype=np.int64),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 3), dtype=np.float32),
    }
    return {**tensors, **changes}


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    return path


def test_the_merge_is_the_weighted_average(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model(0), {"origin": "x", "b": "y"})
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    updates = {site: model(number) for number, site in enumerate(weights, start=1)}
    contributions = [
        Contribution(site=site, weight=weights[site], path=save(tmp_path / site, updates[site])) for site in weights
    ]
    aggregate_updates(AggregateConfig(), base, contributions, tmp_path / "out", num_members=3)
    merged = safetensors.numpy.load_file(tmp_path / "out")
    for name, values in merged.items():
        expected = sum(weights[site] * updates[site][name].astype(np.float64) for site in weights)
        if values.dtype == np.int64:
            expected = np.rint(expected)
        elif values.dtype == np.bool_:
            expected = expected >= 0.5
        np.testing.assert_array_equal(values, expected.astype(values.dtype))
    with TensorFile(tmp_path / "out") as out:
        assert out.metadata == {"origin": "x", "b": "y"}


def test_a_rule_on_whole_files_gets_them_in_site_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Last:
        def __init__(self, inputs: RoundInputs) -> None:
            assert inputs.num_members == 5

        def aggregate(self, base: Path, contributions: tuple[Contribution, ...], out: Path) -> None:
            assert [contribution.site for contribution in contributions] == ["a", "b"]
            out.write_bytes(contributions[-1].path.read_bytes())

    monkeypatch.setitem(STRATEGIES, "last", Rule(build=Last))
    base = save(tmp_path / "base", model(0))
    updates = [Contribution(site=site, weight=0.5, path=save(tmp_path / site, model(ord(site)))) for site in "ba"]
    aggregate_updates(AggregateConfig(strategy="last"), base, updates, tmp_path / "out", num_members=5)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_merge_is_bit_identical_for_any_order(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model(0))
    contributions = [
        Contribution(site=f"s{n}", weight=w, path=save(tmp_path / f"s{n}", model(n)))
        for n, w in enumerate((0.1, 0.2, 0.3, 0.4), start=1)
    ]
    results = set()
    for order in (contributions, contributions[::-1], contributions[2:] + contributions[:2]):
        aggregate_updates(AggregateConfig(), base, order, tmp_path / "out", num_members=4)
        results.add((tmp_path / "out").read_bytes())
    assert len(results) == 1


def test_the_merge_holds_one_block_of_one_site_at_a_time(tmp_path: Path) -> None:
    class Watcher:
        def combine(
            self, name: str, base: np.ndarray, updates: Iterable[tuple[Contribution, np.ndarray]]
        ) -> np.ndarray:
            assert name in model(0)
            assert base.size <= BLOCK_ELEMENTS
            return sum((update.weight * values for update, values in updates), np.zeros_like(base))

    base = save(tmp_path / "base", model(0))
    contribution = Contribution(site="a", weight=1.0, path=base)
    BlockwiseStrategy(rule=Watcher()).aggregate(base, (contribution,), tmp_path / "out")
    canonicalise(base, tmp_path / "canonical")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "canonical").read_bytes()


def test_canonical_files_are_the_same_bytes_however_they_were_written(tmp_path: Path) -> None:
    tensors = model(3)
    first = save(tmp_path / "1", tensors, {"b": "2", "a": "1"})
    second = save(tmp_path / "2", dict(reversed(list(tensors.items()))), {"a": "1", "b": "2"})
    canonicalise(first, tmp_path / "c1")
    canonicalise(second, tmp_path / "c2")
    assert (tmp_path / "c1").read_bytes() == (tmp_path / "c2").read_bytes()
    read = safetensors.numpy.load_file(tmp_path / "c1")
    assert all((read[name] == values).all() for name, values in tensors.items())


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        ({"weight": np.zeros(5, np.float32)}, "schema", "'weight'"),
        ({"z": np.zeros((), np.float32)}, "schema", "expected F64"),
        ({"more": np.zeros(5, np.float32)}, "schema", "not in the model"),
        ({"z": np.array(np.nan)}, "not_finite", "'z'"),
        ({"a.bias": np.full((4, 3), np.inf, np.float16)}, "not_finite", "'a.bias'"),
        ({"z": np.array(1e300)}, "norm", "times the base model's norm"),
    ],
)
def test_bad_updates_are_refused_with_a_reason(tmp_path: Path, change: Tensors, reason: str, text: str) -> None:
    base = save(tmp_path / "base", model(0))
    verdict = validate_weights(save(tmp_path / "update", model(1, **change)), base, max_relative_change=10.0)
    assert verdict.reason == reason
    assert text in verdict.detail
    assert str(tmp_path) not in verdict.detail


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model(0))
    update = model(1)
    del update["z"]
    verdict = validate_weights(save(tmp_path / "update", update), base, max_relative_change=10.0)
    assert (verdict.reason, verdict.detail) == ("schema", "tensor 'z' is missing")


def test_the_relative_change_is_a_distance_over_a_norm(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"w": np.array([3.0, 4.0], np.float32)})
    update = save(tmp_path / "update", {"w": np.array([3.0, 9.0], np.float32)})
    assert validate_weights(update, base, max_relative_change=1.0).relative_change == pytest.approx(1.0)
    assert validate_weights(update, base, max_relative_change=0.9).reason == "norm"
    assert validate_weights(base, base, max_relative_change=1e-9).reason is None


def raw(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "header beyond the file": struct.pack("<Q", 100) + b"{}",
    "not json": raw(b"[[[[["),
    "no tensors": raw({}),
    "nested": raw(b"[" * 20_000),
    "bomb": raw({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
    "overflow": raw({"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
    "negative": raw({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    "overlap": raw(
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        bytes(4),
    ),
    "gap": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
    "lying": raw(
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 12]},
        },
        bytes(12),
    ),
    "trailing": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)),
    "type": raw({"a": {"dtype": "F8", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "extra": raw({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], "x": 1}}, bytes(4)),
    "dimensions": raw({"a": {"dtype": "U8", "shape": [1] * 99, "data_offsets": [0, 1]}}, bytes(1)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tensor_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(data)
    with pytest.raises(DataError):
        TensorFile(path)
    assert WEIGHTS.validate_initial(path).reason == "not_tensors"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tensor_files_open_or_raise_the_one_error(tmp_path: Path, data: st.DataObject) -> None:
    good = save(tmp_path / "good", {"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 2), np.int64)}).read_bytes()
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    path = tmp_path / "damaged"
    path.write_bytes(good[:start] + data.draw(st.binary(max_size=12)) + good[stop:])
    with contextlib.suppress(DataError), TensorFile(path) as tensors:
        for name, spec in tensors.schema.items():
            assert sum(block.size for block in tensors.blocks(name)) == spec.num_elements


def test_schema_differences_are_named() -> None:
    a = {"w": TensorSpec(dtype="F32", shape=(2,))}
    assert schema_difference(a, a) is None
    assert (
        schema_difference(a, {"w": TensorSpec(dtype="F32", shape=(3,))}) == "tensor 'w': expected F32 [2], got F32 [3]"
    )
