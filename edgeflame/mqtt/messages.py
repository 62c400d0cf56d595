"""Every message of the wire protocol, as JSON with a type and a version; and the one way to decode them.

A message carries the protocol version its sender speaks, ``major.minor``. Another major version is refused with
both versions named. Within a major version fields are only added, with defaults, and unknown ones are ignored;
so minor versions understand each other. Words of a later minor version that a reader need not understand (a reason,
a phase it takes no part in) are read as they are. An unknown type of message is refused: the receiver logs and
ignores it.

Bytes from the network are hostile until they are decoded here: :func:`decode_message` checks the size first, and
every number and text for its range, and raises one type of error.

First come blobs, which are announced by a manifest before any of their bytes; then training. The messages of released
packages are in :mod:`edgeflame.mqtt.release_messages`.
"""

from __future__ import annotations

import re
import zlib
from typing import Annotated, Literal, TypeVar

import msgspec

from edgeflame.errors import FederationError
from edgeflame.mqtt.topics import MAX_NAME_CHARS

DEFAULT_WINDOW_CHUNKS = 16
"""The window at the start, and that of receivers of protocol 1.0, whose messages have no window."""

DEFAULT_CHUNK_BYTES = 256 << 10
"""Small enough for every broker's packet limit and for a smooth bounded window, large enough to be fast."""
MAX_CHUNK_BYTES = 1 << 20
MAX_CHUNKS = 1 << 16
"""Keeps a manifest (4 bytes of checksum a chunk) and a need bitmap (a bit a chunk) short; 16 GiB at 256 KiB."""

Codec = Literal["raw", "float16", "zstd", "float16_zstd"]
"""Forms of an update, see :mod:`edgeflame.transfer.compression`; whatever else is sent is raw."""


class BlobManifest(msgspec.Struct, frozen=True, kw_only=True):
    """A blob, described. All numbers are checked when it is built, so also when it is decoded."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNKS * MAX_CHUNK_BYTES)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK_BYTES)]
    crc32s: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_CHUNKS)]
    """CRC-32 of each chunk, little-endian: finds a damaged chunk before the whole blob is there."""
    codec: Codec = "raw"
    """What to do to the bytes once they are there; the hash is of what is sent."""

    def __post_init__(self) -> None:
        num_chunks = -(-self.size_bytes // max(self.chunk_bytes, 1))
        if num_chunks > MAX_CHUNKS or len(self.crc32s) != 4 * num_chunks:
            # ValueError, so that msgspec reports it as a validation error of the message it came in.
            raise ValueError(f"a manifest of {num_chunks} chunks with {len(self.crc32s)} bytes of checksums")

    @property
    def num_chunks(self) -> int:
        return len(self.crc32s) // 4

    def offset(self, index: int) -> int:
        """Where a chunk begins in the blob, bytes."""
        return index * self.chunk_bytes

    def length(self, index: int) -> int:
        """Size of a chunk, bytes; the last may be shorter."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def matches(self, index: int, data: bytes) -> bool:
        """Whether these are the bytes of a chunk, as far as size and CRC-32 tell."""
        crc = int.from_bytes(self.crc32s[4 * index : 4 * index + 4], "little")
        return len(data) == self.length(index) and zlib.crc32(data) == crc


MAJOR, MINOR = 1, 1
VERSION = f"{MAJOR}.{MINOR}"

MAX_MESSAGE_BYTES = 1 << 20
"""The longest message is a manifest of ``MAX_CHUNKS`` chunks, about 350 kB; below any broker's packet limit."""

MAX_ROUNDS = 100_000
MAX_SAMPLES = 1_000_000_000
MAX_STEPS = 1_000_000_000

Name = Annotated[str, msgspec.Meta(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARS - 1}}}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=500)]
Key = Annotated[str, msgspec.Meta(max_length=100)]
Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,40}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
RoundNumber = Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUNDS)]
Metrics = Annotated[dict[Key, float], msgspec.Meta(max_length=100)]
Summary = Annotated[dict[Key, float | Text], msgspec.Meta(max_length=100)]

Phase = Literal["waiting", "initialise", "train", "statistics", "finish", "done", "failed"]
Purpose = Literal["initial", "update", "statistics", "finish"]
RefusalReason = Literal[
    "late",  # the round is closed
    "stale_round",  # a round that is not the current one
    "unknown_run",  # a run that is not this one
    "unknown_site",  # a site that is not of this run
    "not_asked",  # this site was not asked in this round
    "duplicate",  # another update of this site was accepted already
    "too_large",  # the blob is larger than it can be
    "corrupt",  # the bytes do not have the announced hash, again and again
    "not_tensors",  # not a safetensors file, or a damaged one
    "schema",  # tensors of other names, shapes or types
    "space",  # statistics of the embeddings of another model
    "floor",  # averages of fewer patches or images than may be shared
    "impossible",  # values that no statistics have
    "not_finite",  # NaN or infinite values
    "norm",  # further from the base model than allowed
    "samples",  # an impossible number of samples
    "failed",  # the site reported that it cannot
    "left",  # the site has left the run for good
]


class WireMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """What every message has. Each kind states its ``tag``: the class's name is not part of the protocol."""

    v: Version = VERSION


class Hello(WireMessage, frozen=True, kw_only=True, tag="hello"):
    """A site asks to take part; sent on every connection until it is welcomed or refused."""

    boot: Id
    """The id of the site's process; another after every start."""
    install: Id
    """The id of the state directory; the same after every start. It tells a restarted site from a second one."""
    software: Text = ""


class Heartbeat(WireMessage, frozen=True, kw_only=True, tag="heartbeat"):
    """A site's sign of life, and its progress. An unchanging ``step`` is a sign of life but not of progress."""

    boot: Id
    run: Id | None = None
    ready: bool = False
    """It has data, a worker and an initial model: rounds may begin."""
    initial: Sha256 | None = None
    """Its initial model."""
    activity: Key = "idle"
    round: RoundNumber = 0
    step: Count = 0
    num_steps: Count = 0
    paused: Text | None = None
    """Why its operator or its shift plan has paused it; None if it is not paused. A paused site is asked for nothing
    and does not count as missing. Since 1.1."""


class Offer(WireMessage, frozen=True, kw_only=True, tag="offer"):
    """A site has a model to deliver: its initial one, or the update of a round; or its statistics, as of round 0.
    Answered with :class:`BlobNeed`, :class:`Receipt` or :class:`Refusal`; repeated until it is.
    """

    run: Id
    purpose: Literal["initial", "update", "statistics"]
    round: RoundNumber
    manifest: BlobManifest
    num_samples: Annotated[int, msgspec.Meta(ge=0, le=MAX_SAMPLES)] = 0
    metrics: Metrics = {}
    num_steps: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEPS)] = 0
    """Optimiser steps of the update; 0 if the sender is older. Since 1.1."""


class BlobNeed(WireMessage, frozen=True, kw_only=True, tag="need"):
    """What a receiver still lacks of a blob: request, acknowledgement and repair in one."""

    sha256: Sha256
    missing: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNKS // 8)]
    """A bit for each chunk, lowest bit first; all zero: it has the blob."""
    resend: bool = False
    """Chunks on their way are to be considered lost; otherwise this acknowledges those no longer missing."""
    window: Annotated[int, msgspec.Meta(ge=1, le=1024)] = DEFAULT_WINDOW_CHUNKS
    """The most chunks that may be on their way. Since 1.1."""


class Receipt(WireMessage, frozen=True, kw_only=True, tag="receipt"):
    """Durable at the aggregator: the site may forget its own copy."""

    run: Id
    purpose: Purpose
    round: RoundNumber
    sha256: Sha256 | None = None


class Refusal(WireMessage, frozen=True, kw_only=True, tag="refusal"):
    """What the site sent does not count, and why."""

    run: Id
    purpose: Purpose
    round: RoundNumber
    sha256: Sha256 | None = None
    reason: Word
    """A :data:`RefusalReason`, or one of a later minor version; it is for people, and ``detail`` says it in words."""
    detail: Text = ""


class TaskFailed(WireMessage, frozen=True, kw_only=True, tag="failed"):
    """A site cannot do its part of a phase. Answered with :class:`Refusal`, reason ``failed``."""

    run: Id
    purpose: Purpose
    round: RoundNumber
    detail: Text


class FinishReport(WireMessage, frozen=True, kw_only=True, tag="finished"):
    """A site made its package from the final model. Answered with :class:`Receipt`."""

    run: Id
    model: Sha256
    package: Sha256 | None = None
    summary: Summary = {}


class Leaving(WireMessage, frozen=True, kw_only=True, tag="leaving"):
    """A site leaves the run for good. Answered with :class:`TurnedAway`, reason ``left``; repeated until it is.
    Since 1.1.
    """

    boot: Id
    run: Id
    detail: Text = ""


class Welcome(WireMessage, frozen=True, kw_only=True, tag="welcome"):
    """The site of this boot may take part."""

    boot: Id
    aggregator: Id
    """The aggregator's boot; a site says hello again to another one."""


class TurnedAway(WireMessage, frozen=True, kw_only=True, tag="turned_away"):
    """The site of this boot may not take part."""

    boot: Id
    reason: Word
    """``name_in_use``, ``unknown_site``, ``revoked``, ``left`` (it left the run for good), ``full`` (too many sites),
    or one of a later minor version."""
    detail: Text


class StatisticsWanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a site is to send of its statistics, see :mod:`edgeflame.statistics.shared`."""

    form: Literal["moments", "low_rank"]
    rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 14)] = 0
    """Eigenpairs per position, for ``low_rank``."""


class RoundState(WireMessage, frozen=True, kw_only=True, tag="round"):
    """Retained: what everyone is to do now. A site needs no other instruction."""

    run: Id
    phase: Word
    """A :data:`Phase`; a site waits in one it does not know."""
    round: RoundNumber = 0
    num_rounds: RoundNumber = 0
    asked: tuple[Name, ...] = ()
    """The sites that are to act in this phase."""
    learning: msgspec.Raw = msgspec.Raw(b"{}")
    """``edgeflame.methods.Learning``; decoded by the site, which refuses what it does not know."""
    base: BlobManifest | None = None
    """``train``: the model to train from; ``statistics``, ``finish`` and ``done``: the final one."""
    wanted: StatisticsWanted | None = None
    """``statistics``: what each asked site is to send."""
    statistics: BlobManifest | None = None
    """``finish`` and ``done``: the pooled statistics of the fleet, where its sites share them."""
    ledger: BlobManifest | None = None
    """``finish``: the ledger so far, JSON."""
    deadline_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How long a site may be without progress before it is left out, seconds."""
    detail: Text = ""
    """``failed``: why; otherwise what is being waited for, if it is anything out of the ordinary."""
    codec: Key = "raw"
    """The form in which updates are wanted (:data:`Codec`); raw ones are always accepted.
    Since 1.1."""
    paused: tuple[Name, ...] = ()
    """Sites that the aggregator's operator has paused. Since 1.1."""


class Presence(WireMessage, frozen=True, kw_only=True, tag="presence"):
    """Retained: whether a site or the aggregator is connected. ``online`` false comes from the last will or a clean
    exit.
    """

    boot: Id
    online: bool
    install: Id | None = None
    run: Id | None = None


UpMessage = Hello | Heartbeat | Offer | BlobNeed | TaskFailed | FinishReport | Leaving
DownMessage = Welcome | TurnedAway | BlobNeed | Receipt | Refusal
Message = UpMessage | DownMessage | RoundState | Presence

_UP: msgspec.json.Decoder[UpMessage] = msgspec.json.Decoder(UpMessage)
_DOWN: msgspec.json.Decoder[DownMessage] = msgspec.json.Decoder(DownMessage)
_ROUND = msgspec.json.Decoder(RoundState)
_PRESENCE = msgspec.json.Decoder(Presence)

M = TypeVar("M")


def encode_message(message: WireMessage) -> bytes:
    """The bytes of a message.

    Raises:
        FederationError: it is longer than a receiver would read.
    """
    data = msgspec.json.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise FederationError(
            f"a {message.__struct_config__.tag} message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}"
        )
    return data


def decode_up(data: bytes) -> UpMessage:
    """Decode what a site sent.

    Raises:
        FederationError: anything else, whatever it is.
    """
    return decode_message(_UP, data)


def decode_down(data: bytes) -> DownMessage:
    """Decode what the aggregator sent to one site; errors as :func:`decode_up`."""
    return decode_message(_DOWN, data)


def decode_round(data: bytes) -> RoundState:
    """Decode the retained round state; errors as :func:`decode_up`."""
    return decode_message(_ROUND, data)


def decode_presence(data: bytes) -> Presence:
    """Decode a retained presence; errors as :func:`decode_up`."""
    return decode_message(_PRESENCE, data)


class _Head(msgspec.Struct):
    v: str


_HEAD = msgspec.json.Decoder(_Head)
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})", re.ASCII)


def decode_message(decoder: msgspec.json.Decoder[M], data: bytes) -> M:
    """Decode a message of the decoder's types; errors as :func:`decode_up`."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise FederationError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        # The version alone first: a later major version may have changed everything else.
        version = _HEAD.decode(data).v
        match = _VERSION.fullmatch(version)
        if match is None:
            raise FederationError(f"a message without a readable protocol version ({version[:20]!r})")
        if int(match[1]) != MAJOR:
            raise FederationError(
                f"the sender speaks protocol {version}, we speak {VERSION}: update the older of the two"
            )
        # Numbers beyond the range of their type, 1e999 say, are refused with the rest.
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise FederationError(f"not a message of this protocol ({str(exc)[:200]})") from exc
