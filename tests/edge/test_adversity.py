"""What a plant does to a daemon: full disks, foreign folders, wrong passwords, clocks set back. Each has one answer."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cli import cli
from edge import frame as frame_module
from edge.config.outputs import OutboxConfig, WebConfig
from edge.delivery.outbox import Outbox
from edge.result import Result
from edge.web import history as history_module
from edge.web.history import PartHistory
from edgeflame.errors import StorageError
from tests.support.brokers import BrokerProcess
from tests.support.inspection_results import inspected
from tests.support.line_daemon import daemon, judged, logged
from tests.support.small_package import write_images
from tests.support.waiting import wait_for


def shown(folder: Path) -> list[Result]:
    """Every whole line on standard output."""
    lines = (folder / "out").read_bytes().splitlines(keepends=True)
    return [msgspec.json.decode(line, type=Result) for line in lines if line.endswith(b"\n")]


def kept(state: Path) -> list[Result]:
    """Everything in an outbox, oldest first."""
    with Outbox(state / "outbox.sqlite", OutboxConfig()) as outbox:
        return [result for _, result in reversed(outbox.latest(1_000_000))]


def test_a_second_daemon_on_a_state_folder_is_refused_and_the_first_goes_on(package_file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with daemon(package_file, tmp_path, "") as first:
        wait_for(lambda: judged(tmp_path) > 5, "the first one judges")
        with daemon(package_file, second, "", state=tmp_path / "state") as other:
            assert other.wait(60) == StorageError.exit_code
        assert f"the state directory is in use by another process (pid {first.pid})" in logged(second)
        assert judged(second) == 0
        before = judged(tmp_path)
        wait_for(lambda: judged(tmp_path) > before + 5, "the first one goes on")
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
    assert len(kept(tmp_path / "state")) == judged(tmp_path)


@pytest.mark.parametrize("option", ["--state", "--images"])
def test_a_folder_that_cannot_be_made_is_one_clear_error(option: str, package_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = [
        "--model",
        package_file,
        "--source",
        write_images(tmp_path / "photos"),
        option,
        tmp_path / "file" / "x",
    ]
    with pytest.raises(StorageError, match=r"file/x: .*Not a directory") as raised:
        CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert "\n" not in str(raised.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes; skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Until not one byte more fits."""
    with contextlib.suppress(OSError), (folder / "ballast").open("ab", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def test_on_a_full_disk_pictures_go_first_and_then_it_ends_with_every_shown_result_kept(
    package_file: Path, tmp_path: Path, small_disk: Path
) -> None:
    state, rejects = small_disk / "state", small_disk / "rejects"
    everything_fails = "[verdict]\nthreshold = 1e-6\n"
    with daemon(package_file, tmp_path, everything_fails, "--images", str(rejects), state=state) as process:
        wait_for(lambda: rejects.is_dir() and len(list(rejects.glob("*.png"))) > 15, "pictures are kept")
        fill(small_disk)
        wait_for(lambda: "rejects_discarded_for_room" in logged(tmp_path), "pictures make room")
        before = judged(tmp_path)
        wait_for(lambda: judged(tmp_path) > before + 20, "results are kept in their place")
        while process.poll() is None:
            fill(small_disk)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        assert process.returncode == StorageError.exit_code
    assert "results_not_kept" in logged(tmp_path)
    assert "No space left" in logged(tmp_path) or "disk is full" in logged(tmp_path)
    (small_disk / "ballast").unlink()
    have = {(result.captured, result.sequence) for result in kept(state)}
    assert {(result.captured, result.sequence) for result in shown(tmp_path)} <= have
    # With room again it goes on where it was.
    with daemon(package_file, tmp_path, everything_fails, state=state):
        count = judged(tmp_path)
        wait_for(lambda: judged(tmp_path) > count, "it judges again")


def delivery(port: int) -> dict[str, Any]:
    """The page's word on the first destination."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/api/view")
        health: dict[str, Any] = msgspec.json.decode(connection.getresponse().read())["health"]["deliveries"][0]
        return health


def test_a_wrong_password_holds_up_nothing_but_the_delivery(package_file: Path, tmp_path: Path) -> None:
    """The line judges, results wait, the page says why; with the password set right on the broker they arrive."""
    passwords = tmp_path / "passwords"

    def set_password(word: str) -> None:
        passwords.unlink(missing_ok=True)
        subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "line", word], check=True, capture_output=True)
        # Mosquitto gives root up before it reads the file.
        passwords.chmod(0o644)
        tmp_path.chmod(0o755)

    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    set_password("other")
    user = "user root\n" if os.getuid() == 0 else ""
    lines = f"{user}allow_anonymous false\npassword_file {passwords}"
    with BrokerProcess("mosquitto", tmp_path, mosquitto_lines=lines) as broker:
        config = (
            f'[mqtt]\nbroker = "mqtt://line@127.0.0.1:{broker.port}"\nfleet = "f"\nline = "l1"\n'
            '[retry]\nfirst_delay_s = 0.05\nmax_delay_s = 0.2\n[web]\nlisten = "127.0.0.1:0"\n'
        )
        with daemon(package_file, tmp_path, config, EDGEFLAME_MQTT_PASSWORD="secret") as process:
            wait_for(lambda: "page_served" in logged(tmp_path), "the page is served")
            port = int(re.search(r"page_served address=http://127\.0\.0\.1:(\d+)", logged(tmp_path))[1])  # type: ignore[index]
            wait_for(lambda: delivery(port)["error"], "the page says why nothing is delivered")
            told = delivery(port)
            assert "Not authorized" in told["error"] or "Bad user name or password" in told["error"]
            before = judged(tmp_path)
            wait_for(lambda: judged(tmp_path) > before + 5, "the line judges")
            wait_for(lambda: delivery(port)["waiting"] > 5, "results wait")
            assert "secret" not in logged(tmp_path)
            set_password("secret")
            broker.reload()
            wait_for(lambda: delivery(port)["error"] is None, "the broker takes us")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


class BackwardsClock:
    """A wall clock that an hour is taken off at every look."""

    looks = 0

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
        cls.looks += 1
        return dt.datetime.now(tz) - dt.timedelta(hours=cls.looks)


def test_a_clock_set_back_disturbs_neither_order_nor_latency_nor_numbers(
    package_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_module, "dt", SimpleNamespace(datetime=BackwardsClock, timezone=dt.timezone))
    config = tmp_path / "line.toml"
    config.write_text("[verdict]\nthreshold = 1e-6\n[images]\nmax_count = 2\nmax_age_days = 1.0\n")
    arguments = ["inspect", "--model", package_file, "--source", write_images(tmp_path / "photos"), "--config", config]
    arguments += ["--state", tmp_path / "state", "--images", tmp_path / "rejects"]
    done = CliRunner().invoke(cli, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    results = kept(tmp_path / "state")
    assert [result.sequence for result in results] == [0, 1, 2, 3, 4]
    times = [result.captured for result in results]
    assert times == sorted(times, reverse=True), "the clock did go back"
    assert all(0 <= result.latency_ms < 60_000 for result in results)
    # The newest two stay, and not those with the latest time.
    assert sorted(path.name[:10] for path in (tmp_path / "rejects").iterdir()) == ["0000000004", "0000000005"]


def test_a_clock_set_back_keeps_the_days_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    today = {"is": "2026-03-02"}
    monkeypatch.setattr(history_module, "_today", lambda: today["is"])
    shown_board = PartHistory(WebConfig())

    def failed() -> int:
        return shown_board.view().today.failed

    shown_board.accept(inspected(0))
    today["is"] = "2026-03-01"
    shown_board.accept(inspected(1))
    assert failed() == 2
    today["is"] = "2026-03-03"
    assert failed() == 0
    shown_board.accept(inspected(2))
    assert failed() == 1
