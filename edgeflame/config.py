"""TOML files decoded straight into frozen structs; an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeflame.configkeys import unknown_key
from edgeflame.errors import ConfigError
from edgeflame.presets import overlay, start_from_presets

T = TypeVar("T")

_TOML_TYPES = (dt.datetime, dt.date, dt.time)
"""What TOML has of its own, and messages should call by its name."""

_AT = re.compile(r"(?P<what>.*) - at `(?:key in )?\$\.?(?P<key>.*)`", re.DOTALL)
"""How msgspec says where something is wrong; people write ``web.listen``."""


def load_config(path: Path | None, kind: type[T], overrides: Mapping[str, Any] | None = None) -> T:
    """Read a TOML file as ``kind``; the defaults when no path is given.

    Settings of a learning start from the preset they name, see :mod:`edgeflame.presets`.

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
        msg = f"{path}: cannot read the configuration ({exc.strerror})"
        raise ConfigError(msg) from exc
    return parse_config(data, kind, str(path), overrides)


def parse_config(data: bytes, kind: type[T], name: str, overrides: Mapping[str, Any] | None = None) -> T:
    """Decode TOML bytes as ``kind``; ``name`` is what errors call them, ``overrides`` as in :func:`load_config`.

    Raises:
        ConfigError: not TOML, or it does not fit ``kind``.
    """
    try:
        raw = overlay(msgspec.toml.decode(data), _without_none(overrides or {}))
        if unknown := unknown_key(raw, kind):
            raise ConfigError(unknown)
        return msgspec.convert(start_from_presets(raw, kind), kind, str_keys=True, builtin_types=_TOML_TYPES)
    except ConfigError as exc:
        msg = f"{name}: {exc}"
        raise ConfigError(msg) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as exc:
        # The parser lets through dates that are none, integers of thousands of digits, and hundreds of brackets.
        what = _AT.sub(lambda found: f"{found['key'] or 'the file'}: {found['what']}", str(exc))
        msg = f"{name}: {what}"
        raise ConfigError(msg) from exc


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
