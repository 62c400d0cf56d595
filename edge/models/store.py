"""Packages in the state folder: arriving, and whole.

STATE/models/<sha256>.edgeflame     taken, or being checked
STATE/models/incoming/              arriving; see :mod:`edgeflame.transfer.store`
STATE/models/shadow/<sha256>/       the report of a shadow run, and pictures of the parts it judged most differently
STATE/models/record.json            what was decided; see :mod:`edge.models.record`
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from edgeflame.statedir import fsync_folder, storage_errors
from edgeflame.transfer.store import BlobStore

FOLDER, RECORD = "models", "record.json"
PUBLISHER = "publisher"
"""Whose unfinished packages these are, in the blob store."""

_PACKAGE = re.compile(r"([0-9a-f]{64})\.edgeflame")
"""Only files named like this are ever deleted."""


class PackageStore:
    """The folder, used by one process.

    Raises:
        StorageError: here and in every method, when the disk fails.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        with storage_errors(root, "create the folder for models"):
            root.mkdir(parents=True, exist_ok=True)
        self.incoming = BlobStore(root / "incoming")

    def path(self, sha256: str) -> Path:
        """Where a package is, if it is there."""
        return self._root / f"{sha256}.edgeflame"

    def shadow_folder(self, sha256: str) -> Path:
        """For what a shadow run leaves."""
        return self._root / "shadow" / sha256

    def take(self, sha256: str) -> Path:
        """Move a package that has arrived to its place, durably; or find that it is there already."""
        path, arrived = self.path(sha256), self.incoming.path(sha256)
        with storage_errors(path, "store a package"):
            if arrived.is_file():
                arrived.replace(path)
                fsync_folder(self._root)
        return path

    def has(self, sha256: str) -> bool:
        """Whether a package is there, or has arrived."""
        return self.path(sha256).is_file() or sha256 in self.incoming

    def prune(self, keep: Collection[str], reports: Collection[str]) -> None:
        """Delete all packages but these, and all reports of shadow runs but those."""
        with storage_errors(self._root, "tidy up"):
            for path in self._root.iterdir():
                match = _PACKAGE.fullmatch(path.name)
                if match and match[1] not in keep:
                    path.unlink(missing_ok=True)
            for folder in (self._root / "shadow").glob("*"):
                if folder.name not in reports:
                    shutil.rmtree(folder, ignore_errors=True)
        self.incoming.prune(keep)

    def forget_partial(self, sha256: str) -> None:
        """Delete what has come of a package that is not wanted any more; it may not be open."""
        with contextlib.suppress(OSError):
            (self._root / "incoming" / "partial" / PUBLISHER / sha256).unlink(missing_ok=True)
