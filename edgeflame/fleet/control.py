"""Telling a running broker who its clients are: Mosquitto's ``dynamic-security`` over MQTT, as the administrator."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec

from edgeflame.brokerurl import BrokerUrl
from edgeflame.console import EventLog
from edgeflame.errors import FederationError, LinkError
from edgeflame.fleet import access
from edgeflame.link import Link
from edgeflame.linkevents import Event, Failed, Received, Up
from edgeflame.messages import Presence, Turned, decode_presence, encode
from edgeflame.topics import Topics

log = EventLog("fleet")

_REQUEST = "$CONTROL/dynamic-security/v1"
_RESPONSE = "$CONTROL/dynamic-security/v1/response"
ANSWER_TIMEOUT_S = 10.0
PRESENCE_S = 0.5
"""Retained presences come right after the subscription; who has not been seen by then is not there."""


class Control:
    """A connection of the administrator to the broker; a context manager.

    Args:
        url: with the administrator's certificate.
        fleet: its name.
        connect_timeout_s: how long to try.

    Raises:
        LinkError: the broker cannot be reached, or refuses us; here and in every method.
    """

    def __init__(self, url: BrokerUrl, *, fleet: str, connect_timeout_s: float) -> None:
        self._address = url.address
        self._topics = Topics(fleet=fleet)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._presences: dict[str, Presence] = {}
        self._link = Link(
            url,
            client_id=f"edgeflame-admin-{uuid.uuid4().hex[:12]}",
            filters=[_RESPONSE, self._topics.all_site_presences()],
            sink=self._events.put,
            connect_timeout_s=connect_timeout_s,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self._link.close()
            raise

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._link.close()

    def sync(self, clients: Sequence[access.Client]) -> int:
        """Make the broker know these clients; how many commands that took.

        Raises:
            FederationError: the broker refused one.
        """
        known = self._ask([{"command": "listClients", "verbose": True, "count": -1, "offset": 0}])[0]["data"]["clients"]
        roles = self._ask([{"command": "listRoles", "verbose": True, "count": -1, "offset": 0}])[0]["data"]["roles"]
        todo = access.commands(clients, self._topics.fleet, clients=known, roles=roles)
        if todo:
            self._ask(todo)
        return len(todo)

    def say_goodbye(self, site: str, reason: str) -> bool:
        """Tell a connected site that it is revoked, and why; whether there was one to tell.

        It also takes the site's place in saying that it is gone: its own last will has no rights any more.
        """
        deadline = time.monotonic() + PRESENCE_S
        while site not in self._presences and (left := deadline - time.monotonic()) > 0:
            self._take(left)
        presence = self._presences.get(site)
        if presence is None or not presence.online:
            return False
        detail = f"this site was revoked by the fleet's administrator: {reason or 'no reason was given'}"[:500]
        self._link.publish(self._topics.down(site), encode(Turned(boot=presence.boot, reason="revoked", detail=detail)))
        gone = Presence(boot=presence.boot, online=False)
        self._link.publish(self._topics.site_presence(site), encode(gone), retain=True)
        return True

    def _wait_until_up(self) -> None:
        while True:
            match self._events.get():
                case Up():
                    return
                case Failed(error=error):
                    raise error
                case _:
                    pass

    def _ask(self, todo: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        mark = uuid.uuid4().hex
        marked = [{**command, "correlationData": f"{mark}-{number}"} for number, command in enumerate(todo)]
        self._link.publish(_REQUEST, msgspec.json.encode({"commands": marked}))
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while len(answers) < len(todo):
            left = deadline - time.monotonic()
            if left <= 0:
                msg = (
                    f"the broker {self._address} did not answer within {ANSWER_TIMEOUT_S:g} s; is its "
                    "dynamic-security plugin configured (edgeflame fleet init writes such a configuration)?"
                )
                raise LinkError(msg)
            for answer in self._take(left):
                found, _, which = str(answer.get("correlationData", "")).partition("-")
                if found == mark:
                    answers[int(which)] = answer
        for index, command in enumerate(todo):
            if error := answers[index].get("error"):
                msg = (
                    f"the broker {self._address} refuses {command['command']} of {command.get('username', '')}: {error}"
                )
                raise FederationError(msg)
        return [answers[number] for number in range(len(todo))]

    def _take(self, timeout_s: float) -> list[dict[str, Any]]:
        """Deal with the next event; the answers in it."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Received):
            return []
        event.done()
        if event.topic == _RESPONSE:
            try:
                responses = msgspec.json.decode(event.payload, type=dict[str, list[dict[str, Any]]])
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                msg = f"the broker {self._address} gave an answer that cannot be read ({exc})"
                raise FederationError(msg) from exc
            return responses.get("responses", [])
        spoken = self._topics.parse(event.topic)
        site = getattr(spoken, "site", None)
        if site is not None and event.payload:
            try:
                self._presences[site] = decode_presence(event.payload)
            except FederationError as exc:
                log.warning("message_refused", topic=event.topic, reason=str(exc))
        return []
