"""Fit, evaluate, export and inspect on real photographs, through the command line as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.magnetic_tile, pytest.mark.timeout(600)]


def edgeflame(*arguments: object) -> str:
    command = [sys.executable, "-m", "edgeflame", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def model(magnetic_tile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tile.edgeflame"
    edgeflame("fit", "--data", magnetic_tile, "--out", path)
    return path


def test_the_default_reaches_the_untrained_reference(model: Path, magnetic_tile: Path) -> None:
    figures: dict[str, Any] = msgspec.json.decode(
        edgeflame("evaluate", "--model", model, "--data", magnetic_tile, "--json")
    )
    assert figures["image_AUROC"] >= 0.833
    assert figures["macro_image_AUROC"] >= 0.84
    assert figures["macro_pixel_AUROC"] >= 0.87
    assert set(figures["per_class"]) == {"blowhole", "break", "crack", "fray", "uneven"}


def test_the_threshold_promises_no_more_than_the_tiles_allow(model: Path) -> None:
    shown = msgspec.json.decode(edgeflame("model", "show", model, "--json"))
    threshold = shown["manifest"]["threshold"] if "manifest" in shown else shown["threshold"]
    assert threshold["groups_known"]
    assert threshold["num_groups"] < 299  # so one percent at 95% cannot be promised
    assert threshold["false_reject_rate"] > 0.01


def test_every_test_image_gets_one_line_and_a_verdict(model: Path, magnetic_tile: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "tile.onnx"
    edgeflame("export", "--model", model, "--onnx", onnx)
    assert onnx.stat().st_size > 1e6
    output = edgeflame("inspect", "--model", model, "--source", magnetic_tile / "test", "--json")
    lines = [msgspec.json.decode(line) for line in output.splitlines()]
    assert len(lines) == 524
    for line in lines:
        assert line["verdict"] == ("fail" if line["score"] > line["threshold"] else "pass")
        assert line["latency_ms"] > 0
        assert line["source"]
    good = [line for line in lines if "/good/" in line["source"]]
    assert len(good) == 197
    assert sum(line["verdict"] == "fail" for line in good) / len(good) < 0.15
