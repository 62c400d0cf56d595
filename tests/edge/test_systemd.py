"""The daemon under a supervisor, and how it ends: real sockets, real signals, and destinations that never answer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.systemd import ForcedExit, SystemdNotifier, Watchdog
from edgeflame.errors import CrashLoopError
from tests.support.line_daemon import daemon, judged, logged
from tests.support.waiting import wait_for


class Supervisor:
    """systemd's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.05)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """All that was said so far, one state each."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.heard += self._socket.recv(4096).decode().splitlines()
        return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    opened = Supervisor(tmp_path / "notify")
    yield opened
    opened.close()


class TestNotifier:
    """What is said to systemd."""

    def test_the_life_of_a_service(self, supervisor: Supervisor) -> None:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": str(supervisor.path)})
        assert notifier.watchdog_s is None
        with Watchdog(notifier, busy_s={}, status=lambda: "2 cameras, 7 parts") as watchdog:
            assert supervisor.listen() == ["READY=1", "STATUS=2 cameras, 7 parts"]
            with watchdog.reloading():
                assert supervisor.listen()[2] == "RELOADING=1"
                assert supervisor.listen()[3].startswith("MONOTONIC_USEC=")
            assert supervisor.listen()[4] == "READY=1"
        assert supervisor.listen()[6:] == ["STOPPING=1", "STATUS=stopping"]

    def test_abstract_sockets_and_no_socket(self) -> None:
        name = f"edgeflame-test-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
            opened.bind(f"\0{name}")
            SystemdNotifier({"NOTIFY_SOCKET": f"@{name}"}).notify(READY=1)
            assert opened.recv(100) == b"READY=1"
        SystemdNotifier({}).notify(READY=1)
        SystemdNotifier({"NOTIFY_SOCKET": "/nowhere/at/all"}).notify(READY=1)

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"WATCHDOG_USEC": "30000000"}, 30.0),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
            ({"WATCHDOG_USEC": "0"}, None),
            ({"WATCHDOG_USEC": "much"}, None),
        ],
    )
    def test_whose_watchdog_it_is(self, environment: dict[str, str], expected: float | None) -> None:
        assert SystemdNotifier(environment).watchdog_s == expected

    def test_the_watchdog_is_fed_only_while_everything_moves(self, supervisor: Supervisor) -> None:
        busy = {"camera a": 0.0}
        notifier = SystemdNotifier({"NOTIFY_SOCKET": str(supervisor.path), "WATCHDOG_USEC": "150000"})
        done = threading.Event()

        def heartbeat(watchdog: Watchdog) -> None:
            while not done.wait(0.01):
                watchdog.heartbeat()

        with Watchdog(notifier, busy_s={"camera a": lambda: busy["camera a"]}, status=lambda: "") as watchdog:
            thread = threading.Thread(target=heartbeat, args=(watchdog,))
            thread.start()
            wait_for(lambda: supervisor.listen().count("WATCHDOG=1") >= 3, "the watchdog is fed")
            busy["camera a"] = 60.0
            wait_for(lambda: "STATUS=hangs: camera a" in supervisor.listen(), "it says who hangs")
            fed = supervisor.listen().count("WATCHDOG=1")
            wait_for(lambda: supervisor.listen().count("STATUS=hangs: camera a") >= 4, "it goes on hanging")
            assert supervisor.listen().count("WATCHDOG=1") == fed
            busy["camera a"] = 0.0
            wait_for(lambda: supervisor.listen().count("WATCHDOG=1") > fed, "it is fed again")
            # A main thread that stands still is as bad.
            done.set()
            thread.join()
            wait_for(lambda: "STATUS=hangs: main" in supervisor.listen(), "the main thread hangs")


def test_systemd_hears_of_start_reload_and_end(package_file: Path, tmp_path: Path, supervisor: Supervisor) -> None:
    with daemon(package_file, tmp_path, "", NOTIFY_SOCKET=str(supervisor.path), WATCHDOG_USEC="1000000") as process:
        wait_for(lambda: "READY=1" in supervisor.listen(), "it is ready")
        wait_for(lambda: "WATCHDOG=1" in supervisor.listen(), "it feeds the watchdog")
        wait_for(lambda: any("1 cameras" in word for word in supervisor.listen()), "it tells its status")
        (tmp_path / "line.toml").write_text("[verdict]\nthreshold = 1e9\n")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "RELOADING=1" in supervisor.listen(), "it reloads")
        wait_for(lambda: "reloaded changed=cameras.camera.verdict" in logged(tmp_path), "it says what changed")
        wait_for(lambda: b'"threshold":1000000000.0' in (tmp_path / "out").read_bytes(), "it goes by it")
        (tmp_path / "line.toml").write_text("[verdict]\nthreshold = 0\n")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "reload_refused" in logged(tmp_path), "a wrong file is refused")
        before = judged(tmp_path)
        wait_for(lambda: judged(tmp_path) > before, "it goes on")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert supervisor.listen()[-2:] == ["STOPPING=1", "STATUS=stopping"]
    assert b'"threshold":1000000000.0' in (tmp_path / "out").read_bytes().splitlines()[-1]


HANG = """
import threading
from edge.inspector import Inspector
inspect, parts = Inspector.inspect, []
def hang(self, captured):
    parts.append(captured)
    if len(parts) == 20:
        threading.Event().wait()
    return inspect(self, captured)
Inspector.inspect = hang
"""


def test_a_hung_inference_starves_the_watchdog_and_does_not_hold_up_a_stop(
    package_file: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    with daemon(
        package_file, tmp_path, "", code=HANG, NOTIFY_SOCKET=str(supervisor.path), WATCHDOG_USEC="600000"
    ) as process:
        wait_for(lambda: "STATUS=hangs: camera camera" in supervisor.listen(), "it says that it hangs")
        fed = supervisor.listen().count("WATCHDOG=1")
        wait_for(lambda: supervisor.listen().count("STATUS=hangs: camera camera") >= 3, "it still hangs")
        assert supervisor.listen().count("WATCHDOG=1") == fed
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert judged(tmp_path) == 19
        assert "camera_does_not_stop" in logged(tmp_path)


@pytest.fixture
def silent() -> Iterator[int]:
    """A service that accepts connections and says nothing, ever; its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


def test_a_stop_waits_for_nobody_who_does_not_answer(package_file: Path, tmp_path: Path, silent: int) -> None:
    """Broker, web service and PLC all accept and say nothing; what waits for them is on the disk."""
    config = (
        f'[mqtt]\nbroker = "mqtt://127.0.0.1:{silent}"\nfleet = "f"\nline = "l"\n'
        f'[webhook]\nurl = "http://127.0.0.1:{silent}/"\ntimeout_s = 60.0\n'
        f'[modbus]\nhost = "127.0.0.1"\nport = {silent}\ntimeout_s = 1.0\n'
        '[web]\nlisten = "127.0.0.1:0"\n'
    )
    with daemon(package_file, tmp_path, config) as process:
        wait_for(lambda: judged(tmp_path) > 50, "parts are judged")
        process.send_signal(signal.SIGTERM)
        # After five seconds it would be forced, and say so.
        assert process.wait(30) == 0
    assert "results_kept_for_the_next_start" in logged(tmp_path)
    assert "stop_forced" not in logged(tmp_path)


def test_the_last_resort_ends_a_process_that_would_never_end(tmp_path: Path) -> None:
    program = (
        "import threading\nfrom edgeflame.log import configure_logging\n"
        "configure_logging(log_format='text', verbosity=0)\nfrom edge.systemd import ForcedExit\n"
        "with ForcedExit() as last:\n    last.arm(0.05)\n    threading.Event().wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == CrashLoopError.exit_code
    assert "stop_forced" in done.stderr


def test_the_last_resort_is_called_off_by_an_end_in_time() -> None:
    with ForcedExit() as last:
        last.arm(0.05)
    thread = next((one for one in threading.enumerate() if one.name == "edgeflame-forced-exit"), None)
    if thread is not None:
        thread.join(10)


BLOCKED_DISK = """
import threading
from edge.delivery.outbox import Outbox
append, calls = Outbox.append, []
def hang(self, bodies, *more):
    calls.append(bodies)
    if len(calls) > 3:
        threading.Event().wait()
    return append(self, bodies, *more)
Outbox.append = hang
"""


def test_a_disk_that_never_answers_is_said_and_the_process_ends_all_the_same(
    package_file: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    config = "[retry]\nflush_s = 0.1\n"
    with daemon(
        package_file, tmp_path, config, code=BLOCKED_DISK, NOTIFY_SOCKET=str(supervisor.path), WATCHDOG_USEC="600000"
    ) as process:
        wait_for(lambda: any("hangs: " in word and "outbox" in word for word in supervisor.listen()), "it says so")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == CrashLoopError.exit_code
    assert "stop_forced" in logged(tmp_path)
