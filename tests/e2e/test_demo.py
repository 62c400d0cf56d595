"""The demo from start to end, as a newcomer runs it, and what Ctrl-C leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def processes_that_mention(text: str) -> list[str]:
    """Command lines of all running processes that hold ``text``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if text in command and int(entry.parent.name) != os.getpid():
            found.append(command)
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgeflame", "demo", "--quick", *arguments]


def test_demo_shows_the_whole_way(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = subprocess.run(demo("--out", str(out)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    assert re.search(r"site-1 +5 +\d\.\d{3} +\d\.\d{3} +\d+ of 20 +\d+ of 20 ", result.stdout)
    assert max(map(len, result.stdout.splitlines()[:9])) <= 100
    assert re.search(r"^Joining (brought|cost)", result.stdout, re.MULTILINE)
    results = msgspec.json.decode((out / "results.json").read_bytes())
    assert [site["site"] for site in results] == ["site-1", "site-2", "site-3"]
    for site in results:
        for condition in ("alone", "together"):
            assert site["metrics"][condition]["image_AUROC"] > 0.75
            assert site["metrics"][condition]["pixel_AUROC"] > 0.75
        parts = site["inspected"]
        assert len(parts) == 20
        assert {part["verdict"] for part in parts} == {"pass", "fail"}
        right = sum((part["label"] == "good") == (part["verdict"] == "pass") for part in parts)
        assert right >= 14

    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 20
    assert not re.search(r"""(src|href)=["']?(https?:|//|/|[a-z]+/)""", page), "the report must be self-contained"
    for site in ("site-1", "site-2", "site-3"):
        assert (out / "models" / f"{site}.edgeflame").stat().st_size > 1e6
        assert (out / "models" / f"{site}.onnx").stat().st_size > 1e6
    assert (out / "heat-maps.png").is_file()
    assert processes_that_mention(str(out)) == []


def test_interrupt_stops_everything_the_demo_started(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(demo("--out", str(out)), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(
            lambda: len([line for line in processes_that_mention(str(out)) if " train " in line]) >= 3,
            60,
            "the three training sites",
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    wait_for(lambda: processes_that_mention(str(out)) == [], 15, "all children to be gone")


def test_a_killed_demo_takes_its_children_along(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(demo("--out", str(out)), stderr=subprocess.DEVNULL)
    wait_for(lambda: any(" train " in line for line in processes_that_mention(str(out))), 60, "a training site")
    process.kill()
    process.wait()
    wait_for(lambda: processes_that_mention(str(out)) == [], 20, "all children to be gone")


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("keep me")
    result = subprocess.run(demo("--out", str(tmp_path)), capture_output=True, text=True)
    assert result.returncode == 10
    assert result.stderr.count("\n") == 1
    assert "not made by a demo" in result.stderr
    assert precious.read_text() == "keep me"


def test_unknown_texture_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        demo("--out", str(tmp_path / "demo"), "--texture", "plasma"), capture_output=True, text=True
    )
    assert result.returncode in {2, 3}
    assert "plasma" in result.stderr
    assert "warm_wood" in result.stderr
    assert "Traceback" not in result.stderr
