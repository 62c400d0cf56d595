"""Commands to a line: what the server takes and refuses, and the whole way over a real broker."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cli import cli
from cli import line as line_module
from edge.camera_worker import CameraWorker
from edge.cameras import OVERRIDES_FILE, Overrides
from edge.commands.messages import MAX_COMMAND_BYTES, Reply, decode_command, read_command_id
from edge.commands.server import MAX_BURST, MAX_WAITING, CommandServer
from edge.config.inspection import CaptureConfig
from edge.control import DaemonControl
from edge.teaching.orders import ACTIONS, TeachingAction
from edgeflame.errors import DataError, FederationError, LinkError, StorageError, UsageError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.scripted_camera import Belt, FakeInspector
from tests.support.waiting import wait_for


class Office:
    """A daemon of fake cameras, its server, and the replies."""

    def __init__(self, folder: Path | None = None, *names: str) -> None:
        self.belts = {name: Belt() for name in names or ("a",)}
        self.judges: dict[str, FakeInspector] = {}
        self.workers = [
            CameraWorker(name, lambda belt=belt: belt, FakeInspector(), CaptureConfig())  # type: ignore[misc]
            for name, belt in self.belts.items()
        ]
        cameras = SimpleNamespace(
            workers=self.workers,
            products={"tile": Path("t"), "board": Path("b")},
            open_inspector=lambda _camera, product: FakeInspector(product),
        )
        self.control = DaemonControl(cameras, overrides=Overrides(folder), snapshots=folder)  # type: ignore[arg-type]
        self.now = 0.0
        self.replies: list[Reply] = []
        self.server = CommandServer(self.control, self._hear, clock=lambda: self.now)

    def _hear(self, data: bytes) -> None:
        self.replies.append(msgspec.json.decode(data, type=Reply))

    def ask(self, **command: Any) -> Reply:
        count = len(self.replies)
        self.now += 1.0
        self.server.receive(msgspec.json.encode({"id": f"i{count}", **command}), False)
        wait_for(lambda: len(self.replies) > count, "the server answers")
        return self.replies[-1]

    def camera(self, reply: Reply, name: str = "a") -> dict[str, Any]:
        return next(entry for entry in msgspec.json.decode(reply.answer)["cameras"] if entry["camera"] == name)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        halt = threading.Event()
        threads = [threading.Thread(target=worker.run, args=(lambda _: None, halt)) for worker in self.workers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            halt.set()
            for thread in threads:
                thread.join(20)


@contextlib.contextmanager
def office(folder: Path | None = None, *names: str) -> Iterator[Office]:
    opened = Office(folder, *names)
    with opened.server:
        yield opened


class TestDesk:
    """What it takes."""

    def test_each_command_is_done_and_answered_with_its_id(self, tmp_path: Path) -> None:
        with office(tmp_path, "a", "b") as opened:
            assert opened.camera(opened.ask(command="pause", camera="a"))["paused"]
            both = opened.ask(command="pause")
            assert opened.camera(both, "b")["paused"]
            assert not opened.camera(opened.ask(command="resume", camera="b"), "b")["paused"]
            assert opened.camera(opened.ask(command="threshold", camera="a", threshold=2.5))["threshold"] == 2.5
            back = opened.camera(opened.ask(command="threshold", camera="a", threshold=None))
            assert (back["threshold"], back["threshold_set"]) == (1.0, False)
            assert opened.camera(opened.ask(command="product", camera="a", product="board"))["product"] == "board"
            told = msgspec.json.decode(opened.ask(command="describe").answer)
            assert told["products"] == {"tile": "t", "board": "b"}
            assert [reply.id for reply in opened.replies] == [f"i{number}" for number in range(7)]
            assert all(reply.ok for reply in opened.replies)

    @pytest.mark.parametrize(
        ("command", "words", "code"),
        [
            ({"command": "pause", "camera": "c"}, "no camera 'c'; there are a, b", 2),
            ({"command": "snapshot"}, "say which camera; there are a, b", 2),
            ({"command": "threshold", "camera": "a", "threshold": -1}, "a positive number, not -1", 2),
            ({"command": "threshold", "camera": "a"}, "threshold", 8),
            ({"command": "threshold", "camera": "a", "threshold": "high"}, "threshold", 8),
            ({"command": "product", "camera": "a", "product": "cup"}, "no product 'cup'; there are tile, board", 2),
            ({"command": "golden", "camera": "a"}, "not set up for golden", 2),
            ({"command": "rollback", "product": "tile"}, "not set up for rollback", 2),
            ({"command": "explode"}, "explode", 8),
            ({"command": "pause", "camrea": "a"}, "camrea", 8),
            ({"camera": "a"}, "command", 8),
        ],
    )
    def test_what_cannot_be_done_is_answered_in_words(self, command: dict[str, Any], words: str, code: int) -> None:
        with office(None, "a", "b") as opened:
            reply = opened.ask(**command)
            assert not reply.ok
            assert words in str(reply.error)
            assert reply.exit_code == code
            assert not any(worker.is_paused for worker in opened.workers)

    @given(st.binary(max_size=200) | st.text().map(str.encode) | st.just(b"[" * 100_000))
    def test_no_bytes_do_any_harm(self, junk: bytes) -> None:
        with pytest.raises(FederationError):
            decode_command(junk)
        assert read_command_id(junk) is None or len(junk) <= MAX_COMMAND_BYTES

    def test_junk_retained_and_floods_are_counted_and_the_line_still_listens(self) -> None:
        with office() as opened:
            opened.server.receive(b'{"command": "pause", "id": "old"}', True)
            assert opened.server.refused == {"retained": 1}
            opened.server.receive(b"x" * 1_000_000, False)
            opened.server.receive(b'{"id": "known", "command": 7}', False)
            wait_for(lambda: opened.replies, "what has an id is answered")
            assert (opened.replies[0].id, opened.replies[0].ok) == ("known", False)
            for _ in range(10_000):
                opened.server.receive(b'{"command": "pause", "id": "x"', False)
            assert opened.server.refused["flood"] > 10_000 - MAX_BURST
            assert not opened.workers[0].is_paused
            opened.now += 60.0
            assert opened.camera(opened.ask(command="describe"))["camera"] == "a"

    def test_a_command_that_comes_again_is_answered_again_and_not_done_again(self) -> None:
        with office() as opened:
            opened.ask(command="pause", id="same")
            opened.ask(command="resume", id="other")
            again = opened.ask(command="pause", id="same")
            assert again.ok
            assert not opened.workers[0].is_paused

    def test_a_pause_never_waits_behind_a_camera_without_parts(self) -> None:
        with office() as opened:
            for number in range(MAX_WAITING + 2):
                opened.server.receive(msgspec.json.encode({"command": "snapshot", "id": f"s{number}"}), False)
            wait_for(lambda: opened.server.refused["busy"], "the slow clerk has too much to do")
            opened.server.receive(b'{"command": "pause", "id": "p"}', False)
            wait_for(lambda: any(reply.id == "p" and reply.ok for reply in opened.replies), "it is paused")

    def test_a_snapshot_is_kept_with_its_result(self, tmp_path: Path) -> None:
        with office(tmp_path) as opened, opened.running():
            replies = opened.replies
            opened.server.receive(b'{"command": "snapshot", "id": "s"}', False)
            while not replies:
                opened.belts["a"].put()
                threading.Event().wait(0.01)
            snapshot = msgspec.json.decode(replies[0].answer)
            assert snapshot["result"]["verdict"] == "pass"
            assert Path(snapshot["file"]).parent == tmp_path
            assert Path(snapshot["file"]).stat().st_size > 100
            opened.control.pause()
            with pytest.raises(DataError, match="paused"):
                opened.control.snapshot()
            opened.control.resume()
            with pytest.raises(DataError, match="no part came within"):
                opened.control.snapshot(timeout_s=0.01)


class TestOverrides:
    """What outlives a restart."""

    def test_they_are_kept_by_camera_and_model(self, tmp_path: Path) -> None:
        kept = Overrides(tmp_path / "state")
        kept.set_threshold("a", "m1", 2.0)
        kept.set_threshold("a", "m2", 3.0)
        kept.set_product("b", "tile")
        kept.set_threshold("a", "m1", None)
        again = Overrides(tmp_path / "state")
        assert again.get("a").thresholds == {"m2": 3.0}
        assert again.get("b").product == "tile"
        assert again.get("c").product is None

    def test_a_damaged_file_is_an_error_and_not_silence(self, tmp_path: Path) -> None:
        (tmp_path / OVERRIDES_FILE).write_bytes(b"{")
        with pytest.raises(StorageError, match="damaged"):
            Overrides(tmp_path)

    def test_a_threshold_that_cannot_be_kept_is_not_set(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        opened = Office(tmp_path / "file" / "state")
        with opened.server:
            reply = opened.ask(command="threshold", threshold=2.0)
        assert reply.exit_code == StorageError.exit_code
        assert opened.workers[0].inspector.threshold == 1.0


def line_command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["line", *map(str, arguments)])


class Daemon:
    """``edgeflame inspect`` as a service, on a broker."""

    def __init__(self, folder: Path, broker: BrokerProcess, package_file: Path) -> None:
        self.folder = folder
        self.url = broker.url
        self.config = folder / "line.toml"
        self.write("")
        self.package_file = package_file
        self.log = (folder / "log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, more: str) -> None:
        self.config.write_text(
            f'[mqtt]\nbroker = "{self.url}"\nfleet = "f"\nline = "l1"\n[retry]\nfirst_delay_s = 0.05\n{more}'
        )

    def start(self) -> None:
        command = [
            sys.executable, "-m", "edgeflame", "inspect", "--source", "boards:warm_white_grid?size=64&every=0.02",
            "--config", self.config, "--state", self.folder / "state", "--threads", "1", "--json",
            "--model", self.package_file,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log)
        wait_for(lambda: self.line("status").exit_code == 0, "the line answers")

    def line(self, *arguments: object) -> Result:
        return line_command(*arguments[:1], "l1", *arguments[1:], "--broker", self.url, "--fleet", "f", "--json")

    def camera(self, *arguments: object) -> dict[str, Any]:
        done = self.line(*arguments)
        assert done.exit_code == 0, done.output
        camera: dict[str, Any] = msgspec.json.decode(done.stdout)["cameras"][0]
        return camera

    @property
    def logged(self) -> str:
        return (self.folder / "log").read_text()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.log.close()


@pytest.fixture
def daemon(tmp_path: Path, package_file: Path) -> Iterator[Daemon]:
    with BrokerProcess("mosquitto", tmp_path) as broker:
        opened = Daemon(tmp_path, broker, package_file)
        yield opened
        opened.kill()


def vandalise(url: str, *messages: bytes, retain: bool = False) -> None:
    """Put something on the command topic."""
    up = threading.Event()

    def hear(event: ClientEvent) -> None:
        if isinstance(event, Connected):
            up.set()

    with MqttClient(
        parse_broker_url(url), client_id="vandal", filters=["edgeflame/v1/f/line/l1/reply"], sink=hear
    ) as link:
        assert up.wait(30)
        for message in messages:
            link.publish("edgeflame/v1/f/line/l1/command", message, retain=retain)


def test_commands_over_a_real_broker(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.camera("status")["threshold_set"] is False
    assert daemon.camera("pause")["paused"] is True
    refused = daemon.line("snapshot")
    assert refused.exit_code == 3
    assert "camera camera is paused: resume it first" in refused.stderr
    assert daemon.camera("resume")["paused"] is False
    snapshot = msgspec.json.decode(daemon.line("snapshot").stdout)
    assert Path(snapshot["file"]).parent == daemon.folder / "state" / "snapshots"
    own = daemon.camera("status")["threshold"]
    assert daemon.camera("threshold", 2 * own)["threshold"] == 2 * own
    assert daemon.line("product", "cup").exit_code == 2
    vandalise(daemon.url, b"", b"\xff\xfe", b"{}", b"[" * 50_000, b'{"command": "pause", "id": 7}', b"x" * 500_000)
    vandalise(daemon.url, *[b'{"command": "pause"}'] * 2000)
    wait_for(lambda: "kind=flood" in daemon.logged, "the flood is told")
    wait_for(lambda: daemon.line("status").exit_code == 0, "the line answers again")
    before = daemon.camera("status")
    assert not before["paused"]
    wait_for(lambda: daemon.camera("status")["parts"] > before["parts"], "parts are judged")
    assert daemon.stop() == 0
    gone = daemon.line("status")
    assert isinstance(gone.exception, LinkError)
    assert "line l1 is offline" in str(gone.exception)
    # The threshold outlives the restart. A retained command is as old as it may be, and is not done.
    vandalise(daemon.url, b'{"command": "pause", "id": "ghost"}', retain=True)
    daemon.start()
    again = daemon.camera("status")
    assert (again["threshold"], again["threshold_set"], again["paused"]) == (2 * own, True, False)
    wait_for(lambda: daemon.logged.count("kind=retained") >= 1, "the retained command is told")
    assert daemon.camera("threshold", "default")["threshold"] == own
    assert "Traceback" not in daemon.logged


@pytest.mark.timeout(600)
def test_a_product_is_taught_by_commands(daemon: Daemon) -> None:
    daemon.start()

    def teach(action: str, *more: str) -> dict[str, Any]:
        done = daemon.line("teach", action, "cap", *more)
        assert done.exit_code == 0, done.output
        stood: dict[str, Any] = msgspec.json.decode(done.stdout)
        return stood

    assert teach("new")["stage"] == "stopped"
    assert daemon.line("teach", "new", "cap").exit_code == 2
    assert teach("region", "--region", "4,4,56,56")["region"] == [4, 4, 56, 56]
    assert daemon.line("teach", "region", "cap", "--region", "4,4,99,99").exit_code == 2
    assert daemon.line("teach", "learn", "cap").exit_code == 3
    teach("collect")
    wait_for(lambda: teach("status")["num_parts"] >= 12, "parts are collected")
    names = [one["name"] for one in teach("stop")["photographs"]]
    assert teach("throw-out", "--photograph", names[0])["photographs"][0]["thrown_out"]
    before = daemon.camera("status")
    teach("learn")
    wait_for(lambda: teach("status")["learning"] is None, "it is learnt", timeout_s=300)
    stood = teach("status")
    assert (stood["problem"], stood["stage"]) == (None, "learnt")
    assert teach("try", "--alone")["trial"]["alone"]
    assert daemon.camera("status")["trial"] is True
    assert teach("live")["stage"] == "live"
    live = daemon.camera("status")
    assert (live["product"], live["model"] != before["model"], live["trial"]) == ("cap", True, False)
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.camera("status")["model"] == live["model"]
    teach("back")
    assert daemon.camera("status")["model"] == before["model"]
    shown = line_command("teach", "l1", "status", "cap", "--broker", daemon.url, "--fleet", "f")
    assert "l1: cap: learnt, " in shown.stdout
    assert "Traceback" not in daemon.logged


def test_the_command_line_has_every_action_of_teaching() -> None:
    assert set(line_module.ACTIONS) == set(ACTIONS) == set(get_args(TeachingAction))


def test_a_reload_changes_what_it_can_and_names_the_rest(daemon: Daemon) -> None:
    daemon.start()
    own = daemon.camera("status")["threshold"]
    daemon.write("[verdict]\nthreshold = 123.0\n[capture]\ndepth = 7\n")
    done = msgspec.json.decode(daemon.line("reload").stdout)
    assert done == {"changed": ["cameras.camera.verdict"], "needs_restart": ["cameras.camera.capture"]}
    assert daemon.camera("status")["threshold"] == 123.0
    daemon.write("[verdict]\nthreshold = -1.0\n")
    refused = daemon.line("reload")
    assert refused.exit_code == 5
    assert "verdict.threshold must be in (0, 1e12], not -1.0" in refused.stderr
    assert daemon.camera("status")["threshold"] == 123.0
    daemon.write("")
    assert daemon.line("reload").exit_code == 0
    assert daemon.camera("status")["threshold"] == own


def test_a_line_nobody_knows_and_no_broker_are_said(tmp_path: Path) -> None:
    with BrokerProcess("mosquitto", tmp_path) as broker:
        unknown = line_command("status", "l9", "--broker", broker.url, "--fleet", "f")
        assert "no line 'l9' has ever announced itself" in str(unknown.exception)
    for arguments, kind in (
        (("--broker", broker.url, "--fleet", "f", "--connect-timeout", "0.3"), LinkError),
        (("--fleet", "f"), UsageError),
        (("--broker", broker.url), UsageError),
        (("--broker", broker.url, "--fleet", "f", "x"), None),
    ):
        done = line_command("status", "l1", *arguments)
        assert isinstance(done.exception, kind or SystemExit)
    wrong = line_command("threshold", "l1", "much", "--broker", broker.url, "--fleet", "f")
    assert "expected a number, or default" in str(wrong.exception)
