"""Records what a version leaves on the disk, as archives that later versions must open.

    python -m tests.support.record_state NAME

writes, from real processes killed in the middle of their work, into ``state/NAME`` in tests/upgrades/recorded:

    package.edgeflame   a model package, small
    line.tar.gz         the state folder of an inspection: results delivered and not, an operator's marks, its token
    run.tar.gz          an aggregator's and two sites' state folders in the middle of a round's training
    fleet.tar.gz        a fleet's folder: authority, registry, kits; one member revoked
    facts.json          what the tests expect to find in them

A version's state is recorded once, before its format changes, and never changed afterwards. The keys in the fleet's
folder were made here and are of no use anywhere else.
"""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeflame.package import read_package
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import RECORDED, REPOSITORY
from tests.support.ports import free_port
from tests.support.small_package import with_references, write_small_package
from tests.support.waiting import wait_for

SOURCE = "boards:warm_white_grid?size=128&parts=100000&defect_rate=0.5"
DELIVERED = 12
"""Parts of the inspection's first run, which everybody gets."""


class Hook(http.server.BaseHTTPRequestHandler):
    """A web service that takes everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def record_package(out: Path, scratch: Path) -> None:
    small = read_package(write_small_package(scratch / "small.edgeflame"))
    with_references(small, out, count=2)


def record_line(package: Path, scratch: Path) -> dict[str, Any]:
    """Two runs: everything of the first is delivered, nothing of the second; that one is killed."""
    state, config, page = scratch / "line", scratch / "line.toml", f"127.0.0.1:{free_port()}"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with BrokerProcess("embedded", scratch) as broker:
        config.write_text(
            f'[mqtt]\nbroker = "{broker.url}"\nfleet = "recorded"\nline = "line1"\n'
            f'[webhook]\nurl = "http://127.0.0.1:{server.server_port}/"\n[web]\nlisten = "{page}"\n'
            "[retry]\nfirst_delay_s = 0.05\nflush_s = 10.0\n"
        )
        command = [
            *(sys.executable, "-m", "edgeflame", "inspect", "--model", str(package), "--source", SOURCE),
            *("--config", str(config), "--state", str(state), "--threads", "1", "--json"),
        ]
        subprocess.run([*command, "--limit", str(DELIVERED)], check=True, stdout=subprocess.DEVNULL)
    server.shutdown()
    server.server_close()
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert daemon.stdout is not None
    seen = [json.loads(daemon.stdout.readline()) for _ in range(3)]
    marked = _mark(page, (state / "operator-token").read_text().strip())
    daemon.send_signal(signal.SIGKILL)
    seen += [json.loads(line) for line in daemon.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    daemon.wait()
    (state / "lock").write_bytes(b"")
    with sqlite3.connect(f"file:{state / 'outbox.sqlite'}?mode=ro", uri=True) as outbox:
        newest, uuid = outbox.execute(
            "SELECT MAX(number), (SELECT value FROM meta WHERE key = 'id') FROM results"
        ).fetchone()
        standing = dict(outbox.execute("SELECT name, acknowledged FROM destinations"))
    assert standing == {"mqtt": DELIVERED, "webhook": DELIVERED}
    assert newest >= DELIVERED + len(seen)
    return {"outbox": uuid, "newest": newest, "delivered": DELIVERED, "marked": marked}


def _mark(page: str, token: str) -> list[str]:
    """Both kinds of mark, as the page sets them; their files."""
    files = []
    for was in ("good", "bad"):
        connection = http.client.HTTPConnection(page, timeout=20)
        connection.request("GET", "/api/view")
        key = json.loads(connection.getresponse().read())["view"]["recent"][0]["key"]
        body, headers = json.dumps({"was": was}), {"Authorization": f"Bearer {token}"}
        connection.request("POST", f"/api/parts/{key}/mark", body, headers)
        files.append(json.loads(connection.getresponse().read())["file"])
        connection.close()
    return files


def record_run(scratch: Path) -> dict[str, Any]:
    """Two sites and two rounds; all are killed while one site trains in round 2 and the other's update is there."""
    gate = scratch / "gate"
    gate.mkdir()
    (gate / "go-a-1").touch()
    with BrokerProcess("embedded", scratch) as broker, Fleet(broker, scratch) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        sites = [fleet.site("a", TINY_GATE=str(gate)), fleet.site("b")]
        wait_for((gate / "waiting-a-2").exists, "a trains in round 2")
        aggregator.wait_for_log("update_accepted", times=3)
        for process in (aggregator, *sites):
            process.kill()
    for name in ("aggregator", "state-a", "state-b"):
        (scratch / name / "lock").write_bytes(b"")
    return {"sites": ["a", "b"], "rounds": 2}


def record_fleet(scratch: Path) -> dict[str, Any]:
    def fleet(*arguments: str, exit_code: int = 0) -> None:
        command = [sys.executable, "-m", "edgeflame", "fleet", *arguments]
        assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == exit_code

    folder = str(scratch / "fleet")
    plugin = ("--plugin", "/usr/lib/mosquitto_dynamic_security.so", "--install-dir", "/etc/mosquitto/recorded")
    fleet("init", folder, "--fleet", "recorded", "--host", "127.0.0.1", "--port", "18883", *plugin)
    for name, role in (("plant-a", "site"), ("plant-b", "site"), ("line1", "line"), ("scada", "observer")):
        fleet("enrol", folder, name, "--role", role, "--days", "3650", "--offline")
    # No broker to tell: what is in the folder counts.
    fleet("revoke", folder, "plant-b", "--reason", "its box was stolen", "--connect-timeout", "0.1", exit_code=7)
    (scratch / "fleet" / "lock").write_bytes(b"")
    return {"active": ["line1", "plant-a", "scada"], "revoked": "plant-b"}


def pack(archive: Path, folder: Path, names: Sequence[str]) -> None:
    """The folders in a tar, without who made them."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:gz", compresslevel=9) as tar:
        for name in names:
            tar.add(folder / name, arcname=name, filter=anonymous)


def main() -> None:
    """Record all of it."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    out = RECORDED / "state" / sys.argv[1]
    out.mkdir(parents=True)
    facts = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        record_package(out / "package.edgeflame", scratch)
        facts["line"] = record_line(out / "package.edgeflame", scratch)
        pack(out / "line.tar.gz", scratch, ["line"])
        facts["run"] = record_run(scratch)
        pack(out / "run.tar.gz", scratch, ["aggregator", "state-a", "state-b"])
        facts["fleet"] = record_fleet(scratch)
        pack(out / "fleet.tar.gz", scratch, ["fleet"])
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
