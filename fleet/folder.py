"""A fleet's folder on the administrator's machine: the authority's key, the registry, the broker's files, the kits.

    fleet.json              the registry: to whom the fleet gave certificates
    ca/ca.crt ca.key        its authority; the key never leaves this folder
    signing/                the key that packages are signed with (`edgeflame model sign`)
    broker/                 everything the broker's machine needs
    kits/NAME.kit           one file for each member; give it away and delete it here

Nothing in it is for others to read: folders are 0700 and files that hold a secret 0600. What changes is written
whole or not at all, the registry first: whatever is lost after that can be made again from it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath

import msgspec

from edgeflame.errors import StorageError, UsageError
from edgeflame.mqtt.kit import FleetRole, Kit, encode_kit, read_kit
from edgeflame.mqtt.topics import check_name
from edgeflame.signing import write_keys
from edgeflame.state import FormatHead, atomic_write, check_format_version, locked_state_dir, storage_errors, write_json
from fleet import broker_control
from fleet.certificates import (
    DEFAULT_DAYS,
    IssuedCertificate,
    issue_certificate,
    make_authority,
    make_revocation_list,
    read_authority,
)
from fleet.registry import (
    ADMIN,
    AGGREGATOR,
    BROKER,
    REGISTRY_FORMAT,
    Registry,
    check_new_name,
    with_enrolled,
    with_older_revoked,
    with_revoked,
)

REGISTRY_FILE = "fleet.json"
SECRET_MODE, PUBLIC_MODE = 0o600, 0o644


class FleetFolder:
    """A fleet's folder; open it with :func:`open_fleet`, which keeps other processes out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = (path / REGISTRY_FILE).read_bytes()
        except OSError as exc:
            raise UsageError(
                f"{path}: no fleet here ({exc.strerror}: {REGISTRY_FILE}); `edgeflame fleet init {path}` makes one"
            ) from exc
        try:
            head = msgspec.json.decode(data, type=FormatHead)
            check_format_version(f"{path}: the fleet's registry", found=head.format, known=REGISTRY_FORMAT)
            self.registry = msgspec.json.decode(data, type=Registry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise StorageError(f"{path / REGISTRY_FILE}: damaged, or of another version of EdgeFlame ({exc})") from exc

    @property
    def broker_files(self) -> Path:
        """What the broker's machine needs."""
        return self.path / "broker"

    def admin_kit(self) -> Kit:
        """The administrator's own kit."""
        return read_kit(self.kit_path(ADMIN))

    def kit_path(self, name: str) -> Path:
        """Where a member's kit is put by default."""
        return self.path / "kits" / f"{name}.kit"

    def enrol(self, name: str, *, role: FleetRole, days: int, out: Path | None, reinstate: bool) -> Path:
        """Give a new member its certificate; returns the kit.

        Raises:
            UsageError: the name cannot be used.
            StorageError: something cannot be written.
        """
        check_new_name(self.registry, name, role=role, reinstate=reinstate)
        return self._issue_kit(name, role=role, days=days, out=out)

    def renew(self, name: str, *, days: int, out: Path | None, revoke_old: bool) -> Path:
        """Give a member a new certificate and key; returns its kit, or the folder of the broker's files.

        The old certificate goes on until it expires, unless ``revoke_old`` puts it on the revocation list.

        Raises:
            UsageError: no member has the name, or it was revoked.
            StorageError: something cannot be written.
        """
        entry = self.registry.require(name)
        if entry.revoked_at is not None:
            raise UsageError(f"{name} was revoked; `edgeflame fleet enrol FOLDER {name} --reinstate` takes it in again")
        if entry.role == BROKER:
            made = self._issue_broker_certificate(days=days)
        else:
            made = self._issue_kit(name, role=entry.role, days=days, out=out)
        if revoke_old:
            self._save_registry(with_older_revoked(self.registry, name=name, now=_now()))
            self._write_revocations()
        return made

    def revoke(self, name: str, *, reason: str) -> None:
        """Take a member's certificates back: in the registry, on the revocation list, in the broker's files.

        Raises:
            UsageError: no member has the name.
            StorageError: something cannot be written.
        """
        self._save_registry(with_revoked(self.registry, name=name, reason=reason, now=_now()))
        self._write_revocations()

    def issue_own_certificates(self) -> None:
        """Certificates for the broker, the aggregator and the administrator."""
        self._issue_broker_certificate(days=DEFAULT_DAYS)
        self._issue_kit(AGGREGATOR, role="aggregator", days=DEFAULT_DAYS, out=None)
        self._issue_kit(ADMIN, role="admin", days=DEFAULT_DAYS, out=None)

    def write_access(self) -> None:
        """Write the rights into the file that a broker reads when it starts; a running one does not read it."""
        registry = self.registry
        data = broker_control.dynamic_security(registry.clients(), registry.fleet)
        self._write_broker_file(broker_control.DYNAMIC_SECURITY, data, SECRET_MODE)

    def _issue_kit(self, name: str, *, role: FleetRole, days: int, out: Path | None) -> Path:
        registry = self.registry
        issued = self._issue_certificate(name, role, days)
        kit = Kit(
            fleet=registry.fleet,
            name=name,
            role=role,
            broker=registry.url,
            expires=issued.not_after,
            ca=self._authority().cert.decode(),
            cert=issued.cert.decode(),
            key=issued.key.decode(),
        )
        path = out or self.kit_path(name)
        with storage_errors(path, "create the folder of"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._save_registry(with_enrolled(registry, name=name, role=role, issued=issued))
        atomic_write(path, encode_kit(kit), mode=SECRET_MODE)
        return path

    def _issue_broker_certificate(self, *, days: int) -> Path:
        issued = self._issue_certificate(BROKER, BROKER, days, hosts=self.registry.hosts)
        self._save_registry(with_enrolled(self.registry, name=BROKER, role=BROKER, issued=issued))
        self._write_broker_file(broker_control.SERVER_KEY, issued.key, SECRET_MODE)
        self._write_broker_file(broker_control.SERVER_CERT, issued.cert, PUBLIC_MODE)
        return self.broker_files

    def _issue_certificate(self, name: str, role: FleetRole, days: int, hosts: Sequence[str] = ()) -> IssuedCertificate:
        now = _now()
        until = now + timedelta(days=days)
        fleet = self.registry.fleet
        return issue_certificate(
            self._authority(), name=name, fleet=fleet, role=role, now=now, not_after=until, hosts=hosts
        )

    def _authority(self) -> IssuedCertificate:
        folder = self.path / "ca"
        with storage_errors(folder, "read the fleet's authority in"):
            return read_authority((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())

    def _save_registry(self, registry: Registry) -> None:
        write_json(self.path / REGISTRY_FILE, registry, indent=2, mode=SECRET_MODE)
        self.registry = registry

    def _write_revocations(self) -> None:
        listed = make_revocation_list(self._authority(), self.registry.revocations(), now=_now())
        self._write_broker_file(broker_control.REVOCATION_LIST, listed, PUBLIC_MODE)

    def _write_broker_file(self, name: str, data: bytes, mode: int) -> None:
        """Write a file of the broker's, owned by whoever owns the folder, so that the broker can read it."""
        path = self.broker_files / name
        atomic_write(path, data, mode=mode)
        owner = self.broker_files.stat()
        if path.stat().st_uid != owner.st_uid:
            with storage_errors(path, "give to the folder's owner"):
                os.chown(path, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def open_fleet(path: Path) -> Iterator[FleetFolder]:
    """A fleet's folder, for one process at a time.

    Raises:
        UsageError: there is no fleet.
        StorageError: it is damaged, or in use.
    """
    FleetFolder(path)  # raises if there is none, before a lock file is made
    with locked_state_dir(path):
        yield FleetFolder(path)


def make_fleet(
    path: Path,
    *,
    fleet: str,
    hosts: Sequence[str],
    port: int,
    bind: str | None,
    install_dir: PurePosixPath | None,
    plugin: PurePosixPath | None,
    broker_user: str | None,
    replace: bool,
) -> FleetFolder:
    """Make a fleet: authority, signing key, the broker's files, the aggregator's and the administrator's kits.

    Args:
        path: the folder; it must not hold a fleet.
        fleet: its name.
        hosts: names and addresses by which the broker is reached; kits get the first.
        port: the broker's.
        bind: the address it listens on; None for all.
        install_dir: where the broker's files will lie on its machine; None: where they are made.
        plugin: the ``dynamic-security`` plugin there; None: looked for here.
        broker_user: the account that a broker started by root changes to; None: its own default.
        replace: an earlier fleet in ``path`` is put aside, whole, under another name.

    Raises:
        UsageError: a name, host or path cannot be one, or there is a fleet already.
        StorageError: the folder cannot be written.
    """
    check_name("fleet", fleet)
    broker_dir = PurePosixPath((path / "broker").absolute()) if install_dir is None else install_dir
    if not broker_dir.is_absolute() or any(character in str(broker_dir) for character in "\r\n"):
        raise UsageError(f"--install-dir {str(broker_dir)!r}: expected an absolute path on the broker's machine")
    settings = broker_control.BrokerSettings(
        fleet=fleet,
        port=port,
        bind=bind,
        folder=broker_dir,
        plugin=plugin or broker_control.find_plugin(),
        user=broker_user,
    )
    now = _now()
    authority = make_authority(fleet, now=now)
    # Refuses a bad host name before anything is on the disk.
    issue_certificate(authority, name=BROKER, fleet=fleet, role=BROKER, now=now, not_after=now, hosts=hosts)
    _clear_folder(path, replace=replace, now=now)
    with storage_errors(path, "create the fleet's folder"):
        for folder in (path, path / "ca", path / "broker", path / "broker" / broker_control.DATA_FOLDER, path / "kits"):
            folder.mkdir(mode=0o700, parents=folder == path, exist_ok=True)
            folder.chmod(0o700)
    with locked_state_dir(path):
        atomic_write(path / "ca" / "ca.key", authority.key, mode=SECRET_MODE)
        atomic_write(path / "ca" / "ca.crt", authority.cert, mode=PUBLIC_MODE)
        write_keys(path / "signing")
        (path / "signing").chmod(0o700)
        registry = Registry(fleet=fleet, hosts=tuple(hosts), port=port, created=now)
        write_json(path / REGISTRY_FILE, registry, indent=2, mode=SECRET_MODE)
        made = FleetFolder(path)
        files = made.broker_files
        atomic_write(files / broker_control.CA_CERT, authority.cert, mode=PUBLIC_MODE)
        atomic_write(
            files / broker_control.CONFIG_FILE, broker_control.mosquitto_conf(settings).encode(), mode=PUBLIC_MODE
        )
        atomic_write(
            files / broker_control.REVOCATION_LIST, make_revocation_list(authority, (), now=now), mode=PUBLIC_MODE
        )
        made.issue_own_certificates()
        made.write_access()
        return made


def _clear_folder(path: Path, *, replace: bool, now: datetime) -> None:
    with storage_errors(path, "look into"):
        if not path.exists() or not any(path.iterdir()):
            return
        holds_fleet = (path / REGISTRY_FILE).exists()
    if not holds_fleet:
        raise UsageError(f"{path}: the folder is not empty and holds no fleet; choose another")
    if not replace:
        raise UsageError(
            f"{path}: there is a fleet already, and its kits would be worth nothing; --replace puts it aside"
        )
    with storage_errors(path, "put aside"):
        path.rename(path.with_name(f"{path.name}.replaced-{now:%Y%m%dT%H%M%S}"))


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
