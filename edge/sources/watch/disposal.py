"""What becomes of a file once its result is kept: it stays, it moves to ``done/``, or it is deleted. A sink."""

from __future__ import annotations

from pathlib import Path
from typing import final

from edge.results import Inspected
from edge.sources.interface import FileOrigin
from edgeflame.console import EventLog

log = EventLog("watch")

DONE_FOLDER = "done"
"""In the watched folder; never looked into."""


@final
class Disposal:
    """Stands last among the sinks: what is moved or deleted has its result everywhere else."""

    def accept(self, inspected: Inspected) -> None:
        if inspected.origin is not None:
            dispose(inspected.origin)

    def close(self) -> None:
        """Nothing to close."""


def dispose(origin: FileOrigin) -> None:
    """Move or delete a file, as it was asked for, unless it has been written anew since.

    A file that cannot be moved or deleted stays, is not inspected again, and is named in the log.
    """
    if origin.after == "keep":
        return
    path = Path(origin.folder, origin.name)
    try:
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (origin.size, origin.mtime_ns):
            return
        if origin.after == "delete":
            path.unlink()
            return
        target = Path(origin.folder, DONE_FOLDER, origin.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(_free(target))
    except FileNotFoundError:
        return
    except OSError as exc:
        log.error("file_stays", path=str(path), wanted=origin.after, reason=exc.strerror)


def _free(target: Path) -> Path:
    """The name itself, or with a number where a file has it already."""
    free, number = target, 1
    while free.exists():
        number += 1
        free = target.with_name(f"{target.stem}-{number}{target.suffix}")
    return free
