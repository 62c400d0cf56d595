"""TOML files decoded straight into frozen structs; an unknown key or a wrong type is an error that names it.

For an unknown key the error also says which key was perhaps meant, and which there are.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from edgeflame.errors import ConfigError
from edgeflame.methods import merge_settings, start_from_presets


def unknown_key(raw: object, kind: Any, section: str = "") -> str | None:
    """Words about the first key that ``kind`` does not have: where it stands, what it is near to, what there is.

    Args:
        raw: as read from a file; not checked yet, so it may hold anything.
        kind: a type; structs are looked into, and mappings to structs. A struct that takes keys it does not know,
            such as the head of a file, is asked only about those it does.
        section: the dotted keys that lead to ``raw``.
    """
    if not isinstance(raw, Mapping):
        return None
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind.__struct_config__.tag is not None:
            return None  # one of several: which, its tag says, which msgspec reads
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        for key, value in raw.items():
            if key not in fields:
                if kind.__struct_config__.forbid_unknown_fields:
                    return _unknown_key_message(str(key), isinstance(value, Mapping), section, list(fields))
            elif said := _look_below(value, fields[key], _dotted(section, key)):
                return said
        return None
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
        values = get_args(kind)[1]
        return next((said for key in raw if (said := _look_below(raw[key], values, _dotted(section, key)))), None)
    return None


def _look_below(value: object, kind: Any, section: str) -> str | None:
    return next((said for one in _alternatives(kind) if (said := unknown_key(value, one, section))), None)


def _alternatives(kind: Any) -> Iterator[Any]:
    """``X | None`` as X and None; anything else as itself."""
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
        yield kind
    elif arguments := get_args(kind):
        yield from arguments
    else:
        yield kind


def _unknown_key_message(key: str, is_section: bool, section: str, known: list[str]) -> str:
    here = f"[{_dotted(section, key)}]" if is_section else f"`{key}`" + (f" in [{section}]" if section else "")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ";"
    return f"unknown key {here}{hint} There {'is' if len(known) == 1 else 'are'} {', '.join(known)}"


def _dotted(section: str, key: object) -> str:
    return f"{section}.{key}" if section else str(key)


T = TypeVar("T")

_TOML_TYPES = (dt.datetime, dt.date, dt.time)
"""What TOML has of its own, and messages should call by its name."""

_AT = re.compile(r"(?P<what>.*) - at `(?:key in )?\$\.?(?P<key>.*)`", re.DOTALL)
"""How msgspec says where something is wrong; people write ``web.listen``."""


def load_config(path: Path | None, kind: type[T], overrides: Mapping[str, Any] | None = None) -> T:
    """Read a TOML file as ``kind``; the defaults when no path is given.

    Settings of a learning start from the preset they name, see :mod:`edgeflame.methods`.

    Args:
        path: the file.
        kind: a struct.
        overrides: what wins over the file, nested as it is; None values say nothing.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or does not fit ``kind``.
    """
    if path is None:
        return parse_config(b"", kind, "defaults", overrides)
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path}: cannot read the configuration ({exc.strerror})") from exc
    return parse_config(data, kind, str(path), overrides)


def parse_config(data: bytes, kind: type[T], name: str, overrides: Mapping[str, Any] | None = None) -> T:
    """Decode TOML bytes as ``kind``; ``name`` is what errors call them, ``overrides`` as in :func:`load_config`.

    Raises:
        ConfigError: not TOML, or it does not fit ``kind``.
    """
    try:
        raw = merge_settings(msgspec.toml.decode(data), _without_none(overrides or {}))
        if unknown := unknown_key(raw, kind):
            raise ConfigError(unknown)
        return msgspec.convert(start_from_presets(raw, kind), kind, str_keys=True, builtin_types=_TOML_TYPES)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as exc:
        # The parser lets through dates that are none, integers of thousands of digits, and hundreds of brackets.
        what = _AT.sub(lambda found: f"{found['key'] or 'the file'}: {found['what']}", str(exc))
        raise ConfigError(f"{name}: {what}") from exc


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
