"""Video files and network cameras."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge.sources.address import without_secrets
from edge.sources.child import live_frames
from edge.sources.locate import open_image_source
from edge.sources.video import RtspSource
from edgeflame.errors import DataError
from tests.support.ports import free_port
from tests.support.rtsp_server import RtspServer

av = pytest.importorskip("av")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(8):
            image = np.zeros((64, 96, 3), dtype=np.uint8)
            image[:, : 12 * (index + 1)] = (40, 120, 200)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    return path


def test_every_frame_of_a_video_comes_in_order_as_bgr(video: Path) -> None:
    source = open_image_source(str(video))
    assert not source.is_live
    frames = list(source.frames(threading.Event()))
    assert [frame.part_id for frame in frames] == [f"frame-{index:06d}" for index in range(8)]
    for index, frame in enumerate(frames):
        assert frame.image_bgr is not None
        assert abs(int((frame.image_bgr[32, :, 2] > 100).sum()) - 12 * (index + 1)) <= 4
        blue, green, red = frame.image_bgr[32, 4].astype(int)
        assert blue < green < red


def test_a_stop_ends_it(video: Path) -> None:
    stop = threading.Event()
    frames = open_image_source(str(video)).frames(stop)
    next(frames)
    stop.set()
    assert len(list(frames)) <= 1


@pytest.mark.parametrize("data", [b"", b"not a video", bytes(4096)])
def test_a_file_that_is_no_video(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"clip\.mp4: cannot be opened as video"):
        list(open_image_source(str(path)).frames(threading.Event()))


def test_a_video_cut_short_is_a_clear_error_or_fewer_frames(video: Path) -> None:
    whole = video.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 25)):
        video.write_bytes(whole[:length])
        # Any other error, or a crash inside the decoder, fails the test.
        with contextlib.suppress(DataError):
            assert 0 < len(list(open_image_source(str(video)).frames(threading.Event()))) <= 8


@pytest.mark.parametrize("scheme", ["rtsp", "RTSP"])
def test_a_network_camera_that_is_not_there_is_an_error_without_its_password(scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        source = open_image_source(f"{scheme}://admin:secret@127.0.0.1:{port}/stream")
        assert source.is_live
        assert "secret" not in source.name
        with pytest.raises(DataError, match="cannot be opened as video") as raised:
            next(iter(source.frames(threading.Event())))
    assert "secret" not in str(raised.value)


def test_passwords_are_never_shown() -> None:
    assert without_secrets("rtsp://me:pw@cam:554/live?x=1") == "rtsp://***@cam:554/live?x=1"
    assert without_secrets("rtsp://me:p@w@cam/live") == "rtsp://***@cam/live"
    assert without_secrets("rtsp://cam/live?mail=me@cam") == "rtsp://cam/live?mail=me@cam"
    assert without_secrets("rtsp://cam/live?password=pw") == "rtsp://cam/live?password=***"


def test_a_network_camera_is_read_and_can_be_read_again_after_an_outage() -> None:
    port = free_port()
    server = RtspServer(port)
    stop = threading.Event()
    try:
        source = open_image_source(f"rtsp://127.0.0.1:{port}/live")
        frames = source.frames(stop)
        images = [next(frames).image_bgr for _ in range(5)]
        for image in images:
            assert image is not None
            assert image.shape == (120, 160, 3)
        assert any((images[0] != image).any() for image in images[1:])
        server.kill()
        # What was on its way still comes.
        with pytest.raises(DataError):
            list(frames)
        server = RtspServer(port)
        frames = source.frames(stop)
        assert next(frames).image_bgr is not None
        stop.set()
        assert list(frames) == []
    finally:
        stop.set()
        server.kill()


def test_a_server_that_accepts_and_says_nothing_is_an_error_within_its_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"
        frames = live_frames(url, RtspSource(url=url).read, threading.Event(), stall_timeout_s=2.0)
        with pytest.raises(DataError, match="no image for 2 s; the process that reads it was killed"):
            next(frames)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
    ],
)
def test_a_video_is_turned_as_its_file_says(
    video: Path, matrix: tuple[int, int, int, int], shown: Callable[[np.ndarray], np.ndarray]
) -> None:
    (plain, *_) = open_image_source(str(video)).frames(threading.Event())
    data = bytearray(video.read_bytes())
    # The matrix of the track's header, in 16.16 fixed point.
    start = data.index(b"tkhd") + 44
    a, b, c, d = (number << 16 for number in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video.write_bytes(data)
    (turned, *_) = open_image_source(str(video)).frames(threading.Event())
    assert plain.image_bgr is not None
    np.testing.assert_array_equal(turned.image_bgr, shown(plain.image_bgr))


def test_a_video_whose_name_is_not_utf8_is_read(video: Path) -> None:
    odd = video.rename(video.with_name(os.fsdecode(b"clip\xff.mp4")))
    source = open_image_source(str(odd))
    assert source.name.endswith("clip\\xff.mp4")
    frames = list(source.frames(threading.Event()))
    assert len(frames) == 8
    assert all(frame.image_bgr is not None for frame in frames)
    assert {frame.source for frame in frames} == {source.name}
