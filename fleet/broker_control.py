"""Mosquitto for a fleet: its configuration, the clients' rights, and changing them on a running broker.

The configuration is mutual TLS on one port, rights by certificate name, and room for our messages.

Rights are rules of Mosquitto's ``dynamic-security`` plugin, made by pure functions. Nothing is allowed but what is
listed here. Each identity has a role of its own on the broker, which holds its rights by name: a site publishes
only below its own name, and reads what is for it or for all.

Why rights and not the plugin's ``disabled`` flag keep a revoked client out: with ``use_identity_as_username``
Mosquitto (2.0 and 2.1) takes a client's certificate for its authentication and never asks the plugin whether the
client is disabled. Disabling throws a connected client out; taking its rights away is what keeps it from coming
back.

:class:`BrokerControl` is the administrator's connection to a running broker: it sets the clients and their rights.
"""

from __future__ import annotations

import sysconfig
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

import msgspec

from edgeflame.errors import FederationError, LinkError
from edgeflame.log import EventLog
from edgeflame.mqtt.connection import MAX_PACKET_BYTES, ReceivedMessage
from edgeflame.mqtt.kit import FleetRole
from edgeflame.mqtt.messages import Presence, TurnedAway, decode_presence, encode_message
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import ROOT, Topics
from edgeflame.mqtt.url import BrokerUrl
from fleet.registry import BrokerClient

ENROLLED_ROLES: tuple[FleetRole, ...] = ("site", "line", "observer", "operator", "publisher")
"""What ``enrol`` may make; broker, aggregator and administrator are made with the fleet, one of each."""

_CONTROL_TOPICS = "$CONTROL/dynamic-security/#"


class AclRule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, as the plugin's JSON has it."""

    acltype: Literal["publishClientSend", "publishClientReceive", "subscribePattern"]
    topic: str
    priority: int = 0
    allow: bool = True


def acl_rules(client: BrokerClient, fleet: str) -> tuple[AclRule, ...]:
    """The rules of what an identity may publish and read; none for a revoked one."""
    if not client.is_active:
        return ()
    base, name = f"{ROOT}/{fleet}", client.name
    shared = (f"{base}/round", f"{base}/aggregator/presence", f"{base}/model/#")
    match client.role:
        case "site":
            own = f"{base}/site/{name}"
            return (
                *_may_write(f"{own}/up/#", f"{own}/presence"),
                *_may_read(*shared, f"{base}/blob/#", f"{own}/down/#", f"{own}/presence"),
            )
        case "line":
            own = f"{base}/line/{name}"
            return (*_may_write(f"{own}/#"), *_may_read(*shared, f"{base}/release/#", f"{own}/#"))
        case "operator":
            # Sends commands to lines and reads what they publish; no packages.
            return (*_may_write(f"{base}/line/+/command"), *_may_read(f"{base}/model/#", f"{base}/line/#"))
        case "publisher":
            # Brings packages to the lines, and none of it touches the training.
            return (
                *_may_write(*(f"{base}/{part}/#" for part in ("model", "release")), f"{base}/line/+/command"),
                *_may_read(f"{base}/model/#", f"{base}/line/#"),
            )
        case "observer":
            of_sites = (f"{base}/site/+/{part}" for part in ("presence", "up/message", "down/message"))
            return _may_read(*shared, *of_sites, f"{base}/status/#", f"{base}/line/#")
        case "aggregator":
            # All of the fleet's topics, but never in a site's or a line's name, nor what lines are to run.
            others = ("site/+/up/#", "site/+/presence", "line/#", "model/#", "release/#")
            never = (
                AclRule(acltype="publishClientSend", topic=f"{base}/{topic}", priority=10, allow=False)
                for topic in others
            )
            return (*_may_write(f"{base}/#"), *never, *_may_read(f"{base}/#"))
        case "broker":
            return ()
        case "admin":
            presence = f"{base}/site/+/presence"
            return (
                *_may_write(_CONTROL_TOPICS, presence, f"{base}/site/+/down/message"),
                *_may_read(_CONTROL_TOPICS, presence),
            )


def readable_topic(client: BrokerClient, fleet: str) -> str:
    """A topic or filter that an identity may subscribe to, for testing a connection."""
    return next(rule.topic for rule in acl_rules(client, fleet) if rule.acltype == "subscribePattern")


def dynamic_security(clients: Sequence[BrokerClient], fleet: str) -> bytes:
    """The plugin's configuration file for a broker that starts with these clients."""
    active = [client for client in clients if client.is_active]
    document = {
        "defaultACLAccess": {
            "publishClientSend": False,
            "publishClientReceive": False,
            "subscribe": False,
            "unsubscribe": True,
        },
        "clients": [
            {"username": client.name, "textname": client.role, "roles": [{"rolename": client.name}]}
            for client in active
        ],
        "groups": [],
        "roles": [{"rolename": client.name, "acls": _acls(client, fleet)} for client in active],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def sync_commands(
    wanted: Sequence[BrokerClient], fleet: str, *, clients: Sequence[dict[str, Any]], roles: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The commands that give a running broker the identities ``wanted``; as few as possible.

    Every change of a client throws it out for a moment, so what is right already is left alone. Clients that the
    broker knows and the fleet does not are left alone as well: a person put them there.

    Args:
        wanted: the fleet's identities, revoked ones too.
        fleet: its name.
        clients: the broker's answer to ``listClients``, verbose.
        roles: its answer to ``listRoles``, verbose.
    """
    known = {entry["username"]: entry for entry in clients}
    known_roles = {entry["rolename"]: entry.get("acls", []) for entry in roles}
    todo: list[dict[str, Any]] = []
    for client in wanted:
        entry = known.get(client.name)
        mine = [{"rolename": client.name}]
        if not client.is_active:
            if entry is not None and (_role_names(entry) or not entry.get("disabled")):
                todo.append({"command": "modifyClient", "username": client.name, "roles": []})
                todo.append({"command": "disableClient", "username": client.name})
            continue
        acls = _acls(client, fleet)
        if client.name not in known_roles:
            todo.append({"command": "createRole", "rolename": client.name, "acls": acls})
        elif _rule_keys(known_roles[client.name]) != _rule_keys(acls):
            todo.append({"command": "modifyRole", "rolename": client.name, "acls": acls})
        if entry is None:
            named = {"username": client.name, "textname": client.role, "roles": mine}
            todo.append({"command": "createClient", **named})
            continue
        if _role_names(entry) != {client.name}:
            todo.append({"command": "modifyClient", "username": client.name, "roles": mine})
        if entry.get("disabled"):
            todo.append({"command": "enableClient", "username": client.name})
    return todo


def _may_read(*filters: str) -> tuple[AclRule, ...]:
    return tuple(
        rule
        for topic in filters
        for rule in (
            AclRule(acltype="subscribePattern", topic=topic),
            AclRule(acltype="publishClientReceive", topic=topic),
        )
    )


def _may_write(*filters: str) -> tuple[AclRule, ...]:
    return tuple(AclRule(acltype="publishClientSend", topic=topic) for topic in filters)


def _acls(client: BrokerClient, fleet: str) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(rule) for rule in acl_rules(client, fleet)]


def _role_names(entry: dict[str, Any]) -> set[str]:
    return {role["rolename"] for role in entry.get("roles", ())}


def _rule_keys(acls: Sequence[dict[str, Any]]) -> set[tuple[str, str, int, bool]]:
    return {
        (acl["acltype"], acl["topic"], max(int(acl.get("priority", 0)), 0), bool(acl.get("allow", False)))
        for acl in acls
    }


PLUGIN_FILE = "mosquitto_dynamic_security.so"

CA_CERT, SERVER_CERT, SERVER_KEY = "ca.crt", "server.crt", "server.key"
REVOCATION_LIST, DYNAMIC_SECURITY = "crl.pem", "dynamic-security.json"
CONFIG_FILE, DATA_FOLDER = "mosquitto.conf", "data"

_TEMPLATE = """\
# Mosquitto for the EdgeFlame fleet {fleet}; written by `edgeflame fleet init`. Tested with 2.0.11, good for 2.1.
# One port, TLS 1.2 or newer, and nobody without a certificate of the fleet's own authority.
{user}
listener {port}{bind}
cafile {folder}/{ca}
certfile {folder}/{cert}
keyfile {folder}/{key}
crlfile {folder}/{crl}
tls_version tlsv1.2
require_certificate true
# The certificate's common name is the client's name; its rights hang on that (and the password is never asked for).
use_identity_as_username true
allow_anonymous false

# Rights. The broker writes this file itself when `edgeflame fleet enrol` and `revoke` change them.
plugin {plugin}
plugin_opt_config_file {folder}/{dynsec}

# The largest packet is a chunk or a message of 1 MiB. Mosquitto 2.1 would allow 2,000,000 bytes by default.
max_packet_size {max_packet_bytes}
# What one client may be behind before messages are dropped (the transfer repairs that, slowly). By default 1000
# messages; an aggregator with 100 sites has 16 chunks of each on their way, besides heartbeats.
max_inflight_messages 100
max_queued_messages 20000
max_queued_bytes 536870912
# The round state and who is there are retained; they outlive a restart of the broker.
persistence true
persistence_location {folder}/{data}
autosave_interval 60
set_tcp_nodelay true

log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
connection_messages true
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """What differs from broker to broker.

    Attributes:
        fleet: its name, for the file's heading.
        port: to listen on, with TLS.
        bind: the address to listen on; None for all.
        folder: where this configuration lies on the broker's machine.
        plugin: the ``dynamic-security`` plugin's file there.
        user: the account that a broker started by root changes to; None for its own default (``mosquitto``).
    """

    fleet: str
    port: int
    bind: str | None
    folder: PurePosixPath
    plugin: PurePosixPath
    user: str | None = None


def mosquitto_conf(settings: BrokerSettings) -> str:
    """The text of ``mosquitto.conf``."""
    return _TEMPLATE.format(
        fleet=settings.fleet,
        user="" if settings.user is None else f"\nuser {settings.user}",
        port=settings.port,
        bind="" if settings.bind is None else f" {settings.bind}",
        folder=settings.folder,
        ca=CA_CERT,
        cert=SERVER_CERT,
        key=SERVER_KEY,
        crl=REVOCATION_LIST,
        plugin=settings.plugin,
        dynsec=DYNAMIC_SECURITY,
        max_packet_bytes=MAX_PACKET_BYTES,
        data=DATA_FOLDER,
    )


def find_plugin() -> PurePosixPath:
    """The plugin on this machine, or where Debian puts it."""
    debian = Path("/usr/lib") / str(sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu") / PLUGIN_FILE
    others = (Path("/usr/lib") / PLUGIN_FILE, Path("/usr/lib64") / PLUGIN_FILE, Path("/usr/local/lib") / PLUGIN_FILE)
    found = next((path for path in (debian, *others) if path.exists()), debian)
    return PurePosixPath(found)


log = EventLog("fleet")

_REQUEST = "$CONTROL/dynamic-security/v1"
_RESPONSE = "$CONTROL/dynamic-security/v1/response"
ANSWER_TIMEOUT_S = 10.0


class BrokerControl:
    """A connection of the administrator to the broker; a context manager.

    Args:
        url: with the administrator's certificate.
        fleet: its name.
        connect_timeout_s: how long to try.

    Raises:
        LinkError: the broker cannot be reached, or refuses us; here and in every method.
    """

    def __init__(self, url: BrokerUrl, *, fleet: str, connect_timeout_s: float) -> None:
        self._topics = Topics(fleet=fleet)
        self._url = url
        self._presences: dict[str, Presence] = {}
        filters = (_RESPONSE, self._topics.all_site_presences())
        self._session = Session(url, name="admin", filters=filters, connect_timeout_s=connect_timeout_s)

    def __enter__(self) -> BrokerControl:
        self._session.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.close()

    def sync(self, clients: Sequence[BrokerClient]) -> int:
        """Give the broker exactly these clients; returns how many commands that took.

        Raises:
            FederationError: the broker refused one.
        """
        known = self._request([{"command": "listClients", "verbose": True, "count": -1, "offset": 0}])[0]["data"][
            "clients"
        ]
        roles = self._request([{"command": "listRoles", "verbose": True, "count": -1, "offset": 0}])[0]["data"]["roles"]
        todo = sync_commands(clients, self._topics.fleet, clients=known, roles=roles)
        if todo:
            self._request(todo)
        return len(todo)

    def notify_revoked(self, site: str, reason: str) -> bool:
        """Tell a connected site that it is revoked, and why; returns whether the site was online.

        It also publishes the site's presence as offline, because its own last will has no rights any more.
        """
        for message in self._session.retained():
            self._note_presence(message)
            if site in self._presences:
                break
        presence = self._presences.get(site)
        if presence is None or not presence.online:
            return False
        detail = f"this site was revoked by the fleet's administrator: {reason or 'no reason was given'}"[:500]
        self._session.publish(
            self._topics.site_down(site),
            encode_message(TurnedAway(boot=presence.boot, reason="revoked", detail=detail)),
        )
        gone = Presence(boot=presence.boot, online=False)
        self._session.publish(self._topics.site_presence(site), encode_message(gone), retain=True)
        return True

    def _request(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send commands in one message; the broker's responses, in the order of the commands."""
        mark = uuid.uuid4().hex
        marked = [{**command, "correlationData": f"{mark}-{number}"} for number, command in enumerate(commands)]
        responses: dict[int, dict[str, Any]] = {}

        def collect(message: ReceivedMessage) -> bool | None:
            for response in self._read_responses(message):
                found, _, which = str(response.get("correlationData", "")).partition("-")
                if found == mark:
                    responses[int(which)] = response
            return True if len(responses) == len(commands) else None

        payload = msgspec.json.encode({"commands": marked})
        if not self._session.request(_REQUEST, payload, collect, timeout_s=ANSWER_TIMEOUT_S):
            raise LinkError(
                f"the broker {self._url.address} did not answer within {ANSWER_TIMEOUT_S:g} s; is its "
                "dynamic-security plugin configured (edgeflame fleet init writes such a configuration)?"
            )
        for index, command in enumerate(commands):
            if error := responses[index].get("error"):
                name = command.get("username", "")
                raise FederationError(f"the broker {self._url.address} refuses {command['command']} of {name}: {error}")
        return [responses[number] for number in range(len(commands))]

    def _read_responses(self, message: ReceivedMessage) -> list[dict[str, Any]]:
        if message.topic != _RESPONSE:
            self._note_presence(message)
            return []
        try:
            document = msgspec.json.decode(message.payload, type=dict[str, list[dict[str, Any]]])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise FederationError(f"the broker {self._url.address} gave an answer that cannot be read ({exc})") from exc
        return document.get("responses", [])

    def _note_presence(self, message: ReceivedMessage) -> None:
        site = getattr(self._topics.parse(message.topic), "site", None)
        if site is not None and message.payload:
            try:
                self._presences[site] = decode_presence(message.payload)
            except FederationError as exc:
                log.warning("message_refused", topic=message.topic, reason=str(exc))
