"""A package that is served to a fleet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import REPOSITORY


@contextmanager
def published(package: Path, *options: object) -> Iterator[None]:
    """A process of ``edgeflame model publish --stay`` serves it for as long as the block lasts.

    Args:
        package: signed.
        options: which broker and fleet, or which kit.
    """
    command = [sys.executable, "-m", "edgeflame", "model", "publish", str(package), "--stay", *map(str, options)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("release_announced" in line for line in process.stderr)
        yield
        process.terminate()
        process.communicate(timeout=30)
