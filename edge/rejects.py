"""Pictures of the parts that were not passed, the newest so many of them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from edge.overlay import overlay
from edge.results import Inspected
from edgeflame.console import EventLog
from edgeflame.errors import ConfigError, StorageError
from edgeflame.images import shrink, write_image

log = EventLog("rejects")

MAX_SIDE = 1024
"""Larger pictures are shrunk to this: evidence for people, a hundred kilobytes each and not many megabytes."""

_OURS = re.compile(r"\d{8}T\d{12}Z-\d{8}-.*-(fail|unknown)\.png")
"""Only files named like this are ever deleted."""


class RejectsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[rejects]``."""

    keep: int = 1000
    """Pictures kept; the oldest go first."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            msg = f"rejects.keep must be at least 1, not {self.keep}"
            raise ConfigError(msg)


class RejectsSink:
    """Stores failed and unknown parts as PNG with their heat map.

    Evidence is not the result: when a picture cannot be stored the line goes on, and the loss is logged and
    counted.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, config: RejectsConfig) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stored = sorted(path.name for path in folder.iterdir() if _OURS.fullmatch(path.name))
        except OSError as exc:
            msg = f"{folder}: cannot be used for rejected images ({exc.strerror})"
            raise StorageError(msg) from exc
        self._folder = folder
        self._keep = config.keep
        self.num_lost = 0

    def accept(self, inspected: Inspected) -> None:
        result, image = inspected.result, inspected.image
        if result.verdict == "pass" or image is None:
            return
        picture = shrink(image, MAX_SIDE)
        if inspected.anomaly_map is not None:
            picture = overlay(picture, inspected.anomaly_map, result.threshold)
        part = re.sub(r"[^A-Za-z0-9_.]+", "_", result.part_id)[-60:]
        name = f"{result.captured:%Y%m%dT%H%M%S%f}Z-{result.sequence:08d}-{part}-{result.verdict}.png"
        try:
            write_image(self._folder / name, picture)
            self._stored.append(name)
            while len(self._stored) > self._keep:
                (self._folder / self._stored.pop(0)).unlink(missing_ok=True)
        except (StorageError, OSError) as exc:
            self.num_lost += 1
            log.error("reject_not_stored", part=result.part_id, reason=str(exc))

    def discard_oldest(self, count: int = 20) -> bool:
        """Make room on a full disk: pictures are worth less than results. Whether there was one to give."""
        oldest, self._stored = self._stored[:count], self._stored[count:]
        for name in oldest:
            (self._folder / name).unlink(missing_ok=True)
        if oldest:
            self.num_lost += len(oldest)
            log.error("rejects_discarded_for_room", count=len(oldest))
        return bool(oldest)

    def close(self) -> None:
        pass
