"""From the outbox to one destination: in order, until it has said that it has them, however long that takes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import msgspec

from edge.delivery.message import Delivery
from edge.delivery.outbox import Outbox, Standing
from edgeflame.console import EventLog
from edgeflame.errors import ConfigError, EdgeFlameError

log = EventLog("delivery")


class Destination(Protocol):
    """Something that takes results."""

    @property
    def name(self) -> str:
        """Which one, for messages and for the outbox; the same after a restart."""
        ...

    @property
    def max_batch(self) -> int:
        """How many it takes at once."""
        ...

    def deliver(self, deliveries: Sequence[Delivery]) -> int:
        """Send results and wait for the answers. Returns the highest number that surely arrived with all before it.

        Raises:
            LinkError: none of them surely arrived, and the rest may or may not have.
        """
        ...

    def idle(self) -> None:
        """Called about every half second while there is nothing to deliver.

        Raises:
            LinkError: the destination cannot be reached.
        """
        ...

    def close(self) -> None: ...


class DeliveryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[delivery]``: how destinations are tried again."""

    first_delay_s: float = 0.5
    """Before the second attempt."""
    max_delay_s: float = 30.0
    """Between attempts: doubles from the first to this, less up to half of it by chance."""
    flush_s: float = 3.0
    """At the end of a run, how long results may still be delivered; the rest goes out at the next start."""

    def __post_init__(self) -> None:
        if not 0 < self.first_delay_s <= self.max_delay_s <= 3600:
            msg = f"delivery: 0 < first_delay_s <= max_delay_s <= 3600, not {self.first_delay_s} and {self.max_delay_s}"
            raise ConfigError(msg)
        if not 0 <= self.flush_s <= 60:
            msg = f"delivery.flush_s must be 0..60, not {self.flush_s}"
            raise ConfigError(msg)


class Deliverer:
    """One destination's thread; a context manager. Leaving it tries to deliver what waits, for ``flush_s``."""

    def __init__(self, outbox: Outbox, destination: Destination, config: DeliveryConfig) -> None:
        self._outbox = outbox
        self._destination = destination
        self._config = config
        self._flush_until: float | None = None
        self._closing = threading.Event()
        self.num_failures = 0
        """Attempts that failed since the start."""
        self.last_error: str | None = None
        """Why the last attempt failed; None after one that did not."""
        waiting = outbox.register(destination.name).waiting
        if waiting:
            log.info("results_waiting", destination=destination.name, count=waiting)
        self._thread = threading.Thread(target=self._run, name=f"edgeflame-{destination.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Deliverer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        flush_until = self.begin_flush()
        # A destination has timeouts of its own; nothing of ours waits longer for it than this.
        self._thread.join(max(0.0, flush_until - time.monotonic()) + 0.3)
        self._destination.close()
        waiting = self.standing().waiting
        if waiting:
            log.warning("results_kept_for_the_next_start", destination=self._destination.name, count=waiting)

    def begin_flush(self) -> float:
        """Deliver what waits for ``flush_s`` more, and no longer; until when that is, on the monotonic clock."""
        if self._flush_until is None:
            self._flush_until = time.monotonic() + self._config.flush_s
            self._closing.set()
            with self._outbox.changed:
                self._outbox.changed.notify_all()
        return self._flush_until

    @property
    def name(self) -> str:
        return self._destination.name

    def standing(self) -> Standing:
        """How far it has come."""
        return self._outbox.standing(self._destination.name)

    def _run(self) -> None:
        failures = 0
        while not self._is_over():
            try:
                deliveries = self._outbox.attempt(self._destination.name, self._destination.max_batch)
                if not deliveries:
                    if self._closing.is_set():
                        return
                    self._destination.idle()
                    self._wait_for_results()
                    continue
                arrived = self._destination.deliver(deliveries)
                self._outbox.acknowledge(self._destination.name, arrived)
            except EdgeFlameError as exc:
                failures += 1
                self.num_failures += 1
                self.last_error = str(exc)
                ceiling = min(self._config.first_delay_s * 2 ** min(failures - 1, 16), self._config.max_delay_s)
                delay_s = ceiling * random.uniform(0.5, 1.0)
                log.warning(
                    "delivery_failed",
                    destination=self._destination.name,
                    attempt=failures,
                    retry_in_s=round(delay_s, 1),
                    reason=str(exc),
                )
                # On the way out there is no time for patience; flush_s bounds the attempts.
                self._closing.wait(delay_s) if not self._closing.is_set() else time.sleep(min(delay_s, 0.2))
            else:
                if failures:
                    log.info("delivery_recovered", destination=self._destination.name, after_attempts=failures)
                failures = 0
                self.last_error = None

    def _wait_for_results(self) -> None:
        with self._outbox.changed:
            if not self._closing.is_set():
                # Woken by the writer; the time-out only guards against a wake-up between look and wait.
                self._outbox.changed.wait(0.5)

    def _is_over(self) -> bool:
        return self._flush_until is not None and time.monotonic() > self._flush_until
