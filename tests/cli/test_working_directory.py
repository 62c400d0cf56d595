"""A user's working directory may hold files with the names of our packages; they are never imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.programs import program
from tests.support.paths import REPOSITORY

NAMES = ("aggregator", "boards", "cli", "edge", "export", "fitting", "fleet", "trainer")


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A folder in which each of our packages has a namesake that fails when it is imported."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user\\'s own file was imported')\n")
    return tmp_path


def run(command: list[str], folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_module_does_not_look_there(trapped: Path) -> None:
    made = run([sys.executable, "-m", "edgeflame", "demo-data", "--out", "d", "--parts", "2", "--size", "64"], trapped)
    assert made.returncode == 0, made.stderr
    assert (trapped / "d" / "dataset.json").is_file()


def test_programs_of_ours_do_not_look_there(trapped: Path) -> None:
    (trapped / "edgeflame.py").write_text("raise SystemExit('the user\\'s own file was imported')\n")
    assert run(program("edgeflame", "--version"), trapped).stdout.startswith("edgeflame")
    # The worker of `edgeflame train`; it ends with its standard input.
    worker = run(program("cli.train_worker", "text"), trapped)
    assert worker.returncode == 0, worker.stderr
    compared = run(program("cli.demo.compare", "gone", "gone.toml"), trapped)
    assert compared.returncode != 0
    assert "gone.toml: cannot read the configuration" in compared.stderr
