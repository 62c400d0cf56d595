"""A network camera: GStreamer's RTSP server as a process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class RtspServer:
    """GStreamer's RTSP server as a process.

    Args:
        port: where it listens.
        pipeline: what it serves; left out, a moving ball.
    """

    def __init__(self, port: int, *pipeline: str) -> None:
        program = str(Path(__file__).with_name("rtsp_server_program.py"))
        self._command = ["/usr/bin/python3", program, str(port), *pipeline]
        # Debian's Python has a path of its own.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"serving\n":
            self.kill()
            pytest.skip("GStreamer's RTSP server and its Python bindings are not installed")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
