"""Connections without a request, in number: real sockets, in a process with few descriptors."""

from __future__ import annotations

import contextlib
import http.client
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from edgeflame import listener as listeners
from edgeflame.listener import BoundedListener
from edgeflame.metrics import Metric, MetricsServer
from tests.support.waiting import wait_for


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """As a service unit's limit may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def idlers(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Connections of another process in effect: made by a child, whose descriptors are its own."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(count)]


@contextlib.contextmanager
def accepting(listener: BoundedListener) -> Iterator[list[socket.socket]]:
    accepted: list[socket.socket] = []

    def run() -> None:
        while True:
            try:
                accepted.append(listener.accept()[0])
            except BlockingIOError:
                continue
            except OSError:
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield accepted
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        listener.close()
        for one in accepted:
            one.close()


def ended(connection: socket.socket) -> bool:
    connection.settimeout(0.0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.usefixtures("few_descriptors")
def test_the_address_with_the_most_connections_gives_one_up() -> None:
    listener = BoundedListener.bound_to("127.0.0.1", 0)
    assert listener.max_connections == 32
    port = listener.getsockname()[1]
    with accepting(listener) as accepted, contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5, ("127.0.0.2", 0)))
        wait_for(lambda: len(accepted) == 1, "the other is taken")
        crowd = stack.enter_context(idlers(port, 32))
        wait_for(lambda: ended(crowd[0]), "the crowd's first gives up its place")
        assert not ended(other)
        assert not ended(crowd[-1])


@pytest.mark.usefixtures("few_descriptors")
def test_for_want_of_descriptors_it_neither_fails_nor_spins() -> None:
    listener = BoundedListener.bound_to("127.0.0.1", 0)
    client = socket.socket()
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        stack.callback(client.close)
        with contextlib.suppress(OSError):
            while True:
                stack.enter_context(open("/dev/null"))  # noqa: PTH123 - descriptors are what is meant
        client.connect(("127.0.0.1", listener.getsockname()[1]))
        with pytest.raises(BlockingIOError):
            listener.accept()
        wait_for(lambda: ended(client), "the connection is closed")


def test_who_says_nothing_is_closed_and_who_waits_for_an_answer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "IDLE_S", 0.0)
    listener = BoundedListener.bound_to("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with accepting(listener) as accepted, idlers(port, 2) as (silent, busy):
        wait_for(lambda: len(accepted) == 2, "both are taken")
        with listener.answering(busy.getsockname()):
            listener.close_idle()
            wait_for(lambda: ended(silent), "the silent one is closed")
            assert not ended(busy)
        listener.close_idle()
        wait_for(lambda: ended(busy), "after its answer it is idle again")


@pytest.mark.usefixtures("few_descriptors")
def test_figures_are_served_beside_a_crowd_that_says_nothing() -> None:
    with MetricsServer("127.0.0.1:0") as server:
        server.show([Metric(name="edgeflame_x", meaning="X.", value=3)])
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        with idlers(port, 80):
            with open("/dev/null"):  # noqa: PTH123 - the process still has descriptors
                pass
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            asked.request("GET", "/metrics")
            assert b"edgeflame_x 3.0" in asked.getresponse().read()
            asked.close()


def test_a_connection_whose_next_request_has_begun_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may begin the next request of a connection before the end of the one before is known to it."""
    listener = BoundedListener.bound_to("127.0.0.1", 0)
    with accepting(listener) as accepted, idlers(listener.getsockname()[1], 1) as (connection,):
        wait_for(lambda: len(accepted) == 1, "it is taken")
        client = connection.getsockname()
        first, events = listener.answering(client), listener.answering(client)
        first.__enter__()
        events.__enter__()
        first.__exit__(None, None, None)
        monkeypatch.setattr(listeners, "IDLE_S", -1.0)
        listener.close_idle()
        assert not ended(connection)
        events.__exit__(None, None, None)
        listener.close_idle()
        wait_for(lambda: ended(connection), "it is closed when nothing is asked any more")
