"""What earlier versions left on the disk, unpacked."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
RECORDED = TESTS / "recorded" / "state"
# Fleets of real processes live beside the tests of federation, results made up beside those of the edge.
sys.path[:0] = [str(TESTS / "federation"), str(TESTS / "edge")]


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[str, str], Path]:
    """Unpack ``version/name.tar.gz``; gives the folder that then holds its contents."""

    def unpacked(version: str, name: str) -> Path:
        with tarfile.open(RECORDED / version / f"{name}.tar.gz") as tar:
            # The filter `data` would change modes, which matter in a fleet's folder.
            tar.extractall(tmp_path, filter="tar")
        return tmp_path

    return unpacked
