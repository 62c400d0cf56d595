"""Runs a GStreamer pipeline and writes its images to standard output. A separate program that imports no other module.

    echo "videotestsrc ! video/x-raw,width=320" | python3 -I gst_child.py

GStreamer's bindings belong to the system's Python, not to the environment that EdgeFlame is installed in; so this
program runs under the Python that has them, needs nothing else, and works from Python 3.8 on.

It writes records, each a header and its payload:

    IMAGE    header with width, height, bytes a row, monotonic time of capture; payload: rows, BGR
    FAILED   payload: why the pipeline failed, UTF-8
    MISSING  payload: what is not installed, UTF-8
    ENDED    no payload: the pipeline has ended
"""

from __future__ import annotations

import ctypes
import signal
import struct
import sys
import time
from typing import IO

HEADER = struct.Struct("<cIIIQQ")
"""Kind, width, height, bytes a row, nanoseconds of the monotonic clock, bytes of the payload."""

IMAGE, FAILED, MISSING, ENDED = b"I", b"F", b"M", b"E"

SINK = "edgeflame_images"
TAIL = f" ! videoconvert ! video/x-raw,format=BGR ! appsink name={SINK} sync=false max-buffers=4"
"""Not synchronised to the clock: the newest image matters, not an even pace."""

_POLL_NS = 200_000_000


def run_gst_child() -> None:
    # When a driver hangs, the reading process is killed; this one must end with it, or it would hold the camera.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Output of plugins must not get between the records.
    out = open(sys.stdout.fileno(), "wb", closefd=False)  # noqa: SIM115 - a descriptor, open until the end
    sys.stdout = sys.stderr
    try:
        run(sys.stdin.read(), Records(out))
    except BrokenPipeError:
        # The flush at Python's exit would fail again, and print that.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


class Records:
    def __init__(self, out: IO[bytes]) -> None:
        self._out = out

    def write(self, kind: bytes, payload: bytes = b"") -> None:
        self._write(HEADER.pack(kind, 0, 0, 0, 0, len(payload)), payload)

    def write_image(self, pixels: bytes, width: int, height: int, taken_ns: int) -> None:
        self._write(HEADER.pack(IMAGE, width, height, len(pixels) // height, taken_ns, len(pixels)), pixels)

    def _write(self, header: bytes, payload: bytes) -> None:
        self._out.write(header)
        self._out.write(payload)
        self._out.flush()


def run(description: str, records: Records) -> None:
    """Run a pipeline to its end and write its images."""
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstApp", "1.0")
        from gi.repository import GLib, Gst, GstApp  # noqa: F401 - GstApp gives the sink its methods
    except (ImportError, ValueError) as exc:
        return records.write(MISSING, str(exc).encode())
    Gst.init(None)
    try:
        pipeline = Gst.parse_launch(description + TAIL)
    except GLib.Error as exc:
        return records.write(FAILED, exc.message.encode())
    sink, bus = pipeline.get_by_name(SINK), pipeline.get_bus()
    pipeline.set_state(Gst.State.PLAYING)
    is_live = None
    try:
        while True:
            sample = sink.try_pull_sample(_POLL_NS)
            is_over = sample is None and sink.is_eos()
            # An element's error also ends the stream, and may come a moment later on the bus.
            message = bus.timed_pop_filtered(_POLL_NS if is_over else 0, Gst.MessageType.ERROR)
            if message is not None:
                error, _ = message.parse_error()
                return records.write(FAILED, f"{message.src.get_name()}: {error.message}".encode())
            if is_over:
                return records.write(ENDED)
            if sample is None:
                continue
            if is_live is None:
                query = Gst.Query.new_latency()
                is_live = pipeline.query(query) and query.parse_latency()[0]
            data, caps = sample.get_buffer(), sample.get_caps().get_structure(0)
            taken_ns = time.monotonic_ns()
            if is_live and data.pts != Gst.CLOCK_TIME_NONE:
                # A live source stamps its buffers with the pipeline's running time at the capture; files do not.
                running_ns = sample.get_segment().to_running_time(Gst.Format.TIME, data.pts)
                age_ns = pipeline.get_clock().get_time() - pipeline.get_base_time() - running_ns
                taken_ns -= min(max(0, age_ns), taken_ns)
            records.write_image(
                data.extract_dup(0, data.get_size()), caps.get_value("width"), caps.get_value("height"), taken_ns
            )
    finally:
        pipeline.set_state(Gst.State.NULL)


if __name__ == "__main__":
    run_gst_child()
