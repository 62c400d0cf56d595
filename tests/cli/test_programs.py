"""Children of commands end with them, whenever that is."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")

STARTS_CHILDREN = """
import sys
from pathlib import Path
from cli.programs import ChildProcesses
with ChildProcesses(Path(sys.argv[1])) as children:
    print("ready", flush=True)
    for number in range(1000):
        children.start(str(number % 50), ["sleep", "120", sys.argv[2]], num_threads=1)
"""


def alive(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_a_command_that_is_killed_while_it_starts_children_leaves_none(tmp_path: Path) -> None:
    rng = random.Random(0)
    marks = []
    for number in range(8):
        # As an amount of time, for `sleep`.
        marks.append(f"{uuid.uuid4().int % 10**12}")
        command = [sys.executable, "-c", STARTS_CHILDREN, str(tmp_path / str(number)), marks[-1]]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.1))
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 20
    while left := [process for mark in marks for process in alive(mark)]:
        assert time.monotonic() < deadline, f"{len(left)} children still run"
        time.sleep(0.1)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_parent_that_has_ended_before_is_noticed(has_ended: bool) -> None:
    source = (
        "import os, signal; from edgeflame.background import die_with_parent\n"
        f"die_with_parent(signal.SIGTERM, parent=os.getppid() + {int(has_ended)})\n"
        "print('lives')"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == (("", -signal.SIGTERM) if has_ended else ("lives\n", 0))
