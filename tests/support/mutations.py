"""Hostile bytes from valid ones: raw damage, and damage that knows the format, so that it gets past the first check."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Mutator = Callable[[bytes, random.Random], bytes]

WORDS = (
    b"", b"\x00", b"\xff", b"\xff\xfe", b"\n", b"\r", b'"', b"\\u0000", b"\\ud800", b"[" * 2000, b"{" * 2000,
    b'{"a":' * 1500, b"-1", b"1e999", b"-0", b"NaN", b"Infinity", b"18446744073709551616", b"9" * 400, b"null",
    b"true", b"../../etc/passwd", b"+", b"#", b"$SYS/#", b"\xf0\x9f\x92\xa5", b"\xed\xa0\x80", b"A" * 5000,
    b"= ", b"[[", b"]]", b"'''", b"mqtts://", b"@", b"%00", b"::", b",,", b"\xef\xbb\xbf", b"2026-13-45T99:99:99Z",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 64, 255, 65536, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**30, -(2**63), 0.0,
    -0.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "+", "#", "a/b", "../x", "\x00",
    "late\n", "A" * 70, "A" * 100_000, "0" * 32, "f" * 64, "F16", "F64", "BOOL", "BF16", "raw", "zstd", [], {}, [[]],
    [0, 0], [-1, 4], [2**40, 2**40], [0] * 1000, {"a": None}, {"": {"": {"": {}}}},
)  # fmt: skip


def seeds() -> st.SearchStrategy[int]:
    """One number stands for one case: a failing one is reported by it, and comes again with it."""
    return st.integers(0, 2**64 - 1)


def raw(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double, replace, insert: some of each."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(changed) + 1)
        stop = min(len(changed), start + rng.choice((0, 1, 1, 2, 8, 100)))
        match rng.randrange(6):
            case 0 if changed:
                changed[min(start, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[start:]
            case 2:
                changed[start:start] = changed[start:stop] * rng.choice((1, 50))
            case 3:
                changed[start:stop] = rng.randbytes(rng.choice((1, 4, 8)))
            case 4:
                del changed[start:stop]
            case _:
                changed[start:stop] = rng.choice(WORDS)
    return bytes(changed)


def structured(document: Any, rng: random.Random) -> Any:
    """A JSON document with some of its nodes replaced, deleted, doubled or moved."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", "__metadata__", "type", "v", "A" * 500))] = rng.choice(VALUES)
            case 2:
                other, other_key = rng.choice(places)
                if key in holder if isinstance(holder, dict) else key < len(holder):
                    moved = other.get(other_key) if isinstance(other, dict) else 0
                    holder[key] = json.loads(json.dumps(moved))
            case _:
                if isinstance(holder, dict) or key < len(holder):
                    holder[key] = rng.choice(VALUES)
        document = json.loads(json.dumps(document))
    return document


def json_document(data: bytes, rng: random.Random) -> bytes:
    """Structured or raw damage to JSON."""
    return raw(data, rng) if rng.random() < 0.4 else json.dumps(structured(json.loads(data), rng)).encode()


TOML_VALUES = (
    "nan", "inf", "-inf", "1e999", "-1", "0", "1e9", "9" * 400, "0x7fffffffffffffffff", "true", '""', '"x"', "[]",
    "[[]]", "[1, 2]", "{}", "{a = 1}", "1979-05-27", "07:32:00", "2026-13-45T99:99:99Z", '"\\u0000"',
    '"' + "A" * 5000 + '"', '["x", 1]', "[nan]", "''",
)  # fmt: skip


def toml(data: bytes, rng: random.Random) -> bytes:
    """Raw damage to a TOML file, or values of it replaced, and keys moved to where they do not belong."""
    if rng.random() < 0.4:
        return raw(data, rng)
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.choice([number for number, line in enumerate(lines) if " = " in line])
        key = lines[at].partition(" = ")[0]
        match rng.randrange(4):
            case 0:
                lines.insert(rng.randrange(len(lines) + 1), lines[at])
            case 1:
                lines[at] = f"{rng.choice(('x', '', 'a.b', key[:-1], key.upper()))} = {rng.choice(TOML_VALUES)}"
            case _:
                lines[at] = f"{key} = {rng.choice(TOML_VALUES)}"
    return "\n".join(lines).encode()


def image(data: bytes, rng: random.Random) -> bytes:
    """Raw damage to an image file, or numbers of its header or directory, front or back, replaced by extreme ones."""
    if rng.random() < 0.5:
        return raw(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else max(0, len(data) - rng.randrange(1, 300))
        size = rng.choice((1, 2, 4))
        number = rng.choice((0, 1, 2, 3, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 20, 1 << 24))
        changed[start : start + size] = (number % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
    return bytes(changed)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage to a header that is framed right, to the frame, or to the values."""
    length = int.from_bytes(data[:8], "little")
    match rng.randrange(5):
        case 0:
            return raw(data, rng)
        case 1:
            size = rng.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1))
            return size.to_bytes(8, "little") + data[8:]
        case 2:
            values = bytearray(data)
            start = rng.randrange(8 + length, len(data))
            values[start : start + 8] = rng.choice((b"\xff" * 8, b"\x00\x00\xc0\x7f" * 2, b"\x00\x7c" * 4, b"\x80" * 8))
            return bytes(values[: len(data)])
        case _:
            document = json.loads(data[8 : 8 + length])
            if "__metadata__" in document and rng.random() < 0.5:
                inside = document["__metadata__"]
                name = rng.choice(list(inside))
                try:
                    inside[name] = json.dumps(structured(json.loads(inside[name]), rng))
                except ValueError:
                    inside[name] = rng.choice(WORDS).decode("utf-8", "replace")
            else:
                document = structured(document, rng)
            header = json.dumps(document).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + length :]


def archive(data: bytes, rng: random.Random) -> bytes:
    """Damage to a zip, or a sound zip with damaged, compressed, doubled, missing or strangely named members."""
    if rng.random() < 0.3:
        return raw(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        members = [(info.filename, source.read(info)) for info in source.infolist()]
    index = rng.randrange(len(members))
    name, content = members[index]
    compression = zipfile.ZIP_STORED
    match rng.randrange(6):
        case 0:
            compression = zipfile.ZIP_DEFLATED
            content = bytes(1 << 22)
        case 1:
            name = rng.choice(("../" + name, "/" + name, "", "x" * 300, name + "\x00"))
        case 2 if name.endswith(".json"):
            content = json_document(content, rng)
        case 3:
            del members[index]
        case _:
            content = raw(content, rng)
    members[min(index, len(members) - 1)] = (name, content)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as target:
        for name, content in members:
            if name not in target.namelist():
                target.writestr(zipfile.ZipInfo(name or "empty"), content, compression)
    return out.getvalue()


def _places(node: Any) -> Any:
    match node:
        case dict():
            for key, value in node.items():
                yield node, key
                yield from _places(value)
        case list():
            for index, value in enumerate(node[:20]):
                yield node, index
                yield from _places(value)
        case _:
            return
