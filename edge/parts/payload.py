"""A message that announces a part: JSON, or the part's name as it is. Pure."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

import msgspec

from edgeflame.errors import DataError

MAX_PAYLOAD_BYTES = 64 * 1024
MAX_NAME_CHARS = 200
MAX_NUMBER = 2**62
"""Larger ones are no counters; and SQLite, PLCs and JavaScript could not hold them."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What a message says of a part."""

    part_id: str | None
    number: int | None
    time: dt.datetime | None


def read_announcement(
    payload: bytes, *, part_id_key: str = "part_id", number_key: str = "number", time_key: str = "time"
) -> Announcement:
    """Read a message.

    Args:
        payload: a JSON object with these keys, others being ignored, or the part's name as UTF-8 text.
        part_id_key: of a text or an integer.
        number_key: of an integer; may be missing. A part needs a name or a number.
        time_key: of an ISO 8601 time with its offset from UTC, or of seconds since 1970; may be missing.

    Raises:
        DataError: it is neither, or its values make no sense.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        msg = f"{len(payload)} bytes; a part is announced in at most {MAX_PAYLOAD_BYTES}"
        raise DataError(msg)
    if not payload.lstrip().startswith(b"{"):
        return Announcement(part_id=_name(_text(payload).strip()), number=None, time=None)
    try:
        message = msgspec.json.decode(payload, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        msg = f"not JSON ({exc})"
        raise DataError(msg) from exc
    part_id, number, time = message.get(part_id_key), message.get(number_key), message.get(time_key)
    if number is not None and (type(number) is not int or not 0 <= number <= MAX_NUMBER):
        msg = f"{number_key} must be an integer from 0 to 2^62, not {str(number)[:50]!r}"
        raise DataError(msg)
    if part_id is None and number is None:
        msg = f"neither {part_id_key} nor {number_key} in it"
        raise DataError(msg)
    if part_id is not None and type(part_id) is not int and not isinstance(part_id, str):
        msg = f"{part_id_key} must be a text or an integer, not {str(part_id)[:50]!r}"
        raise DataError(msg)
    return Announcement(
        part_id=None if part_id is None else _name(str(part_id)),
        number=number,
        time=None if time is None else _time(time, time_key),
    )


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as exc:
        msg = "neither JSON nor text"
        raise DataError(msg) from exc


def _name(text: str) -> str:
    if not (0 < len(text) <= MAX_NAME_CHARS and text.isprintable()):
        msg = f"a part's name has 1 to {MAX_NAME_CHARS} printable characters, not {text[:50]!r}"
        raise DataError(msg)
    return text


def _time(value: Any, key: str) -> dt.datetime:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return dt.datetime.fromtimestamp(value, dt.timezone.utc)
        time = msgspec.convert(value, dt.datetime)
        if time.tzinfo is None:
            raise ValueError(value)
        return time.astimezone(dt.timezone.utc)
    except (msgspec.ValidationError, ValueError, OverflowError, OSError) as exc:
        msg = f"{key} must be an ISO 8601 time with its offset from UTC, or seconds since 1970, not {str(value)[:50]!r}"
        raise DataError(msg) from exc
