"""The delivery pipeline: a writer that commits results to the outbox, and one deliverer for each destination.

A deliverer sends results in order and tries again until the destination has acknowledged them, however long that takes.
Writing and sending run on threads of their own: a slow disk or network must not delay the next part.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from edge.config import InspectConfig
from edge.config.outputs import RetryConfig
from edge.delivery.mqtt import CommandListener, MqttDestination
from edge.delivery.outbox import OUTBOX_FILE, Delivery, Outbox
from edge.delivery.sinks import Sink
from edge.delivery.webhook import WebhookDestination
from edge.result import Inspected
from edge.status import DestinationStatus, LineState
from edgeflame.background import BackgroundThread, Backoff
from edgeflame.errors import EdgeFlameError, StorageError
from edgeflame.log import EventLog
from edgeflame.state import locked_state_dir

delivery_log = EventLog("delivery")


class Destination(Protocol):
    """A receiver of results."""

    @property
    def name(self) -> str:
        """Its name in messages and in the outbox; the same after a restart."""
        ...

    @property
    def max_batch(self) -> int:
        """Most results that :meth:`deliver` takes at once."""
        ...

    def deliver(self, deliveries: Sequence[Delivery]) -> int:
        """Send results and wait for the answers. Returns the highest number that surely arrived, with all before it.

        Raises:
            LinkError: the first result was not acknowledged; any of them may have arrived nevertheless.
        """
        ...

    def idle(self) -> None:
        """Called about every half second while there is nothing to deliver.

        Raises:
            LinkError: the destination cannot be reached.
        """
        ...

    def close(self) -> None: ...


class Deliverer:
    """Delivers to one destination on a thread; a context manager. Leaving it goes on delivering for ``flush_s``."""

    def __init__(self, outbox: Outbox, destination: Destination, config: RetryConfig) -> None:
        self._outbox = outbox
        self._destination = destination
        self._config = config
        self._flush_until: float | None = None
        self.num_failures = 0
        """Attempts that failed since the start."""
        self.last_error: str | None = None
        """Why the last attempt failed; None if it succeeded."""
        waiting = outbox.register(destination.name).waiting
        if waiting:
            delivery_log.info("results_waiting", destination=destination.name, count=waiting)
        self._thread = BackgroundThread(destination.name, self._run, wake=self._notify)
        self._thread.start()

    def __enter__(self) -> Deliverer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        flush_until = self.start_flush()
        # A destination's own timeouts may be longer; a stop does not wait for them.
        self._thread.close(max(0.0, flush_until - time.monotonic()) + 0.3)
        self._destination.close()
        waiting = self.status().waiting
        if waiting:
            delivery_log.warning("results_kept_for_the_next_start", destination=self._destination.name, count=waiting)

    def start_flush(self) -> float:
        """Deliver for ``flush_s`` more and then end; returns that time, seconds on the monotonic clock."""
        if self._flush_until is None:
            self._flush_until = time.monotonic() + self._config.flush_s
            self._thread.request_stop()
        return self._flush_until

    @property
    def name(self) -> str:
        return self._destination.name

    def status(self) -> DestinationStatus:
        """Progress of the delivery."""
        return self._outbox.status(self._destination.name)

    def _notify(self) -> None:
        with self._outbox.changed:
            self._outbox.changed.notify_all()

    def _run(self, closing: threading.Event) -> None:
        backoff = Backoff(self._config.first_delay_s, self._config.max_delay_s)
        while not self._is_over():
            try:
                deliveries = self._outbox.next_batch(self._destination.name, self._destination.max_batch)
                if not deliveries:
                    if closing.is_set():
                        return
                    self._destination.idle()
                    self._wait_for_results(closing)
                    continue
                arrived = self._destination.deliver(deliveries)
                self._outbox.acknowledge(self._destination.name, arrived)
            except EdgeFlameError as exc:
                self.num_failures += 1
                self.last_error = str(exc)
                delay_s = backoff.next_delay()
                delivery_log.warning(
                    "delivery_failed",
                    destination=self._destination.name,
                    attempt=backoff.num_failures,
                    retry_in_s=round(delay_s, 1),
                    reason=str(exc),
                )
                # While closing, attempts follow each other quickly; flush_s bounds them.
                closing.wait(delay_s) if not closing.is_set() else time.sleep(min(delay_s, 0.2))
            else:
                if backoff.num_failures:
                    attempts = backoff.num_failures
                    delivery_log.info("delivery_recovered", destination=self._destination.name, after_attempts=attempts)
                backoff.reset()
                self.last_error = None

    def _wait_for_results(self, closing: threading.Event) -> None:
        with self._outbox.changed:
            if not closing.is_set():
                # The writer wakes this up; the time-out covers a wake-up between check and wait.
                self._outbox.changed.wait(0.5)

    def _is_over(self) -> bool:
        return self._flush_until is not None and time.monotonic() > self._flush_until


writer_log = EventLog("outbox")

MAX_WAITING = 64
"""Results queued between the inspection and the disk. When the queue is full the inspection waits for the disk: parts
are then late or dropped, which is reported, but no result is lost."""

MAX_WAITING_BYTES = 256 << 20
"""Most bytes of images of queued results; 64 images of a large camera would be a gigabyte."""

MAX_BATCH = 64
"""Results committed at once."""

COMMIT_INTERVAL_S = 0.01
"""Least time between two commits, since each costs a wait for the disk, here and again for every destination. Up to a
hundred parts a second it makes no difference."""


class OutboxWriter:
    """A sink that commits every result to the outbox, and only then hands it to the sinks behind it.

    It has one thread, owned by this context manager; leaving it writes what is waiting. The first error of the outbox
    or of a sink stops it and is raised by the next :meth:`accept`, or on leaving.
    """

    def __init__(self, outbox: Outbox, sinks: Sequence[Sink]) -> None:
        self._outbox = outbox
        self._sinks = sinks
        self._queue: queue.Queue[Inspected | None] = queue.Queue(MAX_WAITING)
        self._room = threading.Condition()
        self._waiting_bytes = 0
        self._failure: EdgeFlameError | None = None
        self._busy_since: float | None = None
        self._committed_at = 0.0
        self._thread = BackgroundThread("outbox", self._run, wake=self._offer_end, join_s=threading.TIMEOUT_MAX)
        self._thread.start()

    def __enter__(self) -> OutboxWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def accept(self, inspected: Inspected) -> None:
        """Queue a result; blocks while ``MAX_WAITING`` results or ``MAX_WAITING_BYTES`` of images are waiting.

        Raises:
            StorageError: an earlier result could not be kept.
        """
        size_bytes = _size_bytes(inspected)
        while True:
            self._raise_failure()
            if self._thread.stop.is_set():
                # A camera that hung at the stop and goes on only now.
                writer_log.error("result_not_kept", part=inspected.result.part_id, reason="the daemon has ended")
                raise StorageError("the outbox is closed")
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
        if not self._thread.stop.is_set():
            self._thread.close()
        self._raise_failure()

    @property
    def busy_s(self) -> float:
        """How long the disk and the sinks have been busy with the present batch, seconds; 0 between batches."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _offer_end(self) -> None:
        while self._thread.is_alive:
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue

    def _run(self, closing: threading.Event) -> None:
        try:
            while (batch := self._next_batch(closing)) is not None:
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
        writer_log.error("results_not_kept", waiting=self._queue.qsize(), reason=str(failure))

    def _next_batch(self, closing: threading.Event) -> list[Inspected] | None:
        """At least one result, more if they are waiting; None at the end, after all of them."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        closing.wait(max(0.0, self._committed_at + COMMIT_INTERVAL_S - time.monotonic()))
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
    return sum(
        array.nbytes for array in (inspected.image, inspected.anomaly_map, inspected.shown_map) if array is not None
    )


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A running delivery: the outbox, and a deliverer for each destination."""

    outbox: Outbox
    deliverers: Sequence[Deliverer]
    mqtt: MqttDestination | None
    """The MQTT broker among the destinations; None without ``[mqtt]``."""
    undelivered: dict[str, int]
    """After the end: number of results kept for the next start, by destination, where there are any."""

    def start_flush(self) -> None:
        """Start the flush of all destinations at the same time, and not one after another."""
        for deliverer in self.deliverers:
            deliverer.start_flush()

    def publish_reply(self, reply: bytes) -> None:
        """Publish the reply to a command."""
        if self.mqtt is not None:
            self.mqtt.publish_reply(reply)


@contextlib.contextmanager
def open_pipeline(
    state: Path,
    config: InspectConfig,
    line: LineState,
    *,
    make_room: Callable[[], bool],
    on_command: CommandListener,
) -> Iterator[Pipeline]:
    """Open the outbox in a state folder and start delivering what it holds.

    Leaving it tries for ``retry.flush_s`` to deliver what waits, and keeps the rest.

    Args:
        state: the state folder; it is locked for one daemon.
        config: the whole configuration; outbox, retry and destinations are used.
        line: the first state of the line to publish.
        make_room: called when the disk is full; frees room from something less important and returns whether it did.
        on_command: gets messages of the line's command topic.

    Raises:
        ConfigError: a destination's settings make no sense.
        StorageError: the folder cannot be used, or another process uses it.
    """
    deliverers: list[Deliverer] = []
    undelivered: dict[str, int] = {}

    def count_undelivered() -> None:
        waiting = {deliverer.name: deliverer.status().waiting for deliverer in deliverers}
        undelivered.update({name: count for name, count in waiting.items() if count})

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(locked_state_dir(state, kind="line"))
        outbox = stack.enter_context(Outbox(folder / OUTBOX_FILE, config.outbox, make_room=make_room))
        destinations: list[Destination] = []
        mqtt = MqttDestination(config.mqtt, line, on_command=on_command) if config.mqtt is not None else None
        if mqtt is not None:
            destinations.append(mqtt)
        if config.webhook is not None:
            destinations.append(WebhookDestination(config.webhook))
        for name in outbox.remove_destinations([destination.name for destination in destinations]):
            delivery_log.warning("destination_forgotten", destination=name, reason="it is no longer configured")
        # Last in, first out: the deliverers finish before the count.
        stack.callback(count_undelivered)
        deliverers += [
            stack.enter_context(Deliverer(outbox, destination, config.retry)) for destination in destinations
        ]
        yield Pipeline(outbox=outbox, deliverers=deliverers, mqtt=mqtt, undelivered=undelivered)
