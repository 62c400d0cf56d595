"""TOML files decoded straight into frozen structs; an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edgeflame.errors import ConfigError

T = TypeVar("T")


def load_config(path: Path | None, kind: type[T]) -> T:
    """Read a TOML file as ``kind``; the defaults when no path is given.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or does not fit ``kind``.
    """
    if path is None:
        return parse_config(b"", kind, "defaults")
    try:
        data = path.read_bytes()
    except OSError as exc:
        msg = f"{path}: cannot read the configuration ({exc.strerror})"
        raise ConfigError(msg) from exc
    return parse_config(data, kind, str(path))


def parse_config(data: bytes, kind: type[T], name: str) -> T:
    """Decode TOML bytes as ``kind``; ``name`` is what errors call them.

    Raises:
        ConfigError: not TOML, or it does not fit ``kind``.
    """
    try:
        return msgspec.toml.decode(data, type=kind)
    except ConfigError as exc:
        msg = f"{name}: {exc}"
        raise ConfigError(msg) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        msg = f"{name}: {exc}"
        raise ConfigError(msg) from exc
