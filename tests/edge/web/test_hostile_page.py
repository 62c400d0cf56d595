"""What anybody on the network may try on the page: real HTTP, and a whole daemon."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from pathlib import Path

import pytest

from tests.edge.web.test_page import TOKEN, ask, judge, part, station
from tests.support.line_daemon import daemon, judged, logged
from tests.support.ports import free_port
from tests.support.waiting import wait_for


def ask_as(address: str, path: str, host: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize("key", ["9" * 5000, "9" * 19, "-1", "1.5", "\u0663", "%00", "0x1"])
def test_no_path_is_an_error_of_ours(tmp_path: Path, package_file: Path, key: str) -> None:
    path = key if key.isascii() else "%D9%A3"
    with station(tmp_path, package_file) as (_, address):
        assert ask(address, f"/parts/{path}/plain.jpg")[0] == 404
        assert ask(address, f"/api/parts/{path}/mark", method="POST", body=b'{"was": "good"}', token=TOKEN)[0] == 404
        assert ask(address, f"/api/view?camera={path}")[0] == 200
        assert ask(address, f"/parts/1/plain.jpg?side={path}")[0] == 404


def test_a_page_elsewhere_reads_no_picture(tmp_path: Path, package_file: Path) -> None:
    with station(tmp_path, package_file, names=("line-1.plant.example",)) as (opened, address):
        judge(opened, part(0, "fail"))
        port = address.rpartition(":")[2]
        for path in ("/parts/1/plain.jpg", "/api/view", "/api/events", "/api/line", "/"):
            for host in ("rebound.example", f"rebound.example:{port}", "127.0.0.1.rebound.example", "a@b", ""):
                status, said = ask_as(address, path, host)
                assert status == 421, (path, host)
        assert "add the name to web.names" in json.loads(said)["error"]
        ours = ("127.0.0.1", f"127.0.0.1:{port}", "localhost", "[::1]:80", "10.1.2.3", "LINE-1.plant.example.")
        for host in (*ours, socket.gethostname()):
            assert ask_as(address, "/parts/1/plain.jpg", host)[0] == 200, host
        # Monitors call a line by names of their own.
        assert ask_as(address, "/healthz", "line:8080")[0] == 200
        assert ask_as(address, "/metrics", "line:8080")[0] == 200


def test_idle_connections_blind_no_line(tmp_path: Path, package_file: Path) -> None:
    port = free_port()
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(7)[1]))"
    config = f'[web]\nlisten = "127.0.0.1:{port}"\n'
    with daemon(package_file, tmp_path, config, code=few) as process, contextlib.ExitStack() as stack:
        wait_for(lambda: judged(tmp_path) > 0, "the line judges", timeout_s=60)
        for _ in range(256):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        descriptors = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        assert descriptors < 200
        before = judged(tmp_path)
        wait_for(lambda: judged(tmp_path) > before + 3, "it judges all the same", timeout_s=60)
        assert ask(f"http://127.0.0.1:{port}", "/api/view")[0] == 200
        assert "connections_closed" in logged(tmp_path)
        assert len(logged(tmp_path).splitlines()) < 50


def test_a_body_that_breaks_off_is_no_error_of_ours(tmp_path: Path, package_file: Path) -> None:
    port = free_port()
    head = f"POST /api/cameras/camera/do HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 100\r\n"
    with daemon(package_file, tmp_path, f'[web]\nlisten = "127.0.0.1:{port}"\n'):
        wait_for(lambda: judged(tmp_path) > 0, "the line judges", timeout_s=60)
        token = (tmp_path / "state" / "operator-token").read_text().strip()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(f"{head}X-EdgeFlame-Token: {token}\r\n\r\n{{".encode())
        before = judged(tmp_path)
        wait_for(lambda: judged(tmp_path) > before + 1, "it judges all the same", timeout_s=60)
        assert ask(f"http://127.0.0.1:{port}", "/api/view")[0] == 200
        assert "Traceback" not in logged(tmp_path)
