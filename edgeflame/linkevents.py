"""What a link tells its user, and what it is given for the broker to say when it vanishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgeflame.errors import LinkError


@dataclass(frozen=True, kw_only=True)
class Will:
    """What the broker publishes, retained, when we vanish."""

    topic: str
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Up:
    """Connected and subscribed. ``chunk_bytes`` is the largest chunk to send, within the broker's packet limit."""

    chunk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Down:
    """The connection broke; the link is already trying again."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The link gave up; no further event comes."""

    error: LinkError


@dataclass(frozen=True, kw_only=True)
class Received:
    """A message. Call ``done`` when it is dealt with, in the order of arrival."""

    topic: str
    payload: bytes
    retained: bool = False
    """The broker had kept it; when it was said, is not known."""
    done: Callable[[], None] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The broker has a message that was published with this ``token``, or refuses it (``error``)."""

    token: int
    error: str | None = None


Event = Up | Down | Failed | Received | Sent
