"""What stands before the page's routes: only its own names are served, and idle connections are told from busy ones.

A page on another site may have its name resolve to this line's address and so read the line's pictures with the
visitor's browser (DNS rebinding). Its requests still carry its own name in ``Host``.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edge.config.outputs import WebConfig
from edgeflame.listener import BoundedListener

OPEN_PATHS = frozenset({"/metrics", "/healthz", "/readiness"})
"""Served under every name: they show no picture, and monitors call a line by names of their own."""

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(:[0-9]*)?", re.ASCII)


class Guard:
    """An ASGI application in front of the page's.

    Args:
        app: the page's.
        config: its names.
        listener: whose connections they are; None where it does not matter.
    """

    def __init__(self, app: ASGIApp, config: WebConfig, listener: BoundedListener | None = None) -> None:
        self._app = app
        self._names = frozenset(_plain(name) for name in (config.host, *config.names))
        self._listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        app = self._app
        if scope["path"] not in OPEN_PATHS and (name := _host(scope)) is not None and not await self._is_ours(name):
            told = f"this page is not served as {name[:100]!r}: open it by its address, or add the name to web.names"
            app = Response(msgspec.json.encode({"error": told}), 421, media_type="application/json")
        if self._listener is None:
            await app(scope, receive, send)
            return
        client = scope.get("client")
        with self._listener.answering(None if client is None else tuple(client)):
            await app(scope, receive, send)

    async def _is_ours(self, name: str) -> bool:
        if name in self._names or name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True
        return name in await asyncio.to_thread(_machine_names)


def _host(scope: Scope) -> str | None:
    """The name that a request is for, without its port; None if it names none, as no browser does."""
    for key, value in scope["headers"]:
        if key == b"host":
            found = _HOST.fullmatch(value.decode("latin-1").strip())
            # What is no name at all is nobody's.
            return "?" if found is None else _plain(found["name"])
    return None


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@functools.cache
def _machine_names() -> frozenset[str]:
    """What this machine calls itself. Asking for the full name may take a resolver's time."""
    name = socket.gethostname()
    short = name.partition(".")[0]
    return frozenset(map(_plain, (name, short, f"{short}.local", socket.getfqdn())))
