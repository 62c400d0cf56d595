"""A watched folder: complete files, each once, whatever happens to them; on a real file system, by the real kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from edge.frame import Frame
from edge.sources import watched_folder
from edge.sources.locate import open_image_source
from edgeflame.errors import DataError, UsageError
from edgeflame.images import printable_name
from tests.support.small_package import bad_image, good_image
from tests.support.waiting import wait_for

PNG = cv2.imencode(".png", good_image(1))[1].tobytes()
JPEG = cv2.imencode(".jpg", good_image(1))[1].tobytes()

KERNEL_ONLY = "settle=3600&poll=3600&deadline=3600"
"""Nothing happens by itself for an hour: what comes, comes by the kernel's word."""
QUICK = "settle=0.05&poll=0.05&deadline=0.3"


class Watched:
    """A watched folder that is being read."""

    def __init__(self, folder: Path, query: str) -> None:
        self.folder = folder
        self.stop = threading.Event()
        source = open_image_source(f"watch:{folder}?{query}")
        assert not source.is_live
        assert source.is_endless
        self._frames = source.frames(self.stop)

    def next(self) -> Frame:
        return next(self._frames)

    def end(self) -> None:
        self.stop.set()
        assert list(self._frames) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture(params=["inotify", "polling"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "polling":

        def none_left() -> object:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(watched_folder, "INotify", none_left)
    return str(request.param)


def put(path: Path, data: bytes = PNG, *, mtime_s: float | None = None) -> Path:
    """As a careful writer does: beside, then into place."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    if mtime_s is not None:
        os.utime(partial, (mtime_s, mtime_s))
    partial.rename(path)
    return path


def test_files_that_lie_there_come_in_the_order_of_their_writing(folder: Path) -> None:
    for age, name in enumerate(("c.png", "a.png", "b.jpg")):
        put(folder / name, mtime_s=1_000_000 + age)
    watched = Watched(folder, "")
    frames = [watched.next() for _ in range(3)]
    assert [frame.part_id for frame in frames] == ["c.png", "a.png", "b.jpg"]
    assert frames[0].source == str(folder / "c.png")
    assert all(frame.image_bgr is not None and frame.error is None for frame in frames)
    watched.end()


def test_a_file_renamed_into_place_comes_by_the_kernels_word(folder: Path) -> None:
    put(folder / "first.png", mtime_s=1_000_000)
    watched = Watched(folder, KERNEL_ONLY)
    assert watched.next().part_id == "first.png"
    put(folder / "renamed.png")
    assert watched.next().part_id == "renamed.png"
    # Under another name of a picture before, as some writers do it.
    (folder / "~upload.png").write_bytes(PNG)
    (folder / "~upload.png").rename(folder / "moved.png")
    assert watched.next().part_id == "moved.png"
    put(folder / "last.png")
    assert watched.next().part_id == "last.png"
    watched.end()


def test_a_file_whose_time_is_set_after_it_was_closed_comes_once(folder: Path) -> None:
    watched = Watched(folder, "settle=0.3&poll=0.05")
    (folder / "copied.png").write_bytes(PNG)
    os.utime(folder / "copied.png", (1_000_000, 1_000_000))
    assert watched.next().part_id == "copied.png"
    put(folder / "last.png")
    assert watched.next().part_id == "last.png"
    watched.end()


def test_new_files_come_each_once(folder: Path, kernel: str) -> None:
    watched = Watched(folder, QUICK)
    put(folder / "a.png")
    assert watched.next().part_id == "a.png"
    put(folder / "b.jpeg", JPEG)
    assert watched.next().part_id == "b.jpeg"
    # Written anew under the same name: another part.
    put(folder / "a.png", cv2.imencode(".png", bad_image(2))[1].tobytes())
    again = watched.next()
    assert again.part_id == "a.png"
    np.testing.assert_array_equal(again.image_bgr, bad_image(2))
    put(folder / "c.png")
    assert watched.next().part_id == "c.png"
    watched.end()


@pytest.mark.parametrize("data", [PNG, JPEG])
def test_a_half_written_file_waits_until_it_is_complete(folder: Path, kernel: str, data: bytes) -> None:
    watched = Watched(folder, "settle=0.05&poll=0.05&deadline=60")
    with (folder / "slow.png").open("wb", buffering=0) as stream:
        stream.write(data[: len(data) // 2])
        for number in range(3):
            put(folder / f"{number}.png")
            assert watched.next().part_id == f"{number}.png"
        stream.write(data[len(data) // 2 :])
    slow = watched.next()
    assert slow.part_id == "slow.png"
    assert slow.image_bgr is not None
    watched.end()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("cut.png", PNG[:-20], "cut short"),
        ("cut.jpg", JPEG[: len(JPEG) // 2], "cut short"),
        ("empty.png", b"", "empty"),
        ("words.jpg", b"\xff\xd8 no picture \xff\xd9", "not an image"),
        ("cut.tif", cv2.imencode(".tif", good_image(1))[1].tobytes()[:-500], "not an image"),
        ("cut.webp", cv2.imencode(".webp", good_image(1))[1].tobytes()[:-500], "cut short"),
        ("whole.gif", b"GIF89a" + bytes(200), "GIF is not read"),
        ("cut.bmp", cv2.imencode(".bmp", good_image(1))[1].tobytes()[:-500], "cut short"),
    ],
)
def test_a_file_that_never_becomes_complete_is_a_part_with_the_reason(
    folder: Path, name: str, data: bytes, reason: str
) -> None:
    watched = Watched(folder, QUICK)
    (folder / name).write_bytes(data)
    frame = watched.next()
    assert (frame.part_id, frame.image_bgr) == (name, None)
    assert str(frame.error).startswith("not complete 0.3 s after its last change: ")
    assert reason in str(frame.error)
    # It is not told twice, and comes when it is complete after all.
    put(folder / "other.png")
    assert watched.next().part_id == "other.png"
    put(folder / name)
    assert watched.next().image_bgr is not None
    watched.end()


def test_a_file_removed_before_it_was_read_is_reported(folder: Path, kernel: str) -> None:
    watched = Watched(folder, "settle=0.05&poll=0.05&deadline=60")
    (folder / "half.png").write_bytes(PNG[:-20])
    put(folder / "a.png")
    assert watched.next().part_id == "a.png"
    (folder / "half.png").unlink()
    frame = watched.next()
    assert (frame.part_id, frame.error) == ("half.png", "the file was removed before it could be read")
    watched.end()


def test_only_the_files_asked_for_are_taken(folder: Path) -> None:
    (folder / "left").mkdir()
    for name in ("a.png", "a.txt", ".hidden.png", "left/b.png", "left/c.jpg"):
        put(folder / name, mtime_s=1_000_000)
    for query, expected in (
        ("", {"a.png", "left/b.png", "left/c.jpg"}),
        ("recursive=no", {"a.png"}),
        ("glob=*.jpg", {"left/c.jpg"}),
        ("glob=left/*.png", {"left/b.png"}),
        ("glob=a.*", {"a.png", "a.txt"}),
    ):
        watched = Watched(folder, query)
        assert {watched.next().part_id for _ in expected} == expected
        watched.end()


def test_subfolders_that_come_later_are_watched_too(folder: Path, kernel: str) -> None:
    watched = Watched(folder, "settle=0.05&poll=0.05" if kernel == "polling" else KERNEL_ONLY)
    put(folder / "a.png", mtime_s=1_000_000)
    assert watched.next().part_id == "a.png"
    (folder / "2026" / "05").mkdir(parents=True)
    put(folder / "2026" / "05" / "b.png", mtime_s=1_000_000)
    assert watched.next().part_id == "2026/05/b.png"
    put(folder / "2026" / "05" / "c.png")
    assert watched.next().part_id == "2026/05/c.png"
    watched.end()


def test_links_and_what_is_no_file(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere.png")
    (tmp_path / "other").mkdir()
    put(tmp_path / "other" / "not-followed.png")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    (folder / "folder.png").mkdir()
    (folder / "linked").symlink_to(tmp_path / "other")
    watched = Watched(folder, QUICK)
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert watched.next().part_id == "link.png"
    (folder / "nothing.png").symlink_to(tmp_path / "nowhere.png")
    frame = watched.next()
    assert frame.part_id == "nothing.png"
    assert "a link to nothing" in str(frame.error)
    put(folder / "last.png")
    assert watched.next().part_id == "last.png"
    watched.end()


def test_odd_names_are_shown_in_a_form_that_can_be_sent(folder: Path) -> None:
    names = [b"\xff\xfe.png", b"new\nline.png", b" blank .PNG", "Teil №1 ü.png".encode(), b"quote'\".png", b"-rf.png"]
    watched = Watched(folder, QUICK)
    for name in names:
        put(folder / os.fsdecode(name))
        frame = watched.next()
        assert frame.part_id == printable_name(os.fsdecode(name))
        assert frame.part_id.isprintable()
        assert frame.image_bgr is not None
        msgspec.json.encode((frame.part_id, frame.source))
    assert printable_name(os.fsdecode(names[0])) == r"\xff\xfe.png"
    assert printable_name("new\nline.png") == r"new\x0aline.png"
    watched.end()


def test_a_folder_that_goes_away_is_an_outage_and_is_found_again(folder: Path, kernel: str) -> None:
    watched = Watched(folder, QUICK)
    put(folder / "a.png")
    assert watched.next().part_id == "a.png"
    folder.rename(folder.with_name("away"))
    lost = watched.next()
    assert lost.image_bgr is None
    assert str(lost.error).startswith("parts may pass unseen: watch:")
    put(folder.with_name("away") / "b.png")
    folder.with_name("away").rename(folder)
    # What was done before is not repeated.
    assert watched.next().part_id == "b.png"
    put(folder / "c.png")
    assert watched.next().part_id == "c.png"
    watched.end()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("watch:", "the folder is missing"),
        ("watch:{}?after=burn", "after is keep, move or delete, not 'burn'"),
        ("watch:{}?recursive=maybe", "recursive is yes or no"),
        ("watch:{}?settle=0", "settle lies between"),
        ("watch:{}?poll=often", "poll is a number"),
        ("watch:{}?pattern=x", "unknown option pattern"),
    ],
)
def test_addresses_that_make_no_sense(folder: Path, address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_image_source(address.format(folder))


def test_a_folder_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"watch:.*nowhere: no such folder"):
        open_image_source(f"watch:{folder}/nowhere")


# Through the whole command.


def inspect(package_file: Path, folder: Path, *options: object, query: str = "") -> list[dict[str, object]]:
    arguments = ["inspect", "--model", str(package_file), "--source", f"watch:{folder}?{query}", "--json"]
    result = CliRunner().invoke(cli, [*arguments, *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0
    return [msgspec.json.decode(line) for line in result.stdout.splitlines()]


def fill(folder: Path, names: Iterator[str] | list[str]) -> None:
    for name in names:
        put(folder / name, mtime_s=1_000_000)


def test_with_a_state_folder_a_restart_neither_repeats_nor_skips(
    package_file: Path, folder: Path, tmp_path: Path
) -> None:
    fill(folder, ["a.png", "c.png"])
    put(folder / "b.png", b"no picture", mtime_s=1_000_000)
    state = ("--state", tmp_path / "state")
    first = inspect(package_file, folder, *state, "--limit", 2, query=QUICK)
    second = inspect(package_file, folder, *state, "--limit", 1, query=QUICK)
    assert sorted(str(part["part_id"]) for part in first + second) == ["a.png", "b.png", "c.png"]
    assert {part["part_id"]: part["reasons"] for part in first + second}["b.png"] == ["unreadable"]
    fill(folder, ["d.png"])
    assert [part["part_id"] for part in inspect(package_file, folder, *state, "--limit", 1, query=QUICK)] == ["d.png"]


def test_without_a_state_folder_what_lies_there_is_taken_for_new(package_file: Path, folder: Path) -> None:
    fill(folder, ["a.png"])
    for _ in range(2):
        assert [part["part_id"] for part in inspect(package_file, folder, "--limit", 1)] == ["a.png"]


def test_files_move_to_done_or_go_once_their_results_are_kept(package_file: Path, folder: Path, tmp_path: Path) -> None:
    fill(folder, ["a.png"])
    (folder / "left").mkdir()
    fill(folder / "left", ["b.png"])
    inspect(package_file, folder, "--state", tmp_path / "state", "--limit", 2, query="after=move")
    assert not (folder / "a.png").exists()
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == {"done/a.png", "done/left/b.png"}
    # The same name again must not overwrite the first.
    fill(folder, ["a.png"])
    inspect(package_file, folder, "--limit", 1, query="after=move")
    assert {path.name for path in (folder / "done").glob("*.png")} == {"a.png", "a-2.png"}
    fill(folder, ["c.png"])
    inspect(package_file, folder, "--limit", 1, query="after=delete")
    assert [path.name for path in folder.glob("*.png")] == []


def test_a_file_whose_result_was_kept_before_a_kill_is_moved_by_the_next_start(
    package_file: Path, folder: Path, tmp_path: Path
) -> None:
    fill(folder, ["a.png"])
    inspect(package_file, folder, "--state", tmp_path / "state", "--limit", 1)
    fill(folder, ["b.png"])
    parts = inspect(package_file, folder, "--state", tmp_path / "state", "--limit", 1, query="after=move")
    assert [part["part_id"] for part in parts] == ["b.png"]
    assert sorted(path.name for path in (folder / "done").iterdir()) == ["a.png", "b.png"]


def test_killed_at_any_moment_each_file_has_one_result(package_file: Path, folder: Path, tmp_path: Path) -> None:
    """Files arrive while the daemon is killed again and again; in the end each has exactly one result."""
    state, rng = tmp_path / "state", np.random.default_rng(5)
    command = [sys.executable, "-m", "edgeflame", "inspect", "--model", package_file, "--state", state, "--json"]
    command += ["--source", f"watch:{folder}?{QUICK}&after=move", "--threads", "1"]
    names = [f"{number:04d}.png" for number in range(160)]
    arriving = iter(names)
    for kill in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as daemon:
            assert daemon.stdout is not None
            fill(folder, [next(arriving) for _ in range(40)])
            for _ in range(int(rng.integers(1, 30))):
                daemon.stdout.readline()
            if kill < 3:
                daemon.send_signal(signal.SIGKILL)
                daemon.stdout.read()
            else:
                wait_for(lambda: results(state).keys() == set(names), "all have a result")
                daemon.send_signal(signal.SIGTERM)
                daemon.stdout.read()
    assert results(state) == Counter(names)
    assert {path.name for path in (folder / "done").iterdir()} == set(names)


def results(state: Path) -> Counter[str]:
    with contextlib.closing(sqlite3.connect(state / "outbox.sqlite")) as db:
        bodies = db.execute("SELECT body FROM results").fetchall()
    return Counter(str(msgspec.json.decode(body)["part_id"]) for (body,) in bodies)


@pytest.mark.timeout(300)
def test_a_file_that_ends_the_process_each_time_is_given_up(package_file: Path, tmp_path: Path) -> None:
    """The daemon is killed while it decodes, as for lack of memory; its supervisor starts it again."""
    large = large_png(10_000)  # as large as may be decoded, so that it takes a while
    for attempt in range(5):
        # On a busy machine the file may have been read before anybody saw that it was.
        state, folder = tmp_path / f"state{attempt}", tmp_path / f"in{attempt}"
        folder.mkdir()
        command = [sys.executable, "-m", "edgeflame", "inspect", "--model", package_file, "--state", state, "--json"]
        command += ["--source", f"watch:{folder}?{QUICK}", "--threads", "1"]
        put(folder / "a.png", mtime_s=1_000_000)
        put(folder / "big.png", large, mtime_s=1_000_001)
        put(folder / "c.png", mtime_s=1_000_002)
        if all(killed_while_reading(command, state, tries) for tries in (1, 2)):
            break
    else:
        pytest.fail("the file was always read before the process could be ended")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
        wait_for(lambda: len(results(state)) == 3, "all have a result")
        daemon.send_signal(signal.SIGTERM)
    assert results(state) == Counter(["a.png", "big.png", "c.png"])
    with contextlib.closing(sqlite3.connect(state / "outbox.sqlite")) as db:
        bodies = [msgspec.json.decode(body) for (body,) in db.execute("SELECT body FROM results")]
        assert db.execute("SELECT * FROM tried").fetchall() == []
    big = next(body for body in bodies if body["part_id"] == "big.png")
    assert (big["verdict"], big["reasons"]) == ("unknown", ["unreadable"])
    assert "2 processes ended while they read it" in big["detail"]
    # Another file under its name is another part.
    put(folder / "big.png", mtime_s=1_000_003)
    (again,) = inspect(package_file, folder, "--state", state, "--limit", 1, query=QUICK)
    assert (again["part_id"], again["verdict"]) == ("big.png", "pass")


def killed_while_reading(command: list[Any], state: Path, tries: int) -> bool:
    """Run the daemon until it reads the large file for the ``tries``-th time, and end it; False if it was too fast."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                if being_read(state) == ("big.png", tries):
                    return True
                with contextlib.suppress(sqlite3.OperationalError):
                    if "big.png" in results(state):
                        return False
                time.sleep(0.005)
        finally:
            daemon.kill()
    pytest.fail("the daemon never came to the large file")


def large_png(side: int) -> bytes:
    return cv2.imencode(".png", np.zeros((side, side), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def being_read(state: Path) -> tuple[str, int] | None:
    """The file, and how many processes have begun to read it."""
    if not (state / "outbox.sqlite").exists():
        return None
    with contextlib.closing(sqlite3.connect(state / "outbox.sqlite")) as db:
        try:
            row = db.execute("SELECT name, tries FROM tried").fetchone()
        except sqlite3.OperationalError:
            return None
    return None if row is None else (os.fsdecode(row[0]), row[1])
