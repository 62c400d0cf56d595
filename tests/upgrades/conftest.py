"""What earlier versions left on the disk, unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import RECORDED


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[str, str], Path]:
    """Unpack ``version/name.tar.gz``; gives the folder that then holds its contents."""

    def unpacked(version: str, name: str) -> Path:
        with tarfile.open(RECORDED / "state" / version / f"{name}.tar.gz") as tar:
            # The filter `data` would change modes, which matter in a fleet's folder.
            tar.extractall(tmp_path, filter="tar")
        return tmp_path

    return unpacked
