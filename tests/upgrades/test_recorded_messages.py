"""Minor versions interoperate: what earlier ones said, recorded from real runs, is read today; and later ones are.

The recordings are made by ``tests/support/record_messages.py``, once for each version, and never changed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from edgeflame.errors import FederationError
from edgeflame.methods import Learning
from edgeflame.mqtt import messages as m
from tests.support.paths import RECORDED

DECODERS: dict[str, Callable[[bytes], Any]] = {
    "up": m.decode_up,
    "down": m.decode_down,
    "round": m.decode_round,
    "presence": m.decode_presence,
}
MESSAGES = [(file.stem, line) for file in sorted(RECORDED.glob("*/*.jsonl")) for line in file.read_bytes().splitlines()]


def described(value: object) -> str:
    return "" if not isinstance(value, bytes) else value[:50].decode()


def change(line: bytes, **fields: object) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(line), **fields})


def test_every_kind_of_message_of_the_first_version_is_recorded() -> None:
    tags = {msgspec.json.decode(line)["type"] for kind, line in MESSAGES if b'"v":"1.0"' in line}
    assert tags == {
        *("presence", "round", "hello", "welcome", "turned_away", "heartbeat", "offer", "need"),
        *("receipt", "refusal", "failed", "finished"),
    }


@pytest.mark.parametrize(("kind", "line"), MESSAGES, ids=described)
def test_recorded_messages_are_read_and_nothing_they_said_is_lost(kind: str, line: bytes) -> None:
    message = DECODERS[kind](line)
    said, understood = msgspec.json.decode(line), msgspec.json.decode(msgspec.json.encode(message))
    assert {name: understood.get(name) for name in said} == said


@pytest.mark.parametrize(("kind", "line"), MESSAGES, ids=described)
def test_a_later_minor_version_may_say_more(kind: str, line: bytes) -> None:
    more = change(line, v=f"{m.MAJOR}.{m.MINOR + 7}", colour={"new": [1, None]}, zeal=1.5)
    assert DECODERS[kind](more) == msgspec.structs.replace(DECODERS[kind](line), v=f"{m.MAJOR}.{m.MINOR + 7}")


@pytest.mark.parametrize(("kind", "line"), MESSAGES, ids=described)
@pytest.mark.parametrize("version", ["0.9", f"{m.MAJOR + 1}.0"])
def test_another_major_version_is_refused_with_both_named(kind: str, line: bytes, version: str) -> None:
    with pytest.raises(FederationError) as caught:
        DECODERS[kind](change(line, v=version))
    assert f"protocol {version}, we speak {m.VERSION}" in str(caught.value)


def test_words_of_a_later_minor_version_are_read() -> None:
    refusal = next(line for _, line in MESSAGES if b'"type":"refusal"' in line)
    assert m.decode_down(change(refusal, v="1.9", reason="wrong_weather")).reason == "wrong_weather"  # type: ignore[union-attr]
    turned = next(line for _, line in MESSAGES if b'"type":"turned_away"' in line)
    assert m.decode_down(change(turned, v="1.9", reason="holiday")).reason == "holiday"  # type: ignore[union-attr]
    state = next(line for _, line in MESSAGES if b'"type":"round"' in line)
    assert m.decode_round(change(state, v="1.9", phase="celebration")).phase == "celebration"
    for strange in ("", "No Words", "x" * 41, "late\n", 7):
        with pytest.raises(FederationError):
            m.decode_down(change(refusal, reason=strange))


def test_the_learning_of_the_first_version_is_understood() -> None:
    states = [m.decode_round(line) for kind, line in MESSAGES if kind == "round"]
    assert {msgspec.json.decode(state.learning, type=Learning).method for state in states} == {"flame"}
