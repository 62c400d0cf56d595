"""TOML files decoded straight into frozen structs; an unknown key or a wrong value is an error that names it.

A key has the name of its struct's attribute. Where a struct is also stored or sent under other names (msgspec's
``rename``), files do not see them.

A key that was renamed works for one version under its old name, with a warning. A struct says so beside its keys::

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"golden": "self_test"}
"""

from __future__ import annotations

import codecs
import datetime as dt
import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeflame.bounds import KeyMark, expected, is_marked, options_of, shown
from edgeflame.errors import ConfigError
from edgeflame.findings import Finding, note
from edgeflame.log import EventLog
from edgeflame.methods import merge_settings, start_from_presets

T = TypeVar("T")

log = EventLog("config")

_TOML_TYPES = (dt.datetime, dt.date, dt.time)
"""Types that TOML has and JSON has not; msgspec is to pass them on as they are."""

_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<key>.*)`)?", re.DOTALL)
"""How msgspec says where something is wrong."""


def load_config(
    path: Path | None,
    kind: type[T],
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Read a TOML file as ``kind``; the defaults when no path is given.

    Settings of a learning start from the preset they name, see :mod:`edgeflame.methods`.

    Args:
        path: the file.
        kind: a struct.
        overrides: what wins over the file, nested as it is and under today's keys; None leaves the file's value.
        defaults: what the file wins over, likewise; they win over a preset.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or does not fit ``kind``.
    """
    if path is None:
        return parse_config(b"", kind, "defaults", overrides, defaults)
    return parse_config(_read(path), kind, str(path), overrides, defaults)


def parse_config(
    data: bytes,
    kind: type[T],
    name: str,
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Decode TOML bytes as ``kind``; ``name`` is what errors call them, the rest as in :func:`load_config`.

    Raises:
        ConfigError: not TOML, or it does not fit ``kind``.
    """
    try:
        raw, renamed = _with_new_keys(_decode_toml(data), kind)
        for old, new in renamed.items():
            log.warning("old_key", file=name, key=old, use=new)
        given = merge_settings(_without_none(defaults or {}), raw)
        return _convert(merge_settings(given, _without_none(overrides or {})), kind)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc


def check_keys(path: Path, kind: type[msgspec.Struct]) -> Iterator[Finding]:
    """A note on each key that was renamed, of a file that :func:`load_config` reads.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        renamed = _with_new_keys(_decode_toml(_read(path)), kind)[1]
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    for old, new in renamed.items():
        yield note("configuration", f"{old} is the old name of {new}", f"call it {new}: the next version refuses {old}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path}: cannot read the configuration ({exc.strerror})") from exc


def _decode_toml(data: bytes) -> dict[str, Any]:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError("it is written in UTF-16, by its BOM; save it as UTF-8")
    try:
        raw = msgspec.toml.decode(data.removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as exc:
        # The parser lets through dates that are none, integers of thousands of digits, and hundreds of brackets.
        raise ConfigError("it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)) from exc
    assert isinstance(raw, dict)
    return raw


def _convert(raw: dict[str, Any], kind: type[T]) -> T:
    if unknown := unknown_key(raw, kind):
        raise ConfigError(unknown)
    filled = start_from_presets(raw, kind)
    try:
        return typing.cast(T, _convert_value(filled, kind))
    except (msgspec.ValidationError, ValueError, RecursionError) as exc:
        raise ConfigError(_what_is_wrong(filled, kind, str(exc))) from exc


def _convert_value(value: object, kind: Any) -> Any:
    return msgspec.convert(_stored_names(value, kind), kind, str_keys=True, builtin_types=_TOML_TYPES)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _without_none(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


# Walking along a file and its type


def _struct_for(value: object, hint: Any) -> type[msgspec.Struct] | None:
    """The struct that a table is to be decoded as; None for other values, and where its tag names none."""
    if not isinstance(value, Mapping):
        return None
    for option in options_of(hint):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            tag, field = option.__struct_config__.tag, option.__struct_config__.tag_field
            if tag is None or value.get(field) == tag:
                return option
    return None


def _table_of(value: object, hint: Any) -> Any | None:
    """The type of each value of a table of things by name; None where it is no such table."""
    if isinstance(value, Mapping):
        for option in options_of(hint):
            if typing.get_origin(option) is dict:
                return typing.get_args(option)[1]
    return None


def _hints(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The types of a struct's keys, by the names that files use."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return {name: hints[name] for name in struct.__struct_fields__}


def _inside(value: object, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """The known keys of a table, each with its value and type."""
    if struct := _struct_for(value, hint):
        hints = _hints(struct)
        yield from ((key, inner, hints[key]) for key, inner in typing.cast(Any, value).items() if key in hints)
    elif (each := _table_of(value, hint)) is not None:
        yield from ((str(key), inner, each) for key, inner in typing.cast(Any, value).items())


def _with_new_keys(raw: dict[str, Any], hint: Any, section: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """A file's settings under today's keys, and which old ones were there, dotted, with their new names.

    Raises:
        ConfigError: an old key and the one that took its place are both there.
    """
    renamed: dict[str, str] = {}
    now: dict[str, Any] = dict(raw)
    struct = _struct_for(raw, hint)
    for old, new in getattr(struct, "OLD_KEYS", {}).items():
        if old in raw:
            before, after = _dotted(section, old), _dotted(section, new)
            if new in raw:
                raise ConfigError(f"{after} and {before}, its old name, are both given; leave {before} out")
            renamed[before] = after
    if renamed:
        now = {struct.OLD_KEYS.get(key, key): value for key, value in raw.items()}  # type: ignore[union-attr]
    for key, value, inner in _inside(now, hint):
        if isinstance(value, dict):
            now[key], below = _with_new_keys(value, inner, _dotted(section, key))
            renamed |= below
    return now, renamed


def _stored_names(value: Any, hint: Any) -> Any:
    """Settings under the names that msgspec knows the keys by."""
    if not isinstance(value, Mapping):
        return value
    inner = {key: _stored_names(below, below_hint) for key, below, below_hint in _inside(value, hint)}
    names: dict[str, str] = {}
    if struct := _struct_for(value, hint):
        names = dict(zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True))
    return {names.get(key, key): inner.get(key, below) for key, below in value.items()}


def _dotted(section: str, key: object) -> str:
    return f"{section}.{key}" if section else str(key)


# What is wrong


def unknown_key(raw: object, hint: Any, section: str = "") -> str | None:
    """A message about the first key that a type does not have: its section, a similar key, and the keys there are.

    Args:
        raw: as read from a file; not checked yet, so it may hold anything.
        hint: a type; structs are looked into, and mappings to structs. A struct that takes keys it does not know,
            such as the head of a file, is asked only about those it does.
        section: the dotted keys that lead to ``raw``.
    """
    struct = _struct_for(raw, hint)
    if struct is not None and struct.__struct_config__.forbid_unknown_fields:
        known = [*struct.__struct_fields__]
        if struct.__struct_config__.tag is not None:
            known.insert(0, str(struct.__struct_config__.tag_field))
        for key, value in typing.cast(Mapping[Any, Any], raw).items():
            if key not in known:
                return _unknown_key_message(str(key), isinstance(value, Mapping), section, known)
    for key, value, inner in _inside(raw, hint):
        if said := unknown_key(value, inner, _dotted(section, key)):
            return said
    return None


def _unknown_key_message(key: str, is_section: bool, section: str, known: list[str]) -> str:
    here = f"[{_dotted(section, key)}]" if is_section else f"`{key}`" + (f" in [{section}]" if section else "")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ";"
    return f"unknown key {here}{hint} There {'is' if len(known) == 1 else 'are'} {', '.join(known)}"


def _what_is_wrong(raw: object, hint: Any, text: str, section: str = "") -> str:
    """The key whose value does not fit, what was expected there and what came.

    Args:
        raw: settings that msgspec refused.
        hint: their type.
        text: what msgspec said.
        section: the dotted keys that lead to ``raw``.
    """
    for key, value, inner in _inside(raw, hint):
        try:
            _convert_value(value, inner)
        except (msgspec.ValidationError, ValueError, RecursionError) as exc:
            return _what_is_wrong(value, inner, str(exc), _dotted(section, key))
    if not section or (isinstance(raw, Mapping) and _holds_tables(hint)):
        # Something is missing, or the table is none of several kinds.
        said = _AT.fullmatch(text)
        assert said is not None
        return f"{_dotted(section, said['key']) if said['key'] else section or 'the file'}: {said['what']}"
    came = "what is there" if is_marked(hint, KeyMark.SECRET) else shown(raw)
    return f"{section} must be {expected(hint, raw)}, not {came}"


def _holds_tables(hint: Any) -> bool:
    return any(
        typing.get_origin(option) is dict or (isinstance(option, type) and issubclass(option, msgspec.Struct))
        for option in options_of(hint)
    )
