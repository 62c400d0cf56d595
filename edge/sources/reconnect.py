"""Keeping a live source alive: open, read until it breaks, wait a little longer each time, open again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from edgeflame.console import EventLog
from edgeflame.errors import DataError
from edgeflame.images import ImageU8

log = EventLog("source")

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0


def reconnecting(
    name: str, read: Callable[[threading.Event], Iterator[ImageU8]], stop: threading.Event
) -> Iterator[ImageU8]:
    """Images of a live source, across outages.

    A source that cannot be opened at the start is a mistake and raises; one that worked is waited for.

    Args:
        name: for the log; without passwords.
        read: opens the source and yields its images; raises DataError when it cannot or when the stream breaks.
        stop: ends it, also during a wait.

    Raises:
        DataError: it cannot be opened the first time.
    """
    worked, delay_s = False, FIRST_DELAY_S
    while not stop.is_set():
        reason = "the stream ended"
        try:
            for image in read(stop):
                worked, delay_s = True, FIRST_DELAY_S
                yield image
        except DataError as exc:
            if not worked:
                raise
            reason = str(exc)
        if stop.is_set():
            return
        log.warning("source_lost", source=name, reason=reason, retry_in_s=delay_s)
        stop.wait(delay_s)
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)
