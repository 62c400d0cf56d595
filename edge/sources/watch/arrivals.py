"""Which files of a watched folder are to be read now, which have to wait, and which will never be complete. Pure.

Theory of operation
-------------------
A file is known by its name, size and time of change; one that was dealt with is *done*, and comes again only if it is
written anew. Any other is *pending*: it was seen in the folder, or the kernel spoke of it. A pending file is *tried*
(read and decoded) as soon as the kernel says that it was moved into place, or when size and time have not changed for
``settle_s``: also a writer that has closed its file may still set its time, or give it its name. If that fails it waits
until it changes, to be tried again; when it has not changed for ``deadline_s``, or still changes after
``LONGEST_WRITE`` times as long, it is given up.

A pending file that disappears is lost, unless it has only got another name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

LONGEST_WRITE = 10
"""A file that is still being written after so many deadlines is no picture of a part."""


class Identity(NamedTuple):
    """What a file was when it was looked at."""

    size: int
    mtime_ns: int


class Seen(NamedTuple):
    """A file as the file system has it."""

    identity: Identity
    inode: int


@dataclass
class _Pending:
    order: int
    first_seen_s: float
    changed_s: float
    seen: Seen | None = None
    is_hinted: bool = False
    """It was moved here."""
    is_old: bool = False
    """It had not changed for long when it was first seen."""
    tried: Identity | None = None
    failure: str | None = None


class GivenUp(NamedTuple):
    """A file that will not be complete."""

    name: str
    identity: Identity
    reason: str


class Arrivals:
    """The files of one folder.

    Args:
        done: name and identity of the files that were dealt with before.
        settle_s: how long size and time of change must stay as they are.
        deadline_s: after how long without a change an incomplete file is given up.
    """

    def __init__(self, done: dict[str, Identity], *, settle_s: float, deadline_s: float) -> None:
        self.done = done
        self._settle_s = settle_s
        self._deadline_s = deadline_s
        self._pending: dict[str, _Pending] = {}
        self._missing_since_s: dict[str, float] = {}
        """Pending files that were there and are not."""
        self._order = 0

    @property
    def pending(self) -> list[str]:
        """Names of the files that wait."""
        return list(self._pending)

    def hint(self, name: str, now_s: float) -> None:
        """The kernel says that a file was moved into place."""
        pending = self._get(name, now_s)
        pending.order, pending.is_hinted, pending.tried = self._next_order(), True, None

    def rumour(self, name: str, now_s: float) -> None:
        """The kernel says that there is a file, or that its writer has closed it."""
        # Files come in the order in which they were completed.
        self._get(name, now_s).order = self._next_order()

    def renamed(self, old: str) -> None:
        """A file goes by another name now, of which there is a hint as well."""
        self._drop(old)

    def observe(self, name: str, seen: Seen | None, now_s: float, *, is_old: bool = False) -> None:
        """What the file system says about a file; None: it is not there.

        Args:
            name: of the file.
            seen: what it is.
            now_s: monotonic clock.
            is_old: by the file system's own clock it has not changed for ``settle_s``.
        """
        if seen is None:
            if name in self._pending:
                self._missing_since_s.setdefault(name, now_s)
            return
        if self.done.get(name) == seen.identity:
            self._drop(name)
            return
        is_new = name not in self._pending
        if is_new:
            self._drop_former_names(seen.inode)
        pending = self._get(name, now_s)
        self._missing_since_s.pop(name, None)
        if pending.seen is None:
            pending.is_old = is_old
        elif pending.seen.identity != seen.identity:
            pending.changed_s, pending.is_old = now_s, False
        pending.seen = seen

    def ready(self, now_s: float) -> list[str]:
        """Files to be tried now, in the order of their arrival."""
        found = [
            (pending.order, name)
            for name, pending in self._pending.items()
            if pending.seen is not None
            and name not in self._missing_since_s
            and pending.tried != pending.seen.identity
            and (pending.is_hinted or pending.is_old or now_s - pending.changed_s >= self._settle_s)
        ]
        return [name for _, name in sorted(found)]

    def failed(self, name: str, identity: Identity, reason: str) -> None:
        """A file was tried, in vain."""
        pending = self._pending.get(name)
        if pending is not None:
            pending.tried, pending.failure, pending.is_hinted = identity, reason, False

    def finish(self, name: str, identity: Identity) -> None:
        """A file was handed over."""
        self._drop(name)
        self.done[name] = identity

    def given_up(self, now_s: float) -> Iterator[GivenUp]:
        """Files that will not be complete; they are done with."""
        for name, pending in list(self._pending.items()):
            if pending.seen is None or name in self._missing_since_s:
                continue
            unchanged_s, age_s = now_s - pending.changed_s, now_s - pending.first_seen_s
            if pending.tried == pending.seen.identity and unchanged_s >= self._deadline_s:
                reason = f"not complete {self._deadline_s:g} s after its last change: {pending.failure}"
            elif age_s >= LONGEST_WRITE * self._deadline_s:
                reason = f"still being written after {LONGEST_WRITE * self._deadline_s:g} s"
            else:
                continue
            self.finish(name, pending.seen.identity)
            yield GivenUp(name, pending.seen.identity, reason)

    def lost(self, now_s: float) -> Iterator[str]:
        """Files that were there and are gone before they could be read; they are forgotten."""
        for name, since_s in list(self._missing_since_s.items()):
            if now_s - since_s >= self._settle_s:
                self._drop(name)
                yield name

    def forget_absent(self, present: Iterable[str]) -> list[str]:
        """Drop what is known of done files that are no longer there; returns their names."""
        absent = self.done.keys() - set(present)
        for name in absent:
            del self.done[name]
        return sorted(absent)

    def _get(self, name: str, now_s: float) -> _Pending:
        pending = self._pending.get(name)
        if pending is None:
            pending = _Pending(order=self._next_order(), first_seen_s=now_s, changed_s=now_s)
            self._pending[name] = pending
        return pending

    def _drop_former_names(self, inode: int) -> None:
        for name in list(self._missing_since_s):
            seen = self._pending[name].seen
            if seen is not None and seen.inode == inode:
                self._drop(name)

    def _drop(self, name: str) -> None:
        self._pending.pop(name, None)
        self._missing_since_s.pop(name, None)

    def _next_order(self) -> int:
        self._order += 1
        return self._order
