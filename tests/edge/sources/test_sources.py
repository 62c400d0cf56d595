"""Sources: order, labels, unreadable images, and addresses that make no sense."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from boards.camera import Camera
from boards.dataset import BoardStream
from cli import cli
from edge.frame import Frame
from edge.sources.boards import BoardSource
from edge.sources.locate import open_image_source
from edgeflame.errors import DataError, EdgeFlameError, UsageError
from tests.support.small_package import good_image, write_images


def read(address: str | Path) -> list[Frame]:
    return list(open_image_source(str(address)).frames(threading.Event()))


def test_a_folder_gives_every_image_once_sorted_with_the_truth(tmp_path: Path) -> None:
    frames = read(write_images(tmp_path / "test"))
    assert [frame.part_id for frame in frames] == ["good/0.png", "good/1.png", "good/2.png", "hole/0.png", "hole/1.png"]
    assert [frame.label for frame in frames] == ["good"] * 3 + ["hole"] * 2
    assert frames[0].source == str(tmp_path / "test" / "good" / "0.png")


def test_one_class_of_a_test_folder_has_its_label(tmp_path: Path) -> None:
    assert {frame.label for frame in read(write_images(tmp_path / "test") / "hole")} == {"hole"}


def test_other_folders_say_nothing_about_the_truth(tmp_path: Path) -> None:
    assert {frame.label for frame in read(write_images(tmp_path / "photos") / "hole")} == {None}


def test_an_unreadable_image_is_a_frame_with_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos")
    (folder / "good" / "1.png").write_bytes(b"no image")
    frames = read(folder)
    assert len(frames) == 5
    assert frames[1].image_bgr is None
    assert "1.png" in (frames[1].error or "")
    assert all(frame.image_bgr is not None for index, frame in enumerate(frames) if index != 1)


def test_grey_and_deep_images_come_as_bgr(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), good_image(0)[..., 0])
    cv2.imwrite(str(tmp_path / "deep.png"), good_image(0).astype(np.uint16) * 257)
    for frame in read(tmp_path):
        assert frame.image_bgr is not None
        assert frame.image_bgr.shape == (64, 64, 3)
        assert frame.image_bgr.dtype == np.uint8


def test_a_single_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos")
    (frame,) = read(folder / "hole" / "0.png")
    assert frame.image_bgr is not None
    assert frame.image_bgr.shape == (96, 96, 3)


def test_generated_boards_are_those_of_the_stream() -> None:
    frames = read("boards:warm_wood?seed=4&defect_rate=0.5&parts=5&site=2&size=64")
    parts = list(
        BoardStream(
            texture="warm_wood", seed=4, camera=Camera.for_site(2, 4), defect_rate=0.5, num_parts=5, image_size=64
        )
    )
    assert [frame.label for frame in frames] == [part.label for part in parts]
    for frame, part in zip(frames, parts, strict=True):
        np.testing.assert_array_equal(frame.image_bgr, part.image_bgr)
        np.testing.assert_array_equal(frame.mask, part.mask)


def test_a_pause_between_generated_boards_ends_with_the_run() -> None:
    stop = threading.Event()
    frames = open_image_source("boards:warm_wood?size=64&every=3600").frames(stop)
    assert next(frames).part_id == "part-000000"
    threading.Timer(0.05, stop.set).start()
    assert list(frames) == []


def test_generated_boards_are_of_the_data_set_s_camera(tmp_path: Path) -> None:
    """What is fitted to ``demo-data --seed 3`` sees no other camera in ``boards:...?seed=3&site=1``."""
    arguments = ["demo-data", "--out", str(tmp_path), "--parts", "2", "--size", "64", "--seed", "3"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    camera = json.loads((tmp_path / "dataset.json").read_text())["spec"]["camera"]
    source = open_image_source("boards:warm_wood?seed=3&site=1")
    assert isinstance(source, BoardSource)
    assert dataclasses.asdict(source.stream.camera) == camera


def test_a_whole_data_set_is_not_taken_for_parts(tmp_path: Path) -> None:
    write_images(tmp_path / "test")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"give .*test"):
        open_image_source(str(tmp_path))


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("nowhere", DataError, "no such folder or file"),
        ("empty", DataError, "no images found"),
        ("words.txt", DataError, "neither an image nor a video"),
        ("http://user:secret@host/x", UsageError, "of URLs only rtsp"),
        ("camera:front", UsageError, "camera:0"),
        ("boards:gold", UsageError, "warm_wood"),
        ("boards:warm_wood?parts=many", UsageError, "is written boards:"),
        ("boards:warm_wood?colour=red", UsageError, "unknown option colour"),
        ("boards:warm_wood?size=9", UsageError, "size"),
        ("boards:warm_wood?defect_rate=2", UsageError, "defect_rate"),
        ("boards:warm_wood?every=-1", UsageError, "every lies between 0 and 3600, not -1"),
        ("boards:warm_wood?every=nan", UsageError, "every lies between"),
    ],
)
def test_addresses_that_make_no_sense(
    address: str, kind: type[EdgeFlameError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(kind, match=message) as raised:
        open_image_source(address)
    assert "secret" not in str(raised.value)


def test_a_camera_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(DataError, match="no such camera"):
        next(iter(open_image_source("camera:63").frames(threading.Event())))


@pytest.mark.parametrize(("below", "names"), [("", ("Train", "Test")), ("bottle", ("ground_truth", "test"))])
def test_a_whole_data_set_is_not_a_folder_of_parts(tmp_path: Path, below: str, names: tuple[str, str]) -> None:
    root = tmp_path / below
    write_images(root / names[0])
    write_images(root / names[1])
    with pytest.raises(DataError, match=f"to inspect its test images give {root / names[1]}"):
        read(tmp_path)


def test_good_parts_have_one_label_however_their_folder_is_written(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "Test")
    (folder / "good").rename(folder / "OK")
    assert [frame.label for frame in read(folder)] == ["good"] * 3 + ["hole"] * 2
    assert {frame.label for frame in read(folder / "OK")} == {"good"}
    assert {frame.label for frame in read(folder / "hole")} == {"hole"}


def test_pictures_of_formats_that_are_not_read_are_parts_that_say_so(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos") / "good"
    Image.fromarray(good_image(0)).save(folder / "a.gif")
    cv2.imwrite(str(folder / "b.JP2"), good_image(0))
    cv2.imwrite(str(folder / "c.avif"), good_image(0))
    cv2.imwrite(str(folder / "d.pgm"), good_image(0)[..., 0])
    # Another name of a format that is read.
    (folder / "0.png").rename(folder / "e.jfif")
    (folder / "notes.txt").write_text("no picture")
    frames = {frame.part_id: frame for frame in read(folder)}
    assert set(frames) == {"a.gif", "b.JP2", "c.avif", "d.pgm", "e.jfif", "1.png", "2.png"}
    for name, kind in (("a.gif", "GIF"), ("b.JP2", "JPEG 2000"), ("c.avif", "AVIF"), ("d.pgm", "PNM")):
        assert frames[name].image_bgr is None
        assert f"{kind} is not read" in (frames[name].error or "")
    assert frames["e.jfif"].image_bgr is not None
