"""What TLS's error codes mean to whoever runs a site, and what to do about them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

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


def explain(error: OSError | str) -> TlsRefusal | None:
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
