"""Runs a GStreamer pipeline and writes its images to standard output. A separate program that imports no other module.

    echo "videotestsrc ! video/x-raw,width=320" | python3 -I gst_child.py

GStreamer's bindings belong to the system's Python, not to the environment that EdgeFlame is installed in; so this
program runs under the Python that has them, needs nothing else, and works from Python 3.8 on.

It writes records, each a header and its payload:

    IMAGE    header with width, height, bytes a row, monotonic time of capture, time stamp; payload: rows, BGR
    PACKET   header with flags in place of the width, time of decoding, time stamp: what goes into a video decoder
    PICTURE  header with flags and time stamp: what comes out of it
    FAILED   payload: why the pipeline failed, UTF-8
    MISSING  payload: what is not installed, UTF-8
    ENDED    no payload: the pipeline has ended
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import signal
import struct
import sys
import threading
import time
from typing import IO, Any

HEADER = struct.Struct("<cIIIQQQ")
"""Kind, width, height, bytes a row, nanoseconds, the pipeline's time stamp in nanoseconds, bytes of the payload."""

IMAGE, PACKET, PICTURE, FAILED, MISSING, ENDED = b"I", b"P", b"D", b"F", b"M", b"E"

NO_TIME = 2**64 - 1
"""Stands for a time that is not known."""

KEY, AFTER_GAP, CORRUPT = 1, 2, 4
"""Flags: a keyframe; something is missing before it; something is missing in it."""

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
        # Decoders run on threads of their own.
        self._lock = threading.Lock()

    def write(self, kind: bytes, payload: bytes = b"") -> None:
        self._write(HEADER.pack(kind, 0, 0, 0, 0, NO_TIME, len(payload)), payload)

    def write_image(self, pixels: bytes, width: int, height: int, taken_ns: int, stamp_ns: int) -> None:
        row_bytes = len(pixels) // height
        self._write(HEADER.pack(IMAGE, width, height, row_bytes, taken_ns, stamp_ns, len(pixels)), pixels)

    def write_passage(self, kind: bytes, flags: int, decoded_ns: int, stamp_ns: int) -> None:
        self._write(HEADER.pack(kind, flags, 0, 0, decoded_ns, stamp_ns, 0), b"")

    def _write(self, header: bytes, payload: bytes) -> None:
        with self._lock:
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
    watch_decoders(pipeline, records)
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
                data.extract_dup(0, data.get_size()),
                caps.get_value("width"),
                caps.get_value("height"),
                taken_ns,
                data.pts,
            )
    finally:
        pipeline.set_state(Gst.State.NULL)


def has_hole(pad: Any, data: Any) -> bool:
    """Whether a packet of H.264 or H.265 has zeros in it that no encoder writes and some decoders take for data.

    Pictures never have three zeros in a row; before their start codes there may be some, though not that many.
    """
    caps = pad.get_current_caps()
    kind = "" if caps is None else caps.get_structure(0).get_name()
    return kind in ("video/x-h264", "video/x-h265") and bytes(64) in data.extract_dup(0, data.get_size())


def watch_decoders(pipeline: Any, records: Records) -> None:
    """Report what goes into each video decoder of a pipeline and what comes out of it, those added later included."""
    from gi.repository import Gst

    def report(kind: bytes, pad: Any, info: Any) -> Any:
        data = info.get_buffer()
        if data.has_flags(Gst.BufferFlags.DECODE_ONLY):
            return Gst.PadProbeReturn.OK  # it shows nothing
        flags = 0 if data.has_flags(Gst.BufferFlags.DELTA_UNIT) else KEY
        flags |= AFTER_GAP if data.has_flags(Gst.BufferFlags.DISCONT) else 0
        flags |= CORRUPT if data.has_flags(Gst.BufferFlags.CORRUPTED) or has_hole(pad, data) else 0
        # Where the reader is gone the main thread notices it.
        with contextlib.suppress(OSError):
            records.write_passage(kind, flags, data.dts, data.pts)
        return Gst.PadProbeReturn.OK

    def watch(element: Any) -> None:
        factory = element.get_factory()
        kind = "" if factory is None else factory.get_metadata("klass")
        if "Decoder" in kind and ("Video" in kind or "Image" in kind) and not isinstance(element, Gst.Bin):
            for name, record in (("sink", PACKET), ("src", PICTURE)):
                pad = element.get_static_pad(name)
                if pad is not None:
                    pad.add_probe(Gst.PadProbeType.BUFFER, functools.partial(report, record))

    pipeline.connect("deep-element-added", lambda _pipeline, _bin, element: watch(element))
    elements = pipeline.iterate_recurse()
    while True:
        found, element = elements.next()
        if found != Gst.IteratorResult.OK:
            return
        watch(element)


if __name__ == "__main__":
    run_gst_child()
