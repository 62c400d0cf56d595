"""A real RTSP server, GStreamer's, for tests; runs under Debian's own Python, which has its bindings.

    /usr/bin/python3 rtsp_server_program.py PORT [PIPELINE]

Serves rtsp://127.0.0.1:PORT/live: the pipeline, whose payloader is called pay0; without one a moving ball on noise,
JPEG, 10 frames a second.
"""

from __future__ import annotations

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402 - after the versions are chosen

Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_service(sys.argv[1])
server.set_address("127.0.0.1")
factory = GstRtspServer.RTSPMediaFactory()
BALL = (
    "videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=160,height=120,framerate=10/1 "
    "! jpegenc ! rtpjpegpay name=pay0 pt=26"
)
factory.set_launch(f"( {sys.argv[2] if len(sys.argv) > 2 else BALL} )")
factory.set_shared(True)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print("serving", flush=True)
GLib.MainLoop().run()
