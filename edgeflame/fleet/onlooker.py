"""Listens to a fleet and fills a view: the shell around :mod:`edgeflame.fleet.view`."""

from __future__ import annotations

import os
import queue
import time
from types import TracebackType

from edgeflame.brokerurl import BrokerUrl
from edgeflame.fleet.view import FleetView
from edgeflame.link import Link
from edgeflame.linkevents import Event, Failed, Received, Up


class Onlooker:
    """A connection that only reads; a context manager.

    Args:
        url: the broker.
        view: gets what is heard.
        connect_timeout_s: give up if the broker was not reached within this time; None: never.

    Raises:
        LinkError: the broker refuses us, or was not reached in time; here and in :meth:`listen`.
    """

    def __init__(self, url: BrokerUrl, view: FleetView, *, connect_timeout_s: float | None) -> None:
        self._view = view
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._link = Link(
            url,
            client_id=f"edgeflame-status-{os.getpid()}-{os.urandom(4).hex()}",
            filters=view.filters(),
            sink=self._events.put,
            connect_timeout_s=connect_timeout_s,
        )
        try:
            while not isinstance(self._take(None), Up):
                pass
        except BaseException:
            self._link.close()
            raise

    def __enter__(self) -> Onlooker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._link.close()

    def listen(self, seconds: float) -> None:
        """For so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._take(left)

    def _take(self, timeout_s: float | None) -> Event | None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Received):
            self._view.take(event.topic, event.payload, time.monotonic())
            event.done()
        return event
