"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """The Magnetic Tile Defects photographs; tests that need them are skipped where the folder is missing."""
    named = os.environ.get("EDGEFLAME_MAGNETIC_TILE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "magnetic-tile"
    if not (folder / "train" / "good").is_dir():
        pytest.skip("the magnetic-tile photographs are not here (set EDGEFLAME_MAGNETIC_TILE)")
    return folder
