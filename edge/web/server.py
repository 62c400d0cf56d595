"""The page's server: uvicorn on a thread of its own, for as long as a ``with`` block runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from edge.web.app import build_app
from edge.web.config import WebConfig
from edge.web.station import Station
from edgeflame.console import EventLog
from edgeflame.errors import LinkError
from edgeflame.statedir import storage_errors

log = EventLog("web")

TOKEN_VARIABLE = "EDGEFLAME_OPERATOR_TOKEN"  # noqa: S105 - the name of a variable
TOKEN_FILE = "operator-token"  # noqa: S105 - the name of a file

_STOP_TIMEOUT_S = 3.0


def operator_token(state: Path) -> str:
    """The token of whoever may change something: from the environment, or made once and kept in the state folder.

    Raises:
        StorageError: it can be neither read nor written.
    """
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    path = state / TOKEN_FILE
    with storage_errors(path, "keep the operator's token"):
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_urlsafe(12) + "\n")
            log.info("operator_token_made", file=str(path))
        return path.read_text().strip()


@contextlib.contextmanager
def serve(station: Station, config: WebConfig) -> Iterator[str]:
    """Serve a station's page; gives its address.

    Raises:
        LinkError: the address cannot be listened on.
    """
    listener = listen(config)
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(station),
            # Logs are ours; a request every quarter of a second is not worth a line.
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    # Signals are the inspection's. uvicorn takes them only on the main thread, which this is not.
    thread = threading.Thread(target=server.run, args=([listener],), name="edgeflame-web", daemon=True)
    thread.start()
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("page_served", address=address)
    try:
        yield address
    finally:
        station.closing.set()
        server.should_exit = True
        thread.join(_STOP_TIMEOUT_S)
        listener.close()


def listen(config: WebConfig) -> socket.socket:
    """The page's address, bound.

    Raises:
        LinkError: it cannot be listened on.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(64)
        except OSError:
            listener.close()
            raise
    except OSError as exc:
        msg = f"web.listen: cannot listen on {config.listen} ({exc.strerror or exc})"
        raise LinkError(msg) from exc
    return listener
