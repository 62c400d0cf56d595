"""The wire messages: what goes through, what is refused, and that the first version's bytes stay readable."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflame.errors import FederationError, UsageError
from edgeflame.mqtt import messages as m
from edgeflame.mqtt.messages import BlobManifest
from edgeflame.mqtt.topics import ChunkTopic, MessageTopic, Topics, check_name, is_name
from edgeflame.transfer.protocol import pack_mask, unpack_mask

RUN, BOOT, SHA = "0" * 32, "a" * 32, "b" * 64
MANIFEST = BlobManifest(sha256=SHA, size_bytes=2500, chunk_bytes=1000, crc32s=bytes(12))
OFFER = m.Offer(run=RUN, purpose="update", round=3, manifest=MANIFEST, num_samples=17, metrics={"loss": 0.5})

UP = [
    m.Hello(boot=BOOT, install=RUN, software="edgeflame 0.1.0"),
    m.Heartbeat(boot=BOOT, run=RUN, ready=True, initial=SHA, activity="train", round=2, step=5, num_steps=9),
    OFFER,
    m.BlobNeed(sha256=SHA, missing=b"\x05", resend=True),
    m.TaskFailed(run=RUN, purpose="update", round=1, detail="no images"),
    m.FinishReport(run=RUN, model=SHA, package=SHA, summary={"threshold": 1.5, "kind": "tiny"}),
]
DOWN = [
    m.Welcome(boot=BOOT, aggregator=RUN),
    m.TurnedAway(boot=BOOT, reason="name_in_use", detail="another"),
    m.BlobNeed(sha256=SHA, missing=b"\x00"),
    m.Receipt(run=RUN, purpose="update", round=1, sha256=SHA),
    m.Refusal(run=RUN, purpose="update", round=1, sha256=SHA, reason="late", detail="round 1 is closed"),
]


@pytest.mark.parametrize("message", UP, ids=lambda message: type(message).__name__)
def test_what_a_site_says_arrives(message: m.UpMessage) -> None:
    assert m.decode_up(m.encode_message(message)) == message


@pytest.mark.parametrize("message", DOWN, ids=lambda message: type(message).__name__)
def test_what_the_aggregator_says_arrives(message: m.DownMessage) -> None:
    assert m.decode_down(m.encode_message(message)) == message


def test_round_state_and_presence_arrive() -> None:
    state = m.RoundState(run=RUN, phase="train", round=1, num_rounds=2, asked=("a", "b"), base=MANIFEST)
    assert m.decode_round(m.encode_message(state)) == state
    presence = m.Presence(boot=BOOT, online=False)
    assert m.decode_presence(m.encode_message(presence)) == presence


# As the first version wrote them; these bytes must stay readable by every 1.x.
GOLDEN = (
    b'{"type":"offer","v":"1.0","run":"00000000000000000000000000000000","purpose":"update","round":3,"manifest":'
    b'{"sha256":"' + SHA.encode() + b'","size_bytes":2500,"chunk_bytes":1000,"crc32s":"AAAAAAAAAAAAAAAA",'
    b'"codec":"raw"},"num_samples":17,"metrics":{"loss":0.5}}'
)


def test_wire_bytes_of_the_first_version_are_read() -> None:
    assert m.decode_up(GOLDEN) == msgspec.structs.replace(OFFER, v="1.0")


def test_what_is_added_since_does_not_disturb_the_first_version() -> None:
    # A 1.0 receiver ignores what it does not know; all else stands where it stood.
    now = m.encode_message(OFFER).replace(b'"v":"' + m.VERSION.encode() + b'"', b'"v":"1.0"')
    assert now.startswith(GOLDEN[:-1])
    assert m.decode_up(now) == msgspec.structs.replace(OFFER, v="1.0")


def test_a_newer_minor_version_is_understood() -> None:
    newer = GOLDEN.replace(b'"v":"1.0"', b'"v":"1.7","colour":{"new":[1,2]}')
    assert m.decode_up(newer) == msgspec.structs.replace(OFFER, v="1.7")


def test_another_major_version_is_refused_with_both_named() -> None:
    with pytest.raises(FederationError, match=rf"2\.0.*{m.VERSION}"):
        m.decode_up(b'{"v":"2.0","everything":"else"}')


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"v":1}',
        b'{"v":"1"}',
        b'{"v":"1.0"}',
        b'{"v":"1.0","type":"shutdown"}',
        GOLDEN.replace(b'"round":3', b'"round":-3'),
        GOLDEN.replace(b'"round":3', b'"round":1e9'),
        GOLDEN.replace(b'"num_samples":17', b'"num_samples":-1'),
        GOLDEN.replace(b'"num_samples":17', b'"num_samples":NaN'),
        GOLDEN.replace(b'"loss":0.5', b'"loss":1e999'),
        GOLDEN.replace(b'"size_bytes":2500', b'"size_bytes":99999999999999'),
        GOLDEN.replace(b'"chunk_bytes":1000', b'"chunk_bytes":1'),
        GOLDEN.replace(b'"chunk_bytes":1000', b'"chunk_bytes":0'),
        GOLDEN.replace(b'"codec":"raw"', b'"codec":"pickle"'),
        GOLDEN.replace(SHA.encode(), b"../../../etc/passwd"),
        GOLDEN.replace(SHA.encode(), SHA.encode() + b"\\n"),
        m.encode_message(DOWN[0]),
        GOLDEN + b" " * m.MAX_MESSAGE_BYTES,
    ],
    ids=lambda data: repr(data[:30]),
)
def test_hostile_bytes_raise_one_error(data: bytes) -> None:
    with pytest.raises(FederationError):
        m.decode_up(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_never_crash_a_decoder(data: bytes) -> None:
    for decode in (m.decode_up, m.decode_down, m.decode_round, m.decode_presence):
        with pytest.raises(FederationError):
            decode(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([m.encode_message(message) for message in UP]), st.data())
def test_damaged_messages_decode_or_raise_the_one_error(encoded: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(encoded) - 1))
    stop = data.draw(st.integers(start, len(encoded)))
    damaged = encoded[:start] + data.draw(st.binary(max_size=20)) + encoded[stop:]
    with contextlib.suppress(FederationError):
        m.decode_up(damaged)


def test_truncation_at_every_byte() -> None:
    for cut in range(len(GOLDEN)):
        with pytest.raises(FederationError):
            m.decode_up(GOLDEN[:cut])


@pytest.mark.parametrize("name", ["a", "Line-3", "plant_7.hall-2", "x" * 64])
def test_good_names(name: str) -> None:
    assert check_name("site", name) == name


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "a b", ".hidden", "..", "-x", "x" * 65, "ä", "a\n", "a\x00"])
def test_bad_names_are_refused(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(UsageError, match="site name"):
        check_name("site", name)


def test_topics_are_parsed_back() -> None:
    topics = Topics(fleet="f")
    assert topics.parse(topics.site_up("s")) == MessageTopic(kind="up", site="s")
    assert topics.parse(topics.site_down("s")) == MessageTopic(kind="down", site="s")
    assert topics.parse(topics.round) == MessageTopic(kind="round")
    assert topics.parse(topics.site_presence("s")) == MessageTopic(kind="site_presence", site="s")
    assert topics.parse(topics.aggregator_presence) == MessageTopic(kind="aggregator_presence")
    assert topics.parse(topics.training_chunk(SHA, 7)) == ChunkTopic(site=None, sha256=SHA, index=7)
    assert topics.parse(topics.up_chunk("s", SHA, 0)) == ChunkTopic(site="s", sha256=SHA, index=0)


@pytest.mark.parametrize(
    "rest", ["", "site/+/up/message", "site/../up/message", f"blob/{SHA}/-1", f"blob/{SHA}/01", "blob/x/1", "line/1"]
)
def test_strange_topics_address_nothing(rest: str) -> None:
    assert Topics(fleet="f").parse(f"edgeflame/v1/f/{rest}") is None
    assert Topics(fleet="f").parse("edgeflame/v1/other/round") is None


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bitmaps_survive(bits: list[bool]) -> None:
    import numpy as np

    mask = np.array(bits)
    assert (unpack_mask(pack_mask(mask), len(bits)) == mask).all()


@pytest.mark.parametrize(("data", "num_chunks"), [(b"", 1), (b"\x00\x00", 8), (b"\x08", 3)])
def test_bitmaps_of_the_wrong_length_are_refused(data: bytes, num_chunks: int) -> None:
    with pytest.raises(FederationError):
        unpack_mask(data, num_chunks)
