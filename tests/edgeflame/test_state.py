"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from edgeflame.errors import StorageError
from edgeflame.state import atomic_copy, atomic_write, atomic_writer, link_or_copy, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    def write_half() -> None:
        with atomic_writer(path) as stream:
            stream.write(b"half")
            raise error

    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", no_space)
    atomic_write(path, b"old", durable=False)
    with pytest.raises(StorageError, match=r"file: cannot write .No space left on device"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_only_what_is_durable_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "file", b"data", durable=durable)
    assert synced == (["file", "folder"] if durable else [])


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with atomic_writer(path, mode=0o600) as stream:
        assert stat.S_IMODE(os.fstat(stream.fileno()).st_mode) == 0o600
        stream.write(b"secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_threads_that_write_the_same_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(letter: bytes) -> None:
        for _ in range(20):
            atomic_write(path, letter * 100_000, durable=False)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(path.read_bytes())) == 1
    assert names(tmp_path) == ["file"]


def test_copies_and_links(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    atomic_copy(source, tmp_path / "copy")
    link_or_copy(source, tmp_path / "link")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "link").read_bytes() == b"data"
    with pytest.raises(StorageError, match="missing: cannot read"):
        atomic_copy(tmp_path / "missing", tmp_path / "copy")
    assert names(tmp_path) == ["copy", "link", "source"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert read_json(path, dict, advice="") is None
    write_json(path, {"a": 1})
    assert path.read_bytes() == b'{"a":1}'
    write_json(path, {"a": 1}, indent=1)
    assert path.read_bytes() == b'{\n "a": 1\n}\n'
    assert read_json(path, dict[str, int], advice="") == {"a": 1}
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(StorageError, match=r"damaged .*; delete it"):
        read_json(path, dict, advice="delete it")
