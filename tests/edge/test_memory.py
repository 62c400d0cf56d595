"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time

import pytest

from edge import memory

HAS_TRIM = hasattr(ctypes.CDLL(None), "malloc_trim")

FRAGMENTED = """
import threading
from pathlib import Path
import numpy as np
from edge.memory import trim_memory

kept = []

def come_and_go():
    pictures = [np.ones(900_000, np.uint8) for _ in range(60)]
    kept.append(pictures[::6])

for _ in range(4):
    thread = threading.Thread(target=come_and_go)
    thread.start()
    thread.join()

def resident_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024

before = resident_mib()
trim_memory()
print(before - resident_mib())
"""


THREADS_IN_TURN = """
import threading
from pathlib import Path
import numpy as np
from edge.memory import share_one_arena

assert {shared} is False or share_one_arena()

def come_and_go(barrier):
    pictures = [np.ones(900_000, np.uint8) for _ in range(20)]
    barrier.wait()
    del pictures[1:]
    kept.append(pictures)

# Each has its pictures while the others have none.
kept = []
lock = threading.Lock()
begun = threading.Barrier(8)

def run():
    begun.wait()
    with lock:
        come_and_go(threading.Barrier(1))
    begun.wait()

threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
"""


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no mallopt")
def test_what_one_thread_has_freed_another_takes() -> None:
    environment = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    in_use = [
        float(
            subprocess.run(
                [sys.executable, "-c", THREADS_IN_TURN.format(shared=shared)],
                capture_output=True, text=True, check=True, env=environment,
            ).stdout
        )
        for shared in (False, True)
    ]  # fmt: skip
    # Seven arenas less, of 17 MiB each.
    assert in_use[0] - in_use[1] > 60


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no malloc_trim")
def test_what_lies_between_pictures_in_use_is_given_back() -> None:
    # From the first picture on in the heap, as after the first freed one in a process that has run for a while.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_ARENA_MAX": "4"}
    done = subprocess.run(
        [sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True, env=environment
    )
    assert float(done.stdout) > 20


def test_it_is_done_again_and_again_until_the_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    monkeypatch.setattr(memory, "TRIM_EVERY_S", 0.01)
    monkeypatch.setattr(memory, "trim_memory", lambda: times.append(time.monotonic()) is None)
    with memory.trimming():
        while len(times) < 3:
            time.sleep(0.01)
    count = len(times)
    time.sleep(0.05)
    assert not any(thread.name == "edgeflame-memory" for thread in threading.enumerate())
    assert len(times) == count


def test_where_the_library_cannot_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "trim_memory", lambda: False)
    thread = memory.trimming()
    thread.start()
    while thread.is_alive:
        time.sleep(0.01)
    assert thread.error is None
