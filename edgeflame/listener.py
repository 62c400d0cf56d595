"""A listening socket that cannot take a process's file descriptors away.

Whoever reaches a port may open connections and say nothing. Each costs a descriptor, and a process without descriptors
can open no image and no result. So a port has places: far fewer than descriptors. When all are taken, the address that
holds the most gives one up, so that nobody can keep others out. A connection without a request is closed after a while.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from edgeflame.log import EventLog

log = EventLog("listener")

MAX_CONNECTIONS = 64
"""Most connections of one port; fewer where the process has less than eight times as many descriptors."""

IDLE_S = 10.0
"""How long a connection may be without a request, seconds."""

_UNREAD_MS = 30_000
"""A peer that takes nothing of an answer for so long is gone (``TCP_USER_TIMEOUT``)."""

_LOG_EVERY_S = 60.0

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


@dataclass
class _Peer:
    connection: socket.socket
    host: str
    idle_since: float | None
    """Monotonic, seconds; None while a request is answered."""
    num_requests: int = 0
    """Requests being answered: the next may begin before the end of the one before is known here."""


class BoundedListener(socket.socket):
    """A listening TCP socket with a bounded number of connections; :meth:`accept` takes no more.

    It is used in place of a plain socket by servers that accept by themselves. For want of descriptors it closes the
    connection that waits, where a plain one fails again and again.

    Args:
        family: the address family.
    """

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_connections = MAX_CONNECTIONS if limit < 0 else max(4, min(MAX_CONNECTIONS, limit // 8))
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._leaving: list[socket.socket] = []
        self._guard = threading.Lock()
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._num_closed: Counter[str] = Counter()
        self._quiet_until = 0.0

    @classmethod
    def bound_to(cls, host: str, port: int) -> BoundedListener:
        """One that listens at an address.

        Raises:
            OSError: it cannot be listened on.
        """
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = cls(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(MAX_CONNECTIONS)
        except OSError:
            listener.close()
            raise
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """As of a plain socket; raises ``BlockingIOError`` also where a connection was closed for want of room."""
        try:
            connection, address = super().accept()
        except OSError as exc:
            if exc.errno not in _NO_DESCRIPTORS:
                raise
            self._shed()
            raise BlockingIOError(errno.EAGAIN, "no descriptor for a connection") from exc
        with self._guard:
            self._forget_closed()
            if len(self._peers) + len(self._leaving) >= self.max_connections:
                self._make_room()
            # What was told to leave may still be open, and holds its descriptor.
            if len(self._peers) + len(self._leaving) >= 2 * self.max_connections:
                connection.close()
                self._note("too_many")
                raise BlockingIOError(errno.EAGAIN, "too many connections")
            with contextlib.suppress(OSError, AttributeError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
            self._peers[address[:2]] = _Peer(connection, address[0], time.monotonic())
        return connection, address

    def close(self) -> None:
        """Close it, and the descriptor it kept back."""
        super().close()
        with self._guard:
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None

    @contextlib.contextmanager
    def answering(self, client: tuple[str, int] | None) -> Any:
        """While a request of a client is answered its connection is not idle."""
        with self._guard:
            # Kept, for another connection may come from the same address before the answer's end.
            peer = None if client is None else self._peers.get(client)
        self._count_request(peer, 1)
        try:
            yield
        finally:
            self._count_request(peer, -1)

    def close_idle(self) -> None:
        """Close the connections that have been without a request for ``IDLE_S``."""
        before = time.monotonic() - IDLE_S
        with self._guard:
            self._forget_closed()
            for key, peer in list(self._peers.items()):
                if peer.idle_since is not None and peer.idle_since < before:
                    self._dismiss(key, "idle")

    def _count_request(self, peer: _Peer | None, change: int) -> None:
        if peer is not None:
            with self._guard:
                peer.num_requests += change
                peer.idle_since = None if peer.num_requests else time.monotonic()

    def _forget_closed(self) -> None:
        # A socket that its server has closed has no descriptor.
        self._peers = {key: peer for key, peer in self._peers.items() if peer.connection.fileno() >= 0}
        self._leaving = [connection for connection in self._leaving if connection.fileno() >= 0]

    def _make_room(self) -> None:
        """Have the address with the most connections give up one: one without a request, else its oldest."""
        if not self._peers:
            return
        (greediest, _), *_ = Counter(peer.host for peer in self._peers.values()).most_common(1)
        theirs = [key for key, peer in self._peers.items() if peer.host == greediest]
        self._dismiss(next((key for key in theirs if self._peers[key].idle_since is not None), theirs[0]), "too_many")

    def _dismiss(self, key: tuple[str, int], why: str) -> None:
        peer = self._peers.pop(key)
        self._leaving.append(peer.connection)
        # Its server reads the end, and closes it.
        with contextlib.suppress(OSError):
            peer.connection.shutdown(socket.SHUT_RDWR)
        self._note(why)

    def _shed(self) -> None:
        """Close the connection that waits, with the descriptor that was kept back: it would be reported for ever."""
        with self._guard:
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None
            with contextlib.suppress(OSError):
                super().accept()[0].close()
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self._note("no_descriptors")
        if self._spare is None:
            # Another thread took it; do not spin until one is free.
            time.sleep(0.1)

    def _note(self, why: str) -> None:
        self._num_closed[why] += 1
        # An idle browser is nothing to speak of.
        if why != "idle" and time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _LOG_EVERY_S
            log.warning("connections_closed", **dict(self._num_closed), most=self.max_connections)
