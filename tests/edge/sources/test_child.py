"""Cameras in a process of their own: they hang, crash and change, and the inspection goes on."""

from __future__ import annotations

import datetime as dt
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge.sources.child import SLOTS, FrameRing, Overwritten, RingName, live_frames, read_in_child
from edgeflame.errors import DataError
from tests.support import faulty_cameras
from tests.support.paths import REPOSITORY
from tests.support.waiting import wait_for


def test_images_come_in_order_and_whole_however_fast_the_camera_is() -> None:
    stop, numbers = threading.Event(), []
    for taken in read_in_child(faulty_cameras.fast, "cam", stop):
        if isinstance(taken, Overwritten):
            continue
        assert (taken.image == taken.image[0, 0, 0]).all()
        numbers.append(int(taken.image[0, 0, 0]))
        if len(numbers) == 200:
            stop.set()
    assert len(numbers) >= 200


def test_every_image_of_a_slow_camera_arrives_with_the_time_of_its_taking() -> None:
    images = []
    camera = read_in_child(faulty_cameras.works, "cam", threading.Event())
    with pytest.raises(DataError, match="the stream ended"):  # noqa: PT012 - the camera's twenty images, then this
        while True:
            images.append(next(camera))
    numbers = [int(taken.image[0, 0, 0]) for taken in images]
    assert numbers == list(range(20))
    steps = np.diff([taken.monotonic_s for taken in images])
    assert (steps >= 0.019).all()  # not of the arrival, which may come in bursts


def test_a_hanging_camera_is_killed_and_its_child_is_gone() -> None:
    frames = read_in_child(faulty_cameras.hangs, "cam", threading.Event(), stall_timeout_s=5.0)
    next(frames)
    with pytest.raises(DataError, match=r"cam: no image for 5 s; the process that reads it was killed"):
        next(frames)
    assert not _children()


def test_a_crash_of_the_driver_is_an_outage_and_not_ours() -> None:
    frames = read_in_child(faulty_cameras.crashes, "cam", threading.Event())
    next(frames)
    with pytest.raises(DataError, match=r"cam: the process that reads it died \(SIGSEGV\)"):
        next(frames)


def test_a_change_of_size_in_mid_stream_is_followed() -> None:
    stop, heights = threading.Event(), []
    for taken in read_in_child(faulty_cameras.changes_size, "cam", stop):
        heights.append(taken.image.shape[0])
        if len(heights) == 3:
            stop.set()
    assert heights == [48, 96, 144]


def test_a_camera_that_hangs_raises_and_can_be_read_again() -> None:
    for _ in range(2):
        frames = live_frames("cam", faulty_cameras.hangs, threading.Event(), stall_timeout_s=5.0)
        assert next(frames).image_bgr is not None
        with pytest.raises(DataError, match="cam: no image for 5 s; the process that reads it was killed"):
            next(frames)


def test_a_camera_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(DataError, match="camera:7: no such camera"):
        next(live_frames("cam", faulty_cameras.is_not_there, threading.Event()))


def test_what_the_ring_lost_is_counted_as_dropped_and_leaves_a_gap(tmp_path: Path) -> None:
    go, written, stop = tmp_path / "go", tmp_path / "written", threading.Event()
    frames = live_frames("cam", functools.partial(faulty_cameras.bursts, go, written), stop)
    assert next(frames).missed == {}
    go.touch()
    wait_for(written.exists, "the camera has written all it has")
    # Of the thirty, the ring still holds the last few.
    numbers = range(31 - SLOTS, 31)
    rest = [next(frames) for _ in numbers]
    assert [int(frame.image_bgr[0, 0, 0]) for frame in rest if frame.image_bgr is not None] == list(numbers)
    assert [frame.missed for frame in rest] == [{"overwritten": 30 - SLOTS}] + [{}] * (SLOTS - 1)
    stop.set()
    assert list(frames) == []


def test_the_drivers_time_stamp_is_taken_where_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    frames = live_frames("cam", faulty_cameras.stamps, stop)
    now_s, utc = time.monotonic(), dt.datetime.now(dt.timezone.utc)
    stamped, too_old, in_the_future = (next(frames) for _ in range(3))
    stop.set()
    assert list(frames) == []
    # Both clocks tell the same moment.
    for frame in (stamped, too_old, in_the_future):
        apart_s = (frame.captured_utc - utc).total_seconds() - (frame.captured_monotonic_s - now_s)
        assert abs(apart_s) < 0.1
    assert stamped.captured_monotonic_s < too_old.captured_monotonic_s - 0.4
    assert too_old.captured_monotonic_s <= in_the_future.captured_monotonic_s <= time.monotonic()
    (remark,) = [record for record in caplog.records if record.message == "source_remark"]
    assert remark.fields["remark"].endswith("width 640 instead of 1280")


_SMALL = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1500k tmpfs /dev/shm && exec "$@"', "small"]
"""Runs a command with little shared memory, as in a container."""

_FAST = """
import threading
from edge.sources.child import live_frames
from tests.support import faulty_cameras

next(live_frames("cam", faulty_cameras.fast, threading.Event()))
"""


@pytest.fixture
def small_shared_memory() -> list[str]:
    if subprocess.run([*_SMALL, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return _SMALL


def test_too_little_shared_memory_is_told_before_anything_is_written_into_it(small_shared_memory: list[str]) -> None:
    done = subprocess.run(
        [*small_shared_memory, sys.executable, "-c", _FAST], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "edgeflame.errors.DataError: no room for its images of 640x480 in shared memory: 4 MB are needed in /dev/shm "
        "(No space left on device); give the container more shared memory"
    )


def test_what_the_cameras_need_together_is_checked(
    small_shared_memory: list[str], package_file: Path, tmp_path: Path
) -> None:
    """Each of the two has room alone."""
    pipeline = "gst:videotestsrc is-live=true ! video/x-raw,width=320,height=240"
    (tmp_path / "line.toml").write_text("".join(f'[cameras.{name}]\nsource = "{pipeline}"\n' for name in "ab"))
    command = ["-m", "edgeflame", "inspect", "--check", "--model", package_file, "--config", tmp_path / "line.toml"]
    done = subprocess.run(
        [*small_shared_memory, sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True
    )
    if "apt install python3-gi" in done.stdout:
        pytest.skip("GStreamer's Python bindings are not installed")
    told = " ".join(done.stdout.split())
    assert "need 2 MB in /dev/shm, 2 MB are free" in told
    assert "give the container more shared memory: docker run --shm-size 512m" in told
    assert done.returncode == 1


_ORPHAN = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from tests.support import faulty_cameras
from edge.sources.child import read_in_child
if __name__ == "__main__":
    for taken in read_in_child(faulty_cameras.hangs, "cam", threading.Event(), stall_timeout_s=600):
        print("reading", flush=True)
"""


def test_no_child_outlives_a_killed_daemon_even_if_the_camera_hangs(tmp_path: Path) -> None:
    script = tmp_path / "daemon.py"
    script.write_text(_ORPHAN)
    daemon = subprocess.Popen([sys.executable, str(script), str(REPOSITORY)], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"reading\n"
    children = _children(daemon.pid)
    assert children
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the children are gone")


def test_the_ring_never_gives_what_was_overwritten() -> None:
    name = RingName(name=f"edgeflame-test-{os.getpid()}", slots=2, shape=(8, 8, 3))
    writer = FrameRing(name, create=True)
    reader = FrameRing(name, create=False)
    places = [writer.write(faulty_cameras.pixels(number, 8, 8)) for number in range(3)]
    assert reader.read(*places[0]) is None
    for number in (1, 2):
        image = reader.read(*places[number])
        assert image is not None
        assert (image == number).all()
    reader.close()
    writer.close()


def _children(pid: int | None = None) -> list[int]:
    """Reading processes; Python's own resource tracker, which cleans up after them, is none."""
    found = []
    for number in Path(f"/proc/{pid or os.getpid()}/task/{pid or os.getpid()}/children").read_text().split():
        command = Path(f"/proc/{number}/cmdline").read_bytes()
        if b"spawn_main" in command:
            found.append(int(number))
    return found
