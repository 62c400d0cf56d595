"""Sinks for results on this machine: standard output for programs or for people, a file, pictures of rejected parts.

Pictures
--------
Pictures of the parts that were not passed are bounded by their number, their size and their age.

The folder is listed once at the start; after that, the sink follows what it writes and deletes itself. "The oldest"
pictures are those written first, by the number their names begin with: if the clock is set back, later pictures have
an earlier time and are nevertheless not the first to go.
"""

from __future__ import annotations

import collections
import datetime as dt
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from edge.config.outputs import ImagesConfig
from edge.overlay import draw_overlay
from edge.result import Inspected, Result, json_line
from edge.status import DEFAULT_CAMERA
from edgeflame.errors import StorageError
from edgeflame.images import shrink, write_image
from edgeflame.log import EventLog, printable

if TYPE_CHECKING:
    from rich.console import Console


_COLOURS = {"pass": "green", "fail": "bold red", "unknown": "bold yellow"}


class Sink(Protocol):
    """Takes every result, in order."""

    def accept(self, inspected: Inspected) -> None:
        """Take one result.

        Raises:
            StorageError: it cannot be kept; the run ends rather than lose results.
        """
        ...

    def close(self) -> None: ...


class FilteredSink:
    """Hands on the results that fulfil a condition to another sink."""

    def __init__(self, sink: Sink, condition: Callable[[Result], bool]) -> None:
        self._sink = sink
        self._condition = condition

    def accept(self, inspected: Inspected) -> None:
        if self._condition(inspected.result):
            self._sink.accept(inspected)

    def close(self) -> None:
        self._sink.close()


def of_camera(sink: Sink, camera: str) -> Sink:
    """A sink that hands on the results of one camera."""
    return FilteredSink(sink, lambda result: result.camera == camera)


def of_production(sink: Sink) -> Sink:
    """A sink that hands on all results but those of golden parts."""
    return FilteredSink(sink, lambda result: not result.golden)


class LockedSinks:
    """Hands results of several threads on to sinks that are not thread-safe, one at a time."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._lock = threading.Lock()

    def accept(self, inspected: Inspected) -> None:
        with self._lock:
            for sink in self._sinks:
                sink.accept(inspected)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLinesSink:
    """JSON lines on standard output, each flushed at once."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout

    def accept(self, inspected: Inspected) -> None:
        self._stream.write(json_line(inspected.result).decode())
        self._stream.flush()

    def close(self) -> None:
        pass


class ResultsFileSink:
    """JSON lines appended to a file, each handed to the operating system at once.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab", buffering=0)
        except OSError as exc:
            raise self._failed(exc) from exc

    def accept(self, inspected: Inspected) -> None:
        try:
            self._stream.write(json_line(inspected.result))
        except OSError as exc:
            raise self._failed(exc) from exc

    def close(self) -> None:
        self._stream.close()

    def _failed(self, exc: OSError) -> StorageError:
        return StorageError(f"{self._path}: results cannot be written ({exc.strerror})")


class ConsoleSink:
    """One coloured line for each part on the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def accept(self, inspected: Inspected) -> None:
        from rich.text import Text

        result = inspected.result
        line = Text()
        line.append(f" {result.verdict:^7} ", style=f"reverse {_COLOURS[result.verdict]}")
        ratio = "    –   " if result.ratio is None else f"{result.ratio:6.2f} ×"
        line.append(f" {ratio}  {result.latency_ms:6.1f} ms  {printable(result.part_id)}")
        if result.label is not None:
            wrong = result.is_right is False
            line.append(f"  ({result.label}{', wrong' if wrong else ''})", style="red" if wrong else "dim")
        if result.camera not in ("", DEFAULT_CAMERA):
            line.append(f"  {result.camera}", style="dim")
        notes = [reason for reason in result.reasons if reason != "above_threshold"]
        if notes:
            line.append(f"  {', '.join(notes)}", style="yellow")
        if result.detail:
            line.append(f": {printable(result.detail)}", style="dim")
        self._console.print(line, soft_wrap=True, highlight=False)

    def close(self) -> None:
        pass


log = EventLog("rejects")

MAX_SIDE = 1024
"""Longest side of a picture, pixels; larger ones are shrunk. A picture takes a megabyte or two."""

_OURS = re.compile(
    r"\.?(?:(?P<number>\d{10})-)?(?P<time>\d{8}T\d{12})Z-.*-(?:fail|unknown)\.png(?P<partial>(?:\.\d+)?\.partial)?",
    re.ASCII,
)
"""Only files named like this are ever deleted. Those of earlier versions have no number, and their
unfinished ones do not begin with a dot."""


_NUMBER = re.compile(r"^\d{10}-", re.ASCII)


def _name_of(result: Result) -> str:
    """A picture's file name after its number."""
    taken = result.captured.astimezone(dt.timezone.utc)
    return f"{taken:%Y%m%dT%H%M%S%f}Z-{result.part_file_name}-{result.verdict}.png"


@dataclass(frozen=True, kw_only=True)
class _Picture:
    name: str
    num_bytes: int
    taken: dt.datetime


class _Folder:
    """The pictures in the folder in the order of writing, and whether they exceed the bounds."""

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self._pictures: collections.deque[_Picture] = collections.deque()
        self._bytes = 0
        self.by_part: dict[str, str] = {}
        """File names by what they hold after their number."""

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, picture: _Picture) -> None:
        self._pictures.append(picture)
        self._bytes += picture.num_bytes
        self.by_part[_NUMBER.sub("", picture.name)] = picture.name

    def pop_oldest(self) -> _Picture:
        picture = self._pictures.popleft()
        self._bytes -= picture.num_bytes
        self.by_part.pop(_NUMBER.sub("", picture.name), None)
        return picture

    def has_surplus(self, now: dt.datetime) -> bool:
        """Whether the oldest has to go. The newest stays even if it alone exceeds ``max_mib``."""
        if not self._pictures:
            return False
        config, age = self.config, now - self._pictures[0].taken
        if config.max_age_days is not None and age > dt.timedelta(days=config.max_age_days):
            return True
        return len(self._pictures) > config.max_count or (
            len(self._pictures) > 1 and self._bytes > config.max_mib * (1 << 20)
        )


class RejectsSink:
    """Stores failed and unknown parts as PNG with their heat map; safe for any thread.

    When a picture cannot be stored the inspection goes on, and the loss is logged and counted.

    Args:
        folder: created if it does not exist.
        config: the bounds.
        now: returns the time, UTC.

    Raises:
        StorageError: the folder cannot be created or read.
    """

    def __init__(
        self,
        folder: Path,
        config: ImagesConfig,
        *,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.timezone.utc),
    ) -> None:
        self._folder = folder
        self._now = now
        self._lock = threading.Lock()
        self._kept = _Folder(config)
        self.num_lost = 0
        """Pictures that could not be stored, or had to make room for results."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._next_number = self._read_folder()
        except OSError as exc:
            raise StorageError(f"{folder}: cannot be used for rejected images ({exc.strerror})") from exc
        with self._lock:
            self._drop_surplus()

    def accept(self, inspected: Inspected) -> None:
        """Store the picture of a part that was not passed; after any part, delete what exceeds the bounds."""
        result, image = inspected.result, inspected.image
        with self._lock:
            if result.verdict != "pass" and image is not None:
                try:
                    self._store(inspected)
                except (StorageError, OSError) as exc:
                    self.num_lost += 1
                    log.error("reject_not_stored", part=result.part_id, reason=str(exc))
            self._drop_surplus()

    def find(self, result: Result) -> Path | None:
        """The file with a part's picture; None if there is none, or it has made room for others."""
        with self._lock:
            name = self._kept.by_part.get(_name_of(result))
        return None if name is None else self._folder / name

    def reconfigure(self, config: ImagesConfig) -> None:
        """Change the bounds, and delete what exceeds them."""
        with self._lock:
            self._kept.config = config
            self._drop_surplus()

    def discard_oldest(self, count: int = 20) -> bool:
        """Delete the oldest pictures, at most ``count``, to make room on a full disk; returns whether there was one."""
        with self._lock:
            given = sum(self._delete(self._kept.pop_oldest()) for _ in range(min(count, len(self._kept))))
            self.num_lost += given
        if given:
            log.error("rejects_discarded_for_room", count=given)
        return given > 0

    def close(self) -> None:
        """Nothing to close."""

    def _read_folder(self) -> int:
        """List the pictures there are and delete half-written files; returns the number of the next picture."""
        found: list[tuple[int, _Picture]] = []
        with_names = ((path, _OURS.fullmatch(path.name)) for path in self._folder.iterdir())
        for path, match in with_names:
            if match is None:
                continue
            if match["partial"]:
                path.unlink(missing_ok=True)
                continue
            try:
                taken = dt.datetime.strptime(match["time"], "%Y%m%dT%H%M%S%f").replace(tzinfo=dt.timezone.utc)
                picture = _Picture(name=path.name, num_bytes=path.stat().st_size, taken=taken)
            except (ValueError, FileNotFoundError):
                # Not a time, so the file is not ours; or somebody has just deleted it.
                continue
            found.append((int(match["number"] or 0), picture))
        for _, picture in sorted(found, key=lambda item: (item[0], item[1].name)):
            self._kept.add(picture)
        return max((number for number, _ in found), default=0) + 1

    def _store(self, inspected: Inspected) -> None:
        result = inspected.result
        assert inspected.image is not None
        picture = shrink(inspected.image, MAX_SIDE)
        if inspected.anomaly_map is not None:
            picture = draw_overlay(
                picture, inspected.anomaly_map, result.threshold, shown=inspected.shown_map, ignored=inspected.ignored
            )
        taken = result.captured.astimezone(dt.timezone.utc)
        name = f"{self._next_number:010d}-{_name_of(result)}"
        path = self._folder / name
        write_image(path, picture)
        self._next_number += 1
        self._kept.add(_Picture(name=name, num_bytes=path.stat().st_size, taken=taken))

    def _drop_surplus(self) -> None:
        now = self._now()
        while self._kept.has_surplus(now):
            self._delete(self._kept.pop_oldest())

    def _delete(self, picture: _Picture) -> bool:
        """Delete a picture; returns whether its file existed and was deleted."""
        try:
            (self._folder / picture.name).unlink()
        except FileNotFoundError:
            return False
        except OSError as exc:
            log.error("reject_not_deleted", file=picture.name, reason=exc.strerror)
            return False
        return True
