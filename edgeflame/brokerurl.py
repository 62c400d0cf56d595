"""Where the broker is and who we are to it: ``mqtt://[user[:password]@]host[:port]``, or ``mqtts://``."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edgeflame.errors import LinkError, UsageError

PASSWORD_VARIABLE = "EDGEFLAME_MQTT_PASSWORD"  # noqa: S105 - the name of a variable
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files for ``mqtts``; ``cert`` and ``key`` are ours, for brokers that ask for a client certificate."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, kw_only=True)
class BrokerUrl:
    """A broker's address and our credentials. The password never appears in ``repr`` or ``address``."""

    host: str
    port: int
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
    """None: plain TCP."""

    @property
    def address(self) -> str:
        """For people: scheme, host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS as the files say; None for plain TCP.

        Raises:
            LinkError: a file is missing or not what it should be.
        """
        if self.tls is None:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.tls.ca) if self.tls.ca else None)
            if self.tls.cert is not None:
                context.load_cert_chain(self.tls.cert, self.tls.key)
        except (OSError, ssl.SSLError) as exc:
            named = ", ".join(str(path) for path in (self.tls.ca, self.tls.cert, self.tls.key) if path)
            msg = f"cannot use the TLS files {named}: {exc.strerror or exc}"
            raise LinkError(msg) from exc
        return context


def parse_broker_url(text: str, *, tls: TlsFiles | None = None) -> BrokerUrl:
    """Read a broker's URL; a password comes from it or from the environment (``EDGEFLAME_MQTT_PASSWORD``).

    Args:
        text: the URL. Without a scheme it is taken as ``mqtt://``.
        tls: files for ``mqtts``.

    Raises:
        UsageError: it is none; the message does not repeat a password.
    """
    parts = urlsplit(text if "://" in text else f"mqtt://{text}")
    try:
        port = parts.port
    except ValueError as exc:
        port = -1
        del exc
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or port == -1 or parts.path.strip("/") or parts.query:
        shown = f"{parts.scheme}://...{text.rpartition('@')[2][:100]}" if "@" in text else text[:100]
        msg = f"broker {shown!r}: expected mqtt://[user[:password]@]host[:port], or mqtts://"
        raise UsageError(msg)
    secure = parts.scheme == "mqtts"
    if tls is not None and not secure and (tls.ca or tls.cert or tls.key):
        msg = "certificate options need a broker URL that starts with mqtts://"
        raise UsageError(msg)
    password = unquote(parts.password) if parts.password is not None else os.environ.get(PASSWORD_VARIABLE)
    return BrokerUrl(
        host=parts.hostname,
        port=port or DEFAULT_PORTS[parts.scheme],
        user=unquote(parts.username) if parts.username else None,
        password=password if parts.username else None,
        tls=(tls or TlsFiles()) if secure else None,
    )
