"""The store of marks: what holds, what a kill, a full disk or two at once do to it, and ten thousand of them."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeflame.errors import StorageError, UsageError
from edgeflame.images import read_image
from edgeflame.mark_shapes import Brush, Polygon, outlines, paint
from edgeflame.marks import LINES_FILE, Mark, MarkStore
from edgeflame.state import without_checksum


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def said(store: MarkStore) -> list[tuple[str, str, str | None]]:
    return [(mark.name, mark.was, mark.kind) for mark in store.marks()]


def test_the_last_word_holds_and_can_be_taken_back(tmp_path: Path) -> None:
    store = MarkStore(tmp_path / "marks")
    assert store.marks() == []
    store.add("a", picture(1), "bad", kind="dent", by="Kim", where=[Polygon(points=((1, 1), (9, 1), (9, 9)))])
    store.add("b", picture(2), "good")
    store.correct("a", was="good")
    assert said(store) == [("a", "good", None), ("b", "good", None)]
    assert sorted(path.name for path in (tmp_path / "marks" / "good").iterdir()) == ["a.png", "b.png"]
    assert list((tmp_path / "marks" / "bad").iterdir()) == []
    assert (read_image(tmp_path / "marks" / "good" / "a.png") == picture(1)).all()
    back = store.undo("a")
    assert back is not None
    assert (back.was, back.kind, len(back.where)) == ("bad", "dent", 1)
    assert store.undo("a") is None
    assert said(MarkStore(tmp_path / "marks")) == [("b", "good", None)]
    with pytest.raises(UsageError, match="no mark 'a'"):
        store.undo("a")


def test_lines_of_earlier_versions_are_read_and_damaged_ones_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = MarkStore(tmp_path)
    store.add("a", picture(1), "bad")
    with (tmp_path / LINES_FILE).open("ab") as lines:
        lines.write(b'{"was":"good","marked":"2026-01-02T03:04:05Z","file":"good/old.png","result":{"part_id":"p"}}\n')
        lines.write(b"{damaged}\n\xff\n")
        lines.write(b'{"was":"good","marked":"2026-01-02T03:04:05Z","file":"../../etc/passwd"}\n')
        lines.write(b'{"was":"good","marked":"2026-01-02T03:04:')  # a kill
    (tmp_path / "good" / "old.png").write_bytes((tmp_path / "bad" / "a.png").read_bytes())
    fresh = MarkStore(tmp_path)
    assert said(fresh) == [("a", "bad", None), ("old", "good", None)]
    assert fresh.marks()[1].judged.part_id == "p"
    assert [record.message for record in caplog.records].count("mark_unreadable") == 3
    fresh.add("b", picture(2), "good")
    assert [name for name, _, _ in said(MarkStore(tmp_path))] == ["a", "old", "b"]


def test_too_many_are_refused_and_none_is_deleted(tmp_path: Path) -> None:
    store = MarkStore(tmp_path, max_marks=2)
    for name in ("a", "b"):
        store.add(name, picture(1), "good")
    with pytest.raises(StorageError, match=r"2 marked parts are kept.*take good/ and bad/ away"):
        store.add("c", picture(3), "good")
    store.add("b", picture(1), "bad")  # a second thought is no new mark
    assert said(store) == [("a", "good", None), ("b", "bad", None)]
    (tmp_path / "good").rename(tmp_path / "taken")
    store.add("c", picture(3), "good")
    assert said(store) == [("b", "bad", None), ("c", "good", None)]


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    def work(who: int) -> None:
        store = MarkStore(tmp_path)
        for number in range(20):
            store.add(f"{who}-{number}", picture(number), "bad" if number % 2 else "good")
            store.add("same", picture(number), "bad" if who else "good")

    threads = [threading.Thread(target=work, args=(who,)) for who in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    marks = MarkStore(tmp_path).marks()
    assert len(marks) == 41
    assert len(list(tmp_path.glob("*/same.png"))) == 1
    lines = (tmp_path / LINES_FILE).read_bytes().splitlines()
    assert len(lines) == 80
    assert all(msgspec.json.decode(line, type=Mark) for line in lines)


def test_ten_thousand_marks_are_read_and_added_to_in_no_time(tmp_path: Path) -> None:
    store = MarkStore(tmp_path, max_marks=20_000)
    store.add("first", picture(1), "bad")
    row = without_checksum((tmp_path / LINES_FILE).read_bytes())
    assert row is not None
    row += b"\n"
    with (tmp_path / LINES_FILE).open("ab") as lines:
        for number in range(10_000):
            lines.write(row.replace(b"first", b"m%05d" % number))
            (tmp_path / "bad" / f"m{number:05d}.png").touch()
    started = time.monotonic()
    assert len(store.marks()) == 10_001
    store.add("last", picture(2), "good")
    assert store.counts().bad == 10_001
    assert time.monotonic() - started < 20  # half a second at rest


_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from edgeflame.errors import StorageError
from edgeflame.marks import MarkStore
store = MarkStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    store.add("b", np.zeros((8, 8, 3), np.uint8), "good", by="x" * 90)
except StorageError as exc:
    print(exc)
    sys.exit(0)
sys.exit("it was kept")
"""


def test_a_full_disk_loses_the_new_mark_and_nothing_else(tmp_path: Path) -> None:
    store = MarkStore(tmp_path)
    store.add("a", np.zeros((8, 8, 3), np.uint8), "bad", by="y" * 90)
    before = (tmp_path / LINES_FILE).read_bytes()
    # The picture fits, its line does not any more.
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path), str(len(before) + 40)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "cannot keep the mark" in done.stdout
    assert (tmp_path / LINES_FILE).read_bytes() == before
    assert said(MarkStore(tmp_path)) == [("a", "bad", None)]
    assert not (tmp_path / "good" / "b.png").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert signal.getsignal(signal.SIGXFSZ) is not None


@pytest.mark.parametrize("kind", ["good", "Bad", "", "../up", "a" * 41, "-x"])
def test_a_kind_names_a_folder(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError):
        MarkStore(tmp_path).add("a", picture(1), "bad", kind=kind)
    assert not (tmp_path / LINES_FILE).exists()


def test_shapes_make_masks_and_masks_make_shapes() -> None:
    shapes = [Polygon(points=((10, 10), (40, 10), (40, 30), (10, 30))), Brush(points=((70, 70), (90, 70)), radius=5)]
    mask = paint(shapes, height=100, width=120)
    assert mask[20, 20] == mask[70, 80] == mask[74, 70] == 255
    assert mask[50, 50] == mask[80, 80] == 0
    again = paint(outlines(mask), height=100, width=120)
    assert (again != mask).mean() < 0.001
    assert paint([Brush(points=((500, 500),), radius=3)], height=10, width=10).sum() == 0


def test_no_mark_that_was_changed_on_the_disk_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MarkStore(tmp_path)
    store.add("a", picture(1), "bad", kind="dent", by="Kim", where=[Polygon(points=((1, 1), (9, 1), (9, 9)))])
    held = store.marks()
    whole = (tmp_path / LINES_FILE).read_bytes()
    for place in range(len(whole) - 1):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (tmp_path / LINES_FILE).write_bytes(changed)
            assert MarkStore(tmp_path).marks() in ([], held)
    (tmp_path / LINES_FILE).write_bytes(whole.replace(b"dent", b"bent"))
    caplog.clear()
    assert MarkStore(tmp_path).marks() == []
    assert [record.getMessage() for record in caplog.records][:2] == ["mark_unreadable", "pictures_without_a_mark"]


def test_marks_whose_lines_are_gone_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MarkStore(tmp_path)
    for name in "ab":
        store.add(name, picture(1), "bad")
    (tmp_path / LINES_FILE).write_bytes(b"")
    again = MarkStore(tmp_path)
    caplog.clear()
    for _ in range(3):
        assert again.marks() == []
    (told,) = caplog.records
    assert told.getMessage() == "pictures_without_a_mark"
    assert told.fields["count"] == 2  # type: ignore[attr-defined]
