"""Videos of parts that stay for a few pictures each, whole, with packets that are lost or damaged."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge.frame import Frame
from edge.sources.child import OVERWRITTEN
from edge.sources.damage import LOST
from edgeflame.images import ImageU8

KEY_EVERY = 20
NUM_PICTURES = 60
_HOLD = 6
_OPTIONS = {
    "libx264": {"preset": "fast", "x264-params": "scenecut=0"},
    "libx265": {"preset": "fast", "x265-params": "log-level=none:scenecut=0"},
}


def parts() -> list[ImageU8]:
    """Parts that differ all over, 128x128."""
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 255, (16, 16, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(10)]


def make_video(
    path: Path, codec: str, *, lost: Collection[int] = (), b_frames: int = 0, num_pictures: int = NUM_PICTURES
) -> Path:
    """Encode a video with a keyframe every ``KEY_EVERY`` pictures.

    Args:
        path: file to write; its suffix is that of the container.
        codec: FFmpeg's name of the encoder.
        lost: packets that are left out, in the order of decoding.
        b_frames: most pictures in a row that refer to later ones.
        num_pictures: ten a second.
    """
    av = pytest.importorskip("av")
    shown = parts()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = KEY_EVERY, b_frames
        # One slice a picture.
        stream.codec_context.thread_count = 1
        stream.options = _OPTIONS.get(codec, {})
        frames = [
            av.VideoFrame.from_ndarray(shown[number // _HOLD % len(shown)], format="bgr24")
            for number in range(num_pictures)
        ]
        packets = [packet for frame in (*frames, None) for packet in stream.encode(frame)]
        for number, packet in enumerate(packets):
            if number not in lost:
                container.mux(packet)
    return path


def zero_packets(path: Path, numbers: Collection[int]) -> Path:
    """Overwrite the last two thirds of packets with zeros."""
    data = bytearray(path.read_bytes())
    places = packet_places(path)
    for number in numbers:
        at, size = places[number]
        data[at + size // 3 : at + size] = bytes(size - size // 3)
    path.write_bytes(data)
    return path


def packet_places(path: Path) -> list[tuple[int, int]]:
    """Where each packet lies in the file, and how long it is, in bytes."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


@dataclass(frozen=True)
class Judged:
    """What a source made of a video.

    A letter a picture: ``.`` to be judged, ``u`` unknown, ``-`` lost, ``o`` overwritten because the test was slow.
    """

    letters: str
    errors: frozenset[str]
    wrong: tuple[int, ...]
    """Places of pictures that are to be judged and do not show their part."""


def judged(frames: Collection[Frame], whole: Path, *, first: int = 0) -> Judged:
    """Compare a source's frames with the pictures of the whole video, from the ``first`` on."""
    av = pytest.importorskip("av")
    with av.open(str(whole)) as container:
        right = [picture.to_ndarray(format="bgr24").astype(float) for picture in container.decode(video=0)]
    letters, wrong = "", []
    for frame in frames:
        letters += "-" * frame.missed.get(LOST, 0) + "o" * frame.missed.get(OVERWRITTEN, 0)
        place = first + len(letters)
        if frame.image_bgr is not None and not (
            place < len(right) and np.abs(frame.image_bgr - right[place]).mean() < 8
        ):
            wrong.append(len(letters))
        letters += "u" if frame.image_bgr is None else "."
    return Judged(letters, frozenset(frame.error for frame in frames if frame.error is not None), tuple(wrong))
