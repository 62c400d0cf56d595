"""The daemon as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def daemon(
    package_file: Path,
    folder: Path,
    config: str,
    *more: str,
    state: Path | None = None,
    code: str = "",
    **environment: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """``edgeflame inspect`` on an endless belt, its output in ``out`` and ``log``; ``code`` runs in it first."""
    (folder / "line.toml").write_text(config)
    arguments = [
        "inspect", "--model", str(package_file), "--source", "boards:warm_white_grid?size=64", "--config",
        str(folder / "line.toml"), "--state", str(state or folder / "state"), "--threads", "1", "--json", *more,
    ]  # fmt: skip
    program = f"import sys; sys.argv[1:] = {arguments!r}\n{code}\nfrom cli import main; main()"
    with (folder / "out").open("ab") as out, (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=out, stderr=log,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def judged(folder: Path) -> int:
    """The number of results that the daemon has printed."""
    return (folder / "out").read_bytes().count(b"\n")


def logged(folder: Path) -> str:
    return (folder / "log").read_text()
