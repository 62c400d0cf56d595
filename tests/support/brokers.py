"""Real brokers for tests, as processes that can be killed and started again on the same port."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import pytest

from tests.support.ports import free_port
from tests.support.waiting import wait_for

BROKERS = ("embedded", "mosquitto")
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class BrokerProcess:
    """A broker on a port of its own; a context manager.

    Args:
        kind: ``embedded`` (``edgeflame broker``) or ``mosquitto``; without Mosquitto the test is skipped.
        folder: for its configuration and log.
        mosquitto_lines: more lines of Mosquitto's configuration.
        config: a whole configuration for Mosquitto, in place of that, which listens on ``port``.
        port: to listen on; None: a free one.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        *,
        mosquitto_lines: str = "allow_anonymous true",
        config: Path | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self._log = (folder / f"broker-{self.port}.log").open("ab")
        if kind == "mosquitto":
            if MOSQUITTO is None:
                pytest.skip("Mosquitto is not installed")
            if config is None:
                config = folder / f"mosquitto-{self.port}.conf"
                config.write_text(f"listener {self.port} 127.0.0.1\n{mosquitto_lines}\n")
            self._command = [MOSQUITTO, "-c", str(config)]
        else:
            self._command = [sys.executable, "-m", "edgeflame", "broker", "--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it listens."""
        wait_for(lambda: not self._listens(), "the port is free")
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        wait_for(self._listens, "the broker listens")

    def reload(self) -> None:
        """SIGHUP: read certificates and the revocation list again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return Path(self._log.name).read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL; what it kept in memory is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> BrokerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._log.close()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=0.5):
            return True
        return False
