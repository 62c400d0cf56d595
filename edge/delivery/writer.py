"""Results onto the disk, off the inspection's thread: what is slow here must not make the next part late."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import msgspec

from edge.delivery.outbox import Outbox
from edge.results import Inspected
from edge.sinks import Sink
from edgeflame.console import EventLog
from edgeflame.errors import EdgeFlameError, StorageError

log = EventLog("outbox")

MAX_WAITING = 64
"""Inspected parts between the inspection and the disk. When the disk is slower than the line for longer than this,
the inspection waits for it: parts are then late or dropped by name, never forgotten."""

MAX_WAITING_BYTES = 256 << 20
"""Of the pictures that parts bring along; a large camera's 64 would be a gigabyte."""

MAX_BATCH = 64
"""Results committed at once."""

COMMIT_INTERVAL_S = 0.01
"""Between two commits, at least: each costs a wait for the disk, here and again for every destination. A line of up to
a hundred parts a second notices nothing of it."""


class Writer:
    """A sink that commits every result to the outbox, and only then shows it to the sinks behind it.

    One thread, owned by this context manager; leaving it writes what is waiting. The first error of the outbox or
    of a sink stops it and is raised by the next :meth:`accept`, or on leaving: no result is swallowed.
    """

    def __init__(self, outbox: Outbox, sinks: Sequence[Sink]) -> None:
        self._outbox = outbox
        self._sinks = sinks
        self._queue: queue.Queue[Inspected | None] = queue.Queue(MAX_WAITING)
        self._room = threading.Condition()
        self._waiting_bytes = 0
        self._failure: EdgeFlameError | None = None
        self._busy_since: float | None = None
        self._closing = threading.Event()
        self._committed_at = 0.0
        self._thread = threading.Thread(target=self._run, name="edgeflame-outbox", daemon=True)
        self._thread.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def accept(self, inspected: Inspected) -> None:
        """Hand a result over; waits while ``MAX_WAITING`` are, or pictures of ``MAX_WAITING_BYTES``.

        Raises:
            StorageError: an earlier result could not be kept.
        """
        size_bytes = _size_bytes(inspected)
        while True:
            self._raise_failure()
            if self._closing.is_set():
                # A camera that hung when we were told to stop, and comes round now.
                log.error("result_not_kept", part=inspected.result.part_id, reason="the daemon has ended")
                msg = "the outbox is closed"
                raise StorageError(msg)
            with self._room:
                if self._waiting_bytes and self._waiting_bytes + size_bytes > MAX_WAITING_BYTES:
                    self._room.wait(0.2)
                    continue
                self._waiting_bytes += size_bytes
            try:
                self._queue.put(inspected, timeout=0.2)
            except queue.Full:
                self._release(size_bytes)
                continue
            break

    def close(self) -> None:
        """Write what is waiting and end the thread.

        Raises:
            StorageError: not everything could be kept.
        """
        if not self._closing.is_set():
            self._closing.set()
            while self._thread.is_alive():
                try:
                    self._queue.put(None, timeout=0.2)
                    break
                except queue.Full:
                    continue
            self._thread.join()
        self._raise_failure()

    @property
    def busy_s(self) -> float:
        """How long the disk and the sinks have had the results in hand; 0 between them."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                self._busy_since = self._committed_at = time.monotonic()
                self._outbox.append(
                    [msgspec.json.encode(inspected.result) for inspected in batch],
                    [inspected.origin for inspected in batch if inspected.origin is not None],
                )
                for inspected in batch:
                    for sink in self._sinks:
                        sink.accept(inspected)
                self._busy_since = None
                self._release(sum(map(_size_bytes, batch)))
        except EdgeFlameError as exc:
            self._fail(exc)
        except BaseException as exc:  # noqa: BLE001 - a thread's outermost frame: the next accept raises it
            self._fail(StorageError(f"the writer of results failed: {exc!r}"))

    def _release(self, size_bytes: int) -> None:
        with self._room:
            self._waiting_bytes -= size_bytes
            self._room.notify_all()

    def _fail(self, failure: EdgeFlameError) -> None:
        self._failure = failure
        log.error("results_not_kept", waiting=self._queue.qsize(), reason=str(failure))

    def _next_batch(self) -> list[Inspected] | None:
        """At least one result, more if they are there; None at the end, after all of them."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        self._closing.wait(max(0.0, self._committed_at + COMMIT_INTERVAL_S - time.monotonic()))
        while len(batch) < MAX_BATCH:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                # For the next call, after this batch.
                self._queue.put(None)
                break
            batch.append(item)
        return batch


def _size_bytes(inspected: Inspected) -> int:
    return sum(array.nbytes for array in (inspected.image, inspected.anomaly_map) if array is not None)
