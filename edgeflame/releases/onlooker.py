"""Reads what is retained about releases and lines, and takes a release back."""

from __future__ import annotations

import os
import queue
import time
from types import TracebackType

import msgspec

from edgeflame.brokerurl import BrokerUrl
from edgeflame.errors import LinkError, NegativeAnswerError
from edgeflame.link import Link
from edgeflame.linkevents import Event, Failed, Received, Sent, Up
from edgeflame.messages import encode
from edgeflame.releases.messages import Release
from edgeflame.releases.view import FleetModels
from edgeflame.topics import Topics

COLLECT_S = 0.6
"""What is retained comes right after the subscription."""
ANSWER_S = 10.0


def look(url: BrokerUrl, topics: Topics, *, connect_timeout_s: float | None) -> FleetModels:
    """What is retained.

    Raises:
        LinkError: the broker refuses us, or was not reached in time.
    """
    with _Onlooker(url, topics, connect_timeout_s) as onlooker:
        return onlooker.view


def withdraw_release(url: BrokerUrl, topics: Topics, product: str, *, connect_timeout_s: float | None) -> Release:
    """Take a product's release back; what it was.

    Raises:
        NegativeAnswerError: there is none, or it was withdrawn before.
        LinkError: the broker refuses us, or was not reached in time.
    """
    with _Onlooker(url, topics, connect_timeout_s) as onlooker:
        release = onlooker.view.releases.get(product)
        if release is None or release.withdrawn:
            others = ", ".join(name for name, one in sorted(onlooker.view.releases.items()) if not one.withdrawn)
            msg = f"nothing is released for the product {product!r} in the fleet {topics.fleet}; for these is: {others}"
            raise NegativeAnswerError(msg)
        onlooker.publish(topics.release(product), encode(msgspec.structs.replace(release, withdrawn=True)))
        return release


class _Onlooker:
    def __init__(self, url: BrokerUrl, topics: Topics, connect_timeout_s: float | None) -> None:
        self.view = FleetModels(topics)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._link = Link(
            url,
            client_id=f"edgeflame-models-{os.getpid()}-{os.urandom(4).hex()}",
            filters=self.view.filters(),
            sink=self._events.put,
            connect_timeout_s=connect_timeout_s,
        )
        try:
            while not isinstance(self._next(None), Up):
                pass
            until = time.monotonic() + COLLECT_S
            while (left := until - time.monotonic()) > 0:
                self._next(left)
        except BaseException:
            self._link.close()
            raise

    def __enter__(self) -> _Onlooker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._link.close()

    def publish(self, topic: str, payload: bytes) -> None:
        """Say something, retained, and wait until the broker has it.

        Raises:
            LinkError: it refuses it, or does not answer.
        """
        self._link.publish(topic, payload, retain=True, token=1)
        until = time.monotonic() + ANSWER_S
        while (left := until - time.monotonic()) > 0:
            event = self._next(left)
            if isinstance(event, Sent):
                if event.error is not None:
                    msg = f"the broker refuses it on {topic}: {event.error}"
                    raise LinkError(msg)
                return
        msg = f"the broker did not answer within {ANSWER_S:g} s"
        raise LinkError(msg)

    def _next(self, timeout_s: float | None) -> Event | None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Received):
            self.view.take(event.topic, event.payload)
            event.done()
        return event
