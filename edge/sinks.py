"""Where results go: standard output for programs or for people, and a file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from edge.results import Inspected, json_line
from edge.status import DEFAULT_CAMERA
from edgeflame.errors import StorageError

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


class OfCamera:
    """Hands on the results of one camera alone."""

    def __init__(self, camera: str, sink: Sink) -> None:
        self._camera = camera
        self._sink = sink

    def accept(self, inspected: Inspected) -> None:
        if inspected.result.camera == self._camera:
            self._sink.accept(inspected)

    def close(self) -> None:
        self._sink.close()


class Production:
    """Hands on all but the golden parts of self-tests."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def accept(self, inspected: Inspected) -> None:
        if not inspected.result.golden:
            self._sink.accept(inspected)

    def close(self) -> None:
        self._sink.close()


class InTurn:
    """Hands results of several threads on to sinks that know of one alone."""

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
    """One coloured line a part for people."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def accept(self, inspected: Inspected) -> None:
        from rich.text import Text

        result = inspected.result
        line = Text()
        line.append(f" {result.verdict:^7} ", style=f"reverse {_COLOURS[result.verdict]}")
        ratio = "    –   " if result.score is None else f"{result.score / result.threshold:6.2f} ×"
        line.append(f" {ratio}  {result.latency_ms:6.1f} ms  {result.part_id}")
        if result.label is not None:
            wrong = result.is_right is False
            line.append(f"  ({result.label}{', wrong' if wrong else ''})", style="red" if wrong else "dim")
        if result.camera not in ("", DEFAULT_CAMERA):
            line.append(f"  {result.camera}", style="dim")
        notes = [reason for reason in result.reasons if reason != "above_threshold"]
        if notes:
            line.append(f"  {', '.join(notes)}", style="yellow")
        if result.detail:
            line.append(f": {result.detail}", style="dim")
        self._console.print(line, soft_wrap=True, highlight=False)

    def close(self) -> None:
        pass
