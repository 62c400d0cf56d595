"""The guides' commands work as they stand."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def commands(page: str) -> str:
    """What a page has its reader type: its ``bash`` blocks; ``shell`` blocks are for a fresh machine."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    return "\n".join(blocks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_getting_started(tmp_path: Path) -> None:
    script = commands("getting-started.md")
    # The same way with fewer and smaller boards, and the page on a port that is free here.
    for told, here in (("--parts 60", "--parts 10 --size 96"), ("parts=30", "parts=6"), (":8080", f":{free_port()}")):
        assert told in script
        script = script.replace(told, here)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "edgeflame"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeflame "$@"\n')
    command.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "2",
    }
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=work, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for said in (
        r"photos: warm_wood, 25 boards, 50 photographs written",
        r"wood\.edgeflame: none, 20 images",
        r"broken_corner +│",
        r"\d+ parts in [\d.]+ s: ",
        r"^6 parts in ",
        r"✓ configuration +line\.toml is one for edgeflame inspect",
    ):
        assert re.search(said, done.stdout, re.MULTILINE), said
    assert {path.name for path in work.iterdir()} >= {"wood.edgeflame", "fit-report", "report", "rejects", "line-1"}
