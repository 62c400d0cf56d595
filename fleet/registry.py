"""The registry of a fleet's identities: who has which certificate, until when, and which are revoked. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

import msgspec

from edgeflame.errors import UsageError
from edgeflame.mqtt.kit import FleetRole
from edgeflame.mqtt.topics import check_name
from fleet.certificates import IssuedCertificate


class BrokerClient(msgspec.Struct, frozen=True, kw_only=True):
    """An identity as the broker knows it; a revoked one has no rights."""

    name: str
    """The common name of its certificate."""
    role: FleetRole
    is_active: bool = True


BROKER: Literal["broker"] = "broker"
"""The name of the server's certificate; no client may have it."""
AGGREGATOR, ADMIN = "aggregator", "admin"
RESERVED = (BROKER, AGGREGATOR, ADMIN)

REGISTRY_FORMAT = 1


class RevokedCertificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A certificate on the revocation list."""

    serial: str
    since: datetime


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name, and the certificate that now goes with it."""

    name: str
    role: FleetRole
    serial: str
    not_after: datetime
    revoked_at: datetime | None = None
    reason: str = ""
    """Why it was revoked."""
    replaced: tuple[str, ...] = ()
    """Serials of its earlier certificates, which may still be valid."""


class Registry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``fleet.json``."""

    format: Literal[1] = 1
    fleet: str
    hosts: tuple[str, ...]
    """Names and addresses of the broker; kits get the first."""
    port: int
    created: datetime
    identities: tuple[Identity, ...] = ()
    withdrawn: tuple[RevokedCertificate, ...] = ()

    @property
    def url(self) -> str:
        """The broker's."""
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"mqtts://{host}:{self.port}"

    def find(self, name: str) -> Identity | None:
        """The identity of a name; None if there is none."""
        return next((entry for entry in self.identities if entry.name == name), None)

    def require(self, name: str) -> Identity:
        """The identity of a name.

        Raises:
            UsageError: there is none.
        """
        entry = self.find(name)
        if entry is None:
            names = ", ".join(entry.name for entry in self.identities)
            raise UsageError(f"{name[:80]!r} is not enrolled in the fleet {self.fleet}; these are: {names}")
        return entry

    def clients(self) -> list[BrokerClient]:
        """All identities as the broker knows them; its own is not among them."""
        return [
            BrokerClient(name=entry.name, role=entry.role, is_active=entry.revoked_at is None)
            for entry in self.identities
            if entry.role != BROKER
        ]

    def revocations(self) -> list[tuple[str, datetime]]:
        """The revocation list's entries."""
        return [(entry.serial, entry.since) for entry in self.withdrawn]


def with_enrolled(registry: Registry, *, name: str, role: FleetRole, issued: IssuedCertificate) -> Registry:
    """The registry with one identity more, or with one's new certificate."""
    before = registry.find(name)
    entry = Identity(
        name=name,
        role=role,
        serial=issued.serial,
        not_after=issued.not_after,
        replaced=() if before is None or before.revoked_at else (*before.replaced, before.serial),
    )
    return msgspec.structs.replace(registry, identities=_replace_identity(registry.identities, entry))


def with_revoked(registry: Registry, *, name: str, reason: str, now: datetime) -> Registry:
    """The registry with an identity revoked, and all its certificates on the list; once revoked it stays as it is.

    Raises:
        UsageError: no member has the name, or the fleet needs it (broker, administrator).
    """
    entry = registry.require(name)
    if name in (BROKER, ADMIN):
        raise UsageError(
            f"{name} cannot be revoked: renew (edgeflame fleet renew FOLDER {name} --revoke-old), or make a new fleet"
        )
    if entry.revoked_at is not None:
        return registry
    gone = msgspec.structs.replace(entry, revoked_at=now, reason=reason)
    serials = (*entry.replaced, entry.serial)
    return msgspec.structs.replace(
        registry,
        identities=_replace_identity(registry.identities, gone),
        withdrawn=(*registry.withdrawn, *(RevokedCertificate(serial=serial, since=now) for serial in serials)),
    )


def with_older_revoked(registry: Registry, *, name: str, now: datetime) -> Registry:
    """The registry with all but the newest certificate of a name on the revocation list."""
    entry = registry.require(name)
    listed = tuple(RevokedCertificate(serial=serial, since=now) for serial in entry.replaced)
    return msgspec.structs.replace(
        registry,
        identities=_replace_identity(registry.identities, msgspec.structs.replace(entry, replaced=())),
        withdrawn=(*registry.withdrawn, *listed),
    )


def check_new_name(registry: Registry, name: str, *, role: str, reinstate: bool) -> None:
    """Whether a name may be enrolled.

    Raises:
        UsageError: it is taken, reserved, revoked, or cannot be a name.
    """
    check_name(role, name)
    if name in RESERVED:
        raise UsageError(f"{name!r} is a name of the fleet itself; choose another")
    entry = registry.find(name)
    if entry is None:
        return
    if entry.revoked_at is None:
        raise UsageError(
            f"{entry.role} {name!r} is enrolled already; `edgeflame fleet renew FOLDER {name}` makes it a new kit"
        )
    if not reinstate:
        raise UsageError(
            f"{name!r} was revoked on {entry.revoked_at:%Y-%m-%d}: choose another name. Or make sure that the broker "
            "has loaded the new crl.pem, without which the old kit would count again, and say --reinstate"
        )


def _replace_identity(identities: Iterable[Identity], entry: Identity) -> tuple[Identity, ...]:
    others = [other for other in identities if other.name != entry.name]
    return tuple(sorted((*others, entry), key=lambda identity: identity.name))
