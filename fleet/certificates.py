"""A fleet's own certificate authority: X.509 with EC P-256 keys, as every TLS library takes them.

Pure: keys and certificates are PEM bytes, the time is given. A certificate's common name is what the broker takes for
the client's name (Mosquitto's ``use_identity_as_username``), and all its rights hang on that name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from edgeflame.errors import StorageError, UsageError, require_extra

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


CA_DAYS = 3650
DEFAULT_DAYS = 825
"""For servers and clients: long enough that renewing is never urgent, short enough that it is practised."""
CLOCK_SKEW = timedelta(hours=1)
"""Certificates are valid from so long ago: clocks in a plant differ."""
MAX_HOST_CHARS = 253


@dataclass(frozen=True, kw_only=True)
class IssuedCertificate:
    """A certificate and its private key, as PEM.

    Attributes:
        serial: in hexadecimal, as the revocation list names it.
        not_after: the end of its validity, UTC.
    """

    cert: bytes
    key: bytes = field(repr=False)
    serial: str
    not_after: datetime


def make_authority(fleet: str, *, now: datetime) -> IssuedCertificate:
    """A new certificate authority; it signs certificates and revocation lists and nothing else.

    Raises:
        MissingDependencyError: cryptography is not installed.
    """
    require_cryptography()
    from cryptography import x509

    key = _new_key()
    name = _name(f"EdgeFlame fleet {fleet}"[:64], fleet, "authority")
    builder = (
        _builder(name, name, key, now=now, not_after=now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_others=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _sign(builder, key, key)


def issue_certificate(
    authority: IssuedCertificate,
    *,
    name: str,
    fleet: str,
    role: str,
    now: datetime,
    not_after: datetime,
    hosts: Sequence[str] = (),
) -> IssuedCertificate:
    """A new key, and a certificate of it: of a server if ``hosts`` are given, else of a client.

    Args:
        authority: signs it.
        name: the common name.
        fleet: its name, part of the subject, for people.
        role: part of the subject, for people.
        now: its validity begins ``CLOCK_SKEW`` before.
        not_after: the end of its validity, which is never later than the authority's own.
        hosts: names and addresses the server is reached by.

    Raises:
        UsageError: a host is neither a name nor an address.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    ca = x509.load_pem_x509_certificate(authority.cert)
    ca_key = _load_key(authority.key)
    key = _new_key()
    usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_name(name, fleet, role), ca.subject, key, now=now, not_after=min(not_after, authority.not_after))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_others=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return _sign(builder, key, ca_key)


def make_revocation_list(
    authority: IssuedCertificate, revoked: Sequence[tuple[str, datetime]], *, now: datetime
) -> bytes:
    """The list of revoked certificates: serial in hexadecimal, and since when; PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    ca = x509.load_pem_x509_certificate(authority.cert)
    # A list past its next update makes OpenSSL refuse *everyone*; forgetting to renew it must not stop a plant.
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now - CLOCK_SKEW)
        .next_update(authority.not_after)
    )
    for serial, since in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(since).build()
        builder = builder.add_revoked_certificate(entry)
    signed = builder.sign(_load_key(authority.key), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def read_authority(cert: bytes, key: bytes) -> IssuedCertificate:
    """An authority from its files.

    Raises:
        StorageError: they are damaged, or do not belong together.
        MissingDependencyError: cryptography is not installed.
    """
    require_cryptography()
    from cryptography import x509

    try:
        loaded = x509.load_pem_x509_certificate(cert)
        if _load_key(key).public_key() != loaded.public_key():
            raise StorageError("the authority's key is not that of its certificate")
    except ValueError as exc:
        raise StorageError(f"the authority's certificate or key cannot be read ({exc})") from exc
    return IssuedCertificate(
        cert=cert, key=key, serial=f"{loaded.serial_number:x}", not_after=loaded.not_valid_after_utc
    )


def require_cryptography() -> None:
    """Make sure that the library for certificates is installed.

    Raises:
        MissingDependencyError: it is not.
    """
    with require_extra("fleet", "certificates need cryptography"):
        import cryptography  # noqa: F401 - asked for by name, with one message for all its parts


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _load_key(data: bytes) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StorageError("not an elliptic-curve key")
    return key


def _name(common_name: str, fleet: str, role: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _host(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.split(".")
    legal = text.isascii() and len(text) <= MAX_HOST_CHARS and not labels[-1].isdigit()
    if not legal or not all(label and label.replace("-", "").isalnum() and len(label) <= 63 for label in labels):
        raise UsageError(f"host {text[:80]!r}: expected a host name or an IP address, as the sites reach the broker")
    return x509.DNSName(text)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, *, now: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, not_after) - CLOCK_SKEW)
        .not_valid_after(not_after)
    )


def _usage(*, signs_others: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_others,
        key_cert_sign=signs_others,
        crl_sign=signs_others,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _sign(
    builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, signing_key: EllipticCurvePrivateKey
) -> IssuedCertificate:
    from cryptography.hazmat.primitives import hashes, serialization

    cert = builder.sign(signing_key, hashes.SHA256())
    return IssuedCertificate(
        cert=cert.public_bytes(serialization.Encoding.PEM),
        key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        serial=f"{cert.serial_number:x}",
        not_after=cert.not_valid_after_utc,
    )
