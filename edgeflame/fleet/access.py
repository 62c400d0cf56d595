"""Who may say and read what on the broker, as rules of Mosquitto's ``dynamic-security`` plugin. Pure.

Nothing is allowed but what is listed here. Each identity has a role of its own on the broker, which holds its rights
by name: a site speaks only below its own name, and reads what is for it or for all.

Why rights and not the plugin's ``disabled`` flag keep a revoked client out: with ``use_identity_as_username``
Mosquitto (2.0 and 2.1) takes a client's certificate for its authentication and never asks the plugin whether the
client is disabled. Disabling throws a connected client out; taking its rights away is what keeps it from coming back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from edgeflame.topics import ROOT

Role = Literal["site", "line", "observer", "operator", "publisher", "aggregator", "admin", "broker"]
ENROLLED_ROLES: tuple[Role, ...] = ("site", "line", "observer", "operator", "publisher")
"""What ``enrol`` may make; broker, aggregator and administrator are made with the fleet, one of each."""

_CONTROL = "$CONTROL/dynamic-security/#"


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, as the plugin's JSON has it."""

    acltype: Literal["publishClientSend", "publishClientReceive", "subscribePattern"]
    topic: str
    priority: int = 0
    allow: bool = True


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """An identity as the broker knows it. Without rights it is nobody: revoked."""

    name: str
    """The common name of its certificate."""
    role: Role
    is_active: bool = True


def grants(client: Client, fleet: str) -> tuple[Grant, ...]:
    """What an identity may do."""
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
            # Commands lines, and hears what they say; brings them nothing new.
            return (*_may_write(f"{base}/line/+/command"), *_may_read(f"{base}/model/#", f"{base}/line/#"))
        case "publisher":
            # Brings packages to the lines, and none of it touches the training.
            return (
                *_may_write(*(f"{base}/{part}/#" for part in ("model", "release")), f"{base}/line/+/command"),
                *_may_read(f"{base}/model/#", f"{base}/line/#"),
            )
        case "observer":
            spoken = (f"{base}/site/+/{part}" for part in ("presence", "up/message", "down/message"))
            return _may_read(*shared, *spoken, f"{base}/status/#", f"{base}/line/#")
        case "aggregator":
            # All of the fleet's topics, but never in a site's or a line's name, nor what lines are to run.
            others = ("site/+/up/#", "site/+/presence", "line/#", "model/#", "release/#")
            never = (
                Grant(acltype="publishClientSend", topic=f"{base}/{topic}", priority=10, allow=False)
                for topic in others
            )
            return (*_may_write(f"{base}/#"), *never, *_may_read(f"{base}/#"))
        case "broker":
            return ()
        case "admin":
            presence = f"{base}/site/+/presence"
            return (
                *_may_write(_CONTROL, presence, f"{base}/site/+/down/message"),
                *_may_read(_CONTROL, presence),
            )


def readable_topic(client: Client, fleet: str) -> str:
    """A topic, or filter, that an identity may subscribe to."""
    return next(grant.topic for grant in grants(client, fleet) if grant.acltype == "subscribePattern")


def dynamic_security(clients: Sequence[Client], fleet: str) -> bytes:
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


def commands(
    wanted: Sequence[Client], fleet: str, *, clients: Sequence[dict[str, Any]], roles: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What to tell a running broker so that it knows ``wanted``; as little as possible.

    Every change of a client throws it out for a moment, so what is right already is left alone. Clients that the
    broker knows and the fleet does not are left alone as well: somebody put them there.

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
        elif _rules(known_roles[client.name]) != _rules(acls):
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


def _may_read(*filters: str) -> tuple[Grant, ...]:
    return tuple(
        grant
        for topic in filters
        for grant in (
            Grant(acltype="subscribePattern", topic=topic),
            Grant(acltype="publishClientReceive", topic=topic),
        )
    )


def _may_write(*filters: str) -> tuple[Grant, ...]:
    return tuple(Grant(acltype="publishClientSend", topic=topic) for topic in filters)


def _acls(client: Client, fleet: str) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(grant) for grant in grants(client, fleet)]


def _role_names(entry: dict[str, Any]) -> set[str]:
    return {role["rolename"] for role in entry.get("roles", ())}


def _rules(acls: Sequence[dict[str, Any]]) -> set[tuple[str, str, int, bool]]:
    return {
        (acl["acltype"], acl["topic"], max(int(acl.get("priority", 0)), 0), bool(acl.get("allow", False)))
        for acl in acls
    }
