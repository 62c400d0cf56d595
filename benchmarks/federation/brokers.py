"""A broker to measure with: Mosquitto as Debian ships it, or the embedded one."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.ports import free_port

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
BROKERS = ("mosquitto", "embedded") if MOSQUITTO else ("embedded",)
START_TIMEOUT_S = 20.0


def mosquitto_version() -> str:
    """The first line of Mosquitto's help, which names its version."""
    if MOSQUITTO is None:
        return "no Mosquitto"
    said = subprocess.run([MOSQUITTO, "-h"], capture_output=True, text=True, check=False)
    return said.stdout.split("\n")[0]


@contextlib.contextmanager
def running(kind: str, folder: Path) -> Iterator[tuple[str, int]]:
    """The URL and process id of a broker that runs meanwhile, with its defaults."""
    port = free_port()
    if kind == "mosquitto":
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        command = [str(MOSQUITTO), "-c", str(config)]
    else:
        command = [sys.executable, "-m", "edgeflame", "broker", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{kind} does not start")
            time.sleep(0.05)
        yield f"mqtt://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()
