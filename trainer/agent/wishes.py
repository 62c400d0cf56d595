"""What the site's operator wants of it: two small files in the state directory, written by ``edgeflame site``.

STATE/pause.json    while it is there, the site rests
STATE/leave.json    the site is to leave its run for good; deleted when it has

They stand whether the site's process runs or not, and survive its restarts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edgeflame.errors import StorageError
from edgeflame.messages import Text
from edgeflame.statedir import storage_errors, write_durably

T = TypeVar("T", bound="Pause | Departure")


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rest. ``release`` ends the worker process, so that its memory is free too; its task begins again afterwards,
    with the same result. Otherwise it is stopped where it is, and goes on from there.
    """

    reason: Text
    release: bool = False


class Departure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Leave the run for good."""

    reason: Text


class Wishes:
    """The wishes of a state directory.

    Raises:
        StorageError: here and in every method, when the disk fails or a file is damaged.
    """

    def __init__(self, state_dir: Path) -> None:
        self._pause = state_dir / "pause.json"
        self._leave = state_dir / "leave.json"

    @property
    def pause(self) -> Pause | None:
        return _read(self._pause, Pause)

    @property
    def departure(self) -> Departure | None:
        return _read(self._leave, Departure)

    def rest(self, pause: Pause) -> None:
        """Have the site rest."""
        write_durably(self._pause, msgspec.json.encode(pause))

    def go_on(self) -> bool:
        """Have it go on; whether it was at rest."""
        return _remove(self._pause)

    def leave(self, departure: Departure) -> None:
        """Have it leave its run."""
        write_durably(self._leave, msgspec.json.encode(departure))

    def left(self) -> None:
        """It has left."""
        _remove(self._leave)


def _remove(path: Path) -> bool:
    with storage_errors(path, "remove"):
        was_there = path.exists()
        path.unlink(missing_ok=True)
    return was_there


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
        msg = f"{path}: damaged ({exc}); remove it, or say again what it is to say with 'edgeflame site'"
        raise StorageError(msg) from exc
