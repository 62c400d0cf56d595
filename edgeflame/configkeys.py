"""Which keys of a configuration its structs do not know, and what was perhaps meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

import msgspec


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
                    return _words(str(key), isinstance(value, Mapping), section, list(fields))
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


def _words(key: str, is_section: bool, section: str, known: list[str]) -> str:
    here = f"[{_dotted(section, key)}]" if is_section else f"`{key}`" + (f" in [{section}]" if section else "")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ";"
    return f"unknown key {here}{hint} There {'is' if len(known) == 1 else 'are'} {', '.join(known)}"


def _dotted(section: str, key: object) -> str:
    return f"{section}.{key}" if section else str(key)
