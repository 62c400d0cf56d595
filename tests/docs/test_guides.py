"""The guides' commands work as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.brokers import MOSQUITTO
from tests.support.paths import REPOSITORY
from tests.support.ports import free_port

DOCS = REPOSITORY / "docs"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def commands(page: str) -> str:
    """What a page has its reader type: its ``bash`` blocks; ``shell`` blocks are for a fresh machine."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    return "\n".join(blocks)


def follow(page: str, folder: Path, replacements: dict[str, str]) -> tuple[str, Path]:
    """Type a page's commands in a clean folder; what they printed, and the folder."""
    script = commands(page)
    for told, here in replacements.items():
        assert told in script
        script = script.replace(told, here)
    (folder / "bin").mkdir()
    command = folder / "bin" / "edgeflame"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeflame "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}
    work = folder / "work"
    work.mkdir()
    # A file, since what stands on a shell's command line is found by a guide's own pgrep.
    (folder / "typed.sh").write_text(script)
    shell = ["bash", "-euxo", "pipefail", str(folder / "typed.sh")]
    done = subprocess.run(shell, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, work


def test_getting_started(tmp_path: Path) -> None:
    # The same way with fewer and smaller boards, and the page on a port that is free here.
    smaller = {"--parts 60": "--parts 6 --size 96", "parts=30": "parts=4", ":8080": f":{free_port()}"}
    printed, work = follow("getting-started.md", tmp_path, smaller)
    for said in (
        r"photos: warm_wood, 15 boards, 30 photographs written",
        r"wood\.edgeflame: none, 12 images",
        r"broken_corner +│",
        r"\d+ parts in [\d.]+ s: ",
        r"^4 parts in ",
        r"✓ configuration +line\.toml is one for edgeflame inspect",
    ):
        assert re.search(said, printed, re.MULTILINE), said
    assert {path.name for path in work.iterdir()} >= {"wood.edgeflame", "fit-report", "report", "rejects", "line-1"}


@pytest.mark.skipif(os.environ.get("EDGEFLAME_GUIDES") != "all", reason="run by `make guides`")
def test_fleet_in_an_hour(tmp_path: Path) -> None:
    if MOSQUITTO is None:
        pytest.skip("Mosquitto is not installed")
    printed, work = follow("fleet-in-an-hour.md", tmp_path, {"--port 18884": f"--port {free_port()}"})
    for said in (
        r"^the broker knows the 6 members of boards$",
        r"│ 2 +│ plant-a \(24\), plant-b \(24\) │",
        r"✓ broker ",
        r"^6 parts in ",
        r"^plant-b: revoked; it has no rights on the broker$",
    ):
        assert re.search(said, printed, re.MULTILINE), said
    assert {path.name for path in work.iterdir()} >= {"plant-a.edgeflame", "plant-b.edgeflame", "run.html"}
