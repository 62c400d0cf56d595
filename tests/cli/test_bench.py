"""`edgeflame bench`, and how it takes turns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from cli import cli
from edge.result import Hop
from edge.runtimes import bench
from edge.runtimes.load import open_runtime
from edge.trace import make_report
from edgeflame.errors import DataError
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


def test_a_trace_shows_where_the_time_of_each_frame_goes(package_file: Path) -> None:
    ran = run("--model", package_file, "--trace", "boards:warm_wood?parts=60&size=64", "--parts", 30, "--json")
    report = json.loads(ran.stdout)
    assert report["num_parts"] == 30
    assert report["dropped"] == 0
    # The boards wait for us: their time begins when they leave the queue.
    assert [one["hop"] for one in report["hops"]] == ["resized", "scored", "verdict", "stored"]
    for one in [*report["hops"], report["verdict"]]:
        assert 0 <= one["p50_ms"] <= one["p90_ms"] <= one["p99_ms"] <= one["max_ms"]
    until_verdict = sum(one["p50_ms"] for one in report["hops"][:3])
    assert until_verdict == pytest.approx(report["verdict"]["p50_ms"], rel=0.5)
    shown = run("--model", package_file, "--trace", "boards:warm_wood?parts=60&size=64", "--parts", 5).stdout
    assert "cropped and resized" in shown
    assert "5 parts of boards:warm_wood?parts=60&size=64" in shown


def test_the_hops_of_a_camera_begin_with_its_process() -> None:
    ways = list(Hop)
    times = [{None: 0.0, **{hop: (place + 1) * 0.001 for place, hop in enumerate(ways)}} for _ in range(3)]
    report = make_report("camera:0", times, dropped=2)
    assert [one.hop for one in report.hops] == [hop.value for hop in ways]
    assert [one.p50_ms for one in report.hops] == [1.0] * len(ways)
    assert report.verdict.p50_ms == 6.0
    assert report.dropped == 2


def test_a_trace_of_too_few_parts_is_refused(package_file: Path) -> None:
    with pytest.raises(DataError, match="0 parts were scored beyond the first 20; two are needed"):
        run("--model", package_file, "--trace", "boards:warm_wood?parts=3")
