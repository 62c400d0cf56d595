"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgeflame.package import Package

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """The Magnetic Tile Defects photographs; tests that need them are skipped where the folder is missing."""
    named = os.environ.get("EDGEFLAME_MAGNETIC_TILE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "magnetic-tile"
    if not (folder / "train" / "good").is_dir():
        pytest.skip("the magnetic-tile photographs are not here (set EDGEFLAME_MAGNETIC_TILE)")
    return folder


@pytest.fixture(scope="session")
def package_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real package with a model small enough for tests; see ``small_model``."""
    from small_model import write_small_package

    return write_small_package(tmp_path_factory.mktemp("package") / "small.edgeflame")


@pytest.fixture(scope="session")
def package(package_file: Path) -> Package:
    """The same, in memory."""
    from edgeflame.package import read_package

    return read_package(package_file)
