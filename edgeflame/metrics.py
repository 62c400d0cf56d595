"""Figures for Prometheus: the metrics of a process, and the small web server that serves them.

A role describes itself as :class:`Metric` values, which need no library; the server keeps the last description and
hands it to whoever asks. It answers on a thread of its own and never touches the process's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal
from wsgiref.simple_server import WSGIRequestHandler

from edgeflame.background import BackgroundThread
from edgeflame.errors import LinkError, UsageError, require_extra
from edgeflame.listener import IDLE_S, BoundedListener

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure, or several that differ by a label.

    Attributes:
        name: with its unit; a counter's without ``_total``.
        meaning: one line.
        kind: a counter only grows.
        value: the figure, where there is no label.
        label: the label's name.
        values: the figures by the label's value.
    """

    name: str
    meaning: str
    kind: Literal["gauge", "counter"] = "gauge"
    value: float = 0.0
    label: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)


class _QuietHandler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Say nothing of a request: a line for each would be too many."""


class MetricsServer:
    """Serves ``http://HOST:PORT/metrics`` from construction to :meth:`close`; a context manager.

    Args:
        address: ``HOST:PORT``, or ``:PORT`` for the loopback interface.

    Raises:
        UsageError: not such an address.
        LinkError: nothing can listen there.
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, address: str) -> None:
        host, port = _parse(address)
        with require_extra("metrics", "metrics need prometheus-client"):
            from prometheus_client import CollectorRegistry
            from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
            from prometheus_client.registry import Collector
        self._shown: tuple[Metric, ...] = ()
        server = self

        class Shown(Collector):
            def collect(self) -> Iterator[Family]:
                return server._families()

        registry = CollectorRegistry()
        registry.register(Shown())
        try:
            listener = BoundedListener.bound_to(host, port)
        except OSError as exc:
            raise LinkError(f"--metrics {address}: cannot listen there ({exc.strerror or exc})") from exc
        self._server = ThreadingWSGIServer(listener.getsockname()[:2], _QuietHandler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        # What ``server_bind`` would have set: the application's environment.
        self._server.server_name, self._server.server_port = listener.getsockname()[:2]
        self._server.setup_environ()
        self._server.set_app(make_wsgi_app(registry))
        self._thread = BackgroundThread("metrics", lambda _: self._server.serve_forever(), wake=self._server.shutdown)
        self._thread.start()
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def show(self, metrics: Sequence[Metric]) -> None:
        """Serve these figures from now on, in place of the last ones."""
        self._shown = tuple(metrics)

    def close(self) -> None:
        """Stop answering."""
        self._thread.close()
        self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _families(self) -> Iterator[Family]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        for metric in self._shown:
            labels = [] if metric.label is None else [metric.label]
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.meaning, labels=labels)
            if metric.label is None:
                family.add_metric([], metric.value)
            for label, value in metric.values.items():
                family.add_metric([label], value)
            yield family


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--metrics {address[:80]!r}: expected HOST:PORT, say 127.0.0.1:9464")
    return host.strip("[]") or "127.0.0.1", int(port)
