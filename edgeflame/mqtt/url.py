"""Where the broker is and who we are to it: ``mqtt://[user[:password]@]host[:port]``, or ``mqtts://``.

Where only a web server's ports are open, ``ws://host[:port]/path`` and ``wss://`` speak MQTT through a WebSocket.

Also what TLS's errors mean to whoever runs a site, and what to do about them.
"""

from __future__ import annotations

import contextlib
import os
import select
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edgeflame.errors import LinkError, UsageError
from edgeflame.masking import without_secrets

_NEW_KIT = "ask whoever runs the fleet for a new kit"

# OpenSSL's reason of an alert that the broker sent, without what differs between its versions: what it means, and
# whether it will stay so however often we try.
_ALERTS: tuple[tuple[str, str, bool], ...] = (
    ("CERTIFICATE_REVOKED", f"our certificate was revoked; {_NEW_KIT}", True),
    ("CERTIFICATE_EXPIRED", f"our certificate has expired; {_NEW_KIT} (edgeflame fleet renew)", True),
    ("UNKNOWN_CA", f"our certificate is of another authority than the fleet's; {_NEW_KIT}", False),
    ("BAD_CERTIFICATE", f"our certificate is not one it takes; {_NEW_KIT}", False),
    ("CERTIFICATE_REQUIRED", "it asks for a certificate of ours; name one with --kit, or --cert and --key", False),
    ("HANDSHAKE_FAILURE", "it asks for a certificate of ours; name one with --kit, or --cert and --key", False),
)
_ALERT_PREFIXES = ("ALERT_", "SSLV3_ALERT_", "TLSV1_ALERT_", "TLSV13_ALERT_")


@dataclass(frozen=True, kw_only=True)
class TlsRefusal:
    """Why TLS did not come about; ``is_final`` if trying again cannot help."""

    reason: str
    is_final: bool = False


def explain_tls_error(error: OSError | str) -> TlsRefusal | None:
    """What an error of TLS means; None if it is none that says anything.

    Args:
        error: as raised, or its text.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        if "ostname mismatch" in error.verify_message or "IP address mismatch" in error.verify_message:
            advice = "use a name it is made for, or make it one for this name (edgeflame fleet init --host)"
        else:
            advice = "is the kit, or --ca, that of this fleet?"
        reason = f"we do not trust the broker's certificate: {error.verify_message.rstrip('.')}; {advice}"
        return TlsRefusal(reason=reason)
    text = str(error)
    for name, meaning, is_final in _ALERTS:
        if any(prefix + name in text for prefix in _ALERT_PREFIXES):
            return TlsRefusal(reason=f"the broker says that {meaning}", is_final=is_final)
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text or "HTTP_REQUEST" in text:
        return TlsRefusal(reason="its port does not speak TLS; is it the right one?")
    return None


PASSWORD_VARIABLE = "EDGEFLAME_MQTT_PASSWORD"  # noqa: S105 - the name of a variable
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_SECURE = ("mqtts", "wss")
DEFAULT_WEBSOCKET_PATH = "/mqtt"
"""Where brokers and their proxies expect it, unless the URL says otherwise."""
CERTIFICATE_ALERT_WAIT_S = 0.5
"""How long we wait after a TLS 1.3 handshake for an alert that refuses our certificate, seconds."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files for ``mqtts``; ``cert`` and ``key`` are ours, for brokers that ask for a client certificate."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TlsPem:
    """The same as text, out of a kit; the private key never touches the disk."""

    ca: str = field(repr=False)
    cert: str = field(repr=False)
    key: str = field(repr=False)
    name: str
    """Whose they are."""


@dataclass(frozen=True, kw_only=True)
class BrokerUrl:
    """A broker's address and our credentials. The password never appears in ``repr`` or ``address``."""

    host: str
    port: int
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles | TlsPem | None = None
    """None: plain TCP."""
    websocket_path: str | None = None
    """Where on a web server the broker answers; None: MQTT without a WebSocket."""

    @property
    def address(self) -> str:
        """For people: scheme, host and port, and a WebSocket's path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.websocket_path is not None:
            return f"{'wss' if self.tls else 'ws'}://{host}:{self.port}{self.websocket_path}"
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS as the files say; None for plain TCP.

        Raises:
            LinkError: a file is missing or not what it should be.
        """
        tls = self.tls
        if tls is None:
            return None
        try:
            if isinstance(tls, TlsPem):
                context = ssl.create_default_context(cadata=tls.ca)
                with _memory_file(tls.cert + "\n" + tls.key) as path:
                    context.load_cert_chain(path)
            else:
                context = ssl.create_default_context(cafile=str(tls.ca) if tls.ca else None)
                if tls.cert is not None:
                    context.load_cert_chain(tls.cert, tls.key)
        except (OSError, ssl.SSLError) as exc:
            if isinstance(tls, TlsPem):
                named = f"certificates in the kit of {tls.name}"
            else:
                named = "TLS files " + ", ".join(str(path) for path in (tls.ca, tls.cert, tls.key) if path)
            raise LinkError(f"cannot use the {named}: {exc.strerror or exc}") from exc
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _TlsSocket
        return context


class _TlsSocket(ssl.SSLSocket):
    """Knows after its handshake whether the broker takes our certificate, and closes itself if it failed.

    With TLS 1.3 the handshake ends here before the broker has checked our certificate. Then it sends session tickets
    or an alert; and an alert would be lost if we had sent something by then, for the broker's machine answers that
    with a reset. So we wait a moment for either.
    """

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
            if self.version() == "TLSv1.3":
                self._wait_for_alert()
        except OSError:
            # paho would leave it to the garbage collector.
            self.close()
            raise

    def _wait_for_alert(self) -> None:
        timeout_s = self.gettimeout()
        if not select.select([self], [], [], CERTIFICATE_ALERT_WAIT_S)[0]:
            return
        self.settimeout(0.0)
        try:
            if not self.recv(1):
                raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection was closed")
        except ssl.SSLWantReadError:
            pass  # it was tickets: we are taken
        finally:
            self.settimeout(timeout_s)


@contextlib.contextmanager
def _memory_file(text: str) -> Iterator[str]:
    """A path to a file that is nowhere but in memory: Python's ``ssl`` reads keys from paths alone."""
    descriptor = os.memfd_create("edgeflame-kit", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def parse_broker_url(text: str, *, tls: TlsFiles | TlsPem | None = None) -> BrokerUrl:
    """Read a broker's URL; a password comes from it or from the environment (``EDGEFLAME_MQTT_PASSWORD``).

    Args:
        text: the URL. Without a scheme it is taken as ``mqtt://``.
        tls: files for ``mqtts``, or what a kit holds.

    Raises:
        UsageError: not such a URL; the message does not repeat a password.
    """
    is_websocket, path = False, ""
    try:
        parts = urlsplit(text if "://" in text else f"mqtt://{text}")
        port = parts.port
        is_websocket = parts.scheme in ("ws", "wss")
        path = parts.path.rstrip("/")
        sound = parts.scheme in DEFAULT_PORTS and parts.hostname and not parts.query and (is_websocket or not path)
    except ValueError:
        # A port or an IPv6 address that is none; the exception may quote the password.
        sound = False
    if not sound:
        shown = without_secrets(f"...{text.rpartition('@')[2]}" if "@" in text else text)[:100]
        # No "user:password@host" in the words: what masks secrets would take it for one.
        raise UsageError(
            f"broker {shown!r}: expected mqtt://host[:port], mqtts://, ws:// or wss:// "
            "(where it asks for them, user:password@ stands before the host)"
        )
    assert parts.hostname
    secure = parts.scheme in _SECURE
    if tls is not None and not secure and (tls.ca or tls.cert or tls.key):
        raise UsageError("certificates need a broker URL that starts with mqtts:// or wss://")
    password = unquote(parts.password) if parts.password is not None else os.environ.get(PASSWORD_VARIABLE)
    return BrokerUrl(
        host=parts.hostname,
        port=port or DEFAULT_PORTS[parts.scheme],
        user=unquote(parts.username) if parts.username else None,
        password=password if parts.username else None,
        tls=(tls or TlsFiles()) if secure else None,
        websocket_path=(path or DEFAULT_WEBSOCKET_PATH) if is_websocket else None,
    )
