"""Keeping a live source alive: open, read until it breaks, wait a little longer each time, open again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from edgeflame.console import EventLog
from edgeflame.errors import DataError

log = EventLog("source")

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Lost:
    """In place of images: the source broke off, for this reason; one for each outage."""

    reason: str


def reconnecting(
    name: str, read: Callable[[threading.Event], Iterator[T]], stop: threading.Event
) -> Iterator[T | Lost]:
    """What a live source gives, across outages.

    A source that cannot be opened at the start is a mistake and raises; one that worked is waited for.

    Args:
        name: for the log; without passwords.
        read: opens the source and yields its images; raises DataError when it cannot or when the stream breaks.
        stop: ends it, also during a wait.

    Raises:
        DataError: it cannot be opened the first time.
    """
    worked, is_lost, delay_s = False, False, FIRST_DELAY_S
    while not stop.is_set():
        reason = "the stream ended"
        try:
            for image in read(stop):
                worked, is_lost, delay_s = True, False, FIRST_DELAY_S
                yield image
        except DataError as exc:
            if not worked:
                raise
            reason = str(exc)
        if stop.is_set():
            return
        if not is_lost:
            is_lost = True
            yield Lost(reason=reason)
        log.warning("source_lost", source=name, reason=reason, retry_in_s=delay_s)
        stop.wait(delay_s)
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)
