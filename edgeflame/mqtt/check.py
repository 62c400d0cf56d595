"""Checks of a broker for ``doctor`` and ``inspect --check``: our certificate's dates, and whether we can connect."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edgeflame.errors import EdgeFlameError
from edgeflame.findings import Finding, note, ok, problem
from edgeflame.log import LOGGER_NAME
from edgeflame.mqtt.kit import EXPIRY_WARNING
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.url import BrokerUrl


def check_broker(
    url: BrokerUrl,
    *,
    filters: Iterable[str],
    timeout_s: float,
    advice: str,
    member: str = "",
    look: Callable[[Session], Iterator[Finding]] = lambda _: iter(()),
) -> Iterator[Finding]:
    """Look at our certificate's dates, and connect as a member of the fleet would.

    Args:
        url: the broker.
        filters: topics that our certificate's holder may read; the connection counts only if they can be subscribed to.
        timeout_s: how long to try, seconds.
        advice: what to do when the broker cannot be reached, or refuses us.
        member: who we are to the broker, for the finding's text; empty to leave it out.
        look: further checks in the open session, called once the broker has accepted us.
    """
    if url.tls is not None and url.tls.cert is not None:
        yield check_certificate(url.tls.cert)
    # Every attempt's failure is a line of the log; here the last one is the finding.
    logger = logging.getLogger(f"{LOGGER_NAME}.link")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Session(url, name="check", filters=filters, connect_timeout_s=timeout_s) as session:
            if session.lacks is not None:
                yield problem("broker", f"{url.address}: {session.lacks}", "switch it on there, or use another broker")
                return
            yield ok("broker", f"{url.address} takes us{member and f' as {member}'}")
            yield from look(session)
    except EdgeFlameError as exc:
        yield problem("broker", str(exc), advice)
    finally:
        logger.setLevel(level)


def check_certificate(cert: Path | str) -> Finding:
    """Look at the dates of a certificate, a PEM file or its text."""
    try:
        from cryptography import x509
    except ImportError:
        return note("certificate", "its dates cannot be read", "pip install 'edgeflame[sign]'")
    try:
        pem = cert.read_bytes() if isinstance(cert, Path) else cert.encode()
        until = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    except (OSError, ValueError) as exc:
        return problem("certificate", f"cannot be read: {exc}", "ask for a new kit: edgeflame fleet enrol")
    left = until - dt.datetime.now(dt.timezone.utc)
    text = f"valid until {until:%Y-%m-%d}"
    if left < dt.timedelta(0):
        return problem("certificate", f"expired on {until:%Y-%m-%d}", "ask for a new one: edgeflame fleet renew")
    if left < EXPIRY_WARNING:
        return note("certificate", f"{text}, {left.days} days left", "ask for a new one soon: edgeflame fleet renew")
    return ok("certificate", text)
