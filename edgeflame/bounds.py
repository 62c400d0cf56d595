"""What a configuration's key may be: types with bounds, and the words in which errors and the reference name them.

msgspec checks the bounds when a file, a message or a record is decoded. A struct made in code, and one made by
``msgspec.structs.replace``, is not checked: pass values from outside as overrides of
:func:`edgeflame.config.load_config`.
"""

from __future__ import annotations

import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from edgeflame.masking import without_secrets

_ABSENT = (type(None), msgspec.UnsetType)
"""TOML has no value for them: the key is left out."""

_LARGEST = 1e12
"""Far above what anybody means, and far below where arithmetic, dates or clocks overflow."""

Positive = Annotated[float, msgspec.Meta(gt=0, le=_LARGEST)]
"""A number above 0."""
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=_LARGEST)]
"""A number from 0."""
Seconds = Annotated[float, msgspec.Meta(gt=0, le=366 * 86_400)]
"""A time of up to a year."""
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
"""A share of a whole that is not nothing."""
Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
"""How many, at least one."""
NotNegativeCount = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
"""How many, none included."""
NumBytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
"""A size, up to a pebibyte."""
Seed = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
"""A seed, as every library takes it."""
LONGEST_SIDE = 10**6
"""Longest side of a picture."""
Pixel = Annotated[int, msgspec.Meta(ge=0, le=LONGEST_SIDE)]
"""A place along a side of a picture, from 0."""
Side = Annotated[int, msgspec.Meta(ge=1, le=LONGEST_SIDE)]
"""A length in pixels."""
NotEmpty = Annotated[str, msgspec.Meta(min_length=1)]
"""Some text."""
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
"""A TCP port."""
Register = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""An address of Modbus, from 0."""


class KeyMark(enum.Enum):
    """What a key is marked as, ``Annotated[T, BASIC]``."""

    BASIC = enum.auto()
    """A key that beginners need: the reference lists these first."""
    SECRET = enum.auto()
    """Errors do not show its value."""


BASIC = KeyMark.BASIC
SECRET = KeyMark.SECRET


def is_marked(hint: Any, mark: KeyMark) -> bool:
    """Whether a key's annotation has a mark."""
    return mark in getattr(hint, "__metadata__", ())


def options_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of ``X | Y``; of anything else itself alone."""
    if typing.get_origin(hint) is Annotated and not _metas(hint):
        return options_of(hint.__origin__)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(inner for option in typing.get_args(hint) for inner in options_of(option))
    return (hint,)


def expected(hint: Any, value: object = msgspec.UNSET) -> str:
    """What a value must be, in words: ``1..64``, ``> 0 or "median"``, ``a whole number``.

    Args:
        hint: the key's annotation.
        value: what came in its place; the kind of value is named only where this is of another kind.
    """
    said = [_expected_one(option, value) for option in options_of(hint) if option not in _ABSENT]
    return " or ".join(filter(None, (", ".join(said[:-1]), said[-1])))


def bounds(hint: Any) -> str:
    """The bounds of one annotated type in words; empty if it has none."""
    return ", ".join(filter(None, map(_bounds, _metas(hint))))


def shown(value: object) -> str:
    """A value as a TOML file has it, cut where it is long."""
    if isinstance(value, Mapping):
        return "a section"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    text = without_secrets(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


_NOUNS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _expected_one(hint: Any, value: object) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        limits = bounds(hint)
        plain = hint.__origin__
        same_kind = value is msgspec.UNSET or _is_a(value, plain)
        return limits if limits and same_kind else ", ".join(filter(None, (_expected_one(plain, value), limits)))
    if origin is typing.Literal:
        return " or ".join(map(shown, typing.get_args(hint)))
    if origin in (tuple, list, frozenset):
        inner = typing.get_args(hint)
        if origin is tuple and Ellipsis not in inner:
            return f"a list of {len(inner)} values, each {expected(inner[0])}"
        return f"a list, each value {expected(inner[0])}"
    if (isinstance(hint, type) and issubclass(hint, msgspec.Struct)) or origin is dict:
        return "a section"
    return _NOUNS.get(hint, str(hint))


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    kind = typing.get_origin(kind) or kind
    if kind is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(value, (int, float) if kind is float else kind)


def _metas(hint: Any) -> list[msgspec.Meta]:
    return [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, msgspec.Meta)]


def _bounds(meta: msgspec.Meta) -> str:
    if meta.description is not None:
        return meta.description
    if meta.min_length is not None:
        return "not empty"
    low, high = meta.ge if meta.ge is not None else meta.gt, meta.le if meta.le is not None else meta.lt
    if low is None and high is None:
        return ""
    multiple = f"a multiple of {meta.multiple_of} " if meta.multiple_of else ""
    if high is None:
        return f"{multiple}{'>=' if meta.gt is None else '>'} {_number(low)}"
    if low is None:
        return f"{multiple}{'<=' if meta.lt is None else '<'} {_number(high)}"
    if meta.gt is None and meta.lt is None:
        return f"{multiple}{_number(low)}..{_number(high)}"
    return f"in {'[' if meta.gt is None else '('}{_number(low)}, {_number(high)}{']' if meta.lt is None else ')'}"


def _number(value: float | None) -> str:
    assert value is not None
    if not math.isfinite(value) or value != int(value):
        return f"{value:g}"
    digits, _, zeros = f"{value:.0e}".partition("e+")
    return f"{digits}e{int(zeros)}" if value >= 1e7 and value == float(f"{digits}e{zeros}") else f"{value:.0f}"
