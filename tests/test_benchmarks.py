"""The names that the benchmarks import from the project exist: nothing else runs them in between."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("aggregator", "boards", "cli", "edge", "edgeflame", "export", "fitting", "fleet", "tests", "trainer")
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT / "benchmarks").as_posix())
def test_what_a_benchmark_imports_is_there(file: Path) -> None:
    assert not list(missing_names(file.read_text()))


def test_a_name_that_has_moved_is_found() -> None:
    assert list(missing_names("from edge.runtimes.interface import INPUT, Runtime")) == [
        "edge.runtimes.interface.INPUT"
    ]
    assert list(missing_names("from edge.gone import anything\nimport edge.away")) == ["edge.gone", "edge.away"]
    assert not list(missing_names("from edge import capture\nimport numpy\nfrom nowhere import nothing"))


def test_runtimes_are_compared_with_the_references_and_timed(signed: Path) -> None:
    done = runtimes("--model", signed, "--devices", "cpu", "rtx")
    assert "| cpu (CPUExecutionProvider) |" in done.stdout
    assert "| rtx | cannot be used: " in done.stdout
    assert "| 1 | cpu | " in done.stdout
    assert done.returncode == 1, "none but the CPU could be used"
    assert runtimes("--model", signed, "--devices", "cpu").returncode == 0


def runtimes(*options: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks/gpu/runtimes.py"
    command = [sys.executable, script, *options, "--batch", 1, "--streams", 1, "--seconds", 0.01]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, timeout=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "benchmarks/gpu/run.sh"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
        timeout=200,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu/run.sh: PyTorch finds no GPU here, or is not installed\n"


def missing_names(code: str) -> Iterator[str]:
    """Names that code imports from the project's packages and that are not there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module.partition(".")[0] not in PACKAGES:
                continue
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError as exc:
                if exc.name is not None and module.startswith(exc.name):
                    yield module
                    break
                continue
            is_module = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
            if name is not None and not hasattr(found, name) and not is_module:
                yield f"{module}.{name}"
