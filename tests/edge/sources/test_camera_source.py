"""USB cameras by number and by path, what is asked of them, and what they do instead."""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import pytest

from edge.sources import camera
from edge.sources.camera import CameraSettings, CameraSource, apply_settings, camera_source
from edge.sources.locate import open_image_source
from edgeflame.errors import DataError, UsageError


class Driver:
    """As drivers are: it rounds sizes to what the sensor has, has no focus, and keeps what else it is given."""

    def __init__(self) -> None:
        self.values = {cv2.CAP_PROP_FRAME_WIDTH: 640.0, cv2.CAP_PROP_FRAME_HEIGHT: 480.0, cv2.CAP_PROP_FOCUS: 0.0}
        self.order: list[int] = []

    def set(self, key: int, value: float) -> bool:
        self.order.append(key)
        if key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT):
            largest = {cv2.CAP_PROP_FRAME_WIDTH: 1280.0, cv2.CAP_PROP_FRAME_HEIGHT: 720.0}[key]
            self.values[key] = min(value, largest)
        elif key != cv2.CAP_PROP_FOCUS:
            self.values[key] = value
        return True

    def get(self, key: int) -> float:
        value = self.values.get(key, 0.0)
        return value + 0.00003 if key == cv2.CAP_PROP_FPS else value


def test_what_was_asked_and_given_is_not_remarked_on() -> None:
    asked = CameraSettings(width=1280, height=720, fps=30, pixel_format="MJPG", exposure=156, gain=3, white_balance=0)
    driver = Driver()
    assert apply_settings(driver, asked) == []  # type: ignore[arg-type]
    assert driver.order[0] == cv2.CAP_PROP_FOURCC  # sizes and rates depend on it
    assert driver.values[cv2.CAP_PROP_AUTO_EXPOSURE] == 1  # by hand, or the exposure is ignored
    assert driver.values[cv2.CAP_PROP_AUTO_WB] == 1


def test_what_the_camera_does_otherwise_is_said_in_words() -> None:
    differences = apply_settings(Driver(), CameraSettings(width=1920, height=1080, focus=30))  # type: ignore[arg-type]
    assert differences == ["width 1280 instead of 1920", "height 720 instead of 1080", "focus 0 instead of 30"]
    other = Driver()
    other.set = lambda key, value: True  # type: ignore[assignment]
    assert apply_settings(other, CameraSettings(pixel_format="MJPG")) == ["pixel_format none instead of MJPG"]  # type: ignore[arg-type]


def test_an_address_says_what_is_asked() -> None:
    source = camera_source("camera:2?width=1280&height=960&fps=29.97&pixel_format=YUYV&exposure=auto&white_balance=0")
    assert source.name == "camera:2"
    assert source.settings == CameraSettings(
        width=1280, height=960, fps=29.97, pixel_format="YUYV", exposure=0, white_balance=0
    )
    assert camera_source("camera:0").settings == CameraSettings()
    stable = "/dev/v4l/by-id/usb-Maker_Model_0001-video-index0"
    assert camera_source(f"camera:{stable}?gain=-2").device == stable


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("camera:front", "by its number or its path"),
        ("camera:", "by its number or its path"),
        ("camera:0?width=640", "width and height belong together"),
        ("camera:0?width=640&height=0", "height lies between 1 and"),
        ("camera:0?width=64.5&height=48", "width is a whole number"),
        ("camera:0?fps=fast", "fps is a number"),
        ("camera:0?fps=nan", "fps lies between"),
        ("camera:0?pixel_format=MJPEG", "four characters"),
        ("camera:0?exposure=0", "exposure lies between"),
        ("camera:0?size=3", "unknown option size"),
        ("camera:0?gain=1&gain=2", "given twice"),
        ("camera:0?width", "bad query field"),
    ],
)
def test_addresses_that_make_no_sense(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        open_image_source(address)
    assert "it is written camera:0 or camera:/dev/v4l" in str(raised.value)


def test_a_missing_camera_is_told_with_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "usb-Other-video-index0").touch()
    monkeypatch.setattr(camera, "_BY_ID", tmp_path)
    with pytest.raises(DataError, match=rf"no such camera .*there are in {tmp_path}: usb-Other-video-index0"):
        next(CameraSource(device="/dev/v4l/by-id/usb-Mine").read(threading.Event()))


def test_what_is_no_camera_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "video0").write_bytes(b"no device")
    with pytest.raises(DataError, match="the camera cannot be opened"):
        next(CameraSource(device=str(tmp_path / "video0")).read(threading.Event()))
