"""Delivery to a web service: one POST for each result, with an idempotency key by which repetitions are recognised."""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

from edge.config.outputs import WebhookConfig
from edge.delivery.outbox import Delivery
from edgeflame.errors import ConfigError, LinkError

TOKEN_VARIABLE = "EDGEFLAME_WEBHOOK_TOKEN"  # noqa: S105 - the name of a variable
MAX_BATCH = 20
"""Results read from the outbox at once; each is a request of its own on one connection."""


class WebhookDestination:
    """A web service that answers 2xx when it has taken a result; after any other answer it is posted again.

    Every request carries ``Idempotency-Key: <outbox>-<number>``, the same on every attempt.

    Raises:
        ConfigError: the certificate authority's file cannot be used.
    """

    name = "webhook"
    max_batch = MAX_BATCH

    def __init__(self, config: WebhookConfig) -> None:
        self._config = config
        self._url = urlsplit(config.url)
        self._connection: http.client.HTTPConnection | None = None
        self._ssl: ssl.SSLContext | None = None
        if self._url.scheme == "https":
            try:
                self._ssl = ssl.create_default_context(cafile=config.ca)
            except (OSError, ssl.SSLError) as exc:
                raise ConfigError(f"webhook.ca: cannot use {config.ca} ({exc.strerror or exc})") from exc

    def deliver(self, deliveries: Sequence[Delivery]) -> int:
        """Post results one by one.

        Raises:
            LinkError: the first of them was not taken.
        """
        arrived = 0
        for item in deliveries:
            if item.read_result().verdict in self._config.verdicts:
                try:
                    self._post(item)
                except LinkError:
                    if not arrived:
                        raise
                    return arrived
            arrived = item.number
        return arrived

    def idle(self) -> None:
        """Do nothing: there is no connection to keep up between results."""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, item: Delivery) -> None:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "edgeflame",
            "Idempotency-Key": f"{item.outbox}-{item.number}",
        }
        if token := os.environ.get(TOKEN_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        try:
            connection = self._connection or self.connect()
            self._connection = connection
            connection.request("POST", target, body=item.encode(), headers=headers)
            response = connection.getresponse()
            # The answer must be read before the connection can be used again; at most a megabyte of it is.
            response.read(1 << 20)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise LinkError(f"{self._url.scheme}://{self._url.netloc}: {exc or type(exc).__name__}") from exc
        if response.will_close or not response.isclosed():
            self.close()
        if not 200 <= response.status < 300:
            raise LinkError(f"{self._url.scheme}://{self._url.netloc} answers {response.status} {response.reason}")

    def connect(self) -> http.client.HTTPConnection:
        """A new connection object; it connects on its first use."""
        host, port, timeout_s = str(self._url.hostname), self._url.port, self._config.timeout_s
        if self._ssl is not None:
            return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._ssl)
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
