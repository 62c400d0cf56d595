"""GStreamer pipelines, by the real GStreamer."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge.sources import camera
from edge.sources.camera import SYSTEM_PYTHON, GstSource, csi_source, gst_source
from edge.sources.locate import open_image_source
from edgeflame.errors import DataError, MissingDependencyError, UsageError
from tests.support.waiting import wait_for


@pytest.fixture(scope="module", autouse=True)
def _has_gstreamer() -> None:
    program = "import gi; gi.require_version('GstApp', '1.0'); from gi.repository import GstApp"
    if subprocess.run([SYSTEM_PYTHON, "-I", "-c", program], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("GStreamer's Python bindings are not installed")


def test_a_pipelines_images_come_as_bgr_with_the_time_of_their_taking() -> None:
    # 321 pixels: GStreamer fills the rows up.
    source = gst_source("gst:videotestsrc is-live=true pattern=blue ! video/x-raw,width=321,height=40,framerate=50/1")
    assert source.is_live
    stop = threading.Event()
    frames = source.frames(stop)
    taken = [next(frames) for _ in range(5)]
    stop.set()
    assert list(frames) == []
    for frame in taken:
        assert frame.image_bgr is not None
        assert frame.image_bgr.shape == (40, 321, 3)
        np.testing.assert_array_equal(frame.image_bgr[..., 0], 255)
        assert frame.image_bgr[..., 1:].max() < 3
    stamps = [frame.captured_monotonic_s for frame in taken]
    assert stamps == sorted(stamps)
    assert stamps[-1] <= time.monotonic()


def test_every_image_of_a_pipeline_that_ends_comes_and_then_the_error() -> None:
    source = open_image_source("gst:videotestsrc num-buffers=3 ! video/x-raw,width=32,height=32")
    for _ in range(2):
        frames = source.frames(threading.Event())
        assert all(next(frames).image_bgr is not None for _ in range(3))
        with pytest.raises(DataError, match=r"^gst:videotestsrc.*the pipeline ended$"):
            next(frames)


def test_a_change_of_size_in_mid_stream_is_followed(tmp_path: Path) -> None:
    from edgeflame.images import write_image

    for number, side in enumerate((32, 64)):
        write_image(tmp_path / f"{number}.jpg", np.full((side, side, 3), 90, np.uint8))
    source = gst_source(f"gst:multifilesrc location={tmp_path}/%d.jpg caps=image/jpeg,framerate=1/1 ! jpegdec")
    taken = source.read(threading.Event())
    assert [next(taken).image.shape[0] for _ in range(2)] == [32, 64]
    with pytest.raises(DataError, match="the pipeline ended"):
        next(taken)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("nosuchelement", 'no element "nosuchelement"'),
        ("filesrc location=/nowhere/a.jpg ! jpegdec", "Resource not found"),
        ("videotestsrc ! audioconvert", "could not link"),
        ("rtspsrc location=rtsp://me:secret@127.0.0.1:1/x user-pw=secret ! decodebin", "Could not open"),
    ],
)
def test_a_pipeline_that_does_not_run_is_one_error_without_passwords(pipeline: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        next(gst_source(f"gst:{pipeline}").frames(threading.Event()))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_bindings_are_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # This environment's own Python has none.
    monkeypatch.setattr(camera, "_python", lambda: str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError, match="apt install python3-gi"):
        next(gst_source("gst:videotestsrc").read(threading.Event()))
    (tmp_path / "python").write_text('#!/bin/sh\nshift; exec /usr/bin/python3 -I -S "$@"\n')  # -S: no site packages
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(MissingDependencyError, match=r"No module named 'gi'.*apt install python3-gi"):
        next(gst_source("gst:videotestsrc").read(threading.Event()))


def test_a_missing_part_is_told_through_the_capture_as_what_it_is() -> None:
    from edge.sources.child import live_frames
    from tests.support.faulty_cameras import is_not_installed

    with pytest.raises(MissingDependencyError, match="apt install"):
        next(live_frames("cam", is_not_installed, threading.Event()))


def test_nobody_is_left_behind_when_the_reader_is_done() -> None:
    images = gst_source("gst:videotestsrc is-live=true").read(threading.Event())
    next(images)
    (child,) = _pipelines()
    images.close()
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the pipeline's process is gone")


def test_a_csi_camera_is_a_pipeline() -> None:
    source = csi_source("csi:1?width=1280&height=720&fps=60&flip=2")
    assert source == GstSource(
        name="csi:1",
        pipeline="nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=60/1 ! "
        "nvvidconv flip-method=2 ! video/x-raw,format=BGRx",
    )
    with pytest.raises(DataError, match='no element "nvarguscamerasrc"'):
        next(open_image_source("csi:0").frames(threading.Event()))


@pytest.mark.parametrize("address", ["gst:", "gst: ! ", "csi:left", "csi:0?width=0", "csi:0?gain=3", "csi:0?flip=8"])
def test_addresses_that_make_no_sense(address: str) -> None:
    with pytest.raises(UsageError, match="--source "):
        open_image_source(address)


def _pipelines() -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and b"gst_child.py" in _command(process):
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(process.name))
    return found


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
