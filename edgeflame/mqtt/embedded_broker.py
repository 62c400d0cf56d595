"""The embedded broker: a real MQTT 5 broker (rumqttd, from the wheel ``iotcore``) as a child process.

For one host: it has no access control and listens on the loopback interface by default. A fleet runs
on Mosquitto.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeflame.errors import LinkError, UsageError, require_extra

DEFAULT_PORT = 1883
START_TIMEOUT_S = 20.0

# max_payload_size: the broker's own default of 20 kB would refuse the first chunk.
# max_inflight_count: what it keeps in flight to one client.
# max_segment_size x max_segment_count bounds the log it keeps of each subscribed filter; a reader that falls
# further behind loses messages, which the transfer repairs.
_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 10000
max_outgoing_packet_count = 200
max_segment_size = 33554432
max_segment_count = 4
"""
_LISTENER = """
[{section}.1]
name = "{section}"
listen = "{bind}:{port}"
next_connection_delay_ms = 1
    [{section}.1.connections]
    connection_timeout_ms = 60000
    max_payload_size = 268435456
    max_inflight_count = 100
    dynamic_filters = true
"""


class EmbeddedBroker:
    """A broker that listens from construction to :meth:`close`; a context manager.

    Its process ends with this one, however this one ends.

    Args:
        port: for MQTT 5; 0 takes a free one.
        bind: the IPv4 address to listen on.
        port_mqtt3: a second port for MQTT 3.1.1 clients; None for none.

    Raises:
        MissingDependencyError: the ``broker`` extra is not installed.
        LinkError: the port is taken, or the broker does not start.
        UsageError: ``bind`` is not an address of this machine, or a port is out of its range.
    """

    def __init__(self, *, port: int = DEFAULT_PORT, bind: str = "127.0.0.1", port_mqtt3: int | None = None) -> None:
        with require_extra("broker", "the embedded broker, in place of Mosquitto, needs iotcore"):
            import iotcore
        self._ended = threading.Event()
        self.bind = bind
        self.port = _claim_port(bind, port)
        self._folder = tempfile.TemporaryDirectory(prefix="edgeflame-broker-")
        config = Path(self._folder.name) / "rumqttd.toml"
        text = _CONFIG + _LISTENER.format(section="v5", bind=bind, port=self.port)
        if port_mqtt3 is not None:
            text += _LISTENER.format(section="v4", bind=bind, port=_claim_port(bind, port_mqtt3))
        config.write_text(text)
        self._broker: Any = iotcore.Broker(config_path=str(config))
        try:
            self._broker.start(timeout=START_TIMEOUT_S)
        except (OSError, RuntimeError) as exc:
            self._folder.cleanup()
            raise LinkError(f"the embedded broker does not start on {bind}:{self.port}: {exc}") from exc

    @property
    def url(self) -> str:
        """Where clients on this host find it."""
        return f"mqtt://{'127.0.0.1' if self.bind == '0.0.0.0' else self.bind}:{self.port}"  # noqa: S104 - compared, not bound

    @property
    def is_running(self) -> bool:
        return bool(self._broker.is_running)

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> None:
        """Wait until :meth:`close` is called (by another thread, or by a signal handler's exception).

        Raises:
            LinkError: the broker's process ended by itself.
        """
        while not self._ended.wait(1.0):
            if not self.is_running:
                raise LinkError(f"the embedded broker on {self.bind}:{self.port} ended unexpectedly")

    def close(self) -> None:
        """Stop the broker and release its port."""
        self._ended.set()
        self._broker.stop()
        self._folder.cleanup()


def _claim_port(bind: str, port: int) -> int:
    """The port, if it is free; a free one for 0."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port}: expected 0 to 65535")
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # As the broker itself does: a port whose last connections are still dying away may be taken again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
            probe.listen(1)
        except PermissionError as exc:
            raise LinkError(f"port {port} may not be used by this user; take one above 1023") from exc
        except OSError as exc:
            if exc.errno in (99, -2) or isinstance(exc, socket.gaierror):
                raise UsageError(f"cannot listen on {bind}: it is not an IPv4 address of this machine") from exc
            raise LinkError(
                f"port {port} on {bind} is taken ({exc.strerror}); stop what uses it or choose another with --port"
            ) from exc
        return int(probe.getsockname()[1])
