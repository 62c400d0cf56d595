"""What goes wrong with cameras, through the whole command: each ends in `unknown` with its reason, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from boards.camera import Camera
from boards.dataset import BoardStream
from cli import cli
from edge.runtimes.load import open_runtime
from edge.sources.camera import SYSTEM_PYTHON
from edgeflame.images import ImageU8, write_image
from edgeflame.package import Package, make_references, write_package
from tests.support.small_package import SIZE, good_image
from tests.support.waiting import wait_for

HIGH = ("--threshold", "1e9")
"""These tests are not about scores."""


@pytest.fixture(scope="module", autouse=True)
def _has_gstreamer() -> None:
    program = "import gi; gi.require_version('GstApp', '1.0'); from gi.repository import GstApp"
    if subprocess.run([SYSTEM_PYTHON, "-I", "-c", program], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("GStreamer's Python bindings are not installed")


def film(folder: Path, images: list[ImageU8]) -> str:
    """A live source that gives these images and ends."""
    folder.mkdir()
    for number, image in enumerate(images):
        write_image(folder / f"{number}.png", image)
    return f"gst:multifilesrc location={folder}/%d.png caps=image/png,framerate=5/1 ! pngdec"


def inspect(*arguments: object) -> list[dict[str, Any]]:
    result = CliRunner().invoke(cli, ["inspect", "--json", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return [msgspec.json.decode(line) for line in result.stdout.splitlines()]


def waiting(tmp_path: Path) -> tuple[str, Path]:
    """No frame of so short a film may be dropped."""
    config = tmp_path / "line.toml"
    config.write_text('[capture]\npolicy = "wait"\n')
    return "--config", config


def test_a_resolution_that_changes_in_mid_stream_is_unknown_until_it_is_as_before(
    package_file: Path, tmp_path: Path
) -> None:
    source = film(tmp_path / "film", [good_image(1, 96), good_image(2, 96), good_image(3, 128), good_image(4, 96)])
    parts = inspect("--model", package_file, "--source", source, "--limit", 4, *HIGH, *waiting(tmp_path))
    assert [part["verdict"] for part in parts] == ["pass", "pass", "unknown", "pass"]
    assert (parts[2]["reasons"], parts[2]["detail"]) == (["wrong_size"], "the frame has 128x128 pixels")


def test_a_camera_that_falls_back_to_grey_or_exchanges_its_channels_is_unknown(
    package: Package, tmp_path: Path
) -> None:
    boards = [
        part.image_bgr
        for part in BoardStream(
            texture="warm_wood", num_parts=4, image_size=SIZE, defect_rate=0.0, camera=Camera.for_site(1, 0)
        )
    ]
    references = np.stack(boards[:3])
    scores = open_runtime(package.model_onnx, device="cpu").score(references)
    model = tmp_path / "boards.edgeflame"
    write_package(
        model,
        manifest=package.manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        references=make_references(references, scores.maps),
    )
    good = boards[3]
    grey = np.asarray(cv2.cvtColor(cv2.cvtColor(good, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR), np.uint8)
    source = film(tmp_path / "film", [good, grey, np.ascontiguousarray(good[..., ::-1])])
    parts = inspect("--model", model, "--source", source, "--limit", 3, *HIGH, *waiting(tmp_path))
    assert [part["verdict"] for part in parts] == ["pass", "unknown", "unknown"]
    assert [part["reasons"] for part in parts] == [[], ["colour_lost"], ["colour_swapped"]]


def test_a_camera_that_is_unplugged_gives_one_unknown_and_is_found_again(package_file: Path) -> None:
    source = "gst:videotestsrc is-live=true pattern=snow ! video/x-raw,width=64,height=64,framerate=20/1"
    command = [sys.executable, "-m", "edgeflame", "inspect", "--model", package_file, "--source", source, "--json"]
    with subprocess.Popen([*command, *HIGH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None

        def next_part() -> dict[str, Any]:
            assert daemon.stdout is not None
            return msgspec.json.decode(daemon.stdout.readline())  # type: ignore[no-any-return]

        assert next_part()["verdict"] == "pass"
        os.kill(_pipeline_of(daemon.pid), signal.SIGKILL)
        while (part := next_part())["verdict"] == "pass":
            pass
        assert (part["verdict"], part["reasons"]) == ("unknown", ["unreadable"])
        assert str(part["detail"]).startswith("parts may pass unseen: gst:videotestsrc")
        assert next_part()["verdict"] == "pass"
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate()
    assert daemon.returncode == 0


def test_damaged_pictures_in_a_folder_are_unknown_and_the_others_judged(package_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        write_image(folder / name, good_image(1))
    whole = (folder / "a.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(len(whole)) + b"\xff\xd9")
    parts = inspect("--model", package_file, "--source", folder, *HIGH)
    assert [part["verdict"] for part in parts] == ["pass", "unknown", "unknown", "pass"]
    assert [part["reasons"] for part in parts[1:3]] == [["unreadable"]] * 2
    assert "cut short" in parts[1]["detail"]


def _pipeline_of(pid: int) -> int:
    """The process that runs the pipeline, two below the daemon."""
    found: list[int] = []

    def look() -> bool:
        for process in Path("/proc").iterdir():
            if process.name.isdecimal() and b"gst_child.py" in _read(process / "cmdline"):
                reader = _read(process / "stat").rpartition(b")")[2].split()[1:2]
                if reader and _read(Path("/proc", reader[0].decode(), "stat")).rpartition(b")")[2].split()[1:2] == [
                    str(pid).encode()
                ]:
                    found.append(int(process.name))
        return bool(found)

    wait_for(look, "the pipeline runs")
    return found[0]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
