"""Lost and damaged packets of real videos, over every way in: what is judged shows the part that was there."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from edge.frame import Frame, make_frame
from edge.sources.camera import SYSTEM_PYTHON, gst_source
from edge.sources.child import TakenImage
from edge.sources.damage import LOST, PipelineDamage, StreamDamage
from edge.sources.locate import open_image_source
from edgeflame.errors import DataError
from tests.support.made_videos import KEY_EVERY, NUM_PICTURES, judged, make_video, packet_places, zero_packets
from tests.support.ports import free_port
from tests.support.rtsp_server import RtspServer

pytest.importorskip("av")

UNTIL_THE_KEYFRAME = r"\.{10,12}[u-]{8,11}\.{38,40}"
"""A loss at the twelfth picture: nothing is judged until the keyframe, then everything."""


def frames_of(address: str) -> list[Frame]:
    frames: list[Frame] = []
    # A live source ends with an error.
    with contextlib.suppress(DataError):
        frames.extend(open_image_source(address).frames(threading.Event()))
    return frames


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
def test_a_whole_video_is_judged_whole(codec: str, b_frames: int, suffix: str, tmp_path: Path) -> None:
    whole = make_video(tmp_path / f"whole.{suffix}", codec, b_frames=b_frames)
    found = judged(frames_of(str(whole)), whole)
    assert found.letters == "." * NUM_PICTURES
    assert not found.wrong


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_lost_packets_of_web_video_are_told_by_their_times(codec: str, tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.webm", codec)
    found = judged(frames_of(str(make_video(tmp_path / "lost.webm", codec, lost=[12]))), whole)
    assert re.fullmatch(UNTIL_THE_KEYFRAME, found.letters)
    assert not found.wrong


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_where_bytes_of_a_packet_were_changed_no_wrong_picture_is_judged(codec: str, tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", codec)
    random, data, places = np.random.default_rng(1), whole.read_bytes(), packet_places(whole)
    num_told = 0
    for number in random.integers(1, NUM_PICTURES - KEY_EVERY, 12):
        at, size = places[number]
        place = at + int(random.integers(size // 4, max(size // 4 + 1, size - 16)))
        length = min(16, at + size - place)
        (tmp_path / "changed.mp4").write_bytes(data[:place] + random.bytes(length) + data[place + length :])
        found = judged(frames_of(str(tmp_path / "changed.mp4")), whole)
        assert not found.wrong
        num_told += bool(set(found.letters) - {"."})
    assert num_told > 6


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
def test_after_a_lost_packet_nothing_is_judged_until_the_keyframe(
    codec: str, b_frames: int, suffix: str, tmp_path: Path
) -> None:
    whole = make_video(tmp_path / "whole.mp4", codec, b_frames=b_frames)
    found = judged(frames_of(str(make_video(tmp_path / f"lost.{suffix}", codec, b_frames=b_frames, lost=[12]))), whole)
    assert re.fullmatch(UNTIL_THE_KEYFRAME, found.letters)
    assert found.letters.count("-") == 1
    assert not found.wrong
    assert all("the video is damaged: " in error for error in found.errors)


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_after_a_damaged_packet_nothing_is_judged_until_the_keyframe(codec: str, b_frames: int, tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", codec, b_frames=b_frames)
    damaged = make_video(tmp_path / "damaged.mp4", codec, b_frames=b_frames)
    found = judged(frames_of(str(zero_packets(damaged, [12, 30, 48]))), whole)
    assert len(found.letters) == NUM_PICTURES
    assert not found.wrong
    for first, key in ((13, 18), (31, 38), (49, 57)):
        assert found.letters[first:key] == "u" * (key - first)
    # Keyframes end it.
    assert found.letters.count(".") > NUM_PICTURES // 3


def test_after_a_lost_keyframe_nothing_is_judged_until_the_next(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", "libx264")
    found = judged(frames_of(str(make_video(tmp_path / "lost.ts", "libx264", lost=[KEY_EVERY]))), whole)
    assert re.fullmatch(r"\.{20}[u-]{20}\.{20}", found.letters)
    assert not found.wrong


def test_where_every_picture_is_a_keyframe_only_the_damaged_one_is_unknown(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.avi", "mjpeg")
    lost = judged(frames_of(str(make_video(tmp_path / "lost.avi", "mjpeg", lost=[]))), whole)
    assert lost.letters == "." * NUM_PICTURES
    damaged = judged(frames_of(str(zero_packets(make_video(tmp_path / "damaged.avi", "mjpeg"), [12]))), whole)
    assert damaged.letters == "." * 12 + "u" + "." * 47
    assert not damaged.wrong


@pytest.mark.parametrize(("codec", "name"), [("libx264", "h264"), ("libx265", "h265")])
def test_a_network_camera_that_loses_a_picture(codec: str, name: str, tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", codec, num_pictures=120)
    make_video(tmp_path / "lost.ts", codec, num_pictures=120, lost=[72])
    port = free_port()
    server = RtspServer(
        port,
        f"filesrc location={tmp_path}/lost.ts ! tsdemux ! {name}parse ! video/x-{name},alignment=au "
        f"! rtp{name}pay name=pay0 config-interval=-1",
    )
    try:
        frames = frames_of(f"rtsp://127.0.0.1:{port}/live")
    finally:
        server.kill()
    # A viewer comes in the middle: up to the first keyframe there is nothing to judge by.
    found = re.match(r"(u*[.o]{20,})[u-]{8}[.o]{20}", judged(frames, whole).letters)
    assert found is not None
    assert judged(frames, whole, first=72 - len(found[1])).wrong == ()


@pytest.mark.parametrize(
    ("codec", "decoder"), [("libx264", "h264parse ! openh264dec"), ("libx265", "h265parse ! libde265dec")]
)
@pytest.mark.parametrize("fault", ["lost", "damaged", "none"])
def test_a_pipeline_that_decodes_a_damaged_video(codec: str, decoder: str, fault: str, tmp_path: Path) -> None:
    program = (
        "import gi; gi.require_version('Gst', '1.0'); from gi.repository import Gst; Gst.init(None); "
        f"assert Gst.ElementFactory.find('{decoder.split()[-1]}')"
    )
    if subprocess.run([SYSTEM_PYTHON, "-I", "-c", program], stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"GStreamer, its Python bindings or {decoder.split()[-1]} are not installed")
    whole = make_video(tmp_path / "whole.mp4", codec)
    given = make_video(tmp_path / ("lost.ts" if fault == "lost" else "given.mp4"), codec, lost=[12][: fault == "lost"])
    if fault == "damaged":
        zero_packets(given, [12])
    demuxer = "tsdemux" if fault == "lost" else "qtdemux"
    # Read without a ring in between, in which images that come as fast as a file gives them are overwritten.
    taken: list[TakenImage] = []
    with pytest.raises(DataError, match="the pipeline ended"):
        taken.extend(gst_source(f"gst:filesrc location={given} ! {demuxer} ! {decoder}").read(threading.Event()))
    frames = [
        make_frame(part_id="", source="gst", image_bgr=one.image, error=one.error, missed={LOST: one.num_lost})
        for one in taken
    ]
    found = judged(frames, whole)
    # A decoder that drops pictures may name the keyframe after the one before it.
    assert re.fullmatch(r"\.{60}" if fault == "none" else r"\.{11,12}[u-]{8,10}\.{39,40}", found.letters)
    assert not found.wrong


def test_steps_that_were_never_even_are_no_loss() -> None:
    damage = StreamDamage()
    times = [0, 10, 35, 40, 70, 75, 120, 130, 131, 190, 200]
    for number, time in enumerate(times):
        damage.add_packet(time, shown=time, is_key=number == 0)
        state = damage.take_picture(number, is_key=number == 0)
        assert (state.damage, state.num_lost, state.num_undecoded) == (None, 0, 0)


def test_a_camera_that_changes_its_rate_for_good_is_believed_soon() -> None:
    damage = StreamDamage()
    time, whole = 0.0, []
    for number in range(60):
        time += 33 if number < 20 else 66
        damage.add_packet(time, shown=time, is_key=number % 10 == 0)
        whole.append(damage.take_picture(number, is_key=number % 10 == 0).damage is None)
    assert whole[:20] == [True] * 20
    assert whole[30:] == [True] * 30


def test_a_keyframe_that_came_before_the_damage_does_not_end_it() -> None:
    damage = StreamDamage()
    for number in range(4):
        damage.add_packet(number, shown=number, is_key=number == 2)
    damage.complain("a hole")
    # The keyframe is shown only now.
    assert damage.take_picture(2, is_key=True).damage is not None
    damage.add_packet(4, shown=4, is_key=True)
    assert damage.take_picture(4, is_key=True).damage is None


def test_what_a_pipeline_leaves_out_after_its_decoder_is_not_lost() -> None:
    damage = PipelineDamage()
    for number in range(30):
        stamp = float(number)
        damage.add_packet(stamp, stamp, is_key=number == 0, is_after_gap=number == 0, is_corrupt=False)
        damage.take_picture(stamp, is_corrupt=False)
        if number % 3 == 2:  # a slower rate
            state = damage.take_image(stamp - 0.5)
            assert (state.damage, state.num_lost, state.num_undecoded) == (None, 0, 0)
    assert damage.end() == 0
