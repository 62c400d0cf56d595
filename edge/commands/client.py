"""Sending a command to a line and waiting for its answer."""

from __future__ import annotations

import os
import queue
import time
import uuid

import msgspec

from edge.commands.messages import Command, Reply
from edge.status import LineState
from edgeflame.errors import LinkError
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.connection import ClientEvent, Connected, ConnectionFailed, ReceivedMessage
from edgeflame.mqtt.topics import Topics, check_name
from edgeflame.mqtt.url import BrokerUrl

STATE_GRACE_S = 1.0
"""The retained state comes right after the subscription; a line without one has never been connected."""


REPEAT_S = 2.0
"""A command may be lost in a flood, or while the line's connection is made anew: it is said again after so long."""


def new_id() -> str:
    """An id for a command."""
    return uuid.uuid4().hex


def send_command(
    url: BrokerUrl, *, fleet: str, line: str, command: Command, timeout_s: float, connect_timeout_s: float = 10.0
) -> Reply:
    """Send a command and wait for the answer.

    Raises:
        LinkError: the broker cannot be reached or refuses us, or the line is not there or does not answer.
    """
    topics = Topics(fleet=fleet)
    check_name("line", line)
    events: queue.SimpleQueue[ClientEvent] = queue.SimpleQueue()
    link = MqttClient(
        url,
        client_id=f"edgeflame-command-{os.getpid()}-{os.urandom(4).hex()}",
        filters=[topics.line_state(line), topics.line_reply(line)],
        sink=events.put,
        connect_timeout_s=connect_timeout_s,
    )
    try:
        return _converse(link, events, topics, line, command, timeout_s)
    finally:
        link.close(flush_s=0.5)


def _converse(
    link: MqttClient,
    events: queue.SimpleQueue[ClientEvent],
    topics: Topics,
    line: str,
    command: Command,
    timeout_s: float,
) -> Reply:
    state: LineState | None = None
    deadline: float | None = None
    grace = say_again = 0.0
    while True:
        try:
            event = events.get(timeout=0.1)
        except queue.Empty:
            event = None
        now = time.monotonic()
        match event:
            case ConnectionFailed(error=error):
                raise error
            case Connected():
                deadline, grace, say_again = now + timeout_s, now + STATE_GRACE_S, now
            case ReceivedMessage():
                event.done()
                if event.topic == topics.line_reply(line):
                    reply = _reply(event.payload)
                    if reply is not None and reply.id == command.id:
                        return reply
                elif (heard := _state(event.payload)) is not None:
                    state = heard
                    if not event.retained:
                        # The line has just come, and may not have heard us.
                        say_again = now
            case _:
                pass
        if deadline is None:
            continue
        if now >= say_again:
            # A command of the same id is answered again and not done twice.
            link.publish(topics.line_command(line), msgspec.json.encode(command))
            say_again = now + REPEAT_S
        if state is not None and not state.online and now > grace:
            raise LinkError(
                f"line {line} is offline: the broker last saw it with model {state.model} on {state.source}"
            )
        if state is None and now > grace:
            raise LinkError(
                f"no line {line!r} has ever announced itself on this broker in the fleet {topics.fleet!r}; is its name "
                "right, and does its configuration have [mqtt]?"
            )
        if now > deadline:
            raise LinkError(
                f"line {line} has not answered within {timeout_s:g} s; may we send commands (see its log and ours)?"
            )


def _reply(payload: bytes) -> Reply | None:
    try:
        return msgspec.json.decode(payload, type=Reply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _state(payload: bytes) -> LineState | None:
    try:
        return msgspec.json.decode(payload, type=LineState)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
