"""`edgeflame bench`, and how it takes turns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from cli import cli
from edge.runtimes import bench
from edge.runtimes.load import open_runtime
from edgeflame.package import Package
from export.precision import backbone_model
from tests.support.small_package import GRID, embed, good_image, small_network


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False)


def test_the_command(package_file: Path, package: Package) -> None:
    report = json.loads(run("--model", package_file, "--seconds", 0, "--batch", 2, "--batch", 1, "--json").stdout)
    assert [(one["batch"], one["what"]) for one in report["latencies"]] == [
        (1, "graph"), (1, "backbone"), (2, "graph"), (2, "backbone"),
    ]  # fmt: skip
    for one in report["latencies"]:
        assert 0 < one["min_ms"] <= one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] <= one["max_ms"]
        assert one["num_calls"] == bench.MIN_CALLS
    assert report["model_bytes"] == len(package.model_onnx)
    assert report["peak_memory_bytes"] > 10_000_000
    table = run("--model", package_file, "--seconds", 0, "--batch", 1, "--threads", 1).stdout
    assert "graph / backbone at batch 1:" in table
    assert "threads: 1" in table


def test_turns_alternate_and_each_call_is_timed_alone() -> None:
    now, order = [0.0], []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    took = bench.take_turns(
        {"a": lambda: call("a", 1.0), "b": lambda: call("b", 0.25)},
        seconds=50.0,
        clock=lambda: now[0],
        pause=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    calls = bench.CALLS_A_TURN
    turn = ["a"] * (calls + 1) + ["b"] * (calls + 1)  # one of each is not counted
    turns = len(took["a"]) // calls
    assert order[2 * bench.WARM_UP_CALLS :] == turn * turns
    assert turns * len(turn) * 1.25 / 2 + 2 * turns * bench.PAUSE_S >= 50.0
    assert took == {"a": pytest.approx([1.0] * turns * calls), "b": pytest.approx([0.25] * turns * calls)}


def test_the_backbone_alone_gives_the_embeddings(package: Package) -> None:
    image = good_image(1)[None]
    session = onnxruntime.InferenceSession(backbone_model(package.model_onnx), providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"image": image})
    expected = embed(small_network(), image)[0].T.reshape(6, GRID, GRID)
    np.testing.assert_allclose(embeddings[0], expected, rtol=1e-5, atol=1e-6)


def test_without_a_backbone_there_is_no_ratio(package: Package) -> None:
    runtime = open_runtime(package.model_onnx, device="cpu")
    report = bench.run_bench(runtime, model_bytes=1, backbone_onnx=None, batches=[1], seconds=0.0)
    assert [one.what for one in report.latencies] == ["graph"]
    assert report.ratio(1) is None
    assert report.latencies[0].images_per_s == pytest.approx(1000 / report.latencies[0].p50_ms)
