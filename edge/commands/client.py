"""Sending a command to a line and waiting for its answer."""

from __future__ import annotations

import uuid
from typing import TypeVar

import msgspec

from edge.commands.messages import Command, Reply
from edge.status import LineState
from edgeflame.errors import LinkError
from edgeflame.mqtt.connection import ReceivedMessage
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import Topics, check_name
from edgeflame.mqtt.url import BrokerUrl

STATE_GRACE_S = 1.0
"""How long to wait for the line's retained state, seconds; a line without one has never been connected."""
REPEAT_S = 2.0
"""Time after which a command is sent again, seconds: it may be lost in a flood, or while the line reconnects."""

T = TypeVar("T", Reply, LineState)


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
    filters = (topics.line_state(line), topics.line_reply(line))
    payload = msgspec.json.encode(command)
    with Session(url, name="command", filters=filters, connect_timeout_s=connect_timeout_s) as session:

        def match(message: ReceivedMessage) -> Reply | None:
            if message.topic == topics.line_reply(line):
                reply = _decode(message.payload, Reply)
                return reply if reply is not None and reply.id == command.id else None
            state = _decode(message.payload, LineState)
            if state is not None:
                _require_online(line, state)
                if not message.retained:
                    # The line has just connected, and may not have received the command.
                    session.publish(topics.line_command(line), payload)
            return None

        _require_line(session, topics, line)
        # A repeated command with the same id is answered again, but not executed twice.
        reply = session.request(topics.line_command(line), payload, match, timeout_s=timeout_s, repeat_s=REPEAT_S)
    if reply is None:
        raise LinkError(
            f"line {line} has not answered within {timeout_s:g} s; may we send commands (see its log and ours)?"
        )
    return reply


def _require_line(session: Session, topics: Topics, line: str) -> None:
    """Wait until the line's state says that it is online; an offline one may come back within ``STATE_GRACE_S``."""
    state: LineState | None = None
    for message in session.messages(STATE_GRACE_S):
        if message.topic == topics.line_state(line):
            state = _decode(message.payload, LineState) or state
            if state is not None and state.online:
                return
    if state is None:
        raise LinkError(
            f"no line {line!r} has ever announced itself on this broker in the fleet {topics.fleet!r}; is its name "
            "right, and does its configuration have [mqtt]?"
        )
    _require_online(line, state)


def _require_online(line: str, state: LineState) -> None:
    if not state.online:
        raise LinkError(f"line {line} is offline: the broker last saw it with model {state.model} on {state.source}")


def _decode(payload: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
